"""Fewer channels in the box and mask heads of R-CNN, as :mod:`.head_pruning` does it for UPerNet.

Such a head is a chain: each layer keeps those channels of its output from which the layers that
follow can be computed best, and these are solved anew by least squares.
"""
from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from mmdet.models.roi_heads.bbox_heads import ConvFCBBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.registry import MODELS
from torch import Tensor, nn

from ..errors import UserError
from ..fused.conv_module import FOLDABLE
from .head_pruning import (
    MULTIPLE,
    convolution,
    copy_layer,
    fold,
    kernel,
    modules,
    observed,
)
from .images import Image
from .least_squares import Statistics, Use, select, substitution


class Chain:
    """A head, and a smaller one in its place.

    Args:
        old: The head.
        settings: Its config.
        channels: Of the new head's convolutions.

    Raises:
        UserError: The head is of another kind, or does not have more channels.

    Attributes:
        changes: The keys of the config that differ.
        steps: Names of layers, in their order; those of one step have the same input.
        positions: See :func:`.head_pruning.observed`.
    """

    def __init__(self, old: Any, settings: Any, channels: int) -> None:
        self.old, self.steps, self.positions = old, steps_of(old), positions_of(old)
        if not self.steps or any(getattr(type(module.norm), 'forward', None) not in FOLDABLE
                                 for module in modules(old).values() if module.with_norm):
            raise UserError(
                f'--head-channels: {type(old).__name__} cannot be pruned. Expected a box head of '
                'shared layers, or a mask head of convolutions, without norms or with batch norms')
        before = old.conv_out_channels if modules(old) else old.in_channels
        if not 0 < channels < before:
            raise UserError(f'--head-channels {channels}: expected fewer than the heads have, '
                            f'{before}, and at least 1')
        self.changes = dict(conv_out_channels=channels) if modules(old) else {}
        if isinstance(old, ConvFCBBoxHead) and old.num_shared_fcs:
            share = round(old.fc_out_channels * channels / before / MULTIPLE)
            self.changes['fc_out_channels'] = max(share, 1) * MULTIPLE
        self.new: Any = MODELS.build({**copy.deepcopy(settings), **self.changes})
        self.new.to(next(old.parameters()).device).eval()

    def kernel(self, head: Any, name: str) -> Tensor:
        """The weight of a layer of one of the heads, see :func:`.head_pruning.kernel`."""
        return kernel(convolution(head.get_submodule(name)), self.positions.get(name, 1))

    def choose(self, seen: dict[str, Statistics]) -> list[Tensor | None]:
        """The channels of the input that remain, for each step; None: all."""
        kept: list[Tensor | None] = [None]
        for step in range(1, len(self.steps)):
            uses = []
            for name in self.steps[step]:
                module = self.old.get_submodule(name)
                weight = (fold(module)[0].flatten(2) if getattr(module, 'with_norm', False)
                          else self.kernel(self.old, name)).double()
                uses.append(Use(seen[name].covariance()[1],
                                torch.einsum('ocp,odp->cd', weight, weight)))
            count = self.kernel(self.new, self.steps[step][0]).shape[1]
            kept.append(select(uses, count))
        return [*kept, None]  # the outputs of the last step

    def copy(self, step: int, kept: Sequence[Tensor | None],
             solved: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Set the new head's layers of a step, with solutions for their inputs."""
        for name in self.steps[step]:
            matrix, constant = solved.get(name, (None, None))
            copy_layer(self.new.get_submodule(name), self.old.get_submodule(name), kept[step + 1],
                       matrix, constant, self.positions.get(name, 1))


def steps_of(head: Any) -> list[list[str]]:
    """The layers of a head, see :class:`Chain`; none: it is of a kind that is not known."""
    if isinstance(head, ConvFCBBoxHead) and not (head.num_cls_convs or head.num_cls_fcs or
                                                 head.num_reg_convs or head.num_reg_fcs or
                                                 head.with_avg_pool or not head.num_shared_fcs):
        return [*([f'shared_convs.{i}'] for i in range(head.num_shared_convs)),
                *([f'shared_fcs.{i}'] for i in range(head.num_shared_fcs)),
                [name for name in ('fc_cls', 'fc_reg') if hasattr(head, name)]]
    if isinstance(head, FCNMaskHead) and head.num_convs and head.upsample_method == 'deconv':
        return [*([f'convs.{i}'] for i in range(head.num_convs)), ['upsample'], ['conv_logits']]
    return []


def positions_of(head: Any) -> dict[str, int]:
    """The linear layer of a box head that has flattened maps, and their pixels."""
    return {'shared_fcs.0': head.roi_feat_area} if isinstance(head, ConvFCBBoxHead) else {}


def chains_of(model: Any, settings: Any, channels: int) -> dict[str, list[Chain]]:
    """The box and mask heads of a detector, with smaller ones in their places.

    Args:
        model: See :func:`prune_roi_heads`.
        settings: See there.
        channels: See there.

    Raises:
        UserError: See :class:`Chain`.
    """
    chains: dict[str, list[Chain]] = {}
    for key in 'bbox_head', 'mask_head':
        heads = getattr(model.roi_head, key, None)
        old = list(heads) if isinstance(heads, nn.ModuleList) else [heads] * (heads is not None)
        given = settings.get(key)
        configs = given if isinstance(given, (list, tuple)) else [given] * len(old)
        chains[key] = [Chain(head, config, channels) for head, config in zip(
            old, configs, strict=True)]
    return chains


@torch.no_grad()
def prune_roi_heads(model: Any, settings: Any, channels: int, images: Sequence[Image],
                    run: Callable[[Image], object]) -> dict[str, list[dict[str, int]]]:
    """Replace a detector's box and mask heads by those with fewer channels.

    Args:
        model: The detector.
        settings: The config of its ``roi_head``.
        channels: Of the convolutions of the new heads. Their linear layers get the same share of
            theirs; of heads without convolutions, ``channels`` is a share of the RoIs' channels.
        images: To compute statistics of.
        run: Runs the model on an image.

    Returns:
        What changes in the config of each ``bbox_head`` and ``mask_head``.

    Raises:
        UserError: See :class:`Chain`; or nothing is detected on these images.
    """
    chains = chains_of(model, settings, channels)
    solve([chain for some in chains.values() for chain in some],
          lambda: [run(image) for image in images])
    for key, some in chains.items():
        for i, chain in enumerate(some):
            new = chain.new.train(chain.old.training)
            if isinstance(getattr(model.roi_head, key), nn.ModuleList):
                getattr(model.roi_head, key)[i] = new
            else:
                setattr(model.roi_head, key, new)
    return {key: [chain.changes for chain in some] for key, some in chains.items() if some}


def in_config(settings: Any, changes: dict[str, list[dict[str, int]]]) -> dict[str, Any]:
    """What a config that inherits another must say of ``roi_head``.

    Args:
        settings: What the other says of it.
        changes: Of :func:`prune_roi_heads`. A list of heads is repeated as a whole.
    """
    return {key: [{**head.to_dict(), **new} for head, new in zip(settings[key], some, strict=True)]
            if isinstance(settings[key], (list, tuple)) else some[0]
            for key, some in changes.items()}


def solve(chains: Sequence[Chain], run: Callable[[], object]) -> None:
    """Set the weights of new heads, step by step, while something runs the old ones."""
    with ExitStack() as stack:
        seen = [stack.enter_context(observed([name for step in chain.steps[1:] for name in step],
                                             [chain.old], chain.positions)) for chain in chains]
        run()
    for chain, statistics in zip(chains, seen, strict=True):
        if not statistics:
            raise UserError(f'--head-channels: {type(chain.old).__name__} was not used, since '
                            'nothing is detected on the training images. Use more images, or a '
                            'model that was trained longer')
    kept = [chain.choose(one) for chain, one in zip(chains, seen, strict=True)]
    for i, chain in enumerate(chains):
        chain.copy(0, kept[i], {})
    for step in range(1, max(len(chain.steps) for chain in chains)):
        left = [i for i, chain in enumerate(chains) if step < len(chain.steps)]
        # Each layer makes up for what those before it changed.
        with ExitStack() as stack:
            both = {i: stack.enter_context(observed(
                chains[i].steps[step], [chains[i].old, chains[i].new], chains[i].positions))
                for i in left}
            for i in left:
                def follow(_: nn.Module, args: tuple, new: nn.Module = chains[i].new) -> None:
                    new(*args)
                stack.callback(chains[i].old.register_forward_pre_hook(follow).remove)
            run()
        for i in left:
            solved, channels = {}, kept[i][step]
            assert channels is not None
            for name, one in both[i].items():
                count = len(seen[i][name].total)
                solved[name] = substitution(one, torch.arange(count, len(one.total)),
                                            substitution(seen[i][name], channels)[0])
            chains[i].copy(step, kept[i], solved)
