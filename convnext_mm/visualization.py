"""Draws training curves, and images beside their annotations and predictions."""
from __future__ import annotations

import functools
import gc
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.logging import print_log

from .utils import LARGE_PICTURE, atomic_path

DPI = 80  # of every figure
PANEL_WIDTH = (400, 1600)
"""Smallest and largest width of a panel that is as wide as its image, in pixels."""
WIDE_FONTS = ('Noto Sans CJK SC', 'Noto Sans SC', 'Source Han Sans SC', 'WenQuanYi Micro Hei',
              'WenQuanYi Zen Hei', 'Droid Sans Fallback', 'Microsoft YaHei', 'SimHei',
              'PingFang SC', 'Heiti SC', 'Noto Sans CJK JP', 'Noto Sans CJK KR')
"""Fonts with Chinese, Japanese and Korean letters, the best first."""
METRICS = ('mIoU', 'coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/segm_mAP', 'coco/segm_mAP_50')
"""Metrics drawn by :func:`draw_curves`, as mmseg's and mmdet's evaluators name them."""


def read_log(folder: str | Path) -> list[dict[str, float]]:
    """Read mmengine's scalar logs of all runs below ``folder``, oldest first."""
    lines = []
    for file in sorted(Path(folder).glob('*/vis_data/scalars.json')) if str(folder) else ():
        for line in file.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:  # the last line of an interrupted run
                continue
    return [line for line in lines if 'step' in line]


def draw_curves(log: list[dict[str, float]], path: Path) -> bool:
    """Draw a run's loss, metrics and learning rates over iterations.

    Args:
        log: Log lines from :func:`read_log`. ``step`` of a training line counts iterations;
            that of a validation line counts iterations or epochs, which are fewer, so its metrics
            are drawn there or at the last training line before it, whichever is later.
        path: The PNG file to write.

    Returns:
        Whether there was anything to draw.
    """
    train: dict[int, dict[str, float]] = {}
    scores: dict[int, dict[str, float]] = {}
    for line in log:
        if 'loss' in line:
            step = int(line['step'])
            # A resumed run repeats the iterations after its checkpoint; keep the later ones.
            for later in [s for s in train if s >= step]:
                del train[later]
            for later in [s for s in scores if s >= step]:
                del scores[later]
            train[step] = line
        elif metrics := {name: line[name] for name in METRICS if name in line}:
            scores[max(*train, 0, int(line['step']))] = metrics
    if not train:
        return False

    plt = pyplot()
    figure, (loss_axis, score_axis, lr_axis) = plt.subplots(1, 3, figsize=(15, 4))
    steps = list(train)
    loss_axis.plot(steps, [train[s]['loss'] for s in steps])
    loss_axis.set(title='Loss', xlabel='iteration', ylim=(0, None))
    for name in METRICS:
        values = {s: line[name] for s, line in scores.items() if name in line}
        if values:
            # mmseg reports percent, mmdet fractions.
            factor = 1 if name == 'mIoU' else 100
            score_axis.plot(list(values), [factor * v for v in values.values()], marker='o',
                            label=name.removeprefix('coco/'))
    score_axis.set(title='Metric on the validation set (%)', xlabel='iteration', ylim=(0, 100))
    if scores:
        score_axis.legend()
    for key, label in (('highest_lr', 'last layer group (heads)'),
                       ('lowest_lr', 'first layer group (stem)')):
        values = {s: line[key] for s, line in train.items() if key in line}
        lr_axis.plot(list(values), list(values.values()), label=label)
    lr_axis.set(title='Learning rate', xlabel='iteration', ylim=(0, None))
    lr_axis.legend()
    for axis in (loss_axis, score_axis, lr_axis):
        axis.grid(alpha=0.3)
        axis.set_xlim(left=0)
    figure.tight_layout()
    save_figure(figure, path)
    return True


def draw_sample(sample: Any, meta: dict[str, Any], path: Path,
                panels: Sequence[str] = ('Input', 'Truth', 'Prediction'),
                width: int | None = 400, score_threshold: float = 0.3,
                load: Callable[[str], np.ndarray] | None = None) -> None:
    """Draw the input, ground truth and prediction of a data sample side by side.

    Args:
        sample: A SegDataSample or DetDataSample with ``img_path``, and with ``gt_*`` and
            ``pred_*`` at the image's original size.
        meta: The dataset's ``classes`` and ``palette``.
        path: The PNG file to write.
        panels: The panels to draw, of 'Input', 'Truth' and 'Prediction'.
        width: Width of a panel in pixels; None: the image's, within :data:`PANEL_WIDTH`.
        score_threshold: Detections with a lower score are not drawn.
        load: Reads the image as the model's pipeline does; None: as an ordinary image file.
    """
    from mmcv import imread
    image = (load or imread)(sample.img_path)
    size = image.shape
    if width is None:
        width = min(max(size[1], PANEL_WIDTH[0]), PANEL_WIDTH[1])
    step = drawn_step(size)
    if step > 1:
        image = image[::step, ::step].copy()  # so that the whole image can be freed
    image = to_picture(image)
    classes = drawn_names(tuple(meta.get('classes') or ()))
    colors = class_colors(meta.get('palette'), len(classes))
    extent = (-0.5, size[1] - 0.5, size[0] - 0.5, -0.5)  # boxes count pixels of the whole image
    plt = pyplot()
    inches = width / DPI
    height = inches * image.shape[0] / image.shape[1]
    figure, axes = plt.subplots(1, len(panels), figsize=(len(panels) * inches, height + 1.1),
                                squeeze=False)
    segmentation = 'pred_sem_seg' in sample
    drawn: Counter[int] = Counter()
    for axis, title in zip(axes[0], panels, strict=True):
        axis.imshow(to_grayscale(image) if segmentation and title != 'Input' else image,
                    extent=None if segmentation else extent)
        axis.set_title(title, fontsize=15)
        axis.axis('off')
        prefix = dict(Truth='gt', Prediction='pred').get(title)
        if prefix and segmentation:
            drawn |= draw_labels(axis, sample.get(f'{prefix}_sem_seg'), colors, step)
        elif prefix:
            drawn |= draw_instances(axis, sample.get(f'{prefix}_instances'), classes, colors,
                                    score_threshold)
    lines = add_legend(figure, drawn, classes, colors, columns=max(1, int(len(panels) * inches)))
    total = height + 0.7 + 0.25 * lines
    figure.set_figheight(total)
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.4 / total,
                           bottom=(0.2 + 0.25 * lines) / total, wspace=0.03)
    save_figure(figure, path)
    if step > 1:
        gc.collect()  # figures are in circles of references


def draw_confusion(confusion: np.ndarray, classes: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix, each row as shares of its class.

    Args:
        confusion: (classes, classes): how many pixels or objects of a class (row) are predicted as
            another.
        classes: Their names.
        path: The PNG file to write.
    """
    plt = pyplot()
    classes = drawn_names(tuple(classes))
    count = len(classes)
    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    figure, axis = plt.subplots(figsize=[min(4 + 0.4 * count, 40)] * 2)
    axis.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    axis.set_xticks(range(count), classes, rotation=90)
    axis.set_yticks(range(count), classes)
    axis.set(xlabel='Prediction', ylabel='Truth')
    for row, column in np.argwhere(shares >= 0.005) if count <= 30 else ():
        axis.text(column, row, f'{shares[row, column]:.2f}', ha='center', va='center', fontsize=8,
                  color='white' if shares[row, column] > 0.5 else 'black')
    figure.tight_layout()
    save_figure(figure, path)


def draw_bars(values: Sequence[float], classes: Sequence[str], title: str, path: Path) -> None:
    """Draw a bar per class, the lowest value at the bottom; nan is left out.

    Args:
        values: From 0 to 1.
        classes: Their names.
        title: What the values are.
        path: The PNG file to write.
    """
    plt = pyplot()
    classes = drawn_names(tuple(classes))
    order = [i for i in np.argsort(values) if not math.isnan(values[i])]
    figure, axis = plt.subplots(figsize=(8, 1.5 + 0.3 * len(order)))
    axis.barh([classes[i] for i in order], [values[i] for i in order])
    axis.set(title=title, xlim=(0, 1), ylim=(-0.6, len(order) - 0.4))
    figure.tight_layout()
    save_figure(figure, path)


def drawn_step(size: Sequence[int]) -> int:
    """Of a large picture of a size (H, W), every few pixels in both directions are drawn."""
    pixels = size[0] * size[1]
    return 1 if pixels <= LARGE_PICTURE else math.ceil(math.sqrt(pixels / 2**22))


def add_legend(figure: Any, drawn: Counter[int], classes: Sequence[str], colors: np.ndarray,
               columns: int = 8) -> int:
    """Add a legend of the most frequent labels below a figure; returns its number of lines."""
    from matplotlib.patches import Patch
    labels = sorted(label for label, _ in drawn.most_common(24) if label < len(classes))
    if not labels:
        return 0
    columns = min(8, columns // 2 + 1, len(labels))
    figure.legend(handles=[Patch(color=colors[i], label=classes[i]) for i in labels],
                  loc='lower center', ncols=columns, frameon=False, fontsize=12)
    return -(-len(labels) // columns)


def to_picture(image: np.ndarray) -> np.ndarray:
    """An image as mmcv loads it as an (H, W, 3) RGB picture of 8 bits.

    Args:
        image: (H, W) or (H, W, bands) of any type. Three bands are in BGR order; of more, the first
            three are shown, of fewer, the first. Values that are not 0 to 255 are stretched from
            their 2nd to their 98th percentile.
    """
    bands = image[..., None] if image.ndim == 2 else image
    if bands.shape[2] == 3:
        bands = bands[..., ::-1]
    elif bands.shape[2] > 3:
        bands = bands[..., :3]
    else:
        bands = np.repeat(bands[..., :1], 3, axis=2)
    if bands.dtype == np.uint8:
        return bands
    if bands.min() < 0 or not 1 < bands.max() <= 255:
        low, high = np.percentile(bands, (2, 98))
        bands = (bands.astype(float) - low) * (255 / max(high - low, 1e-9))
    return bands.clip(0, 255).astype(np.uint8)


def to_grayscale(image: np.ndarray) -> np.ndarray:
    """Convert an (H, W, 3) image to gray, so that the colors of labels stand out on it."""
    return np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)


def class_colors(palette: Any, count: int) -> np.ndarray:
    """(count, 3) colors from 0 to 1: the palette's, or :func:`distinct_colors` without one."""
    if isinstance(palette, (list, tuple)) and len(palette) >= count:
        return np.asarray(palette[:count], dtype=float).reshape(count, 3) / 255
    return np.asarray(distinct_colors(count), dtype=float).reshape(count, 3) / 255


def distinct_colors(count: int) -> list[tuple[int, int, int]]:
    """``count`` colors in RGB, from 0 to 255, each far from those before; always the same.

    Of a grid of colors without the very dark and the very light ones, the next is the one whose
    nearest color so far is farthest away.
    """
    levels = np.linspace(0, 255, 12).astype(int)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing='ij'), -1).reshape(-1, 3)
    light = grid @ [0.3, 0.6, 0.1]
    grid = grid[(light > 45) & (light < 225) & (np.ptp(grid, axis=1) > 90)]
    chosen = [int(np.abs(grid - [230, 25, 75]).sum(1).argmin())]
    # How far the eye holds two colors apart, roughly.
    weighted = grid * np.sqrt([2, 4, 3])
    distances = np.full(len(grid), np.inf)
    while len(chosen) < count:
        distances = np.minimum(distances, ((weighted - weighted[chosen[-1]])**2).sum(1))
        chosen.append(int(distances.argmax()))
    return [tuple(map(int, grid[i])) for i in chosen[:count]]  # type: ignore[misc]


def draw_labels(axis: Any, mask: Any, colors: np.ndarray, step: int = 1) -> Counter[int]:
    """Overlay every ``step``-th label of (H, W); returns the number of pixels per label."""
    if mask is None:
        return Counter()
    # mmseg's binary maps are floats.
    labels = mask.data.squeeze(0)[::step, ::step].long().cpu().numpy()
    known = labels < len(colors)
    rgba = np.zeros((len(colors) + 1, 4))  # the last is of labels without a color
    rgba[:-1, :3], rgba[:-1, 3] = colors, 0.65
    overlay = (rgba * 255).astype(np.uint8)[np.where(known, labels, len(colors))]
    axis.imshow(overlay, interpolation='nearest')
    counts = np.bincount(labels[known].ravel())
    return Counter({int(label): int(counts[label]) for label in np.flatnonzero(counts)})


NAME_HEIGHT = 0.06
"""Height of an object's name as a share of its picture's; nearer to the top it is in the box."""
MAX_NAMES = 60
"""With more objects, names would hide them; the legend has their colors."""


def draw_instances(axis: Any, instances: Any, classes: Sequence[str], colors: np.ndarray,
                   score_threshold: float = 0.3) -> Counter[int]:
    """Draw boxes, masks and names of N instances; returns the number of boxes per label."""
    from matplotlib.patches import Rectangle

    if instances is None or 'bboxes' not in instances:
        return Counter()
    boxes, labels = instances.bboxes, instances.labels.cpu().numpy()
    # In COCO's coordinates a pixel's center is at .5, in matplotlib's at an integer.
    boxes = getattr(boxes, 'tensor', boxes).cpu().numpy() - 0.5
    scores = instances.scores.cpu().numpy() if 'scores' in instances else None
    masks = instances.masks if 'masks' in instances else None
    if masks is not None:
        masks = masks.to_ndarray() if hasattr(masks, 'to_ndarray') else masks.cpu().numpy()
    drawn: Counter[int] = Counter()
    shown = len(boxes) if scores is None else int((scores >= score_threshold).sum())
    edge = NAME_HEIGHT * abs(np.subtract(*axis.get_ylim()))
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        if scores is not None and scores[i] < score_threshold:
            continue
        color = colors[label]
        if masks is not None:
            overlay = np.zeros((*masks[i].shape, 4))
            overlay[masks[i].astype(bool)] = (*color, 0.5)
            axis.imshow(overlay, interpolation='nearest')
        axis.add_patch(Rectangle(box[:2], *(box[2:] - box[:2]), fill=False, ec=color, lw=2))
        drawn[int(label)] += 1
        if shown > MAX_NAMES:
            continue
        name = classes[label] + ('' if scores is None else f' {scores[i]:.2f}')
        bright = color @ [0.3, 0.6, 0.1] > 0.6
        axis.text(*box[:2], name, fontsize=11, color='black' if bright else 'white',
                  va='top' if box[1] < edge else 'bottom', clip_on=True,
                  bbox=dict(facecolor=color, edgecolor='none', alpha=0.8, pad=1))
    return drawn


def pyplot() -> Any:
    """matplotlib.pyplot with a backend that needs no display, imported on demand."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plt.rcParams['font.family'] = ['sans-serif', *wide_fonts()]  # letters that the first lacks
    return plt


@functools.cache
def wide_fonts() -> list[str]:
    """Installed fonts with Chinese, Japanese and Korean letters, the first that is found."""
    from matplotlib import font_manager
    known = {font.name for font in font_manager.fontManager.ttflist}
    return next(([name] for name in WIDE_FONTS if name in known), [])


@functools.cache
def known_letters() -> frozenset[int]:
    """The code points of the fonts that draw names."""
    from matplotlib import font_manager
    files = [font_manager.findfont(font_manager.FontProperties(family=[name]))
             for name in ('sans-serif', *wide_fonts())]
    return frozenset[int]().union(*(font_manager.get_font(one).get_charmap() for one in files))


@functools.cache
def drawn_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names as they are drawn: ``class 3`` for the fourth, if no installed font has its letters."""
    drawn = tuple(name if known_letters() >= {ord(one) for one in name} else f'class {i}'
                  for i, name in enumerate(names))
    for name, instead in zip(names, drawn, strict=True):
        if name != instead:
            _warn_about_letters(name, instead)
            break
    return drawn


@functools.cache
def _warn_about_letters(name: str, instead: str) -> None:
    """Say once that a name cannot be drawn."""
    print_log(f'No installed font has the letters of class names such as {name}: pictures show '
              f'"{instead}" instead. Install one of {", ".join(WIDE_FONTS[:3])} (Debian, Ubuntu: '
              'apt install fonts-noto-cjk), and delete ~/.cache/matplotlib', logger='current',
              level=logging.WARNING)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure to a file and close it."""
    with atomic_path(path) as part:
        figure.savefig(part, dpi=DPI)
    pyplot().close(figure)
