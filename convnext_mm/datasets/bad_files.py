"""Names the file when an image or its annotation cannot be loaded, in training and testing."""
from __future__ import annotations

import errno
import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
from mmengine.dataset import Compose
from mmengine.logging import print_log

from ..errors import UserError
from ..utils import describe
from .findings import CHECK_COMMAND
from .segmentation import IGNORED

OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC)
"""Errors of files that say nothing about the file."""


class BadFile(UserError):
    """An image or annotation that cannot be used; the message begins with its path.

    Args:
        message: May be the text in which PyTorch brings the error from a worker; only the message
            is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2].strip())


class NamingPipeline(Compose):
    """mmengine's Compose, whose errors name the sample's files and the transform.

    Args:
        transforms: Those of another pipeline.
        classes: Number of classes, against which masks are checked; None: there are none.
    """

    def __init__(self, transforms: list, classes: int | None = None) -> None:
        self.transforms, self.classes = transforms, classes

    def __call__(self, data: dict) -> dict | None:
        """Apply the transforms to a sample.

        Raises:
            BadFile: A transform fails, or a mask has another size than its image or a value that
                is neither a class nor 255.
        """
        names = _file_names(data)
        result: dict | None = data
        unchecked = self.classes is not None
        for transform in self.transforms:
            try:
                result = transform(result)
                if result is None:
                    return None
                if unchecked and 'gt_seg_map' in result:
                    check_mask(result, self.classes or 0)
                    unchecked = False
            except MemoryError:
                raise
            except Exception as error:  # libraries raise anything on a damaged file
                if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
                    raise
                reason = str(error) if isinstance(error, UserError) else (
                    f'{type(transform).__name__}: {describe(error)}')
                raise BadFile(f'{names}: {reason}') from error
        return result


def check_mask(results: dict, classes: int) -> None:
    """Check a mask just after it was loaded.

    Args:
        results: ``gt_seg_map`` (H, W) of integers, and ``ori_shape`` if an image was loaded.
        classes: Number of classes.

    Raises:
        UserError: It has another size than its image, or values of no class.
    """
    mask = results['gt_seg_map']
    size = tuple(results.get('ori_shape') or mask.shape)[:2]
    if mask.shape != size:
        raise UserError(f'the mask is {_size(mask.shape)} pixels, and its image {_size(size)}')
    outside = (mask >= classes) & (mask != IGNORED) | (mask < 0)
    if outside.any():
        values = ', '.join(map(str, np.unique(mask[outside])[:5]))
        raise UserError(f'the mask has the label {values}, but there are {classes} classes, with '
                        f'labels 0 to {classes - 1}, and {IGNORED} for no class')


def require_images(found: list[dict], where: object, before: int = 0,
                   fix: str = 'check data_root, the folder, and the ending of the files'
                   ) -> list[dict]:
    """The images of a split, of which there must be some.

    Args:
        found: The images.
        where: Their folder or annotation file.
        before: How many there were before those without usable objects were left out.
        fix: What to do if there were none.

    Raises:
        UserError: There are none.
    """
    if found:
        return found
    raise UserError(f'{where} has no image' + (
        f' with an object of the classes, of {before}' if before else f': {fix}')
        + f'. To look at the data: {CHECK_COMMAND} CONFIG')


def name_bad_files(dataset: Any) -> None:
    """Let the pipelines of a data set, and of those that it wraps, name what they cannot load."""
    for below in (getattr(dataset, 'dataset', None), *(getattr(dataset, 'datasets', None) or ())):
        if below is not None:
            name_bad_files(below)
    if type(getattr(dataset, 'pipeline', None)) is Compose:
        has_masks = hasattr(dataset, 'reduce_zero_label')
        classes = len((dataset.metainfo or {}).get('classes') or ()) if has_masks else 0
        dataset.pipeline = NamingPipeline(dataset.pipeline.transforms, classes or None)


class SkippedFiles:
    """The bad files that a training run leaves out, up to a limit.

    Args:
        limit: ``max_bad_files`` of the config: that many files, of each process.

    Raises:
        UserError: The limit is not a whole number from 0 up.
    """

    def __init__(self, limit: int) -> None:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit < 0:
            raise UserError(f'max_bad_files={limit!r} must be a whole number from 0 up')
        self.limit = limit
        self.found: dict[str, None] = {}

    def add(self, messages: Iterable[str]) -> None:
        """Count bad files, each once, and warn.

        Raises:
            UserError: There are more than the limit; lists them.
        """
        for message in messages:
            if message in self.found:
                continue
            self.found[message] = None
            if len(self.found) > self.limit:
                listed = ''.join(f'\n  {one}' for one in self.found)
                raise UserError(
                    f'{len(self.found)} bad files, max_bad_files={self.limit}:{listed}\nRepair '
                    f'or remove them; all are found by {CHECK_COMMAND} CONFIG. To leave out more: '
                    f'--cfg-options max_bad_files={max(100, 10 * self.limit)}')
            print_log(f'Left out (file {len(self.found)} of at most {self.limit}, max_bad_files): '
                      f'{message}', logger='current', level=logging.WARNING)


def _file_names(data: dict) -> str:
    """The paths of a sample's image and mask."""
    image, mask = data.get('img_path'), data.get('seg_map_path')
    return f'{image or "a sample"}' + (f' (mask {mask})' if mask else '')


def _size(shape: tuple[int, ...]) -> str:
    return f'{shape[1]}×{shape[0]}' if len(shape) > 1 else str(shape)
