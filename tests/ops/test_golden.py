"""Our operators return what mmcv's compiled operators return, on stored inputs."""
import pytest
import torch

from tests.ops.extensions import COMPILED, OURS, needs_compiled
from tests.ops.golden import FILE, run

GOLDEN = torch.load(FILE, weights_only=True)


def assert_equal(ours: list, theirs: list, tolerance: float = 1e-5) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.is_floating_point() and a.numel():
            assert torch.equal(a.isnan(), b.isnan())
            difference = (a - b).nan_to_num().abs().max()
            assert difference <= tolerance * b.nan_to_num().abs().max()
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize('name', GOLDEN)
def test_equal_to_the_stored_results(name):
    case = GOLDEN[name]
    assert_equal(run(OURS, name, case['arguments']), case['results'])


@needs_compiled
@pytest.mark.parametrize('name', GOLDEN)
def test_the_stored_results_are_those_of_the_compiled_operators(name):
    case = GOLDEN[name]
    assert_equal(run(COMPILED, name, case['arguments']), case['results'], 1e-6)
