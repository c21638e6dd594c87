"""A recipe's whole training step, by OpenMMLab's backbone and by ours with each key of ``fast``.

    python benchmarks/train_step.py                             # UPerNet tiny, as its recipe says
    python benchmarks/train_step.py --config configs/RECIPE.py --size 1280x800       # a detector

Forward, losses, backward, AdamW; the data is on the device already. Drop path is the recipe's, but
for ``--drop-path``: on a CPU, what it drops is not computed here. Results go to benchmarks/results.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import measuring
import numpy as np
import peers
import torch
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from convnext_mm.training import fallbacks, speed
from convnext_mm.training.checks import read_config

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
REFERENCE = "OpenMMLab's backbone (reference)"
VARIANTS: dict[str, dict] = {
    REFERENCE: {}, 'ours': {}, 'ours, minimal': dict(memory='minimal'),
    'ours, heads channels_last': dict(channels_last=True),
    'ours, fused AdamW': dict(fused_optimizer=True),
    'ours, both': dict(channels_last=True, fused_optimizer=True)}
COMPILED: dict[str, dict] = {
    'ours, compiled': dict(compile=True),
    'ours, both, compiled': dict(channels_last=True, fused_optimizer=True, compile=True)}
if DEVICE == 'cuda':
    COMPILED['ours, both, CUDA graphs'] = dict(
        channels_last=True, fused_optimizer=True, compile=True, cuda_graphs=True)


def build(name: str, variant: dict, args: argparse.Namespace) -> tuple[nn.Module, object]:
    """Model and optimizer of the recipe, arranged as the variant says."""
    options = {'model.backbone.init_cfg': None,
               'model.backbone.memory': variant.get('memory', 'lean')}
    if args.drop_path is not None:
        options['model.backbone.drop_path_rate'] = args.drop_path
    cfg = read_config(str(args.config), options)
    if variant.get('fused_optimizer'):
        cfg.optim_wrapper.optimizer.fused = True
    fallbacks.adapt(cfg)
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('loss_scale', None)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model = revert_sync_batchnorm(model)  # there is one process
    if name == REFERENCE:
        model.backbone = peers.OpenMMLab(model.backbone)
    model.to(DEVICE).train()
    if variant.get('channels_last'):
        speed.use_channels_last(model)
    if variant.get('compile'):
        # A backbone compiled for training is slower on a CPU.
        parts = ['decode_head', 'auxiliary_head', 'neck', 'rpn_head'] + ['backbone'] * (
            DEVICE == 'cuda')
        parts = [part for part in parts if isinstance(getattr(model, part, None), nn.Module)]
        speed.compile_parts(model, parts, cuda_graphs=variant.get('cuda_graphs', False))
    return model, build_optim_wrapper(model, cfg.optim_wrapper).optimizer


def samples(model: nn.Module, pictures: int, size: tuple[int, int]) -> tuple[Tensor, list]:
    """Pictures of noise, with labels or with boxes and masks."""
    width, height = size
    generator = np.random.default_rng(0)
    x = torch.randn(pictures, 3, height, width, device=DEVICE)
    meta = dict(img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width),
                batch_input_shape=(height, width), scale_factor=(1.0, 1.0))
    found = []
    for _ in range(pictures):
        if hasattr(model, 'decode_head'):
            from mmseg.structures import SegDataSample
            labels = generator.integers(0, model.decode_head.num_classes, (1, height, width))
            sample = SegDataSample(metainfo=meta)
            sample.gt_sem_seg = PixelData(data=torch.from_numpy(labels).to(DEVICE))
        else:
            from mmdet.structures import DetDataSample
            from mmdet.structures.mask import BitmapMasks
            corner = generator.uniform(0, 0.5, (8, 2)) * size
            boxes = np.concatenate([corner, corner + generator.uniform(0.1, 0.5, (8, 2)) * size],
                                   1)
            masks = np.zeros((8, height, width), np.uint8)
            for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
                mask[top:bottom, left:right] = 1
            sample = DetDataSample(metainfo=meta)
            sample.gt_instances = InstanceData(
                bboxes=torch.from_numpy(boxes).float().to(DEVICE),
                labels=torch.from_numpy(generator.integers(0, 80, 8)).to(DEVICE),
                masks=BitmapMasks(masks, height, width))
            sample.ignored_instances = InstanceData(
                bboxes=torch.zeros(0, 4, device=DEVICE),
                labels=torch.zeros(0, dtype=torch.long, device=DEVICE))
        found.append(sample)
    return x, found


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, kind: torch.dtype,
            args: argparse.Namespace) -> Callable[[], None]:
    """One step of training; bf16 and fp16 by autocast, without a loss scaler."""
    x, data = samples(model, args.batch, args.size)

    def step() -> None:
        torch.manual_seed(0)  # the same drops for all
        with torch.autocast(DEVICE, kind, enabled=kind != torch.float32):
            loss, _ = model.parse_losses(model.loss(x, data))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return step


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', type=Path,
                        default=Path('configs/upernet_convnext_tiny_512_160k_ade20k.py'))
    parser.add_argument('--size', type=measuring.pair, default=(512, 512), metavar='WxH')
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--dtypes', nargs='+', choices=measuring.DTYPES, default=['fp32', 'bf16'])
    parser.add_argument('--drop-path', type=float, help="instead of the recipe's")
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--compile', action='store_true', help='torch.compile as well')
    parser.add_argument('--name', default='train-step', help='of the files in benchmarks/results')
    args = parser.parse_args()
    variants = {**VARIANTS, **(COMPILED if args.compile else {})}
    MMLogger.get_instance('mmengine', log_level='WARNING')  # not how each parameter begins
    tables, groups, first = [], {}, None
    title = f'{args.config.stem.split("_patch4")[0]}, {args.batch} × {args.size[0]}×{args.size[1]}'
    for dtype in args.dtypes:
        steps = {}
        for name, variant in variants.items():
            model, optimizer = build(name, variant, args)
            steps[name] = step_of(model, optimizer, measuring.DTYPES[dtype], args)
        times = measuring.in_turns(steps, args.repeats)
        if REFERENCE not in times:
            print(f'    {title}, {dtype}: left out, as the reference does not run')
            continue
        ratios = {name: times[REFERENCE] / spent for name, spent in times.items()}
        first = first or times[REFERENCE]
        lines = [f'**{title}, {dtype}**', '',
                 f'| | ms | times as fast | as the stock recipe in {args.dtypes[0]} | peak, MiB |',
                 '|---|---|---|---|---|']
        for name, spent in times.items():
            peak = measuring.peak_memory(steps[name])
            lines.append(f'| {name} | {1e3 * spent:.0f} | {ratios[name]:.2f} | '
                         f'{first / spent:.2f} | {"" if peak is None else f"{peak:.0f}"} |')
        print('\n'.join(lines), flush=True)
        tables.append('\n'.join(lines))
        groups[f'{title}, {dtype}'] = ratios
    if not groups:
        parser.exit(1, 'Nothing was measured\n')
    path = measuring.write_results(args.name, 'A training step beside the stock recipe',
                                   '\n\n'.join(tables))
    picture = path.with_suffix('.png')
    measuring.plot_ratios(picture, groups)
    with path.open('a', encoding='utf-8') as file:
        file.write(f'\n![times as fast]({picture.name})\n')
    print(f'Kept in {path}')
