"""Problems found in the files of a data set, and helpers that inspect them for both tasks."""
from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from rich.progress import track

MARKS = dict(error='✗', warning='!', note='·')
WHOLE_CHECK = 'python tools/check_dataset.py'


@dataclass
class Problem:
    """One kind of mistake in one split.

    Args:
        what: What is wrong.
        fix: What to do about it.
        level: 'error': training would fail, or learn something else; 'warning': most likely not
            meant; 'note'.
        where: Files or ids that have it; empty where it is not one of files.
    """

    what: str
    fix: str
    level: str = 'error'
    where: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        count = f'{len(self.where)} × ' if len(self.where) > 1 else ''
        lines = [f'  {MARKS[self.level]} {count}{self.what}']
        lines += [f'      {place}' for place in self.where[:3]]
        if len(self.where) > 3:
            lines.append(f'      … and {len(self.where) - 3} more')
        return '\n'.join([*lines, f'    → {self.fix}'])


@dataclass
class Findings:
    """What a look at one split has found.

    Args:
        split: 'train', 'val' or 'test'.
        place: Where it lies.
        classes: Names, in the order of labels.
        total: Pictures in it.
        seen: Pictures looked at.
        amounts: Pixels or boxes of each label.
        pictures: Pictures with each label.
        unit: 'pixels' or 'boxes'.
        digests: Of the files looked at, to find a picture in two splits.
    """

    split: str
    place: str
    classes: Sequence[str]
    total: int = 0
    seen: int = 0
    amounts: Counter = field(default_factory=Counter)
    pictures: Counter = field(default_factory=Counter)
    unit: str = 'pixels'
    digests: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add(self, what: str, fix: str, level: str = 'error',
            where: Iterable[str] | None = None) -> None:
        """Keep a :class:`Problem`; with ``where``, only if it is somewhere."""
        places = [] if where is None else sorted(where)
        if where is None or places:
            self.problems.append(Problem(what, fix, level, places))

    def add_absent(self) -> None:
        """Warn of classes that are nowhere."""
        absent = [name for i, name in enumerate(self.classes) if not self.amounts[i]]
        if absent:
            self.add('classes that are in no picture: ' + ', '.join(absent),
                     'Their IoU or AP will be nan: leave them out of classes, or look at how the '
                     'annotations number them', 'warning')

    def frequencies(self) -> str:
        """A table: each class with its share, a bar, and the pictures it is in."""
        everything = sum(self.amounts.values()) or 1
        width = max([len(name) for name in self.classes] + [5])
        most = max(self.amounts.values(), default=1) or 1
        lines = [f'    {"class":<{width}}  {self.unit:>10}   share  pictures']
        for label, name in enumerate(self.classes):
            amount = self.amounts[label]
            lines.append(f'    {name:<{width}}  {amount:>10}  {amount / everything:>6.1%}  '
                         f'{self.pictures[label]:>8}  {"█" * round(20 * amount / most)}')
        return '\n'.join(lines)


def picked(total: int, sample: int | None) -> list[int]:
    """Indices of ``sample`` among ``total``, evenly spread; all where ``sample`` is None."""
    if sample is None or sample >= total:
        return list(range(total))
    return [i * total // sample for i in range(sample)]


def each(function: Callable[[Any], Any], items: Sequence[Any], what: str,
         show: bool) -> Iterator[Any]:
    """``function`` of every item, by threads (decoding pictures frees the interpreter)."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(function, items)
        yield from track(done, what, total=len(items)) if show else done


def open_picture(path: str) -> tuple[Image.Image, bytes]:
    """A picture decoded to its end, turned as its EXIF data say, and the file's bytes.

    Raises:
        OSError: It is not there or cannot be read to its end.
    """
    data = Path(path).read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return ImageOps.exif_transpose(image), data


def reason(error: Exception) -> str:
    """Why a picture cannot be read, in a few words."""
    if isinstance(error, FileNotFoundError):
        return 'not there'
    if isinstance(error, Image.UnidentifiedImageError):
        return 'no picture'
    return str(error) or type(error).__name__
