"""Images as a config's pipeline reads them."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np

ImageLoader = Callable[[str], np.ndarray]
"""From a path to an image as mmcv has it: (H, W) or (H, W, bands), of three bands in BGR order."""


def image_loader(pipeline: Sequence[dict[str, Any]] | None, scope: str) -> ImageLoader | None:
    """The loader of a pipeline: its first step.

    Args:
        pipeline: Of a dataset's config.
        scope: 'mmseg' or 'mmdet'.

    Returns:
        None if it reads ordinary image files as three bands of 8 bits.
    """
    if not pipeline or reads_colors(pipeline):
        return None
    transforms = import_module(f'{scope}.registry').TRANSFORMS
    return loader_of([transforms.build(dict(pipeline[0], _scope_=scope))])


def loader_of(steps: Sequence[Callable[[dict], dict | None]]) -> ImageLoader:
    """As :func:`image_loader`, of the built steps of a pipeline."""
    def load(path: str) -> np.ndarray:
        loaded = steps[0](dict(img_path=path))
        if loaded is None:
            raise OSError('the pipeline reads nothing')
        return loaded['img']
    return load


def reads_colors(pipeline: Sequence[dict[str, Any]] | None) -> bool:
    """Whether a pipeline reads ordinary image files as three bands of 8 bits."""
    step = pipeline[0] if pipeline else {}
    return (step.get('type', 'LoadImageFromFile') == 'LoadImageFromFile'
            and step.get('color_type', 'color') == 'color'
            and step.get('imdecode_backend', 'cv2') in ('cv2', 'pillow', 'turbojpeg'))
