"""Compare whole models with the stock recipe: OpenMMLab's classes and sequence of operations.

    python benchmarks/whole_model.py                        # test_step and training of UPerNet tiny
    python benchmarks/whole_model.py --config configs/upernet_convnext_base_640_160k_ade20k.py \
        --size 1280x960 --steps test
    python benchmarks/whole_model.py --steps test --changed model.decode_head.channels=256

Both run in the same process with the same weights, one after the other in every round; the table
has the least processor time of the rounds (on a GPU: the least time). ``test`` is ``test_step`` on
one image whose windows the recipe's own settings cut, ``train`` forward pass, losses, backward pass
and AdamW. On a CPU, a stock detector computes in fp32 in every table: mmcv's compiled operators
have no bf16 there. The reference is what the stock model's convolutions and linear layers take
alone. It is no bound: ours needs fewer multiplications. Results go to benchmarks/results.
"""
from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import measuring
import peers
import torch
import torch.nn.functional as F
import train_step
from mmengine.config import DictAction
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from torch import Tensor, nn

from convnext_mm.engine import speed
from convnext_mm.engine.checks import read_config
from convnext_mm.precision import keep_outputs_in_fp32, set_inference_dtype

DEVICE = train_step.DEVICE
STOCK, OURS, REFERENCE = 'stock recipe', 'ours', "stock's products alone (reference)"
TRITON = 'ours, Triton'
CHANGED = 'ours, changed'
LABELS = STOCK, OURS, *([TRITON] if DEVICE == 'cuda' else [])


def build(args: argparse.Namespace, label: str, options: dict | None = None
          ) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build the recipe's model with random weights and statistics, and its optimizer.

    ``options`` are entries of the config.
    """
    cfg = read_config(str(args.config), {'model.backbone.init_cfg': None,
                                         'model.backbone.drop_path_rate': args.drop_path,
                                         'model.backbone.triton': label == TRITON,
                                         **(options or {})})
    model = peers.build_recipe(cfg, label == STOCK)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, (low, high) in ((module.running_mean, (-0.1, 0.1)), (module.weight.data,
                                        (0.5, 1.5)), (module.running_var, (0.5, 2.0))):
                tensor.uniform_(low, high, generator=generator)
    if hasattr(model, 'decode_head'):  # classes that differ from pixel to pixel
        nn.init.normal_(model.decode_head.conv_seg.weight, std=0.2, generator=generator)
    for name, module in model.named_modules():  # boxes of many classes
        if name.endswith('.fc_cls'):
            nn.init.normal_(module.weight, std=0.3, generator=generator)
    model.to(DEVICE)
    return model, build_optim_wrapper(model, cfg.optim_wrapper).optimizer


def test_data(model: nn.Module, size: tuple[int, int]) -> Callable[[], dict]:
    """Return a function that makes the data of a ``test_step`` on a smooth image."""
    width, height = size
    noise = torch.rand(1, 3, -(-height // 16), -(-width // 16),
                       generator=torch.Generator().manual_seed(0)) * 255
    image = F.interpolate(noise, size=(height, width), mode='bicubic')[0].clamp(0, 255).byte()
    meta = dict(img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width),
                batch_input_shape=(height, width), scale_factor=(1.0, 1.0))
    if hasattr(model, 'decode_head'):
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmdet.structures import DetDataSample as Sample
    return lambda: dict(inputs=[image], data_samples=[Sample(metainfo=meta)])


def make_test_step(model: nn.Module, kind: torch.dtype, size: tuple[int, int]
                   ) -> Callable[[], Tensor]:
    """Return a ``test_step`` that returns the class map, or the boxes."""
    data = test_data(model, size)

    @torch.no_grad()
    def step() -> Tensor:
        model.eval()
        with torch.autocast(DEVICE, kind, enabled=kind != torch.float32):
            sample = model.test_step(data())[0]
        if hasattr(model, 'decode_head'):
            return sample.pred_sem_seg.data
        return sample.pred_instances.bboxes
    return step


def make_train_step(model: nn.Module, optimizer: torch.optim.Optimizer, kind: torch.dtype,
                    args: argparse.Namespace) -> Callable[[], None]:
    """Return a training step."""
    step = train_step.make_step(model, optimizer, kind, args)

    def train() -> None:
        set_training(model, args.batch)
        step()
    return train


def set_training(model: nn.Module, batch: int) -> None:
    """Set the mode of training; a norm with one value per channel, which fails, stays in eval."""
    model.train()
    if batch == 1:
        for pool in getattr(getattr(model, 'decode_head', None), 'psp_modules', ()):
            if pool[0].output_size == 1:
                pool.eval()


def reference(model: nn.Module, step: Callable[[], object], kind: torch.dtype, training: bool
              ) -> Callable[[], None]:
    """Return the step's convolutions and linear layers alone."""
    alone = peers.ConvolutionsAndMatmulsOf(model, step)

    def run() -> None:
        with torch.set_grad_enabled(training), torch.autocast(
                DEVICE, kind, enabled=kind != torch.float32):
            alone()
    return run


def compare(args: argparse.Namespace, name: str, dtype: str) -> list[str]:
    """Measure one kind of step in one dtype; return the lines of a table."""
    kind = measuring.DTYPES[dtype]
    models = {label: build(args, label) for label in LABELS}
    if args.changed:
        models[CHANGED] = build(args, CHANGED, args.changed)
    fp32_only = DEVICE == 'cpu' and not hasattr(models[OURS][0], 'decode_head')
    stock_kind = torch.float32 if fp32_only else kind
    if name == 'test':
        for label, (model, _) in models.items():
            if label != STOCK:
                speed.enable_packed_inference(model)
                set_inference_dtype(model, dtype)
        steps = {label: make_test_step(model, stock_kind if label == STOCK else torch.float32,
                                       args.size) for label, (model, _) in models.items()}
        found = {label: step() for label, step in steps.items()}
        note = '; '.join(f'{label}: {difference(found[STOCK], found[label])}'
                         for label in found if label not in (STOCK, CHANGED))
        if args.changed:
            note += f'. {CHANGED}: ' + ', '.join(f'{k}={v}' for k, v in args.changed.items())
    else:
        for label, (model, _) in models.items():
            if label != STOCK:
                keep_outputs_in_fp32(model)
        steps = {label: make_train_step(model, optimizer, stock_kind if label == STOCK else kind,
                                        args) for label, (model, optimizer) in models.items()}
        saved = {label: saved_by_head(model, kind, args) for label, (model, _) in models.items()}
        note = '' if None in saved.values() else (
            f'Saved activations of the decode head: {saved[STOCK]:.0f} MiB stock, '
            f'{saved[OURS]:.0f} MiB ours, {saved[OURS] / saved[STOCK]:.2f}×')
    steps[REFERENCE] = reference(models[STOCK][0], steps[STOCK], stock_kind, name == 'train')
    times = measuring.time_interleaved(
        steps, args.repeats,
        measuring.time_once if DEVICE == 'cuda' else measuring.processor_time_once, min)
    count = f'{args.batch} × ' if name == 'train' else ''
    title = (f'{args.config.stem.split("_patch4")[0]}, {name}, {dtype}, '
             f'{count}{args.size[0]}×{args.size[1]}')
    digits, memory = (1, 'peak memory, MiB |') if DEVICE == 'cuda' else (0, '')
    lines = [f'**{title}**', '', f'| | ms | speedup | {memory}', f'|---|---|---|{"---|" * digits}']
    for label, spent in times.items():
        peak = measuring.peak_memory(steps[label])
        lines.append(f'| {label} | {1e3 * spent:.{digits}f} | {times[STOCK] / spent:.2f} |'
                     + ('' if peak is None else f' {peak:.0f} |'))
    return [*lines, '', f'{note}.'] if note else lines


def difference(stock: Tensor, ours: Tensor) -> str:
    """Say how much two class maps, or two sets of boxes (K, 4), agree."""
    if stock.is_floating_point():
        distances = torch.cdist(ours.double(), stock.double(), p=float('inf')).min(1).values
        return (f'{len(stock)} boxes stock, {len(ours)} ours; from each of ours to the nearest: '
                f'median {distances.median():.2g} pixels, largest {distances.max():.2g}')
    return f'{100 * (stock == ours).double().mean():.4f} % of the pixels have the same class'


def saved_by_head(model: nn.Module, kind: torch.dtype, args: argparse.Namespace) -> float | None:
    """Return the MiB that a segmentor's decode head saves for its backward pass."""
    if not hasattr(model, 'decode_head'):
        return None
    set_training(model, args.batch)
    x, _ = train_step.random_batch(model, args.batch, args.size)
    with torch.autocast(DEVICE, kind, enabled=kind != torch.float32):
        with torch.no_grad():
            maps = [m.requires_grad_() for m in model.extract_feat(x)]
        return measuring.saved_activation_memory(
            functools.partial(model.decode_head.forward, maps), list(model.parameters()))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', type=Path,
                        default=Path('configs/upernet_convnext_tiny_512_160k_ade20k.py'))
    parser.add_argument('--size', type=measuring.parse_size, default=(512, 512), metavar='WxH')
    parser.add_argument('--batch', type=int, default=1, help='images of a training step (1)')
    parser.add_argument('--steps', nargs='+', choices=['test', 'train'], default=['test', 'train'])
    parser.add_argument('--dtypes', nargs='+', choices=measuring.DTYPES, default=['fp32', 'bf16'])
    parser.add_argument('--drop-path', type=float, default=0.0,
                        help='drop path rate of training (0); on a CPU, ours does not compute '
                        'dropped branches')
    parser.add_argument('--changed', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='also run ours with these entries of the config, such as the widths '
                        'of a pruned model')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--threads', type=int, default=1, help='threads on a CPU (1)')
    parser.add_argument('--name', help='name of the result file in benchmarks/results')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    MMLogger.get_instance('mmengine', log_level='WARNING')
    tables = []
    for name in args.steps:
        for dtype in args.dtypes:
            lines = compare(args, name, dtype)
            print('\n'.join(lines) + '\n', flush=True)
            tables.append('\n'.join(lines))
    if args.name:
        path = measuring.write_results(args.name, 'Whole models compared with the stock recipe',
                                       '\n\n'.join(tables))
        print(f'Results: {path}')
