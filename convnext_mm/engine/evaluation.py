"""mmseg's IoUMetric on large class maps: exact, and in less memory."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
