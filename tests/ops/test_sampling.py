"""Deformable attention and convolutions, masked convolution, CARAFE and PSA masks."""
import itertools

import pytest
import torch
import torch.nn.functional as F

from convnext_mm.ops import sampling
from tests.ops.extensions import COMPILED, OURS, needs_compiled, operators


def attention_inputs(dtype=torch.float64):
    torch.manual_seed(0)
    shapes = torch.tensor([[5, 7], [3, 4], [1, 1]])
    starts = torch.tensor([0, 35, 47])
    value = torch.randn(2, 48, 2, 3, dtype=dtype)
    locations = 1.4 * torch.rand(2, 4, 2, 3, 5, 2, dtype=dtype) - 0.2  # some outside
    weights = torch.rand(2, 4, 2, 3, 5, dtype=dtype)
    return value, shapes, starts, locations, weights


def test_deformable_attention():
    from mmcv.ops.multi_scale_deform_attn import (
        MultiScaleDeformableAttnFunction,
        multi_scale_deformable_attn_pytorch,
    )
    value, shapes, starts, locations, weights = attention_inputs()
    with operators(OURS):
        def attend(value, locations, weights):
            return MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations,
                                                          weights, 64)
        torch.testing.assert_close(attend(value, locations, weights), (
            multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)))
        assert torch.autograd.gradcheck(
            attend, [x.requires_grad_() for x in (value, locations, weights)])
        half = attend(value.bfloat16(), locations, weights)
        assert half.dtype == torch.bfloat16
        assert (half - attend(value, locations, weights)).abs().max() < 0.1


def test_deformable_attention_reads_the_level_that_starts_there():
    value, shapes, starts, locations, weights = attention_inputs()
    padded = torch.cat([value[:, :35], torch.full_like(value[:, :4], 9), value[:, 35:]], 1)
    moved = torch.tensor([0, 39, 51])
    attend = sampling.ms_deform_attn_forward
    assert torch.equal(attend(padded, shapes, moved, locations, weights, 1),
                       attend(value, shapes, starts, locations, weights, 1))


def deformable_inputs(dtype=torch.float64, groups=2, deform_groups=2):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 6, dtype=dtype)
    weight = torch.randn(6, 4 // groups, 3, 2, dtype=dtype)
    offset = 2 * torch.randn(2, deform_groups * 12, 4, 4, dtype=dtype)
    mask = torch.rand(2, deform_groups * 6, 4, 4, dtype=dtype)
    return x, weight, offset, mask, torch.randn(6, dtype=dtype)


GEOMETRY = dict(stride=(2, 2), padding=(1, 2), dilation=(1, 2))


@pytest.mark.usefixtures('library')
def test_without_offsets_it_is_a_convolution():
    x, weight, offset, mask, bias = deformable_inputs()
    expected = F.conv2d(x, weight, groups=2, **GEOMETRY)
    geometry = (*GEOMETRY.values(), 2, 2)
    with operators(OURS) as ops:
        torch.testing.assert_close(
            ops.deform_conv2d(x, torch.zeros_like(offset), weight, *geometry), expected)
        torch.testing.assert_close(
            ops.modulated_deform_conv2d(x, torch.zeros_like(offset), torch.full_like(mask, 0.5),
                                        weight, bias, *geometry),
            0.5 * expected + bias[:, None, None])


@pytest.mark.usefixtures('library')
def test_gradients_of_deformable_convolutions():
    x, weight, offset, mask, bias = deformable_inputs()
    geometry = (*GEOMETRY.values(), 2, 2)
    with operators(OURS) as ops:
        tensors = [t.requires_grad_() for t in (x, offset, weight)]
        assert torch.autograd.gradcheck(lambda *t: ops.deform_conv2d(*t, *geometry), tensors)
        tensors = [t.requires_grad_() for t in (x, offset, mask, weight, bias)]
        assert torch.autograd.gradcheck(
            lambda *t: ops.modulated_deform_conv2d(*t, *geometry), tensors)


@needs_compiled
@pytest.mark.usefixtures('library')
@pytest.mark.parametrize(('groups', 'deform_groups'), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_deformable_convolutions_are_equal_to_compiled(groups, deform_groups):
    x, weight, offset, mask, bias = deformable_inputs(torch.float32, groups, deform_groups)
    geometry = (*GEOMETRY.values(), groups, deform_groups)
    offset[0] = offset[0].round()  # as at the start of training, where one side's gradient counts
    tensors = [t.requires_grad_() for t in (x, offset, mask, weight, bias)]
    found = []
    for extension in (OURS, COMPILED):
        with operators(extension) as ops:
            outputs = (ops.deform_conv2d(x, offset, weight, *geometry),
                       ops.modulated_deform_conv2d(x, offset, mask, weight, bias, *geometry))
            weights = torch.linspace(-1, 1, outputs[0].numel()).view_as(outputs[0])
            found.append([*outputs, *torch.autograd.grad((outputs[0] * weights).sum(),
                                                         (x, offset, weight)),
                          *torch.autograd.grad((outputs[1] * weights).sum(), tensors)])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.usefixtures('library')
def test_offsets_of_another_size():
    """mmdet's DyHead passes offsets that are larger than the output."""
    x, weight, _, _, bias = deformable_inputs(torch.float32)
    large = torch.randn(2, 24, 8, 8), torch.rand(2, 12, 8, 8)
    with operators(OURS) as ops:
        def convolve(offset, mask):
            return ops.modulated_deform_conv2d(x, offset, mask, weight, bias,
                                               *GEOMETRY.values(), 2, 2)
        found = convolve(*large)
        assert torch.equal(found, convolve(large[0].flatten(1)[:, :384].view(2, 24, 4, 4),
                                           large[1].flatten(1)[:, :192].view(2, 12, 4, 4)))
        with pytest.raises(ValueError, match=r'shape \(2, 24, 4, 4\), got \(2, 24, 3, 4\)'):
            convolve(torch.randn(2, 24, 3, 4), large[1])
        assert torch.autograd.gradcheck(
            lambda offset, mask: ops.modulated_deform_conv2d(
                x.double(), offset, mask, weight.double(), None, *GEOMETRY.values(), 2, 2),
            [t[:, :, :5, :5].double().contiguous().requires_grad_() for t in large])
    if COMPILED:
        with operators(COMPILED):
            torch.testing.assert_close(found, convolve(*large), atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures('library')
def test_half_precision_of_deformable_convolutions():
    x, weight, offset, mask, bias = (t.bfloat16() for t in deformable_inputs())
    with operators(OURS) as ops:
        half = ops.modulated_deform_conv2d(x, offset, mask, weight, bias,
                                           *GEOMETRY.values(), 2, 2)
        exact = ops.modulated_deform_conv2d(x.double(), offset.double(), mask.double(),
                                            weight.double(), bias.double(),
                                            *GEOMETRY.values(), 2, 2)
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().max() < 2**-8 * exact.abs().max()


@pytest.mark.filterwarnings('ignore:This overload of addmm is deprecated')  # in mmcv
@pytest.mark.parametrize(('kernel', 'padding'), [(3, 1), ((1, 5), (0, 2)), (1, 0)])
def test_a_masked_convolution_computes_only_the_mask(kernel, padding):
    from mmcv.ops import MaskedConv2d
    torch.manual_seed(0)
    layer, x = MaskedConv2d(3, 4, kernel, padding=padding), torch.randn(1, 3, 6, 7)
    mask = (torch.rand(1, 6, 7) > 0.6).float()
    assert 0 < mask.sum() < 42
    with operators(OURS):
        torch.testing.assert_close(layer(x, mask), layer(x) * mask)


def carafe_slowly(features, masks, kernel, groups, scale):
    """CARAFE with a loop a pixel."""
    n, c, h, w = features.shape
    padded = F.pad(features, [kernel // 2] * 4)
    output = torch.zeros(n, c, h * scale, w * scale, dtype=features.dtype)
    weights = masks.view(n, groups, kernel, kernel, h * scale, w * scale)
    for y, x in itertools.product(range(h * scale), range(w * scale)):
        patch = padded[:, :, y // scale:y // scale + kernel, x // scale:x // scale + kernel]
        patch = patch.reshape(n, groups, c // groups, kernel, kernel)
        output[:, :, y, x] = (patch * weights[:, :, None, :, :, y, x]).sum((3, 4)).flatten(1)
    return output


@pytest.mark.parametrize(('kernel', 'groups', 'scale'), [(3, 1, 2), (5, 2, 1), (1, 2, 3)])
def test_carafe(kernel, groups, scale):
    torch.manual_seed(0)
    features = torch.randn(2, 4, 3, 4, dtype=torch.float64)
    masks = torch.rand(2, groups * kernel**2, 3 * scale, 4 * scale, dtype=torch.float64)
    with operators(OURS) as ops:
        expected = carafe_slowly(features, masks, kernel, groups, scale)
        for operator in (ops.carafe, ops.carafe_naive):
            torch.testing.assert_close(operator(features, masks, kernel, groups, scale), expected)
        tensors = features.requires_grad_(), masks.requires_grad_()
        assert torch.autograd.gradcheck(
            lambda *t: ops.CARAFE(kernel, groups, scale)(*t), tensors)


@needs_compiled
@pytest.mark.parametrize('psa_type', [0, 1])
@pytest.mark.parametrize('mask', [(3, 5), (9, 7), (1, 1)])
def test_psa_masks_are_equal_to_compiled(psa_type, mask):
    from mmcv.ops.psa_mask import psa_mask
    torch.manual_seed(0)
    x = torch.randn(2, mask[0] * mask[1], 4, 3, requires_grad=True)
    found = []
    for extension in (OURS, COMPILED):
        with operators(extension):
            output = psa_mask(x, psa_type, mask)
            weights = torch.linspace(0, 1, output.numel()).view_as(output)
            found.append((output, *torch.autograd.grad((output * weights).sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert found[0][0].abs().max() > 0
