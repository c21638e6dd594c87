"""3x3 convolutions by Winograd's minimal filtering: the numbers of the direct sum."""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_mm.fused import eager, winograd


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b).abs().max() / b.abs().max()).item()


SHAPES = [(1, 8, 1, 1), (2, 5, 4, 7), (1, 33, 33, 50), (3, 16, 14, 14), (2, 4, 3, 130)]


@pytest.mark.parametrize('shape', SHAPES)
@pytest.mark.parametrize('band', [3, 512])
def test_output_and_gradients_are_those_of_the_direct_sum(shape, band, monkeypatch):
    monkeypatch.setattr(winograd, 'BAND_TILES', band)
    x = torch.randn(shape).relu_()  # all of one sign, as after a ReLU
    weight = torch.randn(6, shape[1], 3, 3)
    x64, weight64 = (t.double().requires_grad_() for t in (x, weight))
    expected = F.conv2d(x64, weight64, padding=1)
    g = torch.randn(expected.shape)
    expected.backward(g.double())
    found = winograd.convolution(x.permute(0, 2, 3, 1), winograd.transform_weight(weight))
    assert relative(found.permute(0, 3, 1, 2), expected.detach()) < 4e-6
    dx, dw = winograd.gradients(g, x, weight, (True, True))
    assert relative(dx, x64.grad) < 4e-6
    assert relative(dw, weight64.grad) < 4e-6
    assert winograd.gradients(g, x, weight, (False, False)) == (None, None)


def test_bf16_maps_are_computed_in_fp32():
    x, weight = torch.randn(1, 40, 33, 33).bfloat16(), torch.randn(40, 40, 3, 3).bfloat16()
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    found = winograd.convolution(x.permute(0, 2, 3, 1), winograd.transform_weight(weight))
    assert found.dtype == torch.bfloat16
    direct = F.conv2d(x, weight, padding=1)
    assert relative(found.permute(0, 3, 1, 2), expected) <= 1.1 * relative(direct, expected)
    _, dw = winograd.gradients(found.permute(0, 3, 1, 2), x, weight, (False, True))
    assert dw.dtype == torch.float32, 'cast by the caller'


@pytest.mark.parametrize('amx', [False, True])
def test_only_convolutions_that_are_faster_so_are_chosen(amx, monkeypatch):
    monkeypatch.setattr(eager, 'has_amx', lambda: amx)
    monkeypatch.setattr(winograd, 'MIN_CHANNELS_AMX', winograd.MIN_CHANNELS + 4)
    least = winograd.MIN_CHANNELS + 4 * amx
    x = torch.randn(1, least, 48, 48)
    known = eager.uses_onednn(x)
    assert winograd.suits(x, least) == known
    assert winograd.suits(x.bfloat16(), least) == (
        not amx and eager.uses_onednn(x.bfloat16()))
    assert not winograd.suits(x.double(), least)
    assert not winograd.suits(x.half(), least)
    assert not winograd.suits(x, least - 1)
    assert not winograd.suits(x[:, 1:], least)
    assert not winograd.suits(x[:, :, :8, :8], least), 'few tiles'
    assert winograd.suits(x[:, :, :8, :8].expand(32, -1, -1, -1), least) == known
    boxes = torch.zeros(64, least, 7, 7)  # a quarter of the tiles is empty
    assert winograd.suits(boxes, least) == (known and not amx)
    assert not winograd.suits(boxes.bfloat16(), least)
    assert not winograd.suits(boxes[:0], least), 'no boxes'
