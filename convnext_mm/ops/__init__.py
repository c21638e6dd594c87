"""mmcv's compiled operators in plain PyTorch, for machines where mmcv has none."""
from . import boxes, losses, roi, sampling
from .extension import ExtensionFinder

__all__ = ['ExtensionFinder', 'boxes', 'losses', 'roi', 'sampling']
