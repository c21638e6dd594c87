"""Operators with and without torchvision."""
import pytest

from convnext_mm.ops import torchvision


@pytest.fixture(params=['ours', 'torchvision'])
def library(request, monkeypatch):
    """torchvision is optional, and PyPI has no build of it for a PyTorch without CUDA."""
    if request.param == 'ours':
        monkeypatch.setattr(torchvision, 'operators', lambda: None)
    elif not torchvision.operators():
        pytest.skip('torchvision is not installed')
