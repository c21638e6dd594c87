"""Layer-wise learning-rate decay: the authors' rules, as pure functions.

From parameter name to depth: :func:`convnext_layer_id`, :func:`convnext_stage_id`,
:func:`convnext_block_id`, :func:`vit_layer_id`. From depth to factor: :func:`lr_scale`.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

EMBEDDINGS = ('cls_token', 'mask_token', 'pos_embed')
"""Parameters of a backbone beside its layers, which come first."""


class Rule(NamedTuple):
    """How a backbone's parameters are ordered.

    Args:
        depth: Name in the backbone → 0 to ``num_layers + 1``.
        num_layers: Layers between the stem (0) and what follows the stages.
    """

    depth: Callable[[str], int]
    num_layers: int


def convnext_layer_id(name: str, num_layers: int) -> int:
    """Depth of a ConvNeXt parameter in ``layer_wise`` decay.

    Embeddings that a subclass adds (:data:`EMBEDDINGS`) are part of the stem.

    The first two stages are one layer each, three blocks of the third stage form a layer, and the
    fourth stage (and any after it) is one layer. Output norms come last, as do neck and heads.

    Args:
        name: Parameter name in the backbone, such as ``stages.2.4.gamma``.
        num_layers: 6 for depths 3-3-9-3, 12 for depths 3-3-27-3.

    Returns:
        0 (stem) to ``num_layers + 1`` (everything after the stages).
    """
    part = name.split('.')
    if part[0] == 'downsample_layers':
        return (0, 2, 3, num_layers)[min(int(part[1]), 3)]
    if part[0] == 'stages':
        stage, block = int(part[1]), int(part[2])
        return (1, 2, 3 + block // 3, num_layers)[min(stage, 3)]
    return 0 if name in EMBEDDINGS else num_layers + 1


def convnext_stage_id(name: str, num_layers: int) -> int:
    """Depth of a ConvNeXt parameter in ``stage_wise`` decay.

    Args:
        name: Parameter name in the backbone.
        num_layers: As in :func:`convnext_layer_id`.

    Returns:
        0 (stem and downsampling), 1 to 4 (the stages), ``num_layers + 1`` (the rest).
    """
    part = name.split('.')
    if part[0] == 'downsample_layers':
        return 0
    if part[0] == 'stages':
        return int(part[1]) + 1
    return 0 if name in EMBEDDINGS else num_layers + 1


def convnext_block_id(name: str, depths: Sequence[int]) -> int:
    """Depth of a ConvNeXt parameter where each block is a layer: ``num_layers='auto'``.

    Args:
        name: Parameter name in the backbone.
        depths: Blocks per stage.

    Returns:
        0 (stem), 1 to ``sum(depths)`` (the blocks; a downsampling layer counts with the block
        after it), ``sum(depths) + 1`` (the rest).
    """
    part = name.split('.')
    if part[0] not in ('downsample_layers', 'stages'):
        return 0 if name in EMBEDDINGS else sum(depths) + 1
    stage = int(part[1])
    if part[0] == 'stages':
        return sum(depths[:stage]) + int(part[2]) + 1
    return sum(depths[:stage]) + 1 if stage else 0


def convnext_rule(depths: Sequence[int], decay_type: str = 'layer_wise',
                  num_layers: int | str | None = None) -> Rule:
    """The rule of a ConvNeXt.

    Args:
        depths: Blocks per stage.
        decay_type: 'stage_wise'; anything else is layer-wise.
        num_layers: Number of layers; 'auto': one per block, or per stage with 'stage_wise'. None:
            as many as :func:`convnext_layer_id` distinguishes (6 or 12 in the authors' recipes).
    """
    if decay_type == 'stage_wise':
        count = len(depths) if num_layers == 'auto' else _count_layers(depths, num_layers)
        return Rule(lambda name: convnext_stage_id(name, count), count)
    if num_layers == 'auto':
        return Rule(lambda name: convnext_block_id(name, depths), sum(depths))
    count = _count_layers(depths, num_layers)
    return Rule(lambda name: convnext_layer_id(name, count), count)


def _count_layers(depths: Sequence[int], num_layers: int | str | None) -> int:
    if num_layers is not None:
        return int(num_layers)
    thirds = -(-depths[2] // 3) if len(depths) > 2 else 0
    return min(len(depths), 2) + thirds + (len(depths) > 3)


def vit_layer_id(name: str, num_layers: int) -> int:
    """Depth of a BEiT or MAE parameter: 0 (embeddings) to ``num_layers + 1`` (the rest)."""
    if name in EMBEDDINGS or name.startswith('patch_embed'):
        return 0
    if name.startswith('layers'):
        return int(name.split('.')[1]) + 1
    return num_layers + 1


def lr_scale(layer_id: int, num_layers: int, decay_rate: float) -> float:
    """The factor of the learning rate at a depth: 1 at ``num_layers + 1``, smaller below."""
    return decay_rate ** (num_layers + 1 - layer_id)
