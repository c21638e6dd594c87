"""Images as a config's pipeline reads them."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

ImageLoader = Callable[[str], np.ndarray]
"""From a path to an image as mmcv has it: (H, W) or (H, W, bands), of three bands in BGR order."""


def image_loader(pipeline: Sequence[dict[str, Any]] | None, scope: str) -> ImageLoader:
    """The loader of a pipeline: its first step.

    Args:
        pipeline: Of a dataset's config; without one, images are read as by LoadImageFromFile.
        scope: 'mmseg' or 'mmdet'.
    """
    return loader_of([build_step((pipeline or [dict(type='LoadImageFromFile')])[0], scope)])


def build_step(step: dict[str, Any], scope: str) -> Callable[[dict], dict | None]:
    """A step of a pipeline."""
    return import_module(f'{scope}.registry').TRANSFORMS.build(dict(step, _scope_=scope))


def loader_of(steps: Sequence[Callable[[dict], dict | None]]) -> ImageLoader:
    """As :func:`image_loader`, of the built steps of a pipeline."""
    def load(path: str) -> np.ndarray:
        loaded = steps[0](dict(img_path=path))
        if loaded is None:
            raise OSError('the pipeline reads nothing')
        return loaded['img']
    return load


PACKAGES = ('mmengine', 'mmcv', 'mmseg', 'mmdet', 'convnext_mm')
OTHER_UNITS = ('Normalize', 'Albu')
"""Transforms of these packages that may change the units of an image's values."""


def keeps_units(pipeline: Sequence[dict[str, Any]] | None, preprocessor: dict[str, Any],
                scope: str) -> bool:
    """Whether all steps between the loader and ``mean`` are known to keep the units of values."""
    registry = import_module(f'{scope}.registry')
    steps = [(step, registry.TRANSFORMS) for step in (pipeline or ())[1:]]
    for step, kinds in [*steps, (preprocessor, registry.MODELS)]:
        kind = step.get('type')
        known = kinds.get(kind) if isinstance(kind, str) else kind
        if kind in OTHER_UNITS or getattr(known, '__module__', '').split('.')[0] not in PACKAGES:
            return False
    return True
