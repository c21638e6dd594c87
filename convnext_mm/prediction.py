"""Runs a trained model on images, and draws input and prediction side by side."""
from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from mmcv.image import rescale_size
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import BaseDataElement, PixelData
from PIL import Image
from rich.progress import Progress

from . import checkpoints, visualization
from .datasets import dataset_metainfo, dataset_registry, datasets_of_split
from .datasets.completion import find_transforms
from .datasets.findings import failure_reason, read_image_facts
from .datasets.loading import loader_of
from .detection_files import DetectionFiles
from .engine import checks, fallbacks, speed
from .engine.launch import dtype_options
from .errors import UserError
from .inputs import find_images
from .precision import check_dtype
from .resolution.data import default_argument
from .tiff import (
    DamagedTiff,
    TiffReader,
    keep_every,
    read_georeference,
    write_class_map,
)
from .utils import LARGE_PICTURE, atomic_path, track_rows, writable_folder

TIFF_SUFFIXES = ('.tif', '.tiff')


def image_demo(args: argparse.Namespace) -> None:
    """Predict on images and draw the results.

    Of a large picture, the class map is written as well.

    Args:
        args: ``images``, ``config``, ``checkpoint``, ``out``, ``device``, ``score_threshold``,
            ``save`` (of :data:`choices.SAVED`), ``dtype`` and ``cfg_options``.

    Raises:
        UserError: There are no images, the model cannot be loaded, results cannot be written, or
            some images cannot be read; the others are still drawn.
    """
    files = find_images(args.images)
    cfg = checks.read_config(args.config, dtype_options(args))
    segments = cfg.default_scope == 'mmseg'
    if 'masks' in args.save and not segments:
        raise UserError('--masks writes class maps of segmentation, but this config is of '
                        f'{cfg.default_scope}. Use --save coco, which has masks, or csv')
    if segments and {'coco', 'csv'} & {*args.save}:
        raise UserError('--save coco and csv write detections, but this config is of '
                        f'{cfg.default_scope}. Use --save masks')
    predict = Predictor(cfg, args.checkpoint, args.device)
    out = writable_folder(args.out)  # of a model that cannot be loaded, no folder is left
    detections = DetectionFiles(predict.meta['classes'], args.score_threshold)
    failed = []
    with Progress(speed_estimate_period=600) as progress:
        pairs = list(zip(files, output_names(files), strict=True))
        for file, name in progress.track(pairs, description='Predicting'):
            try:
                picture = predict.open(file)
            except Exception as error:  # decoders raise errors of any type
                failed.append(f'{file} ({failure_reason(error)})')
                continue
            try:
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                notes = predict_picture(predict, picture, out / name, args.score_threshold,
                                        'masks' in args.save, progress,
                                        detections if args.save else None)
            except DamagedTiff as error:
                failed.append(f'{file} ({error})')
                continue
            except OSError as error:
                raise UserError(f'cannot write the results of {file} to {out.absolute()}: '
                                f'{error.strerror or error}') from error
            if notes:
                progress.console.print('\n  '.join([file, *notes]), highlight=False, markup=False,
                                       soft_wrap=True)
    for kind, write, target in (('coco', detections.write_coco, out / 'predictions.json'),
                                ('csv', detections.write_csv, out / 'predictions.csv')):
        if kind in args.save:
            try:
                write(target)
            except OSError as error:
                raise UserError(f'cannot write {target}: {error.strerror or error}') from error
            print(f'{len(detections.annotations)} detections written to {target}')
    print(f'{len(files) - len(failed)} images written to {out}')
    if failed:
        raise UserError(f'{len(failed)} of {len(files)} images could not be read:\n  ' +
                        '\n  '.join(failed))


class Rows(Protocol):
    """Reads a picture from the top: rows (bottom - top, W, bands), and a smaller picture of it."""

    @property
    def small(self) -> np.ndarray | None:
        """The picture at a lower resolution, when all rows have been read."""

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """Some of the rows as the pipeline loads them."""


class LoadedRows:
    """:class:`Rows` of a picture that has been loaded as a whole.

    Args:
        image: (H, W) or (H, W, bands).
        every: Every few pixels in both directions are kept in ``small``.
    """

    def __init__(self, image: np.ndarray, every: int) -> None:
        self._image = image if image.ndim == 3 else image[..., None]
        self.small = self._image[::every, ::every]

    def rows(self, top: int, bottom: int) -> np.ndarray:
        """See :class:`Rows`."""
        return self._image[top:bottom]


class Picture(NamedTuple):
    """A readable picture.

    Args:
        path: Its file.
        size: Height and width.
        reader: Reads a picture that is predicted by rows; None: it is predicted as a whole.
        notes: What the user should know about its prediction.
    """

    path: str
    size: tuple[int, int]
    reader: Rows | None
    notes: list[str]

    @property
    def large(self) -> bool:
        """Whether it is processed by rows where that is possible, and its class map written."""
        return self.size[0] * self.size[1] > LARGE_PICTURE


class Predictor:
    """The model of a config with the weights of a checkpoint.

    Args:
        cfg: A completed config; its test pipeline prepares the images.
        checkpoint: File or URL with any of the published parameter names.
        device: For example 'cuda:1'; by default the best available device.

    Raises:
        UserError: The checkpoint cannot be read, or does not fit the model; or the device is not
            made for the config's ``inference_dtype``.
    """

    def __init__(self, cfg: Config, checkpoint: str, device: str | None = None) -> None:
        device = device or get_device()
        check_dtype(cfg.get('inference_dtype') or 'fp32', device)
        fallbacks.adapt_to_device(cfg)
        init_default_scope(cfg.default_scope)
        dataset = next(iter(datasets_of_split(cfg, 'test')))
        self.meta = dataset_metainfo(dataset, cfg.default_scope)
        self.steps = [step for step in dataset['pipeline'] if step['type'] != 'LoadAnnotations']
        self.pipeline = Compose(self.steps)
        self.load = loader_of(self.pipeline.transforms)
        loader = next(find_transforms(dataset['pipeline'], 'LoadAnnotations'), {})
        kind = dataset['type']
        if isinstance(kind, str):
            kind = dataset_registry(cfg.default_scope).get(kind)
        reduces = [loader.get('reduce_zero_label'), dataset.get('reduce_zero_label'),
                   default_argument(kind, 'reduce_zero_label')]
        self.first_value = int(bool(next((one for one in reduces if one is not None), False)))
        """What a class map's file has for the first class: as in the dataset's masks."""
        self.in_chans = cfg.model.get('backbone', {}).get('in_chans', 3)
        """Bands of an image, unless the pipeline changes them."""
        self.model: BaseModel = MODELS.build(cfg.model)
        checkpoints.load_model(self.model, checkpoint)
        self.model.to(device).eval()
        speed.enable_packed_inference(self.model)

    @property
    def channels(self) -> str:
        """The order of three bands as the pipeline loads them: 'rgb' or 'bgr'."""
        return 'rgb' if self.steps[0].get('imdecode_backend') == 'tifffile' else 'bgr'

    @torch.no_grad()
    def __call__(self, image: str | np.ndarray) -> Any:
        """The SegDataSample or DetDataSample of an image, at its original size.

        Args:
            image: Its file, or the image as the first step of the pipeline loads it.
        """
        if isinstance(image, str):
            packed = self.pipeline(dict(img_path=image, img_id=0))
        else:
            if self.steps[0].get('to_float32'):
                image = image.astype(np.float32)
            packed = dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2],
                          img_path='', img_id=0)
            for step in self.pipeline.transforms[1:]:
                packed = step(packed)
        return self.model.test_step(
            dict(inputs=[packed['inputs']], data_samples=[packed['data_samples']]))[0]

    def open(self, path: str) -> Picture:
        """Open a picture: a large one that the model can predict by rows, others to be loaded.

        Raises:
            DamagedTiff: The file is truncated or damaged.
            ValueError: The number of bands is not the model's.
            Exception: What decoders raise for files that they cannot read.
        """
        notes: list[str] = []
        by_rows = hasattr(self.model, 'class_rows') and self.model.reads_windows()
        tiff = self._open_tiff(path, notes) if by_rows else None
        if tiff is not None and self._keeps(tiff.size):
            self._check_bands(tiff.bands)
            return Picture(path, tiff.size, tiff, notes)
        facts = read_image_facts(path, self.load)
        self._check_bands(facts.bands)
        picture = Picture(path, facts.size[::-1], None, notes)
        if not picture.large:
            notes.clear()
        elif by_rows and self._keeps(picture.size):
            every = visualization.drawn_step(picture.size)
            return picture._replace(reader=LoadedRows(self.load(path), every))
        elif resize := self._resize():
            height, width = self._resized(resize, picture.size)
            notes[:] = [f'the test pipeline scales it from {facts.size[0]}×{facts.size[1]} to '
                        f'{width}×{height}. For its own scale, set a test_pipeline without Resize']
        return picture

    @torch.no_grad()
    def rows(self, picture: Picture) -> Iterator[tuple[slice, torch.Tensor]]:
        """The class map of a picture with a reader: which rows, and their classes."""
        assert picture.reader is not None
        reader, kept = picture.reader, (0, 0, np.empty(0))

        def read(top: int, bottom: int, left: int, right: int) -> torch.Tensor:
            nonlocal kept
            if kept[:2] != (top, bottom):
                kept = top, bottom, reader.rows(top, bottom)
            window = kept[2][:, left:right].transpose(2, 0, 1)
            return torch.from_numpy(np.ascontiguousarray(window))
        model: Any = self.model
        yield from model.class_rows(read, *picture.size)

    def _open_tiff(self, path: str, notes: list[str]) -> TiffReader | None:
        """A reader of a large TIFF file; None, with a note, where there is none.

        Raises:
            DamagedTiff: The file is truncated or damaged.
        """
        if not path.lower().endswith(TIFF_SUFFIXES):
            return None
        try:
            return TiffReader(path, self.steps[0])
        except DamagedTiff:
            raise
        except Exception as error:  # the pipeline may read what tifffile does not
            notes.append(f'loaded as a whole: {error}')
            return None

    def _check_bands(self, bands: int) -> None:
        steps = {'LoadImageFromFile', 'Resize', 'PackSegInputs', 'PackDetInputs'}
        if bands != self.in_chans and steps.issuperset(step['type'] for step in self.steps):
            raise ValueError(f'it has {bands} bands, but model.backbone.in_chans is '
                             f'{self.in_chans}')

    def _keeps(self, size: tuple[int, int]) -> bool:
        """Whether the pipeline only loads a picture of this size, and leaves it as it is."""
        names = [step['type'] for step in self.steps]
        resize = self._resize()
        return ([name for name in names if name != 'Resize'] == ['LoadImageFromFile',
                                                                 'PackSegInputs']
                and (resize is None or self._resized(resize, size) == size))

    def _resize(self) -> Any:
        """The built Resize of the pipeline, or None."""
        return next((step for step in self.pipeline.transforms
                     if type(step).__name__ == 'Resize'), None)

    @staticmethod
    def _resized(resize: Any, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width after a Resize of mmcv."""
        shape = size[::-1]
        scale = resize.scale or tuple(int(length * factor + 0.5) for length, factor in zip(
            shape, resize.scale_factor, strict=True))
        width, height = rescale_size(shape, scale) if resize.keep_ratio else scale
        return height, width


def predict_picture(predict: Predictor, picture: Picture, path: Path, score_threshold: float,
                    mask: bool, progress: Progress,
                    detections: DetectionFiles | None = None) -> list[str]:
    """Draw a picture beside its prediction, and write its class map if it is large.

    Args:
        predict: The model.
        picture: Of :meth:`Predictor.open`.
        path: The PNG file to draw; the class map is a file beside it.
        score_threshold: Detections with a lower score are not drawn.
        mask: Write the class map of a small picture as well.
        progress: Shows the progress of a large picture.
        detections: Collects those of the picture.

    Returns:
        What the user should know.

    Raises:
        DamagedTiff: The picture's file is damaged.
        OSError: A file cannot be written.
    """
    notes = list(picture.notes)
    load = predict.load
    if picture.reader is None:
        sample = predict(picture.path)
        segments = 'pred_sem_seg' in sample
        if detections is not None and not segments:
            detections.add(picture.path, picture.size, sample.pred_instances)
        rows = iter([sample.pred_sem_seg.data[0].cpu().numpy()] if segments else [])
    else:
        segments = True
        sample = BaseDataElement(metainfo=dict(img_path=picture.path, ori_shape=picture.size))
        rows = _rows_and_small(predict, picture, sample, progress)
    if segments and (mask or picture.large):
        is_tiff = picture.path.lower().endswith(TIFF_SUFFIXES) and bool(find_spec('tifffile'))
        file = path.with_suffix('.classes.tif' if is_tiff else '.classes.png')
        write_mask(file, rows, picture, len(predict.meta['classes']), predict.first_value)
        if not mask:
            notes.append(f'class map: {file}')
    if picture.reader is not None:
        small = picture.reader.small
        assert small is not None

        def load(_: str) -> np.ndarray:
            return small
    visualization.draw_sample(sample, predict.meta, path, ('Input', 'Prediction'), None,
                              score_threshold, load)
    return notes


def _rows_and_small(predict: Predictor, picture: Picture, sample: BaseDataElement,
                    progress: Progress) -> Iterator[np.ndarray]:
    """The class map of a large picture by rows; the sample gets a smaller one."""
    every = visualization.drawn_step(picture.size)
    small = np.empty([-(-length // every) for length in picture.size], np.int64)
    sample.pred_sem_seg = PixelData(data=torch.from_numpy(small)[None])
    for block, classes in track_rows(predict.rows(picture), picture.size[0], progress):
        values = classes.cpu().numpy()
        keep_every(values, block.start, every, small)
        yield values


def write_mask(path: Path, rows: Iterator[np.ndarray], picture: Picture, classes: int,
               first_value: int) -> None:
    """Write a class map, with the georeference of its picture if that is a GeoTIFF.

    Args:
        path: A TIFF file, or a PNG file of 8 bits, or 16 where that is not enough.
        rows: Its rows (n, W), from the top.
        picture: What they are predictions of.
        classes: Number of classes.
        first_value: The value of class 0.

    Raises:
        OSError: The file cannot be written.
    """
    dtype = np.uint8 if classes + first_value <= 256 else np.uint16
    values = ((block + first_value).astype(dtype) for block in rows)
    if path.suffix == '.tif':
        write_class_map(path, values, picture.size, dtype,
                        read_georeference(picture.path, classes + first_value))
        return
    with atomic_path(path) as part:
        Image.fromarray(np.concatenate(list(values))).save(part)


def output_names(files: Sequence[str]) -> list[Path]:
    """A unique PNG name for each file, relative to the folder that all files share."""
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    names: dict[Path, None] = {}
    for file in files:
        name = Path(os.path.relpath(os.path.abspath(file), folder))
        output = name.with_suffix('.png')
        while output in names:  # such as a.jpg and a.png in the same folder
            output = name = name.with_name(f'{name.name}.png')
        names[output] = None
    return list(names)
