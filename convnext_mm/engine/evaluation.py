"""mmseg's IoUMetric on large class maps, exact and in less memory; detections of each class."""
from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import Evaluator
from torch import Tensor

from ..utils import LARGE_PICTURE

Count = Callable[[Tensor, Tensor, int, int], tuple[Tensor, ...]]
"""From prediction, label, number of classes and ignored label to numbers of pixels by class."""


def count_in_blocks(evaluator: Evaluator) -> None:
    """Let the IoUMetrics of an evaluator count large class maps in blocks of 8 bits, in place.

    torch.histc, by which mmseg counts, adds in fp32: of a class with more than 2**24 pixels in one
    image it counts 2**24. Metrics with their own way to count are left alone.
    """
    for metric in evaluator.metrics:
        count: Any = getattr(metric, 'intersect_and_union', None)
        if getattr(count, '__module__', '') == 'mmseg.evaluation.metrics.iou_metric':
            metric.intersect_and_union = _in_blocks(count)
            metric.process = _in_8_bits(metric)


def keep_folders(evaluator: Evaluator, dataset: Any) -> None:
    """Let the IoUMetrics of an evaluator write class maps in the folders of the images, in place.

    mmseg writes them by name, so that images of one name in two folders overwrite each other.
    """
    for metric in evaluator.metrics:
        if type(metric).__name__ == 'IoUMetric' and metric.output_dir:
            metric.process = _in_folders(metric, dataset)


def _in_folders(metric: Any, dataset: Any) -> Callable[..., None]:
    process, out = metric.process, metric.output_dir

    def process_each(data_batch: Any, data_samples: Sequence[Any]) -> None:
        for sample in data_samples:
            metric.output_dir = os.path.join(out, path_below(sample['img_path'], dataset).parent)
            os.makedirs(metric.output_dir, exist_ok=True)
            process(data_batch, [sample])
        metric.output_dir = out
    return process_each


def path_below(image: str, dataset: Any) -> Path:
    """The path of an image below the folder of its data set's images; else its name."""
    path = Path(os.path.abspath(image))
    parts = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', dataset)]
    for part in parts:
        prefix = getattr(part, 'data_prefix', None) or {}
        root = os.path.abspath(prefix.get('img_path') or prefix.get('img') or '')
        if path.is_relative_to(root):
            return path.relative_to(root)
    return Path(path.name)


def _in_8_bits(metric: Any) -> Callable[..., None]:
    """The metric's ``process``, whose copies of large class maps are an eighth as large."""
    process = metric.process

    def fits(sample: Any) -> bool:
        prediction = sample['pred_sem_seg']['data']
        if prediction.numel() <= LARGE_PICTURE or prediction.dtype != torch.long:
            return False
        values = [*prediction.aminmax(), prediction.max() + 1, metric.ignore_index]  # mmseg adds 1
        if 'gt_sem_seg' in sample:
            values += sample['gt_sem_seg']['data'].aminmax()
        return all(0 <= value <= 255 for value in values)

    def process_small(data_batch: Any, data_samples: Sequence[Any]) -> None:
        process(data_batch, [
            dict(sample, pred_sem_seg=dict(data=sample['pred_sem_seg']['data'].byte()))
            if fits(sample) else sample for sample in data_samples])
    return process_small


def _in_blocks(count: Count) -> Count:
    def count_all(prediction: Tensor, label: Tensor, *settings: int) -> tuple[Tensor, ...]:
        if prediction.numel() <= LARGE_PICTURE:
            return count(prediction, label, *settings)
        blocks = [one.flatten().split(LARGE_PICTURE // 16) for one in (prediction, label)]
        # Added in place: a small tensor kept after each block would scatter the heap.
        total = [numbers.double() for numbers in count(*(one[0] for one in blocks), *settings)]
        for block in zip(*(one[1:] for one in blocks), strict=True):
            for sum_of_all, numbers in zip(total, count(*block, *settings), strict=True):
                sum_of_all += numbers
        return tuple(total)
    return count_all


def keep_class_precisions(evaluator: Evaluator) -> dict[str, dict[str, float]]:
    """Let the CocoMetrics of an evaluator log the AP of each class and keep it, in place.

    mmdet names the AP of boxes and of masks alike, and puts both among the metrics of the run.

    Returns:
        {'box AP' and 'mask AP': {class: from 0 to 1}}, empty until the evaluation.
    """
    kept: dict[str, dict[str, float]] = {}
    for metric in evaluator.metrics:
        if hasattr(metric, 'classwise') and hasattr(metric, 'proposal_nums'):
            metric.compute_metrics = _of_each_class(metric, kept)
    return kept


def _of_each_class(metric: Any, kept: dict[str, dict[str, float]]) -> Callable[[list], dict]:
    compute, kinds, asked = metric.compute_metrics, list(metric.metrics), metric.classwise

    def compute_one_by_one(results: list) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for kind in kinds:
            title = dict(bbox='box AP', segm='mask AP').get(kind)
            metric.metrics, metric.classwise = [kind], title is not None
            found = compute(results)
            if title:
                classes = [name for name in metric.dataset_meta['classes']
                           if f'{name}_precision' in found]
                kept[title] = {name: float(found[f'{name}_precision']) for name in classes}
                for name in classes if not asked else ():
                    del found[f'{name}_precision']
            metrics.update(found)
        metric.metrics, metric.classwise, metric.compute_metrics = kinds, asked, compute
        return metrics
    return compute_one_by_one


def match_boxes(sample: Any, count: int, score: float = 0.3, overlap: float = 0.5) -> Tensor:
    """Which objects of an image are found, as what.

    Each object has one detection at most, and each detection one object: pairs of one class come
    first, then those with the larger IoU. Detections in ignored objects do not count.

    Args:
        sample: mmdet's DetDataSample.
        count: Number of classes.
        score: Detections with a lower score are left out.
        overlap: The smallest IoU of a pair; also the share of a detection in an ignored object.

    Returns:
        (count + 1, count + 1) int64: the number of objects of a class (row) found as another
        (column); last are the row of detections without an object, and the column of objects that
        are not found.
    """
    from mmdet.evaluation import bbox_overlaps
    found = sample.pred_instances[sample.pred_instances.scores >= score]
    boxes, labels = _boxes_and_labels(found)
    true_boxes, truth = _boxes_and_labels(sample.gt_instances)
    counts = torch.zeros(count + 1, count + 1, dtype=torch.long)
    free, missed = np.ones(len(boxes), dtype=bool), np.ones(len(true_boxes), dtype=bool)
    iou = bbox_overlaps(true_boxes, boxes)
    pairs = np.argwhere(iou >= overlap)
    same = truth[pairs[:, 0]] == labels[pairs[:, 1]]
    for one in np.lexsort((-iou[tuple(pairs.T)], ~same)):
        row, column = pairs[one]
        if missed[row] and free[column]:
            missed[row] = free[column] = False
            counts[truth[row], labels[column]] += 1
    if 'bboxes' in sample.get('ignored_instances', ()):
        ignored, _ = _boxes_and_labels(sample.ignored_instances)
        free &= ~(bbox_overlaps(boxes, ignored, mode='iof') >= overlap).any(1)
    counts[:-1, -1] = torch.from_numpy(np.bincount(truth[missed], minlength=count))
    counts[-1, :-1] = torch.from_numpy(np.bincount(labels[free], minlength=count))
    return counts


def _boxes_and_labels(instances: Any) -> tuple[np.ndarray, np.ndarray]:
    """(N, 4) float32 and (N,) int64."""
    boxes = getattr(instances.bboxes, 'tensor', instances.bboxes)
    return (boxes.cpu().float().numpy().reshape(-1, 4),
            instances.labels.cpu().numpy().astype(np.int64))
