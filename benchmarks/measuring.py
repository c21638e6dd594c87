"""What the benchmarks share: turns, ceilings of the machine, result files."""
from __future__ import annotations

import datetime
import os
import platform
import re
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

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / 'results'
DTYPES = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)


def pair(text: str) -> tuple[int, int]:
    """WxH of the command line."""
    width, height = map(int, text.split('x'))
    return width, height


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(step: Callable[[], object]) -> float:
    """How long a step takes, with what it leaves on the GPU."""
    synchronize()
    begin = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - begin


def in_turns(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each step; they take turns, so that a slow minute falls on all of them.

    A step that fails in its first turn, which is for warming up, is left out with its reason.
    """
    for name in list(steps):
        try:
            seconds(steps[name])
        except Exception as error:  # another library's, or out of memory
            print(f'    {name}: {type(error).__name__}: {str(error)[:200]}', file=sys.stderr)
            del steps[name]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats):
        for name, step in steps.items():
            times[name].append(seconds(step))
        print(f'\r    turn {turn + 1} of {repeats}', end='', file=sys.stderr, flush=True)
    print('\r' + ' ' * 30, end='\r', file=sys.stderr)
    return {name: statistics.median(spent) for name, spent in times.items()}


def peak_memory(step: Callable[[], object]) -> float | None:
    """MiB that a step holds at most on the GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def page_faults(step: Callable[[], object]) -> int:
    """Pages that the system hands out in a step, because malloc has given memory back.

    A step takes longer for them; how many there are depends on what else the process has done.
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def kept_memory(forward: Callable[[], object], parameters: list[Tensor]) -> float:
    """MiB that a forward pass keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> None:
        """Holds the storage, or its address could come again; not the tensor, whose graph would
        hold this function and so itself."""
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None):
        forward()
    return sum(storage.nbytes() for storage in kept.values()) / 2**20


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """FLOPs and bytes a second of this machine: a large product, and a copy of 256 MiB."""
    side = 8192 if device == 'cuda' else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in 'ab')
    source = torch.empty(64 * 2**20, device=device)
    target = torch.empty_like(source)
    times = in_turns(dict(product=lambda: F.linear(a, b), copy=lambda: target.copy_(source)), 5)
    return 2 * side**3 / times['product'], 2 * source.nbytes / times['copy']


def machine() -> str:
    """This machine and its versions, in a line."""
    if torch.cuda.is_available():
        chip = torch.cuda.get_device_name()
    else:
        chip = platform.processor() or platform.machine()
        listed = Path('/proc/cpuinfo')
        if listed.exists():
            names = re.findall(r'model name\s*: (.*)', listed.read_text())
            chip = names[0] if names else chip
        chip += f', {torch.get_num_threads()} threads of {os.cpu_count()} cores'
    return (f'{chip}; Python {platform.python_version()}, PyTorch {torch.__version__}, '
            f'capability {torch.backends.cpu.get_cpu_capability()}')


def write_results(name: str, title: str, text: str) -> Path:
    """Keep a dated file with the machine, the versions and the command; returns its path."""
    today = datetime.date.today().isoformat()
    kind = 'gpu' if torch.cuda.is_available() else 'cpu'
    path = RESULTS / f'{today}-{name}-{kind}.md'
    RESULTS.mkdir(exist_ok=True)
    script = os.path.relpath(sys.argv[0], Path(__file__).parent.parent)
    path.write_text(f'# {title}, {today}\n\n`{" ".join(["python", script, *sys.argv[1:]])}`\n\n'
                    f'{machine()}.\n\n{text}\n', encoding='utf-8')
    return path


def plot_ratios(path: Path, groups: dict[str, dict[str, float]]) -> None:
    """How many times as fast as the reference each is: bars, a panel a group; or, of more than six
    groups, points, a line a group."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    if len(groups) > 6:
        figure = _points(plt, groups)
    else:
        figure = _bars(plt, groups)
    figure.supxlabel("times as fast as OpenMMLab's sequence", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _limit(name: str) -> bool:
    return name.endswith('(limit)')


def _bars(plt: ModuleType, groups: dict[str, dict[str, float]]) -> Figure:
    rows = max(len(group) for group in groups.values())
    figure, axes = plt.subplots(1, len(groups), figsize=(4.4 * len(groups), 0.34 * rows + 1.4),
                                squeeze=False)
    for axis, (title, group) in zip(axes[0], groups.items(), strict=True):
        names = list(group)[::-1]
        colors = ['tab:orange' if n.startswith('ours') else '0.85' if _limit(n) else '0.6'
                  for n in names]
        bars = axis.barh(names, [group[n] for n in names], color=colors)
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
                          if n.startswith('ours') or _limit(n))
    for name in names:
        held = [(groups[title][name], row) for row, title in enumerate(titles)
                if name in groups[title]]
        style = dict(marker='|', markersize=11) if _limit(name) else dict(marker='o')
        axis.plot(*zip(*held, strict=True), linestyle='', label=name, **style)
    axis.axvline(1, color='black', linewidth=0.8)
    axis.set_yticks(range(len(titles)), titles, fontsize=9)
    axis.grid(axis='y', color='0.92')
    axis.set_axisbelow(True)
    axis.spines[['top', 'right']].set_visible(False)
    axis.legend(loc='lower center', bbox_to_anchor=(0.5, 1), ncols=3, fontsize=9,
                frameon=False)
    return figure
