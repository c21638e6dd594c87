"""Small training runs of both tasks, in this process."""
from __future__ import annotations

import itertools
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from convnext_mm.engine import fallbacks
from convnext_mm.engine.checks import read_config
from convnext_mm.engine.runner import ConvNeXtRunner
from convnext_mm.runs import guards
from tests.helpers import DEMO_DETECTION, DEMO_SEGMENTATION

BACKBONE = {'model.backbone.depths': [1, 1, 1, 1], 'model.backbone.dims': [8, 16, 24, 32],
            'model.backbone.init_cfg': None, 'model.backbone.drop_path_rate': 0.3,
            'train_dataloader.batch_size': 2, 'default_hooks.logger.interval': 1,
            'custom_hooks': [], 'default_hooks.checkpoint.max_keep_ckpts': 1}
SEGMENTATION = {**BACKBONE, 'model.decode_head.in_channels': [8, 16, 24, 32],
                'model.decode_head.channels': 16, 'model.auxiliary_head.in_channels': 24,
                'train_cfg.max_iters': 8, 'train_cfg.val_interval': 4,
                'default_hooks.checkpoint.interval': 4}
DETECTION = {**BACKBONE, 'model.neck.in_channels': [8, 16, 24, 32], 'train_cfg.max_epochs': 2,
             'train_cfg.val_interval': 1}
TASKS = {'segmentation': (DEMO_SEGMENTATION, 'ADEChallengeData2016', SEGMENTATION),
         'detection': (DEMO_DETECTION, 'coco/', DETECTION)}
numbers = itertools.count()


def config(task: str, data: Path, work_dir: Path, options: dict[str, Any] | None = None) -> Config:
    """The config of a run of 8 iterations: of both tasks, the small demo."""
    path, folder, small = TASKS[task]
    cfg = read_config(path, {**small, 'data_root': f'{data}/{folder}', **(options or {})}, [])
    cfg.work_dir = str(work_dir)
    cfg.experiment_name = f'run_{next(numbers)}'  # mmengine's loggers are global
    fallbacks.adapt_to_device(cfg)
    return cfg


class AskToStop(Hook):
    """Asks the run to stop in an iteration, as a signal does."""

    priority = 'VERY_HIGH'

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if runner.iter + 1 == self.iteration:
            guards.stop_request.signal = guards.signal.SIGTERM


class Record(Hook):
    """Keeps the loss and the images of each iteration."""

    def __init__(self) -> None:
        self.losses: dict[int, float] = {}
        self.images: dict[int, list[str]] = {}

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.losses[runner.iter + 1] = float(outputs['loss'].detach())
        self.images[runner.iter + 1] = [Path(name).stem for name in guards.image_names(data_batch)]


def train(cfg: Config, *hooks: Hook, resume: bool = False) -> Record:
    """Train, or resume the work dir's run, until its end or a stop."""
    cfg.resume = resume
    return recorded(ConvNeXtRunner.from_cfg(cfg), *hooks)


def recorded(runner: ConvNeXtRunner, *hooks: Hook) -> Record:
    """Train until the end or a stop."""
    record = Record()
    for hook in (record, *hooks):
        runner.register_hook(hook)
    with suppress(SystemExit):
        runner.train()
    return record


def contents(path: Path) -> dict[str, Any]:
    """All of a checkpoint."""
    return torch.load(path, weights_only=False)


def last(work_dir: Path) -> dict[str, Any]:
    """The checkpoint that the pointer names."""
    return contents(work_dir / (work_dir / 'last_checkpoint').read_text())


def flat(value: Any, path: str = '') -> dict[str, Any]:
    """{path: value} of nested dictionaries and lists."""
    items = (value.items() if isinstance(value, dict) else enumerate(value)
             if isinstance(value, (list, tuple)) else None)
    if items is None:
        return {path: value}
    return {name: leaf for key, item in items for name, leaf in flat(item, f'{path}.{key}').items()}


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, optimizer, schedulers and place of two checkpoints are the same, bit for bit."""
    for part in ('state_dict', 'optimizer', 'param_schedulers', 'run_state'):
        ours, theirs = flat(one.get(part)), flat(other.get(part))
        assert ours.keys() == theirs.keys(), part
        for name, value in ours.items():
            same = (torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor)
                    else value == theirs[name])
            assert same, f'{part}{name}'
    assert one['meta']['iter'] == other['meta']['iter']


def start(cfg: Config) -> None:
    """Train in a process of its own, or resume if there is something; leave a file as it starts."""
    class Mark(Hook):
        def before_train(self, runner) -> None:
            Path(runner.work_dir, 'started').touch()

    cfg.resume = True
    runner = ConvNeXtRunner.from_cfg(cfg)
    runner.register_hook(Mark(), 'VERY_HIGH')
    runner.train()


def iterations(work_dir: Path) -> dict[int, float]:
    """{iteration: loss} of a work dir's logs, of all processes that trained in it."""
    lines = [json.loads(line) for path in sorted(work_dir.glob('*/vis_data/scalars.json'))
             for line in path.read_text().splitlines() if line.endswith('}')]
    losses: dict[int, float] = {}
    for line in lines:
        if 'loss' in line:
            losses[line['iter']] = line['loss']
    return losses
