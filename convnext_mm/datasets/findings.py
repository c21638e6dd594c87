"""Problems found in a dataset's files, their report, and helpers for both tasks."""
from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from mmengine.config import Config
from PIL import Image, TiffImagePlugin
from rich.progress import track

from .loading import ImageLoader, keeps_units

Item = TypeVar('Item')
Result = TypeVar('Result')

LEVEL_MARKS = dict(error='✗', warning='!', note='·')
CHECK_COMMAND = 'python tools/check_dataset.py'
FAR_MEAN, NO_SPREAD = 10, 0.1
"""Normalized images have a mean of about 0 and a spread (std) of about 1. Beyond these bounds, mean
and std of the config are those of other units."""


@dataclass
class Problem:
    """One kind of problem in one split.

    Args:
        message: What is wrong.
        fix: How to fix it.
        level: 'error' (training would fail or learn something else), 'warning' (probably
            unintended) or 'note'.
        where: Affected files or ids; empty if the problem concerns the split as a whole.
    """

    message: str
    fix: str
    level: str = 'error'
    where: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        count = f'{len(self.where)} × ' if len(self.where) > 1 else ''
        lines = [f'  {LEVEL_MARKS[self.level]} {count}{self.message}']
        lines += [f'      {place}' for place in self.where[:3]]
        if len(self.where) > 3:
            lines.append(f'      … and {len(self.where) - 3} more')
        return '\n'.join([*lines, f'    → {self.fix}'])


@dataclass
class Findings:
    """Results of the inspection of one dataset.

    Args:
        split: 'train', 'val' or 'test'.
        location: Path of the annotation file or the image folder.
        classes: Class names; the label is the index.
        total: Number of images.
        checked: Number of images that were read.
        label_counts: Number of pixels or boxes per label.
        image_counts: Number of images per label.
        unit: Unit of ``label_counts``: 'pixels' or 'boxes'.
        digests: Path → hash of the file, to find an image that is in two splits.
        ignored: Mask value → number of pixels that are ignored (segmentation).
    """

    split: str
    location: str
    classes: Sequence[str]
    total: int = 0
    checked: int = 0
    label_counts: Counter[int] = field(default_factory=Counter)
    image_counts: Counter[int] = field(default_factory=Counter)
    unit: str = 'pixels'
    digests: dict[str, str] = field(default_factory=dict)
    ignored: Counter[int] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)

    def add(self, message: str, fix: str, level: str = 'error',
            where: Iterable[str] | None = None) -> None:
        """Add a :class:`Problem`, unless ``where`` is an empty collection."""
        places = [] if where is None else sorted(where)
        if where is None or places:
            self.problems.append(Problem(message, fix, level, places))

    def add_images(self, images: dict[str, ImageFacts], pipeline: Any, cfg: Config) -> None:
        """Keep the hashes of images (by path); add errors about bands and values that do not fit.

        Args:
            images: Those that could be read.
            pipeline: Of the data set.
            cfg: The config with the model.
        """
        self.digests = {path: one.digest for path, one in images.items()}
        model = cfg.get('model') or {}
        in_chans = model.get('backbone', {}).get('in_chans', 3)
        self._add_wrong_bands({path: one.bands for path, one in images.items()}, in_chans)
        fitting = {path: one for path, one in images.items() if one.bands == in_chans}
        preprocessor = model.get('data_preprocessor') or {}
        if fitting and keeps_units(pipeline, preprocessor, cfg.default_scope):
            self._add_wrong_values(fitting, preprocessor)

    def _add_wrong_values(self, images: dict[str, ImageFacts], preprocessor: dict) -> None:
        """Compare the images' values with the ``mean`` and ``std`` that normalize them."""
        facts = list(images.values())
        mean, std = (np.array(preprocessor.get(key) or (), float) for key in ('mean', 'std'))
        if not {mean.size, std.size} <= {1, facts[0].bands}:
            return
        seen = np.mean([one.mean for one in facts], axis=0)
        spread = np.sqrt(np.maximum(np.mean([one.square for one in facts], axis=0) - seen**2, 0))
        if len(seen) == 3 and (preprocessor.get('bgr_to_rgb') or preprocessor.get('rgb_to_bgr')):
            seen, spread = seen[::-1], spread[::-1]
        with np.errstate(divide='ignore', invalid='ignore'):
            normalized, width = (seen - mean) / std, spread / std
        in_8_bits = all(one.in_8_bits for one in facts)
        far = np.abs(normalized).max() > FAR_MEAN
        fractions = in_8_bits and far and max(*mean, *std) < 1
        flat = width.max() < NO_SPREAD
        reduced = [path for path, one in images.items() if one.reduced]
        if not fractions:
            self.add('image of more than 8 bits that the pipeline reads as 8 bits',
                     'Write mean and std of model.data_preprocessor in the units of the files: '
                     "above 255, the recipe's pipelines read all bits. In pipelines of your own, "
                     "set color_type='unchanged' and to_float32=True in LoadImageFromFile, and "
                     'remove PhotoMetricDistortion',
                     'error' if far or flat else 'warning', where=reduced)
        if not (far or flat) or (reduced and not fractions):
            return
        unnormalized = not mean.any() and (std == 1).all()
        self.add(f'the values of the images do not fit model.data_preprocessor: with mean='
                 f'{_listed(mean)} and std={_listed(std)}, the model sees a mean of '
                 f'{_listed(normalized)} and a spread of {_listed(width)}, not about 0 and 1',
                 f'They are in units of images from 0 to 255: write mean={_listed(255 * mean)} and '
                 f'std={_listed(255 * std)}' if fractions else
                 f'Write mean and std of your images; those checked here have mean={_listed(seen)} '
                 f'and std={_listed(spread)}',
                 'warning' if unnormalized or (in_8_bits and not far) else 'error')

    def _add_wrong_bands(self, bands: dict[str, int], in_chans: int) -> None:
        """Add an error about images whose number of bands (by path) is not the model's."""
        self.add(f'image whose number of bands is not model.backbone.in_chans={in_chans}',
                 'Set in_chans to the bands that the first step of the pipeline reads, which '
                 'expects files of height × width × bands (color_type of LoadImageFromFile: '
                 "'color' reads 3, 'grayscale' 1, 'unchanged' all)",
                 where=[f'{path}: {count}' for path, count in bands.items() if count != in_chans])

    def add_absent_classes(self) -> None:
        """Add a warning about classes without any pixel or box."""
        absent = [name for i, name in enumerate(self.classes) if not self.label_counts[i]]
        if absent:
            self.add('classes that occur in no image: ' + ', '.join(absent),
                     'Their IoU or AP will be nan: remove them from classes, or check how the '
                     'annotations number them', 'warning')

    def frequency_table(self) -> str:
        """A text table: share of each class, a bar, and the number of images that contain it."""
        total = sum(self.label_counts.values()) or 1
        width = max([len(name) for name in self.classes] + [5])
        most = max(self.label_counts.values(), default=1) or 1
        lines = [f'    {"class":<{width}}  {self.unit:>10}   share  {"images":>8}']
        for label, name in enumerate(self.classes):
            count = self.label_counts[label]
            lines.append(f'    {name:<{width}}  {count:>10}  {count / total:>6.1%}  '
                         f'{self.image_counts[label]:>8}  {"█" * round(20 * count / most)}')
        pixels = sum(self.ignored.values())
        if pixels:
            share = pixels / (pixels + sum(self.label_counts.values()))
            values = ', '.join(map(str, sorted(self.ignored)))
            lines.append(f'    ignored: {values}; {share:.1%} of all pixels')
        return '\n'.join(lines)


def sample_indices(total: int, sample: int | None) -> list[int]:
    """``sample`` evenly spaced indices below ``total``; all of them if ``sample`` is None."""
    if sample is None or sample >= total:
        return list(range(total))
    return [i * total // sample for i in range(sample)]


def map_in_threads(function: Callable[[Item], Result], items: Sequence[Item], description: str,
                   show_progress: bool) -> Iterator[Result]:
    """``map(function, items)`` in threads, since image decoders release the GIL."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(function, items)
        yield from (track(results, description, total=len(items)) if show_progress
                    else results)


class ImageFacts(NamedTuple):
    """What was read from an image.

    Args:
        size: (width, height).
        bands: Number of bands.
        digest: Hash of the file.
        mean: Mean of each band's values, of some rows and columns in a large image.
        square: Mean of their squares.
        in_8_bits: Whether the pipeline reads values from 0 to 255.
        reduced: Whether the file has more bits, which are lost.
    """

    size: tuple[int, int]
    bands: int
    digest: str
    mean: np.ndarray
    square: np.ndarray
    in_8_bits: bool
    reduced: bool


def read_image_facts(path: str, load: ImageLoader) -> ImageFacts:
    """Decode an image completely, by the pipeline's own loader.

    Raises:
        OSError: The file is missing or truncated; ``load`` may raise other errors.
    """
    data = Path(path).read_bytes()
    try:
        values = load(path)
    except Exception:
        with Image.open(io.BytesIO(data)) as image:  # says more about what is wrong
            image.load()
        raise
    check_complete(data)
    values = values.reshape(*values.shape[:2], -1)
    height, width, bands = values.shape
    step = max(1, max(height, width) // 512)
    some = values[::step, ::step].reshape(-1, bands).astype(np.float64)
    in_8_bits = values.dtype == np.uint8
    return ImageFacts((width, height), bands, file_digest(data), some.mean(axis=0),
                      (some**2).mean(axis=0), in_8_bits, in_8_bits and _has_more_bits(data))


def _has_more_bits(data: bytes) -> bool:
    """Whether the header of a PNG or TIFF file says that its values have more than 8 bits."""
    if data[:4] == b'\x89PNG':
        return data[24] > 8
    if data[:4] not in (b'II*\0', b'MM\0*'):
        return False
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    return max(tags.get(TiffImagePlugin.BITSPERSAMPLE, (1,))) > 8


def _listed(values: np.ndarray) -> str:
    """Numbers as a config writes them, of four digits: [123.7, 32770]."""
    return '[' + ', '.join(f'{float(f"{value:.4g}"):g}' for value in values) + ']'


def check_complete(data: bytes) -> None:
    """Check that the end of a JPEG or PNG file is there: OpenCV fills what is missing with gray.

    Raises:
        OSError: It is truncated.
    """
    end = {b'\xff\xd8': b'\xff\xd9', b'\x89P': b'IEND'}.get(data[:2])
    if end and end not in data[-1024:]:
        with Image.open(io.BytesIO(data)) as image:
            image.load()


def file_digest(data: bytes) -> str:
    """A hash that tells files apart."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def failure_reason(error: Exception) -> str:
    """A short text that says why an image cannot be read."""
    if isinstance(error, FileNotFoundError):
        return 'file not found'
    if isinstance(error, AssertionError) and 'failed to load image' in str(error):
        return 'Pillow reads it, but not the first step of the pipeline: try imdecode_backend=' \
               "'pillow' in LoadImageFromFile, or convert it"
    if isinstance(error, Image.UnidentifiedImageError):
        return 'not an image'
    if "requires the 'imagecodecs' package" in str(error):
        return 'its compression needs the package imagecodecs: pip install imagecodecs'
    if isinstance(error, Image.DecompressionBombError):
        return f'{error}; a TIFF file of strips or tiles can have any size'
    return str(error) or type(error).__name__
