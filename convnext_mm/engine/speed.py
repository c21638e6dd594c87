"""Applies ``fast = dict(...)`` of a config: one key per speed-up of a training step."""
from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
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
                                dynamic=False, cuda_graphs=False, triton=False)
"""The keys of ``fast`` and their defaults."""


def apply_fast(cfg: Config) -> None:
    """Apply ``cfg.fast`` to the optimizer wrapper and backbones, and add a :class:`SpeedHook`.

    Segmentors inside of a wrapper return their logits (:func:`request_logits`).

    Raises:
        UserError: It is no dict, or a key is unknown, or contradicts or lacks another.
    """
    request_logits(cfg)
    fast = cfg.get('fast')
    if not fast:
        return
    if not isinstance(fast, dict):
        raise UserError(f'fast={fast!r} must be a dict, such as fast=dict(channels_last=True)')
    for key in fast:
        if key not in DEFAULTS:
            raise UserError(f'fast.{key} is unknown.'
                            + (suggest(key, DEFAULTS) or f' Its keys: {", ".join(DEFAULTS)}'))
    settings = {**DEFAULTS, **fast}
    if settings['cuda_graphs'] and not settings['compile']:
        raise UserError("fast.cuda_graphs needs fast.compile, whose parts it captures. Set e.g. "
                        "compile=['backbone', 'decode_head']")
    if settings['cuda_graphs'] and settings['dynamic']:
        raise UserError('fast.cuda_graphs needs images of one size: remove fast.dynamic')
    wrapper = cfg.get('optim_wrapper')
    if wrapper and settings['fused_optimizer']:
        wrapper.optimizer.fused = True
    if wrapper and settings['bf16'] and wrapper.get('type') != 'CPUAmpOptimWrapper':
        # bf16 has the range of fp32, so the loss needs no scaling.
        wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=dict(enabled=False))
    if settings['triton']:
        for _, backbone in find_backbones(cfg.get('model')):
            backbone['triton'] = True
    hook = dict(type='SpeedHook', **{key: settings[key] for key in (
        'channels_last', 'compile', 'dynamic', 'cuda_graphs')})
    others = [h for h in cfg.get('custom_hooks') or [] if h['type'] != 'SpeedHook']
    cfg.custom_hooks = [*others, hook]


def request_logits(cfg: Config) -> None:
    """Let a segmentor inside of a wrapper, such as test-time augmentation, return its logits."""
    wrapped = (cfg.get('model') or {}).get('module') or {}
    if str(wrapped.get('base', wrapped.get('type'))) == 'convnext_mm.EncoderDecoder':
        wrapped['test_cfg'] = dict(wrapped.get('test_cfg') or {}, seg_logits=True)


def find_backbones(node: Any, path: str = 'model') -> Iterator[tuple[str, dict]]:
    """Yield path and config of every ConvNeXt inside a config node."""
    if isinstance(node, dict) and node.get('type') == 'ConvNeXt':
        yield path, node
    for key, value in (node.items() if isinstance(node, dict) else
                       enumerate(node) if isinstance(node, (list, tuple)) else ()):
        yield from find_backbones(value, f'{path}.{key}')


class SpeedHook(Hook):
    """Makes a model faster before it runs. Names and values of parameters do not change.

    Args:
        channels_last: Run the convolutions of neck and heads in channels_last, as the backbone
            always does. Inputs of mmcv's RoI operations are made contiguous.
        compile: Parts of the model that ``torch.compile`` compiles for training, such as
            ``['backbone', 'decode_head', 'auxiliary_head']`` or ``['roi_head.bbox_head']``.
        dynamic: Compile for images of any size; otherwise each new size is compiled again.
        cuda_graphs: Replay the compiled parts as CUDA graphs (images of one size).
    """

    priority = 'VERY_HIGH'

    def __init__(self, channels_last: bool = False, compile: tuple[str, ...] | list[str] = (),
                 dynamic: bool = False, cuda_graphs: bool = False) -> None:
        self.channels_last, self.parts = channels_last, list(compile)
        self.dynamic, self.cuda_graphs = dynamic, cuda_graphs

    def before_run(self, runner: Any) -> None:
        """Set the memory format of the model."""
        if self.channels_last:
            use_channels_last(unwrap_model(runner.model))

    def before_train(self, runner: Any) -> None:
        """Compile parts of the model.

        Raises:
            UserError: The model has no such part.
        """
        compile_parts(unwrap_model(runner.model), self.parts, self.dynamic, self.cuda_graphs)
        if self.parts:
            print_log(f'To be compiled on first use: {", ".join(self.parts)}.', logger='current')


def compile_parts(model: nn.Module, names: Iterable[str], dynamic: bool = False,
                  cuda_graphs: bool = False) -> None:
    """Compile parts of a model with ``torch.compile``; parameter names do not change.

    Args:
        model: The model that contains the parts.
        names: Submodules such as 'decode_head' or 'roi_head.bbox_head'. Of a ``ModuleList``, each
            module is compiled.
        dynamic: Compile for inputs of any size.
        cuda_graphs: Replay the parts as CUDA graphs.

    Raises:
        UserError: The model has no such part.
    """
    for name in names:
        try:
            part = model.get_submodule(name)
        except AttributeError:
            raise UserError(f'fast.compile: the model has no {name!r}; its parts: '
                            f'{", ".join(n for n, _ in model.named_children())}') from None
        for module in part if isinstance(part, nn.ModuleList) else [part]:
            # Not the module: mmseg's heads call forward directly, not __call__.
            module.forward = torch.compile(module.forward, dynamic=dynamic,
                                           mode='reduce-overhead' if cuda_graphs else None)


def use_channels_last(model: nn.Module) -> None:
    """Convert a model to channels_last, except for the inputs of mmcv's RoI operations.

    Operations such as mmcv's RoIAlign ignore strides and read memory as contiguous, so that
    other layouts silently give wrong results. Our RoI extractor takes any.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    roi_extractors = [module for module in model.modules() if hasattr(module, 'roi_layers')
                      and not getattr(module, 'takes_any_map', False)]
    for module in model.modules():
        if isinstance(module, ConvNeXt):
            module.contiguous_outputs = bool(roi_extractors)
    for extractor in roi_extractors:
        extractor.register_forward_pre_hook(_make_contiguous)


def enable_packed_inference(model: nn.Module) -> None:
    """Let inference keep weights in the form that is fastest.

    Of a ConvNeXt on a CPU, in oneDNN's layout (see its ``packed``); of the ConvModules of necks and
    heads, with the norm folded into the convolution. Later changes of parameters are noticed.
    """
    if any(type(module).__module__.startswith('mmcv.') for module in model.modules()):
        from ..fused.conv_module import fuse_conv_modules  # imports mmcv
        fuse_conv_modules(model)
    for module in model.modules():
        if isinstance(module, Packable):
            module.packed = True


def _make_contiguous(module: nn.Module, args: tuple) -> tuple:
    """Pre-hook that makes the feature maps, the first argument, contiguous."""
    feats, *others = args
    return (tuple(feat.contiguous() for feat in feats), *others)


@torch.no_grad()
def least_milliseconds(run: Callable[[], object], repeats: int) -> float:
    """The least milliseconds of some calls, after a first one that prepares.

    Without a GPU and with one thread, they are the processor's, which other jobs affect less.

    Args:
        run: What to call.
        repeats: How often, after the first.
    """
    on_gpu, times = torch.cuda.is_available(), []
    clock = time.process_time if torch.get_num_threads() == 1 and not on_gpu else time.perf_counter
    for _ in range(1 + repeats):
        begin = clock()
        run()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(clock() - begin)
    return 1e3 * min(times[1:])
