"""Normalization of images with any number of bands."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import ImgDataPreprocessor
from mmengine.registry import MODELS


def multi_band_preprocessor(base: str, mean: Sequence[float], std: Sequence[float],
                            **settings: Any) -> ImgDataPreprocessor:
    """A toolbox's data preprocessor that normalizes each of C bands by its own mean and std.

    mmengine's takes 1 or 3 values, though its arithmetic needs no such limit. Registered as
    'MultiBandPreprocessor'.

    Args:
        base: Type of the toolbox's preprocessor, such as 'SegDataPreProcessor'.
        mean: C means, in the units of the loaded images.
        std: C standard deviations.
        settings: Other arguments of ``base``.
    """
    preprocessor = MODELS.build(dict(type=base, mean=[0.0], std=[1.0], **settings))
    for name, values in (('mean', mean), ('std', std)):
        preprocessor.register_buffer(
            name, torch.tensor(values, dtype=torch.float).view(-1, 1, 1), persistent=False)
    return preprocessor
