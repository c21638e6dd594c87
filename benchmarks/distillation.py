"""Train small models alone and with a teacher, over seeds, on the demo's data.

    make demo                          # or tools/demo.py: data, and the models that teach
    python benchmarks/distillation.py upernet cascade mask_rcnn

The students have half the width and five blocks. Teachers are the demo's models. Each student
trains once a seed and way: alone, with the loss of the teacher, and with the teacher's neck and
heads to start from as well. The metrics are those of the last validation. Results go to
benchmarks/results.
"""
from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import measuring
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

import convnext_mm

DEMO = 'work_dirs/demo'
SMALL = dict(depths=[1, 1, 2, 1], dims=[16, 32, 64, 128])
SEGMENTATION = ('configs/demo/upernet_convnext_demo.py',
                f'{DEMO}/upernet_convnext_demo/best.pth')
DETECTION = ('configs/demo/cascade_mask_rcnn_convnext_demo.py',
             f'{DEMO}/cascade_mask_rcnn_convnext_demo/best.pth')
AP = {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}


class Pair(NamedTuple):
    """A student and its teacher.

    Args:
        student, options: Config, and the keys to override.
        teacher: Config and checkpoint.
        metrics: {name in the log: name in the table}.
        factor: Of the metrics, to percent.
    """

    student: str
    options: dict[str, Any]
    teacher: tuple[str, str]
    metrics: dict[str, str]
    factor: float


PAIRS = dict(
    upernet=Pair(SEGMENTATION[0], dict(SMALL, max_iters=450, val_interval=450), SEGMENTATION,
                 {'mIoU': 'mIoU'}, 1),
    cascade=Pair(DETECTION[0], {**SMALL, 'model.backbone.init_cfg': None}, DETECTION, AP, 100),
    mask_rcnn=Pair('benchmarks/configs/mask_rcnn_student.py', {}, DETECTION, AP, 100))
WAYS: dict[str, dict[str, Any] | None] = {
    'alone': None, 'loss': dict(inherit=False), 'loss, neck and heads': dict(inherit=True)}


@HOOKS.register_module()
class LastMetricsHook(Hook):
    """Keeps the metrics of the last validation."""

    metrics: ClassVar[Mapping[str, float]] = {}

    def after_val_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        """Keep them."""
        type(self).metrics = metrics or {}


def train(pair: Pair, way: dict[str, Any] | None, seed: int) -> list[float]:
    """Train a student; return its metrics in percent."""
    options: dict[str, Any] = {**pair.options, 'seed': seed}
    if way is not None:
        config, checkpoint = pair.teacher
        options['distil'] = dict(teacher=config, checkpoint=checkpoint, **way)
    with tempfile.TemporaryDirectory() as folder:
        convnext_mm.train(pair.student, work_dir=folder,
                          custom_hooks=[dict(type='LastMetricsHook')], **options)
    return [pair.factor * LastMetricsHook.metrics[key] for key in pair.metrics]


def compare(pair: Pair, ways: list[str], seeds: list[int]) -> list[str]:
    """Train a student in every way; return the rows of a table."""
    rows = []
    teacher = convnext_mm.evaluate(*pair.teacher)
    rows.append(['teacher', *(f'{pair.factor * teacher[key]:.1f}' for key in pair.metrics)])
    for way in ways:
        runs = [train(pair, WAYS[way], seed) for seed in seeds]
        rows.append([way, *(f'{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} '
                            f'({", ".join(f"{value:.1f}" for value in values)})'
                            for values in zip(*runs, strict=True))])
        print(rows[-1], flush=True)
    rows[:0] = [['', *pair.metrics.values()], ['---'] * (1 + len(pair.metrics))]
    return ['| ' + ' | '.join(row) + ' |' for row in rows]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('students', nargs='+', choices=PAIRS)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=[*WAYS])
    parser.add_argument('--name', default='distillation-demo',
                        help='name of the result file in benchmarks/results')
    args = parser.parse_args()
    lines: list[str] = []
    for student in args.students:
        lines += [f'## {student}', '', *compare(PAIRS[student], args.ways, args.seeds), '']
    text = '\n'.join(['Mean ± standard deviation over the seeds, and the values, on the validation '
                      'images.', '', *lines]).rstrip()
    print(text)
    path = measuring.write_results(args.name, 'Students alone and with a teacher', text)
    print(f'Results: {path}')
