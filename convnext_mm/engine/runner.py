"""The Runner that the recipes select by ``runner_type``."""
from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import BaseLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from ..checkpoints.files import check_whole, peek_checkpoint
from ..datasets.bad_files import name_bad_files
from ..datasets.transforms import use_faster_transforms
from ..errors import UserError
from ..precision import keep_outputs_in_fp32, reset_inference_dtype
from ..resolution import resolve
from ..runs import resuming
from ..runs.guards import FiniteLossHook, OutOfMemory, WorkerGuard, clear_ends, end_workers
from ..runs.heartbeat import TIMEOUT, HeartbeatHook
from ..runs.loops import LOOPS, ResumableLoop
from ..runs.random_state import run_seed
from ..runs.saving import STATE, SafeCheckpointHook, durable_path, is_local
from ..utils import unwrap_model
from . import speed
from .changes import changed_settings
from .distillation import DistillationHook
from .evaluation import count_in_blocks, keep_folders
from .fallbacks import CPUAmpOptimWrapper
from .memory import memory_advice
from .sharding import ShardedModel, ShardingHook, collect_state, shard_model, shard_optimizer


class ConvNeXtRunner(Runner):
    """A Runner that completes its config first.

    So ``data_root``, ``classes`` and ``fast`` work with the train and test scripts of mmseg and
    mmdet as well as with the tools of this package. The environment, the config and the parameter
    groups, hundreds of lines, go to the log file only. Runs are saved and resumed as
    :mod:`convnext_mm.runs` describes.
    """

    _resumed_from: str | None = None

    @classmethod
    def from_cfg(cls, cfg: Config) -> ConvNeXtRunner:
        """Build a Runner from a config, which is completed in place.

        Raises:
            UserError: See :func:`convnext_mm.resolution.resolve` and :func:`speed.apply_fast`.
        """
        for line in resolve(cfg):
            print_log(line, logger='current')
        speed.apply_fast(cfg)
        shard_model(cfg)
        shard_optimizer(cfg)
        return super().from_cfg(cfg)

    def train(self) -> nn.Module:
        """Train; validations compute as the optimizer wrapper and ``val_cfg`` say.

        Raises:
            UserError: See :mod:`convnext_mm.runs`; there is too little memory, or a process that
                loads data ended.
        """
        reset_inference_dtype(unwrap_model(self.model))
        try:
            with clear_ends('training'):
                return super().train()
        except OutOfMemory as error:
            raise OutOfMemory(f'{error}\n{memory_advice(self.cfg)}') from error
        finally:
            for loop in (self._train_loop, self._val_loop):
                end_workers(getattr(loop, 'dataloader', None))

    def val(self) -> dict[str, float]:
        """Validate."""
        with clear_ends('validation'):
            return super().val()

    def test(self) -> dict[str, float]:
        """Test.

        Raises:
            UserError: There is too little memory, or a process that loads data ended.
        """
        try:
            with clear_ends('testing'):
                return super().test()
        except OutOfMemory as error:
            raise OutOfMemory(f'{error}\nSmaller images (the scale of Resize in the test '
                              'pipeline), windows (model.test_cfg.mode=slide) and '
                              'inference_dtype=bf16 need less memory') from error

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        """Log environment and config, to the file."""
        with self._only_to_file():
            super()._log_env(env_cfg)

    def get_hooks_info(self) -> str:
        """The hooks in their order, in one line."""
        return ', '.join(type(hook).__name__ for hook in self.hooks)

    def build_optim_wrapper(self, optim_wrapper: Any) -> OptimWrapper:
        """Build the optimizer wrapper; its groups are listed in the file."""
        with self._only_to_file():
            built = super().build_optim_wrapper(optim_wrapper)
        if isinstance(built, (AmpOptimWrapper, CPUAmpOptimWrapper)):
            keep_outputs_in_fp32(unwrap_model(self.model))
        return built

    def register_hook(self, hook: Any, priority: Any = None) -> None:
        """Register a hook; in place of mmengine's CheckpointHook, the one that loses nothing."""
        if isinstance(hook, dict) and hook.get('type') in ('CheckpointHook', CheckpointHook):
            hook = {**hook, 'type': SafeCheckpointHook}
        super().register_hook(hook, priority)

    def register_hooks(self, default_hooks: Any = None, custom_hooks: Any = None) -> None:
        """Register the config's hooks, and the one that ends a run whose loss is not finite."""
        super().register_hooks(default_hooks, custom_hooks)
        if not any(isinstance(hook, FiniteLossHook) for hook in self.hooks):
            self.register_hook(FiniteLossHook())
        if not any(isinstance(hook, HeartbeatHook) for hook in self.hooks):
            self.register_hook(HeartbeatHook(self.cfg.get('process_timeout', TIMEOUT)))
        if isinstance(self.model, ShardedModel):
            self.register_hook(ShardingHook())
        if self.cfg.get('distil'):
            self.register_hook(DistillationHook())

    @staticmethod
    def build_dataloader(dataloader: Any, seed: int | None = None,
                         diff_rank_seed: bool = False) -> DataLoader:
        """Build a data loader with faster transforms and errors that name files.

        Its workers do not outlive the run.
        """
        try:
            built = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        except ValueError as error:
            if 'need at least one array' not in str(error):
                raise
            dataset = dataloader.get('dataset', {}) if isinstance(dataloader, dict) else {}
            raise UserError(f'the data set {dataset.get("ann_file") or dataset.get("data_prefix")} '
                            f'in {dataset.get("data_root")} has no images') from error
        use_faster_transforms(built.dataset)
        name_bad_files(built.dataset)
        if not isinstance(built.worker_init_fn, WorkerGuard):
            built.worker_init_fn = WorkerGuard(built.worker_init_fn)
        return built

    def build_train_loop(self, loop: Any) -> BaseLoop:
        """Build the loop that can be resumed at any iteration, with the seed of the resumed run."""
        if isinstance(loop, dict):
            self._restore_seed()
            loop = dict(loop)
            if 'type' not in loop:
                loop['type'] = ('EpochBasedTrainLoop' if loop.pop('by_epoch')
                                else 'IterBasedTrainLoop')
            loop['type'] = LOOPS.get(getattr(loop['type'], '__name__', loop['type']), loop['type'])
        return super().build_train_loop(loop)

    def build_test_loop(self, loop: Any) -> BaseLoop:
        """Build the loop, whose class maps keep the folders of their images."""
        built = super().build_test_loop(loop)
        if hasattr(built, 'evaluator'):
            keep_folders(built.evaluator, built.dataloader.dataset)
        return built

    def _restore_seed(self) -> None:
        """Seed the run with its own seed, drawn or given, before data are shuffled with it."""
        seed = run_seed(self)
        path = self._find_resumed()
        if path is not None:
            saved = (peek_checkpoint(path).get('meta') or {}).get('seed')
            given = self._randomness_cfg.get('seed')
            if saved is not None and given not in (None, saved):
                self.logger.warning(f'randomness.seed={given}, but {path}, which is resumed, was '
                                    f'trained with {saved}, which is kept')
            seed = seed if saved is None else saved
        self._randomness_cfg.update(seed=seed)
        self.set_randomness(**self._randomness_cfg)

    def _find_resumed(self) -> str | None:
        """The checkpoint to resume from, the same in all processes; None: none.

        Raises:
            UserError: See :func:`convnext_mm.runs.resuming.find_checkpoint`.
        """
        if not self._resume or self._resumed_from:
            return self._resumed_from
        found: list[str | None] = [None, None]
        if self.rank == 0:
            try:
                if self._load_from:
                    check_whole(self._load_from)
                found[0] = self._load_from or resuming.find_checkpoint(
                    {**self.cfg, 'work_dir': self.work_dir})
            except UserError as error:
                found[1] = str(error)
        broadcast_object_list(found)
        if found[1]:
            raise UserError(found[1])
        self._resumed_from = found[0]
        return found[0]

    def load_or_resume(self) -> None:
        """Load or resume a checkpoint, as the config says."""
        if self._has_loaded or not self._resume:
            super().load_or_resume()
            return
        path = self._find_resumed()
        if path is None:
            self.logger.warning(f'There is no checkpoint in {self.work_dir}: training starts from '
                                'the beginning')
            return
        self.logger.info(f'Resuming from {path}')
        self.resume(path)

    def resume(self, filename: str, *args: Any, **kwargs: Any) -> None:
        """Resume a checkpoint, see mmengine's method."""
        self._resume = True  # hooks ask for it
        super().resume(filename, *args, **kwargs)

    def load_checkpoint(self, filename: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load a checkpoint; if it is resumed, hand its place in the run to the loop."""
        checkpoint = super().load_checkpoint(filename, *args, **kwargs)
        if self._resume and isinstance(self._train_loop, ResumableLoop):
            self._train_loop.resumed = checkpoint.get(STATE) or {}
            changed = changed_settings(checkpoint['meta'].get('cfg'), self.cfg)
            if changed:
                listed = ''.join(f'\n  {line}' for line in changed)
                self.logger.warning(f'This config differs from the one that {filename} was trained '
                                    f'with (old → new):{listed}')
        return checkpoint

    def save_checkpoint(self, out_dir: str, filename: str, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint, which replaces a file of its name when it is whole on the disk.

        All processes call it, and the first one writes the file.

        Raises:
            UserError: It cannot be written.
        """
        collect_state(self, kwargs.get('save_optimizer', True))
        if not is_main_process():
            return
        if not is_local(out_dir):
            super().save_checkpoint(out_dir, filename, *args, **kwargs)
            return
        with durable_path(Path(out_dir, filename)) as part:
            super().save_checkpoint(out_dir, part.name, *args, **kwargs)

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        """Build the evaluator, which counts the pixels of large class maps exactly."""
        built = super().build_evaluator(evaluator)
        count_in_blocks(built)
        return built

    def dump_config(self) -> None:
        """Write the whole config to the work dir, unless it was read from there."""
        path = Path(self.work_dir, Path(self.cfg.filename or '').name)
        if not path.is_file() or path.resolve() != Path(self.cfg.filename).resolve():
            super().dump_config()

    @contextmanager
    def _only_to_file(self) -> Iterator[None]:
        """Inside, log messages below warnings are not shown on the console."""
        levels = {handler: handler.level for handler in self.logger.handlers
                  if not isinstance(handler, logging.FileHandler)}
        for handler in levels:
            handler.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for handler, level in levels.items():
                handler.setLevel(level)
