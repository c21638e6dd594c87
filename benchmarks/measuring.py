"""Shared by the benchmarks: timing, memory, peaks of the machine, result files, figures."""
from __future__ import annotations

import datetime
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_mm.utils import processor_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / 'results'
DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)


def parse_size(text: str) -> tuple[int, int]:
    """Parse WxH into (width, height)."""
    width, height = map(int, text.split('x'))
    return width, height


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_once(step: Callable[[], object]) -> float:
    """Return the seconds of a step, including the work that it has queued on the GPU."""
    synchronize()
    begin = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - begin


def processor_time_once(step: Callable[[], object]) -> float:
    """Return the processor's seconds for a step on a CPU, in all threads together.

    Other jobs on the machine affect them less than the time on the clock.
    """
    begin = time.process_time()
    step()
    return time.process_time() - begin


def time_interleaved(steps: dict[str, Callable[[], object]], repeats: int,
                     clock: Callable[[Callable[[], object]], float] = time_once,
                     summary: Callable[[list[float]], float] = statistics.median
                     ) -> dict[str, float]:
    """Return the median seconds of each step.

    Each round runs every step once, so that a slow phase of the machine affects all of them. A step
    that fails in the warm-up round is reported and skipped.

    Args:
        steps: What is measured, by name.
        repeats: Rounds.
        clock: Measures one call.
        summary: Of the times of a step, such as ``min`` on a machine with other jobs.
    """
    for name in list(steps):
        try:
            time_once(steps[name])
        except Exception as error:  # from another library, or out of memory
            print(f'    {name}: {type(error).__name__}: {str(error)[:200]}', file=sys.stderr)
            del steps[name]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(repeats):
        for name, step in steps.items():
            times[name].append(clock(step))
        print(f'\r    round {round_ + 1} of {repeats}', end='', file=sys.stderr, flush=True)
    print('\r' + ' ' * 30, end='\r', file=sys.stderr)
    return {name: summary(spent) for name, spent in times.items()}


def peak_memory(step: Callable[[], object]) -> float | None:
    """Return the peak GPU memory of a step in MiB, or None without a GPU.

    It is counted above what is held before and after the step: the parameters of all models that
    are compared.
    """
    if not torch.cuda.is_available():
        return None
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def page_faults(step: Callable[[], object]) -> int:
    """Count the minor page faults of a step.

    They occur when malloc has returned memory to the system, and they cost time. Their number
    depends on what the process has done before.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def saved_activation_memory(forward: Callable[[], object], parameters: list[Tensor]) -> float:
    """Return the MiB that a forward pass saves for the backward pass, without the parameters."""
    excluded = {p.untyped_storage().data_ptr() for p in parameters}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> None:
        # Storages are kept alive, because a freed address could be reused. Tensors are not: their
        # graph refers to this function, which would be a reference cycle.
        storage = t.untyped_storage()
        if storage.data_ptr() not in excluded:
            saved[storage.data_ptr()] = storage
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None):
        forward()
    return sum(storage.nbytes() for storage in saved.values()) / 2**20


def machine_peaks(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Measure FLOP/s with a large matmul, and bytes/s with a copy of 256 MiB."""
    side = 8192 if device == 'cuda' else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in 'ab')
    source = torch.empty(64 * 2**20, device=device)
    target = torch.empty_like(source)
    times = time_interleaved(
        dict(matmul=lambda: F.linear(a, b), copy=lambda: target.copy_(source)), 5)
    return 2 * side**3 / times['matmul'], 2 * source.nbytes / times['copy']


def describe_machine() -> str:
    """Return the processor and the software versions in one line."""
    if torch.cuda.is_available():
        chip = torch.cuda.get_device_name()
    else:
        chip = processor_name()
        chip += f', {torch.get_num_threads()} threads of {os.cpu_count()} cores'
    return (f'{chip}; Python {platform.python_version()}, PyTorch {torch.__version__}, '
            f'capability {torch.backends.cpu.get_cpu_capability()}')


def write_results(name: str, title: str, text: str) -> Path:
    """Write a dated file with the command, the machine and the versions; return its path."""
    today = datetime.date.today().isoformat()
    kind = 'gpu' if torch.cuda.is_available() else 'cpu'
    path = RESULTS / f'{today}-{name}-{kind}.md'
    RESULTS.mkdir(exist_ok=True)
    script = os.path.relpath(sys.argv[0], Path(__file__).parent.parent)
    path.write_text(f'# {title}, {today}\n\n`{" ".join(["python", script, *sys.argv[1:]])}`\n\n'
                    f'{describe_machine()}.\n\n{text}\n', encoding='utf-8')
    return path


def plot_speedups(path: Path, groups: dict[str, dict[str, float]],
                  baseline: str = 'the OpenMMLab baseline') -> None:
    """Plot speedups over the baseline: bars in one panel per group, or points in one row per group
    if there are more than six groups."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    if len(groups) > 6:
        figure = _points(plt, groups)
    else:
        figure = _bars(plt, groups)
    figure.supxlabel(f'speedup over {baseline}', fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _is_reference(name: str) -> bool:
    return name.endswith('(reference)')


def _bars(plt: ModuleType, groups: dict[str, dict[str, float]]) -> Figure:
    rows = max(len(group) for group in groups.values())
    figure, axes = plt.subplots(1, len(groups), figsize=(4.4 * len(groups), 0.34 * rows + 1.4),
                                squeeze=False)
    for axis, (title, group) in zip(axes[0], groups.items(), strict=True):
        names = list(group)[::-1]
        colors = ['tab:orange' if n.startswith('ours') else '0.85' if _is_reference(n) else '0.6'
                  for n in names]
        labels = [n.replace('convolutions alone', 'convolutions\nalone') for n in names]
        bars = axis.barh(labels, [group[n] for n in names], color=colors)
        axis.bar_label(bars, fmt='%.2f', padding=3, fontsize=9)
        axis.axvline(1, color='black', linewidth=0.8)
        axis.set_title(title.replace(', ', '\n', 1), fontsize=10, loc='right')
        axis.set_xlim(0, 1.18 * max(group.values()))
        axis.spines[['top', 'right']].set_visible(False)
    return figure


def _points(plt: ModuleType, groups: dict[str, dict[str, float]]) -> Figure:
    figure, axis = plt.subplots(figsize=(9, 0.3 * len(groups) + 1.8))
    titles = list(groups)[::-1]
    names = dict.fromkeys(n for group in groups.values() for n in group
                          if n.startswith('ours') or _is_reference(n))
    for name in names:
        points = [(groups[title][name], row) for row, title in enumerate(titles)
                  if name in groups[title]]
        style = dict(marker='|', markersize=11) if _is_reference(name) else dict(marker='o')
        axis.plot(*zip(*points, strict=True), linestyle='', label=name, **style)
    axis.axvline(1, color='black', linewidth=0.8)
    axis.set_yticks(range(len(titles)), titles, fontsize=9)
    axis.grid(axis='y', color='0.92')
    axis.set_axisbelow(True)
    axis.spines[['top', 'right']].set_visible(False)
    axis.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=3, fontsize=9,
                columnspacing=1, frameon=False)
    return figure
