"""``tools/web_demo.py``: a web page on this machine that runs a checkpoint on uploaded images."""
from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import to_hex

from . import visualization
from .api import Model, load
from .datasets.findings import failure_reason
from .deployment.optional import require
from .errors import UserError

Regions = list[tuple[Any, str]]
"""Masks (H, W) from 0 to 1 or boxes (left, top, right, bottom), each with its label."""


def main(args: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C.

    Args:
        args: ``config``, ``checkpoint``, ``device``, ``dtype``, ``host``, ``port`` and
            ``cfg_options``.

    Raises:
        UserError: gradio is not installed, the model cannot be loaded, or the port is taken.
    """
    require('gradio', extra='web')
    model = load(args.config, args.checkpoint, args.device, args.dtype, **args.cfg_options or {})
    page = build_page(model)
    try:
        page.launch(server_name=args.host, server_port=args.port, share=False)
    except OSError as error:
        raise UserError(f'port {args.port} of {args.host} cannot be used: choose another with '
                        '--port') from error


def build_page(model: Model) -> Any:
    """gradio's page for a model."""
    gradio = require('gradio', extra='web')
    segments = model.cfg.default_scope == 'mmseg'

    def run(path: str | None, score_threshold: float = 0.0) -> Any:
        if path is None:
            return None
        try:
            return find_regions(model, path, score_threshold)
        except UserError as error:
            raise gradio.Error(str(error), duration=None, print_exception=False) from error
    names = model.class_names
    colors = visualization.class_colors(model.predictor.meta.get('palette'), len(names))
    inputs = [gradio.Image(type='filepath', image_mode=None, label='Image')]
    if not segments:
        inputs.append(gradio.Slider(0, 1, 0.3, label='Minimum score'))
    return gradio.Interface(
        run, inputs, gradio.AnnotatedImage(
            label='Prediction', color_map=dict(zip(names, map(to_hex, colors), strict=True))),
        title=f'{model.cfg.model.type}: {Path(model.checkpoint).name}', flagging_mode='never',
        analytics_enabled=False)


def find_regions(model: Model, path: str, score_threshold: float) -> tuple[np.ndarray, Regions]:
    """The RGB image (H, W, 3), and the regions that were found in it.

    Args:
        model: The model.
        path: The image's file.
        score_threshold: The minimum score of detections.

    Raises:
        UserError: The image cannot be read, or is too large to be predicted as a whole.
    """
    try:
        picture = model.predictor.open(path)
    except Exception as error:  # decoders raise errors of any type
        raise UserError(f'The image cannot be read: {failure_reason(error)}') from error
    if picture.large:
        raise UserError(f'{picture.size[1]}×{picture.size[0]} pixels are too many for a page: '
                        'tools/image_demo.py predicts large pictures piece by piece')
    result, names = model(path, score_threshold=score_threshold), model.class_names
    image = visualization.to_picture(model.predictor.load(path))
    if 'pred_sem_seg' in result.sample:
        classes = result.class_map
        regions: Regions = [((classes == i).astype(np.float32), names[i])
                            for i in np.unique(classes) if i < len(names)]
        return image, regions
    masks = result.masks
    shapes = (mask.astype(np.float32) for mask in masks) if masks is not None else (
        tuple(round(float(side)) for side in box) for box in result.boxes)
    return image, [(shape, names[label]) for shape, label in zip(shapes, result.labels,
                                                                strict=True)]
