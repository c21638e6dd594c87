"""Hooks that draw figures during a run."""
from types import SimpleNamespace

import pytest

from convnext_mm.engine import hooks
from tests.helpers import log_line, write_log


def test_a_failed_figure_does_not_stop_the_run(tmp_path, monkeypatch):
    def fail(figure, path):
        raise OSError('No space left on device')
    logged = []
    monkeypatch.setattr('convnext_mm.visualization.save_figure', fail)
    monkeypatch.setattr(hooks, 'print_log', lambda text, **kwargs: logged.append(text))
    write_log(tmp_path / '20260101_000000', [log_line(10)])
    hooks.CurvesHook().after_train(SimpleNamespace(work_dir=str(tmp_path)))
    assert logged == ['Cannot draw: OSError: No space left on device']


@pytest.mark.parametrize('batch_size', [1, 5])
def test_drawn_images_are_spread_over_the_data_set(batch_size, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(hooks, 'draw_sample', lambda sample, meta, path: drawn.append(path.stem))
    samples = [SimpleNamespace(img_path=f'{i}.jpg') for i in range(20)]
    loader = SimpleNamespace(dataset=samples, batch_size=batch_size)
    runner = SimpleNamespace(work_dir=str(tmp_path), val_loop=SimpleNamespace(dataloader=loader),
                             visualizer=SimpleNamespace(dataset_meta=dict(classes=('a', 'b'))))
    hook = hooks.PredictionsHook(num_pictures=4)
    for batch in range(20 // batch_size):
        hook.after_val_iter(runner, batch,
                            outputs=samples[batch * batch_size:(batch + 1) * batch_size])
    assert drawn == ['0', '5', '10', '15']
