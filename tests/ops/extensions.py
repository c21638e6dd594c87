"""mmcv's compiled operators and ours, and mmcv's functions with either."""
from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest
import torch

from convnext_mm.ops.extension import NAME, build

# After convnext_mm, which gives mmcv operators where it has none.
mmcv_ops = import_module('mmcv.ops')
OURS = build()
COMPILED = sys.modules[NAME] if hasattr(sys.modules[NAME], '__file__') else None
needs_compiled = pytest.mark.skipif(COMPILED is None, reason='mmcv has no compiled operators')


@contextmanager
def operators(extension: ModuleType) -> Iterator[ModuleType]:
    """Let mmcv's functions call the operators of an extension."""
    modules = [module for name, module in sys.modules.items()
               if name.startswith('mmcv.ops.') and hasattr(module, 'ext_module')]
    assert len(modules) > 30
    before = [module.ext_module for module in modules]
    try:
        for module in modules:
            module.ext_module = extension
        yield mmcv_ops
    finally:
        for module, old in zip(modules, before, strict=True):
            module.ext_module = old


def random_rois(seed: int, count: int, images: int, size: float = 160) -> torch.Tensor:
    """RoIs (count, 5) in and around an image: most of common sizes, some tiny, huge or outside."""
    rng = np.random.default_rng(seed)
    center = rng.uniform(-0.2 * size, 1.2 * size, (count, 2))
    extent = size * rng.choice([0, 1e-4, 0.02, 0.1, 0.3, 1, 3, 40], (count, 2),
                               p=[0.04, 0.04, 0.2, 0.3, 0.3, 0.08, 0.02, 0.02])
    extent *= rng.uniform(0.7, 1.4, (count, 2))
    image = rng.integers(0, images, (count, 1))
    return torch.from_numpy(np.concatenate(
        [image, center - extent / 2, center + extent / 2], 1)).float()


def random_boxes(seed: int, count: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes (count, 4) and scores (count,) of a kind: 'spread', 'clusters', 'classes' or 'ties'."""
    rng = np.random.default_rng(seed)
    objects = max(count // 12, 1)
    centers, sizes = rng.uniform(0, 800, (objects, 2)), rng.uniform(10, 150, (objects, 2))
    which = rng.integers(0, objects, count)
    center = centers[which] + sizes[which] * rng.normal(0, 0.15, (count, 2))
    size = sizes[which] * np.exp(rng.normal(0, 0.2, (count, 2)))
    scores = rng.uniform(0, 1, count)
    if kind == 'spread':
        center, size = rng.uniform(0, 800, (count, 2)), rng.uniform(5, 150, (count, 2))
    if kind == 'ties':  # equal scores, equal boxes, empty boxes, and overlaps of exactly 0.5
        center, size = np.round(center / 20) * 20, rng.choice([0, 20, 40], (count, 2))
        scores = np.round(scores, 1)
    boxes = np.concatenate([center - size / 2, center + size / 2], 1)
    if kind == 'classes':
        boxes += rng.integers(0, 12, (count, 1)) * 1000
    return torch.from_numpy(boxes).float(), torch.from_numpy(scores).float()
