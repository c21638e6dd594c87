"""What is wrong in pictures and annotations in COCO's format for mmdetection."""
from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from typing import Any, NamedTuple

from mmengine.config import Config

from ..utils import suggest
from .completion import evaluators, registry_of, steps_of
from .findings import WHOLE_CHECK, Findings, each, open_picture, picked, reason

QUICK_BYTES = 64 * 2**20
"""Annotation files above this size are left out of the quick check: reading them takes seconds."""


class Box(NamedTuple):
    """An annotation whose box has four numbers, and the size of its picture."""

    name: str
    x: float
    y: float
    w: float
    h: float
    width: float
    height: float


def look_at(config: dict, findings: Findings, sample: int | None, cfg: Config) -> None:
    """Look at one data set's pictures and annotations; what is found goes into ``findings``."""
    findings.unit = 'boxes'
    kind = registry_of('mmdet').get(config['type'])
    if not any(c.__name__ == 'CocoDataset' for c in kind.__mro__):
        findings.add(f'{config["type"]} is not looked into: only data in the format of COCO is',
                     'Nothing to do', 'note')
        return
    root = config.get('data_root') or ''
    path = os.path.join(root, config['ann_file'])
    if sample is not None and os.path.getsize(path) > QUICK_BYTES:
        findings.add(f'{path} is large and was not read for this quick check',
                     f'{WHOLE_CHECK} CONFIG reads all of it', 'note')
        return
    content = _read(path, findings)
    if content is None:
        return
    findings.total = len(content['images'])
    _report_ids(content, config, path, findings, cfg)
    _report_boxes(content, config, findings)
    _report_small(content, config, findings)
    folder = os.path.join(root, (config.get('data_prefix') or {}).get('img', ''))
    images = [content['images'][i] for i in picked(findings.total, sample)]
    looks = list(each(_look, [(os.path.join(folder, str(i.get('file_name', ''))), i.get('width'),
                               i.get('height')) for i in images],
                      f'Looking at {findings.split}', show=sample is None))
    findings.seen = len(looks)
    findings.digests = {path: digest for path, *_, digest in looks if digest}
    findings.add('picture missing or unreadable',
                 f'Pictures are looked for in {folder or "."}, under file_name of the annotation '
                 'file: put them there, or set data_prefix.img',
                 where=[f'{path} ({error})' for path, error, *_ in looks if error])
    findings.add('picture of another size than the annotation file says',
                 'Write the real width and height; where they are exchanged, the picture has an '
                 'EXIF rotation: save it turned, or turn its boxes',
                 where=[f'{path}: {sizes}' for path, _, sizes, _ in looks if sizes])


def _look(job: tuple[str, Any, Any]) -> tuple[str, str, str, str]:
    """(path, why it cannot be read, sizes that differ, digest) of one picture."""
    path, width, height = job
    try:
        picture, data = open_picture(path)
    except Exception as error:  # decoders raise what they like
        return path, reason(error), '', ''
    differ = (width, height) != picture.size
    sizes = '{}×{}, said to be {}×{}'.format(*picture.size, width, height) if differ else ''
    return path, '', sizes, hashlib.blake2b(data, digest_size=16).hexdigest()


def _read(path: str, findings: Findings) -> dict[str, list] | None:
    """The annotation file, where it can be used at all."""
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except (ValueError, OSError) as error:
        findings.add(f'{path} is no JSON: {error}', 'Write it again: COCO\'s format is expected')
        return None
    keys = ('images', 'annotations', 'categories')
    missing = [key for key in keys if not isinstance(content, dict)
               or not isinstance(content.get(key), list)]
    if missing:
        findings.add(f'{path} has no list {", ".join(map(repr, missing))}',
                     "COCO's format is expected: a dict of images, annotations and categories")
        return None
    for key, needed in (('images', ('id', 'file_name', 'width', 'height')),
                        ('annotations', ('id', 'image_id', 'category_id', 'bbox', 'area')),
                        ('categories', ('id', 'name'))):
        for name in needed:
            lacking = [str(one.get('id', i) if isinstance(one, dict) else i)
                       for i, one in enumerate(content[key])
                       if not isinstance(one, dict) or name not in one]
            advice = 'width × height of the box will do' if name == 'area' else 'Write it'
            findings.add(f'{key} without {name!r}, which mmdet needs', advice,
                         where=[f'id {i}' for i in lacking])
    return None if findings.problems else content


def _report_ids(content: dict[str, list], config: dict, path: str, findings: Findings,
                cfg: Config) -> None:
    """Ids and names that do not match."""
    names = {category['name']: category['id'] for category in content['categories']}
    lacking = [name for name in findings.classes if name not in names]
    if lacking:
        hints = ', '.join(f'{name!r}' + (f' ({hint.strip()})' if (hint := suggest(name, names))
                                         else '') for name in lacking[:8])
        known = ', '.join(map(repr, list(names)[:12])) + (', …' if len(names) > 12 else '')
        findings.add(f'classes that {path} has not: {hints}',
                     f'classes must be spelt as the categories there: {known}')
    others = [name for name in names if name not in findings.classes]
    if others:
        findings.add('categories that are not in classes, whose boxes are left out: ' +
                     ', '.join(others[:12]) + (', …' if len(others) > 12 else ''),
                     'Add them to classes where they are meant', 'note')
    images = Counter(image['id'] for image in content['images'])
    for key, ids in (('images', images),
                     ('annotations', Counter(a['id'] for a in content['annotations'])),
                     ('categories', Counter(c['id'] for c in content['categories']))):
        findings.add(f'{key} that share an id', 'Number them anew, each by its own',
                     where=[f'id {i}, {n} times' for i, n in ids.items() if n > 1])
    findings.add('annotation of a picture that is not there (image_id)',
                 'Add the picture to images, or remove the annotation',
                 'warning', where=[f'id {a["id"]}: image_id {a["image_id"]}' for a in
                                   content['annotations'] if a['image_id'] not in images])
    known = set(names.values())
    findings.add('annotation of a category that is not there (category_id)',
                 'Add it to categories, or correct the number (COCO\'s begin at 1)', 'warning',
                 where=[f'id {a["id"]}: category_id {a["category_id"]}'
                        for a in content['annotations'] if a['category_id'] not in known])
    if findings.split == 'train':
        return
    for metric in evaluators(cfg, findings.split):
        other = metric.get('ann_file')
        if other and os.path.realpath(other) != os.path.realpath(path):
            findings.add(f'evaluated by another file than the data set is read from: {other}',
                         f'Set {findings.split}_evaluator.ann_file to {path}, or leave it out: it '
                         'follows', 'warning')


def _report_boxes(content: dict[str, list], config: dict, findings: Findings) -> None:
    """Boxes and masks that are empty, degenerate or outside; class frequencies."""
    images = {image['id']: image for image in content['images']}
    label = {category['id']: findings.classes.index(category['name'])
             for category in content['categories'] if category['name'] in findings.classes}
    broken, boxes = [], []
    seen: dict[Any, set[int]] = {}
    for one in content['annotations']:
        image, box = images.get(one['image_id']), one['bbox']
        if image is None:
            continue
        name = f'id {one["id"]} in {image["file_name"]}: {box}'
        if not (isinstance(box, list) and len(box) == 4 and all(
                isinstance(v, (int, float)) and math.isfinite(v) for v in box)):
            broken.append(name)
            continue
        boxes.append(Box(name, *box, image['width'], image['height']))
        if one['category_id'] in label and not one.get('iscrowd'):
            findings.amounts[label[one['category_id']]] += 1
            seen.setdefault(one['image_id'], set()).add(label[one['category_id']])
    for labels in seen.values():
        findings.pictures.update(labels)
    findings.add('box that is not four numbers [x, y, width, height]', 'Write it again',
                 where=broken)
    findings.add('box without a width or height of at least 1, which mmdet leaves out',
                 'Remove it, or draw it again', 'warning',
                 where=[b.name for b in boxes if b.w < 1 or b.h < 1])
    over = [b for b in boxes if b.x + b.w > b.width + 1 or b.y + b.h > b.height + 1
            or min(b.x, b.y) < -1]
    corners = [b for b in over if b.x < b.w <= b.width + 1 and b.y < b.h <= b.height + 1]
    if len(boxes) >= 4 and len(corners) > len(boxes) / 4:
        findings.add('box that leaves its picture, and looks like [left, top, right, bottom]',
                     "COCO's boxes are [x, y, width, height]: subtract the first two from the "
                     'last two', where=[b.name for b in corners])
    else:
        findings.add('box that leaves its picture', 'Cut it at the edge; what is outside is '
                     'left out', 'warning', where=[b.name for b in over])
    findings.add('annotation with an area of 0, which mmdet leaves out',
                 'Write the area of the mask, or width × height', 'warning',
                 where=[f'id {a["id"]}' for a in content['annotations']
                        if not isinstance(a['area'], (int, float)) or a['area'] <= 0])
    if any(step.get('with_mask') for step in steps_of(config.get('pipeline'), 'LoadAnnotations')):
        findings.add('annotation without a mask (segmentation), which this model learns from',
                     'Add polygons or run lengths; for boxes alone, train a model without a '
                     'mask head', where=[f'id {a["id"]}' for a in content['annotations']
                                         if not a.get('segmentation')])
        findings.add('polygon of less than three points, whose object is ignored',
                     'Remove it, or draw it again', 'warning',
                     where=[f'id {a["id"]}' for a in content['annotations']
                            if isinstance(a.get('segmentation'), list) and a['segmentation'] and
                            all(len(p) < 6 or len(p) % 2 for p in a['segmentation']
                                if isinstance(p, list))])
    if not seen:
        findings.add('no picture has a box of these classes', 'Look at classes, and at the '
                     'category_id of the annotations')
        return
    findings.add_absent()
    findings.add('picture without a box of these classes', 'Nothing, if that is so; training '
                 'leaves them out where filter_cfg.filter_empty_gt is True', 'note',
                 where=[str(image['file_name']) for i, image in images.items() if i not in seen])


def _report_small(content: dict[str, list], config: dict, findings: Findings) -> None:
    """Pictures that filter_cfg leaves out of training for their size."""
    side = (config.get('filter_cfg') or {}).get('min_size', 0)
    small = [str(image['file_name']) for image in content['images']
             if min(image['width'], image['height']) < side]
    if not config.get('test_mode'):
        findings.add(f'picture with a side below {side}, left out of training',
                     'Set train_dataloader.dataset.filter_cfg.min_size to less',
                     'error' if len(small) == len(content['images']) else 'note', where=small)
