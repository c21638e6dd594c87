"""Train the demo's detector or segmentor for long, and watch what may grow with time.

    python tools/make_demo_data.py
    python benchmarks/soak.py                                      # the detector, 2000 iterations

Memory is given three times: what the process has of the machine; the same after glibc has returned
the free memory between allocated blocks, which the next larger image would fill again; and what is
allocated. So a leak is told from gaps. Results go to benchmarks/results.
"""
from __future__ import annotations

import argparse
import ctypes
import gc
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import measuring
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

import convnext_mm

CONFIGS = dict(detection='configs/demo/cascade_mask_rcnn_convnext_demo.py',
               segmentation='configs/demo/upernet_convnext_demo.py')
SETTLED = 300
"""The iteration from which nothing may grow."""


class MallocInfo(ctypes.Structure):
    """What glibc's ``mallinfo2`` returns, in bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        'arena', 'ordblks', 'smblks', 'hblks', 'hblkhd', 'usmblks', 'fsmblks', 'uordblks',
        'fordblks', 'keepcost')]


def resident_bytes() -> int:
    """Memory of the machine that this process has."""
    return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')


def allocated_bytes() -> int:
    """Memory that glibc has handed out and not got back."""
    function = ctypes.CDLL(None).mallinfo2
    function.restype = MallocInfo
    info = function()
    return info.uordblks + info.hblkhd


def return_free_memory() -> None:
    """Let glibc return the free memory between allocated blocks to the machine."""
    ctypes.CDLL(None).malloc_trim(0)


@HOOKS.register_module()
class SoakHook(Hook):
    """Takes a sample every ``interval`` iterations, after a garbage collection.

    Args:
        interval: Iterations.
    """

    priority = 'LOWEST'
    samples: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, interval: int = 50) -> None:
        self.interval, self.begin = interval, time.process_time()

    def after_train_iter(self, runner: Any, *args: Any, **kwargs: Any) -> None:
        """Take a sample."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        spent = time.process_time() - self.begin
        gc.collect()
        saved = sorted(Path(runner.work_dir).glob('[ei]*_*.pth'), key=os.path.getmtime)
        with_gaps = resident_bytes() / 1e6
        return_free_memory()
        self.samples.append({
            'iteration': runner.iter + 1, 'ms an iteration': 1e3 * spent / self.interval,
            'MB': with_gaps, 'MB without gaps': resident_bytes() / 1e6,
            'MB allocated': allocated_bytes() / 1e6,
            'Python objects': len(gc.get_objects()),
            'open files': len(os.listdir('/proc/self/fd')),
            'checkpoint, MB': os.path.getsize(saved[-1]) / 1e6 if saved else None})
        print(f'    {self.samples[-1]}', file=sys.stderr, flush=True)  # a run may be stopped
        self.begin = time.process_time()


def report(samples: list[dict[str, Any]]) -> str:
    """A table of some samples, and how far each figure rose above the one at :data:`SETTLED`."""
    names = list(samples[0])
    shown = [sample for sample in samples if sample['iteration'] % 100 == 0]
    rows = [[('' if (v := sample[name]) is None else f'{v:.3f}' if isinstance(v, float) else str(v))
             for name in names] for sample in shown]
    settled, *later = (sample for sample in samples if sample['iteration'] >= SETTLED)
    rise = [f'most after {SETTLED}', *(
        f'{100 * (max(one[name] for one in later) / settled[name] - 1):+.2f} %'
        if settled[name] else '' for name in names[1:])]
    lines = [names, ['---'] * len(names), *rows, rise]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', choices=CONFIGS, default='detection')
    parser.add_argument('--iterations', type=int, default=2000)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--name', help='name of the result file in benchmarks/results')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    options: dict[str, Any] = {
        'custom_hooks': [dict(type='SoakHook')], 'default_hooks.checkpoint.max_keep_ckpts': 1,
        'model.backbone.init_cfg': None}
    if args.task == 'detection':
        images = len(list(Path('data/demo/coco/train2017').glob('*')))
        options['max_epochs'] = -(-4 * args.iterations // images)
    else:
        options['max_iters'] = args.iterations
    with tempfile.TemporaryDirectory() as folder:
        convnext_mm.train(CONFIGS[args.task], work_dir=folder, **options)
    table = report(SoakHook.samples)
    print(table)
    if args.name:
        title = f'{args.task}: {SoakHook.samples[-1]["iteration"]} iterations of the demo'
        print(f'Results: {measuring.write_results(args.name, title, table)}')
