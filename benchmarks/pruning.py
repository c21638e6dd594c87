"""Compare ways to prune a trained backbone to equal FLOPs, without training on.

    python benchmarks/pruning.py CONFIG CHECKPOINT --flops 0.8 0.6 0.4

All start from the same weights and remove hidden channels of the blocks alone, in multiples of 32:
tools/prune.py; the same channels without the least squares; the smallest norms, the same share of
each block; and DepGraph of torch-pruning (Fang et al., "DepGraph: Towards Any Structural Pruning",
2023), which ranks the groups of all blocks by their norms. Results go to benchmarks/results.
"""
from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import measuring
import torch
import torch_pruning
from mmengine.logging import MMLogger
from torch import Tensor, nn

from convnext_mm.deployment import pruning
from convnext_mm.deployment.images import Image, ImageSource, predict_in_pytorch
from convnext_mm.engine import checks
from convnext_mm.prediction import Predictor

Run = Callable[[Image], object]


def blocks_of(backbone: Any) -> list[Any]:
    """All blocks."""
    return [block for stage in backbone.stages for block in stage]


def cost_of(model: Any, images: Sequence[Image]) -> int:
    """Multiplications of the backbone on an image."""
    counter = pruning.Counter(model.backbone)
    with counter:
        predict_in_pytorch(model, images[:1])
    return counter.total


def keep(block: Any, kept: Tensor) -> None:
    """Leave some hidden channels of a block, with the weights that they have."""
    old = block.pwconv2.weight[:, kept].clone()
    layers = pruning.smaller(block, kept)
    layers.pwconv2.weight.copy_(old)
    layers.pwconv2.bias.copy_(block.pwconv2.bias)
    block.pwconv1, block.pwconv2, block.grn = layers.pwconv1, layers.pwconv2, layers.grn


def least_squares(model: Any, images: Sequence[Image], share: float) -> None:
    """tools/prune.py."""
    pruning.prune(model.backbone, images, lambda image: predict_in_pytorch(model, [image]), share)


def same_channels(model: Any, images: Sequence[Image], share: float) -> None:
    """The channels of tools/prune.py, with the weights that they have."""
    solved = copy.deepcopy(model)
    least_squares(solved, images, share)
    for block, other in zip(blocks_of(model.backbone), blocks_of(solved.backbone), strict=True):
        rows = other.pwconv1.weight
        distances = (block.pwconv1.weight[None] - rows[:, None]).abs().sum(2)
        keep(block, distances.argmin(1).sort().values)


def norms(block: Any) -> Tensor:
    """Of each hidden channel, the L2 norm of its weights in both linear layers."""
    return (block.pwconv1.weight.square().sum(1) + block.pwconv2.weight.square().sum(0)).sqrt()


def magnitude(model: Any, images: Sequence[Image], share: float) -> None:
    """The smallest norms, the same share of each block."""
    limit, original = share * cost_of(model, images), model.backbone
    for percent in range(99, 0, -1):
        model.backbone = copy.deepcopy(original)
        for block in blocks_of(model.backbone):
            width = block.pwconv1.out_features
            count = max(round(width * percent / 100 / pruning.STEP), 1) * pruning.STEP
            keep(block, norms(block).topk(min(count, width)).indices.sort().values)
        if cost_of(model, images) <= limit:
            return


def depgraph(model: Any, images: Sequence[Image], share: float) -> None:
    """torch-pruning, over all blocks."""
    limit, backbone = share * cost_of(model, images), model.backbone
    roots = [block.pwconv1 for block in blocks_of(backbone)]
    ignored = [layer for layer in backbone.modules()
               if isinstance(layer, (nn.Linear, nn.Conv2d)) and layer not in roots]
    with torch.enable_grad():
        pruner = torch_pruning.pruner.BasePruner(
            backbone, torch.randn(1, 3, 160, 160),
            torch_pruning.importance.GroupMagnitudeImportance(p=2), global_pruning=True,
            pruning_ratio=0.95, iterative_steps=200, ignored_layers=ignored, round_to=pruning.STEP)
        while cost_of(model, images) > limit:
            pruner.step()


METHODS = {
    'tools/prune.py': least_squares, 'the same channels, no least squares': same_channels,
    'magnitude, the same share of each block': magnitude,
    f'DepGraph, torch-pruning {version("torch-pruning")}': depgraph}


def compare(args: argparse.Namespace) -> str:
    """Prune in every way and test; return a table."""
    options = {'model.backbone.memory': 'plain'}  # DepGraph traces the plain layers
    cfg = checks.read_config(args.config, options)
    train, test = ImageSource(cfg, 'train', args.images), ImageSource(cfg, 'test', None)
    model: Any = Predictor(cfg, args.checkpoint, 'cpu').model
    images = list(train)
    before, whole = pruning.metrics(model, cfg, test), cost_of(model, images)
    lines = ['| | FLOPs of the backbone | ' + ' | '.join(before) + ' |',
             '|---' * (2 + len(before)) + '|',
             '| before | 1.00 | ' + ' | '.join(f'{value:.2f}' for value in before.values()) + ' |']
    for share in args.flops:
        for name, method in METHODS.items():
            pruned = copy.deepcopy(model)
            with torch.no_grad():
                method(pruned, images, share)
            left, after = cost_of(pruned, images) / whole, pruning.metrics(pruned, cfg, test)
            lines.append(f'| {name} | {left:.2f} | ' + ' | '.join(
                f'{after[key]:.2f}' for key in before) + ' |')
            print(lines[-1], flush=True)
    return '\n'.join(lines)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('--flops', type=float, nargs='+', default=[0.8, 0.6, 0.4])
    parser.add_argument('--images', type=int, default=100)
    parser.add_argument('--name', help='name of the result file in benchmarks/results')
    args = parser.parse_args()
    MMLogger.get_instance('mmengine', log_level='WARNING')
    table = compare(args)
    print(table)
    if args.name:
        title = 'Pruned backbones, not trained on'
        print(f'Results: {measuring.write_results(args.name, title, table)}')
