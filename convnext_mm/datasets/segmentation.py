"""Inspects the images and masks of an mmsegmentation dataset."""
from __future__ import annotations

import functools
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config

from .completion import dataset_registry, find_transforms
from .findings import (
    Findings,
    failure_reason,
    load_image,
    map_in_threads,
    read_image_facts,
    sample_indices,
)
from .loading import ImageLoader, image_loader

IGNORED = 255


class ImageMaskPair(NamedTuple):
    """What was read from an image and its mask.

    Args:
        image: Path of the image.
        mask: Path of the mask.
        image_error: Why the image cannot be read.
        mask_error: Why the mask cannot be read.
        sizes: (width, height) of image and mask, if they differ.
        has_colors: Whether the mask has several channels.
        mode: PIL's mode of the mask.
        pixel_counts: Mask value → number of pixels; empty without a mask of one channel.
        digest: Hash of the image file.
        bands: Number of the image's bands.
    """

    image: str
    mask: str
    image_error: str = ''
    mask_error: str = ''
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
    has_colors: bool = False
    mode: str = ''
    pixel_counts: dict[int, int] = {}  # noqa: RUF012
    digest: str = ''
    bands: int = 3


def inspect_dataset(config: dict, findings: Findings, sample: int | None, cfg: Config) -> None:
    """Inspect one dataset's images and masks, and add the results to ``findings``."""
    # mmengine cannot serialize a dataset without images.
    dataset = dataset_registry('mmseg').build(
        dict(config, pipeline=[], serialize_data=False, _scope_='mmseg'))
    findings.total = len(dataset)
    prefix = dataset.data_prefix
    if not findings.total:
        suffixes = Counter(Path(name).suffix for name in _list_files(prefix.get('img_path')))
        existing = ', '.join(f'{count} {suffix}' for suffix, count in suffixes.most_common(3))
        findings.add(
            f'no image ends with {dataset.img_suffix} in {prefix.get("img_path")}' +
            (f', which contains {existing}' if existing else ''),
            "Set img_suffix='…' at the top of the config, and seg_map_suffix='…' for the masks"
            if existing else 'Set data_prefix.img_path to the folder of the images')
        return
    infos = [dataset.get_data_info(i) for i in sample_indices(findings.total, sample)]
    read = functools.partial(_read_pair, load=image_loader(config.get('pipeline'), 'mmseg'))
    pairs = list(map_in_threads(
        read, [(i['img_path'], i.get('seg_map_path', '')) for i in infos],
        f'Checking {findings.split}', show_progress=sample is None))
    findings.checked = len(pairs)
    findings.digests = {pair.image: pair.digest for pair in pairs if pair.digest}
    _report_files(pairs, findings)
    findings.add_wrong_bands({pair.image: pair.bands for pair in pairs if not pair.image_error},
                             cfg.get('model', {}).get('backbone', {}).get('in_chans', 3))
    _report_unpaired_masks(prefix, infos, dataset, findings, sample)
    backend = next((transform.get('imdecode_backend') for transform in find_transforms(
        config.get('pipeline'), 'LoadAnnotations')), None)
    if backend not in (None, 'pillow'):
        findings.add(f'imdecode_backend={backend!r} reads colors from palette PNGs, not indices',
                     "Remove imdecode_backend from LoadAnnotations (the default, 'pillow', reads "
                     'indices)', where=[pair.mask for pair in pairs if pair.mode == 'P'])
    _report_labels([pair for pair in pairs if pair.pixel_counts], findings, dataset, sample)


def _read_pair(paths: tuple[str, str], load: ImageLoader | None) -> ImageMaskPair:
    pair = ImageMaskPair(*paths)
    size = None
    try:
        size, bands, digest = read_image_facts(pair.image, load)
        pair = pair._replace(digest=digest, bands=bands)
    except Exception as error:  # decoders raise errors of any type
        pair = pair._replace(image_error=failure_reason(error))
    try:
        mask, _ = load_image(pair.mask)
    except Exception as error:
        return pair._replace(mask_error=failure_reason(error))
    values = np.asarray(mask)
    pair = pair._replace(mode=mask.mode, has_colors=values.ndim == 3)
    if size is not None and size != mask.size:
        pair = pair._replace(sizes=(size, mask.size))
    if values.ndim == 2:
        counts = np.bincount(values.astype(np.int64).ravel().clip(0))
        pair = pair._replace(pixel_counts={int(v): int(counts[v]) for v in np.flatnonzero(counts)})
    return pair


def _report_files(pairs: list[ImageMaskPair], findings: Findings) -> None:
    """Report missing and unreadable files, different sizes, and color masks."""
    findings.add('image missing or unreadable', 'Replace the file, or remove it from the dataset',
                 where=[f'{p.image} ({p.image_error})' for p in pairs if p.image_error])
    findings.add('mask missing or unreadable',
                 'Each image needs a mask of the same name, which ends with seg_map_suffix: add '
                 'the mask, or remove the image',
                 where=[f'{p.mask} ({p.mask_error})' for p in pairs if p.mask_error])
    findings.add('mask whose size differs from its image',
                 'Resize the mask to the size of the image, with nearest-neighbor interpolation. '
                 'If width and height are swapped, the image has an EXIF rotation that the mask '
                 'lacks',
                 where=['{}: image {}×{}, mask {}×{}'.format(p.mask, *p.sizes[0], *p.sizes[1])
                        for p in pairs if p.sizes])
    findings.add('color mask; expected one channel with class indices',
                 'Save masks with one channel: mask = np.zeros(rgb.shape[:2], np.uint8), and for '
                 'each class mask[(rgb == color).all(-1)] = index',
                 where=[f'{p.mask} ({p.mode})' for p in pairs if p.has_colors])


def _report_unpaired_masks(prefix: dict, infos: list[dict], dataset: Any, findings: Findings,
                           sample: int | None) -> None:
    # An annotation file may list only some of the images in a folder.
    lists_images = bool(dataset.ann_file) and not os.path.isdir(dataset.ann_file)
    if sample is not None or lists_images or not prefix.get('seg_map_path'):
        return
    used = {os.path.normpath(info['seg_map_path']) for info in infos}
    masks = [os.path.join(prefix['seg_map_path'], name)
             for name in _list_files(prefix['seg_map_path'])
             if name.endswith(dataset.seg_map_suffix)]
    findings.add(f'mask without an image that ends with {dataset.img_suffix}',
                 'Add the image, or remove the mask', 'warning',
                 where=[mask for mask in masks if os.path.normpath(mask) not in used])


def _report_labels(pairs: list[ImageMaskPair], findings: Findings, dataset: Any,
                   sample: int | None) -> None:
    """Compare mask values with the classes, as mmseg's LoadAnnotations maps them to labels."""
    classes, reduce = findings.classes, dataset.reduce_zero_label
    masks_of_value: dict[int, list[str]] = {}
    without_labels = []
    for pair in pairs:
        counts: Counter[int] = Counter()
        for value, count in pair.pixel_counts.items():
            masks_of_value.setdefault(value, []).append(pair.mask)
            counts[training_label(value, reduce, dataset.label_map)] += count
        del counts[IGNORED]
        if not counts:
            without_labels.append(pair.mask)
        findings.label_counts.update({v: n for v, n in counts.items() if v < len(classes)})
        findings.image_counts.update({v: 1 for v in counts if v < len(classes)})
    if not masks_of_value:
        return
    found = sorted(masks_of_value)
    outside = [v for v in found if v > IGNORED or len(classes) <= training_label(
        v, reduce, dataset.label_map) < IGNORED]
    indices = [v for v in found if v != IGNORED]
    values = f'mask values: {format_ranges(found)}; classes: {len(classes)}; ' \
             f'reduce_zero_label={reduce}'
    if found == [0, IGNORED]:
        # At most one class is left to learn. In a sample, the other classes may be missing.
        certain = reduce or sample is None
        findings.add(f'masks contain only 0 and 255, and 255 means "ignore" ({values})',
                     'Replace 255 by 1 (mask[mask == 255] = 1), and set classes for 0 and 1 and '
                     'reduce_zero_label = False', 'error' if certain else 'warning')
    elif outside:
        findings.add(f'mask values that are not classes: {format_ranges(outside)} ({values})',
                     _suggest_fix(outside, indices, len(classes), reduce, pairs),
                     where=dict.fromkeys(m for v in outside for m in masks_of_value[v]))
    elif len(without_labels) == len(pairs):
        findings.add(f'masks without a pixel of any class: all pixels are ignored ({values})',
                     'If 0 is a class, set reduce_zero_label = False' if reduce else
                     'Check how the masks were written')
    else:
        findings.add('mask without a pixel of any class: all its pixels are ignored',
                     'Remove these images; training cannot learn from them', 'warning',
                     where=without_labels)
        if reduce and dataset.label_map is None and 0 in found and (
                indices[-1] == len(classes) - 1 or (sample is None and indices[-1] < len(classes))):
            findings.add(
                f'reduce_zero_label=True ignores 0 and makes 1 the first class, but no mask '
                f'contains {len(classes)}, which would be {classes[-1]!r} ({values})',
                f'If 0 is a class ({classes[0]!r}), it is ignored and the other classes are '
                'shifted: set reduce_zero_label = False at the top of the config', 'warning')
        elif sample is None:
            findings.add_absent_classes()


def training_label(value: int, reduce: bool, label_map: dict[int, int] | None) -> int:
    """The label that mmseg's LoadAnnotations maps a mask value to; 255 is ignored."""
    if reduce:
        value = IGNORED if value in (0, IGNORED) else value - 1
    return (label_map or {}).get(value, value)


def _suggest_fix(outside: list[int], indices: list[int], num_classes: int, reduce: bool,
                 pairs: list[ImageMaskPair]) -> str:
    """The most likely cause of mask values that are not classes, and its fix."""
    if indices[-1] > 255:
        return 'mmseg reads masks as 8-bit images: write class indices from 0 to 254'
    if any(pair.mask.lower().endswith(('.jpg', '.jpeg')) for pair in pairs):
        return ('The masks are JPEGs, whose compression changes values near edges: create them '
                'again as PNG')
    if not reduce and outside == [num_classes]:
        if 0 not in indices:
            return ('The masks number the classes from 1: set reduce_zero_label = True at the '
                    'top of the config')
        return ('If 0 means "no class", set reduce_zero_label = True at the top of the config; '
                'if 0 is a class, one is missing from classes')
    if any(pair.mode == 'P' for pair in pairs):
        return ('The masks are palette PNGs whose indices are not the class indices: remap them '
                '(new = table[np.asarray(mask)]), or list a name for every index in classes')
    if len(indices) <= num_classes + 1 and len(outside) >= max(1, len(indices) - 1):
        table = dict(zip(indices, range(len(indices)), strict=True))
        return (f'They look like gray levels that encode classes: remap them, e.g. {table}'
                if len(table) <= 12 else
                'They look like gray levels that encode classes: remap them to 0, 1, 2, …')
    if len(indices) > 4 * num_classes:
        return ('So many values result from resizing masks with interpolation, or from converting '
                'colors to gray: create the masks again, and resize them with nearest-neighbor '
                'interpolation')
    return ('If classes are missing, add a name for each value to classes; otherwise remap the '
            'masks, with 255 for pixels to ignore')


def format_ranges(values: list[int]) -> str:
    """Sorted numbers as text: [0, 1, 2, 7] → '0–2, 7'."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    texts = [f'{run[0]}–{run[-1]}' if len(run) > 2 else ', '.join(map(str, run)) for run in runs]
    return ', '.join(texts[:12]) + (', …' if len(texts) > 12 else '')


def _list_files(folder: str | None) -> list[str]:
    """The files below a folder, as paths relative to it."""
    if not folder or not os.path.isdir(folder):
        return []
    return sorted(os.path.relpath(os.path.join(root, name), folder)
                  for root, _, names in os.walk(folder) for name in names)
