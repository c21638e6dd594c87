"""Training, testing, checking and predicting from Python: ``convnext_mm.load`` and the others."""
from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from mmengine.config import Config
from PIL import Image, ImageOps

from . import visualization
from .datasets.findings import failure_reason, read_image_facts
from .datasets.loading import ImageLoader
from .engine import checks, launch
from .errors import UserError
from .prediction import Predictor
from .runs.saving import BEST, read_pointer

ImageInput = str | Path | np.ndarray | Image.Image
"""A file, an array (H, W) or (H, W, bands), or a PIL image."""


class Run(NamedTuple):
    """A finished training.

    Args:
        work_dir: Folder of logs, checkpoints and figures.
        config: The whole config in it, for :func:`load`.
        checkpoint: The best checkpoint, or else the latest; None: none was written.
    """

    work_dir: Path
    config: Path
    checkpoint: Path | None


@dataclass(frozen=True)
class Result:
    """The prediction of an image.

    Args:
        sample: mmseg's SegDataSample or mmdet's DetDataSample, with all detections.
        class_names: The names of the classes.
        palette: Their colors, if the data set has any.
        score_threshold: Detections with a lower score are left out of the arrays and pictures.
    """

    sample: Any
    class_names: tuple[str, ...]
    palette: Any = None
    score_threshold: float = 0.3
    _load: ImageLoader | None = field(default=None, repr=False)

    @property
    def class_map(self) -> np.ndarray:
        """(H, W) int64: the index of the class of each pixel, at the size of the image.

        Raises:
            UserError: The model is a detector.
        """
        if 'pred_sem_seg' not in self.sample:
            raise UserError('class_map is of segmentation; a detection has boxes, labels, scores '
                            'and masks')
        classes = self.sample.pred_sem_seg.data[0].cpu().numpy()
        return np.asarray(classes, dtype=np.int64)

    @property
    def boxes(self) -> np.ndarray:
        """(N, 4) float32: left, top, right and bottom, in pixels of the image.

        Raises:
            UserError: The model is a segmentor, as of the other arrays of detections.
        """
        boxes = self._detections().bboxes
        return np.asarray(getattr(boxes, 'tensor', boxes).cpu().numpy(), dtype=np.float32)

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64: the index of the class of each detection."""
        return np.asarray(self._detections().labels.cpu().numpy(), dtype=np.int64)

    @property
    def scores(self) -> np.ndarray:
        """(N,) float32: from 0 to 1, in descending order."""
        return np.asarray(self._detections().scores.float().cpu().numpy())

    @property
    def masks(self) -> np.ndarray | None:
        """(N, H, W) bool: the pixels of each detection; None: the model has boxes only."""
        found = self._detections()
        return np.asarray(found.masks.cpu().numpy(), dtype=bool) if 'masks' in found else None

    def _detections(self) -> Any:
        if 'pred_instances' not in self.sample:
            raise UserError('boxes, labels, scores and masks are of detection; a segmentation has '
                            'a class_map')
        found = self.sample.pred_instances
        return found[found.scores >= self.score_threshold]

    def save(self, path: str | Path) -> None:
        """Draw the image beside its prediction, to a PNG file."""
        visualization.draw_sample(
            self.sample, dict(classes=self.class_names, palette=self.palette), Path(path),
            ('Input', 'Prediction'), None, self.score_threshold, self._load)

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, 'prediction.png')
            self.save(path)
            return path.read_bytes()


class Model:
    """A trained model, made by :func:`load`: call it with images.

    Args:
        cfg: A completed config.
        checkpoint: File or URL of the weights.
        device: Such as 'cuda:1' or 'cpu'; None: the best available.

    Raises:
        UserError: See :class:`convnext_mm.prediction.Predictor`.
    """

    def __init__(self, cfg: Config, checkpoint: str, device: str | None = None) -> None:
        self.cfg, self.checkpoint = cfg, checkpoint
        self.predictor = Predictor(cfg, checkpoint, device)
        self.class_names = tuple(self.predictor.meta.get('classes') or ())

    @overload
    def __call__(self, images: ImageInput, channels: str | None = ...,
                 score_threshold: float = ...) -> Result: ...
    @overload
    def __call__(self, images: list[ImageInput] | tuple[ImageInput, ...],
                 channels: str | None = ..., score_threshold: float = ...) -> list[Result]: ...

    def __call__(self, images: ImageInput | list[ImageInput] | tuple[ImageInput, ...],
                 channels: str | None = None, score_threshold: float = 0.3
                 ) -> Result | list[Result]:
        """Predict on one image or several; arrays and images get what files get in the pipeline.

        Args:
            images: Files, arrays (H, W) or (H, W, bands) with the values of a file, and PIL images.
            channels: The order in arrays of three bands: 'rgb' (PIL, imageio, matplotlib) or 'bgr'
                (cv2). Paths and PIL images say it themselves.
            score_threshold: See :class:`Result`.

        Raises:
            UserError: An image cannot be read, is of another type, or has other bands than the
                model; or ``channels`` is not said.
        """
        if isinstance(images, (list, tuple)):
            return [self._predict(image, channels, score_threshold) for image in images]
        return self._predict(images, channels, score_threshold)

    def _predict(self, image: ImageInput, channels: str | None, score_threshold: float) -> Result:
        predict, load = self.predictor, self.predictor.load
        if isinstance(image, (str, Path)):
            path = os.path.expanduser(image)
            if not os.path.isfile(path):
                raise UserError(f'No image found: {os.path.abspath(path)}. Expected a file; '
                                'for several, give a list of files')
            try:
                sample = predict(path)
            except Exception:
                try:
                    read_image_facts(path, load)
                except Exception as error:  # decoders raise errors of any type
                    raise UserError(f'{path} cannot be read: {failure_reason(error)}') from error
                raise
        else:
            array = self._as_loaded(image, channels)
            sample = predict(array)

            def load(path: str) -> np.ndarray:
                return array
        return Result(sample, self.class_names, predict.meta.get('palette'), score_threshold, load)

    def _as_loaded(self, image: Any, channels: str | None) -> np.ndarray:
        """An array or a PIL image as the pipeline loads it from a file."""
        bands = self.predictor.in_chans
        if isinstance(image, Image.Image):
            image, channels = ImageOps.exif_transpose(image), 'rgb'
            mode = {1: 'L', 3: 'RGB'}.get(bands)
            array = np.asarray(image.convert(mode) if mode else image)
        elif isinstance(image, np.ndarray):
            array = image
        else:
            raise UserError(f'image of type {type(image).__name__}: expected a path, an array of '
                            'numpy, a PIL image, or a list of them')
        if array.ndim == 2 or array.shape[2:] == (1,):
            array = np.repeat(array.reshape(*array.shape[:2], 1), 3 if bands == 3 else 1, axis=2)
        elif array.ndim == 3 and array.shape[2] == 3:
            if channels not in ('rgb', 'bgr'):
                raise UserError("channels='rgb' or 'bgr' must say the order of an array's bands: "
                                "'rgb' if PIL, imageio or matplotlib made it, 'bgr' if cv2 did")
            if channels != self.predictor.channels:
                array = array[..., ::-1]
        if array.ndim != 3 or 0 in array.shape or array.shape[2] != bands:
            raise UserError(f'image of shape {array.shape}: expected (height, width, {bands}), as '
                            f'model.backbone.in_chans={bands}')
        if bands == 3 and array.dtype != np.uint8 and array.max() <= 1:
            raise UserError('image with values from 0 to 1: expected those of a file, 0 to 255')
        return np.ascontiguousarray(array)


def load(config: str | Path, checkpoint: str | Path | None = None, device: str | None = None,
         dtype: str | None = None, **options: Any) -> Model:
    """Load a trained model.

    Args:
        config: A config file, such as the one in a work dir, or the name of a recipe.
        checkpoint: File or URL of the weights, also relative to the config's folder. Default: the
            best of that folder, or else the latest.
        device: Such as 'cuda:1' or 'cpu'; None: the best available. Without a GPU, what needs one
            is replaced as in ``tools/test.py``.
        dtype: 'fp32', 'bf16' or 'fp16' of convolutions and matrix products; None: the config's.
        options: Keys of the config to override; dotted ones as ``**{'model.test_cfg': ...}``.

    Raises:
        UserError: The config or the checkpoint cannot be read, or they do not fit.
    """
    if dtype:
        options['inference_dtype'] = dtype
    cfg = checks.read_config(str(config), options)
    folder = Path(cfg.filename).parent
    if checkpoint is None:
        found = _best_checkpoint(folder)
        if found is None:
            raise UserError(f'{folder.absolute()} has no checkpoint: give one to load(config, '
                            'checkpoint)')
        checkpoint = found
    elif not os.path.exists(checkpoint) and (folder / checkpoint).is_file():
        checkpoint = folder / checkpoint
    return Model(cfg, str(checkpoint), device)


def train(config: str | Path, *, work_dir: str | Path | None = None, resume: bool | str = False,
          amp: bool = False, auto_scale_lr: bool = False, **options: Any) -> Run | None:
    """Train a model, as ``tools/train.py`` does.

    Args:
        config: A config file, or the name of a recipe.
        work_dir: Folder for logs, checkpoints and figures; None: ``work_dirs/CONFIG``.
        resume: Whether to resume from the latest checkpoint in the work dir, or the one to resume.
        amp: Train in mixed precision.
        auto_scale_lr: Scale the learning rate by the total batch size.
        options: Keys of the config to override, such as ``data_root='data/mine'``; dotted ones as
            ``**{'train_cfg.max_iters': 1000}``.

    Raises:
        UserError: The config, the data or the weights are unusable.
    """
    runner = launch.train(_arguments(
        config, work_dir, options, resume='auto' if resume is True else resume or None, amp=amp,
        auto_scale_lr=auto_scale_lr, migrate=False, dry_run=False))
    assert runner is not None
    folder = Path(runner.work_dir)
    return Run(folder, folder / Path(runner.cfg.filename).name, _best_checkpoint(folder))


def evaluate(config: str | Path, checkpoint: str | Path, *, work_dir: str | Path | None = None,
             out: str | Path | None = None, show_dir: str | Path | None = None, tta: bool = False,
             dtype: str | None = None, **options: Any) -> dict[str, float]:
    """Evaluate a model, as ``tools/test.py`` does.

    Args:
        config, work_dir, options: See :func:`train`.
        checkpoint: File or URL of the weights.
        out: Folder of PNG masks, or a .pkl file of detections, to write.
        show_dir: Folder for an image of each prediction.
        tta: Use test-time augmentation.
        dtype: See :func:`load`.

    Returns:
        {metric: value}.

    Raises:
        UserError: The config, the data or the checkpoint are unusable.
    """
    return launch.test(_arguments(
        config, work_dir, options, checkpoint=str(checkpoint), out=out and str(out),
        show_dir=show_dir and str(show_dir), tta=tta, dtype=dtype, show=False, wait_time=0))


def check(config: str | Path, *, work_dir: str | Path | None = None,
          **options: Any) -> launch.DataCheck:
    """Check the data of a config, as ``tools/check_dataset.py`` does.

    Args:
        config, work_dir, options: See :func:`train`.

    Returns:
        What was found; ``errors`` are its problems that would stop or starve training.

    Raises:
        UserError: The config cannot be read, or data is missing.
    """
    return launch.check_data(_arguments(config, work_dir, options))


def _arguments(config: str | Path, work_dir: str | Path | None, options: dict[str, Any],
               **others: Any) -> argparse.Namespace:
    """The arguments of :mod:`convnext_mm.cli` for the functions of ``launch``."""
    return argparse.Namespace(config=str(config), work_dir=work_dir and str(work_dir),
                              cfg_options=options, **others)


def _best_checkpoint(folder: Path) -> Path | None:
    """The best checkpoint that training wrote to a folder, or else the latest."""
    pointed = os.path.basename(read_pointer(folder))
    found = [folder / BEST, *_newest(folder, 'best*.pth'), folder / pointed,
             *_newest(folder, '*.pth')]
    return next((path for path in found if path.is_file()), None)


def _newest(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder, the newest first."""
    return sorted((path for path in folder.glob(pattern) if not path.name.startswith('.')),
                  key=lambda path: path.stat().st_mtime, reverse=True)
