"""RoIAlign and RoIPool: equal to mmcv's compiled operators, in every layout and dtype."""
import itertools

import pytest
import torch

from convnext_mm.ops import roi, torchvision
from tests.ops.extensions import COMPILED, OURS, needs_compiled, operators, random_rois


def align(extension, features, rois, bins=7, scale=0.125, ratio=0, mode='avg', aligned=True):
    """The output of mmcv's RoIAlign with an extension, and the gradient of the features."""
    features = features.detach().requires_grad_()
    with operators(extension) as ops:
        output = ops.roi_align(features, rois, bins, scale, ratio, mode, aligned)
        weights = torch.linspace(-1, 1, output.numel()).view_as(output).to(output)
        return output.detach(), torch.autograd.grad(output, features, weights)[0]


def assert_near(ours, theirs, tolerance=1e-4):
    """Equal to a share of the largest value, as outputs and as gradients."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert b.abs().max() > 0
        assert (a.double() - b.double()).abs().max() <= tolerance * b.abs().max()


@needs_compiled
@pytest.mark.parametrize(('ratio', 'aligned', 'bins'), [*itertools.product(
    [0, 1, 2, 5], [True, False], [7, 14, (1, 3)])])
def test_equal_to_compiled(ratio, aligned, bins):
    for seed in range(4):
        torch.manual_seed(seed)
        features, rois = torch.randn(2, 5, 20, 23), random_rois(seed, 60, 2)
        assert_near(*(align(extension, features, rois, bins, 0.125, ratio, 'avg', aligned)
                      for extension in (OURS, COMPILED)))


@needs_compiled
@pytest.mark.parametrize(('ratio', 'aligned'), [*itertools.product([0, 2], [True, False])])
def test_max_pooling_is_equal_to_compiled(ratio, aligned):
    for seed in range(4):
        torch.manual_seed(seed)
        features, rois = torch.randn(2, 5, 20, 23), random_rois(seed, 40, 2)
        extent = rois[:, 3:] - rois[:, 1:3]
        rois = rois[(extent > 0).all(1) & (extent < 500).all(1)]
        assert_near(*(align(extension, features, rois, 3, 0.125, ratio, 'max', aligned)
                      for extension in (OURS, COMPILED)))


@needs_compiled
@pytest.mark.parametrize('box', [
    [0, 0, 0, 0], [10, 10, 10, 30], [-50, -50, -20, -20], [500, 0, 900, 100], [-8, -8, 168, 168],
    [159.99, 159.99, 160.01, 160.01], [-1e5, -1e5, 1e5, 1e5], [3, 5, 3.001, 5.001],
    [0, 0, 1e6, 160], [-4, 20, 0, 24]])
@pytest.mark.parametrize('ratio', [0, 2])
def test_unusual_boxes_are_equal_to_compiled(box, ratio):
    torch.manual_seed(0)
    features, rois = torch.randn(1, 3, 20, 20), torch.tensor([[0.0, *box]])
    if ratio == 0 and max(box) > 1e4:
        return  # the compiled operator takes all of its memory for samples outside
    ours, theirs = (align(extension, features, rois, ratio=ratio)
                    for extension in (OURS, COMPILED))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_a_huge_box_averages_what_lies_inside():
    features = torch.ones(1, 1, 8, 8)
    output, gradient = align(OURS, features, torch.tensor([[0.0, -1e9, -1e9, 1e9, 1e9]]), 1, 1.0)
    assert 0 < output.item() < 1e-14
    assert gradient.sum() < 1e-12


@pytest.mark.parametrize('count', [2, 60])
@pytest.mark.parametrize('layout', ['channels_last', 'transposed', 'sliced'])
def test_layouts(layout, count):
    """With few boxes and with many, which read the map in different ways."""
    torch.manual_seed(0)
    features, rois = torch.randn(2, 6, 20, 23), random_rois(0, count, 2)
    views = dict(channels_last=features.contiguous(memory_format=torch.channels_last),
                 transposed=features.transpose(2, 3).contiguous().transpose(2, 3),
                 sliced=torch.randn(2, 9, 20, 23)[:, 2:8].copy_(features))
    assert not views[layout].is_contiguous()
    assert_near(align(OURS, views[layout], rois), align(OURS, features, rois), 1e-6)


@pytest.mark.parametrize(('dtype', 'tolerance'), [
    (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_rounds_only_input_and_output(dtype, tolerance):
    torch.manual_seed(0)
    features, rois = torch.randn(2, 6, 20, 23).to(dtype), random_rois(0, 40, 2)
    ours, exact = align(OURS, features, rois), align(OURS, features.double(), rois)
    assert ours[0].dtype == ours[1].dtype == dtype
    assert_near(ours, exact, tolerance)


@pytest.mark.parametrize(('mode', 'ratio', 'aligned', 'count'), [
    ('avg', 0, True, 2), ('avg', 2, False, 30), ('max', 2, True, 4)])
def test_gradcheck(mode, ratio, aligned, count):
    torch.manual_seed(0)
    features = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    rois = random_rois(1, count, 2, size=6).double()
    rois[:, 3:] = torch.minimum(rois[:, 3:], rois[:, 1:3] + 8)
    with operators(OURS) as ops:
        assert torch.autograd.gradcheck(
            lambda x: ops.roi_align(x, rois, 3, 1.0, ratio, mode, aligned), features)


def test_boxes_in_several_chunks(monkeypatch):
    features, rois = torch.randn(2, 3, 20, 23), random_rois(0, 50, 2)
    whole = align(OURS, features, rois)
    monkeypatch.setattr(roi, 'CHUNK', 7)
    assert_near(align(OURS, features, rois), whole, 1e-6)


def test_no_boxes():
    output, gradient = align(OURS, torch.randn(2, 3, 8, 8), torch.zeros(0, 5))
    assert output.shape == (0, 3, 7, 7)
    assert not gradient.any()


def test_the_number_of_threads_is_restored():
    before = torch.get_num_threads()
    align(OURS, torch.randn(1, 3, 8, 8), random_rois(0, 5, 1))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(('rois', 'message'), [
    ([[0, 1, 1, 5, 5], [0, float('nan'), 0, 9, 9]], r'RoI 1 is not finite: \[0.0, nan,'),
    ([[0, 0, 0, float('inf'), 9]], 'RoI 0 is not finite'),
    ([[2, 0, 0, 9, 9]], 'image indices from 2 to 2, but there are 2 images'),
    ([[-1, 0, 0, 9, 9]], 'image indices from -1 to -1'),
    ([[0, 5, 0, 3, 9]], r'RoI 0 has a negative size: \[0.0, 5.0')])
def test_bad_boxes_are_named(rois, message):
    features = torch.randn(2, 3, 8, 8)
    with operators(OURS) as ops:
        with pytest.raises(ValueError, match=message):
            ops.roi_align(features, torch.tensor(rois), 7)
        if 'negative' not in message:
            with pytest.raises(ValueError, match=message):
                ops.roi_pool(features, torch.tensor(rois), 7)


def test_other_dtypes_of_boxes():
    features, rois = torch.randn(2, 3, 20, 20), random_rois(0, 9, 2).round()
    assert_near(align(OURS, features, rois.double()), align(OURS, features, rois), 1e-6)
    assert_near(align(OURS, features, rois.long()), align(OURS, features, rois), 1e-6)


def test_max_pooling_refuses_more_samples_than_fit_in_memory():
    with pytest.raises(ValueError, match='samples a bin; clip it to the image'):
        align(OURS, torch.randn(1, 1, 8, 8), torch.tensor([[0.0, 0, 0, 1e6, 1e6]]), mode='max')


@pytest.mark.skipif(not torchvision.operators(), reason='torchvision is not installed')
@pytest.mark.parametrize(('ratio', 'aligned'), [*itertools.product([0, 2], [True, False])])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_torchvision_is_equal(monkeypatch, ratio, aligned, dtype):
    """Its operators, which are used on GPUs, also run on CPUs."""
    torch.manual_seed(0)
    features, rois = torch.randn(2, 5, 20, 23).to(dtype), random_rois(0, 60, 2)
    rois[:, 1:] = rois[:, 1:].clamp(-200, 400)
    ours = align(OURS, features, rois, ratio=ratio, aligned=aligned)
    monkeypatch.setattr(roi, '_compiled', lambda features, mode: torchvision.operators())
    assert_near(align(OURS, features, rois, ratio=ratio, aligned=aligned), ours,
                1e-4 if dtype == torch.float32 else 2**-8)


def pool_slowly(features, rois, bins, scale):
    """RoIPool with one loop a dimension, in the words of mmcv's CUDA kernel."""
    height, width = features.shape[2:]
    output = torch.zeros(len(rois), features.shape[1], bins, bins)
    for k, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        x1, y1, x2, y2 = x1 * scale, y1 * scale, (x2 + 1) * scale, (y2 + 1) * scale
        if x2 <= x1 or y2 <= y1:
            continue
        for i, j in itertools.product(range(bins), repeat=2):
            top, left = y1 + i * (y2 - y1) / bins, x1 + j * (x2 - x1) / bins
            inside = [(y, x) for y in range(height) for x in range(width)
                      if top // 1 <= y < -(-(top + (y2 - y1) / bins) // 1)
                      and left // 1 <= x < -(-(left + (x2 - x1) / bins) // 1)]
            if inside:
                y, x = torch.tensor(inside).T
                output[k, :, i, j] = features[int(image), :, y, x].amax(1)
    return output


def test_roi_pool():
    torch.manual_seed(0)
    features = torch.randn(2, 3, 9, 8)
    rois = torch.cat([random_rois(0, 30, 2, size=36), torch.tensor([[1.0, 30, 0, 2, 9]])])
    with operators(OURS) as ops:
        output = ops.roi_pool(features, rois, 3, 0.25)
        torch.testing.assert_close(output, pool_slowly(features, rois, 3, 0.25))
        half = features.bfloat16()
        assert torch.equal(ops.roi_pool(half, rois, 3, 0.25),
                           ops.roi_pool(half.float(), rois, 3, 0.25).bfloat16())
        x = features.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x: ops.roi_pool(x, rois, 3, 0.25), x)
