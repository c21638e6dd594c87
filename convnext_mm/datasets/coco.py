"""Reads annotation files in COCO format: repairs what is plain, and refuses what is not.

The data sets and metrics of this package, and the data check, read files by this module alone, so
that training, evaluation and the check see the same.
"""
from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from .findings import Problem

REPAIRED = 'Nothing: this is done whenever the file is read'
REQUIRED = (('images', ('id', 'file_name', 'width', 'height')),
            ('annotations', ('id', 'image_id', 'category_id', 'bbox')),
            ('categories', ('id', 'name')))


class Annotations(NamedTuple):
    """An annotation file in memory.

    Args:
        content: Lists ``images``, ``annotations`` and ``categories``, after all repairs.
        problems: What was repaired (notes) and what cannot be (errors).
    """

    content: dict[str, list]
    problems: list[Problem]

    @property
    def errors(self) -> list[Problem]:
        """The problems for which the file must not be used."""
        return [problem for problem in self.problems if problem.level == 'error']


def load_coco(path: str, labelled: bool = True) -> Annotations:
    """Read an annotation file that is going to be used.

    Args:
        path: See :func:`read_coco`.
        labelled: See :func:`read_coco`.

    Raises:
        UserError: The file has errors, such as coordinates that are no numbers: some of them would
            let pycocotools take all memory, or stop it without a message.
    """
    annotations = read_coco(path, labelled)
    if annotations.errors:
        raise UserError('\n'.join([f'{path} cannot be used:', *map(str, annotations.errors)]))
    return annotations


def read_coco(path: str, labelled: bool = True) -> Annotations:
    """Read and repair an annotation file.

    Args:
        path: A JSON file.
        labelled: Whether the file must have annotations; the images of a test may have none.
    """
    try:
        content = json.loads(Path(path).read_text(encoding='utf-8'))
    except (ValueError, OSError) as error:
        return Annotations({}, [Problem(f'{path} is not valid JSON: {error}',
                                        'Export it again in COCO format')])
    if not labelled and isinstance(content, dict):
        content.setdefault('annotations', [])
        content.setdefault('categories', [])
    missing = [key for key, _ in REQUIRED if not isinstance(content, dict)
               or not isinstance(content.get(key), list)]
    if missing:
        return Annotations({}, [Problem(
            f'{path} has no list {", ".join(map(repr, missing))}',
            'COCO format is a dict with the lists images, annotations and categories')])
    reader = _Reader(content)
    for key, required in REQUIRED:
        for name in required:
            reader.report(
                f'{key} without {name!r}, which mmdet requires', 'Add it',
                [f'id {one.get("id", i) if isinstance(one, dict) else i}'
                 for i, one in enumerate(content[key])
                 if not isinstance(one, dict) or name not in one], 'error')
    if not reader.problems:
        reader.report('images whose file_name is no text', 'Write the path of the file',
                      [f'id {one["id"]}' for one in content['images']
                       if not isinstance(one['file_name'], str) or not one['file_name']], 'error')
    if not reader.problems:
        reader.repair()
    return Annotations(content, reader.problems)


class _Reader:
    """Repairs the content of a file in place, and collects what it did and what it could not."""

    def __init__(self, content: dict[str, list]) -> None:
        self.content = content
        self.problems: list[Problem] = []

    def report(self, message: str, fix: str, where: Iterable[str], level: str = 'note') -> None:
        places = list(where)
        if places:
            self.problems.append(Problem(message, fix, level, places))

    def repair(self) -> None:
        self._read_strings()
        self._check_ids()
        if any(problem.level == 'error' for problem in self.problems):
            return
        self._merge_categories()
        self._read_boxes()
        self._read_masks()
        annotations = self.content['annotations']
        if any(one['id'] == 0 for one in annotations):
            for i, one in enumerate(annotations, 1):
                one['id'] = i
            self.report('annotations are numbered from 1 instead of 0: pycocotools counts a hit of '
                        'annotation 0 as a miss', REPAIRED, ['id 0'])

    def _read_strings(self) -> None:
        """Numbers that are written as strings."""
        read, unreadable = [], []
        for key, names in (('images', ('id', 'width', 'height')), ('categories', ('id',)),
                           ('annotations', ('id', 'image_id', 'category_id', 'area', 'iscrowd',
                                            'ignore'))):
            for one in self.content[key]:
                for name in names:
                    if not isinstance(one.get(name), (str, list, dict)):
                        continue
                    number = _number(one[name])
                    if number is not None:
                        one[name] = number
                        read.append(f'{key}: {name}')
                    elif name not in ('id', 'image_id', 'category_id'):
                        unreadable.append(f'{key}, id {one["id"]}: {name}={one[name]!r}')
        for one in self.content['annotations']:
            box = one['bbox']
            if isinstance(box, list) and any(isinstance(value, str) for value in box):
                numbers = [_number(value) for value in box]
                if None not in numbers:
                    one['bbox'] = numbers
                    read.append('annotations: bbox')
        self.report('numbers written as strings, read as numbers: ' + ', '.join(
            f'{count} × {name}' for name, count in Counter(read).items()), REPAIRED, read[:1])
        self.report('value that is no number', 'Correct it', unreadable, 'error')
        self.report('image without a size in pixels', 'Write its real width and height',
                    [f'id {one["id"]}: {one["width"]!r} × {one["height"]!r}'
                     for one in self.content['images']
                     if not _is_number(one['width']) or not _is_number(one['height'])
                     or min(one['width'], one['height']) <= 0], 'error')

    def _check_ids(self) -> None:
        """Ids of numbers or texts, each once."""
        unusable = [f'{key}: {name}={one[name]!r}' for key, names in (
            ('images', ('id',)), ('categories', ('id', 'name')),
            ('annotations', ('id', 'image_id', 'category_id')))
            for one in self.content[key] for name in names if isinstance(one[name], (list, dict))]
        self.report('id or name that is neither a number nor a text', 'Correct it', unusable,
                    'error')
        for key, _ in REQUIRED if not unusable else ():
            self.report(f'{key} with the same id', 'Give each a unique id', [
                f'id {i}, {count} times' for i, count in Counter(
                    one['id'] for one in self.content[key]).items() if count > 1], 'error')

    def _merge_categories(self) -> None:
        """Categories of one name: those without objects are dropped."""
        used = Counter(one['category_id'] for one in self.content['annotations'])
        by_name: dict[Any, list] = {}
        for category in self.content['categories']:
            if category['id'] not in by_name.setdefault(category['name'], []):
                by_name[category['name']].append(category['id'])
        dropped, ambiguous = [], []
        for name, ids in by_name.items():
            filled = [one for one in ids if used[one]]
            if len(filled) > 1:
                ambiguous.append(f'{name!r}: ids {", ".join(map(str, filled))}')
            elif len(ids) > 1:
                dropped += [(name, one) for one in ids if one != (filled or ids)[0]]
        if dropped:
            gone = {one for _, one in dropped}
            self.content['categories'][:] = [
                one for one in self.content['categories'] if one['id'] not in gone]
        self.report('category without objects that has the name of another, dropped', REPAIRED,
                    [f'{name!r}: id {one}' for name, one in dropped])
        self.report('categories of one name', 'Give them different names, or one category_id to '
                    'the objects of all', ambiguous, 'error')

    def _read_boxes(self) -> None:
        """Boxes of four finite numbers, areas, and whether an object is a crowd."""
        malformed, without_area, without_crowd = [], [], []
        names = {one['id']: one['file_name'] for one in self.content['images']}
        for one in self.content['annotations']:
            box = one['bbox']
            if one.get('iscrowd') is None:
                one['iscrowd'] = 0
                without_crowd.append(f'id {one["id"]}')
            if not (isinstance(box, list) and len(box) == 4 and all(
                    _is_number(value) and math.isfinite(value) for value in box)):
                malformed.append(f'id {one["id"]} in {names.get(one["image_id"])}: {box}')
            elif one.get('area') is None:
                one['area'] = box[2] * box[3]
                without_area.append(f'id {one["id"]}')
        self.report('box that is not four numbers [x, y, width, height]', 'Correct it', malformed,
                    'error')
        self.report('annotation without area, which is taken from the box', REPAIRED,
                    without_area)
        self.report('annotation without iscrowd, which pycocotools requires, read as 0', REPAIRED,
                    without_crowd)

    def _read_masks(self) -> None:
        """Polygons as lists of lists x, y, x, y, …, and run-length encodings of the image's size.
        """
        sizes = {one['id']: [one['height'], one['width']] for one in self.content['images']}
        repaired: Counter[str] = Counter()
        errors: dict[str, list[str]] = {}
        for one in self.content['annotations']:
            mask = one.get('segmentation')
            if not mask:
                continue
            try:
                if isinstance(mask, str):
                    mask = _parse(mask)
                    repaired['written as text'] += 1
                if isinstance(mask, dict):
                    _check_encoding(mask, sizes.get(one['image_id']))
                else:
                    mask = _polygons(mask, repaired)
                one['segmentation'] = mask
            except ValueError as error:
                kind, _, value = str(error).partition(': ')
                errors.setdefault(kind, []).append(f'id {one["id"]}: {value}')
        for kind, count in repaired.items():
            self.report(f'masks {kind}, read as COCO writes them: {count}', REPAIRED, [''])
            self.problems[-1].where.clear()
        for kind, where in errors.items():
            self.report(kind, ENCODING_FIX if 'run-length' in kind else POLYGON_FIX, where, 'error')


POLYGON_FIX = 'Write each polygon as [x1, y1, x2, y2, …] of numbers in pixels, or remove it'
ENCODING_FIX = ("Encode the mask of (height, width) again: pycocotools.mask.encode("
                'np.asfortranarray(mask)) has "size": [height, width]')


def _polygons(mask: Any, repaired: Counter[str]) -> list[list[float]]:
    """Polygons of flat numbers, from any nesting of lists.

    Raises:
        ValueError: "what is wrong: its value".
    """
    if not isinstance(mask, list):
        raise ValueError(f'mask that is neither polygons nor a run-length encoding: {_short(mask)}')
    if all(type(part) is list and _all_numbers(part) for part in mask):
        if any(len(part) != 2 for part in mask):
            polygons = mask
        else:
            polygons = [[value for point in mask for value in point]]
            repaired['of points [x, y]'] += 1
    elif not any(isinstance(part, (list, dict)) for part in mask):
        polygons = [mask]
        repaired['of one polygon without its list'] += 1
    else:
        polygons = [[value for point in part for value in point]
                    if isinstance(part, list) and all(isinstance(point, list) and len(point) == 2
                                                      for point in part) else part
                    for part in mask]
        if polygons != mask:
            repaired['of points [x, y]'] += 1
    result = []
    for polygon in polygons:
        if not isinstance(polygon, list):
            raise ValueError(f'mask that is neither polygons nor a run-length encoding: '
                             f'{_short(mask)}')
        if not _all_numbers(polygon):
            numbers = [_number(value) for value in polygon]
            if None in numbers or not _all_numbers(numbers):
                raise ValueError(f'polygon with a coordinate that is no number: {_short(polygon)}')
            repaired['with numbers as strings'] += 1
            polygon = numbers
        if polygon:
            result.append(polygon)
    whole = [polygon for polygon in result if len(polygon) >= 6 and len(polygon) % 2 == 0]
    if whole and len(whole) < len(result):
        repaired['without their polygons of fewer than three points'] += 1
        return whole
    return result


def _check_encoding(mask: dict, size: list | None) -> None:
    """Check a run-length encoding.

    Raises:
        ValueError: "what is wrong: its value".
    """
    counts, own = mask.get('counts'), mask.get('size')
    if not isinstance(counts, (list, str)) or not isinstance(own, list) or len(own) != 2:
        raise ValueError(f'run-length encoding without size and counts: {_short(mask)}')
    if size is not None and own != size:
        if own == size[::-1]:
            raise ValueError('run-length encoding whose size is [width, height], not [height, '
                             f'width]: {own}, the image has {size}')
        raise ValueError('run-length encoding of another size than its image: '
                         f'{own}, the image has {size}')
    if isinstance(counts, list) and (not _all_numbers(counts) or sum(counts) != own[0] * own[1]):
        raise ValueError('run-length encoding whose counts do not add up to the pixels of its '
                         f'image: {_short(counts)}')


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError('mask that is neither polygons nor a run-length encoding: '
                         f'{_short(text)}') from error


def _all_numbers(values: list) -> bool:
    """Whether all are finite numbers; the sum is computed in C, which matters for millions."""
    try:
        return math.isfinite(sum(values))
    except (TypeError, OverflowError):
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number(value: Any) -> Any:
    """The number that a string writes, whole if it is; None: it writes none."""
    if not isinstance(value, str):
        return value if _is_number(value) else None
    try:
        number = float(value)
    except ValueError:
        return None
    return int(number) if number.is_integer() else number


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f'{text[:57]}…'


def read_categories(path: str) -> list[str]:
    """The names of an annotation file's categories, by their ids.

    Only that list is parsed where it can be found: the annotations may take minutes. Without the
    category that Roboflow adds: no object has it, and it is the supercategory of all others.

    Raises:
        UserError: The file has none.
    """
    with open(path, 'rb') as file:
        data = file.read()
    for match in re.finditer(rb'"categories"\s*:\s*(?=\[)', data):
        try:
            text = data[match.end():match.end() + 2**22].decode(errors='ignore')
            found = json.JSONDecoder().raw_decode(text)[0]
            named = [(one['id'], str(one['name'])) for one in found]
        except (ValueError, KeyError, TypeError):
            continue
        if named:
            roots = {one.get('supercategory') for one in found} - {'none', None}
            if len(named) > 1 and len(roots) == 1 and sum(
                    one.get('supercategory') not in roots for one in found) == 1:
                named = [(i, name) for i, name in named if name not in roots or re.search(
                    rb'"category_id"\s*:\s*"?%s\b' % re.escape(str(i)).encode(), data)]
            by_id = sorted(named, key=lambda one: (_number(one[0]) is None, _number(one[0]) or 0))
            return list(dict.fromkeys(name for _, name in by_id))
    raise UserError(f'{path} names no categories, which the classes would be taken from: COCO '
                    'format has a list "categories" of {"id": 1, "name": "car"}')
