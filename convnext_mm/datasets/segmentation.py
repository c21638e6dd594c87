"""What is wrong in pictures and masks for mmsegmentation."""
from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config

from .completion import registry_of, steps_of
from .findings import Findings, each, open_picture, picked, reason

IGNORED = 255


class Look(NamedTuple):
    """One picture and its mask; a ``None`` says that there was none to look at."""

    picture: str
    mask: str
    picture_error: str | None = None
    mask_error: str | None = None
    sizes: tuple[tuple[int, int], tuple[int, int]] | None = None
    colours: bool = False
    mode: str = ''
    values: dict[int, int] | None = None
    digest: str = ''


def look_at(config: dict, findings: Findings, sample: int | None, cfg: Config) -> None:
    """Look at one data set's pictures and masks; what is found goes into ``findings``."""
    # Serialized, mmengine fails on a data set without pictures.
    dataset = registry_of('mmseg').build(
        dict(config, pipeline=[], serialize_data=False, _scope_='mmseg'))
    findings.total = len(dataset)
    prefix = dataset.data_prefix
    if not findings.total:
        others = Counter(Path(name).suffix for name in _names(prefix.get('img_path')))
        there = ', '.join(f'{count} {suffix}' for suffix, count in others.most_common(3))
        findings.add(
            f'no picture ends in {dataset.img_suffix} in {prefix.get("img_path")}' +
            (f': there are {there}' if there else ''),
            "Set img_suffix='…' at the top of the config; seg_map_suffix='…' is that of the masks"
            if there else 'Set data_prefix.img_path to the folder of the pictures')
        return
    infos = [dataset.get_data_info(i) for i in picked(findings.total, sample)]
    looks = list(each(_look, [(i['img_path'], i.get('seg_map_path', '')) for i in infos],
                      f'Looking at {findings.split}', show=sample is None))
    findings.seen = len(looks)
    findings.digests = {look.picture: look.digest for look in looks if look.digest}
    _report_files(looks, findings)
    _report_unused(prefix, infos, dataset, findings, sample)
    backend = next((step.get('imdecode_backend') for step in steps_of(
        config.get('pipeline'), 'LoadAnnotations')), None)
    if backend not in (None, 'pillow'):
        findings.add(f'imdecode_backend={backend!r} reads colours from palette PNGs, not indices',
                     "Leave imdecode_backend out of LoadAnnotations ('pillow' reads indices)",
                     where=[look.mask for look in looks if look.mode == 'P'])
    _report_labels([look for look in looks if look.values], findings, dataset, sample)


def _look(paths: tuple[str, str]) -> Look:
    """Read one picture and its mask."""
    found = Look(*paths)
    size = None
    try:
        picture, data = open_picture(found.picture)
        size = picture.size
        found = found._replace(digest=hashlib.blake2b(data, digest_size=16).hexdigest())
    except Exception as error:  # decoders raise what they like
        found = found._replace(picture_error=reason(error))
    try:
        mask, _ = open_picture(found.mask)
    except Exception as error:
        return found._replace(mask_error=reason(error))
    values = np.asarray(mask)
    found = found._replace(mode=mask.mode, colours=values.ndim == 3)
    if size is not None and size != mask.size:
        found = found._replace(sizes=(size, mask.size))
    if values.ndim == 2:
        numbers = np.bincount(values.astype(np.int64).ravel().clip(0))
        found = found._replace(values={int(v): int(numbers[v]) for v in np.flatnonzero(numbers)})
    return found


def _report_files(looks: list[Look], findings: Findings) -> None:
    """Pictures and masks that are missing, unreadable, of another size, or no masks."""
    findings.add('picture missing or unreadable', 'Put it back, or take its name out',
                 where=[f'{k.picture} ({k.picture_error})' for k in looks if k.picture_error])
    findings.add('mask missing or unreadable',
                 'Each picture needs a mask of the same name (seg_map_suffix is how it ends); put '
                 'it there, or take the picture out',
                 where=[f'{k.mask} ({k.mask_error})' for k in looks if k.mask_error])
    findings.add('mask of another size than its picture',
                 'Resize the mask to the picture, without interpolation (nearest); where width and '
                 'height are exchanged, the picture has an EXIF rotation that the mask lacks',
                 where=['{}: picture {}×{}, mask {}×{}'.format(k.mask, *k.sizes[0], *k.sizes[1])
                        for k in looks if k.sizes])
    findings.add('mask in colours, where numbers of classes are expected',
                 'Save masks with one channel: mask = np.zeros(rgb.shape[:2], np.uint8), and for '
                 'each class mask[(rgb == colour).all(-1)] = number',
                 where=[f'{k.mask} ({k.mode})' for k in looks if k.colours])


def _report_unused(prefix: dict, infos: list[dict], dataset: Any, findings: Findings,
                   sample: int | None) -> None:
    """Masks that no picture belongs to."""
    if sample is not None or _lists(dataset) or not prefix.get('seg_map_path'):
        return
    used = {os.path.normpath(info['seg_map_path']) for info in infos}
    masks = [os.path.join(prefix['seg_map_path'], name) for name in _names(prefix['seg_map_path'])
             if name.endswith(dataset.seg_map_suffix)]
    findings.add(f'mask without a picture that ends in {dataset.img_suffix}',
                 'Add the picture, or remove the mask', 'warning',
                 where=[mask for mask in masks if os.path.normpath(mask) not in used])


def _lists(dataset: Any) -> bool:
    """Whether an annotation file lists the pictures, so that others may lie beside them."""
    return bool(dataset.ann_file) and not os.path.isdir(dataset.ann_file)


def _report_labels(looks: list[Look], findings: Findings, dataset: Any,
                   sample: int | None) -> None:
    """Values of masks against the classes, as mmseg's LoadAnnotations makes labels of them."""
    classes, reduce = findings.classes, dataset.reduce_zero_label
    raw: Counter[int] = Counter()
    of_value: dict[int, list[str]] = {}
    empty = []
    for look in looks:
        labels = Counter()
        for value, count in look.values.items():
            raw[value] += count
            of_value.setdefault(value, []).append(look.mask)
            labels[label_of(value, reduce, dataset.label_map)] += count
        labels = Counter({v: n for v, n in labels.items() if v != IGNORED})
        if not labels:
            empty.append(look.mask)
        findings.amounts.update({v: n for v, n in labels.items() if v < len(classes)})
        findings.pictures.update({v: 1 for v in labels if v < len(classes)})
    if not raw:
        return
    outside = sorted(v for v in raw if v > IGNORED or len(classes) <= label_of(
        v, reduce, dataset.label_map) < IGNORED)
    numbers = sorted(v for v in raw if v != IGNORED)
    values = f'values of the masks: {_ranges(sorted(raw))}; classes: {len(classes)}; ' \
             f'reduce_zero_label={reduce}'
    if set(raw) == {0, IGNORED}:
        # So that one class, or none, is all there is to learn; a part may just look like it.
        certain = reduce or sample is None
        findings.add(f'the masks hold 0 and 255 only, and 255 means "ignore" ({values})',
                     'Write 1 for 255: mask[mask == 255] = 1, with classes for 0 and 1 and '
                     'reduce_zero_label = False', 'error' if certain else 'warning')
    elif outside:
        findings.add(f'values outside of the classes: {_ranges(outside)} ({values})',
                     _advice(outside, numbers, len(classes), reduce, looks),
                     where=dict.fromkeys(m for v in outside for m in of_value[v]))
    elif len(empty) == len(looks):
        findings.add(f'no pixel of any class in any mask: all are ignored ({values})',
                     'Is 0 a class? Then set reduce_zero_label = False' if reduce else
                     'Look at how the masks were written')
    else:
        findings.add('mask without a pixel of any class: all of it is ignored',
                     'Take these pictures out; they teach nothing', 'warning', where=empty)
        if reduce and dataset.label_map is None and 0 in raw and (
                numbers[-1] == len(classes) - 1 or (sample is None and numbers[-1] < len(classes))):
            findings.add(
                f'reduce_zero_label=True makes 0 "ignore" and shifts every class by one, but the '
                f'masks hold no {len(classes)}, which would be {classes[-1]!r} ({values})',
                f'If 0 is a class ({classes[0]!r}), it is swallowed and the others are shifted: '
                'set reduce_zero_label = False at the top of the config', 'warning')
        elif sample is None:
            findings.add_absent()


def label_of(value: int, reduce: bool, label_map: dict[int, int] | None) -> int:
    """The label that mmseg's LoadAnnotations makes of a mask's value; 255 is ignored."""
    if reduce:
        value = IGNORED if value in (0, IGNORED) else value - 1
    return (label_map or {}).get(value, value)


def _advice(outside: list[int], numbers: list[int], count: int, reduce: bool,
            looks: list[Look]) -> str:
    """What most likely explains values outside of the classes."""
    if numbers[-1] > 255:
        return 'mmseg reads masks as 8 bits: write numbers from 0 to 254'
    if any(look.mask.lower().endswith(('.jpg', '.jpeg')) for look in looks):
        return ('The masks are JPEGs, whose values are blurred at every edge: write them as PNG '
                'from their source')
    if not reduce and outside == [count]:
        if 0 not in numbers:
            return ('The masks count from 1: set reduce_zero_label = True at the top of the '
                    'config')
        return ('If 0 is "no class", set reduce_zero_label = True at the top of the config; if 0 '
                'is a class, one is missing from classes')
    if any(look.mode == 'P' for look in looks):
        return ('The masks are palette PNGs whose indices are not the numbers of the classes: '
                'renumber them (new = table[np.asarray(mask)]), or name every index in classes')
    if len(numbers) <= count + 1 and len(outside) >= max(1, len(numbers) - 1):
        table = dict(zip(numbers, range(len(numbers)), strict=True))
        return (f'They look like grey levels that stand for classes: renumber them, e.g. {table}'
                if len(table) <= 12 else
                'They look like grey levels that stand for classes: renumber them from 0')
    if len(numbers) > 4 * count:
        return ('So many values come of masks that were resized with interpolation, or of colours '
                'turned to grey: write them again from their source, resize with "nearest"')
    return ('Are classes missing? Name one for each value, write 255 where a pixel is to be '
            'ignored, or renumber the masks')


def _ranges(values: list[int]) -> str:
    """0, 1, 2, 7 → '0–2, 7'."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    shown = [f'{run[0]}–{run[-1]}' if len(run) > 2 else ', '.join(map(str, run)) for run in runs]
    return ', '.join(shown[:12]) + (', …' if len(shown) > 12 else '')


def _names(folder: str | None) -> list[str]:
    """Files below a folder, relative to it."""
    if not folder or not os.path.isdir(folder):
        return []
    return sorted(os.path.relpath(os.path.join(root, name), folder)
                  for root, _, names in os.walk(folder) for name in names)
