"""Splits images into training and validation data, with near-duplicates on one side."""
from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image

from ..errors import UserError
from ..utils import atomic_path, writable_folder
from .coco import load_coco
from .findings import map_in_threads

HASH_BITS = 64
NEAR_BITS = 3
"""Bits of the hashes of two images that may differ; one of four quarters is then equal."""
NEAR_GRAY = 6.0
"""Mean difference of two images of 16×16 gray values, of 255, up to which they are one."""


class Look(NamedTuple):
    """What an image looks like: its difference hash, and its gray values at 16×16 pixels."""

    bits: int
    gray: np.ndarray


def look_at(path: str) -> Look | None:
    """The look of an image; None: it cannot be read.

    The hash says for 8×8 places whether the image gets brighter to the right ("dHash").
    """
    try:
        with Image.open(path) as image:
            image.draft('L', (64, 64))  # decodes JPEGs at an eighth of their size
            gray = image.convert('L')
            small = np.asarray(gray.resize((9, 8), Image.Resampling.BOX), np.int16)
            values = np.asarray(gray.resize((16, 16), Image.Resampling.BOX), np.int16)
    except Exception:  # decoders raise errors of any type; the check of the data names them
        return None
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    return Look(int.from_bytes(np.packbits(bits).tobytes(), 'big'), values)


def group_duplicates(paths: Sequence[str], show_progress: bool = False) -> list[list[int]]:
    """Groups of images that look alike, as indices; an image alone is a group of one."""
    looks = list(map_in_threads(look_at, paths, 'Looking for duplicates', show_progress))
    parent = list(range(len(paths)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i
    buckets: dict[tuple[int, int], list[int]] = {}
    for i, look in enumerate(looks):
        if look is None:
            continue
        for quarter in range(4):
            bucket = buckets.setdefault((quarter, look.bits >> 16 * quarter & 0xFFFF), [])
            for j in bucket:
                other = looks[j]
                assert other is not None
                if root(i) != root(j) and (look.bits ^ other.bits).bit_count() <= NEAR_BITS and (
                        np.abs(look.gray - other.gray).mean() <= NEAR_GRAY):
                    parent[root(i)] = root(j)
            bucket.append(i)
    groups: dict[int, list[int]] = {}
    for i in range(len(paths)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def split_indices(groups: Sequence[Sequence[int]], fraction: float, seed: int = 0
                  ) -> tuple[list[int], list[int]]:
    """Indices of training and validation images, whole groups on one side.

    Args:
        groups: See :func:`group_duplicates`.
        fraction: Share of the validation images, above 0 and below 1.
        seed: Of the shuffle.

    Raises:
        UserError: All images are of one group.
    """
    total = sum(map(len, groups))
    wanted = max(1, round(total * fraction))
    shuffled = sorted(groups, key=lambda group: group[0])
    random.Random(seed).shuffle(shuffled)
    chosen: list[int] = []
    larger = []
    for group in shuffled:
        if len(chosen) + len(group) <= wanted:
            chosen += group
        else:
            larger.append(group)
    for group in larger:  # closer to the wanted number with the group than without it
        if abs(len(chosen) + len(group) - wanted) < abs(len(chosen) - wanted):
            chosen += group
    rest = sorted(set(range(total)) - set(chosen))
    if not chosen or not rest:
        raise UserError(f'{total} images cannot be split: they are one image, or near-duplicates '
                        'of it')
    return rest, sorted(chosen)


def split_files(paths: Sequence[str], fraction: float, seed: int, train: Path, val: Path,
                write: Callable[[Path, list[int]], None], source: Any,
                show_progress: bool = False) -> bool:
    """Split images and write both lists, unless they are there for the same images already.

    Args:
        paths: The images.
        fraction: See :func:`split_indices`.
        seed: Of the shuffle.
        train: The list of training images to write.
        val: The list of validation images to write.
        write: Writes a list of the images of some indices to a path.
        source: What the lists are made from, for comparison.
        show_progress: Whether to show a progress bar.

    Returns:
        Whether they were written.
    """
    folder = writable_folder(train.parent)
    with FileLock(folder / '.lock'):  # several processes read the same config
        return _split_files(paths, fraction, seed, train, val, write, source, show_progress)


def _split_files(paths: Sequence[str], fraction: float, seed: int, train: Path, val: Path,
                 write: Callable[[Path, list[int]], None], source: Any, show_progress: bool
                 ) -> bool:
    stamp = train.parent / 'split.json'
    made_from = json.dumps(dict(val=fraction, seed=seed, images=len(paths), source=source))
    if train.is_file() and val.is_file() and stamp.is_file() and (
            stamp.read_text(encoding='utf-8') == made_from):
        return False
    groups = group_duplicates(paths, show_progress)
    for path, indices in zip((train, val), split_indices(groups, fraction, seed), strict=True):
        with atomic_path(path) as part:
            write(part, indices)
    stamp.write_text(made_from, encoding='utf-8')
    return True


def split_coco(path: str, folder: str, fraction: float, seed: int, out: Path,
               show_progress: bool = False) -> tuple[Path, Path]:
    """Split an annotation file; returns those of training and validation.

    Args:
        path: The annotation file.
        folder: Folder of its images.
        fraction: Share of the validation images.
        seed: Of the shuffle.
        out: Folder of the new files.
        show_progress: Whether to show a progress bar.

    Raises:
        UserError: See :func:`load_coco` and :func:`split_indices`.
    """
    content = load_coco(path).content
    images = content['images']

    def write(part: Path, indices: list[int]) -> None:
        kept = [images[i] for i in indices]
        ids = {image['id'] for image in kept}
        part.write_text(json.dumps(dict(content, images=kept, annotations=[
            one for one in content['annotations'] if one['image_id'] in ids])), encoding='utf-8')
    train, val = out / 'train.json', out / 'val.json'
    paths = [os.path.join(folder, str(image['file_name'])) for image in images]
    split_files(paths, fraction, seed, train, val, write,
                [os.path.abspath(path), os.path.getsize(path)], show_progress)
    return train, val


def split_names(paths: Sequence[str], names: Sequence[str], fraction: float, seed: int, out: Path,
                show_progress: bool = False) -> tuple[Path, Path]:
    """Split images by name; returns text files of training and validation, a name per line.

    Args:
        paths: The images.
        names: What the lists have for each.
        fraction: Share of the validation images.
        seed: Of the shuffle.
        out: Folder of the lists.
        show_progress: Whether to show a progress bar.

    Raises:
        UserError: See :func:`split_indices`.
    """
    def write(part: Path, indices: list[int]) -> None:
        part.write_text(''.join(f'{names[i]}\n' for i in indices), encoding='utf-8')
    train, val = out / 'train.txt', out / 'val.txt'
    split_files(paths, fraction, seed, train, val, write, sorted(names), show_progress)
    return train, val
