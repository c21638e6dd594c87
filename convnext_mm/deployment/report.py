"""What an export's comparison found, as Markdown, JSON and pictures."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..utils import atomic_path, processor_name
from ..visualization import (
    class_colors,
    draw_instances,
    draw_labels,
    pyplot,
    save_figure,
    to_grayscale,
    to_picture,
)
from .checking import Difference, as_dicts, primary
from .images import Image


@dataclass
class Report:
    """The comparison of an exported file with PyTorch.

    Args:
        file: Name of the exported file.
        runtime: What it ran in.
        meta: Its metadata.
        megabytes: Its size.
        cases: Comparisons on images.
        metrics: PyTorch's and the runtime's.
        latency: Milliseconds of both, see :meth:`convnext_mm.deployment.checking.Comparison
            .latency`, and of which input.
        notes: What else the user should know.
        problem: Why the file was not kept, or ''.
    """

    file: str
    runtime: str
    meta: dict[str, Any]
    megabytes: float
    cases: list[Difference] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    latency: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problem: str = ''

    def write(self, path: str | Path) -> None:
        """Write ``path`` with the suffixes .md and .json."""
        path = Path(path)
        content = dict(vars(self), cases=as_dicts(self.cases), machine=processor_name(),
                       threads=torch.get_num_threads())
        for suffix, text in (('.json', json.dumps(content, indent=1, ensure_ascii=False)),
                             ('.md', str(self))):
            with atomic_path(path.with_name(path.name + suffix)) as part:
                part.write_text(text + '\n', encoding='utf-8')

    def __str__(self) -> str:
        lines = [f'# {self.file} in {self.runtime}, compared with PyTorch', '',
                 f'**Not kept: {self.problem}**' if self.problem else
                 'The metric is within the limit.' if self.meta.get('int8') or self.meta.get(
                     'precision') else 'Equal within the limits.',
                 '', f'{self.megabytes:.1f} MB; {self.meta["config"]}, weights '
                 f'{self.meta["weights"]}.', '',
                 '| images | number | other pixels | detections | unmatched | box (px) | score |',
                 '|---|---|---|---|---|---|---|']
        lines += [f'| {case.case} | {case.images} | {case.other_pixels} of {case.pixels} | '
                  f'{case.detections} | {case.unmatched} | {case.box:.1e} | {case.score:.1e} |'
                  for case in self.cases]
        if self.metrics:
            (_, ours), (_, theirs) = self.metrics.items()
            lines += ['', f'| metric | {" | ".join(self.metrics)} |', '|---|---|---|']
            lines += [f'| {key} | {value:.2f} | {theirs.get(key, float("nan")):.2f} |'
                      for key, value in primary(ours).items()]
        if self.latency:
            lines += ['', f'| {self.latency["input"]} | processor ms | clock ms |', '|---|---|---|']
            lines += [f'| {name} | {times["processor"]:.1f} | {times["clock"]:.1f} |'
                      for name, times in self.latency['times'].items()]
            lines += ['', f'{processor_name()}, {torch.get_num_threads()} threads.']
        return '\n'.join([*lines, *('\n' + note for note in self.notes)])


def draw_pair(image: Image, samples: dict[str, Any], meta: dict[str, Any], path: Path) -> None:
    """Draw an image beside the results of PyTorch and of a runtime.

    Args:
        image: The resized image.
        samples: {title: data sample}.
        meta: ``classes`` and ``palette``.
        path: The PNG file to write.
    """
    picture = to_picture(image.pixels)
    height, width = image.size.tolist()
    classes: Sequence[str] = meta['classes']
    colors = class_colors(meta.get('palette'), len(classes))
    figure, axes = pyplot().subplots(1, 1 + len(samples), figsize=(
        5 * (1 + len(samples)), 5 * height / width + 0.5), squeeze=False)
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes[0][0].imshow(picture, extent=extent)
    axes[0][0].set_title('Input')
    for axis, (title, sample) in zip(axes[0][1:], samples.items(), strict=True):
        segments = 'pred_sem_seg' in sample
        axis.imshow(to_grayscale(picture) if segments else picture, extent=extent)
        axis.set_title(title)
        if segments:
            draw_labels(axis, sample.pred_sem_seg, np.asarray(colors))
        else:
            draw_instances(axis, sample.pred_instances, classes, colors)
    for axis in axes[0]:
        axis.axis('off')
    figure.tight_layout()
    save_figure(figure, path)
