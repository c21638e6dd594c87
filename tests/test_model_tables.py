"""Tables of recipes: measured in every runtime, and written recipe by recipe."""
import json
from pathlib import Path

import pytest

from convnext_mm import UserError, choosing, latency, model_tables
from tests.helpers import DEMO_DETECTION, DEMO_SEGMENTATION, ROOT

TINY, BASE = 'upernet_convnext_tiny_512_160k_ade20k', 'upernet_convnext_base_512_160k_ade20k'


@pytest.fixture
def measure(monkeypatch, tmp_path):
    """A function that writes a table with given latencies; a negative one stops the measuring."""
    def write(**times: float) -> dict:
        def measured(path: str, *args: object, **kwargs: object) -> dict[str, float]:
            if times[Path(path).stem] < 0:
                raise KeyboardInterrupt
            return dict.fromkeys(choosing.RUNTIMES, times[Path(path).stem])
        monkeypatch.setattr(model_tables, 'measure_latency', measured)
        monkeypatch.setattr(model_tables, 'describe_recipe', lambda task, path, _: dict(
            name=Path(path).stem, size=(512, 512)))
        try:
            model_tables.write_tables(tmp_path, [f'{ROOT}/configs/{name}.py' for name in times])
        finally:
            table = json.loads((tmp_path / 'segmentation.json').read_text())
            found = {row['name']: row['latency_ms']['int8'] for row in table['recipes']}
        return found
    return write


def test_rows_of_other_recipes_are_kept(measure):
    assert measure(**{TINY: 100.0, BASE: 300.0}) == {TINY: 100.0, BASE: 300.0}
    assert measure(**{BASE: 50.0}) == {BASE: 50.0, TINY: 100.0}


def test_what_is_measured_before_a_stop_is_kept(measure, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        measure(**{TINY: 100.0, BASE: -1.0})
    table = json.loads((tmp_path / 'segmentation.json').read_text())
    assert [row['name'] for row in table['recipes']] == [TINY]


def test_rows_of_another_machine_are_not_mixed_in(measure, monkeypatch):
    measure(**{TINY: 100.0, BASE: 300.0})
    monkeypatch.setattr(model_tables, 'describe_processor', lambda: 'another')
    with pytest.raises(UserError, match='here it is another: measure all recipes again'):
        measure(**{BASE: 50.0})
    assert measure(**{TINY: 10.0, BASE: 30.0}) == {TINY: 10.0, BASE: 30.0}


@pytest.mark.slow
@pytest.mark.parametrize(('config', 'files'), [
    (DEMO_SEGMENTATION, ['model.onnx', 'for_int8.onnx']),
    (DEMO_DETECTION, ['model.onnx'])])  # from which int8 is quantized as well
def test_a_recipe_runs_in_every_runtime(config, files, monkeypatch):
    written = []
    monkeypatch.setattr(latency, 'write_onnx', lambda *args, write=latency.write_onnx: (
        written.append(args[2].name), write(*args)))
    found = latency.measure_latency(str(ROOT / config), (64, 48), 1, runtimes=choosing.RUNTIMES)
    assert found.keys() == choosing.RUNTIMES.keys()
    assert min(found.values()) > 0
    assert written == files
