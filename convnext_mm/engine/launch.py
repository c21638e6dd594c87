"""Training, testing and checking for both tasks: from a config and options to a running Runner."""
from __future__ import annotations

import argparse
import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from .. import checkpoints
from ..checkpoints.hook import FitCheckpointHook
from ..datasets import datasets_of_split, inspection, metrics_of_split
from ..datasets.contact_sheet import draw_contact_sheet
from ..datasets.findings import Findings, Problem
from ..errors import UserError
from ..inputs import find_recipe
from ..migration.parsing import old_keys
from ..precision import check_dtype
from ..utils import atomic_path, is_first_process, track_rows, unwrap_model, writable_folder
from . import checks, distillation, fallbacks, speed
from .runner import ConvNeXtRunner
from .summary import summarize


def train(args: argparse.Namespace) -> Runner | None:
    """Train a model.

    Args:
        args: Arguments of :func:`convnext_mm.cli.add_config`, ``resume``, ``amp``,
            ``auto_scale_lr``, ``migrate`` and ``dry_run``.

    Returns:
        The Runner; None with ``dry_run``.

    Raises:
        UserError: The arguments, the config, the data or the weights are unusable.
    """
    notes: list[str] = []
    cfg = _load_config(args, notes)
    if args.amp:
        if cfg.optim_wrapper.type not in ('OptimWrapper', 'AmpOptimWrapper'):
            raise UserError(f'--amp needs optim_wrapper.type=OptimWrapper, but this config sets '
                            f'{cfg.optim_wrapper.type}')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UserError('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in '
                            'the config: the total batch size that its lr was chosen for')
        cfg.auto_scale_lr.enable = True
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    distillation.read_teacher(cfg)
    _print_summary(cfg, notes, training=True)
    splits = ('train', 'val') if cfg.get('val_cfg') else ('train',)
    if args.dry_run:
        checks.check_input(cfg, splits)
        return None
    with _build_runner(cfg, splits) as runner:
        runner.train()
    return runner


def test(args: argparse.Namespace) -> dict[str, float]:
    """Evaluate a model.

    Args:
        args: Arguments of :func:`convnext_mm.cli.add_config`, ``checkpoint``, ``out``, ``show``,
            ``show_dir``, ``wait_time``, ``dtype`` and ``tta``.

    Returns:
        The metrics.

    Raises:
        UserError: The arguments, the config, the data or the checkpoint are unusable.
    """
    notes: list[str] = []
    cfg = _load_config(args, notes)
    check_dtype(cfg.get('inference_dtype') or 'fp32', get_device())
    cfg.load_from = args.checkpoint
    if args.show:
        cfg.default_hooks.visualization.update(draw=True, interval=1, show=True,
                                               wait_time=args.wait_time)
    if args.show_dir:
        # The toolboxes' hooks read images in their own way, and draw at their full size.
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(
            type='PredictionsHook', num_pictures=None, width=None,
            folder=str(args.show_dir))]
    if args.tta or cfg.get('test_time_augmentation'):  # set in the _ms recipes
        _use_tta(cfg)
    build_dump_metric = _dump_predictions(cfg, args.out) if args.out else None
    _print_summary(cfg, notes, training=False)
    with _build_runner(cfg, ('test',)) as runner:
        model: Any = unwrap_model(runner.model)  # from DistributedDataParallel and augmentation
        checkpoints.check_complete(model, args.checkpoint)
        for folder in (args.show_dir, args.out if build_dump_metric is None else None):
            if folder:
                writable_folder(folder)
        speed.enable_packed_inference(model)
        if hasattr(model, 'progress') and is_first_process():
            model.progress = track_rows
        if build_dump_metric is not None:
            runner.test_evaluator.metrics.append(build_dump_metric())
        try:
            return runner.test()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(f'the disk is full ({error}). The results, in '
                            f'{", ".join(filter(None, (cfg.work_dir, args.out, args.show_dir)))}, '
                            'are incomplete: make room, and run the test again') from error


class DataCheck(NamedTuple):
    """What a check of data found; ``str()`` is the report.

    Args:
        found: For each data set its images, classes and problems.
        picture: Images with their annotations, as training sees them.
    """

    found: list[Findings]
    picture: Path

    @property
    def errors(self) -> list[Problem]:
        """The problems that would stop or starve training."""
        return [problem for one in self.found for problem in one.problems
                if problem.level == 'error']

    def __str__(self) -> str:
        return inspection.format_report(self.found)


def check_data(args: argparse.Namespace, show: Callable[[str], object] = str) -> DataCheck:
    """Check all images and annotations, and draw a contact sheet.

    Args:
        args: Arguments of :func:`convnext_mm.cli.add_config`.
        show: Called with the report before anything is drawn.

    Raises:
        UserError: The config cannot be read, data is missing, or the work dir cannot be written to.
    """
    cfg = _load_config(args)
    val, test = ([[one.get(key) for key in ('data_root', 'ann_file', 'data_prefix')]
                  for one in datasets_of_split(cfg, split)] for split in ('val', 'test'))
    splits = ('train', 'val') if test == val else ('train', 'val', 'test')
    checks.check_data_exists(cfg, splits)
    picture = writable_folder(cfg.work_dir) / 'dataset.png'
    done = DataCheck(inspection.inspect_splits(cfg, splits=splits), picture)
    show(str(done))
    draw_contact_sheet(cfg, done.picture)
    return done


def check_dataset(args: argparse.Namespace) -> None:
    """Check data as :func:`check_data` does, and print what was found.

    Raises:
        UserError: The data has errors; the report lists them.
    """
    done = check_data(args, print)
    print(f'Images with their annotations: {done.picture}')
    if done.errors:
        raise UserError('the data has errors (✗ above)')


def _print_summary(cfg: Config, notes: list[str], training: bool) -> None:
    """Print what the run will do, and write the whole config to the work dir.

    Raises:
        UserError: The work dir cannot be written to.
    """
    text = summarize(cfg, notes, training)
    if is_first_process():
        path = writable_folder(cfg.work_dir) / Path(cfg.filename).name
        if path.resolve() != Path(cfg.filename).resolve():  # it may have been written by hand
            with atomic_path(path) as part:
                cfg.dump(part)
        print(f'{text}\nWhole config: {path}', flush=True)


def _load_config(args: argparse.Namespace, notes: list[str] | None = None) -> Config:
    """Return the completed config with the command-line options applied."""
    args.config = find_recipe(args.config)
    if vars(args).get('migrate'):
        args.config = _migrate_old_config(args)
    options = dtype_options(args)
    if args.work_dir:
        options['work_dir'] = args.work_dir  # files of results are named below it
    cfg = checks.read_config(args.config, options, notes)
    if 'launcher' in args:
        os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
        cfg.launcher = args.launcher
    if not cfg.get('work_dir'):
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    return cfg


def dtype_options(args: argparse.Namespace) -> dict[str, Any]:
    """``--cfg-options``, with ``--dtype`` as the option that it stands for."""
    dtype = vars(args).get('dtype')
    return {**(args.cfg_options or {}), **({'inference_dtype': dtype} if dtype else {})}


def _migrate_old_config(args: argparse.Namespace) -> str:
    """Convert an old config into the work dir and return the new path; leave others as they are."""
    if not old_keys(args.config):
        return args.config
    old = Path(args.config)
    # In a subfolder, because mmengine dumps the complete config under this name to the work dir.
    new = Path(args.work_dir or Path('work_dirs', old.stem), 'migrated', old.name)
    from . import conversion
    report = conversion.migrate(old, new)
    new.with_name('report.txt').write_text(report + '\n', encoding='utf-8')
    if is_first_process():
        print(report)
    return str(new)


@contextmanager
def _build_runner(cfg: Config, splits: tuple[str, ...]) -> Iterator[Runner]:
    """Check the input, adapt the config to the device, and build the Runner in a process group."""
    changes = fallbacks.adapt_to_device(cfg)
    if 'train' in splits:
        fallbacks.check_losses(cfg)
    checks.check_input(cfg, splits)
    with fallbacks.process_group(cfg):
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else ConvNeXtRunner.from_cfg(cfg)
        if not any(isinstance(hook, FitCheckpointHook) for hook in runner.hooks):
            runner.register_hook(FitCheckpointHook())  # the config overrides custom_hooks
        fallbacks.log_changes(changes)
        yield runner


def _use_tta(cfg: Config) -> None:
    """Wrap the model and replace the test pipeline for test-time augmentation.

    Raises:
        UserError: The config does not define the augmentations.
    """
    for key in ('tta_model', 'tta_pipeline'):
        if key not in cfg:
            raise UserError(f'--tta needs {key} in the config; for an example see '
                            'configs/_base_/')
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    roi_head = cfg.model.get('roi_head', {})
    if roi_head.get('mask_head'):
        print('--tta: evaluating boxes only, because mmdet cannot merge masks.')
        roi_head.update(mask_head=None, mask_roi_extractor=None)
        for metric in metrics_of_split(cfg, 'test'):
            if 'segm' in metric.get('metric', ()):
                metric['metric'] = ['bbox']
        # A test validates nothing; what was set for masks there would contradict the model.
        cfg.update(val_dataloader=None, val_cfg=None, val_evaluator=None)
    cfg.model = ConfigDict(**deepcopy(cfg.tta_model), module=cfg.model)
    speed.request_logits(cfg)


def _dump_predictions(cfg: Config, out: str) -> Callable | None:
    """Write predictions to a folder of PNG masks (mmseg) or to a pickle file (mmdet).

    Returns:
        For mmdet, a function that builds the metric to add to the runner's evaluator.

    Raises:
        UserError: The file name does not end in .pkl (mmdet).
    """
    if cfg.default_scope == 'mmseg':
        metrics = metrics_of_split(cfg, 'test')
        writer = next((one for one in metrics
                       if one['type'] in ('IoUMetric', 'CityscapesMetric')), metrics[0])
        writer['output_dir'] = str(out)
        if writer['type'] == 'CityscapesMetric':  # it deletes them otherwise
            writer['keep_results'] = True
        return None
    if not out.endswith(('.pkl', '.pickle')):
        raise UserError(f'--out {out}: detections are written to one file, whose name must end '
                        'in .pkl')

    def build_metric():
        from mmdet.evaluation import DumpDetResults
        return DumpDetResults(out_file_path=out)
    return build_metric
