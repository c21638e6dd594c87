"""Metrics on large class maps, and of each class."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.evaluator import Evaluator
from mmengine.structures import BaseDataElement, InstanceData
from PIL import Image

pytest.importorskip('mmseg')
from mmseg.evaluation import IoUMetric

from convnext_mm.engine import evaluation
from convnext_mm.engine.evaluation import count_in_blocks, keep_folders, match_boxes, path_below


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


@pytest.mark.parametrize(('classes', 'label', 'ignored', 'dtype'), [
    (150, 255, 255, torch.uint8), (150, 255, -1, torch.long), (256, 255, 255, torch.long),
    (150, 300, 255, torch.long), (150, -1, 255, torch.long)])
def test_large_class_maps_are_copied_in_8_bits_if_they_fit(classes, label, ignored, dtype, tmp_path,
                                                          monkeypatch):
    monkeypatch.setattr(evaluation, 'LARGE_PICTURE', 100)
    metric = IoUMetric(ignore_index=ignored, output_dir=str(tmp_path))
    metric.dataset_meta = dict(classes=[str(i) for i in range(classes)])
    seen = []
    count = IoUMetric.intersect_and_union
    count_in_blocks(Evaluator(metric))
    by_blocks = metric.intersect_and_union
    metric.intersect_and_union = lambda *args: (seen.append(args[0].dtype), by_blocks(*args))[1]
    prediction = torch.arange(classes).repeat(3)[None]
    labels = prediction.flip(1).clone()
    labels[0, 0] = label
    metric.process({}, [dict(pred_sem_seg=dict(data=prediction), reduce_zero_label=True,
                             img_path='a.png', gt_sem_seg=dict(data=labels))])
    assert seen == [dtype]
    for ours, theirs in zip(metric.results[0], count(prediction[0], labels[0], classes, ignored),
                            strict=True):
        assert torch.equal(ours, theirs.double())
    written = np.asarray(Image.open(tmp_path / 'a.png')).squeeze()
    assert np.array_equal(written, ((prediction[0] + 1) % 256).byte().numpy())


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


def test_boxes_are_matched_once_and_those_of_their_class_first():
    pytest.importorskip('mmdet')
    instances = [[[0, 0, 20, 20], 0], [[50, 0, 70, 20], 1], [[0, 60, 20, 80], 1]]
    found = [([0, 0, 20, 20], 1, 0.9), ([0, 0, 20, 18], 0, 0.4),  # the same object as 1 and as 0
             ([50, 0, 70, 20], 0, 0.9),                           # 1 taken for 0
             ([80, 80, 90, 90], 1, 0.9), ([80, 80, 90, 90], 1, 0.2),  # nothing there; too unsure
             ([41, 41, 49, 49], 0, 0.9)]                          # in a crowd
    sample = BaseDataElement(
        gt_instances=InstanceData(bboxes=torch.tensor([one[0] for one in instances]).float(),
                                  labels=torch.tensor([one[1] for one in instances])),
        ignored_instances=InstanceData(bboxes=torch.tensor([[40., 40, 60, 60]]),
                                       labels=torch.tensor([0])),
        pred_instances=InstanceData(bboxes=torch.tensor([one[0] for one in found]).float(),
                                    labels=torch.tensor([one[1] for one in found]),
                                    scores=torch.tensor([one[2] for one in found])))
    assert match_boxes(sample, 2).tolist() == [[1, 0, 0], [1, 0, 1], [0, 2, 0]]


def test_images_of_several_data_sets_keep_their_folders(tmp_path):
    dataset = SimpleNamespace(datasets=[SimpleNamespace(data_prefix=dict(img=f'{tmp_path}/{name}'))
                                        for name in ('one', 'two')])
    assert str(path_below(f'{tmp_path}/two/day/a.jpg', dataset)) == 'day/a.jpg'
    assert str(path_below('/elsewhere/a.jpg', dataset)) == 'a.jpg'
    repeated = SimpleNamespace(dataset=dataset.datasets[0])
    assert str(path_below(f'{tmp_path}/one/day/a.jpg', repeated)) == 'day/a.jpg'


def test_class_maps_of_one_name_are_kept_apart(tmp_path):
    metric = IoUMetric(output_dir=str(tmp_path / 'out'), format_only=True)
    metric.dataset_meta = dict(classes=('a', 'b', 'c'))
    evaluator = Evaluator(metric)
    count_in_blocks(evaluator)
    keep_folders(evaluator, SimpleNamespace(data_prefix=dict(img_path=str(tmp_path))))
    for value, name in enumerate(('a.jpg', 'day/a.jpg', 'day/cloud/a.jpg')):
        metric.process({}, [dict(img_path=str(tmp_path / name), pred_sem_seg=dict(
            data=torch.full((1, 2, 2), value)))])
    for value, name in enumerate(('a.png', 'day/a.png', 'day/cloud/a.png')):
        assert np.asarray(Image.open(tmp_path / 'out' / name)).max() == value
