"""Inspects the images and annotations of an mmdetection dataset."""
from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mmengine.config import Config

from ..errors import UserError
from ..utils import describe, suggest
from .coco import read_coco
from .completion import dataset_registry, find_transforms, metrics_of_split
from .findings import (
    CHECK_COMMAND,
    Findings,
    ImageFacts,
    failure_reason,
    map_in_threads,
    read_image_facts,
    sample_indices,
)
from .loading import ImageLoader, build_step, image_loader

QUICK_CHECK_BYTES = 64 * 2**20
"""The quick check skips larger annotation files, since reading them takes seconds."""
FAR = 0.05
"""Overlap (IoU) of an object's mask and its box below which they are of different places."""


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
    """What was read from an image and its annotations.

    Args:
        path: The image.
        error: Why it cannot be read.
        size_difference: Its size beside the annotated one, if they differ.
        facts: What was read from the image; None: it cannot be read.
        annotation_error: Why the pipeline cannot load its annotations.
        far_masks: Objects whose masks are elsewhere than their boxes.
        objects: Number of objects that training sees.
    """

    path: str
    error: str = ''
    size_difference: str = ''
    facts: ImageFacts | None = None
    annotation_error: str = ''
    far_masks: list[str] = []  # noqa: RUF012
    objects: int = 0


def inspect_dataset(config: dict, findings: Findings, sample: int | None, cfg: Config) -> None:
    """Inspect one dataset's images and annotations, and add the results to ``findings``."""
    findings.unit = 'boxes'
    dataset_class = dataset_registry('mmdet').get(config['type'])
    content: dict[str, list] = {}
    if config.get('ann_file') and any(c.__name__ == 'CocoDataset' for c in dataset_class.__mro__):
        path = os.path.join(config.get('data_root') or '', config['ann_file'])
        if sample is not None and os.path.getsize(path) > QUICK_CHECK_BYTES:
            findings.add(f'{path} is large and was skipped by this quick check',
                         f'{CHECK_COMMAND} CONFIG reads all of it', 'note')
            return
        content, problems = read_coco(path, labelled=_is_labelled(cfg, findings.split))
        findings.problems += problems
        if any(problem.level == 'error' for problem in problems):
            findings.total = len(content.get('images', ()))
            return
        findings.total = len(content['images'])
        if _is_labelled(cfg, findings.split):
            _report_ids(content, path, findings, cfg)
        if any(problem.level == 'error' for problem in findings.problems):
            return
    try:
        # All images, with the objects as parse_data_info of the class leaves them.
        dataset = dataset_registry('mmdet').build(dict(
            config, filter_cfg=None, pipeline=[], serialize_data=False, _scope_='mmdet'))
        infos = [dataset.get_data_info(i) for i in range(len(dataset))]
        dataset.filter_cfg = config.get('filter_cfg')
        try:
            left = len(dataset.filter_data())
        except UserError:  # there are none, which is reported below
            left = 0
    except Exception as error:  # a dataset can raise anything
        findings.add(f'{config["type"]} cannot load its data: {describe(error)}',
                     'Check type, ann_file and data_prefix of the dataset')
        return
    findings.total = len(infos)
    _count_objects(infos, findings)
    if content and _is_labelled(cfg, findings.split):
        _report_boxes(content, config, findings)
        _report_left_out(content, infos, findings)
    _report_small_images(infos, config, findings)
    if not left and not findings.problems:
        findings.add('no image is left after filter_cfg', 'Change filter_cfg of the dataset')
    read = functools.partial(_read_image, load=image_loader(config.get('pipeline'), 'mmdet'),
                             annotate=_annotation_loader(config))
    files = list(map_in_threads(read, [infos[i] for i in sample_indices(len(infos), sample)],
                                f'Checking {findings.split}', show_progress=sample is None))
    findings.checked = len(files)
    _report_files(files, config, findings)
    findings.add_images({file.path: file.facts for file in files if file.facts},
                        config.get('pipeline'), cfg)


def _is_labelled(cfg: Config, split: str) -> bool:
    """Whether a split must have annotations: a test that only writes results needs none."""
    metrics = metrics_of_split(cfg, split)
    return split != 'test' or not metrics or not all(one.get('format_only') for one in metrics)


def _annotation_loader(config: dict) -> Callable[[dict], dict] | None:
    """The pipeline's own LoadAnnotations, on what the data set knows of an image and its size."""
    step = next(find_transforms(config.get('pipeline'), 'LoadAnnotations'), None)
    if step is None:
        return None
    built = build_step(step, 'mmdet')

    def load(info: dict) -> dict:
        result = built(dict(info))
        assert result is not None
        return result
    return load


def _read_image(info: dict, load: ImageLoader, annotate: Callable[[dict], dict] | None
                ) -> ImageFile:
    file = ImageFile(info['img_path'])
    try:
        facts = read_image_facts(file.path, load)
    except Exception as error:  # decoders raise errors of any type
        return file._replace(error=failure_reason(error))
    file, size = file._replace(facts=facts), facts.size
    annotated = info.get('width', size[0]), info.get('height', size[1])
    if annotated != size:
        file = file._replace(size_difference='{}×{}, annotated as {}×{}'.format(*size, *annotated))
    if annotate is None:
        return file
    try:
        result = annotate(dict(info, ori_shape=(size[1], size[0]), img_shape=(size[1], size[0])))
    except KeyError as error:
        if error.args == ('mask',):  # reported for the whole file
            return file
        return file._replace(annotation_error=describe(error))
    except Exception as error:
        return file._replace(annotation_error=describe(error))
    kept = ~result.get('gt_ignore_flags', np.zeros(0, bool))
    file = file._replace(objects=int(kept.sum()))
    masks, boxes = result.get('gt_masks'), result.get('gt_bboxes')
    if masks is None or boxes is None or len(masks) != len(kept):
        return file
    boxes = np.asarray(getattr(boxes, 'tensor', boxes))
    return file._replace(far_masks=[
        f'{file.path}: box {[round(float(v)) for v in box]}, mask {extent}'
        for mask, box, keep in zip(masks.to_ndarray(), boxes, kept, strict=True) if keep
        if _overlap(extent := _extent(mask), box) < FAR])


def _extent(mask: np.ndarray) -> list[int]:
    """[left, top, right, bottom] of a mask (H, W); [0, 0, 0, 0] of an empty one."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        return [0, 0, 0, 0]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _overlap(a: list[int], b: np.ndarray) -> float:
    """Intersection over union of two boxes [left, top, right, bottom]."""
    shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return float(shared / max(sum(areas) - shared, 1e-9))


def _report_files(files: list[ImageFile], config: dict, findings: Findings) -> None:
    """Report what was found in images and what the pipeline loads of their annotations."""
    folder = os.path.join(config.get('data_root') or '',
                          (config.get('data_prefix') or {}).get('img', ''))
    lost = next((file.path for file in files if file.error and not os.path.exists(file.path)), '')
    findings.add('image missing or unreadable',
                 'Replace the file, or remove it from the annotation file' if not lost else
                 _other_place(lost, folder, config.get('data_root') or '') or
                 f'Images are expected in {folder or "."}, under the file_name in the annotation '
                 'file: add them, or set data_prefix.img' + (
                     ". A folder of images without annotations: ann_file=''"
                     if findings.split == 'test' else ''),
                 where=[f'{file.path} ({file.error})' for file in files if file.error])
    findings.add('image whose size differs from the annotation file',
                 'Write the real width and height. If they are swapped, the image has an EXIF '
                 'rotation: save the image rotated, or rotate its boxes',
                 where=[f'{file.path}: {file.size_difference}' for file in files
                        if file.size_difference])
    findings.add('image whose annotations the pipeline cannot load',
                 'Correct the masks of this image in the annotation file',
                 where=[f'{file.path}: {file.annotation_error}' for file in files
                        if file.annotation_error])
    far = [one for file in files for one in file.far_masks]
    objects = sum(file.objects for file in files)
    findings.add(f'object whose mask is elsewhere than its box ({len(far)} of {objects})',
                 'Compute the boxes from the masks, or check the coordinates of the polygons: x '
                 'comes first, and they are pixels of the image at its annotated size',
                 'error' if len(far) > objects / 20 else 'warning', where=far)


def _other_place(path: str, folder: str, root: str) -> str:
    """The fix for an image that is in another folder below ``root``; '' if there is none."""
    name = os.path.relpath(path, folder)
    for place, _, names in os.walk(root):
        found = os.path.join(place, os.path.basename(name))
        if os.path.basename(name) in names and found.endswith(os.sep + name):
            prefix = os.path.relpath(found[:-len(name)], root)
            return f'{name} is in {place}: set data_prefix=dict(img={prefix!r}) of the dataset'
    return ''


def _count_objects(infos: list[dict], findings: Findings) -> None:
    """Count the objects that training sees, per class and per image."""
    for info in infos:
        labels = [one['bbox_label'] for one in info.get('instances', ())
                  if not one.get('ignore_flag')]
        findings.label_counts.update(labels)
        findings.image_counts.update(set(labels))


def _report_left_out(content: dict[str, list], infos: list[dict], findings: Findings) -> None:
    """Say how many of the objects of these classes the data set leaves out, and why."""
    loaded = {info.get('img_id') for info in infos}  # fewer with `indices` of the data set
    images = {image['id']: image for image in content['images'] if image['id'] in loaded}
    known = {one['id'] for one in content['categories'] if one['name'] in findings.classes}
    total = [one for one in content['annotations']
             if one['image_id'] in images and one['category_id'] in known]
    kept = sum(findings.label_counts.values())
    if not total or kept == len(total):
        return
    reasons = Counter(filter(None, (_why_left_out(one, images[one['image_id']])
                                    for one in total)))
    listed = ', '.join(f'{count} {reason}' for reason, count in reasons.most_common())
    out = len(total) - kept
    findings.add(f'{out} of {len(total)} objects are left out: {listed or "by the data set"}',
                 'Correct the annotation file: training learns from the others only',
                 'error' if not kept else 'warning' if out > len(total) / 4 else 'note')


def _why_left_out(annotation: dict, image: dict) -> str:
    """Why mmdet's CocoDataset leaves out an object; '': it does not."""
    x, y, w, h = annotation['bbox']
    if annotation.get('ignore'):
        return 'with "ignore"'
    if w < 1 or h < 1:
        return 'with a box of less than a pixel'
    if min(x + w, image['width']) <= max(x, 0) or min(y + h, image['height']) <= max(y, 0):
        return 'with a box outside the image'
    if annotation['area'] <= 0:
        return 'with an area of 0'
    return 'with "iscrowd"' if annotation.get('iscrowd') else ''


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
    with_boxes = {one['category_id'] for one in content['annotations']}
    unused = [name for name, i in names.items() if name not in findings.classes
              and (unknown or i in with_boxes)]
    if unused:
        findings.add('categories that are not in classes, whose boxes are ignored: ' +
                     ', '.join(unused[:12]) + (', …' if len(unused) > 12 else ''),
                     'Add them to classes if the model should learn them', 'note')
    images = {image['id'] for image in content['images']}
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
    labels = {category['id'] for category in content['categories']
              if category['name'] in findings.classes}
    boxes = []
    with_objects = set()
    for annotation in content['annotations']:
        image, box = images.get(annotation['image_id']), annotation['bbox']
        if image is None:
            continue
        description = f'id {annotation["id"]} in {image["file_name"]}: {box}'
        x, y, w, h = box
        boxes.append(Box(description, x, y, w, h, image['width'], image['height']))
        if annotation['category_id'] in labels and not annotation.get('iscrowd'):
            with_objects.add(annotation['image_id'])
    fractions = [b for b in boxes if max(b.x, b.y, b.w, b.h) <= 1 < min(
        b.image_width, b.image_height) and max(b.w, b.h) > 0]
    if len(fractions) > len(boxes) / 2:
        findings.add('box in fractions of its image, from 0 to 1', 'COCO boxes are [x, y, width, '
                     'height] in pixels: multiply by width and height of the image',
                     where=[b.description for b in fractions])
        return
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
                        if a['area'] <= 0])
    if any(transform.get('with_mask')
           for transform in find_transforms(config.get('pipeline'), 'LoadAnnotations')):
        findings.add('annotation without a mask (segmentation), which this model requires',
                     'Add polygons or run-length encodings; to train with boxes alone, set '
                     'masks = False at the top of the config',
                     where=[f'id {a["id"]}' for a in content['annotations']
                            if not a.get('segmentation')])
        findings.add('polygon of fewer than three points, whose object is ignored',
                     'Remove or correct it', 'warning',
                     where=[f'id {a["id"]}' for a in content['annotations']
                            if isinstance(a.get('segmentation'), list) and a['segmentation'] and
                            all(len(p) < 6 or len(p) % 2 for p in a['segmentation']
                                if isinstance(p, list))])
    if not with_objects:
        findings.add('no image has a box of these classes',
                     'Check classes, and the category_id of the annotations')
        return
    findings.add_absent_classes()
    findings.add('image without a box of these classes', 'Nothing, if this is intended; training '
                 'skips these images if filter_cfg.filter_empty_gt is True', 'note',
                 where=[str(image['file_name']) for i, image in images.items()
                        if i not in with_objects])


def _report_small_images(infos: list[dict], config: dict, findings: Findings) -> None:
    """Report images that ``filter_cfg`` removes from training because of their size."""
    min_size = (config.get('filter_cfg') or {}).get('min_size', 0)
    small = [Path(info['img_path']).name for info in infos
             if min(info.get('width', min_size), info.get('height', min_size)) < min_size]
    if not config.get('test_mode'):
        findings.add(f'image with a side below {min_size}, which training skips',
                     'Lower train_dataloader.dataset.filter_cfg.min_size',
                     'error' if len(small) == len(infos) else 'note', where=small)
