"""Inspects the images and COCO annotations of an mmdetection dataset."""
from __future__ import annotations

import functools
import json
import math
import os
from collections import Counter
from typing import Any, NamedTuple

from mmengine.config import Config

from ..utils import describe, suggest
from .completion import dataset_registry, find_transforms, metrics_of_split
from .findings import (
    CHECK_COMMAND,
    Findings,
    failure_reason,
    map_in_threads,
    read_image_facts,
    sample_indices,
)
from .loading import ImageLoader, image_loader

QUICK_CHECK_BYTES = 64 * 2**20
"""The quick check skips larger annotation files, since reading them takes seconds."""


class Box(NamedTuple):
    """A box of four finite numbers, with a description, and the size of its image."""

    description: str
    x: float
    y: float
    w: float
    h: float
    image_width: float
    image_height: float


class ImageFile(NamedTuple):
    """What was read from an image: why it failed, or a size that differs, a hash and the bands."""

    path: str
    error: str = ''
    size_difference: str = ''
    digest: str = ''
    bands: int = 3


def inspect_dataset(config: dict, findings: Findings, sample: int | None, cfg: Config) -> None:
    """Inspect one dataset's images and annotations, and add the results to ``findings``."""
    findings.unit = 'boxes'
    dataset_class = dataset_registry('mmdet').get(config['type'])
    if not any(c.__name__ == 'CocoDataset' for c in dataset_class.__mro__):
        try:
            findings.total = len(dataset_registry('mmdet').build(dict(
                config, pipeline=[], serialize_data=False, _scope_='mmdet')))
        except Exception as error:  # a dataset can raise anything
            findings.add(f'{config["type"]} cannot load its data: {describe(error)}',
                         'Check type, ann_file and data_prefix of the dataset')
            return
        findings.add(f'{config["type"]} is not checked: only datasets in COCO format are',
                     'Nothing to do', 'note')
        return
    root = config.get('data_root') or ''
    path = os.path.join(root, config['ann_file'])
    if sample is not None and os.path.getsize(path) > QUICK_CHECK_BYTES:
        findings.add(f'{path} is large and was skipped by this quick check',
                     f'{CHECK_COMMAND} CONFIG reads all of it', 'note')
        return
    content = _load_annotations(path, findings)
    if content is None:
        return
    findings.total = len(content['images'])
    _report_ids(content, path, findings, cfg)
    _report_boxes(content, config, findings)
    _report_small_images(content, config, findings)
    folder = os.path.join(root, (config.get('data_prefix') or {}).get('img', ''))
    images = [content['images'][i] for i in sample_indices(findings.total, sample)]
    read = functools.partial(_read_image, load=image_loader(config.get('pipeline'), 'mmdet'))
    files = list(map_in_threads(
        read, [(os.path.join(folder, str(i.get('file_name', ''))), i.get('width'),
                i.get('height')) for i in images],
        f'Checking {findings.split}', show_progress=sample is None))
    findings.checked = len(files)
    findings.digests = {file.path: file.digest for file in files if file.digest}
    findings.add('image missing or unreadable',
                 f'Images are expected in {folder or "."}, under the file_name in the annotation '
                 'file: add them, or set data_prefix.img',
                 where=[f'{file.path} ({file.error})' for file in files if file.error])
    findings.add('image whose size differs from the annotation file',
                 'Write the real width and height. If they are swapped, the image has an EXIF '
                 'rotation: save the image rotated, or rotate its boxes',
                 where=[f'{file.path}: {file.size_difference}' for file in files
                        if file.size_difference])
    findings.add_wrong_bands({file.path: file.bands for file in files if not file.error},
                             cfg.get('model', {}).get('backbone', {}).get('in_chans', 3))


def _read_image(job: tuple[str, Any, Any], load: ImageLoader | None) -> ImageFile:
    path, width, height = job
    try:
        size, bands, digest = read_image_facts(path, load)
    except Exception as error:  # decoders raise errors of any type
        return ImageFile(path, failure_reason(error))
    difference = ''
    if (width, height) != size:
        difference = '{}×{}, annotated as {}×{}'.format(*size, width, height)
    return ImageFile(path, '', difference, digest, bands)


def _load_annotations(path: str, findings: Findings) -> dict[str, list] | None:
    """Read an annotation file; None, with problems in ``findings``, if mmdet cannot use it."""
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except (ValueError, OSError) as error:
        findings.add(f'{path} is not valid JSON: {error}', 'Export it again in COCO format')
        return None
    keys = ('images', 'annotations', 'categories')
    missing = [key for key in keys if not isinstance(content, dict)
               or not isinstance(content.get(key), list)]
    if missing:
        findings.add(f'{path} has no list {", ".join(map(repr, missing))}',
                     'COCO format is a dict with the lists images, annotations and categories')
        return None
    for key, required in (('images', ('id', 'file_name', 'width', 'height')),
                          ('annotations', ('id', 'image_id', 'category_id', 'bbox', 'area')),
                          ('categories', ('id', 'name'))):
        for name in required:
            incomplete = [str(one.get('id', i) if isinstance(one, dict) else i)
                          for i, one in enumerate(content[key])
                          if not isinstance(one, dict) or name not in one]
            findings.add(f'{key} without {name!r}, which mmdet requires',
                         'Add it; width × height of the box is enough' if name == 'area' else
                         'Add it', where=[f'id {i}' for i in incomplete])
    return None if findings.problems else content


def _report_ids(content: dict[str, list], path: str, findings: Findings, cfg: Config) -> None:
    """Report ids and names that do not match."""
    names = {category['name']: category['id'] for category in content['categories']}
    unknown = [name for name in findings.classes if name not in names]
    if unknown:
        hints = ', '.join(f'{name!r}' + (f' ({hint.strip()})' if (hint := suggest(name, names))
                                         else '') for name in unknown[:8])
        known = ', '.join(map(repr, list(names)[:12])) + (', …' if len(names) > 12 else '')
        findings.add(f'classes that are not categories of {path}: {hints}',
                     f'Spell classes like the categories: {known}')
    unused = [name for name in names if name not in findings.classes]
    if unused:
        findings.add('categories that are not in classes, whose boxes are ignored: ' +
                     ', '.join(unused[:12]) + (', …' if len(unused) > 12 else ''),
                     'Add them to classes if the model should learn them', 'note')
    images = Counter(image['id'] for image in content['images'])
    for key, ids in (('images', images),
                     ('annotations', Counter(a['id'] for a in content['annotations'])),
                     ('categories', Counter(c['id'] for c in content['categories']))):
        findings.add(f'{key} with the same id', 'Give each a unique id',
                     where=[f'id {i}, {n} times' for i, n in ids.items() if n > 1])
    findings.add('annotation of an image that does not exist (image_id)',
                 'Add the image to images, or remove the annotation',
                 'warning', where=[f'id {a["id"]}: image_id {a["image_id"]}' for a in
                                   content['annotations'] if a['image_id'] not in images])
    category_ids = set(names.values())
    findings.add('annotation of a category that does not exist (category_id)',
                 "Add it to categories, or correct the id (COCO's start at 1)", 'warning',
                 where=[f'id {a["id"]}: category_id {a["category_id"]}'
                        for a in content['annotations'] if a['category_id'] not in category_ids])
    if findings.split == 'train':
        return
    for metric in metrics_of_split(cfg, findings.split):
        other = metric.get('ann_file')
        if other and os.path.realpath(other) != os.path.realpath(path):
            findings.add(f'the evaluator uses another annotation file than the dataset: {other}',
                         f'Set {findings.split}_evaluator.ann_file to {path}, or remove it; it is '
                         'then taken from the dataset', 'warning')


def _report_boxes(content: dict[str, list], config: dict, findings: Findings) -> None:
    """Report empty, malformed and outside boxes and masks, and count boxes per class."""
    images = {image['id']: image for image in content['images']}
    labels = {category['id']: findings.classes.index(category['name'])
              for category in content['categories'] if category['name'] in findings.classes}
    malformed, boxes = [], []
    labels_in_image: dict[Any, set[int]] = {}
    for annotation in content['annotations']:
        image, box = images.get(annotation['image_id']), annotation['bbox']
        if image is None:
            continue
        description = f'id {annotation["id"]} in {image["file_name"]}: {box}'
        if not (isinstance(box, list) and len(box) == 4 and all(
                isinstance(v, (int, float)) and math.isfinite(v) for v in box)):
            malformed.append(description)
            continue
        x, y, w, h = box
        boxes.append(Box(description, x, y, w, h, image['width'], image['height']))
        label = labels.get(annotation['category_id'])
        if label is not None and not annotation.get('iscrowd'):
            findings.label_counts[label] += 1
            labels_in_image.setdefault(annotation['image_id'], set()).add(label)
    for found in labels_in_image.values():
        findings.image_counts.update(found)
    findings.add('box that is not four numbers [x, y, width, height]', 'Correct it',
                 where=malformed)
    findings.add('box with a width or height below 1, which mmdet ignores',
                 'Remove or correct it', 'warning',
                 where=[b.description for b in boxes if b.w < 1 or b.h < 1])
    outside = [b for b in boxes if b.x + b.w > b.image_width + 1
               or b.y + b.h > b.image_height + 1 or min(b.x, b.y) < -1]
    corners = [b for b in outside
               if b.x < b.w <= b.image_width + 1 and b.y < b.h <= b.image_height + 1]
    if len(boxes) >= 4 and len(corners) > len(boxes) / 4:
        findings.add('box outside its image that looks like [left, top, right, bottom]',
                     'COCO boxes are [x, y, width, height]: subtract the first two numbers from '
                     'the last two', where=[b.description for b in corners])
    else:
        findings.add('box outside its image', 'Clip it to the image; the rest is ignored',
                     'warning', where=[b.description for b in outside])
    findings.add('annotation with an area of 0, which mmdet ignores',
                 'Write the area of the mask, or width × height', 'warning',
                 where=[f'id {a["id"]}' for a in content['annotations']
                        if not isinstance(a['area'], (int, float)) or a['area'] <= 0])
    if any(transform.get('with_mask')
           for transform in find_transforms(config.get('pipeline'), 'LoadAnnotations')):
        findings.add('annotation without a mask (segmentation), which this model requires',
                     'Add polygons or run-length encodings; to train with boxes alone, use a '
                     'model without a mask head',
                     where=[f'id {a["id"]}' for a in content['annotations']
                            if not a.get('segmentation')])
        findings.add('polygon of fewer than three points, whose object is ignored',
                     'Remove or correct it', 'warning',
                     where=[f'id {a["id"]}' for a in content['annotations']
                            if isinstance(a.get('segmentation'), list) and a['segmentation'] and
                            all(len(p) < 6 or len(p) % 2 for p in a['segmentation']
                                if isinstance(p, list))])
    if not labels_in_image:
        findings.add('no image has a box of these classes',
                     'Check classes, and the category_id of the annotations')
        return
    findings.add_absent_classes()
    findings.add('image without a box of these classes', 'Nothing, if this is intended; training '
                 'skips these images if filter_cfg.filter_empty_gt is True', 'note',
                 where=[str(image['file_name']) for i, image in images.items()
                        if i not in labels_in_image])


def _report_small_images(content: dict[str, list], config: dict, findings: Findings) -> None:
    """Report images that ``filter_cfg`` removes from training because of their size."""
    min_size = (config.get('filter_cfg') or {}).get('min_size', 0)
    small = [str(image['file_name']) for image in content['images']
             if min(image['width'], image['height']) < min_size]
    if not config.get('test_mode'):
        findings.add(f'image with a side below {min_size}, which training skips',
                     'Lower train_dataloader.dataset.filter_cfg.min_size',
                     'error' if len(small) == len(content['images']) else 'note', where=small)
