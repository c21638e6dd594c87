"""A trained model on one's own pictures: input and prediction side by side."""
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
from mmengine.registry import MODELS, init_default_scope
from rich.progress import track
from torch import nn

from . import checkpoints, visualization
from .datasets import meta_of, of_split
from .datasets.findings import open_picture, reason
from .engine import checks, fallbacks, speed
from .errors import UserError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
WIDEST = 1600  # pixels of a panel


def image_demo(args: argparse.Namespace) -> None:
    """Predict and draw by ``args``: ``images``, ``config``, ``checkpoint``, ``out``, ``device``,
    ``score_threshold``, ``cfg_options``.

    Raises:
        UserError: No pictures, no model, or pictures that cannot be read (the others are drawn).
    """
    files = find_pictures(args.images)
    cfg = checks.read_config(args.config, args.cfg_options)
    predict = Predictor(cfg, args.checkpoint, args.device)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for file, name in track(list(zip(files, picture_names(files), strict=True)), 'Predicting'):
        try:
            open_picture(file)  # mmcv makes grey of what is missing at the end of a JPEG
        except Exception as error:  # decoders raise what they like
            failed.append(f'{file} ({reason(error)})')
            continue
        sample = predict(file)
        width = min(max(sample.ori_shape[1], 400), WIDEST)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        visualization.draw_sample(sample, predict.meta, out / name, ('Input', 'Prediction'), width,
                             args.score_threshold)
    print(f'{len(files) - len(failed)} pictures in {out}')
    if failed:
        raise UserError(f'{len(failed)} of {len(files)} pictures could not be read:\n  ' +
                        '\n  '.join(failed))


class Predictor:
    """A config's model with the weights of a checkpoint.

    Args:
        cfg: Completed; its test pipeline says how pictures are prepared.
        checkpoint: File or URL, of any published naming.
        device: Such as 'cuda:1'; not given: the best there is.

    Raises:
        UserError: The checkpoint cannot be read, or does not fit.
    """

    def __init__(self, cfg: Config, checkpoint: str, device: str | None = None) -> None:
        fallbacks.adapt_to_device(cfg)
        init_default_scope(cfg.default_scope)
        dataset = next(iter(of_split(cfg, 'test')))
        self.meta = meta_of(dataset, cfg.default_scope)
        self.pipeline = Compose([step for step in dataset.pipeline
                                 if step.type != 'LoadAnnotations'])
        self.model: nn.Module = MODELS.build(cfg.model)
        checkpoints.load_model(self.model, checkpoint)
        self.model.to(device or get_device()).eval()
        speed.enable_packed_inference(self.model)

    @torch.no_grad()
    def __call__(self, path: str) -> Any:
        """The SegDataSample or DetDataSample of a picture, at its own size."""
        packed = self.pipeline(dict(img_path=path, img_id=0))
        return self.model.test_step(
            dict(inputs=[packed['inputs']], data_samples=[packed['data_samples']]))[0]


def find_pictures(places: Sequence[str]) -> list[str]:
    """The pictures that files, folders (with those below them) and glob patterns mean.

    Raises:
        UserError: A place without a picture.
    """
    found: list[str] = []
    for place in places:
        if os.path.isdir(place):
            here = [os.path.join(root, name) for root, _, names in os.walk(place)
                    for name in names if name.lower().endswith(SUFFIXES)]
        elif os.path.isfile(place):
            here = [place]
        else:
            here = [path for path in glob.glob(place, recursive=True)
                    if path.lower().endswith(SUFFIXES)]
        if not here:
            raise UserError(f'No picture: {os.path.abspath(place)}. Expected a picture, a folder '
                            f'of pictures ({" ".join(SUFFIXES)}), or a pattern such as '
                            "'photos/*.jpg'")
        found += sorted(here)
    return list(dict.fromkeys(found))


def picture_names(files: Sequence[str]) -> list[Path]:
    """A name for each file's picture: below the folder that all share, each once."""
    folder = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    names: list[Path] = []
    for file in files:
        name = Path(os.path.relpath(os.path.abspath(file), folder))
        plain = name.with_suffix('.png')
        # a.jpg and a.png beside each other
        names.append(plain if plain not in names else name.with_name(f'{name.name}.png'))
    return names
