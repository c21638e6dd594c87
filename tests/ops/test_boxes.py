"""Suppression of boxes: the same boxes in the same order as mmcv's compiled operators."""
import itertools
import math

import numpy as np
import pytest
import torch

from convnext_mm.ops import boxes as ours
from tests.ops.extensions import COMPILED, OURS, needs_compiled, operators, random_boxes

pytestmark = pytest.mark.usefixtures('library')  # torchvision compares few boxes, where it is

KINDS = ('spread', 'clusters', 'classes', 'ties')


def suppress_slowly(boxes, scores, threshold, offset):
    """Indices that greedy suppression keeps, box after box, in float32."""
    array, kept = boxes.numpy(), []
    one, limit = np.float32(offset), np.float32(threshold)
    areas = (array[:, 2] - array[:, 0] + one) * (array[:, 3] - array[:, 1] + one)

    def overlap(i, j):
        w = max(np.float32(0), min(array[i, 2], array[j, 2]) - max(array[i, 0], array[j, 0]) + one)
        h = max(np.float32(0), min(array[i, 3], array[j, 3]) - max(array[i, 1], array[j, 1]) + one)
        return w * h / (areas[i] + areas[j] - w * h)
    with np.errstate(invalid='ignore'):
        for i in scores.sort(descending=True)[1].tolist():
            if not any(overlap(k, i) > limit for k in kept):
                kept.append(i)
    return kept


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('kind', KINDS)
def test_nms_keeps_what_a_loop_keeps(kind, offset):
    for seed, threshold in enumerate((0.0, 0.3, 0.5, 0.7, 1.0)):
        boxes, scores = random_boxes(seed, 180, kind)
        kept = ours.nms(boxes, scores, threshold, offset)
        assert kept.tolist() == suppress_slowly(boxes, scores, threshold, offset)


@needs_compiled
@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('kind', KINDS)
def test_nms_is_equal_to_compiled(kind, offset):
    for seed, count in enumerate((1, 2, 127, 128, 129, 700, 3000)):
        boxes, scores = random_boxes(seed, count, kind)
        for threshold in (0.0, 0.3, 0.5, 0.7, 1.0):
            theirs = COMPILED.nms(boxes, scores, iou_threshold=threshold, offset=offset)
            assert torch.equal(ours.nms(boxes, scores, threshold, offset), theirs)


@needs_compiled
@pytest.mark.parametrize('settings', [
    dict(type='nms', iou_threshold=0.5), dict(type='nms', iou_threshold=0.5, split_thr=100),
    dict(type='nms', iou_threshold=0.5, class_agnostic=True),
    dict(type='nms', iou_threshold=0.5, score_threshold=0.3, max_num=40),
    dict(type='soft_nms', iou_threshold=0.4, min_score=0.05),
    dict(type='soft_nms', iou_threshold=0.4, method='gaussian', split_thr=100)])
def test_nms_by_class_is_equal_to_compiled(settings):
    boxes, scores = random_boxes(0, 400, 'clusters')
    classes = torch.arange(400) % 7
    found = []
    for extension in (OURS, COMPILED):
        with operators(extension) as ops:
            found.append(ops.batched_nms(boxes, scores, classes, settings))
    (dets, index), (their_dets, their_index) = found
    assert 0 < len(index) < 400
    assert torch.equal(index, their_index)
    torch.testing.assert_close(dets, their_dets)


@needs_compiled
@pytest.mark.parametrize('kind', KINDS)
def test_soft_nms_and_matches_are_equal_to_compiled(kind):
    for seed, count in enumerate((1, 50, 400)):
        boxes, scores = random_boxes(seed, count, kind)
        dets = torch.cat([boxes, scores[:, None]], 1)
        assert ours.nms_match(dets, 0.5) == COMPILED.nms_match(dets, iou_threshold=0.5)
        for method in (0, 1, 2):
            full = (boxes[:, 2:] > boxes[:, :2]).all(1) | (method < 2)
            found = []
            for operator in (ours.softnms, COMPILED.softnms):
                out = torch.zeros(int(full.sum()), 5)
                index = operator(boxes[full], scores[full], out, iou_threshold=0.3, sigma=0.5,
                                 min_score=0.02, method=method, offset=0)
                found.append((index, out[:len(index)]))
            assert torch.equal(found[0][0], found[1][0])
            torch.testing.assert_close(found[0][1], found[1][1])


def test_boxes_with_nan_are_kept_and_remove_none():
    boxes = torch.tensor([[0, 0, 9, 9], [math.nan, 0, 9, 9], [0, 0, 9, 9], [20, 20, 30, 30.0]])
    scores = torch.tensor([0.5, 0.9, 0.4, 0.3])
    assert ours.nms(boxes, scores, 0.5, 0).tolist() == [1, 0, 3]
    if COMPILED:
        assert COMPILED.nms(boxes, scores, iou_threshold=0.5, offset=0).tolist() == [1, 0, 3]


def test_boxes_that_do_not_overlap_are_compared_in_groups():
    boxes, _ = random_boxes(0, 2000, 'classes')
    groups = ours._separate_groups(boxes.T.numpy(), 0)
    assert len(groups) > 4
    assert sorted(np.concatenate(groups).tolist()) == list(range(2000))
    ends = [(boxes[group, 0].min(), boxes[group, 2].max()) for group in groups]
    assert all(right <= left for (_, right), (left, _) in itertools.pairwise(ends))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    boxes, scores = (x.to(dtype) for x in random_boxes(0, 200, 'clusters'))
    kept = ours.nms(boxes, scores, 0.5, 0)
    assert torch.equal(kept, ours.nms(boxes.float(), scores.float(), 0.5, 0))
    with operators(OURS) as ops:
        dets, index = ops.nms(boxes, scores, 0.5)
        assert dets.dtype == dtype
        assert torch.equal(index, kept)
        dets, index = ops.soft_nms(boxes, scores, 0.5)
        assert dets.dtype == dtype
        assert len(dets) == len(index) > 0


def test_no_boxes():
    none = torch.zeros(0, 4)
    assert ours.nms(none, torch.zeros(0), 0.5, 0).shape == (0,)
    assert ours.softnms(none, torch.zeros(0), torch.zeros(0, 5), 0.5, 0.5, 0.1, 1, 0).shape == (0,)
    with operators(OURS) as ops:
        assert ops.nms_match(torch.zeros(0, 5), 0.5) == []


@pytest.mark.parametrize(('boxes', 'scores', 'message'), [
    (torch.zeros(3, 5), torch.zeros(3), r'got \(3, 5\) and \(3,\)'),
    (torch.zeros(3, 4), torch.zeros(2), r'got \(3, 4\) and \(2,\)'),
    (torch.zeros(3, 4), torch.zeros(3, device='meta'), 'Boxes are on cpu, but scores are on meta')])
def test_bad_input_is_named(boxes, scores, message):
    with pytest.raises(ValueError, match=message):
        ours.nms(boxes, scores, 0.5, 0)


@pytest.mark.parametrize(('mode', 'aligned', 'offset'), [
    ('iou', False, 0), ('iof', False, 1), ('iou', True, 1)])
def test_overlaps(mode, aligned, offset):
    a, b = random_boxes(0, 30, 'clusters')[0], random_boxes(0, 60, 'clusters')[0][30:]
    with operators(OURS) as ops:
        found = ops.bbox_overlaps(a, b, mode, aligned, offset)
    assert found.max() > 0
    if COMPILED:
        with operators(COMPILED) as ops:
            torch.testing.assert_close(found, ops.bbox_overlaps(a, b, mode, aligned, offset))
