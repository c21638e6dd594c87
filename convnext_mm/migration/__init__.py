"""Converts configs for mmcv 0.x and 1.x to mmengine's style."""
