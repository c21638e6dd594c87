"""``dataset.png``: pictures of a data set with the annotations that training would see."""
from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from mmengine.config import Config

from .. import visualization
from .completion import classes_of, meta_of, of_split, registry_of, steps_of
from .findings import picked, reason

COLUMNS = 4


def draw(cfg: Config, path: Path, train: int = 8, val: int = 4) -> None:
    """Draw a contact sheet.

    The annotations go through the data set and its LoadAnnotations, so that a class which a
    setting swallows is missing here as it would be in training.

    Args:
        cfg: Completed.
        path: The picture to write.
        train: How many pictures of the training data, evenly spread.
        val: How many of the validation data.
    """
    plt = visualization.pyplot()
    cells = [cell for split, count in (('train', train), ('val', val))
             for dataset in of_split(cfg, split) for cell in _samples(cfg, split, dataset, count)]
    rows = max(1, math.ceil(len(cells) / COLUMNS))
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(4 * COLUMNS, 3.4 * rows + 0.8),
                                squeeze=False)
    first = next(iter(of_split(cfg, 'train')), {})
    classes = classes_of(first, cfg.default_scope)
    meta = meta_of(first, cfg.default_scope)
    colors = visualization.class_colors(meta.get('palette'), len(classes))
    shown: Counter[int] = Counter()
    for axis in axes.flat:
        axis.axis('off')
    for axis, (title, image, sample) in zip(axes.flat, cells, strict=False):
        axis.set_title(title, fontsize=11, loc='left')
        if image is None:
            axis.text(0.5, 0.5, sample, ha='center', va='center', wrap=True, color='firebrick',
                      transform=axis.transAxes)
            continue
        if 'gt_sem_seg' in sample:
            axis.imshow(visualization.grey(image))
            shown |= visualization.draw_labels(axis, sample.gt_sem_seg, colors)
        else:
            axis.imshow(image)
            shown |= visualization.draw_instances(axis, sample.get('gt_instances'), classes, colors)
    lines = visualization.add_legend(figure, shown, classes, colors, columns=4 * COLUMNS)
    figure.tight_layout(rect=(0, 0.3 * (lines + 1) / figure.get_figheight(), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    visualization.save(figure, path)


def _samples(cfg: Config, split: str, config: dict, count: int) -> list[tuple[str, Any, Any]]:
    """(title, picture, sample with annotations) of each; no picture: why there is none."""
    registry = registry_of(cfg.default_scope)
    pack = 'PackSegInputs' if cfg.default_scope == 'mmseg' else 'PackDetInputs'
    load = next(steps_of(config.get('pipeline'), 'LoadAnnotations'), dict(type='LoadAnnotations'))
    try:
        dataset = registry.build(dict(config, _scope_=cfg.default_scope, pipeline=[
            dict(type='LoadImageFromFile'), dict(load), dict(type=pack)]))
    except Exception as error:  # the report has said why
        return [(split, None, f'{type(error).__name__}: {error}')]
    found = []
    for index in picked(len(dataset), count):
        info = dataset.get_data_info(index)
        title = f'{split}: {Path(info["img_path"]).name}'
        try:
            packed = dataset.pipeline(info)
            image = packed['inputs'].permute(1, 2, 0).numpy()[..., ::-1]  # mmcv reads BGR
            found.append((title, image, packed['data_samples']))
        except Exception as error:
            found.append((title, None, reason(error)))
    return found
