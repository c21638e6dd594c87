"""Inspects the images and annotations of a data set, all of them or a sample, and reports."""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from mmengine.config import Config

from . import detection, segmentation
from .completion import classes_of, of_split
from .findings import Findings


def inspect(cfg: Config, sample: int | None = None,
            splits: Sequence[str] = ('train', 'val')) -> list[Findings]:
    """Look at the pictures and annotations of the splits.

    Args:
        cfg: Completed (:func:`convnext_mm.datasets.complete`); its files and folders are there.
        sample: How many pictures of each split, evenly spread; None: all, with a progress bar.
        splits: Those without a data set are passed over.
    """
    task = detection if cfg.default_scope == 'mmdet' else segmentation
    found = []
    for split in splits:
        for dataset in of_split(cfg, split):
            findings = Findings(split, _place(dataset), classes_of(dataset, cfg.default_scope))
            task.look_at(dataset, findings, sample, cfg)
            found.append(findings)
    _find_twins(found)
    return found


def report(found: Sequence[Findings], frequencies: bool = True) -> str:
    """All that was found, as text."""
    lines = []
    for one in found:
        seen = '' if one.seen == one.total else f', {one.seen} of them looked at'
        lines.append(f'{one.split}: {one.total} pictures of {one.place}{seen}')
        if frequencies and one.amounts:
            lines.append(one.frequencies())
        lines += [str(problem) for problem in one.problems]
    levels = Counter(problem.level for one in found for problem in one.problems)
    lines.append(f'{levels["error"]} errors (✗), {levels["warning"]} warnings (!)')
    return '\n'.join(lines)


def _place(dataset: dict) -> str:
    root, prefix = dataset.get('data_root') or '', dataset.get('data_prefix') or {}
    return os.path.join(root, dataset.get('ann_file') or prefix.get('img_path') or '')


def _find_twins(found: Sequence[Findings]) -> None:
    """The same picture in training and validation makes the validation worthless."""
    train = {digest: path for one in found if one.split == 'train'
             for path, digest in one.digests.items()}
    for one in found:
        if one.split != 'train':
            one.add('pictures are in the training data as well',
                    'Take them out of one of the two: what is measured on them is not what the '
                    'model does on new pictures', 'warning',
                    where=[f'{path} = {train[digest]}' for path, digest in one.digests.items()
                           if digest in train])
