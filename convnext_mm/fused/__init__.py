"""The fast path: blocks and downsampling layers with fewer passes over memory.

Parameters, numbers and checkpoints are those of the plain layers (:mod:`convnext_mm.layers`).
"""
from .layers import FusedBlock, FusedDownsample
from .packed import Packable

__all__ = ['FusedBlock', 'FusedDownsample', 'Packable']
