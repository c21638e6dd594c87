"""Compare the backbone with those of OpenMMLab, the authors, transformers and timm.

    python benchmarks/backbone.py                                  # tiny, one image of 512x512
    python benchmarks/backbone.py --archs tiny base --inputs 224x224 1280x800 --batches 1 8
    python benchmarks/backbone.py --archs v2_tiny --only ours

All run interleaved in one process. The baseline is OpenMMLab's sequence of operations. Two
references show how much time the main operations need by themselves: "matmuls alone" are the
matmuls of the blocks in PyTorch's linear layer; "matmuls and convolutions alone" are all of the
model in oneDNN's layout (inference on a CPU). They are not strict limits: in fp32 on a CPU, for
example, oneDNN's matmuls can be faster than the linear layer. Results go to benchmarks/results.
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
BASELINE = 'OpenMMLab (baseline)'
REFERENCES = 'matmuls alone (reference)', 'matmuls and convolutions alone (reference)'


def candidates(arch: str, compiled: bool, train: bool, drop_path: float
               ) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield (name, function that builds the model) of each implementation."""
    def ours(memory: str, **kwargs) -> ConvNeXt:
        torch.manual_seed(0)
        scale = None if ARCHS[arch].use_grn else 1.0
        return ConvNeXt(arch, drop_path_rate=drop_path, layer_scale_init_value=scale,
                        memory=memory, **kwargs)

    def channels_last(model: nn.Module) -> nn.Module:
        return model.to(memory_format=torch.channels_last)
    yield BASELINE, lambda: peers.OpenMMLab(ours('plain'))
    yield "authors'", lambda: peers.Authors(ours('plain'))
    yield 'transformers', lambda: peers.transformers_backbone(ours('plain'))
    yield 'timm', lambda: peers.timm_backbone(arch)
    yield 'timm channels_last', lambda: channels_last(peers.timm_backbone(arch))
    yield 'ours, plain', lambda: ours('plain')
    yield 'ours', lambda: ours('lean')
    if DEVICE == 'cuda':
        yield 'ours, Triton', lambda: ours('lean', triton=True)
    if train:
        yield 'ours, minimal', lambda: ours('minimal')
    elif DEVICE == 'cpu':
        yield 'ours, packed', lambda: ours('lean', packed=True)
    if compiled:
        yield 'timm channels_last compiled', lambda: torch.compile(
            channels_last(peers.timm_backbone(arch)))
        yield 'ours, compiled', lambda: torch.compile(ours('lean'))
        if DEVICE == 'cuda':
            yield 'ours, Triton, compiled', lambda: torch.compile(ours('lean', triton=True))
    yield REFERENCES[0], lambda: peers.MatmulsAlone(ours('plain'))
    if DEVICE == 'cpu' and not train:
        yield REFERENCES[1], lambda: peers.MatmulsAndConvolutionsAlone(ours('plain'))


def flops_and_bytes(model: ConvNeXt, x: Tensor, train: bool) -> tuple[int, int]:
    """Return the FLOPs of a step and a lower bound of its memory traffic in bytes.

    The bound counts the input, output and weights of each block once. A training step takes three
    times the FLOPs and bytes of inference.
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


def measure_setting(arch: str, shape: tuple[int, int], batch: int, dtype: str, step: str,
                    args: argparse.Namespace) -> tuple[str, dict[str, float]]:
    """Measure all implementations; return a Markdown table and name → speedup over the baseline."""
    train, kind = step == 'train', measuring.DTYPES[dtype]
    x = torch.randn(batch, 3, shape[1], shape[0], device=DEVICE)
    models, steps, forwards = {}, {}, {}
    for name, make in candidates(arch, args.compile, train, args.drop_path):
        if name not in (BASELINE, *REFERENCES) and not any(part in name for part in args.only):
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
        forwards[name] = make_forward(model, x if train else x.to(kind), kind, train)
        steps[name] = (make_training_step(model, forwards[name]) if train
                       else make_inference_step(forwards[name]))
    times = measuring.time_interleaved(steps, args.repeats)
    if BASELINE not in times:
        return f'{arch}, {step}, {dtype}: skipped, because the baseline failed', {}
    peak, bandwidth = measuring.machine_peaks(DEVICE, kind)
    flops, moved = flops_and_bytes(models[BASELINE].model, x.to(kind), train)
    roof = max(flops / peak, moved / bandwidth)
    speedups = {name: times[BASELINE] / spent for name, spent in times.items()}
    memory = ('peak memory, MiB' if DEVICE == 'cuda' else 'saved activations, MiB' if train
              else 'page faults')
    lines = [f'**{arch}, {step}, {dtype}, {batch} × {shape[0]}×{shape[1]}**: {flops / 1e9:.1f} '
             f'GFLOP, at least {moved / 2**20:.0f} MiB of memory traffic; machine peak '
             f'{peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.0f} GB/s', '',
             f'| | ms | speedup | of roofline | {memory} |', '|---|---|---|---|---|']
    for name, spent in times.items():
        used = measuring.peak_memory(steps[name])
        if used is None and not train:
            used = measuring.page_faults(steps[name])
        elif used is None and 'compiled' not in name and name not in REFERENCES:
            with torch.autocast(DEVICE, kind, enabled=kind != torch.float32):
                used = measuring.saved_activation_memory(
                    forwards[name], list(models[name].parameters()))
        lines.append(f'| {name} | {1e3 * spent:.1f} | {speedups[name]:.2f} | {roof / spent:.0%} | '
                     f'{"" if used is None else f"{used:.0f}"} |')
    return '\n'.join(lines), speedups


def make_forward(model: nn.Module, x: Tensor, kind: torch.dtype, train: bool
                 ) -> Callable[[], list[Tensor]]:
    """Return the forward pass; training uses autocast."""
    def forward() -> list[Tensor]:
        with torch.autocast(DEVICE, kind, enabled=train and kind != torch.float32):
            return model(x)
    return forward


def make_inference_step(forward: Callable[[], list[Tensor]]) -> Callable[[], None]:
    """Return the forward pass under no_grad, with which compiled models freeze their weights."""
    def infer() -> None:
        with torch.no_grad():
            forward()
    return infer


def make_training_step(model: nn.Module, forward: Callable[[], list[Tensor]]
                       ) -> Callable[[], None]:
    """Return the forward and backward pass; the loss is the sum of the feature maps' means."""
    def train() -> None:
        model.zero_grad(set_to_none=True)
        sum(out.float().mean() for out in forward()).backward()
    return train


def summary_table(groups: dict[str, dict[str, float]]) -> str:
    """One row per setting: the speedups of our variants and of the references."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group
                               if name.startswith('ours') or name in REFERENCES))
    lines = [f'| speedup over the baseline | {" | ".join(names)} |',
             '|---' * (len(names) + 1) + '|']
    for title, group in groups.items():
        cells = [f'{group[name]:.2f}' if name in group else '' for name in names]
        lines.append(f'| {title} | {" | ".join(cells)} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--archs', nargs='+', default=['tiny'])
    parser.add_argument('--inputs', nargs='+', type=measuring.parse_size, default=[(512, 512)],
                        metavar='WxH')
    parser.add_argument('--batches', nargs='+', type=int, default=[1])
    parser.add_argument('--dtypes', nargs='+', choices=measuring.DTYPES, default=['fp32', 'bf16'])
    parser.add_argument('--steps', nargs='+', choices=['infer', 'train'],
                        default=['infer', 'train'])
    parser.add_argument('--repeats', type=int, default=9)
    parser.add_argument('--drop-path', type=float, default=0.0)
    parser.add_argument('--only', nargs='+', default=[''], metavar='NAME',
                        help='measure only the implementations whose names contain one of these, '
                        'the baseline and the references')
    parser.add_argument('--compile', action='store_true', help='measure torch.compile as well')
    parser.add_argument('--name', default='backbone',
                        help='name of the result files in benchmarks/results (backbone)')
    args = parser.parse_args()
    if args.compile:
        import torch._inductor.config
        torch._inductor.config.freezing = True
    tables, groups = [], {}
    for arch, shape, batch, step, dtype in product(args.archs, args.inputs, args.batches,
                                                   args.steps, args.dtypes):
        text, speedups = measure_setting(arch, shape, batch, dtype, step, args)
        print(text, flush=True)
        if not speedups:
            continue
        tables.append(text)
        groups[f'{arch}, {step}, {dtype}, {batch} × {shape[0]}×{shape[1]}'] = speedups
    if not groups:
        parser.exit(1, 'Nothing was measured\n')
    if len(groups) > 1:
        tables.insert(0, summary_table(groups))
    path = measuring.write_results(args.name, 'Backbone compared with other implementations',
                                   '\n\n'.join(tables))
    figure = path.with_suffix('.png')
    measuring.plot_speedups(figure, groups)
    with path.open('a', encoding='utf-8') as file:
        file.write(f'\n![speedup]({figure.name})\n')
    print(f'Results: {path}')
