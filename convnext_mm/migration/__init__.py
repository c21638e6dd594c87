"""Configs of mmcv 0.x and 1.x: read as data, converted to mmengine's style, written anew."""
from .reading import old_keys

__all__ = ['old_keys']
