"""A convolution of upsampled and concatenated maps, at the maps' own size."""
from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_mm.fused import eager, pyramid, resampling
from convnext_mm.fused.pyramid import Layout
from tests.helpers import saved_by

SIZES = [(37, 70), (19, 35), (1, 1), (5, 9), (80, 90)]  # the last is reduced
CHANNELS = [40, 24, 8, 16, 8]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(dtype: torch.dtype, kernel: int = 3, images: int = 2) -> tuple[list[Tensor], Tensor]:
    maps = [torch.randn(images, c, *size, dtype=dtype, requires_grad=True)
            for c, size in zip(CHANNELS, SIZES, strict=True)]
    return maps, torch.randn(48, sum(CHANNELS), kernel, kernel, dtype=dtype, requires_grad=True)


def plain(maps: Sequence[Tensor], weight: Tensor, layout: Layout) -> Tensor:
    """The same with PyTorch's operations."""
    x = torch.cat([F.interpolate(m, size=layout.size, mode='bilinear',
                                 align_corners=layout.align_corners) for m in maps], 1)
    return F.conv2d(x, weight, padding=layout.dilation * (weight.shape[-1] // 2),
                    dilation=layout.dilation)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).abs().max() / b.abs().max()).item()


@pytest.fixture(params=['in bands', 'batched', 'concatenated'])
def form(request, monkeypatch) -> str:
    """How the convolution is computed; a GPU never does it in bands."""
    if request.param == 'batched':
        monkeypatch.setattr(pyramid, 'batches', lambda _: True)
    if request.param == 'concatenated':
        monkeypatch.setattr(pyramid, 'pays', lambda *_: False)
    return request.param


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(('kernel', 'dilation'), [(3, 1), (1, 1), (5, 2), (3, 3)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_output_and_gradients_are_those_of_the_plain_layers(kernel, dilation, align_corners, dtype,
                                                            form):
    layout = Layout(SIZES[0], align_corners, dilation)
    maps, weight = make(dtype, kernel)
    expected = plain(maps, weight, layout)
    g = torch.randn_like(expected)
    expected.backward(g)
    gradients = [t.grad for t in (weight, *maps)]
    for t in (weight, *maps):
        t.grad = None
    found = pyramid.convolution(maps, weight, layout)
    found.backward(g)
    # The weights of interpolation are rounded to fp32, as by PyTorch in fp32.
    for a, b in zip([found, weight.grad, *(m.grad for m in maps)], [expected, *gradients],
                    strict=True):
        assert relative(a, b) < 1e-5
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype, monkeypatch):
    """As near to the result in double precision as the plain layers are."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    monkeypatch.setattr(pyramid, 'GPU_MIN_SAVED', 0)
    layout = Layout((64, 96), False)
    maps = [torch.randn(2, 64, 64 >> i, 96 >> i, device='cuda', requires_grad=True)
            for i in range(4)]
    weight = torch.randn(48, 256, 3, 3, device='cuda', requires_grad=True)
    assert pyramid.pays([m.to(dtype) for m in maps], weight.shape, layout)
    g = torch.randn(2, 48, 64, 96, device='cuda')
    results = []
    for function, kind in ((plain, torch.float64), (plain, dtype), (pyramid.convolution, dtype)):
        inputs = [t.detach().to(torch.float64 if kind == torch.float64 else torch.float32
                                ).requires_grad_() for t in (*maps, weight)]
        with torch.autocast('cuda', dtype, enabled=kind in (torch.bfloat16, torch.float16)):
            out = function(inputs[:-1], inputs[-1], layout)
        out.backward(g.to(out.dtype))
        results.append([out.detach(), *(t.grad for t in inputs)])
    for exact, theirs, ours in zip(*results, strict=True):
        assert (ours - exact).norm() <= 3 * (theirs - exact).norm() + 1e-6 * exact.norm()


def test_small_maps_are_concatenated_on_a_gpu():
    class OnGpu:
        is_cuda, dtype = True, torch.bfloat16

        def __init__(self, *shape: int) -> None:
            self.shape = torch.Size(shape)

        def __len__(self) -> int:
            return self.shape[0]
    for images, expected in ((2, False), (4, True)):
        maps = [OnGpu(images, 512, 128 >> i, 128 >> i) for i in range(4)]
        assert pyramid.pays(maps, (512, 2048, 3, 3), Layout((128, 128), False)) is expected
    maps[0].dtype = torch.float32
    assert not pyramid.pays(maps, (512, 2048, 3, 3), Layout((128, 128), False)), 'TF32'


def test_frozen_inputs_get_no_gradients():
    layout = Layout(SIZES[0], False)
    maps, weight = make(torch.float32)
    weight.requires_grad_(False)
    maps[0].requires_grad_(False)
    pyramid.convolution(maps, weight, layout).sum().backward()
    assert weight.grad is None
    assert maps[0].grad is None
    assert maps[1].grad is not None


def test_under_autocast_it_computes_in_bf16_and_saves_no_copies():
    layout = Layout(SIZES[0], False)
    maps, weight = make(torch.float32, images=1)
    bf16 = [m.detach().bfloat16().requires_grad_() for m in maps]

    def forward(function=pyramid.convolution):
        return function(bf16, weight, layout)
    with torch.autocast('cpu', torch.bfloat16):
        out = forward()
        expected = forward(plain)
    assert out.dtype == torch.bfloat16
    exact = plain([m.double() for m in bf16], weight.double(), layout)
    assert relative(out, exact) < 3 * relative(expected, exact)
    out.float().sum().backward()
    assert weight.grad.dtype == torch.float32
    inputs = sum(m.numel() for m in maps) * 2 / 2**20
    assert saved_by(forward, [weight], True) == pytest.approx(inputs, rel=0.01)
    assert saved_by(lambda: forward(plain), [weight], True) > 1.5 * inputs


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('relu', [False, True])
@torch.no_grad()
def test_packed_weights(dtype, relu, form):
    maps, weight = make(dtype)
    bias = torch.randn(48, dtype=dtype)
    packed = pyramid.PackedPyramid(weight.detach(), bias, 1, relu, tuple(CHANNELS), False)
    for scale in (1, 2):  # other sizes use the same weights
        sized = [F.interpolate(m, scale_factor=scale) for m in maps]
        size = tuple(sized[0].shape[2:])
        expected = plain([m.double() for m in sized], weight.double(), Layout(size, False))
        expected += bias.double()[:, None, None]
        expected = expected.relu_() if relu else expected
        assert relative(packed(sized, size), expected) < (2e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize('amx', [False, True])
@torch.no_grad()
def test_a_packed_convolution(amx, monkeypatch):
    monkeypatch.setattr(eager, 'has_amx', lambda: amx)
    weight, bias = torch.randn(40, 48, 3, 3), torch.randn(40)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        for dilation in (1, 2):
            packed = pyramid.PackedConv(weight.to(dtype), bias.to(dtype), dilation, True)
            for size in ((33, 40), (5, 7)):
                x = torch.randn(2, 48, *size, dtype=dtype)
                expected = F.conv2d(x.double(), weight.to(dtype).double(),
                                    bias.to(dtype).double(), padding=dilation, dilation=dilation)
                assert relative(packed(x), expected.relu()) < tolerance


@pytest.mark.parametrize('align_corners', [False, True])
def test_the_matrix_is_that_of_interpolate(align_corners):
    for size in (1, 2, 3, 16, 37, 101):
        for out in (1, 2, 5, 16, 64, 333):
            expected = F.interpolate(torch.eye(size)[None], size=out, mode='linear',
                                     align_corners=align_corners)[0].t()
            found = torch.from_numpy(resampling.interpolation(size, out, align_corners))
            assert (found - expected).abs().max() < 1e-5


def test_blocks_leave_out_the_zeros():
    matrices = resampling.shifted(resampling.interpolation(64, 256, False), 3)
    banded = resampling.Banded(matrices, torch.zeros(1))
    dense = torch.zeros(matrices.shape)
    for rows, columns, values in banded.blocks:
        assert values.shape[2] <= 12, '32 rows of four times the size, and the borders'
        dense[:, rows, columns] = values
    assert torch.equal(dense, torch.from_numpy(matrices))


def test_matrices_of_tensors_without_values_are_not_kept():
    from torch._subclasses.fake_tensor import FakeTensorMode
    pyramid._MATRICES.clear()
    with FakeTensorMode(), torch.no_grad():
        maps = [torch.empty(1, 8, 16, 16), torch.empty(1, 8, 8, 8)]
        out = pyramid.convolution(maps, torch.empty(4, 16, 3, 3), Layout((16, 16), False))
    assert out.shape == (1, 4, 16, 16)
    assert not pyramid._MATRICES
