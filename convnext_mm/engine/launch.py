"""From a config and command-line options to a running Runner, for both tasks."""
from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from .. import checkpoints, migration
from ..checkpoints.loading import FitCheckpointHook
from ..datasets import contact_sheet, inspection
from ..errors import UserError
from ..utils import is_first_process, unwrap_model
from . import checks, fallbacks, speed


class KeyValueAction(DictAction):
    """mmengine's KEY=VALUE pairs; what is no pair is an error of usage."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        for pair in values:
            if '=' not in pair.lstrip('='):
                parser.error(f'{option_string}: expected KEY=VALUE, got {pair!r}')
        super().__call__(parser, namespace, values, option_string)


def common_parser(description: str, launcher: bool = True) -> argparse.ArgumentParser:
    """The arguments that the tools share; ``launcher``: those of several processes as well."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help='config file, such as '
                        'configs/upernet_convnext_tiny_512_160k_ade20k.py')
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and pictures '
                        '(work_dirs/CONFIG)')
    add_cfg_options(parser)
    if not launcher:
        return parser
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'],
                        default='none', help='how the processes are started (none)')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0,
                        help=argparse.SUPPRESS)
    return parser


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """``--cfg-options``."""
    parser.add_argument('--cfg-options', nargs='+', action=KeyValueAction, metavar='KEY=VALUE',
                        help='change settings of the config, such as '
                        'train_dataloader.batch_size=4 model.backbone.drop_path_rate=0.2; '
                        'lists as key="[a,b]"')


def run_cli(action: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Call ``action(args)``; a user's mistake ends in its message and status 2."""
    try:
        action(args)
    except UserError as error:
        if is_first_process():
            print(f'\nError: {error}', file=sys.stderr)
        sys.exit(2)


def train(args: argparse.Namespace) -> None:
    """Train by ``args``: those of :func:`common_parser`, ``resume``, ``amp``, ``auto_scale_lr``,
    ``migrate``."""
    cfg = _load_config(args)
    if args.amp:
        if cfg.optim_wrapper.type not in ('OptimWrapper', 'AmpOptimWrapper'):
            raise UserError(f'--amp works with optim_wrapper.type=OptimWrapper, this config has '
                            f'{cfg.optim_wrapper.type}')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UserError('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in '
                            'the config: the batch size over all GPUs that its lr is meant for')
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    splits = ('train', 'val') if cfg.get('val_cfg') else ('train',)
    with _build_runner(cfg, splits) as runner:
        runner.train()


def test(args: argparse.Namespace) -> None:
    """Evaluate by ``args``: those of :func:`common_parser` and ``checkpoint``, ``out``, ``show``,
    ``show_dir``, ``wait_time``, ``tta``."""
    cfg = _load_config(args)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        cfg.default_hooks.visualization.update(draw=True, interval=1, show=args.show,
                                               wait_time=args.wait_time)
        if args.show_dir and cfg.default_scope == 'mmdet':
            # A relative path would be taken below the run's folder of logs.
            cfg.default_hooks.visualization.test_out_dir = os.path.abspath(args.show_dir)
        elif args.show_dir:
            cfg.visualizer.save_dir = args.show_dir
    if args.tta or cfg.get('test_time_augmentation'):  # the latter in the _ms recipes
        _use_tta(cfg)
    dump = _dump_predictions(cfg, args.out) if args.out else None
    with _build_runner(cfg, ('test',)) as runner:
        model = unwrap_model(runner.model)  # from several processes, from augmentation
        checkpoints.check_complete(model, args.checkpoint)
        speed.enable_packed_inference(model)
        if dump is not None:
            runner.test_evaluator.metrics.append(dump())
        runner.test()


def check_dataset(args: argparse.Namespace) -> None:
    """Check the data by ``args``: those of :func:`common_parser`.

    Raises:
        UserError: There are errors, which have been printed.
    """
    cfg = _load_config(args)
    checks.check_data_exists(cfg, ('train', 'val'))
    found = inspection.inspect(cfg)
    print(inspection.report(found))
    picture = Path(cfg.work_dir, 'dataset.png')
    contact_sheet.draw(cfg, picture)
    print(f'Pictures with their annotations: {picture}')
    if any(problem.level == 'error' for one in found for problem in one.problems):
        raise UserError('the data has errors (✗ above)')


def _load_config(args: argparse.Namespace) -> Config:
    """The config with the options of the command line in it."""
    if vars(args).get('migrate'):
        args.config = _migrate_old_config(args)
    cfg = checks.read_config(args.config, args.cfg_options)
    if 'launcher' in args:
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
        cfg.launcher = args.launcher
    if args.work_dir:
        cfg.work_dir = args.work_dir
    elif not cfg.get('work_dir'):
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    return cfg


def _migrate_old_config(args: argparse.Namespace) -> str:
    """The new config for an old one, kept in the work dir; a new one as it is."""
    if not migration.old_keys(args.config):
        return args.config
    old = Path(args.config)
    # In a folder of its own: mmengine writes the whole config it runs under the name of the file.
    new = Path(args.work_dir or Path('work_dirs', old.stem), 'migrated', old.name)
    said = migration.migrate(old, new)
    new.with_name('report.txt').write_text(said + '\n', encoding='utf-8')
    if is_first_process():
        print(said)
    return str(new)


@contextmanager
def _build_runner(cfg: Config, splits: tuple[str, ...]) -> Iterator[Runner]:
    """Check the input, adapt the config to the machine, and build the Runner in its processes."""
    changes = fallbacks.adapt_to_device(cfg)
    checks.check_data_exists(cfg, splits)
    checks.check_data_sample(cfg, splits)
    checks.check_weights(cfg, training='train' in splits)
    with fallbacks.process_group(cfg):
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        if not any(isinstance(hook, FitCheckpointHook) for hook in runner.hooks):
            runner.register_hook(FitCheckpointHook())  # the config has its own custom_hooks
        fallbacks.log_changes(changes)
        yield runner


def _use_tta(cfg: Config) -> None:
    """Wrap the model and swap the test pipeline for test-time augmentation.

    Raises:
        UserError: The config does not say which augmentations.
    """
    for key in ('tta_model', 'tta_pipeline'):
        if key not in cfg:
            raise UserError(f'--tta needs {key} in the config; the recipes have it in '
                            'configs/_base_/')
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    roi_head = cfg.model.get('roi_head', {})
    if roi_head.get('mask_head'):
        print('--tta: boxes only, since mmdet merges no masks.')
        roi_head.update(mask_head=None, mask_roi_extractor=None)
        cfg.test_evaluator.metric = ['bbox']
    cfg.model = ConfigDict(**deepcopy(cfg.tta_model), module=cfg.model)


def _dump_predictions(cfg: Config, out: str) -> Callable | None:
    """Have predictions written: PNG masks to a folder (mmseg) or one pickle (mmdet).

    Returns:
        For mmdet, what builds the dumping metric once the runner is there.

    Raises:
        UserError: A name that mmdet's dump does not take.
    """
    if cfg.default_scope == 'mmseg':
        cfg.test_evaluator.update(output_dir=out, keep_results=True)
        return None
    if not out.endswith(('.pkl', '.pickle')):
        raise UserError(f'--out {out}: detections are written to one file, expected a name that '
                        'ends in .pkl')

    def build():
        from mmdet.evaluation import DumpDetResults
        return DumpDetResults(out_file_path=out)
    return build
