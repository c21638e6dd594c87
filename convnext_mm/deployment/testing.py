"""``tools/test.py CONFIG FILE``: the metric of an exported file on a config's test images."""
from __future__ import annotations

import argparse
from typing import Any

from mmengine.config import Config
from rich.progress import track

from ..engine import checks
from ..errors import UserError
from ..inputs import find_recipe
from .checking import Metric, mask_threshold
from .images import ImageSource
from .runtimes import Exported, load_exported, to_sample

TASKS = dict(mmseg='segmentation', mmdet='detection')
"""From a config's scope to the task in an exported file's metadata."""


def test(args: argparse.Namespace) -> dict[str, float]:
    """Evaluate an exported file.

    Args:
        args: Arguments of ``tools/test.py``; ``checkpoint`` is the file.

    Returns:
        The metrics, in percent.

    Raises:
        UserError: The config, the data or the file are unusable, or do not belong together; or an
            option has no meaning for an exported file.
    """
    for name in ('out', 'show', 'show_dir', 'tta', 'dtype'):
        if getattr(args, name):
            raise UserError(f'--{name.replace("_", "-")} is for checkpoints, and '
                            f'{args.checkpoint} is an exported file')
    cfg = checks.read_config(find_recipe(args.config), args.cfg_options)
    exported = load_exported(args.checkpoint)
    source = ImageSource(cfg, 'test', None)
    check_same_task(exported, cfg, source, args.checkpoint)
    if exported.meta.get('fixed'):
        raise UserError(f'{args.checkpoint} is of a fixed size and not of that of the test images: '
                        'a metric needs a file that was exported without --size')
    values = evaluate(exported, cfg, source, quietly=False)
    print('\n'.join(f'{name}: {value:.2f}' for name, value in values.items()))
    return values


def evaluate(exported: Exported, cfg: Config, source: ImageSource, quietly: bool = True
             ) -> dict[str, float]:
    """The metrics of a file, in percent.

    Args:
        exported: The file.
        cfg: A completed config.
        source: Images with annotations.
        quietly: Do not print the table of classes.
    """
    metric = Metric(cfg, source.dataset, len(source) == len(source.dataset))
    for image in track(source, exported.name, total=len(source)):
        outputs = exported.run(image.pixels[None], image.size)
        metric.add([to_sample(outputs, 0, image.sample, mask_threshold(cfg))])
    return metric.values(quietly)


def check_same_task(exported: Exported, cfg: Config, source: ImageSource, path: str) -> None:
    """Check that a file and a config are of the same task and classes.

    Raises:
        UserError: They are not.
    """
    task = TASKS[cfg.default_scope]
    if exported.meta['task'] != task:
        raise UserError(f'{path} is of {exported.meta["task"]}, but the config is of {task}')
    ours, theirs = list(source.dataset.metainfo.get('classes') or ()), exported.meta['classes']
    if ours != theirs:
        first: Any = next((pair for pair in zip(ours, theirs, strict=False) if len(set(pair)) > 1),
                          ('', ''))
        raise UserError(f'{path} has {len(theirs)} classes and the config {len(ours)}'
                        + (f'; the first that differs is {first[1]!r} in the file and {first[0]!r} '
                           'in the config' if first[0] else ''))
