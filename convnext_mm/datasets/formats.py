"""Converts annotations of other formats to COCO's: Pascal VOC, YOLO and LabelMe.

Formats are recognised by their files. Roboflow exports are of one of them, with a folder per split.
"""
from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import yaml
from PIL import ExifTags, Image

from ..errors import UserError
from ..inputs import IMAGE_SUFFIXES
from ..utils import atomic_path, describe, writable_folder

SPLITS = dict(train='train', training='train', val='val', valid='val', validation='val',
              test='test', trainval='train')
"""Names of folders and lists, and the split that they are."""
MAX_LOOKED_AT = 50


class Item(NamedTuple):
    """An object of an image.

    Args:
        name: Its class.
        box: [x, y, width, height] in pixels.
        polygons: Lists x1, y1, x2, y2, … in pixels; empty: a box only.
        crowd: Whether it is neither learned nor counted, as VOC's difficult objects.
    """

    name: str
    box: list[float]
    polygons: list[list[float]]
    crowd: bool = False


Labelled = Iterable[tuple[Path, list[Item]]]
"""Images with their objects."""


class Converted(NamedTuple):
    """What a conversion has written.

    Args:
        kind: The format that it was.
        files: Split → annotation file.
        images: Folder of all images; the annotation files name them relative to it.
        classes: The classes.
        counts: Split → (images, objects, objects with polygons).
        notes: What was left out, or taken from elsewhere.
    """

    kind: str
    files: dict[str, Path]
    images: Path
    classes: list[str]
    counts: dict[str, tuple[int, int, int]]
    notes: list[str]


@contextmanager
def _reading(file: Path, what: str) -> Iterator[None]:
    """Name the file in an error that its content causes.

    Raises:
        UserError: The block has raised an error of any of the libraries that read files.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ElementTree.ParseError,
            yaml.YAMLError) as error:
        raise UserError(f'{file} cannot be read as {what}: {describe(error)}') from error


def recognise(path: str | Path) -> str | None:
    """The format of a file or folder: 'YOLO', 'Pascal VOC', 'LabelMe', 'COCO' or None."""
    path = Path(path)
    if path.is_file():
        return _format_of_file(path)
    if not path.is_dir():
        return None
    if _yolo_settings(path):
        return 'YOLO'
    for i, file in enumerate(_walk(path, ('.json', '.xml', '.txt'))):
        found = _format_of_file(file)
        if found:
            return found
        if i == MAX_LOOKED_AT:
            break
    return None


def _format_of_file(path: Path) -> str | None:
    suffix = path.suffix.lower()
    try:
        if suffix in ('.yaml', '.yml'):
            content = yaml.safe_load(path.read_text(encoding='utf-8'))
            return 'YOLO' if isinstance(content, dict) and 'names' in content else None
        with open(path, encoding='utf-8', errors='replace') as file:
            start = file.read(4096)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if suffix == '.xml':
        return 'Pascal VOC' if '<annotation' in start else None
    if suffix == '.json':
        if re.search(r'"(shapes|flags|imageData)"\s*:', start):
            return 'LabelMe'
        return 'COCO' if re.search(r'"(images|annotations|categories)"\s*:\s*\[', start) else None
    rows = [line.split() for line in start.splitlines()[:-1] or start.splitlines()]
    return 'YOLO' if suffix == '.txt' and rows and all(_is_yolo_row(row) for row in rows) else None


def _is_yolo_row(row: list[str]) -> bool:
    try:
        values = [float(value) for value in row[1:]]
    except ValueError:
        return False
    return len(row) >= 5 and row[0].isdigit() and all(0 <= value <= 1.001 for value in values)


def convert(source: str, out: str) -> Converted:
    """Write COCO annotation files, one per split, for a folder or a data.yaml.

    Args:
        source: A folder of annotations and images, or YOLO's data.yaml.
        out: Folder of the new files, train.json and so on; files of these names are replaced.

    Raises:
        UserError: The format is unknown, or annotations cannot be read.
    """
    path = Path(source)
    kind = recognise(path)
    readers: dict[str, Callable[[Path, list[str]], tuple[dict[str, Labelled], list[str]]]] = {
        'YOLO': _read_yolo, 'Pascal VOC': _read_voc, 'LabelMe': _read_labelme}
    if kind == 'COCO':
        raise UserError(f'{source} is in COCO format already: set ann_file to its .json files and '
                        'data_prefix=dict(img=...) to the folders of the images')
    if kind is None:
        raise UserError(f'{source} holds no annotations of a known format: YOLO (data.yaml, or '
                        '.txt with "class x y width height"), Pascal VOC (.xml) or LabelMe (.json '
                        'with "shapes")')
    folder = path if path.is_dir() else path.parent
    notes: list[str] = []
    splits, names = readers[kind](path, notes)
    contents = {split: list(labelled) for split, labelled in splits.items()}
    known = names or sorted({item.name for content in contents.values() for _, items in content
                             for item in items})
    common = Path(os.path.commonpath([folder.absolute(), *(
        image.absolute().parent for content in contents.values() for image, _ in content)]))
    converted = {split: _to_coco(content, known, common) for split, content in contents.items()}
    if not any(coco['annotations'] for coco in converted.values()):
        raise UserError(f'{source} ({kind}) has no objects' + ''.join(
            f'\n  {note}' for note in notes[:5]))
    target = writable_folder(out)
    files, counts = {}, {}
    for split, coco in converted.items():
        files[split] = target / f'{split}.json'
        with atomic_path(files[split]) as part:
            part.write_text(json.dumps(coco), encoding='utf-8')
        counts[split] = (len(coco['images']), len(coco['annotations']),
                         sum(bool(one['segmentation']) for one in coco['annotations']))
    return Converted(kind, files, common, known, counts, notes)


def _to_coco(content: Sequence[tuple[Path, list[Item]]], classes: list[str], root: Path) -> dict:
    """Images and their objects as COCO has them."""
    coco: dict[str, list] = dict(images=[], annotations=[], categories=[
        dict(id=i, name=name) for i, name in enumerate(classes, 1)])
    for image, (path, items) in enumerate(content, 1):
        width, height = image_size(path)
        coco['images'].append(dict(id=image, width=width, height=height, file_name=os.path.relpath(
            path.absolute(), root)))
        for item in items:
            x, y, w, h = item.box
            left, top = max(0.0, x), max(0.0, y)
            box = [left, top, min(width, x + w) - left, min(height, y + h) - top]
            coco['annotations'].append(dict(
                id=len(coco['annotations']) + 1, image_id=image, iscrowd=int(item.crowd),
                category_id=classes.index(item.name) + 1, bbox=[round(v, 3) for v in box],
                area=round(_area(item.polygons) or box[2] * box[3], 3),
                segmentation=[[round(v, 3) for v in polygon] for polygon in item.polygons]))
    return coco


def _area(polygons: list[list[float]]) -> float:
    """The area of polygons, by the shoelace formula."""
    total = 0.0
    for polygon in polygons:
        x, y = np.asarray(polygon[::2]), np.asarray(polygon[1::2])
        total += abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
    return total


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image, turned as its EXIF says.

    Raises:
        UserError: It cannot be read.
    """
    with _reading(path, 'an image'), Image.open(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
        return image.size[::-1] if turned else image.size


def _walk(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """The files below a folder with these suffixes, in order."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(root, name) for name in sorted(names)
                    if name.lower().endswith(tuple(suffixes)))


def images_below(folder: str) -> list[str]:
    """The images below a folder, relative to it."""
    return [os.path.relpath(path, folder) for path in _walk(Path(folder), IMAGE_SUFFIXES)]


def _split_of(path: Path, root: Path) -> str:
    """The split that a file's folder names; 'train' without one."""
    parts = path.relative_to(root).parts[:-1] if path.is_relative_to(root) else ()
    return next((SPLITS[part.lower()] for part in parts if part.lower() in SPLITS), 'train')


def _images_by_stem(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in _walk(folder, IMAGE_SUFFIXES):
        found.setdefault(path.stem, []).append(path)
    return found


def _nearest(candidates: Sequence[Path], to: Path) -> Path | None:
    """Of images of one name, the one that shares most of the path of its annotation."""
    def shared(path: Path) -> int:
        return sum(a == b for a, b in zip(path.parts, to.parts, strict=False))
    return max(candidates, key=shared, default=None)


# ---- Pascal VOC


def _read_voc(path: Path, notes: list[str]) -> tuple[dict[str, Labelled], list[str]]:
    folder = path if path.is_dir() else path.parent
    images = _images_by_stem(folder) or _images_by_stem(folder.parent)
    listed: dict[str, str] = {}
    for file in _walk(folder, ('.txt',)):
        if file.parent.name == 'Main' and file.stem in ('train', 'val', 'test'):
            with _reading(file, 'a list of images'):
                for line in file.read_text(encoding='utf-8').split():
                    listed.setdefault(line, SPLITS[file.stem])
    splits: dict[str, list] = {}
    for file in _walk(folder, ('.xml',)):
        annotation = _parse_voc(file)
        if annotation is None:
            continue
        name, items = annotation
        candidates = images.get(Path(name).stem) or images.get(file.stem) or []
        image = _nearest(candidates, file)
        if image is None:
            notes.append(f'{file}: its image {name or file.stem} is not there')
            continue
        split = listed.get(file.stem, 'train') if listed else _split_of(file, folder)
        splits.setdefault(split, []).append((image, items))
    return dict(splits), []


def _parse_voc(file: Path) -> tuple[str, list[Item]] | None:
    """The image and the objects of an XML file; None: it is of something else.

    Raises:
        UserError: It is damaged.
    """
    text = file.read_bytes()  # which say their encoding
    if b'<!ENTITY' in text:  # could expand to any size
        raise UserError(f'{file} defines XML entities, which annotations have no use for: remove '
                        'them')
    with _reading(file, 'a Pascal VOC annotation'):
        root = ElementTree.fromstring(text)
        if root.tag != 'annotation':
            return None
        items = []
        for one in root.iter('object'):
            box = one.find('bndbox')
            if box is None:
                continue
            left, top, right, bottom = (float(box.findtext(key) or '') for key in (
                'xmin', 'ymin', 'xmax', 'ymax'))
            # Pixels are counted from 1, and the last one belongs to the object.
            left, top = max(0.0, left - 1), max(0.0, top - 1)
            values = {node.tag: float(node.text or '') for node in one.find('polygon') or ()}
            polygon = [values[f'{axis}{i}'] for i in range(1, len(values) // 2 + 1)
                       for axis in 'xy']
            items.append(Item((one.findtext('name') or '').strip(),
                              [left, top, right - left, bottom - top],
                              [polygon] if len(polygon) >= 6 else [],
                              (one.findtext('difficult') or '0').strip() == '1'))
    return (root.findtext('filename') or '').strip(), items


# ---- YOLO


def _yolo_settings(folder: Path) -> Path | None:
    """The data.yaml of a folder: the file of that name, or another with ``names``."""
    files = sorted((*folder.glob('*.yaml'), *folder.glob('*.yml')),
                   key=lambda file: (file.stem != 'data', file))
    return next((file for file in files if file.is_file() and (
        file.stem == 'data' or _format_of_file(file) == 'YOLO')), None)


def _read_yolo(path: Path, notes: list[str]) -> tuple[dict[str, Labelled], list[str]]:
    folder = path if path.is_dir() else path.parent
    file = path if path.is_file() and path.suffix != '.txt' else _yolo_settings(folder)
    names: dict[int, str] = {}
    splits: dict[str, list[Path]] = {}
    if file is not None:
        with _reading(file, "YOLO's data.yaml"):
            settings = yaml.safe_load(file.read_text(encoding='utf-8'))
            found = settings['names']
            names = {int(i): str(name) for i, name in sorted(
                found.items() if isinstance(found, dict) else enumerate(found))}
            for key in ('train', 'val', 'test'):
                places = settings.get(key) or []
                for place in [places] if isinstance(places, str) else places:
                    splits.setdefault(key, []).extend(_yolo_images(
                        place, file, settings.get('path'), notes))
            if settings.get('train') and not splits['train']:
                raise UserError(f'{file} names no images to train on:' + ''.join(
                    f'\n  {note}' for note in notes))
    else:
        text = next((one for one in (folder / 'classes.txt', folder / 'obj.names')
                     if one.is_file()), None)
        if text is not None:
            with _reading(text, 'a list of names'):
                names = dict(enumerate(line.strip() for line in text.read_text(
                    encoding='utf-8').splitlines() if line.strip()))
        for image in _walk(folder, IMAGE_SUFFIXES):
            splits.setdefault(_split_of(image, folder), []).append(image)
    if not names:
        raise UserError(f'{path} has labels in YOLO format, but no names: add data.yaml with '
                        '"names: [...]", or classes.txt with a name per line')
    for split, images in splits.items():
        missing = [image for image in images if not _yolo_labels(image).is_file()]
        if missing:
            notes.append(f'{len(missing)} of {len(images)} images of {split} have no label file, '
                         f'so they have no objects: {_yolo_labels(missing[0])}')
    return {split: ((image, _yolo_items(image, names)) for image in images)
            for split, images in splits.items() if images}, list(dict.fromkeys(names.values()))


def _yolo_images(place: str, file: Path, base: str | None, notes: list[str]) -> list[Path]:
    """The images of one entry of a data.yaml, which is a folder, a list or a file name.

    Roboflow writes ``../train/images`` for the folder beside data.yaml. Paths of another machine
    are looked for by their ends, since the folders may have moved as a whole.
    """
    folder = file.parent
    roots = [folder / base, Path(base)] if base else []
    paths = [root / relative for root in (*roots, folder, folder.parent)
             for relative in (place, place.removeprefix('../'), place.removeprefix('./'))]
    parts = [part for part in re.split(r'[/\\]+', place) if part not in ('', '.', '..')]
    ends = [folder.joinpath(*parts[i:]) for i in range(len(parts)) if parts[i:] != ['images']]
    for path in (*paths, *ends):
        if path.exists() and path not in paths:
            notes.append(f'{place} of {file.name} is not there: {path} is taken instead')
        if path.is_dir():
            return list(_walk(path, IMAGE_SUFFIXES))
        if path.is_file():
            return [path.parent / line.strip() if not os.path.isabs(line.strip()) else Path(
                line.strip()) for line in path.read_text(encoding='utf-8').splitlines()
                if line.strip()]
    notes.append(f'{place} of {file.name} is not there')
    return []


def _yolo_labels(image: Path) -> Path:
    """The label file of an image: in ``labels`` instead of ``images``, or beside the image."""
    parts = list(image.parts)
    for i in reversed(range(len(parts) - 1)):
        if parts[i] == 'images':
            parts[i] = 'labels'
            break
    file, beside = Path(*parts).with_suffix('.txt'), image.with_suffix('.txt')
    return beside if beside.is_file() and not file.is_file() else file


def _yolo_items(image: Path, names: dict[int, str]) -> list[Item]:
    """The objects of an image's label file; none without one.

    Raises:
        UserError: A line has no known form.
    """
    file = _yolo_labels(image)
    if not file.is_file():
        return []
    width, height = image_size(image)
    with _reading(file, 'labels of YOLO'):
        lines = file.read_text(encoding='utf-8').splitlines()
    items = []
    for number, line in enumerate(lines, 1):
        row = line.split()
        if not row:
            continue
        try:
            name, values = names[int(float(row[0]))], [float(value) for value in row[1:]]
            if len(values) < 4 or (len(values) > 5 and len(values) % 2):
                raise ValueError
        except (ValueError, LookupError) as error:
            shown = line if len(line) <= 60 else f'{line[:57]}…'
            raise UserError(f'{file}, line {number}: {shown!r} is no label of YOLO with one of '
                            f'the {len(names)} classes from {min(names)} to {max(names)}: "class x '
                            'y width height", or "class x1 y1 x2 y2 x3 y3 …", in fractions of the '
                            'image') from error
        if len(values) < 6:
            x, y, w, h = values[:4]
            items.append(Item(name, [(x - w / 2) * width, (y - h / 2) * height, w * width,
                                     h * height], []))
        else:
            polygon = [value * (height if i % 2 else width) for i, value in enumerate(values)]
            items.append(Item(name, _extent([polygon]), [polygon]))
    return items


def _extent(polygons: list[list[float]]) -> list[float]:
    """[x, y, width, height] of polygons."""
    xs = [x for polygon in polygons for x in polygon[::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


# ---- LabelMe


LABELME_IGNORED = '__ignore__'
"""The label that LabelMe's own converters leave out."""


def _read_labelme(path: Path, notes: list[str]) -> tuple[dict[str, Labelled], list[str]]:
    folder = path if path.is_dir() else path.parent
    splits: dict[str, list] = {}
    for file in _walk(folder, ('.json',)):
        if _format_of_file(file) != 'LabelMe':
            continue
        with _reading(file, 'a LabelMe annotation'):
            content = json.loads(file.read_text(encoding='utf-8'))
            items = _labelme_items(content, file, notes)
            image = _labelme_image(content, file)
        if image is None:
            notes.append(f'{file}: its image {content.get("imagePath")} is not there')
            continue
        splits.setdefault(_split_of(file, folder), []).append((image, items))
    return dict(splits), []


def _labelme_items(content: dict, file: Path, notes: list[str]) -> list[Item]:
    """Objects; shapes of one group and label are one object."""
    groups: dict[Any, list[list[float]]] = {}
    boxes = set()
    for i, shape in enumerate(content['shapes']):
        points, kind = shape['points'], shape.get('shape_type') or 'polygon'
        if shape['label'] == LABELME_IGNORED:
            notes.append(f'{file}: an object of {LABELME_IGNORED}, which is no class, is left out')
            continue
        if kind == 'rectangle' and len(points) >= 2:
            xs, ys = [p[0] for p in points], [p[1] for p in points]
            corners = [(min(xs), min(ys)), (max(xs), min(ys)), (max(xs), max(ys)),
                       (min(xs), max(ys))]
        elif kind == 'circle' and len(points) == 2:
            (x, y), (px, py) = points
            radius = math.hypot(px - x, py - y)
            corners = [(x + radius * math.cos(a), y + radius * math.sin(a))
                       for a in np.linspace(0, 2 * math.pi, 32, endpoint=False).tolist()]
        elif kind == 'polygon' and len(points) >= 3:
            corners = [tuple(point) for point in points]
        else:
            notes.append(f'{file}: {kind} of {len(points)} points ({shape["label"]}) has no area')
            continue
        group = shape.get('group_id')
        key = (str(shape['label']), i if group is None else f'group {group}')
        groups.setdefault(key, []).append([float(v) for corner in corners for v in corner])
        if kind == 'rectangle':
            boxes.add(key)
    return [Item(key[0], _extent(polygons), [] if key in boxes else polygons)
            for key, polygons in groups.items()]


def _labelme_image(content: dict, file: Path) -> Path | None:
    """The image of a LabelMe file; one that is only inside the file is written beside it."""
    name = str(content.get('imagePath') or '').replace('\\', '/')
    for image in (file.parent / name, file.parent / Path(name).name):
        if name and image.is_file():
            return image
    for suffix in IMAGE_SUFFIXES:
        if file.with_suffix(suffix).is_file():
            return file.with_suffix(suffix)
    if not content.get('imageData'):
        return None
    image = file.with_suffix(Path(name).suffix or '.png')
    image.write_bytes(base64.b64decode(content['imageData']))
    return image


# ---- masks in colors


def convert_colors(masks: str, out: str, palette: Sequence[Sequence[int]],
                   ignore_others: bool = False) -> tuple[int, float, list[tuple[int, ...]]]:
    """Write masks of class indices for masks in the colors of a palette.

    Args:
        masks: Folder of images whose colors are classes.
        out: Folder of the new masks, PNG files of the same names.
        palette: A color [red, green, blue] for each class.
        ignore_others: Whether other colors become 255, which is ignored.

    Returns:
        The number of masks, the share of pixels of other colors, and these colors.

    Raises:
        UserError: There are no masks, or a color is not in the palette.
    """
    target, count, pixels, ignored = writable_folder(out), 0, 0, 0
    codes = np.array([(r << 16) + (g << 8) + b for r, g, b in palette])
    order = np.argsort(codes)
    others: set[tuple[int, ...]] = set()
    for path in _walk(Path(masks), (*IMAGE_SUFFIXES, '.gif')):
        with _reading(path, 'an image'), Image.open(path) as image:
            rgb = np.asarray(image.convert('RGB'), np.int64)
        code = (rgb[..., 0] << 16) + (rgb[..., 1] << 8) + rgb[..., 2]
        place = np.searchsorted(codes[order], code).clip(max=len(codes) - 1)
        labels = order[place]
        unknown = codes[labels] != code
        if unknown.any():
            colors = [(one >> 16, one >> 8 & 255, one & 255) for one in np.unique(
                code[unknown]).tolist()]
            if not ignore_others:
                raise UserError(
                    f'{path}: {unknown.sum()} pixels have colors that are not in palette: '
                    f'{", ".join(map(str, colors[:6]))}. If they are no class, add '
                    '--ignore-others: they become 255, which is ignored')
            others.update(colors)
            labels = np.where(unknown, 255, labels)
        file = (target / path.relative_to(masks)).with_suffix('.png')
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels.astype(np.uint8)).save(file)
        count, pixels, ignored = count + 1, pixels + code.size, ignored + int(unknown.sum())
    if not count:
        raise UserError(f'{masks} has no masks')
    return count, ignored / pixels, sorted(others)
