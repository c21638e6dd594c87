"""RoI features in channels_last and in any dtype: equal to mmdet's in fp32."""
import pytest
import torch
from mmdet.models.roi_heads import roi_extractors

from convnext_mm.detection import SingleRoIExtractor
from tests.ops.extensions import random_rois

STRIDES = [4, 8, 16, 32]
SETTINGS = dict(roi_layer=dict(type='RoIAlign', output_size=7, sampling_ratio=0),
                out_channels=6, featmap_strides=STRIDES)


def pyramid(dtype=torch.float32, memory_format=torch.channels_last):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 6, 256 // s, 320 // s, generator=generator).to(
        dtype, memory_format=memory_format).requires_grad_() for s in STRIDES]


def rois(count=40):
    found = random_rois(0, count, 2)
    found[:, 1:] = found[:, 1:].clamp(-40, 700)
    found[:, 3:] = torch.maximum(found[:, 3:], found[:, 1:3])
    return found


@pytest.mark.parametrize('memory_format', [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize('factor', [None, 1.3])
def test_features_and_gradients_are_those_of_mmdet(memory_format, factor):
    results = []
    for kind, layout in ((SingleRoIExtractor, memory_format),
                         (roi_extractors.SingleRoIExtractor, torch.contiguous_format)):
        maps = pyramid(memory_format=layout)
        features = kind(**SETTINGS)(maps, rois(), factor)
        weights = torch.linspace(-1, 1, features.numel()).view(features.shape)
        results.append((features, *torch.autograd.grad((features * weights).sum(), maps)))
    assert results[0][0].is_contiguous(memory_format=torch.channels_last)
    assert results[0][0].abs().max() > 1
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4 * theirs.abs().max().item() + 1e-9)


def test_boxes_are_not_rounded_to_the_dtype_of_the_maps():
    """mmdet's extractor, where it runs, moves a box at 300 by up to a pixel in bf16."""
    extractor, maps = SingleRoIExtractor(**SETTINGS), pyramid(torch.bfloat16)
    ours = extractor(maps, rois())
    assert ours.dtype == torch.bfloat16
    exact = extractor([x.float() for x in maps], rois())
    assert (ours.float() - exact).abs().max() <= 2**-8 * exact.abs().max()
    ours.float().sum().backward()
    assert all(x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all() for x in maps)


def test_other_poolings_run_in_fp32():
    settings = dict(SETTINGS, roi_layer=dict(SETTINGS['roi_layer'], pool_mode='max'))
    extractor, maps = SingleRoIExtractor(**settings), pyramid(torch.bfloat16)
    inside = rois()
    inside[:, 1:] = inside[:, 1:].clamp(0, 255)
    ours = extractor(maps, inside)
    exact = extractor([x.float() for x in maps], inside)
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, exact.bfloat16())


def test_without_boxes():
    assert SingleRoIExtractor(**SETTINGS)(pyramid(), torch.zeros(0, 5)).shape == (0, 6, 7, 7)
