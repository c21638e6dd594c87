"""Checkpoints: found, downloaded once, read without running code, fitted exactly, converted."""
from .files import locate, read, weights
from .loading import check_complete, load_backbone, load_model, rename_on_load

__all__ = ['check_complete', 'load_backbone', 'load_model', 'locate', 'read',
           'rename_on_load', 'weights']
