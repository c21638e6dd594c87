"""Inspects the images and annotations of datasets, all or a sample, and formats a report."""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence

from mmengine.config import Config
from PIL import ExifTags, Image

from . import detection, segmentation
from .completion import dataset_classes, dataset_registry, datasets_of_split
from .findings import Findings
from .loading import image_loader


def inspect_splits(cfg: Config, sample: int | None = None,
                   splits: Sequence[str] = ('train', 'val')) -> list[Findings]:
    """Inspect the images and annotations of the splits.

    Args:
        cfg: A completed config (:func:`convnext_mm.datasets.complete_config`) whose files and
            folders exist.
        sample: Number of images per dataset, evenly spaced; None inspects all images, with a
            progress bar.
        splits: Splits without a dataset are skipped.

    Returns:
        One :class:`Findings` per dataset.
    """
    task = detection if cfg.default_scope == 'mmdet' else segmentation
    results = []
    for split in splits:
        for dataset in datasets_of_split(cfg, split):
            findings = Findings(split, _location(dataset),
                                dataset_classes(dataset, cfg.default_scope))
            task.inspect_dataset(dataset, findings, sample, cfg)
            results.append(findings)
    _report_duplicates(results)
    return results


def format_report(results: Sequence[Findings], frequencies: bool = True) -> str:
    """All findings as text, with a table of class frequencies per dataset if wanted."""
    lines = []
    for findings in results:
        checked = '' if findings.checked == findings.total else f', {findings.checked} checked'
        lines.append(f'{findings.split}: {findings.total} images in {findings.location}{checked}')
        if frequencies and findings.label_counts:
            lines.append(findings.frequency_table())
        lines += [str(problem) for problem in findings.problems]
    levels = Counter(problem.level for findings in results for problem in findings.problems)
    lines.append(f'{levels["error"]} errors (✗), {levels["warning"]} warnings (!)')
    return '\n'.join(lines)


def image_sizes(dataset: dict) -> Iterator[tuple[str, tuple[int, int]]]:
    """(path, (width, height)) of every image of a segmentation dataset that can be read.

    From its header where Pillow knows the format, otherwise by the pipeline's own loader.
    """
    load = image_loader(dataset.get('pipeline'), 'mmseg')
    built = dataset_registry('mmseg').build(dict(dataset, pipeline=[], _scope_='mmseg'))
    for i in range(len(built)):
        path = built.get_data_info(i)['img_path']
        try:
            with Image.open(path) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
                yield path, image.size[::-1] if turned else image.size
        except OSError:
            try:
                yield path, load(path).shape[1::-1]
            except Exception:  # the inspection reports it
                continue


def _location(dataset: dict) -> str:
    root, prefix = dataset.get('data_root') or '', dataset.get('data_prefix') or {}
    return os.path.join(root, dataset.get('ann_file') or prefix.get('img_path')
                        or prefix.get('img') or '')


def _report_duplicates(results: Sequence[Findings]) -> None:
    """Warn about images that are in the training data and in another split."""
    train = {digest: path for findings in results if findings.split == 'train'
             for path, digest in findings.digests.items()}
    for findings in results:
        if findings.split != 'train':
            findings.add('image that is also in the training data',
                         'Remove it from one of the two: metrics on training images do not '
                         'measure generalization', 'warning',
                         where=[f'{path} = {train[digest]}'
                                for path, digest in findings.digests.items() if digest in train])
