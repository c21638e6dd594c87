"""Checkpoints: find, download, read without running code, load completely or not at all, export."""
from .files import extract_weights, locate_checkpoint, read_checkpoint
from .loading import check_complete, load_backbone, load_model, rename_on_load

__all__ = ['check_complete', 'extract_weights', 'load_backbone', 'load_model',
           'locate_checkpoint', 'read_checkpoint', 'rename_on_load']
