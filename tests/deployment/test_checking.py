"""What counts as a difference between PyTorch and an exported file."""
import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from convnext_mm.deployment.checking import Difference, metric_problem


def detections(boxes, scores, labels, masks=None) -> BaseDataElement:
    """A data sample with detections."""
    found = InstanceData(bboxes=torch.tensor(boxes, dtype=torch.float).reshape(-1, 4),
                         scores=torch.tensor(scores), labels=torch.tensor(labels))
    if masks is not None:
        found.masks = torch.tensor(masks, dtype=torch.bool)
    sample = BaseDataElement()
    sample.pred_instances = found
    return sample


def difference(ours: BaseDataElement, theirs: BaseDataElement, least: float = 0.05,
               most: int = 100) -> Difference:
    found = Difference('images')
    found.add(ours, theirs, least, most)
    return found


A, B = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 40.0]


def test_equal_detections_in_another_order():
    found = difference(detections([A, B], [0.9, 0.89995], [0, 1]),
                       detections([B, A], [0.9, 0.8999], [1, 0]))
    assert found.problem == ''
    assert (found.images, found.detections, found.unmatched) == (1, 2, 0)
    assert found.score == pytest.approx(1e-4, rel=0.01)


@pytest.mark.parametrize('theirs', [
    detections([A], [0.9], [0]),
    detections([A, B, B], [0.9, 0.8, 0.7], [0, 1, 1]),
    detections([A, B], [0.9, 0.8], [0, 0]),
    detections([A, B], [0.9, 0.8003], [0, 1]),
    detections([A, [20.0, 20.0, 30.02, 40.0]], [0.9, 0.8], [0, 1]),
    detections([A, [float('nan')] * 4], [0.9, 0.8], [0, 1]),
    detections([], [], [])], ids=['lost', 'added', 'class', 'score', 'box', 'nan', 'none'])
def test_other_detections(theirs):
    found = difference(detections([A, B], [0.9, 0.8], [0, 1]), theirs)
    assert found.unmatched
    assert 'detections have no equal one' in found.problem


def test_rounding_may_decide_at_the_lowest_score():
    both, one = detections([A, B], [0.9, 0.05005], [0, 1]), detections([A], [0.9], [0])
    assert difference(both, one).problem == difference(one, both).problem == ''
    assert difference(detections([A, B], [0.9, 0.0502], [0, 1]), one).problem
    two = detections([A, B], [0.9, 0.8], [0, 1])
    assert difference(two, detections([A, A], [0.9, 0.8], [0, 1]), most=2).problem == ''
    assert difference(two, detections([A, A], [0.9, 0.8], [0, 1]), most=3).problem


def test_pixels_of_masks_and_class_maps():
    mask = np.zeros((1, 100, 100), bool)
    other = mask.copy()
    other[0, 0, :2] = True
    found = difference(detections([A], [0.9], [0], mask), detections([A], [0.9], [0], other))
    assert (found.pixels, found.other_pixels) == (10000, 2)
    assert found.problem == 'images: 2 of 10000 pixels differ, 0.020 %'
    a, b = BaseDataElement(), BaseDataElement()
    a.pred_sem_seg = PixelData(data=torch.zeros(1, 100, 200, dtype=torch.long))
    b.pred_sem_seg = PixelData(data=torch.zeros(1, 100, 200, dtype=torch.long))
    b.pred_sem_seg.data[0, 0, 0] = 3
    assert difference(a, b).problem == ''
    b.pred_sem_seg.data[0, 0, :3] = 3
    assert difference(a, b).problem


def test_metrics():
    ours = {'mIoU': 80.0, 'aAcc': 90.0}
    assert metric_problem(ours, {'mIoU': 79.95, 'aAcc': 80.0}, None) == ''
    assert metric_problem(ours, {'mIoU': 79.85, 'aAcc': 80.0}, None)
    assert metric_problem(ours, {'mIoU': 80.2, 'aAcc': 90.0}, None)
    assert metric_problem(ours, {'mIoU': 80.2, 'aAcc': 90.0}, 0.0) == ''
    assert metric_problem(ours, {'mIoU': 79.95, 'aAcc': 90.0}, 0.01)
    assert metric_problem(ours, {'mIoU': 79.4}, 0.5) == 'mIoU: 80.00 in PyTorch, 79.40 in the file'
    assert metric_problem({'other': 5.0}, {'other': 5.3}, None)
    assert metric_problem({'coco/bbox_mAP': 30.0}, {}, 0.5)  # nothing was detected
