"""``tools/prune.py``: removes channels of a trained model, and solves for the weights.

Of the backbone's blocks, the hidden channels with the least share in a block's output go first. The
second 1x1 convolution is then solved anew by least squares, so that those that remain stand in for
those that are gone. For heads see :mod:`.head_pruning` and :mod:`.roi_head_pruning`.
"""
from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pprint import pformat
from typing import Any, cast

import torch
from mmengine.config import Config
from rich.progress import track
from torch import Tensor, nn

from ..backbone import ConvNeXt
from ..engine import checks, speed
from ..errors import UserError
from ..inputs import find_recipe
from ..layers import GRN, Block
from ..prediction import Predictor
from ..utils import atomic_path, writable_folder
from .checking import Metric, primary
from .head_pruning import MULTIPLE, check_upernet, prune_head
from .images import Image, ImageSource, predict_in_pytorch
from .least_squares import RIDGE, Statistics

STEP = 32
"""Channels are removed by this number, as processors like them."""
SHARES = range(90, 20, -10)
"""Percent of backbone and head that are tried for a latency."""
REPEATS = 5
"""Of a run whose time is measured."""
FEW = 4
"""Images that are enough to try sizes with: the time depends on them little."""


def main(args: argparse.Namespace) -> Path:
    """Prune a model, and write its checkpoint and a config.

    Args:
        args: ``config``, ``checkpoint``, ``flops``, ``head_channels``, ``latency_ms`` (instead of
            these two), ``out``, ``images``, ``test_images`` and ``cfg_options``.

    Returns:
        The config.

    Raises:
        UserError: The config, the weights or the data are unusable, or so few FLOPs or so short a
            time are impossible.
    """
    config = find_recipe(args.config)
    # Weights are solved for in fp32, also for a model that will predict in bf16.
    cfg = checks.read_config(config, {**(args.cfg_options or {}), 'inference_dtype': 'fp32'})
    source, test = ImageSource(cfg, 'train', args.images), ImageSource(
        cfg, 'test', args.test_images)
    for split, some in ('training', source), ('test', test):
        if not len(some):
            raise UserError(f'{config}: there are no {split} images')
    given = copy.deepcopy(cfg)  # before it is adapted to this machine
    model: Any = Predictor(cfg, args.checkpoint, 'cpu').model
    if not isinstance(model.backbone, ConvNeXt):
        raise UserError(f'{config}: only the backbone ConvNeXt can be pruned')
    flops, channels = args.flops, args.head_channels
    if channels is not None or args.latency_ms is not None:
        check_head(model, cfg.model, channels or 1)
    out = writable_folder(args.out or f'{Path(config).stem}_pruned')
    images = list(track(source, 'Reading', total=len(source)))
    if args.latency_ms is not None:
        flops, channels = sizes_for_latency(model, cfg.model, images, test[0], args.latency_ms)
    before, took = metrics(model, cfg, test), latency(model, test[0])
    changes = prune_model(model, cfg.model, images, flops, channels)
    after = metrics(model, cfg, test)
    if 'roi_head' in changes:
        from .roi_head_pruning import in_config
        changes['roi_head'] = in_config(given.model.roi_head, changes['roi_head'])
    checkpoint = out / 'pruned.pth'
    with atomic_path(checkpoint) as part:
        torch.save(dict(state_dict=model.state_dict()), part)
    path = out / f'{Path(config).stem}_pruned.py'
    settings = inherited(given, args.cfg_options or {})
    settings.merge_from_dict(dict(load_from=str(checkpoint.absolute()), model=changes))
    with atomic_path(path) as part:
        part.write_text(f'_base_ = {str(Path(config).absolute())!r}\n' + ''.join(
            f'{key} = {pformat(value, width=100, sort_dicts=False)}\n'
            for key, value in settings.to_dict().items()), encoding='utf-8')
    for key, value in before.items():
        print(f'{key}: {value:.2f} → {after.get(key, float("nan")):.2f}')
    print(f'The first test image: {took:.1f} → {latency(model, test[0]):.1f} ms')
    if flops is not None:
        print(f'Hidden channels of the blocks: {changes["backbone"]["hidden_dims"]}')
    if channels is not None:
        print(f'Channels of the head: {channels}')
    print(f'Written: {path}, {checkpoint}')
    return path


def inherited(cfg: Config, options: Mapping[str, Any]) -> Config:
    """What a config must say that inherits another one, for it to be as with these options.

    Args:
        cfg: The other one, with the options.
        options: ``--cfg-options``. Of a list, all items are repeated.
    """
    found: dict[str, Any] = {}
    for key, value in options.items():
        parts = key.split('.')
        node: Any = cfg
        for depth, part in enumerate(parts):
            node = node.get(part) if isinstance(node, (dict, Config)) else None
            if isinstance(node, (list, tuple)) and depth + 1 < len(parts):
                key, value = '.'.join(parts[:depth + 1]), copy.deepcopy(node)
                break
        found[key] = value
    settings = Config()
    settings.merge_from_dict(found)
    return settings


def check_head(model: Any, settings: Any, channels: int) -> None:
    """Check that the heads of a model can be pruned, before anything is computed.

    Raises:
        UserError: They cannot, or not to so many channels.
    """
    if 'roi_head' in settings:
        from .roi_head_pruning import chains_of  # of mmdet, which may be missing
        chains_of(model, settings.roi_head, channels)
    else:
        check_upernet(model, channels)


def prune_model(model: Any, settings: Any, images: Sequence[Image], flops: float | None,
                channels: int | None) -> dict[str, Any]:
    """Prune backbone and head, in place.

    Args:
        model: The model.
        settings: Its config.
        images: To compute statistics of.
        flops: The share of the backbone's FLOPs that remains; None: all.
        channels: Of the head; None: as they are.

    Returns:
        What changes in the config; of ``roi_head``, see :func:`.roi_head_pruning.prune_roi_heads`.

    Raises:
        UserError: Such sizes are impossible.
    """
    changes: dict[str, Any] = dict(backbone=dict(init_cfg=None))

    def run(image: Image) -> object:
        return predict_in_pytorch(model, [image])

    if flops is not None:
        changes['backbone']['hidden_dims'] = prune(model.backbone, images, run, flops)
    if channels is not None:
        if 'roi_head' in settings:
            from .roi_head_pruning import prune_roi_heads
            changes['roi_head'] = prune_roi_heads(model, settings.roi_head, channels, images, run)
        else:
            prune_head(model, settings.decode_head, channels, images, run)
            changes['decode_head'] = dict(channels=channels)
        speed.enable_packed_inference(model)
    return changes


def sizes_for_latency(model: Any, settings: Any, images: Sequence[Image], image: Image,
                      limit: float) -> tuple[float, int | None]:
    """The largest share of backbone and head with which an image takes no longer than a limit.

    Args:
        model: The model; it stays as it is.
        settings: Its config.
        images: To compute statistics of.
        image: The image whose time counts.
        limit: Milliseconds.

    Returns:
        The share of the backbone's FLOPs, and the channels of the head; None: it has too few to
        remove some.

    Raises:
        UserError: No pruning is needed, or even the smallest share takes longer.
    """
    took = latency(model, image)
    print(f'100 %: {took:.0f} ms')
    if took <= limit:
        raise UserError(f'--latency-ms {limit:g}: an image takes {took:.0f} ms already')
    before = head_channels(model)
    for percent in SHARES:
        candidate = copy.deepcopy(model)
        some = max(before * percent // 100 // MULTIPLE, 1) * MULTIPLE
        channels = some if some < before else None
        prune_model(candidate, settings, images[:FEW], percent / 100, channels)
        took = latency(candidate, image)
        print(f'{percent} %, {channels or before} channels: {took:.0f} ms')
        if took <= limit:
            return percent / 100, channels
    raise UserError(f'--latency-ms {limit:g}: with {SHARES[-1]} % an image takes {took:.0f} ms. '
                    'Choose a smaller recipe (tools/choose_model.py) or smaller images')


def head_channels(model: Any) -> int:
    """The channels of a UPerHead, or of the first box head's convolutions or RoIs."""
    if not hasattr(model, 'roi_head'):
        return model.decode_head.channels
    heads = model.roi_head.bbox_head
    head: Any = heads[0] if isinstance(heads, nn.ModuleList) else heads
    return head.conv_out_channels if len(head.shared_convs) else head.in_channels


def latency(model: Any, image: Image) -> float:
    """The milliseconds that an image takes."""
    return speed.least_milliseconds(lambda: predict_in_pytorch(model, [image]), REPEATS)


def metrics(model: nn.Module, cfg: Config, source: ImageSource) -> dict[str, float]:
    """The primary metrics of a model, in percent."""
    metric = Metric(cfg, source.dataset, len(source) == len(source.dataset))
    for image in track(source, 'Testing', total=len(source)):
        metric.add(predict_in_pytorch(model, [image]))
    return primary(metric.values())


@torch.no_grad()
def prune(backbone: ConvNeXt, images: Sequence[Image], run: Callable[[Image], object],
          share: float) -> list[list[int]]:
    """Remove hidden channels, in place.

    Args:
        backbone: The backbone.
        images: To compute statistics of.
        run: Runs the model on an image.
        share: Of the backbone's FLOPs that remains.

    Returns:
        The hidden channels of each block, a list per stage.

    Raises:
        UserError: So few FLOPs are impossible.
    """
    blocks = [cast(Block, block) for stage in backbone.stages for block in cast(
        nn.Sequential, stage)]
    flops = Counter(backbone)
    with flops, observed(blocks) as statistics:
        for image in images:
            run(image)
    chosen = choose(blocks, statistics, flops.total, share)
    pruned = [smaller(block, keep) for block, keep in zip(blocks, chosen, strict=True)]
    with refitted(blocks, pruned) as solve:
        for image in images if any(isinstance(block.grn, GRN) for block in blocks) else ():
            run(image)
        for block, new, one, keep in zip(blocks, pruned, statistics, chosen, strict=True):
            solve(block, new, one, keep)
    sizes = iter(len(keep) for keep in chosen)
    return [[next(sizes) for _ in cast(nn.Sequential, stage)] for stage in backbone.stages]


class Counter:
    """Counts the multiplications of a module's layers while it is entered."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.total = module, 0

    def __enter__(self) -> None:
        self.handles = [layer.register_forward_hook(self._count) for layer in self.module.modules()
                        if isinstance(layer, (nn.Conv2d, nn.Linear))]

    def _count(self, layer: Any, args: tuple, out: Tensor) -> None:
        self.total += out.numel() * layer.weight[0].numel()

    def __exit__(self, *args: object) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def observed(blocks: Sequence[Block]) -> Iterator[list[Statistics]]:
    """The statistics of blocks that run meanwhile."""
    found, handles = [], []
    for block in blocks:
        one = Statistics.empty(block.pwconv2.in_features)

        def add(layer: nn.Module, args: tuple, one: Statistics = one) -> None:
            one.add(args[0].flatten(0, -2))

        def add_output(layer: nn.Module, args: tuple, out: Tensor, one: Statistics = one) -> None:
            one.output += float(out.float().square().sum())

        found.append(one)
        handles += [block.pwconv2.register_forward_pre_hook(add),
                    block.register_forward_hook(add_output)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def choose(blocks: Sequence[Block], statistics: Sequence[Statistics], flops: int, share: float
           ) -> list[Tensor]:
    """The channels to keep of each block, in ascending order.

    Removes groups of channels whose part in the output of their block, relative to that output, is
    smallest for the multiplications that they take.

    Raises:
        UserError: So few FLOPs are impossible.
    """
    orders, groups, costs = [], [], []
    for block, one in zip(blocks, statistics, strict=True):
        _, covariance = one.covariance()
        weight = block.pwconv2.weight.double()
        if block.gamma is not None:
            weight = weight * block.gamma.double()[:, None]
        energy = covariance.diagonal() * weight.square().sum(0) * one.count / max(one.output, 1e-20)
        order = energy.argsort(descending=True)
        first = len(order) % STEP or STEP
        sizes = [first, *[STEP] * ((len(order) - first) // STEP)]
        costs.append(2 * len(weight) * one.count)
        orders.append(order)
        groups.append([(float(part.sum()), len(part)) for part in energy[order].split(sizes)])
    while flops > 0:
        total = flops - sum(cost * (len(order) - sum(n for _, n in group)) for cost, order, group
                            in zip(costs, orders, groups, strict=True))
        if total <= share * flops:
            break
        removable = [(group[-1][0] / (group[-1][1] * cost), i) for i, (group, cost) in enumerate(
            zip(groups, costs, strict=True)) if len(group) > 1]
        if not removable:
            raise UserError(f'--flops {share} is impossible: with {STEP} hidden channels in each '
                            f'block, {total / flops:.2f} of the FLOPs remain')
        groups[min(removable)[1]].pop()
    return [order[:sum(n for _, n in group)].sort().values
            for order, group in zip(orders, groups, strict=True)]


def smaller(block: Block, keep: Tensor) -> nn.ModuleDict:
    """The layers of a block with some of its hidden channels; ``pwconv2`` is not solved yet."""
    first, second = block.pwconv1, block.pwconv2
    layers: Any = nn.ModuleDict(dict(pwconv1=type(first)(first.in_features, len(keep)),
                                     pwconv2=type(second)(len(keep), second.out_features),
                                     grn=block.grn))
    layers.pwconv1.weight.copy_(first.weight[keep])
    layers.pwconv1.bias.copy_(first.bias[keep])
    if isinstance(block.grn, GRN):
        layers['grn'] = GRN(len(keep))
        for name in ('gamma', 'beta'):
            getattr(layers.grn, name).copy_(getattr(block.grn, name)[..., keep])
    for parameter in layers.parameters():
        parameter.requires_grad_(first.weight.requires_grad)
    return layers.to(first.weight.device).eval()


@contextmanager
def refitted(blocks: Sequence[Block], pruned: Sequence[Any]) -> Iterator[Callable[..., None]]:
    """Replaces layers of blocks by smaller ones, after the original blocks ran meanwhile.

    GRN divides by the mean over all channels: with fewer, its outputs are others, and have to be
    seen. Without GRN, the statistics of the original block are enough.
    """
    seen: dict[Block, list[Tensor]] = {}
    normed: dict[Block, Tensor] = {}
    handles = []
    for block, new in zip(blocks, pruned, strict=True):
        if not isinstance(block.grn, GRN):
            continue
        sizes = block.pwconv2.in_features, new.pwconv2.in_features
        seen[block] = [torch.zeros(shape, dtype=torch.double) for shape in (
            (), (sizes[0],), (sizes[1],), (sizes[0], sizes[1]), (sizes[1], sizes[1]))]

        def add(layer: nn.Module, args: tuple, out: Tensor, block: Block = block, new: Any = new
                ) -> None:
            old = out.flatten(0, -2).float()
            x = new.grn(block.act(new.pwconv1(normed[block]))).flatten(0, -2).float()
            for total, value in zip(seen[block], (
                    torch.tensor(float(len(x))), old.sum(0), x.sum(0), old.t() @ x, x.t() @ x),
                    strict=True):
                total += value.double()

        def remember(layer: nn.Module, args: tuple, block: Block = block) -> None:
            normed[block] = args[0]

        handles += [block.pwconv1.register_forward_pre_hook(remember),
                    block.grn.register_forward_hook(add)]

    def solve(block: Block, new: Any, one: Statistics, keep: Tensor) -> None:
        if block in seen:
            count, old, total, products, own = seen[block]
            old_mean, mean = old / count, total / count
            cross = products / count - torch.outer(old_mean, mean)
            covariance = own / count - torch.outer(mean, mean)
        else:
            old_mean, whole = one.covariance()
            mean, cross, covariance = old_mean[keep], whole[:, keep], whole[keep][:, keep]
        weight = block.pwconv2.weight.double()
        ridge = RIDGE * covariance.diagonal().mean().clamp(min=1e-20)
        covariance = covariance + ridge * torch.eye(len(keep), dtype=torch.double)
        solved = torch.linalg.solve(covariance, (weight @ cross).t()).t()
        new.pwconv2.weight.copy_(solved)
        new.pwconv2.bias.copy_(block.pwconv2.bias.double() + weight @ old_mean - solved @ mean)
        block.pwconv1, block.pwconv2, block.grn = new.pwconv1, new.pwconv2, new.grn
    try:
        yield solve
    finally:
        for handle in handles:
            handle.remove()
