"""Time the training step of a recipe with OpenMMLab's model, and with ours and ``fast`` options.

    python benchmarks/train_step.py                             # UPerNet tiny with its own settings
    python benchmarks/train_step.py --config configs/RECIPE.py --size 1280x800       # a detector

A step consists of forward pass, losses, backward pass and AdamW, on data that is already on the
device. The drop path rate is the recipe's unless ``--drop-path`` sets it; on a CPU, our backbone
does not compute dropped branches. Results go to benchmarks/results.
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
from mmengine.optim import build_optim_wrapper
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from convnext_mm.engine import speed
from convnext_mm.engine.checks import read_config

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
BASELINE = "OpenMMLab's model (baseline)"
VARIANTS: dict[str, dict] = {
    BASELINE: {}, 'ours': {}, 'ours, minimal': dict(memory='minimal'),
    'ours, heads channels_last': dict(channels_last=True),
    'ours, fused AdamW': dict(fused_optimizer=True),
    'ours, both': dict(channels_last=True, fused_optimizer=True)}
COMPILED: dict[str, dict] = {
    'ours, compiled': dict(compile=True),
    'ours, both, compiled': dict(channels_last=True, fused_optimizer=True, compile=True)}
if DEVICE == 'cuda':
    VARIANTS |= {'ours, Triton': dict(triton=True), 'ours, both, Triton': dict(
        channels_last=True, fused_optimizer=True, triton=True)}
    COMPILED['ours, both, CUDA graphs'] = dict(
        channels_last=True, fused_optimizer=True, compile=True, cuda_graphs=True)


def build_variant(name: str, variant: dict, args: argparse.Namespace) -> tuple[nn.Module, object]:
    """Build the model and optimizer of the recipe with the options of a variant."""
    options = {'model.backbone.init_cfg': None,
               'model.backbone.memory': variant.get('memory', 'lean'),
               'model.backbone.triton': variant.get('triton', False)}
    if args.drop_path is not None:
        options['model.backbone.drop_path_rate'] = args.drop_path
    cfg = read_config(str(args.config), options)
    if variant.get('fused_optimizer'):
        cfg.optim_wrapper.optimizer.fused = True
    model = peers.build_recipe(cfg, stock=name == BASELINE).to(DEVICE).train()
    if variant.get('channels_last'):
        speed.use_channels_last(model)
    if variant.get('compile'):
        # A backbone compiled for training is slower on a CPU.
        parts = ['decode_head', 'auxiliary_head', 'neck', 'rpn_head'] + ['backbone'] * (
            DEVICE == 'cuda')
        parts = [part for part in parts if isinstance(getattr(model, part, None), nn.Module)]
        speed.compile_parts(model, parts, cuda_graphs=variant.get('cuda_graphs', False))
    return model, build_optim_wrapper(model, cfg.optim_wrapper).optimizer


def random_batch(model: nn.Module, count: int, size: tuple[int, int]) -> tuple[Tensor, list]:
    """Return images of noise, and data samples with labels or with boxes and masks."""
    width, height = size
    generator = np.random.default_rng(0)
    x = torch.randn(count, 3, height, width, device=DEVICE)
    meta = dict(img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width),
                batch_input_shape=(height, width), scale_factor=(1.0, 1.0))
    samples = []
    for _ in range(count):
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
            classes = max(getattr(part, 'num_classes', 1) for part in model.modules())
            masks = np.zeros((8, height, width), np.uint8)
            for mask, (left, top, right, bottom) in zip(masks, boxes.astype(int), strict=True):
                mask[top:bottom, left:right] = 1
            sample = DetDataSample(metainfo=meta)
            sample.gt_instances = InstanceData(
                bboxes=torch.from_numpy(boxes).float().to(DEVICE),
                labels=torch.from_numpy(generator.integers(0, classes, 8)).to(DEVICE),
                masks=BitmapMasks(masks, height, width))
            sample.ignored_instances = InstanceData(
                bboxes=torch.zeros(0, 4, device=DEVICE),
                labels=torch.zeros(0, dtype=torch.long, device=DEVICE))
        samples.append(sample)
    return x, samples


def make_step(model: nn.Module, optimizer: torch.optim.Optimizer, kind: torch.dtype,
              args: argparse.Namespace) -> Callable[[], None]:
    """Return a training step; bf16 and fp16 use autocast without a loss scaler."""
    x, samples = random_batch(model, args.batch, args.size)

    def step() -> None:
        torch.manual_seed(0)  # the same branches are dropped in every variant
        with torch.autocast(DEVICE, kind, enabled=kind != torch.float32):
            loss, _ = model.parse_losses(model.loss(x, samples))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return step


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', type=Path,
                        default=Path('configs/upernet_convnext_tiny_512_160k_ade20k.py'))
    parser.add_argument('--size', type=measuring.parse_size, default=(512, 512), metavar='WxH')
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--dtypes', nargs='+', choices=measuring.DTYPES, default=['fp32', 'bf16'])
    parser.add_argument('--drop-path', type=float, help="replaces the recipe's rate")
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--compile', action='store_true', help='measure torch.compile as well')
    parser.add_argument('--name', default='train-step',
                        help='name of the result files in benchmarks/results (train-step)')
    args = parser.parse_args()
    variants = {**VARIANTS, **(COMPILED if args.compile else {})}
    MMLogger.get_instance('mmengine', log_level='WARNING')  # hide how each parameter is initialized
    tables, groups, first = [], {}, None
    title = f'{args.config.stem.split("_patch4")[0]}, {args.batch} × {args.size[0]}×{args.size[1]}'
    for dtype in args.dtypes:
        steps = {}
        for name, variant in variants.items():
            model, optimizer = build_variant(name, variant, args)
            steps[name] = make_step(model, optimizer, measuring.DTYPES[dtype], args)
        times = measuring.time_interleaved(steps, args.repeats)
        if BASELINE not in times:
            print(f'    {title}, {dtype}: skipped, because the baseline failed')
            continue
        speedups = {name: times[BASELINE] / spent for name, spent in times.items()}
        first = first or times[BASELINE]
        lines = [f'**{title}, {dtype}**', '',
                 f'| | ms | speedup | over the baseline in {args.dtypes[0]} | peak memory, MiB |',
                 '|---|---|---|---|---|']
        for name, spent in times.items():
            peak = measuring.peak_memory(steps[name])
            lines.append(f'| {name} | {1e3 * spent:.0f} | {speedups[name]:.2f} | '
                         f'{first / spent:.2f} | {"" if peak is None else f"{peak:.0f}"} |')
        print('\n'.join(lines), flush=True)
        tables.append('\n'.join(lines))
        groups[f'{title}, {dtype}'] = speedups
    if not groups:
        parser.exit(1, 'Nothing was measured\n')
    path = measuring.write_results(args.name, 'Training step compared with the stock recipe',
                                   '\n\n'.join(tables))
    figure = path.with_suffix('.png')
    measuring.plot_speedups(figure, groups)
    with path.open('a', encoding='utf-8') as file:
        file.write(f'\n![speedup]({figure.name})\n')
    print(f'Results: {path}')
