"""Hooks that draw training curves, predictions and results of classes."""
from __future__ import annotations

import csv
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import all_reduce, is_main_process, master_only
from mmengine.hooks import Hook
from mmengine.logging import print_log

from ..datasets.loading import ImageLoader, loader_of
from ..utils import LARGE_PICTURE, atomic_path
from ..visualization import draw_bars, draw_confusion, draw_curves, draw_sample, read_log
from .evaluation import keep_class_precisions, match_boxes, path_below


def never_fatal(draw: Callable) -> Callable:
    """Decorate a method so that its errors become warnings: a figure must not stop a run."""
    @functools.wraps(draw)
    def wrapper(*args, **kwargs):
        try:
            return draw(*args, **kwargs)
        except Exception as error:
            print_log(f'Cannot draw: {type(error).__name__}: {error}', logger='current',
                      level=logging.WARNING)
    return wrapper


class CurvesHook(Hook):
    """Draws ``curves.png`` in the work dir: loss, metrics and learning rates over iterations.

    Layer decay gives each layer group a learning rate; the lowest and the highest are drawn. The
    figure is updated after each validation, after training and after testing. It is drawn from
    mmengine's log, so that after a resume it still shows the whole run.
    """

    priority = 'LOW'  # after the hook that writes the log

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        """Add the lowest and the highest learning rate to the log."""
        rates = runner.optim_wrapper.get_lr().get('lr')
        if rates:  # scalars whose names end in 'lr' are in every line of the log
            runner.message_hub.update_scalar('train/lowest_lr', min(rates))
            runner.message_hub.update_scalar('train/highest_lr', max(rates))

    @master_only
    @never_fatal
    def after_val_epoch(self, runner, metrics: dict[str, float] | None = None) -> None:
        """Update the figure."""
        draw_curves(read_log(runner.work_dir), Path(runner.work_dir, 'curves.png'))

    @master_only
    @never_fatal
    def after_train(self, runner) -> None:
        """Update the figure and log its path."""
        path = Path(runner.work_dir, 'curves.png')
        if draw_curves(read_log(runner.work_dir), path):
            print_log(f'Curves: {path}', logger='current')

    @master_only
    @never_fatal
    def after_test(self, runner) -> None:
        """Draw the curves of the training from the log in the work dir or beside the checkpoint."""
        path = Path(runner.work_dir, 'curves.png')
        checkpoint_dir = os.path.dirname(runner._load_from or '')
        if draw_curves(read_log(runner.work_dir) or read_log(checkpoint_dir), path):
            print_log(f'Curves: {path}', logger='current')


class AbsentClassesHook(Hook):
    """Says at the end of a validation or test which classes no prediction names.

    A class that stays absent is often one that the annotations do not have, or that all others
    outweigh.
    """

    def __init__(self) -> None:
        self.found: torch.Tensor | None = None

    def _after_iter(self, runner, batch_idx: int, data_batch: Any = None,
                    outputs: Sequence | None = None, mode: str = 'val') -> None:
        if mode == 'train' or not outputs:
            return
        loop = runner.val_loop if mode == 'val' else runner.test_loop
        classes = getattr(loop.dataloader.dataset, 'metainfo', {}).get('classes') or ()
        if self.found is None:
            self.found = torch.zeros(len(classes), dtype=torch.long)
        for sample in outputs:
            if 'pred_sem_seg' in sample:
                labels = sample.pred_sem_seg.data
            elif 'pred_instances' in sample and 'labels' in sample.pred_instances:
                labels = sample.pred_instances.labels
            else:
                return
            # mmseg's binary maps are floats.
            seen = torch.bincount(labels.flatten().long(), minlength=len(classes)).cpu()
            self.found |= (seen[:len(classes)] > 0).long()

    def after_val_epoch(self, runner, metrics: dict[str, float] | None = None) -> None:
        """Log the classes."""
        self._report(runner.val_loop)

    def after_test_epoch(self, runner, metrics: dict[str, float] | None = None) -> None:
        """Log the classes."""
        self._report(runner.test_loop)

    def _report(self, loop: Any) -> None:
        found, self.found = self.found, None
        if found is None:
            return
        all_reduce(found)
        names = loop.dataloader.dataset.metainfo['classes']
        absent = [name for name, count in zip(names, found.tolist(), strict=True) if not count]
        if absent:
            print_log(f'No prediction names {len(absent)} of {len(names)} classes: '
                      f'{", ".join(absent[:12])}{", …" if len(absent) > 12 else ""}',
                      logger='current', level=logging.WARNING)


class ResultsHook(Hook):
    """Writes what a test found for each class to the work dir.

    Of a segmentor, ``results.csv`` has IoU, recall (mmseg's Acc), precision and the number of
    pixels of each class, ``results.png`` the IoU as bars, and ``confusion.png`` which class is
    taken for which.

    Of a detector they have the AP of boxes and of masks, as CocoMetric computes it, and of the
    boxes of :func:`match_boxes` recall, precision, the number of objects and the confusions.
    """

    def __init__(self) -> None:
        self.confusion: torch.Tensor | None = None
        self.precisions: dict[str, dict[str, float]] = {}

    def before_test_epoch(self, runner) -> None:
        """Let CocoMetrics compute the AP of each class."""
        self.precisions = keep_class_precisions(runner.test_evaluator)

    @never_fatal
    def after_test_iter(self, runner, batch_idx: int, data_batch: Any = None,
                        outputs: Sequence | None = None) -> None:
        """Count the pixels or objects of each class that are predicted as another."""
        count = len(runner.test_loop.dataloader.dataset.metainfo.get('classes') or ())
        for sample in outputs or ():
            if 'gt_sem_seg' in sample and 'pred_sem_seg' in sample:
                counts = self._confused_pixels(sample, count)
            elif all('bboxes' in sample.get(key, ()) for key in ('gt_instances', 'pred_instances')):
                counts = match_boxes(sample, count)
            else:
                return
            self.confusion = counts if self.confusion is None else self.confusion + counts

    @staticmethod
    def _confused_pixels(sample: Any, count: int) -> torch.Tensor:
        """(count, count): the number of pixels of a class (row) predicted as another."""
        total = torch.zeros(count, count, dtype=torch.long)
        truth, found = (sample.get(key).data.flatten() for key in ('gt_sem_seg', 'pred_sem_seg'))
        if truth.shape == found.shape:
            for part in zip(truth.split(LARGE_PICTURE), found.split(LARGE_PICTURE), strict=True):
                labels, predicted = (one.cpu().long() for one in part)  # binary maps are floats
                valid = (labels < count) & (predicted < count)
                counts = torch.bincount(labels[valid] * count + predicted[valid],
                                        minlength=count**2)
                total += counts.view(count, count)
        return total

    @never_fatal
    def after_test_epoch(self, runner, metrics: dict[str, float] | None = None) -> None:
        """Write the table and the pictures."""
        confusion, self.confusion = self.confusion, None
        if confusion is None:
            return
        all_reduce(confusion)
        matrix = confusion.numpy()
        classes = runner.test_loop.dataloader.dataset.metainfo['classes']
        detection = len(matrix) > len(classes)  # the last row and column are of the background
        if not is_main_process() or not matrix[:len(classes)].any():
            return
        folder = Path(runner.work_dir)
        hits, truth, found = (one[:len(classes)] for one in (
            matrix.diagonal(), matrix.sum(1), matrix.sum(0)))
        totals = dict(IoU=truth + found - hits, recall=truth, precision=found)
        columns = {name: np.where(total > 0, hits / np.maximum(total, 1), math.nan)
                   for name, total in totals.items()}
        if detection:
            del columns['IoU']
            columns = {**{name: np.array([values.get(one, math.nan) for one in classes])
                          for name, values in self.precisions.items()}, **columns}
        with atomic_path(folder / 'results.csv') as part, open(
                part, 'w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file)
            writer.writerow(['class', *columns, 'objects' if detection else 'pixels'])
            for name, *values, number in zip(classes, *columns.values(), truth.tolist(),
                                             strict=True):
                writer.writerow([name, *(f'{value:.4f}' for value in values), number])
        title, bars = next(iter(columns.items()))
        draw_bars(bars.tolist(), classes, title, folder / 'results.png')
        draw_confusion(matrix, [*classes, 'background'] if detection else classes,
                       folder / 'confusion.png')
        print_log(f'Classes: {folder}/results.csv, results.png, confusion.png', logger='current')


class PredictionsHook(Hook):
    """Draws predictions of each validation and test.

    Each figure shows an image, its ground truth and its prediction side by side.

    Args:
        num_pictures: Number of images, evenly spread over the data set; None: all, those of every
            process.
        folder: Where the figures are written; None: ``predictions/`` in the work dir.
        width: Of a panel, in pixels; None: the image's, within limits.
    """

    def __init__(self, num_pictures: int | None = 8, folder: str | None = None,
                 width: int | None = 400) -> None:
        self.num_pictures, self.folder, self.width = num_pictures, folder, width

    @master_only
    @never_fatal
    def before_run(self, runner) -> None:
        """Rename the figures of an older run in the work dir, with the time of their folder."""
        folder = Path(runner.work_dir, 'predictions')
        if self.folder is None and folder.is_dir() and not runner._resume:
            made = time.strftime('%Y%m%d_%H%M%S', time.localtime(folder.stat().st_mtime))
            folder.rename(folder.with_name(f'predictions_{made}'))

    def _folder(self, runner) -> Path:
        return Path(self.folder or Path(runner.work_dir, 'predictions'))

    @never_fatal
    def _after_iter(self, runner, batch_idx: int, data_batch: Any = None,
                    outputs: Sequence | None = None, mode: str = 'val') -> None:
        count = self.num_pictures
        if mode == 'train' or not outputs or not (count is None or is_main_process()):
            return
        loader = (runner.val_loop if mode == 'val' else runner.test_loop).dataloader
        steps = getattr(getattr(loader.dataset, 'pipeline', None), 'transforms', None)
        step = 1 if count is None else max(1, len(loader.dataset) // max(1, count))
        meta = getattr(runner.visualizer, 'dataset_meta', None) or loader.dataset.metainfo
        start = batch_idx * (loader.batch_size or 1)
        for index, sample in enumerate(outputs, start):
            if index % step == 0 and (count is None or index // step < count):
                path = self._folder(runner) / path_below(
                    sample.img_path, loader.dataset).with_suffix('.png')
                path.parent.mkdir(parents=True, exist_ok=True)
                draw_sample(sample, meta, path, width=self.width,
                            load=self._loader(steps, data_batch, index - start))

    @staticmethod
    def _loader(steps: Sequence[Any] | None, batch: Any, index: int) -> ImageLoader | None:
        """Reads an image of a batch; nothing is read again if the batch has it as it was loaded."""
        if not steps:
            return None
        names = {type(step).__name__ for step in steps}
        if batch is None or not names <= {'LoadImageFromFile', 'LoadAnnotations', 'PackSegInputs'}:
            return loader_of(steps)
        image = batch['inputs'][index].permute(1, 2, 0).cpu().numpy()
        return lambda path: image

    @master_only
    def after_test(self, runner) -> None:
        """Log the path of the figures."""
        print_log(f'Predictions: {self._folder(runner)}', logger='current')
