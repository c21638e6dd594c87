"""Fewer channels in UPerNet's head, with the layers that follow solved by least squares.

mmseg's UPerHead has one number for all of its layers, ``channels``. Each layer keeps those of its
own that matter, but the lateral maps, which are added to each other, keep the same. The next
layer's weights are multiplied with the matrix that computes all channels from those that remain.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmseg.models.decode_heads import UPerHead
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..errors import UserError
from ..fused.conv_module import FOLDABLE, folded
from .images import Image
from .least_squares import Statistics, Use, select, substitution

MULTIPLE = 8
"""Of channels that are a share of those before, as processors like them."""
PIXELS = 2048
"""Of an image, evenly spaced, that a layer's statistics are of."""
BN = 'weight', 'bias', 'running_mean', 'running_var'


def check_upernet(model: Any, channels: int) -> Any:
    """The head of a segmentor, which is a UPerHead that can be pruned to so many channels.

    Raises:
        UserError: It is another head, without batch norms, or does not have more channels.
    """
    head: Any = getattr(model, 'decode_head', None)
    if not isinstance(head, UPerHead) or any(getattr(type(module.norm), 'forward', None)
                                             not in FOLDABLE for module in modules(head).values()):
        raise UserError('--head-channels: only a UPerHead with batch norms, or the box and mask '
                        'heads of R-CNN, can be pruned. Give --flops alone, for the backbone')
    if not 0 < channels < head.channels:
        raise UserError(f'--head-channels {channels}: expected fewer than the head has, '
                        f'{head.channels}, and at least 1')
    return head


@torch.no_grad()
def prune_head(model: Any, settings: ConfigDict, channels: int, images: Sequence[Image],
               run: Callable[[Image], object]) -> None:
    """Replace a segmentor's UPerHead by one with fewer channels.

    Args:
        model: The segmentor.
        settings: The config of its ``decode_head``.
        channels: Of the new head.
        images: To compute statistics of.
        run: Runs the model on an image.

    Raises:
        UserError: It is another head, without batch norms, or does not have more channels.
    """
    old = check_upernet(model, channels)
    new: Any = MODELS.build({**copy.deepcopy(settings), 'channels': channels})
    new.to(old.conv_seg.weight.device).eval()
    names = [*(name for name in modules(old) if name.startswith(('bottleneck', 'fpn_'))),
             'conv_seg']
    with observed(names, [old]) as seen:
        for image in images:
            run(image)
    inputs, outputs = choose(old, seen, channels)
    for name, module in modules(new).items():
        if name not in names:
            copy_layer(module, old.get_submodule(name), outputs[name])

    def run_both() -> None:
        def follow(_: nn.Module, args: tuple, maps: Sequence[Tensor]) -> None:
            new.forward(maps)

        last = model.neck if model.with_neck else model.backbone
        with ExitStack() as stack:
            stack.callback(last.register_forward_hook(follow).remove)
            for image in images:
                run(image)

    # In their order, so that each layer makes up for what those before it changed
    for prefix in 'bottleneck', 'fpn_convs', 'fpn_bottleneck', 'conv_seg':
        some = [name for name in names if name.startswith(prefix)]
        first = {name: substitution(seen[name], inputs[name]) for name in some}
        for name in some:  # with inputs of the new head's size
            copy_layer(new.get_submodule(name), old.get_submodule(name), outputs.get(name),
                       *first[name])
        with observed(some, [old, new]) as both:
            run_both()
        for name, one in both.items():
            kept = torch.arange(len(seen[name].total), len(one.total))
            copy_layer(new.get_submodule(name), old.get_submodule(name), outputs.get(name),
                       *substitution(one, kept, first[name][0]))
    model.decode_head = new.train(old.training)


@contextmanager
def observed(names: Sequence[str], heads: Sequence[nn.Module],
             positions: Mapping[str, int] | None = None) -> Iterator[dict[str, Statistics]]:
    """Statistics of the inputs of layers that run meanwhile.

    Args:
        names: Of the layers.
        heads: Of several, which run one after the other, the last one first, the channels are
            concatenated.
        positions: Of linear layers on flattened maps, the pixels of a map.
    """
    found: dict[str, Statistics] = {}
    with ExitStack() as stack:
        for name in names:
            waiting: list[Tensor] = []

            def add(_: nn.Module, args: tuple, name: str = name, waiting: list = waiting,
                    pixels: int = (positions or {}).get(name, 1)) -> None:
                x = args[0] if pixels == 1 else args[0].unflatten(1, (-1, pixels))
                x = x.movedim(1, -1).flatten(0, -2)
                waiting.insert(0, x[torch.linspace(0, len(x) - 1, min(len(x), PIXELS)).long()])
                if len(waiting) == len(heads):
                    x = torch.cat(waiting, 1)
                    found.setdefault(name, Statistics.empty(x.shape[1])).add(x)
                    waiting.clear()
            for head in heads:
                stack.callback(head.get_submodule(name).register_forward_pre_hook(add).remove)
        yield found


def modules(head: nn.Module) -> dict[str, Any]:
    """The ConvModules of a head, by name."""
    return {name: module for name, module in head.named_modules() if hasattr(module, 'with_norm')}


def choose(head: Any, seen: dict[str, Statistics], count: int
           ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The channels that each layer keeps of its input and of its output.

    Args:
        head: The head.
        seen: The statistics of its layers' inputs.
        count: Channels to keep.
    """
    channels, levels = head.channels, len(head.in_channels)

    def use(name: str, first: int = 0) -> Use:
        """By a layer, of the channels of its input from ``first`` on."""
        layer, part = head.get_submodule(name), slice(first, first + channels)
        weight = layer.weight if name == 'conv_seg' else fold(layer)[0]
        weight = weight[:, part].double()
        return Use(seen[name].covariance()[1][part, part],
                   torch.einsum('ocyx,odyx->cd', weight, weight))

    top = head.in_channels[-1]
    starts = [top + i * channels for i in range(len(head.psp_modules))]
    pools = [select([use('bottleneck', start)], count) for start in starts]
    fpn = [select([use('fpn_bottleneck', i * channels)], count) for i in range(levels - 1)]
    lateral = select([*(use(f'fpn_convs.{i}') for i in range(levels - 1)),
                      use('fpn_bottleneck', (levels - 1) * channels)], count)
    last = select([use('conv_seg')], count)
    inputs = {'bottleneck': torch.cat([torch.arange(top), *(
        start + pool for start, pool in zip(starts, pools, strict=True))]),
        'fpn_bottleneck': torch.cat([i * channels + one for i, one in enumerate([*fpn, lateral])]),
        'conv_seg': last, **{f'fpn_convs.{i}': lateral for i in range(levels - 1)}}
    outputs = {'bottleneck': lateral, 'fpn_bottleneck': last}
    for i, pool in enumerate(pools):
        outputs[f'psp_modules.{i}.1'] = pool
    for i, one in enumerate(fpn):
        outputs[f'lateral_convs.{i}'], outputs[f'fpn_convs.{i}'] = lateral, one
    return inputs, outputs


def fold(module: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a ConvModule with its norm."""
    return folded([module.conv.weight, module.conv.bias,
                   *(getattr(module.norm, name) for name in BN)], module.norm.eps)


def convolution(layer: Any) -> Any:
    """That of a ConvModule; any other layer as it is."""
    return getattr(layer, 'conv', layer)


def kernel(layer: Any, positions: int = 1) -> Tensor:
    """The weight of a layer as (outputs, inputs, positions).

    Args:
        layer: A convolution, also a transposed one, or a linear layer.
        positions: See :func:`observed`.
    """
    weight = layer.weight
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.transpose(0, 1).flatten(2)
    return weight.flatten(2) if weight.ndim == 4 else weight.unflatten(1, (-1, positions))


def copy_layer(new: Any, old: Any, outputs: Tensor | None, matrix: Tensor | None = None,
               constant: Tensor | None = None, positions: int = 1) -> None:
    """Set a layer to what another computes, with some of its channels.

    Args:
        new: A ConvModule, a convolution or a linear layer, with these channels.
        old: With all.
        outputs: The channels of the output that remain; None: all.
        matrix: From the input's channels that remain, those of ``old`` (channels, kept).
        constant: (channels,): what to add to these.
        positions: See :func:`observed`.
    """
    layer, old_layer = convolution(new), convolution(old)
    kept = slice(None) if outputs is None else outputs
    weight = kernel(old_layer, positions)[kept].double()
    added = weight.new_zeros(len(weight))
    if matrix is not None and constant is not None:
        added = weight.sum(2) @ constant
        if isinstance(layer, nn.ConvTranspose2d):  # each output has one of the positions
            added /= weight.shape[2]
        weight = torch.einsum('ocp,ck->okp', weight, matrix)
    if isinstance(layer, nn.ConvTranspose2d):
        weight = weight.transpose(0, 1)
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(old_layer.bias[kept] + added)
    if getattr(new, 'with_norm', False):
        for name in BN:
            getattr(new.norm, name).copy_(getattr(old.norm, name)[kept])
        if layer.bias is None:  # the norm subtracts a mean
            new.norm.running_mean -= added
