"""mmdet's transforms in less time, with equal results.

Most of the time of a detector's pipeline goes into masks, one for each object and as large as the
image. What lies outside of an object's box is zero before and after, so only the box is computed.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cv2
import mmcv
import numpy as np
from mmdet.datasets import transforms
from mmdet.structures import mask

from ..datasets.transforms import Pack
from ..errors import UserError

Box = tuple[int, int, int, int]


class BitmapMasks(mask.BitmapMasks):
    """Masks (N, H, W) that are resized and flipped inside of the objects' boxes."""

    def __getitem__(self, index: Any) -> BitmapMasks:
        """Some of the masks; all of them without a copy."""
        if not (isinstance(index, np.ndarray) and np.array_equal(
                np.flatnonzero(index) if index.dtype == bool else index, range(len(self)))):
            return _ours(super().__getitem__(index))
        return BitmapMasks(self.masks, self.height, self.width)

    def rescale(self, scale: Any, interpolation: str = 'nearest') -> BitmapMasks:
        """Resize to a scale, as mmcv's ``rescale_size`` understands it."""
        width, height = mmcv.rescale_size((self.width, self.height), scale)
        return self.resize((height, width), interpolation)

    def resize(self, out_shape: tuple[int, int], interpolation: str = 'nearest') -> BitmapMasks:
        """Resize to (height, width)."""
        if interpolation != 'nearest' or self.masks.dtype != np.uint8 or not len(self):
            return _ours(super().resize(out_shape, interpolation))
        # Which row and column OpenCV takes for each of the new ones.
        rows, columns = (cv2.resize(
            np.arange(old, dtype=np.float32)[None], (new, 1), interpolation=cv2.INTER_NEAREST
        )[0].astype(int) for old, new in zip(self.masks.shape[1:], out_shape, strict=True))

        def resize_box(source: np.ndarray, target: np.ndarray, box: Box) -> None:
            x, y, w, h = box
            top, bottom = np.searchsorted(rows, (y, y + h))
            left, right = np.searchsorted(columns, (x, x + w))
            target[top:bottom, left:right] = source[rows[top:bottom]].take(
                columns[left:right], axis=1)
        return self._inside_of_boxes(out_shape, resize_box)

    def flip(self, flip_direction: str = 'horizontal') -> BitmapMasks:
        """Flip to the 'horizontal', 'vertical' or 'diagonal' direction."""
        if self.masks.dtype != np.uint8 or not len(self):
            return _ours(super().flip(flip_direction))

        def flip_box(source: np.ndarray, target: np.ndarray, box: Box) -> None:
            x, y, w, h = box
            mmcv.imflip(target, flip_direction)[y:y + h, x:x + w] = source[y:y + h, x:x + w]
        return self._inside_of_boxes((self.height, self.width), flip_box)

    def _inside_of_boxes(self, shape: tuple[int, int],
                         write: Callable[[np.ndarray, np.ndarray, Box], None]) -> BitmapMasks:
        """Masks of another shape, into which ``write`` writes what lies inside of a box."""
        masks = np.zeros((len(self), *shape), np.uint8)
        for source, target in zip(self.masks, masks, strict=True):
            write(source, target, cv2.boundingRect(source))
        return BitmapMasks(masks, *shape)

    def crop(self, bbox: np.ndarray) -> BitmapMasks:
        """Crop to a box (x1, y1, x2, y2)."""
        return _ours(super().crop(bbox))

    def pad(self, out_shape: tuple[int, int], pad_val: int = 0) -> BitmapMasks:
        """Pad on the right and at the bottom to (height, width)."""
        if pad_val or self.masks.dtype != np.uint8 or not len(self):
            return _ours(super().pad(out_shape, pad_val))

        def copy_box(source: np.ndarray, target: np.ndarray, box: Box) -> None:
            x, y, w, h = box
            target[y:y + h, x:x + w] = source[y:y + h, x:x + w]
        return self._inside_of_boxes(out_shape, copy_box)


def _ours(masks: mask.BitmapMasks) -> BitmapMasks:
    return BitmapMasks(masks.masks, masks.height, masks.width)


class EncodedMasks(BitmapMasks):
    """Masks that are decoded when they are first read, which in testing may be never.

    Args:
        encoded: Polygons or RLE of each object.
        shape: (height, width) of the image.
        image: The image's path, for messages.
    """

    def __init__(self, encoded: list, shape: tuple[int, int], image: str = '') -> None:
        self.encoded, self.image = encoded, image
        self.height, self.width = shape
        self.decoded: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.encoded if self.decoded is None else self.decoded)

    def __getitem__(self, index: Any) -> BitmapMasks:
        """Some of the masks."""
        if self.decoded is not None:
            return super().__getitem__(index)
        chosen = np.atleast_1d(np.arange(len(self))[index])
        return EncodedMasks([self.encoded[i] for i in chosen], (self.height, self.width),
                            self.image)

    @property
    def masks(self) -> np.ndarray:
        """The masks (N, H, W).

        Raises:
            UserError: A mask has another size than its image.
        """
        if self.decoded is None:
            shape = self.height, self.width
            self.decoded = np.zeros((len(self), *shape), np.uint8)
            for one, target in zip(self.encoded, self.decoded, strict=True):
                found = transforms.LoadAnnotations._poly2mask(None, one, *shape)
                if found.shape != shape:
                    raise UserError(f'{self.image}: a mask of {found.shape[1]}×{found.shape[0]} '
                                    f'pixels for an image of {self.width}×{self.height}')
                # pycocotools stores column after column.
                y, x, h, w = cv2.boundingRect(np.ascontiguousarray(found.T))
                target[y:y + h, x:x + w] = found[y:y + h, x:x + w]
        return self.decoded

    @masks.setter
    def masks(self, masks: np.ndarray) -> None:  # of a transform such as CopyPaste
        self.decoded = masks


class LoadAnnotations(transforms.LoadAnnotations):
    """Loads :class:`EncodedMasks`."""

    def _load_masks(self, results: dict) -> None:
        """Load the masks of the objects, which are decoded later."""
        if not self.poly2mask:
            super()._load_masks(results)
            return
        results['gt_masks'] = EncodedMasks(self._process_masks(results),
                                           tuple(results['ori_shape']), results.get('img_path', ''))


class PackDetInputs(Pack, transforms.PackDetInputs):
    """Packs with a faster copy of the image."""


FASTER: dict[type, type[Any]] = {ours.__mro__[1 + issubclass(ours, Pack)]: ours for ours in (
    LoadAnnotations, PackDetInputs)}
"""Ours of each class of mmdet."""
