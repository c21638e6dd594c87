"""``fast = dict(...)`` of a config: what makes a step faster, a key each."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import print_log
from torch import nn

from ..backbone import ConvNeXt
from ..errors import UserError
from ..fused import Packable
from ..utils import suggest, unwrap_model

DEFAULTS: dict[str, Any] = dict(channels_last=False, fused_optimizer=False, bf16=False, compile=(),
                            dynamic=False, cuda_graphs=False,
                            triton=False)
"""The keys of ``fast``, with what they are where they are not said."""


def apply_fast(cfg: Config) -> None:
    """Turn ``cfg.fast`` into settings of the optimizer's wrapper and a :class:`SpeedHook`.

    Raises:
        UserError: A key that there is not, or one that goes with another.
    """
    fast = cfg.get('fast')
    if not fast:
        return
    for key in fast:
        if key not in DEFAULTS:
            raise UserError(f'fast.{key} is unknown.'
                            + (suggest(key, DEFAULTS) or f' Its keys: {", ".join(DEFAULTS)}'))
    settings = {**DEFAULTS, **fast}
    if settings['cuda_graphs'] and not settings['compile']:
        raise UserError("fast.cuda_graphs captures what fast.compile names: set e.g. "
                        "compile=['backbone', 'decode_head']")
    if settings['cuda_graphs'] and settings['dynamic']:
        raise UserError('fast.cuda_graphs needs pictures of one size: leave fast.dynamic out')
    wrapper = cfg.get('optim_wrapper')
    if wrapper and settings['fused_optimizer']:
        wrapper.optimizer.fused = True
    if wrapper and settings['bf16']:
        # Its range is fp32's: there is nothing to scale.
        wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=dict(enabled=False))
    if settings['triton']:
        for _, backbone in find_backbones(cfg.get('model')):
            backbone['triton'] = True
    hook = dict(type='SpeedHook', **{key: settings[key] for key in (
        'channels_last', 'compile', 'dynamic', 'cuda_graphs')})
    others = [h for h in cfg.get('custom_hooks') or [] if h['type'] != 'SpeedHook']
    cfg.custom_hooks = [*others, hook]


def find_backbones(node: Any, path: str = 'model') -> Iterator[tuple[str, dict]]:
    """(path, config) of every ConvNeXt inside ``node``."""
    if isinstance(node, dict) and node.get('type') == 'ConvNeXt':
        yield path, node
    for key, value in (node.items() if isinstance(node, dict) else
                       enumerate(node) if isinstance(node, (list, tuple)) else ()):
        yield from find_backbones(value, f'{path}.{key}')


class SpeedHook(Hook):
    """Arranges a model for speed before it is used. Its parameters' names and values stay.

    Args:
        channels_last: Convolutions of neck and heads compute in channels_last, as the backbone
            does. What is cut out of maps by mmcv's operations is made contiguous before them.
        compile: Parts of the model that ``torch.compile`` compiles in training, such as
            ``['backbone', 'decode_head', 'auxiliary_head']``, or ``['roi_head.bbox_head']``.
        dynamic: Compile for pictures of any size; else each new size compiles anew.
        cuda_graphs: Replay the compiled parts as CUDA graphs (pictures of one size).
    """

    priority = 'VERY_HIGH'

    def __init__(self, channels_last: bool = False, compile: tuple[str, ...] | list[str] = (),
                 dynamic: bool = False, cuda_graphs: bool = False) -> None:
        self.channels_last, self.parts = channels_last, list(compile)
        self.dynamic, self.cuda_graphs = dynamic, cuda_graphs

    def before_run(self, runner: Any) -> None:
        """Set the layout of the model's memory."""
        if self.channels_last:
            use_channels_last(unwrap_model(runner.model))

    def before_train(self, runner: Any) -> None:
        """Compile.

        Raises:
            UserError: A part that the model has not.
        """
        compile_parts(unwrap_model(runner.model), self.parts, self.dynamic, self.cuda_graphs)
        if self.parts:
            print_log(f'Compiled when first used: {", ".join(self.parts)}.', logger='current')


def compile_parts(model: nn.Module, names: Iterable[str], dynamic: bool = False,
                  cuda_graphs: bool = False) -> None:
    """Let ``torch.compile`` compile parts of a model; the names of parameters stay.

    Args:
        model: With the parts as attributes.
        names: Such as 'decode_head' or 'roi_head.bbox_head'; of a list of modules, each is meant.
        dynamic: Compile for inputs of any size.
        cuda_graphs: Replay the parts as CUDA graphs.

    Raises:
        UserError: A part that the model has not.
    """
    for name in names:
        try:
            part = model.get_submodule(name)
        except AttributeError:
            raise UserError(f'fast.compile: the model has no {name!r}; its parts: '
                            f'{", ".join(n for n, _ in model.named_children())}') from None
        for module in part if isinstance(part, nn.ModuleList) else [part]:
            # Not the module itself: mmseg's heads call forward without its __call__.
            module.forward = torch.compile(module.forward, dynamic=dynamic,
                                           mode='reduce-overhead' if cuda_graphs else None)


def use_channels_last(model: nn.Module) -> None:
    """Let a model's convolutions compute in channels_last; mmcv's operations get what they read.

    mmcv's RoIAlign and the like read memory as contiguous whatever a tensor's strides say, and
    compute nonsense from other layouts without a word.
    """
    model.to(memory_format=torch.channels_last)
    cutters = [module for module in model.modules() if hasattr(module, 'roi_layers')]
    for module in model.modules():
        if isinstance(module, ConvNeXt):
            module.contiguous_outputs = bool(cutters)
    for cutter in cutters:
        cutter.register_forward_pre_hook(_contiguous)


def enable_packed_inference(model: nn.Module) -> None:
    """Let inference on a CPU keep weights as oneDNN takes them (see ``packed`` of ConvNeXt)."""
    for module in model.modules():
        if isinstance(module, Packable):
            module.packed = True


def _contiguous(module: nn.Module, args: tuple) -> tuple:
    feats, *others = args
    return (tuple(feat.contiguous() for feat in feats), *others)
