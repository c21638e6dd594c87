"""Compares an exported file with PyTorch on the user's images: results, metric and latency."""
from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.structures import BaseDataElement
from torch import nn

from ..engine.evaluation import count_in_blocks
from .images import Image, predict_in_pytorch
from .runtimes import Exported, to_sample

EQUAL_PIXELS = 0.9999
"""Share of the pixels of class maps and masks that must be the same."""
BOX, SCORE = 0.01, 1e-4
"""Differences that a box, in pixels, and a score may have."""
METRIC = 0.1
"""Difference in percent that a metric may have."""
PRIMARY = ('mIoU', 'mDice', 'mFscore', 'coco/bbox_mAP', 'coco/segm_mAP')
"""The metrics by which a quantized model is judged, those of them that the config has."""
LATENCY_ROUNDS = 9


@dataclass
class Difference:
    """How the results of a runtime differ from PyTorch's on some images.

    Args:
        case: What the images are.
        images: Their number.
        pixels: Of class maps and masks.
        other_pixels: Those that differ.
        detections: Of PyTorch.
        unmatched: Detections of either without one of the same class within :data:`BOX` and
            :data:`SCORE` in the other; those at the lowest score that counts are left out.
        box: The largest distance of matched boxes, in pixels.
        score: The largest difference of matched scores.
    """

    case: str
    images: int = 0
    pixels: int = 0
    other_pixels: int = 0
    detections: int = 0
    unmatched: int = 0
    box: float = 0.0
    score: float = 0.0

    @property
    def problem(self) -> str:
        """What is too different, or ''."""
        if self.unmatched:
            return (f'{self.case}: {self.unmatched} detections have no equal one in the other '
                    f'result (of {self.detections})')
        if self.other_pixels > (1 - EQUAL_PIXELS) * self.pixels:
            return (f'{self.case}: {self.other_pixels} of {self.pixels} pixels differ, '
                    f'{100 * self.other_pixels / self.pixels:.3f} %')
        return ''

    def add(self, ours: BaseDataElement, theirs: BaseDataElement, least: float, most: int) -> None:
        """Add an image.

        Args:
            ours: PyTorch's data sample.
            theirs: The runtime's.
            least: The score that detections need.
            most: The number of detections that are kept.
        """
        self.images += 1
        if 'pred_sem_seg' in ours:
            a, b = (one.pred_sem_seg.data.cpu().numpy() for one in (ours, theirs))
            self._add_pixels(a, b)
            return
        a, b = (_detections(one) for one in (ours, theirs))
        self.detections += len(a['scores'])
        free = set(range(len(b['scores'])))
        for i, (box, score, label) in enumerate(zip(a['boxes'], a['scores'], a['labels'],
                                                    strict=True)):
            near = [(float(np.abs(b['boxes'][j] - box).max()), j) for j in free
                    if b['labels'][j] == label and abs(b['scores'][j] - score) <= SCORE]
            distance, j = min(near, default=(np.inf, -1))
            if not distance <= BOX:  # also NaN
                self.unmatched += not self._may_be_lost(a, i, least, most)
                continue
            free.remove(j)
            self.box = max(self.box, distance)
            self.score = max(self.score, float(abs(b['scores'][j] - score)))
            if 'masks' in a:
                self._add_pixels(a['masks'][i], b['masks'][j])
        self.unmatched += sum(not self._may_be_lost(b, j, least, most) for j in free)

    def _add_pixels(self, a: np.ndarray, b: np.ndarray) -> None:
        self.pixels += a.size
        self.other_pixels += a.size if a.shape != b.shape else int((a != b).sum())

    @staticmethod
    def _may_be_lost(found: dict[str, np.ndarray], index: int, least: float, most: int) -> bool:
        """Whether rounding decides that a detection is kept: its score is at the limit."""
        scores = found['scores']
        limit = max(least, float(scores.min()) if len(scores) >= most else 0.0)
        return float(scores[index]) <= limit + SCORE


def _detections(sample: BaseDataElement) -> dict[str, np.ndarray]:
    found = sample.pred_instances
    boxes = getattr(found.bboxes, 'tensor', found.bboxes)
    arrays = dict(boxes=boxes, scores=found.scores, labels=found.labels)
    if 'masks' in found:
        arrays['masks'] = found.masks
    return {key: value.cpu().numpy() for key, value in arrays.items()}


class RuntimeFailed(Exception):
    """A runtime raised an error."""


class Comparison:
    """A model beside an exported file of it.

    Args:
        model: The model, as the tools run it.
        exported: The file.
        cfg: The config of both.
    """

    def __init__(self, model: nn.Module, exported: Exported, cfg: Config) -> None:
        self.model, self.exported, self.cfg = model, exported, cfg
        rcnn = (cfg.model.get('test_cfg') or {}).get('rcnn') or {}
        self.least, self.most = rcnn.get('score_thr', 0.0), rcnn.get('max_per_img', 100)
        self.mask_threshold = mask_threshold(cfg)

    def pair(self, images: Sequence[Image]) -> tuple[list, list]:
        """The data samples of PyTorch and of the runtime, of images of one size."""
        return predict_in_pytorch(self.model, images), self.runtime(images)

    def runtime(self, images: Sequence[Image], exported: Exported | None = None
                ) -> list[BaseDataElement]:
        """The runtime's data samples of images of one size, the first one's ``ori_shape``.

        Raises:
            RuntimeFailed: The runtime cannot compute them.
        """
        batch = np.stack([one.pixels for one in images])
        file = exported or self.exported
        try:
            outputs = file.run(batch, images[0].size)
        except Exception as error:  # of any type
            raise RuntimeFailed(f'{file.name} fails: {str(error).strip()[:400]}') from error
        return [to_sample(outputs, i, copy.deepcopy(one.sample), self.mask_threshold)
                for i, one in enumerate(images)]

    def difference(self, case: str, images: Sequence[Image]) -> Difference:
        """Compare the results on images of one size."""
        found = Difference(case)
        for ours, theirs in zip(*self.pair(images), strict=True):
            found.add(ours, theirs, self.least, self.most)
        return found

    def special_cases(self, first: Image, second: Image) -> list[Difference]:
        """Other sizes, a batch of two, and nothing to find."""
        height, width = first.pixels.shape[:2]
        cases = [('another size', [first.resized(height * 3 // 4 + 1, width * 5 // 4 + 3)]),
                 ('a batch of two', [first, first.of(second.resized(height, width).pixels)])]
        test_cfg = self.cfg.model.get('test_cfg') or {}
        if test_cfg.get('mode') == 'slide':
            crop = test_cfg['crop_size']
            cases.append(('one side smaller than the crop',
                          [first.resized(crop[0] // 2 + 3, crop[1] * 2 + 5)]))
            cases.append(('both sides smaller than the crop',
                          [first.resized(crop[0] // 2 + 3, crop[1] // 2 + 1)]))
        found = [self.difference(name, images) for name, images in cases]
        return found + self.nothing_found(first)

    def nothing_found(self, image: Image) -> list[Difference]:
        """The comparison on an image without a detection, if there is one among flat ones."""
        for value in (0, 255, 114) if self.least else ():
            flat = image.of(np.full_like(image.pixels, value))
            case = self.difference('nothing detected', [flat])
            if not case.detections:
                return [case]
        return []

    def latency(self, image: Image, plain: Exported | None = None
                ) -> dict[str, dict[str, float]]:
        """Milliseconds that an image takes in both, in turns: of the processor, and on the clock.

        The median of some rounds, from the resized image to class map or pasted masks.

        Args:
            image: The image.
            plain: The fp32 file of a quantized one, which is measured as well.
        """
        runs: dict[str, Callable[[], object]] = {
            'PyTorch': lambda: predict_in_pytorch(self.model, [image]),
            self.exported.name: lambda: self.runtime([image])}
        if plain is not None:
            runs[f'{plain.name}, fp32'] = lambda: self.runtime([image], plain)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for turn in range(LATENCY_ROUNDS + 2):
            for name, run in runs.items():
                begin = time.process_time(), time.perf_counter()
                run()
                end = time.process_time(), time.perf_counter()
                if turn >= 2:  # the first runs allocate memory and reorder weights
                    times[name].append((end[0] - begin[0], end[1] - begin[1]))
        return {name: dict(zip(('processor', 'clock'), (
            1e3 * np.median(values, axis=0)).tolist(), strict=True))
            for name, values in times.items()}


def mask_threshold(cfg: Config) -> float:
    """What a detector's masks are compared with."""
    rcnn = (cfg.model.get('test_cfg') or {}).get('rcnn') or {}
    return rcnn.get('mask_thr_binary', 0.5)


class Metric:
    """The metric of a config on some of its test images.

    Args:
        cfg: A completed config.
        dataset: The built data set.
        all_images: Whether all its images will be added.
    """

    def __init__(self, cfg: Config, dataset: Any, all_images: bool) -> None:
        self.percent = 100.0 if cfg.default_scope == 'mmdet' else 1.0
        with _only_errors():
            self.evaluator = Evaluator(copy.deepcopy(cfg.test_evaluator))
        count_in_blocks(self.evaluator)
        self.evaluator.dataset_meta = dataset.metainfo
        self.all_images, self.ids = all_images, list[Any]()

    def add(self, samples: Iterable[BaseDataElement]) -> None:
        """Add predicted data samples."""
        for sample in samples:
            self.ids.append(sample.metainfo.get('img_id'))
            self.evaluator.process([sample], None)

    def values(self, quietly: bool = True) -> dict[str, float]:
        """The metrics, in percent.

        Args:
            quietly: Do not print the table of classes.
        """
        if not self.all_images:
            for metric in self.evaluator.metrics:
                if hasattr(metric, 'img_ids'):  # CocoMetric takes missing images for empty results
                    metric.img_ids = self.ids
        with _only_errors() if quietly else nullcontext():
            found = self.evaluator.evaluate(len(self.ids))
        return {name: self.percent * float(value) for name, value in found.items()
                if isinstance(value, (int, float, np.number)) and np.isfinite(value)}


@contextmanager
def _only_errors() -> Iterator[None]:
    """Hide what mmengine logs and pycocotools prints."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('ERROR')
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def primary(values: dict[str, float]) -> dict[str, float]:
    """The metrics by which models are compared."""
    return {key: value for key, value in values.items() if key in PRIMARY} or values


def metric_problem(ours: dict[str, float], theirs: dict[str, float], max_drop: float | None
                   ) -> str:
    """What is too different in the primary metrics, or ''.

    Args:
        ours: The metrics of PyTorch, in percent.
        theirs: Of the file.
        max_drop: How much lower they may be; higher ones are no problem. None: they may differ by
            :data:`METRIC`.
    """
    for key, value in primary(ours).items():
        change = theirs.get(key, 0.0) - value  # without a detection, there is no AP
        if -change > (METRIC if max_drop is None else max_drop) or (
                max_drop is None and change > METRIC):
            return f'{key}: {value:.2f} in PyTorch, {theirs.get(key, 0.0):.2f} in the file'
    return ''


def as_dicts(found: Sequence[Difference]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(one) for one in found]
