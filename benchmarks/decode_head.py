"""Compare UPerNet's head with mmseg's, with its convolutions at the maps' own size and without.

    python benchmarks/decode_head.py --batches 1 2 4 16            # UPerNet tiny's maps at 512x512

The heads run on random maps of the recipe's backbone, one after the other in every round. "ours,
concatenated" upsamples and concatenates the maps, as a GPU does where they are small
(``GPU_MIN_SAVED`` in ``convnext_mm/fused/pyramid.py``); "ours, own size" never does. Results go to
benchmarks/results.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import measuring
import torch
import whole_model
from mmengine.logging import MMLogger
from torch import Tensor, nn

from convnext_mm.engine import speed
from convnext_mm.fused import pyramid

DEVICE = whole_model.DEVICE
STOCK, CONCATENATED, OWN_SIZE = 'mmseg', 'ours, concatenated', 'ours, own size'


def make_step(head: nn.Module, maps: list[Tensor], kind: torch.dtype, train: bool, own_size: bool
              ) -> Callable[[], None]:
    """A forward pass, with ``train`` and a backward pass."""
    inputs = [m.clone().requires_grad_(train) for m in maps]

    def step() -> None:
        pyramid.pays = lambda *_: own_size
        head.train(train)
        for pool in head.psp_modules:  # of one value per channel, a batch norm has no variance
            pool.eval()
        with torch.set_grad_enabled(train), torch.autocast(DEVICE, kind,
                                                           enabled=kind != torch.float32):
            out = head(inputs)
        if train:
            out.float().mean().backward()
    return step


def compare(args: argparse.Namespace, batch: int, dtype: str, train: bool) -> str:
    """Measure one setting; return a table."""
    heads = {label: whole_model.build(args, label)[0].decode_head
             for label in (whole_model.STOCK, whole_model.OURS)}
    speed.enable_packed_inference(heads[whole_model.OURS])
    side = args.size[0] // 4
    channels = heads[whole_model.OURS].in_channels
    maps = [torch.randn(batch, c, side >> i, side >> i, device=DEVICE).contiguous(
        memory_format=torch.channels_last) for i, c in enumerate(channels)]
    kind = measuring.DTYPES[dtype]
    steps = {STOCK: make_step(heads[whole_model.STOCK], maps, kind, train, False)}
    for label in (CONCATENATED, OWN_SIZE):
        steps[label] = make_step(heads[whole_model.OURS], maps, kind, train, label == OWN_SIZE)
    times = measuring.time_interleaved(steps, args.repeats, summary=min)
    title = f'{"training" if train else "inference"}, {dtype}, {batch} × {args.size[0]}²'
    lines = [f'**{title}**', '', '| | ms | speedup | peak memory, MiB |', '|---|---|---|---|']
    for label, spent in times.items():
        peak = measuring.peak_memory(steps[label])
        lines.append(f'| {label} | {1e3 * spent:.2f} | {times[STOCK] / spent:.2f} | '
                     f'{"" if peak is None else f"{peak:.0f}"} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', type=Path,
                        default=Path('configs/upernet_convnext_tiny_512_160k_ade20k.py'))
    parser.add_argument('--size', type=measuring.parse_size, default=(512, 512), metavar='WxH')
    parser.add_argument('--batches', nargs='+', type=int, default=[1])
    parser.add_argument('--dtypes', nargs='+', choices=measuring.DTYPES, default=['bf16'])
    parser.add_argument('--repeats', type=int, default=10)
    parser.add_argument('--name', help='name of the result file in benchmarks/results')
    args = parser.parse_args()
    args.drop_path = 0.0
    MMLogger.get_instance('mmengine', log_level='WARNING')
    tables = []
    for dtype in args.dtypes:
        for train in (False, True):
            for batch in args.batches:
                tables.append(compare(args, batch, dtype, train))
                print(tables[-1] + '\n', flush=True)
    if args.name:
        path = measuring.write_results(args.name, "UPerNet's head compared with mmseg's",
                                       '\n\n'.join(tables))
        print(f'Results: {path}')
