"""mmseg's transforms in less time, with equal results and random numbers."""
from __future__ import annotations

from typing import Any

import cv2
import mmcv
import numpy as np
from mmseg.datasets import transforms

from ..datasets.transforms import Pack

VALUES = np.arange(256, dtype=np.uint8)


class LoadAnnotations(transforms.LoadAnnotations):
    """Maps the values of a mask by one table."""

    reduce_zero_label: bool | None

    def _load_seg_map(self, results: dict) -> None:
        """Load the mask with the values as they are, then apply what mmseg does to each of them."""
        label_map, reduce = results.get('label_map'), results['reduce_zero_label']
        if self.reduce_zero_label not in (None, reduce):
            super()._load_seg_map(results)  # mmseg's error
        self.reduce_zero_label = results['reduce_zero_label'] = False
        results['label_map'] = None
        try:
            super()._load_seg_map(results)
        finally:
            self.reduce_zero_label = results['reduce_zero_label'] = reduce
            results['label_map'] = label_map
        mask, size = results['gt_seg_map'], tuple(results.get('ori_shape') or ())[:2]
        if mask.ndim < 2 and mask.size == np.prod(size):  # mmseg squeezes one row or column
            results['gt_seg_map'] = mask.reshape(size)
        if not reduce and label_map is None:
            return
        table = VALUES.copy()
        if reduce:
            table[0] = 255
            table -= 1
            table[table == 254] = 255
        if label_map is not None:
            before = table.copy()
            for old, new in label_map.items():
                table[before == old] = new
        results['gt_seg_map'] = cv2.LUT(results['gt_seg_map'], table)


class RandomCrop(transforms.RandomCrop):
    """Counts the classes of a crop by a histogram instead of sorting its pixels."""

    def crop_bbox(self, results: dict) -> tuple[int, int, int, int]:
        """Draw a box (y1, y2, x1, x2), up to eleven times until no class has most of it."""
        if self.cat_max_ratio >= 1 or results['gt_seg_map'].dtype != np.uint8:
            return super().crop_bbox(results)
        box = self._draw_box(results['img'])
        for _ in range(10):
            crop = self.crop(results['gt_seg_map'], box)
            counts = cv2.calcHist([crop], [0], None, [256], [0, 256]).ravel().astype(int)
            if 0 <= self.ignore_index < 256:
                counts[self.ignore_index] = 0
            if (counts > 0).sum() > 1 and counts.max() / counts.sum() < self.cat_max_ratio:
                break
            box = self._draw_box(results['img'])
        return box

    def _draw_box(self, image: np.ndarray) -> tuple[int, int, int, int]:
        y, x = (np.random.randint(0, max(size - crop, 0) + 1)
                for size, crop in zip(image.shape, self.crop_size, strict=False))
        return y, y + self.crop_size[0], x, x + self.crop_size[1]


class PhotoMetricDistortion(transforms.PhotoMetricDistortion):
    """Maps the 256 values of a byte by a table instead of computing each pixel in floats."""

    def convert(self, img: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
        """Scale and shift values, and clip them."""
        if img.dtype != np.uint8:
            return super().convert(img, alpha, beta)
        return cv2.LUT(img, super().convert(VALUES, alpha, beta))

    def saturation(self, img: np.ndarray) -> np.ndarray:
        """Scale the saturation, or leave it."""
        if img.dtype != np.uint8:
            return super().saturation(img)
        if np.random.randint(2):
            scale = np.random.uniform(self.saturation_lower, self.saturation_upper)
            img = _map_hsv(img, 1, super().convert(VALUES, alpha=scale))
        return img

    def hue(self, img: np.ndarray) -> np.ndarray:
        """Shift the hue, or leave it."""
        if img.dtype != np.uint8:
            return super().hue(img)
        if np.random.randint(2):
            shift = np.random.randint(-self.hue_delta, self.hue_delta)
            img = _map_hsv(img, 0, ((VALUES.astype(int) + shift) % 180).astype(np.uint8))
        return img


def _map_hsv(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    """Map one channel of a BGR image (H, W, 3) in the HSV space."""
    tables = np.repeat(VALUES[:, None], 3, 1)
    tables[:, channel] = table
    hsv = mmcv.bgr2hsv(image)
    return mmcv.hsv2bgr(cv2.LUT(hsv, tables[None]))


class PackSegInputs(Pack, transforms.PackSegInputs):
    """Packs with a faster copy of the image."""


FASTER: dict[type, type[Any]] = {ours.__mro__[1 + issubclass(ours, Pack)]: ours for ours in (
    LoadAnnotations, RandomCrop, PhotoMetricDistortion, PackSegInputs)}
"""Ours of each class of mmseg."""
