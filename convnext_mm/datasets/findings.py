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
from typing import NamedTuple, TypeVar

from PIL import Image
from rich.progress import track

from .loading import ImageLoader

Item = TypeVar('Item')
Result = TypeVar('Result')

LEVEL_MARKS = dict(error='✗', warning='!', note='·')
CHECK_COMMAND = 'python tools/check_dataset.py'


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

    def add_wrong_bands(self, bands: dict[str, int], in_chans: int) -> None:
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
    """(width, height), number of bands, and a hash of the file of an image."""

    size: tuple[int, int]
    bands: int
    digest: str


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
    return ImageFacts((values.shape[1], values.shape[0]), values.shape[2] if values.ndim > 2 else 1,
                      file_digest(data))


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
