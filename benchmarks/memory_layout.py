"""The backbone in channels_last, as it computes, beside the same one in contiguous memory.

    python benchmarks/memory_layout.py [--arch tiny] [--size 512] [--batch 2] [--repeats 5]

Both run in turns in one process; the medians and their ratio are printed.
"""
from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from convnext_mm import ConvNeXt
from convnext_mm.layers import Block, LayerNorm2d


class Contiguous(ConvNeXt):
    """Every map between layers is contiguous, at the price of a copy behind each norm."""

    memory_format = torch.contiguous_format

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for module in self.modules():
            if isinstance(module, (Block, LayerNorm2d)):
                module.register_forward_hook(lambda module, x, y: y.contiguous())


def seconds(step: Callable[[], None]) -> float:
    """How long a step takes, with what it leaves on the GPU."""
    sync = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    sync()
    begin = time.perf_counter()
    step()
    sync()
    return time.perf_counter() - begin


def infer(model: ConvNeXt, x: Tensor) -> None:
    with torch.inference_mode():
        model(x)


def train(model: ConvNeXt, x: Tensor) -> None:
    sum(f.mean() for f in model(x)).backward()


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='tiny')
    parser.add_argument('--size', type=int, default=512)
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--repeats', type=int, default=5)
    args = parser.parse_args()

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    name = torch.cuda.get_device_name() if device == 'cuda' else (
        f'{platform.machine()}, {torch.get_num_threads()} threads')
    print(f'{args.arch}, {args.batch} × {args.size}×{args.size}, {device}: {name}, '
          f'torch {torch.__version__}')
    x = torch.randn(args.batch, 3, args.size, args.size, device=device)
    models = {kind.__name__: kind(args.arch).to(device) for kind in (ConvNeXt, Contiguous)}
    print('| | channels_last | contiguous | ratio |\n|---|---|---|---|')
    for step in (infer, train):
        times: dict[str, list[float]] = {kind: [] for kind in models}
        for turn in range(args.repeats + 1):
            for kind, model in models.items():
                spent = seconds(lambda model=model, step=step: step(model, x))
                if turn:  # the first is for warming up
                    times[kind].append(spent)
        ours, other = (statistics.median(times[kind]) for kind in ('ConvNeXt', 'Contiguous'))
        print(f'| {step.__name__} | {ours:.3f} s | {other:.3f} s | {other / ours:.2f} |',
              flush=True)
