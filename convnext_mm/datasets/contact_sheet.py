"""Draws ``dataset.png``: images of a dataset with the annotations that training sees."""
from __future__ import annotations

import math
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config

from .. import visualization
from ..errors import UserError
from .completion import (
    dataset_classes,
    dataset_metainfo,
    dataset_registry,
    datasets_of_split,
    find_transforms,
)
from .findings import failure_reason, sample_indices

COLUMNS = 4


class Cell(NamedTuple):
    """One cell of the sheet: an RGB (H, W, 3) image and its data sample, or an error."""

    title: str
    image: np.ndarray | None = None
    sample: Any = None
    error: str = ''


def draw_contact_sheet(cfg: Config, path: Path, num_train: int = 8, num_val: int = 4) -> None:
    """Draw evenly spaced images of the training and validation data with their annotations.

    The annotations pass through the dataset and its LoadAnnotations, so that a class that a
    setting removes from training is missing here too.

    Args:
        cfg: A completed config.
        path: The PNG file to write.
        num_train: Number of training images.
        num_val: Number of validation images.
    """
    plt = visualization.pyplot()
    cells = [cell for split, count in (('train', num_train), ('val', num_val))
             for dataset in datasets_of_split(cfg, split)
             for cell in _load_cells(cfg, split, dataset, count)]
    rows = max(1, math.ceil(len(cells) / COLUMNS))
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(4 * COLUMNS, 3.4 * rows + 0.8),
                                squeeze=False)
    first = next(iter(datasets_of_split(cfg, 'train')), {})
    classes = visualization.drawn_names(dataset_classes(first, cfg.default_scope))
    palette = dataset_metainfo(first, cfg.default_scope).get('palette')
    colors = visualization.class_colors(palette, len(classes))
    drawn: Counter[int] = Counter()
    for axis in axes.flat:
        axis.axis('off')
    for axis, cell in zip(axes.flat, cells, strict=False):
        axis.set_title(_shorten(cell.title), fontsize=11, loc='left')
        if cell.image is None:
            # matplotlib's own wrapping would let the text reach into the next cells.
            axis.text(0.5, 0.5, textwrap.fill(cell.error, 40), ha='center', va='center',
                      color='firebrick', transform=axis.transAxes)
        elif 'gt_sem_seg' in cell.sample:
            axis.imshow(visualization.to_grayscale(cell.image))
            drawn |= visualization.draw_labels(axis, cell.sample.gt_sem_seg, colors)
        else:
            axis.imshow(cell.image)
            drawn |= visualization.draw_instances(axis, cell.sample.get('gt_instances'), classes,
                                                  colors)
    lines = visualization.add_legend(figure, drawn, classes, colors, columns=4 * COLUMNS)
    figure.tight_layout(rect=(0, 0.3 * (lines + 1) / figure.get_figheight(), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    visualization.save_figure(figure, path)


def _shorten(title: str, length: int = 38) -> str:
    """A title that fits above its image: exports have names of 60 characters and more."""
    end = length // 2 - 1
    return title if len(title) <= length else f'{title[:length - end - 1]}…{title[-end:]}'


def _load_cells(cfg: Config, split: str, config: dict, count: int) -> list[Cell]:
    """Load ``count`` images of a dataset with their annotations."""
    pack = 'PackSegInputs' if cfg.default_scope == 'mmseg' else 'PackDetInputs'
    first = (config.get('pipeline') or [dict(type='LoadImageFromFile')])[0]
    load = next(find_transforms(config.get('pipeline'), 'LoadAnnotations'),
                dict(type='LoadAnnotations'))
    try:
        dataset = dataset_registry(cfg.default_scope).build(dict(
            config, _scope_=cfg.default_scope,
            pipeline=[dict(first), dict(load), dict(type=pack)]))
    except Exception as error:  # the report explains the cause
        return [Cell(split, error=f'{type(error).__name__}: {error}')]
    cells = []
    for index in sample_indices(len(dataset), count):
        info = dataset.get_data_info(index)
        title = f'{split}: {Path(info["img_path"]).name}'
        try:
            packed = dataset.pipeline(info)
            image = visualization.to_picture(packed['inputs'].permute(1, 2, 0).numpy())
            mask = packed['data_samples'].get('gt_sem_seg')
            if mask is not None and mask.data.squeeze(0).ndim != 2:
                raise UserError('a mask in colors')
            cells.append(Cell(title, image, packed['data_samples']))
        except KeyError as error:
            cells.append(Cell(title, error='objects without masks' if error.args == ('mask',)
                              else failure_reason(error)))
        except Exception as error:
            cells.append(Cell(title, error=failure_reason(error)))
    return cells
