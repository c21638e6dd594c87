"""Parameters and FLOPs of a config's model, computed without running it."""
from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from rich.progress import track
from torch.utils.flop_counter import FlopCounterMode

from .engine import checks
from .engine.building import build_on_meta, run_roi_heads
from .engine.memory import estimate_training_memory
from .errors import UserError
from .options import MEMORY

PROPOSALS, MASKS = 1000, 100
"""RoIs per box head and per mask head in the authors' FLOPs."""


class Complexity(NamedTuple):
    """Parameters and FLOPs of a model.

    Args:
        parameters: Parameters of the whole model.
        flops: Multiply-adds for one image.
        backbone_flops: Those of the backbone.
        size: Width and height of the image, in pixels.
    """

    parameters: int
    flops: int
    backbone_flops: int
    size: tuple[int, int]


def input_size(cfg: Config) -> tuple[int, int]:
    """Return the width and height of the papers: 1280×800, or a segmentor's test scale."""
    if cfg.get('default_scope') == 'mmdet':
        return 1280, 800
    steps = cfg.test_dataloader.dataset.pipeline
    return next((tuple(step.scale) for step in steps if step.type == 'Resize'), (2048, 512))


def compute_complexity(cfg: Config, size: tuple[int, int] | None = None) -> Complexity:
    """Compute parameters and FLOPs of inference.

    As in the papers, FLOPs are the multiply-adds of convolutions and matmuls, without norms,
    activations and resizing. The auxiliary head of a segmentor is excluded, since inference does
    not use it. The heads of a two-stage detector process :data:`PROPOSALS` and :data:`MASKS` RoIs.

    Args:
        cfg: A segmentor's or detector's config; changed by :func:`build_on_meta`.
        size: Width and height of the image. Default: :func:`input_size`.
    """
    width, height = size = size or input_size(cfg)
    model: Any = build_on_meta(cfg).eval()
    image = torch.empty(1, cfg.model.backbone.get('in_chans', 3), height, width, device='meta')
    counter, backbone = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with torch.no_grad(), torch.device('meta'), backbone:
        model.backbone(image)
    with torch.no_grad(), torch.device('meta'), counter:
        if getattr(model, 'roi_head', None) is None:
            model(image, mode='tensor')
        else:
            features = model.extract_feat(image)
            model.rpn_head(features)
            for kind, rois in (('bbox', PROPOSALS), ('mask', MASKS)):
                run_roi_heads(model, kind, rois, image.device)
    return Complexity(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2,
                      backbone.get_total_flops() // 2, size)


def complexity_table(configs: Iterable[str], size: tuple[int, int] | None = None,
          memory: bool = False) -> str:
    """Return a Markdown table with one row per config; show a progress bar.

    Args:
        configs: Config files.
        size: Width and height of the image, see :func:`compute_complexity`.
        memory: Whether to add the estimated training memory, in GB, for each ``memory`` option of
            the backbone.

    Raises:
        UserError: A config cannot be read, or its model cannot be built.
    """
    rows = ['| config | parameters | FLOPs | image |' + (
        ''.join(f' training, {m} |' for m in MEMORY) if memory else '')]
    rows.append('|---' * (rows[0].count('|') - 1) + '|')
    for path in track(list(configs), 'Counting', transient=True):
        cfg = checks.read_config(path)
        try:
            result = compute_complexity(cfg, size)
        except UserError:
            raise
        except Exception as error:  # a user's model can raise anything
            raise UserError(f'{path}: the FLOPs of its model cannot be computed: '
                            f'{type(error).__name__}: {error}') from error
        rows.append(f'| `{Path(path).stem}` | {result.parameters / 1e6:.2f}M | '
                    f'{_format_flops(result.flops)} | {result.size[0]}×{result.size[1]} |' + (
                        _memory_cells(path) if memory else ''))
    return '\n'.join(rows)


def _memory_cells(path: str) -> str:
    """Return table cells with the training memory for each ``memory`` option."""
    cells = []
    for kind in MEMORY:
        cfg = checks.read_config(path, {'model.backbone.memory': kind})
        cells.append(f' {estimate_training_memory(cfg).total / 1e9:.2f} GB |')
    return ''.join(cells)


def _format_flops(flops: int) -> str:
    """Format as whole billions like the papers' tables, with decimals below ten."""
    return f'{flops / 1e9:.0f}G' if flops >= 1e10 else f'{flops / 1e9:.2g}G'
