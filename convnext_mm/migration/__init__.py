"""Configs of mmcv 0.x and 1.x: read as data, converted to mmengine's style, written anew."""
from .parsing import old_keys
from .writing import migrate

__all__ = ['migrate', 'old_keys']
