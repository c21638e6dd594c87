"""Parameters, multiply-adds and memory of a config's model, counted without running it."""
from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from rich.progress import track
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .engine import checks, fallbacks
from .errors import UserError
from .options import MEMORY

PROPOSALS, MASKS = 1000, 100
"""RoIs that the authors' count sends through each box head and each mask head."""


class Complexity(NamedTuple):
    """``parameters`` of the whole model, ``flops`` (multiply-adds) for one picture of ``size``."""

    parameters: int
    flops: int
    size: tuple[int, int]


def build_on_meta(cfg: Config) -> nn.Module:
    """The config's model on the meta device: shapes without values. ``cfg`` is fitted to here."""
    fallbacks.adapt_to_device(cfg)
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    with torch.device('meta'), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of mmseg's losses, which count nothing here
        return MODELS.build(cfg.model)


def input_size(cfg: Config) -> tuple[int, int]:
    """Width and height that the authors count with: 1280×800, or a segmentor's test scale."""
    if cfg.get('default_scope') == 'mmdet':
        return 1280, 800
    steps = cfg.test_dataloader.dataset.pipeline
    return next((tuple(step.scale) for step in steps if step.type == 'Resize'), (2048, 512))


def compute_complexity(cfg: Config, size: tuple[int, int] | None = None) -> Complexity:
    """Count a config's model.

    Convolutions and products of matrices count, each multiply-add once, as in the papers' "FLOPs";
    norms, activations and resizing do not. A segmentor's auxiliary head takes no
    part in inference; a two-stage detector's heads get :data:`PROPOSALS` and :data:`MASKS`.

    Args:
        cfg: Of a segmentor or a detector; changed by :func:`build_on_meta`.
        size: Width and height of the picture; not given: :func:`input_size`.
    """
    width, height = size = size or input_size(cfg)
    model = build_on_meta(cfg).eval()
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


class TrainingMemory(NamedTuple):
    """Bytes that a step of training takes at its peak.

    ``states``: weights and gradients in fp32, AdamW's two moments. ``kept``: what the backward pass
    of backbone and heads needs. ``loss``: each head's logits at the size of the pictures, as
    cross-entropy keeps them, and two more while the decode head's are gone back through.
    Workspaces of convolutions, copies of weights in half precision and fragmentation come on top.
    """

    states: int
    kept: int
    loss: int

    @property
    def total(self) -> int:
        return sum(self)


def estimate_training_memory(cfg: Config, pictures: int = 2, half: bool = True) -> TrainingMemory:
    """Reckon the memory that a segmentor trains in, from the tensors that autograd saves.

    Args:
        cfg: Of a segmentor; changed by :func:`build_on_meta`.
        pictures: A step's, at the size of its crops.
        half: Whether it trains in mixed precision.

    Raises:
        UserError: The model is no segmentor.
    """
    if 'decode_head' not in cfg.model:
        raise UserError('memory is reckoned for segmentors only: a detector\'s depends on what is '
                        'in the pictures')
    cfg.model.backbone.drop_path_rate = 0.0  # nothing is left out
    width, height = size = tuple(cfg.model.data_preprocessor.size)[::-1]
    model = build_on_meta(cfg).train()
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # or a storage's number could come again

    def pack(tensor: Tensor) -> Tensor:
        alive.append(tensor)
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor
    # Tensors without values that say they were on a CPU, whose autocast knows them.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device='cpu')
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        picture = torch.empty(pictures, cfg.model.backbone.get('in_chans', 3), height, width)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), \
                torch.autocast('cpu', torch.bfloat16, enabled=half):
            features = model.extract_feat(picture)
            heads = [head for head in (model.decode_head, getattr(model, 'auxiliary_head', None))
                     if head is not None]
            logits = [head(features) for head in heads]
    area = pictures * size[0] * size[1] * 4
    maps = [area * one.shape[1] for one in logits]
    return TrainingMemory(16 * sum(p.numel() for p in model.parameters()),
                  sum(size for key, size in kept.items() if key not in own),
                  sum(maps) + 2 * maps[0])


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


def complexity_table(configs: Iterable[str], size: tuple[int, int] | None = None,
          memory: bool = False) -> str:
    """A Markdown table of configs, a row each, made with a progress bar.

    Args:
        configs: Files.
        size: Of the picture that FLOPs are counted for, see :func:`compute_complexity`.
        memory: Whether the memory of training is reckoned as well, in GB, by what is kept.

    Raises:
        UserError: A config cannot be read, or built here.
    """
    rows = ['| config | parameters | FLOPs | picture |' + (
        ''.join(f' training, {m} |' for m in MEMORY) if memory else '')]
    rows.append('|---' * (rows[0].count('|') - 1) + '|')
    for path in track(list(configs), 'Counting', transient=True):
        cfg = checks.read_config(path)
        try:
            found = compute_complexity(cfg, size)
        except UserError:
            raise
        except Exception as error:  # a user's config: anything can be wrong in it
            raise UserError(f'{path}: its model cannot be counted: {type(error).__name__}: '
                            f'{error}') from error
        rows.append(f'| `{Path(path).stem}` | {found.parameters / 1e6:.2f}M | '
                    f'{_billions(found.flops)} | {found.size[0]}×{found.size[1]} |' + (
                        _memories(path) if memory else ''))
    return '\n'.join(rows)


def _memories(path: str) -> str:
    """Cells with the memory of training for each way of keeping activations."""
    cells = []
    for kind in MEMORY:
        cfg = checks.read_config(path, {'model.backbone.memory': kind})
        cells.append(f' {estimate_training_memory(cfg).total / 1e9:.2f} GB |')
    return ''.join(cells)


def _billions(flops: int) -> str:
    """Whole billions as in the papers' tables; decimals below ten."""
    return f'{flops / 1e9:.0f}G' if flops >= 1e10 else f'{flops / 1e9:.2g}G'
