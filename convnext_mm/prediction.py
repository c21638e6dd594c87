"""Runs a trained model on images, and draws input and prediction side by side."""
from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.device import get_device
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from rich.progress import track

from . import checkpoints, visualization
from .datasets import dataset_metainfo, datasets_of_split
from .datasets.findings import failure_reason, read_image_facts
from .datasets.loading import loader_of, reads_colors
from .engine import checks, fallbacks, speed
from .engine.launch import dtype_options
from .errors import UserError
from .precision import check_dtype

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
MAX_PANEL_WIDTH = 1600  # pixels


def image_demo(args: argparse.Namespace) -> None:
    """Predict on images and draw the results.

    Args:
        args: ``images``, ``config``, ``checkpoint``, ``out``, ``device``, ``score_threshold``,
            ``dtype`` and ``cfg_options``.

    Raises:
        UserError: There are no images, the model cannot be loaded, or some images cannot be read;
            the others are still drawn.
    """
    files = find_images(args.images)
    cfg = checks.read_config(args.config, dtype_options(args))
    predict = Predictor(cfg, args.checkpoint, args.device)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for file, name in track(list(zip(files, output_names(files), strict=True)), 'Predicting'):
        try:
            read_image_facts(file, predict.load)
        except Exception as error:  # decoders raise errors of any type
            failed.append(f'{file} ({failure_reason(error)})')
            continue
        sample = predict(file)
        width = min(max(sample.ori_shape[1], 400), MAX_PANEL_WIDTH)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        visualization.draw_sample(sample, predict.meta, out / name, ('Input', 'Prediction'),
                                  width, args.score_threshold, predict.load)
    print(f'{len(files) - len(failed)} images written to {out}')
    if failed:
        raise UserError(f'{len(failed)} of {len(files)} images could not be read:\n  ' +
                        '\n  '.join(failed))


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
        self.pipeline = Compose([transform for transform in dataset['pipeline']
                                 if transform['type'] != 'LoadAnnotations'])
        self.load = None if reads_colors(dataset['pipeline']) else loader_of(
            self.pipeline.transforms)
        self.model: BaseModel = MODELS.build(cfg.model)
        checkpoints.load_model(self.model, checkpoint)
        self.model.to(device).eval()
        speed.enable_packed_inference(self.model)

    @torch.no_grad()
    def __call__(self, path: str) -> Any:
        """The SegDataSample or DetDataSample of an image, at its original size."""
        packed = self.pipeline(dict(img_path=path, img_id=0))
        return self.model.test_step(
            dict(inputs=[packed['inputs']], data_samples=[packed['data_samples']]))[0]


def find_images(paths: Sequence[str]) -> list[str]:
    """Expand files, folders (recursively) and glob patterns to unique image paths.

    Raises:
        UserError: One of ``paths`` matches no image.
    """
    files: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            matches = [os.path.join(root, name) for root, _, names in os.walk(path)
                       for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        elif os.path.isfile(path):
            matches = [path]
        else:
            matches = [match for match in glob.glob(path, recursive=True)
                       if match.lower().endswith(IMAGE_SUFFIXES)]
        if not matches:
            raise UserError(f'No image found: {os.path.abspath(path)}. Expected an image, a '
                            f'folder of images ({" ".join(IMAGE_SUFFIXES)}), or a pattern such as '
                            "'photos/*.jpg'")
        files += sorted(matches)
    return list(dict.fromkeys(files))


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
