"""The command lines that prepare data: conversion and splits."""
from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..datasets import formats, splitting
from ..errors import UserError


def convert_dataset(args: argparse.Namespace) -> None:
    """Convert annotations to COCO format, or masks in colors, and print the lines for a config.

    Args:
        args: ``source``, ``out``, ``colors`` and ``ignore_others``.

    Raises:
        UserError: See :func:`convnext_mm.datasets.formats.convert` and ``convert_colors``.
    """
    if args.colors:
        from . import checks
        palette = checks.read_config(args.colors, notes=[]).get('palette')
        if not palette:
            raise UserError(f'{args.colors} has no palette: set palette=[[red, green, blue], …], a '
                            'color for each class')
        count, share, others = formats.convert_colors(args.source, args.out, palette,
                                                      args.ignore_others)
        print(f'{count} masks written to {args.out}')
        if others:
            print(f'{share:.1%} of the pixels have {len(others)} other colors and are ignored: '
                  + ', '.join(map(str, others[:6])) + (', …' if len(others) > 6 else ''))
        print('For the config:\nreduce_zero_label = False')
        return
    done = formats.convert(args.source, args.out)
    print(f'{done.kind}, classes: {len(done.classes)}')
    for split, (images, objects, polygons) in done.counts.items():
        print(f'  {done.files[split]}: {images} images, {objects} objects, {polygons} with '
              'polygons')
    if done.notes:
        more = f'  … and {len(done.notes) - 10} more\n' if len(done.notes) > 10 else ''
        print('To know:\n' + ''.join(f'  {note}\n' for note in done.notes[:10]) + more, end='')
    print(config_lines(done))


def config_lines(done: formats.Converted) -> str:
    """The lines of a config that read converted data."""
    def loader(split: str, name: str) -> str:
        return (f'{name}_dataloader = dict(dataset=dict(\n'
                f'    ann_file={str(done.files[split].absolute())!r},\n'
                f'    data_prefix=dict(img={str(done.images)!r})))')
    lines = ['For the config:', f'data_root = {str(done.images)!r}',
             f'classes = {tuple(done.classes)!r}']
    lines += [loader(split, split) for split in done.files]
    if 'val' not in done.files:
        lines.append(loader('test', 'val') if 'test' in done.files else 'val = 0.2')
    if not all(polygons == objects for _, objects, polygons in done.counts.values()):
        lines.append('masks = False  # some objects have boxes only')
    return '\n'.join(lines)


def split_dataset(args: argparse.Namespace) -> None:
    """Split images into training and validation data, and print the lines for a config.

    Args:
        args: ``images``, ``out``, ``annotations``, ``val`` and ``seed``.

    Raises:
        UserError: There are no images, or they cannot be split.
    """
    if not 0 < args.val < 1:
        raise UserError(f'--val {args.val} must be a share above 0 and below 1')
    out = Path(args.out)
    if args.annotations:
        train, val = splitting.split_coco(args.annotations, args.images, args.val, args.seed, out,
                                          show_progress=True)
    else:
        files = formats.images_below(args.images)
        if not files:
            raise UserError(f'{args.images} has no images')
        names = [os.path.splitext(name)[0] for name in files]
        train, val = splitting.split_names([os.path.join(args.images, name) for name in files],
                                           names, args.val, args.seed, out, show_progress=True)
    print('For the config:\n' + '\n'.join(
        f'{split}_dataloader = dict(dataset=dict(ann_file={str(path.absolute())!r}))'
        for split, path in (('train', train), ('val', val))))
