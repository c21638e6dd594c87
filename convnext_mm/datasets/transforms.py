"""Replaces transforms of mmseg's and mmdet's pipelines by equal ones that take less time."""
from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

import cv2
import numpy as np

from ..registry import ROOMS


class Pack:
    """Mixin of PackSegInputs and PackDetInputs: separates the channels of an image by OpenCV."""

    def transform(self, results: dict) -> dict:
        """Pack an image (H, W, C): its copy with channels first is packed without another."""
        image = results.get('img')
        if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] > 1:
            planes = np.empty((image.shape[2], *image.shape[:2]), image.dtype)
            cv2.split(image, list(planes))
            results['img'] = planes.transpose(1, 2, 0)
        return super().transform(results)  # type: ignore[misc]


def use_faster_transforms(dataset: Any) -> None:
    """Replace transforms of a data set, of those that it wraps, and inside of others.

    Replaced are objects of exactly mmseg's and mmdet's classes. Results are equal to the last bit,
    and as many random numbers are drawn.
    """
    faster: dict[type, type] = {}
    for toolbox, room in ROOMS.items():
        if any(type(step).__module__.startswith(f'{toolbox}.') for step in _steps(dataset)):
            faster.update(import_module(f'{room}.transforms').FASTER)
    for step in _steps(dataset):
        if type(step) in faster:
            step.__class__ = faster[type(step)]


def _steps(node: Any) -> Iterable[Any]:
    """Yield the transforms below a data set, a pipeline or a transform."""
    if isinstance(node, (list, tuple)):
        for step in node:
            yield step
            yield from _steps(step)
        return
    for name in ('dataset', 'datasets', 'pipeline', 'transforms'):
        below = getattr(node, name, None)
        if below is not None and not isinstance(below, dict):
            yield from _steps(below)
