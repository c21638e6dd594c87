"""mmseg's IoUMetric on large class maps: exact, and in less memory."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmengine.evaluator import Evaluator
from torch import Tensor

from ..utils import LARGE_PICTURE

Count = Callable[[Tensor, Tensor, int, int], tuple[Tensor, ...]]
"""From prediction, label, number of classes and ignored label to numbers of pixels by class."""


def count_in_blocks(evaluator: Evaluator) -> None:
    """Let the IoUMetrics of an evaluator count large class maps block by block, in place.

    torch.histc, by which mmseg counts, adds in fp32: of a class with more than 2**24 pixels in one
    image it counts 2**24. Metrics with their own way to count are left alone.
    """
    for metric in evaluator.metrics:
        count: Any = getattr(metric, 'intersect_and_union', None)
        if getattr(count, '__module__', '') == 'mmseg.evaluation.metrics.iou_metric':
            metric.intersect_and_union = _in_blocks(count)


def _in_blocks(count: Count) -> Count:
    def count_all(prediction: Tensor, label: Tensor, *settings: int) -> tuple[Tensor, ...]:
        if prediction.numel() <= LARGE_PICTURE:
            return count(prediction, label, *settings)
        parts = [count(*block, *settings) for block in zip(
            prediction.flatten().split(LARGE_PICTURE // 16),
            label.flatten().split(LARGE_PICTURE // 16), strict=True)]
        return tuple(sum(numbers.double() for numbers in numbers_of)
                     for numbers_of in zip(*parts, strict=True))
    return count_all
