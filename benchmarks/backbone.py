"""The backbone beside OpenMMLab's, the authors', transformers' and timm's, in turns in one process.

    python benchmarks/backbone.py                                  # tiny, one picture of 512x512
    python benchmarks/backbone.py --archs tiny base --inputs 224x224 1280x800 --batches 1 8
    python benchmarks/backbone.py --archs v2_tiny --only reference ours

The reference is OpenMMLab's sequence of operations; "products" are the blocks' matrix products
alone, by PyTorch's linear layer (in fp32 on a CPU, oneDNN's can be faster). "Products and
convolutions" are all of a model's in oneDNN's layout, about the least that inference on a CPU
takes with PyTorch's operations. Results go to benchmarks/results.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import product

import measuring
import peers
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from convnext_mm import ConvNeXt
from convnext_mm.archs import ARCHS

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
REFERENCE = 'OpenMMLab (reference)'
LIMITS = 'products alone (limit)', 'products and convolutions (limit)'


def candidates(arch: str, compiled: bool, train: bool, drop_path: float
               ) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """(name, maker of a model) pairs."""
    def ours(memory: str, **kwargs) -> ConvNeXt:
        torch.manual_seed(0)
        scale = None if ARCHS[arch].use_grn else 1.0
        return ConvNeXt(arch, drop_path_rate=drop_path, layer_scale_init_value=scale,
                        memory=memory, **kwargs)

    def spread(model: nn.Module) -> nn.Module:
        return model.to(memory_format=torch.channels_last)
    yield REFERENCE, lambda: peers.OpenMMLab(ours('plain'))
    yield "authors'", lambda: peers.Authors(ours('plain'))
    yield 'transformers', lambda: peers.transformers(ours('plain'))
    yield 'timm', lambda: peers.timm(arch)
    yield 'timm channels_last', lambda: spread(peers.timm(arch))
    yield 'ours, plain', lambda: ours('plain')
    yield 'ours', lambda: ours('lean')
    if train:
        yield 'ours, minimal', lambda: ours('minimal')
    elif DEVICE == 'cpu':
        yield 'ours, packed', lambda: ours('lean', packed=True)
    if compiled:
        yield 'timm channels_last compiled', lambda: torch.compile(
            spread(peers.timm(arch)))
        yield 'ours, compiled', lambda: torch.compile(ours('lean'))
    yield LIMITS[0], lambda: peers.Products(ours('plain'))
    if DEVICE == 'cpu' and not train:
        yield LIMITS[1], lambda: peers.Skeleton(ours('plain'))


def traffic(model: ConvNeXt, x: Tensor, train: bool) -> tuple[int, int]:
    """FLOPs, and the bytes that must move: every block's input and output and weights, once.

    A step of training does three times the FLOPs of inference and moves three times the bytes.
    """
    with torch.device('meta'):
        twin = ConvNeXt(depths=model.arch.depths, dims=model.arch.dims,
                        use_grn=model.arch.use_grn, memory='plain')
        with FlopCounterMode(display=False) as counter:
            twin(torch.empty(x.shape))
    maps = sum(2 * depth * dim * x.shape[0] * (x.shape[2] >> i + 2) * (x.shape[3] >> i + 2)
               for i, (depth, dim) in enumerate(zip(model.arch.depths, model.arch.dims,
                                                    strict=True)))
    weights = sum(p.numel() for p in model.parameters())
    factor = 3 if train else 1
    return factor * counter.get_total_flops(), factor * (maps + weights) * x.element_size()


def measure(arch: str, shape: tuple[int, int], batch: int, dtype: str, step: str,
            args: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """One table, and the ratios in it."""
    train, kind = step == 'train', measuring.DTYPES[dtype]
    x = torch.randn(batch, 3, shape[1], shape[0], device=DEVICE)
    models, steps, forwards = {}, {}, {}
    for name, make in candidates(arch, args.compile, train, args.drop_path):
        if name not in (REFERENCE, *LIMITS) and not any(part in name for part in args.only):
            continue
        try:
            model = make().to(DEVICE)
        except ImportError as error:
            print(f'    {name}: {error}')
            continue
        model.train(train)
        if not train:
            model.to(kind)
        models[name] = model
        forwards[name] = forward_of(model, x if train else x.to(kind), kind, train)
        steps[name] = training_of(model, forwards[name]) if train else inference_of(forwards[name])
    times = measuring.in_turns(steps, args.repeats)
    if REFERENCE not in times:
        return f'{arch}, {step}, {dtype}: left out, as the reference does not run', {}
    peak, bandwidth = measuring.ceilings(DEVICE, kind)
    flops, moved = traffic(models[REFERENCE].model, x.to(kind), train)
    roof = max(flops / peak, moved / bandwidth)
    ratios = {name: times[REFERENCE] / spent for name, spent in times.items()}
    memory = 'peak, MiB' if DEVICE == 'cuda' else 'kept, MiB' if train else 'page faults'
    lines = [f'**{arch}, {step}, {dtype}, {batch} × {shape[0]}×{shape[1]}**: {flops / 1e9:.1f} '
             f'GFLOP, {moved / 2**20:.0f} MiB at least; this machine {peak / 1e9:.0f} GFLOP/s, '
             f'{bandwidth / 1e9:.0f} GB/s', '',
             f'| | ms | times as fast | of the roofline | {memory} |', '|---|---|---|---|---|']
    for name, spent in times.items():
        held = measuring.peak_memory(steps[name])
        if held is None and not train:
            held = measuring.page_faults(steps[name])
        elif held is None and 'compiled' not in name and name not in LIMITS:
            with torch.autocast(DEVICE, kind, enabled=kind != torch.float32):
                held = measuring.kept_memory(forwards[name], list(models[name].parameters()))
        lines.append(f'| {name} | {1e3 * spent:.1f} | {ratios[name]:.2f} | {roof / spent:.0%} | '
                     f'{"" if held is None else f"{held:.0f}"} |')
    return '\n'.join(lines), ratios


def forward_of(model: nn.Module, x: Tensor, kind: torch.dtype, train: bool
               ) -> Callable[[], list[Tensor]]:
    """A forward pass; in training by autocast."""
    def forward() -> list[Tensor]:
        with torch.autocast(DEVICE, kind, enabled=train and kind != torch.float32):
            return model(x)
    return forward


def inference_of(forward: Callable[[], list[Tensor]]) -> Callable[[], None]:
    """The forward pass without gradients; compiled models freeze their weights."""
    def infer() -> None:
        with torch.no_grad():
            forward()
    return infer


def training_of(model: nn.Module, forward: Callable[[], list[Tensor]]) -> Callable[[], None]:
    """Forward and backward pass of a mean of all maps."""
    def train() -> None:
        model.zero_grad(set_to_none=True)
        sum(out.float().mean() for out in forward()).backward()
    return train


def summary(groups: dict[str, dict[str, float]]) -> str:
    """A line a setting: how many times as fast as the reference each of ours is."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group
                               if name.startswith('ours') or name in LIMITS))
    lines = [f'| times as fast as the reference | {" | ".join(names)} |',
             '|---' * (len(names) + 1) + '|']
    for title, group in groups.items():
        cells = [f'{group[name]:.2f}' if name in group else '' for name in names]
        lines.append(f'| {title} | {" | ".join(cells)} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--archs', nargs='+', default=['tiny'])
    parser.add_argument('--inputs', nargs='+', type=measuring.pair, default=[(512, 512)],
                        metavar='WxH')
    parser.add_argument('--batches', nargs='+', type=int, default=[1])
    parser.add_argument('--dtypes', nargs='+', choices=measuring.DTYPES, default=['fp32', 'bf16'])
    parser.add_argument('--steps', nargs='+', choices=['infer', 'train'],
                        default=['infer', 'train'])
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--drop-path', type=float, default=0.0)
    parser.add_argument('--only', nargs='+', default=[''], metavar='NAME',
                        help='those with this in their name, beside the reference')
    parser.add_argument('--compile', action='store_true', help='torch.compile as well')
    parser.add_argument('--name', default='backbone', help='of the files in benchmarks/results')
    args = parser.parse_args()
    if args.compile:
        import torch._inductor.config
        torch._inductor.config.freezing = True
    tables, groups = [], {}
    for arch, shape, batch, step, dtype in product(args.archs, args.inputs, args.batches,
                                                   args.steps, args.dtypes):
        text, ratios = measure(arch, shape, batch, dtype, step, args)
        print(text, flush=True)
        if not ratios:
            continue
        tables.append(text)
        groups[f'{arch}, {step}, {dtype}, {batch} × {shape[0]}×{shape[1]}'] = ratios
    if not groups:
        parser.exit(1, 'Nothing was measured\n')
    if len(groups) > 1:
        tables.insert(0, summary(groups))
    path = measuring.write_results(args.name, 'The backbone beside others', '\n\n'.join(tables))
    picture = path.with_suffix('.png')
    measuring.plot_ratios(picture, groups)
    with path.open('a', encoding='utf-8') as file:
        file.write(f'\n![times as fast]({picture.name})\n')
    print(f'Kept in {path}')
