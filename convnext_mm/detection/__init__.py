"""mmdet's neck, heads and RoI extractor, computed with less arithmetic and fewer copies.

Parameters, numbers, losses and arguments are mmdet's. Importing this imports mmdet, so it is
imported only when a config names one of the classes (:mod:`convnext_mm.registry`).
"""
from .data import CocoDataset, CocoMetric, DetectionWriter, NamedCOCO
from .heads import FPN, ConvFCBBoxHead, FCNMaskHead, RPNHead, Shared2FCBBoxHead
from .roi_extractor import SingleRoIExtractor

__all__ = ['FPN', 'CocoDataset', 'CocoMetric', 'ConvFCBBoxHead', 'DetectionWriter', 'FCNMaskHead',
           'NamedCOCO', 'RPNHead', 'Shared2FCBBoxHead', 'SingleRoIExtractor']
