"""Checkpoints: found, downloaded once, read without running code, fitted exactly, converted."""
from .fitting import check_complete, load_backbone, load_model, rename_for
from .reading import locate, read, weights

__all__ = ['check_complete', 'load_backbone', 'load_model', 'locate', 'read', 'rename_for',
           'weights']
