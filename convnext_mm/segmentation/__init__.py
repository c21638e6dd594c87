"""mmseg's segmentor and heads, computed with less arithmetic and memory.

Parameters, numbers, losses and arguments are mmseg's. Importing this imports mmseg, so it is
imported only when a config names one of the classes (:mod:`convnext_mm.registry`).
"""
from .data import SegmentationDataset
from .heads import FCNHead, FPNHead, SegformerHead, UPerHead
from .segmentor import EncoderDecoder

__all__ = ['EncoderDecoder', 'FCNHead', 'FPNHead', 'SegformerHead', 'SegmentationDataset',
           'UPerHead']
