"""Compare our operators in PyTorch with mmcv's compiled ones.

    python benchmarks/ops.py                        # all
    python benchmarks/ops.py --only nms --repeats 20

Both run interleaved in one process, so mmcv must have its compiled operators (make OPS=compiled).
Times are the processor's, in all threads together, and the least of the repetitions. "large" are
the feature maps of an image of 1280×800 (256 channels, strides 4 to 32) and 1000 boxes over the
four levels; "demo" those of the demo's detector (160×160, 64 channels).
Results go to benchmarks/results.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import measuring
import mmcv.ops
import torch
import train_step
from mmengine.logging import MMLogger
from torch import Tensor

from convnext_mm.ops.extension import NAME, build

BASELINE, OURS = "mmcv's compiled (baseline)", 'ours'
EXTENSIONS: dict[str, ModuleType] = {BASELINE: sys.modules[NAME], OURS: build()}
RECIPE = ('configs/cascade_mask_rcnn_convnext_tiny_patch4_window7_mstrain_480-800_giou_4conv1f_'
          'adamw_3x_coco_in1k.py')
Steps = dict[str, Callable[[], object]]


def use(extension: ModuleType) -> None:
    """Let mmcv's functions call the operators of an extension."""
    for name, module in sys.modules.items():
        if name.startswith('mmcv.ops.') and hasattr(module, 'ext_module'):
            module.ext_module = extension


def rois_of_levels(count: int, size: tuple[int, int], smallest: float) -> list[Tensor]:
    """Boxes of an image as mmdet assigns them: a quarter on each level, by their size."""
    generator = torch.Generator().manual_seed(0)
    bounds = torch.tensor([*size, *size])
    levels = []
    for level in range(4):
        extent = smallest * 2**level * (1 + torch.rand(count // 4, 2, generator=generator))
        center = torch.rand(count // 4, 2, generator=generator) * bounds[:2]
        boxes = torch.cat([center - extent / 2, center + extent / 2], 1).clamp(min=0)
        boxes = torch.minimum(boxes, bounds)
        levels.append(torch.cat([torch.zeros(len(boxes), 1), boxes], 1))
    return levels


def roi_align_steps(bins: int, count: int, size: tuple[int, int], channels: int, smallest: float,
                    dtype: torch.dtype, backward: bool) -> Steps:
    """RoIAlign of all levels, or its backward pass, by each implementation."""
    maps = [torch.randn(1, channels, -(-size[1] // stride), -(-size[0] // stride), dtype=dtype,
                        requires_grad=backward) for stride in (4, 8, 16, 32)]
    rois = rois_of_levels(count, size, smallest)
    layers = [mmcv.ops.RoIAlign(bins, 1 / stride, 0) for stride in (4, 8, 16, 32)]

    def forward(extension: ModuleType) -> list[Tensor]:
        use(extension)
        return [layer(x, r) for layer, x, r in zip(layers, maps, rois, strict=True)]
    if not backward:
        return {name: lambda extension=extension: forward(extension)
                for name, extension in EXTENSIONS.items()}
    outputs = forward(EXTENSIONS[OURS])  # both save the same for the backward pass
    gradients = [torch.randn_like(x) for x in outputs]

    def step(extension: ModuleType) -> None:
        use(extension)
        torch.autograd.grad(outputs, maps, gradients, retain_graph=True)
    return {name: lambda extension=extension: step(extension)
            for name, extension in EXTENSIONS.items()}


def nms_steps(count: int, kind: str) -> Steps:
    """Suppression of boxes: 'proposals' in clusters around objects, or the same in 80 'classes'."""
    generator = torch.Generator().manual_seed(0)
    objects = torch.rand(60, 2, generator=generator) * torch.tensor([1280.0, 800.0])
    extents = 40 + 180 * torch.rand(60, 2, generator=generator)
    which = torch.randint(0, 60, (count,), generator=generator)
    center = objects[which] + 0.15 * extents[which] * torch.randn(count, 2, generator=generator)
    extent = extents[which] * (0.2 * torch.randn(count, 2, generator=generator)).exp()
    boxes = torch.cat([center - extent / 2, center + extent / 2], 1)
    if kind == 'classes':
        boxes += 1500.0 * torch.randint(0, 80, (count, 1), generator=generator)
    scores = torch.rand(count, generator=generator)
    threshold = 0.5 if kind == 'classes' else 0.7

    def suppress(extension: ModuleType) -> Tensor:
        return extension.nms(boxes, scores, iou_threshold=threshold, offset=0)
    kept = [suppress(extension) for extension in EXTENSIONS.values()]
    assert torch.equal(*kept)
    return {name: lambda extension=extension: suppress(extension)
            for name, extension in EXTENSIONS.items()}


def detector_steps(config: str, size: tuple[int, int], batch: int, train: bool) -> Steps:
    """Training step or inference of a whole detector, on noise."""
    args = argparse.Namespace(config=config, size=size, batch=batch, drop_path=None)
    model, optimizer = train_step.build_variant(OURS, {}, args)
    if train:
        whole = train_step.make_step(model, optimizer, torch.float32, args)
    else:
        x, samples = train_step.random_batch(model.eval(), batch, size)
        whole = torch.no_grad()(lambda: model.predict(x, samples))

    def step(extension: ModuleType) -> None:
        use(extension)
        torch.manual_seed(0)
        whole()
    return {name: lambda extension=extension: step(extension)
            for name, extension in EXTENSIONS.items()}


def cases() -> Iterator[tuple[str, str, Callable[[], Steps]]]:
    """Yield (operator, what it is measured on, function that returns the steps)."""
    large, demo = ((1280, 800), 256, 56.0), ((160, 160), 64, 20.0)
    for backward in (False, True):
        direction = 'backward' if backward else 'forward'
        for name, count, (size, channels, smallest) in (
                ('large', 1000, large), ('demo', 1000, demo), ('demo', 100, demo)):
            for bins in (7, 14):
                for kind, dtype in measuring.DTYPES.items():
                    if name == 'large' or kind == 'fp32':
                        yield (f'roi_align {direction}', f'{bins}×{bins}, {name}, {count} boxes, '
                               f'{kind}', lambda b=bins, n=count, s=size, c=channels, e=smallest,
                               d=dtype, g=backward: roi_align_steps(b, n, s, c, e, d, g))
    for kind in ('proposals', 'classes'):
        for count in (100, 500, 1000, 2000, 5000, 10000):
            yield 'nms', f'{count} boxes, {kind}', lambda n=count, k=kind: nms_steps(n, k)
    for title, config, size, batch in (
            ('Cascade Mask R-CNN tiny', RECIPE, (640, 512), 1),
            ("the demo's", 'configs/demo/cascade_mask_rcnn_convnext_demo.py', (160, 160), 4)):
        for train in (False, True):
            yield (f'detector, {"training step" if train else "inference"}',
                   f'{title}, {batch} × {size[0]}×{size[1]}',
                   lambda c=config, s=size, n=batch, t=train: detector_steps(c, s, n, t))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', help='measure operators whose name starts with this')
    parser.add_argument('--repeats', type=int, default=10)
    parser.add_argument('--threads', type=int, help="PyTorch's number of threads")
    parser.add_argument('--name', default='ops',
                        help='name of the result files in benchmarks/results (ops)')
    args = parser.parse_args()
    if not hasattr(EXTENSIONS[BASELINE], '__file__'):
        parser.exit(1, 'mmcv has no compiled operators: make OPS=compiled lint\n')
    if args.threads:
        torch.set_num_threads(args.threads)
    MMLogger.get_instance('mmengine', log_level='WARNING')  # hide how each parameter is initialized
    rows, groups = [], {}
    for operator, case, make in cases():
        if not operator.startswith(args.only):
            continue
        times = measuring.time_interleaved(make(), args.repeats, measuring.processor_time_once, min)
        if OURS not in times:
            continue
        cells = [f'{1e3 * times[BASELINE]:.2f}', f'{times[BASELINE] / times[OURS]:.2f}'] if (
            BASELINE in times) else ['not supported', '']
        rows.append(f'| {operator} | {case} | {cells[0]} | {1e3 * times[OURS]:.2f} | {cells[1]} |')
        print(rows[-1], flush=True)
        if BASELINE in times:
            groups[f'{operator}, {case}'] = {OURS: times[BASELINE] / times[OURS]}
    table = '\n'.join(['| operator | on | compiled, ms | ours, ms | speedup |',
                       '|---|---|---|---|---|', *rows])
    path = measuring.write_results(args.name, "Our operators compared with mmcv's compiled ones",
                                   table)
    figure = path.with_suffix('.png')
    measuring.plot_speedups(figure, groups, "mmcv's compiled operators")
    with path.open('a', encoding='utf-8') as file:
        file.write(f'\n![speedup]({figure.name})\n')
    print(f'Results: {path}')
