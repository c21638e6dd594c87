"""Parameters and multiply-adds of a config's model, counted on the meta device: nothing is run."""
from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from .errors import UserError
from .training import checks, fallbacks

PROPOSALS, MASKS = 1000, 100
"""RoIs that the authors' count sends through each box head and each mask head."""


class Complexity(NamedTuple):
    """``parameters`` of the whole model, ``flops`` (multiply-adds) for one picture of ``size``."""

    parameters: int
    flops: int
    size: tuple[int, int]


def build(cfg: Config) -> nn.Module:
    """The config's model on the meta device: shapes without values. ``cfg`` is fitted to here."""
    fallbacks.adapt(cfg)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    with torch.device('meta'), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of mmseg's losses, which count nothing here
        return MODELS.build(cfg.model)


def picture_size(cfg: Config) -> tuple[int, int]:
    """Width and height that the authors count with: 1280×800, or a segmentor's test scale."""
    if cfg.get('default_scope') == 'mmdet':
        return 1280, 800
    steps = cfg.test_dataloader.dataset.pipeline
    return next((tuple(step.scale) for step in steps if step.type == 'Resize'), (2048, 512))


def count(cfg: Config, size: tuple[int, int] | None = None) -> Complexity:
    """Count a config's model.

    Convolutions and products of matrices count, each multiply-add once, as in the papers' "FLOPs";
    norms, activations and resizing do not. A segmentor's auxiliary head takes no
    part in inference; a two-stage detector's heads get :data:`PROPOSALS` and :data:`MASKS`.

    Args:
        cfg: Of a segmentor or a detector; changed by :func:`build`.
        size: Width and height of the picture; not given: :func:`picture_size`.
    """
    width, height = size = size or picture_size(cfg)
    model = build(cfg).eval()
    picture = torch.empty(1, cfg.model.backbone.get('in_chans', 3), height, width, device='meta')
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.device('meta'), counter:
        if getattr(model, 'roi_head', None) is None:
            model(picture, mode='tensor')
        else:
            features = model.extract_feat(picture)
            model.rpn_head(features)
            for kind, rois in (('bbox', PROPOSALS), ('mask', MASKS)):
                _run_heads(model.roi_head, kind, rois)
    return Complexity(sum(p.numel() for p in model.parameters()),
                      counter.get_total_flops() // 2, size)


def _run_heads(roi_head: nn.Module, kind: str, rois: int) -> None:
    """Send ``rois`` feature maps through each 'bbox' or 'mask' head, without cutting them out."""
    heads, extractors = (getattr(roi_head, f'{kind}_{what}', None)
                         for what in ('head', 'roi_extractor'))
    if heads is None:
        return
    if not isinstance(heads, nn.ModuleList):
        heads, extractors = [heads], [extractors]
    for head, extractor in zip(heads, extractors, strict=True):
        head(torch.empty(rois, extractor.out_channels, *extractor.roi_layers[0].output_size))


def table(configs: Iterable[str], size: tuple[int, int] | None = None) -> str:
    """A Markdown table of configs, a row each, made with a progress bar.

    Raises:
        UserError: A config cannot be read, or built here.
    """
    rows = ['| config | parameters | FLOPs | picture |', '|---|---|---|---|']
    for path in tqdm(list(configs), unit='config', leave=False):
        cfg = checks.read_config(path)
        try:
            found = count(cfg, size)
        except UserError:
            raise
        except Exception as error:  # a user's config: anything can be wrong in it
            raise UserError(f'{path}: its model cannot be counted: {type(error).__name__}: '
                            f'{error}') from error
        rows.append(f'| `{Path(path).stem}` | {found.parameters / 1e6:.2f}M | '
                    f'{_billions(found.flops)} | {found.size[0]}×{found.size[1]} |')
    return '\n'.join(rows)


def _billions(flops: int) -> str:
    """Whole billions as in the papers' tables; decimals below ten."""
    return f'{flops / 1e9:.0f}G' if flops >= 1e10 else f'{flops / 1e9:.2g}G'
