"""IoUMetric on large class maps."""
import pytest
import torch
from mmengine.evaluator import Evaluator

pytest.importorskip('mmseg')
from mmseg.evaluation import IoUMetric

from convnext_mm.engine import evaluation
from convnext_mm.engine.evaluation import count_in_blocks


def areas(prediction: torch.Tensor, label: torch.Tensor, blocks: bool) -> list[torch.Tensor]:
    metric = IoUMetric()
    metric.dataset_meta = dict(classes=('a', 'b', 'c'))
    if blocks:
        count_in_blocks(Evaluator(metric))
    metric.process({}, [dict(pred_sem_seg=dict(data=prediction[None]),
                             gt_sem_seg=dict(data=label[None]))])
    return [area.double() for area in metric.results[0]]


def test_blocks_add_up_to_what_mmseg_counts(monkeypatch):
    monkeypatch.setattr(evaluation, 'LARGE_PICTURE', 100)
    torch.manual_seed(0)
    prediction, label = torch.randint(0, 3, (2, 37, 53))
    label[:5] = 255
    for ours, theirs in zip(areas(prediction, label, True), areas(prediction, label, False),
                            strict=True):
        assert theirs.sum() > 100
        assert torch.equal(ours, theirs)


def test_classes_of_more_than_16777216_pixels_are_counted():
    prediction = torch.zeros(4200, 4100, dtype=torch.uint8)
    prediction[:2] = 1
    intersect, union, predicted, labeled = areas(prediction, torch.zeros_like(prediction), True)
    assert intersect.tolist() == [4198 * 4100, 0, 0]
    assert union.tolist() == [4200 * 4100, 2 * 4100, 0]
    assert predicted.tolist() == [4198 * 4100, 2 * 4100, 0]
    assert labeled.tolist() == [4200 * 4100, 0, 0]


def test_metrics_with_their_own_way_to_count_are_left_alone():
    class Own(IoUMetric):
        @staticmethod
        def intersect_and_union(prediction, label, classes, ignored):
            return ()
    metric = Own()
    count_in_blocks(Evaluator(metric))
    assert metric.intersect_and_union is Own.intersect_and_union
