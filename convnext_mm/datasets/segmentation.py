"""Inspects the images and masks of an mmsegmentation dataset."""
from __future__ import annotations

import functools
import io
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config
from PIL import Image

from .completion import dataset_registry, find_transforms
from .findings import (
    Findings,
    ImageFacts,
    failure_reason,
    map_in_threads,
    read_image_facts,
    sample_indices,
)
from .loading import ImageLoader, build_step, image_loader

IGNORED = 255
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.gif')


class ImageMaskPair(NamedTuple):
    """What was read from an image and its mask.

    Args:
        image: Path of the image.
        mask: Path of the mask; '': a test image without one.
        image_error: Why the image cannot be read.
        mask_error: Why the mask cannot be read.
        sizes: (width, height) of image and mask, if they differ.
        colors: Colors of a mask with several channels, the most frequent first.
        mode: PIL's mode of the mask.
        pixel_counts: (mask value, label that training sees) → number of pixels; empty without a
            mask of one channel.
        facts: What was read from the image; None: it cannot be read.
    """

    image: str
    mask: str
    image_error: str = ''
    mask_error: str = ''
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
    colors: list[tuple[int, ...]] = []  # noqa: RUF012
    mode: str = ''
    pixel_counts: dict[tuple[int, int], int] = {}  # noqa: RUF012
    facts: ImageFacts | None = None

    @property
    def values(self) -> set[int]:
        """The values of the mask."""
        return {value for value, _ in self.pixel_counts}


def inspect_dataset(config: dict, findings: Findings, sample: int | None, cfg: Config) -> None:
    """Inspect one dataset's images and masks, and add the results to ``findings``."""
    # mmengine cannot serialize a dataset without images.
    dataset = dataset_registry('mmseg').build(
        dict(config, pipeline=[], serialize_data=False, _scope_='mmseg'))
    findings.total = len(dataset)
    prefix = dataset.data_prefix
    if not findings.total:
        existing = endings_below(prefix.get('img_path'))
        findings.add(
            f'no image ends with {_endings(dataset)} in {prefix.get("img_path")}' +
            (f', which contains {existing}' if existing else ''),
            "Set img_suffix='…' at the top of the config, and seg_map_suffix='…' for the masks"
            if existing else 'Set data_prefix.img_path to the folder of the images')
        return
    infos = [dataset.get_data_info(i) for i in sample_indices(findings.total, sample)]
    read = functools.partial(_read_pair, load=image_loader(config.get('pipeline'), 'mmseg'),
                             label=_mask_loader(config))
    pairs = list(map_in_threads(read, infos, f'Checking {findings.split}',
                                show_progress=sample is None))
    findings.checked = len(pairs)
    _report_files(pairs, findings, list(cfg.get('palette') or ()))
    findings.add_images({pair.image: pair.facts for pair in pairs if pair.facts},
                        config.get('pipeline'), cfg)
    _report_unused_files(prefix, dataset, findings, sample)
    backend = next((transform.get('imdecode_backend') for transform in find_transforms(
        config.get('pipeline'), 'LoadAnnotations')), None)
    if backend not in (None, 'pillow'):
        findings.add(f'imdecode_backend={backend!r} reads colors from palette PNGs, not indices',
                     "Remove imdecode_backend from LoadAnnotations (the default, 'pillow', reads "
                     'indices)', where=[pair.mask for pair in pairs if pair.mode == 'P'])
    _report_labels([pair for pair in pairs if pair.pixel_counts], findings, dataset, sample)


def _mask_loader(config: dict) -> Callable[[dict], np.ndarray] | None:
    """From what a data set knows of an image to the labels that training sees; None: no masks.

    The steps of the pipeline itself: its class of LoadAnnotations and its settings.
    """
    steps = config.get('pipeline')
    step = next(find_transforms(steps, 'LoadAnnotations'), None if steps else
                dict(type='LoadAnnotations'))
    if step is None:
        return None
    built = build_step(step, 'mmseg')

    def load(info: dict) -> np.ndarray:
        result = built(dict(info, seg_fields=[]))
        assert result is not None
        return result['gt_seg_map']
    return load


def _read_pair(info: dict, load: ImageLoader, label: Callable[[dict], np.ndarray] | None
               ) -> ImageMaskPair:
    pair = ImageMaskPair(info['img_path'], info.get('seg_map_path') or '' if label else '')
    try:
        pair = pair._replace(facts=read_image_facts(pair.image, load))
    except Exception as error:  # decoders raise errors of any type
        pair = pair._replace(image_error=failure_reason(error))
    if label is None or not pair.mask:
        return pair
    try:
        values, mode = read_mask(pair.mask)
        labels = np.asarray(label(info))
    except Exception as error:
        return pair._replace(mask_error=failure_reason(error))
    pair = pair._replace(mode=mode)
    mask_size = (labels.shape[1], labels.shape[0])
    if pair.facts is not None and pair.facts.size != mask_size:
        pair = pair._replace(sizes=(pair.facts.size, mask_size))
    if labels.ndim == 3:
        colors, counts = np.unique(labels.reshape(-1, labels.shape[2])[:, ::-1], axis=0,
                                   return_counts=True)
        return pair._replace(colors=[tuple(map(int, colors[i])) for i in np.argsort(-counts)])
    if values.shape != labels.shape:  # a loader of the user's own
        values = labels
    both = values.astype(np.int64).ravel().clip(0) * 65536 + labels.astype(np.int64).ravel()
    keys, counts = np.unique(both, return_counts=True)
    return pair._replace(pixel_counts={
        divmod(int(key), 65536): int(count) for key, count in zip(keys, counts, strict=True)})


def read_mask(path: str) -> tuple[np.ndarray, str]:
    """The values of a mask's file, as Pillow reads them, and Pillow's mode."""
    with Image.open(io.BytesIO(Path(path).read_bytes())) as image:
        return np.asarray(image), image.mode


def describe_first_masks(dataset: dict, num_classes: int, count: int = 4) -> str:
    """The values in the first masks of a data set's config, as a sentence; '' without masks."""
    prefix = dataset.get('data_prefix') or {}
    folder = os.path.join(dataset.get('data_root') or '', prefix.get('seg_map_path') or '')
    suffix = dataset.get('seg_map_suffix') or '.png'
    files = [name for name in _list_files(folder) if name.endswith(suffix)][:count]
    found: set[int] = set()
    for name in files:
        try:
            values, _ = read_mask(os.path.join(folder, name))
        except Exception:  # the check of the data says why
            continue
        if values.ndim == 2:
            found |= set(np.unique(values).tolist())
    if not found:
        return ''
    text = f'\nThe first masks in {folder} have the values {format_ranges(sorted(found))}.'
    if {0, num_classes} <= found and max(found - {IGNORED}) == num_classes:
        text += (f' One of them is no class: 0 (True), or {num_classes}, as in CamVid (False, and '
                 f'ignore = {num_classes}).')
    return text


def _report_files(pairs: list[ImageMaskPair], findings: Findings, palette: list) -> None:
    """Report missing and unreadable files, different sizes, and color masks."""
    findings.add('image missing or unreadable', 'Replace the file, or remove it from the dataset',
                 where=[f'{p.image} ({p.image_error})' for p in pairs if p.image_error])
    findings.add('mask missing or unreadable',
                 'Each image needs a mask of the same name, which ends with seg_map_suffix: add '
                 'the mask, or remove the image' + (
                     '. Test data without masks: seg_map_path=None in its data_prefix'
                     if findings.split == 'test' else ''),
                 where=[f'{p.mask} ({p.mask_error})' for p in pairs if p.mask_error])
    findings.add('mask whose size differs from its image',
                 'Resize the mask to the size of the image, with nearest-neighbor interpolation. '
                 'If width and height are swapped, the image has an EXIF rotation that the mask '
                 'lacks',
                 where=['{}: image {}×{}, mask {}×{}'.format(p.mask, *p.sizes[0], *p.sizes[1])
                        for p in pairs if p.sizes])
    findings.add('mask that is a GIF, whose values are positions in a palette of this file alone',
                 'Convert it to PNG with class indices, and set seg_map_suffix: encoders renumber '
                 'the palette of each GIF by the colors that occur in it', 'warning',
                 where=[p.mask for p in pairs if p.mask.lower().endswith('.gif') and p.mode])
    colored = [pair for pair in pairs if pair.colors]
    if colored:
        _report_colors(colored, findings, palette)


def _report_colors(pairs: list[ImageMaskPair], findings: Findings, palette: list) -> None:
    """Say what masks of several channels are: gray, colors of a map, or photographs."""
    colors = list(dict.fromkeys(color for pair in pairs for color in pair.colors))
    known = {tuple(color) for color in palette}
    listed = ', '.join(map(str, colors[:6])) + (', …' if len(colors) > 6 else '')
    if all(len(set(color[:3])) == 1 for color in colors):
        kind, fix = 'whose channels are equal', 'Save one channel: mask = rgb[..., 0]'
    elif len(colors) > 256:
        kind = f'of {len(colors)} colors, which are no classes'
        fix = ('Such masks come from blending, from JPEG or from resizing with interpolation: '
               'export them again as PNG with one channel of class indices')
    else:
        kind = 'in the colors of palette' if known >= {color[:3] for color in colors} else (
            f'in {len(colors)} colors: {listed}')
        fix = ('Convert them to class indices, the position of a color in palette = [[red, green, '
               'blue], …] of the config: python tools/convert_dataset.py MASKS OUT --colors CONFIG')
    findings.add(f'color mask {kind}; expected one channel with class indices', fix,
                 where=[f'{p.mask} ({p.mode})' for p in pairs])


def _report_unused_files(prefix: dict, dataset: Any, findings: Findings, sample: int | None
                         ) -> None:
    """Report masks without an image, and images that the data set passes over."""
    # An annotation file may list only some of the images in a folder.
    lists_images = bool(dataset.ann_file) and not os.path.isdir(dataset.ann_file)
    if lists_images or not prefix.get('seg_map_path'):
        return
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    masks = {os.path.normpath(info['seg_map_path']) for info in infos}
    images = {os.path.normpath(info['img_path']) for info in infos}
    passed_over = []
    for name in _list_files(prefix['img_path']):
        stem, suffix = os.path.splitext(name)
        path = os.path.normpath(os.path.join(prefix['img_path'], name))
        mask = os.path.normpath(os.path.join(prefix['seg_map_path'], stem + dataset.seg_map_suffix))
        if suffix.lower() in IMAGE_SUFFIXES and path not in images | masks and mask not in masks \
                and os.path.isfile(mask):
            passed_over.append((path, mask, suffix))
    endings = sorted({suffix for _, _, suffix in passed_over})
    findings.add(f'image passed over, since its name does not end with {_endings(dataset)}',
                 'Name all endings at the top of the config: img_suffix=' + repr(
                     (*([dataset.img_suffix] if isinstance(dataset.img_suffix, str) else
                        dataset.img_suffix), *endings)), where=[path for path, _, _ in passed_over])
    if sample is None:
        taken = masks | {mask for _, mask, _ in passed_over}
        found = [os.path.normpath(os.path.join(prefix['seg_map_path'], name))
                 for name in _list_files(prefix['seg_map_path'])
                 if name.endswith(dataset.seg_map_suffix)]
        findings.add(f'mask without an image that ends with {_endings(dataset)}',
                     'Add the image, or remove the mask', 'warning',
                     where=[mask for mask in found if mask not in taken | images])


def endings_below(folder: str | None) -> str:
    """How the names of the files below a folder end, and their numbers: '41 .png, 1 .txt'."""
    suffixes = Counter(Path(name).suffix for name in _list_files(folder))
    return ', '.join(f'{count} {suffix}' for suffix, count in suffixes.most_common(3))


def _endings(dataset: Any) -> str:
    suffixes = dataset.img_suffix
    return suffixes if isinstance(suffixes, str) else ' or '.join(suffixes)


def _report_labels(pairs: list[ImageMaskPair], findings: Findings, dataset: Any,
                   sample: int | None) -> None:
    """Compare mask values with the classes, by the labels that the pipeline makes of them."""
    classes, reduce = findings.classes, dataset.reduce_zero_label
    masks_of_value: dict[int, list[str]] = {}
    label_of_value: dict[int, int] = {}
    without_labels = []
    for pair in pairs:
        counts: Counter[int] = Counter()
        for (value, label), count in pair.pixel_counts.items():
            masks_of_value.setdefault(value, []).append(pair.mask)
            label_of_value[value] = label
            counts[label] += count
            if label == IGNORED:
                findings.ignored[value] += count
        del counts[IGNORED]
        if not counts:
            without_labels.append(pair.mask)
        findings.label_counts.update({v: n for v, n in counts.items() if v < len(classes)})
        findings.image_counts.update({v: 1 for v in counts if v < len(classes)})
    if not masks_of_value:
        return
    found = sorted(masks_of_value)
    outside = [v for v in found if v > IGNORED or len(classes) <= label_of_value[v] < IGNORED]
    indices = [v for v in found if v != IGNORED]
    values = f'mask values: {format_ranges(found)}; classes: {len(classes)}; ' \
             f'reduce_zero_label={reduce}'
    binary = [pair.mask for pair in pairs if pair.values == {0, IGNORED}]
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
        if binary:
            # Others may mark borders with 255, so that 0 and 255 can be a mask of background.
            others = any(IGNORED in pair.values and pair.values != {0, IGNORED} for pair in pairs)
            findings.add('mask that contains only 0 and 255, where 255 means "ignore", while other '
                         f'masks have classes ({values})',
                         'Write these masks as the others are: mask[mask == 255] = 1, or the '
                         'class that 255 stands for', 'warning' if others else 'error',
                         where=binary)
        findings.add('mask without a pixel of any class: all its pixels are ignored',
                     'Remove these images; training cannot learn from them', 'warning',
                     where=[mask for mask in without_labels if mask not in binary])
        if reduce and dataset.label_map is None and 0 in found and (
                indices[-1] == len(classes) - 1 or (sample is None and indices[-1] < len(classes))):
            findings.add(
                f'reduce_zero_label=True ignores 0 and makes 1 the first class, but no mask '
                f'contains {len(classes)}, which would be {classes[-1]!r} ({values})',
                f'If 0 is a class ({classes[0]!r}), it is ignored and the other classes are '
                'shifted: set reduce_zero_label = False at the top of the config', 'warning')
        elif sample is None:
            findings.add_absent_classes()


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
        return (f'If {outside[0]} is no class, set ignore = {outside[0]} at the top of the config; '
                'if it is one, add its name to classes; if 0 is no class and the others count '
                'from 1, set reduce_zero_label = True')
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
    return ('If classes are missing, add a name for each value to classes; values that are no '
            f'class are left out by ignore = {outside[0] if len(outside) == 1 else tuple(outside)} '
            'at the top of the config')


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
