"""Converts configs for mmcv 0.x and 1.x to mmengine's style."""
from .parsing import old_keys
from .writing import migrate

__all__ = ['migrate', 'old_keys']
