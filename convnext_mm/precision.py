"""The dtype of inference: the key ``inference_dtype`` of a config, and ``--dtype`` of the tools.

A model computes under autocast in that dtype: convolutions and matrix products, while norms, and
all that follows from a head's outputs, stay in fp32. Packed layers keep their weights in the dtype.
"""
from __future__ import annotations

import functools
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import nn

from . import choices
from .errors import UserError
from .utils import suggest

DTYPES = {name: getattr(torch, kind) for name, kind in choices.DTYPES.items()}
"""The values of ``inference_dtype``."""


def model_in_dtype(base: str, inference_dtype: str, **settings: Any) -> nn.Module:
    """A model of any toolbox that infers in a dtype. Registered as 'ModelInDtype'.

    So the toolboxes' inferencers, which only build ``model`` of a config, follow the key.

    Args:
        base: Type of the model, such as 'mmdet.CascadeRCNN'.
        inference_dtype: A key of :data:`DTYPES`.
        settings: The other arguments of ``base``.

    Raises:
        UserError: See :func:`check_dtype`.
    """
    model = MODELS.build(dict(type=base, **settings))
    set_inference_dtype(model, inference_dtype)
    return model


def set_inference_dtype(model: nn.Module, name: str) -> None:
    """Let a model compute in a dtype when it predicts; training is as before.

    Raises:
        UserError: See :func:`check_dtype`; later, of a device without that dtype.
    """
    check_dtype(name)
    reset_inference_dtype(model)
    if name == 'fp32':
        return
    keep_outputs_in_fp32(model, ('conv_seg',))
    autocast = _Autocast(name)
    handles = [model.register_forward_pre_hook(autocast.enter),
               model.register_forward_hook(autocast.leave, always_call=True)]
    model.__dict__['_inference_dtype'] = name, handles


def reset_inference_dtype(model: nn.Module) -> None:
    """Undo :func:`set_inference_dtype`, as for the validations of a training."""
    _, handles = model.__dict__.pop('_inference_dtype', ('', ()))
    for handle in handles:
        handle.remove()


def inference_autocast(model: nn.Module) -> AbstractContextManager:
    """The context that predictions of a model run in, for parts of it that are called alone."""
    name, _ = model.__dict__.get('_inference_dtype', ('fp32', ()))
    if name == 'fp32' or model.training:
        return nullcontext()
    return torch.autocast(next(model.parameters()).device.type, DTYPES[name])


def has_other_hooks(model: nn.Module) -> bool:
    """Whether a model has forward hooks besides those of its inference dtype."""
    _, handles = model.__dict__.get('_inference_dtype', ('', ()))
    return not {handle.id for handle in handles}.issuperset(
        [*model._forward_hooks, *model._forward_pre_hooks])


def check_dtype(name: Any, device: str | torch.device | None = None) -> None:
    """Check an ``inference_dtype``, and whether a device is made for it.

    Raises:
        UserError: It is none of :data:`DTYPES`, or slower than fp32 on the device or unknown to it.
    """
    if name not in DTYPES:
        raise UserError(f'inference_dtype={name!r} is unknown.'
                        + (suggest(name, DTYPES) or f' Expected one of {", ".join(DTYPES)}'))
    kind = '' if device is None else torch.device(device).type
    if kind == 'cpu' and name == 'fp16':
        raise UserError('inference_dtype=fp16 on a CPU is many times slower than fp32 in PyTorch: '
                        'use bf16, or a GPU')
    if kind == 'cuda' and name == 'bf16' and not torch.cuda.is_bf16_supported(
            including_emulation=False):
        raise UserError(f'inference_dtype=bf16 is emulated on {torch.cuda.get_device_name(device)}:'
                        ' use fp16')


def keep_outputs_in_fp32(model: nn.Module, others: Collection[str] = ()) -> None:
    """Let heads that compute in half precision return fp32, and ``others`` of these names.

    Boxes are decoded from them, with anchors of their dtype, classified, suppressed and pasted:
    bf16 has steps of 4 pixels at 1000.
    """
    for name, module in model.named_modules():
        part = next((part for part in reversed(name.split('.')) if not part.isdigit()), '')
        if (part.endswith('_head') or part in others) and not any(
                hook is _to_fp32 for hook in module._forward_hooks.values()):
            module.register_forward_hook(_to_fp32)
        if hasattr(module, 'roi_layers') and not any(
                hook is _pool_in_fp32 for hook in module._forward_pre_hooks.values()):
            module.register_forward_pre_hook(_pool_in_fp32)


def _pool_in_fp32(module: nn.Module, args: tuple) -> tuple:
    """Pre-hook of a RoI extractor: mmdet's give boxes the dtype of the maps, the first argument.

    mmcv's compiled RoIAlign has no bf16 on a CPU. Ours, which is marked, needs neither.
    """
    feats, *others = args
    if getattr(module, 'takes_any_map', False):
        return args
    return (_to_fp32(module, (), tuple(feats)), *others)


def _to_fp32(module: nn.Module, args: Any, outputs: Any) -> Any:
    if isinstance(outputs, torch.Tensor):
        return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs
    if type(outputs) in (tuple, list):
        return type(outputs)(_to_fp32(module, args, one) for one in outputs)
    if type(outputs) is dict:
        return {key: _to_fp32(module, args, one) for key, one in outputs.items()}
    return outputs


class _Autocast:
    """A pair of hooks that a model's predictions run between."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entered: list[AbstractContextManager] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        """Enable autocast, unless the model trains."""
        if not module.training:
            _check_once(self.name, next(module.parameters()).device.type)
        context = inference_autocast(module)
        context.__enter__()
        self.entered.append(context)

    def leave(self, module: nn.Module, args: Any, outputs: Any) -> None:
        """Disable it again."""
        if self.entered:
            self.entered.pop().__exit__(None, None, None)


@functools.cache
def _check_once(name: str, device: str) -> None:
    check_dtype(name, device)
