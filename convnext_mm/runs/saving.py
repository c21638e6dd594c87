"""Checkpoints that are whole or not there, whenever the process, the disk or the model fails."""
from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, get_world_size, is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.logging import MessageHub, print_log
from mmengine.optim import OptimWrapper
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import UserError
from ..utils import atomic_path, unwrap_model
from . import guards
from .shards import own_part, whole

POINTER = 'last_checkpoint'
"""The file in the work dir that names the last checkpoint, relative to itself."""
INTERRUPTED = 'interrupted.pth'
"""The checkpoint of a stopped run; it goes when the resumed run has saved its next one."""
BEST = 'best.pth'
"""The stable name of the best checkpoint."""
STATE = 'run_state'
"""The key of a checkpoint under which the place in the run is kept."""


@contextmanager
def durable_path(path: Path) -> Iterator[Path]:
    """A temporary path that replaces ``path`` when its contents are on the disk.

    Raises:
        UserError: The file cannot be written; what was at ``path`` before is still there.
    """
    try:
        with atomic_path(path) as part:
            yield part
            _sync(part)
        _sync(path.parent)
    except OSError as error:
        raise UserError(f'cannot write {path}: {error.strerror or error}. Checkpoints that were '
                        'there before are whole: make room or set another --work-dir, then '
                        'continue with --resume') from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_local(folder: str | Path) -> bool:
    """Whether a folder is in the file system, and not, for example, on s3://."""
    return '://' not in str(folder)


def remove_parts(folder: Path) -> None:
    """Remove what a process that was killed while it saved has left."""
    for part in folder.glob('.*_part.pt*'):
        part.unlink(missing_ok=True)


class SafeCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, with an order in which no kill loses anything.

    A new checkpoint is complete on the disk before ``last_checkpoint`` names it, and only then the
    files that it replaces are removed, the previous best among them. A checkpoint lists them, so
    that a run killed in between removes them when it is resumed. ``best.pth`` is always the best
    one. A model whose weights are not finite is not saved and removes nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._saved_at = -1
        self._gradients: dict[str, Tensor] = {}
        self._previous_best: set[str] = set()

    def before_train(self, runner: Any) -> None:
        """Find the folder, which may have moved, and finish what a killed run did not."""
        super().before_train(runner)
        hub = runner.message_hub
        for key in self._best_keys():
            if hub.get_info(key):
                hub.update_info(key, self._path(os.path.basename(hub.get_info(key))))
        if self.save_best and len(self.key_indicators) == 1:
            self.best_ckpt_path = hub.get_info('best_ckpt')
        elif self.save_best:
            self.best_ckpt_path_dict = {key: hub.get_info(f'best_ckpt_{key}')
                                        for key in self.key_indicators}
        resumed = getattr(runner, '_resumed_from', None)
        here = is_local(self.out_dir)
        if resumed and here and Path(resumed).resolve().parent == Path(self.out_dir).resolve():
            self.last_ckpt, self._saved_at = self._path(os.path.basename(resumed)), runner.iter
            self._point(runner)  # killed between a save and this
        if is_main_process() and here:
            remove_parts(Path(self.out_dir))
            self._remove(runner, hub.get_info('outdated_ckpts') or [])

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Add the place in the run."""
        loop = runner._train_loop
        if 'optimizer' in checkpoint and hasattr(loop, 'state'):
            checkpoint[STATE] = dict(loop.state(checkpoint['meta']['iter']),
                                     gradients=self._gradients)

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None,
                       outputs: Any = None) -> None:
        """Stop in a validation if nothing is lost by it: the resumed run validates first."""
        loop = runner._train_loop
        if (guards.stop_request.signal and get_world_size() == 1 and hasattr(loop, 'state')
                and self._saved_at == loop.iter):
            guards.end_run(self.last_ckpt, loop.iter)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float]) -> None:
        """Save the best checkpoint, and at the end of a run that it was validated."""
        loop = runner._train_loop
        if not hasattr(loop, 'state'):  # a validation alone
            super().after_val_epoch(runner, metrics)
            return
        loop.validated = loop.iter
        saved_at = self._saved_at
        self._saved_at = -1
        super().after_val_epoch(runner, metrics)
        if self._saved_at < 0:
            self._saved_at = saved_at
            if self._saved_at == loop.iter == loop.max_iters:
                step = runner.epoch if self.by_epoch else runner.iter
                self._save_checkpoint_with_step(runner, step,
                                                dict(epoch=runner.epoch, iter=runner.iter))

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        """Save; unlike mmengine's, remove what is outdated at the end."""
        if not self._is_finite(runner):
            return
        outdated = []
        if self.max_keep_ckpts > 0 and list(self.keep_ckpt_ids)[-1:] != [step]:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated.append(self.filename_tmpl.format(self.keep_ckpt_ids.popleft()))
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        self._write(runner, self.filename_tmpl.format(step), meta, [*outdated, INTERRUPTED])

    def save_interrupted(self, runner: Any) -> str | None:
        """Save between two iterations, unless that was just done; return the checkpoint's path."""
        if self._saved_at != runner.iter and self._is_finite(runner):
            self._write(runner, INTERRUPTED, dict(epoch=runner.epoch, iter=runner.iter), [])
        barrier()  # launchers end all processes when the first one exits
        return self.last_ckpt

    def _write(self, runner: Any, name: str, meta: dict[str, Any], outdated: list[str]) -> None:
        """Save a checkpoint, then let the pointer name it, then remove what is outdated."""
        best = self._previous_best - self._best(runner)
        outdated = [*outdated, *map(os.path.basename, best)]
        self.last_ckpt = self._path(name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.message_hub.update_info('outdated_ckpts', outdated)
        self._gradients = accumulated_gradients(runner)
        runner.save_checkpoint(
            self.out_dir, name, self.file_client_args, save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler, meta=meta, by_epoch=self.by_epoch,
            backend_args=self.backend_args, **self.args)
        self._saved_at = meta['iter']
        self._point(runner)
        if is_main_process():
            self._remove(runner, outdated)

    def _point(self, runner: Any) -> None:
        """Let the pointer name the last checkpoint."""
        if is_main_process():
            with durable_path(Path(runner.work_dir, POINTER)) as part:
                part.write_text(relative(str(self.last_ckpt), runner.work_dir))

    def _save_best_checkpoint(self, runner: Any, metrics: dict[str, float]) -> None:
        """Save the best checkpoint; unlike mmengine's, remove the previous one last."""
        if not self.save_best or not self._is_finite(runner):
            return
        # mmengine removes no previous one where it knows of none.
        single = len(self.key_indicators) == 1
        before = {'': self.best_ckpt_path} if single else dict(self.best_ckpt_path_dict)
        self._previous_best = self._best(runner)
        if single:
            self.best_ckpt_path = None
        else:
            self.best_ckpt_path_dict = dict.fromkeys(before)
        super()._save_best_checkpoint(runner, metrics)
        if single:
            self.best_ckpt_path = self.best_ckpt_path or before['']
        else:
            self.best_ckpt_path_dict = {key: path or before.get(key)
                                        for key, path in self.best_ckpt_path_dict.items()}
        outdated = self._previous_best - self._best(runner)
        self._previous_best = set()
        if is_main_process():  # where no other checkpoint was saved
            self._remove(runner, [os.path.basename(path) for path in outdated])

    def _best_keys(self) -> list[str]:
        """Where mmengine's message hub keeps the paths of the best checkpoints."""
        if not self.save_best:
            return []
        return ['best_ckpt'] if len(self.key_indicators) == 1 else [
            f'best_ckpt_{key}' for key in self.key_indicators]

    def _best(self, runner: Any) -> set[str]:
        """The best checkpoints."""
        paths = map(runner.message_hub.get_info, self._best_keys())
        return {str(path) for path in paths if path}

    def _path(self, name: str) -> str:
        return self.file_backend.join_path(self.out_dir, name)

    def _remove(self, runner: Any, names: list[str]) -> None:
        """Give the best checkpoint (by the first metric) its stable name, then remove files."""
        first = next(map(runner.message_hub.get_info, self._best_keys()), None)
        if first and is_local(self.out_dir) and os.path.isfile(first):
            link_best(Path(first))
        kept = {os.path.basename(str(path)) for path in (*self._best(runner), self.last_ckpt)}
        for name in names:
            path = self._path(name)
            if name in kept:
                continue
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)
            elif self.file_backend.isdir(path):  # of DeepSpeed
                self.file_backend.rmtree(path)

    def _is_finite(self, runner: Any) -> bool:
        """Whether all weights are finite in all processes; says so if not."""
        state = unwrap_model(runner.model).state_dict()
        bad = next((name for name, value in state.items() if isinstance(value, Tensor)
                    and value.is_floating_point() and not torch.isfinite(own_part(value)).all()),
                   None)
        if not guards.any_process(bad is not None):
            return True
        print_log(f'Not saved: weights of the model are not finite ({bad}). The checkpoints before '
                  f'stay, the last of them {self.last_ckpt}', logger='current',
                  level=logging.WARNING)
        return False


def link_best(path: Path) -> None:
    """Give the best checkpoint its stable name, as a second name of the file or a copy of it."""
    stable = path.with_name(BEST)
    if stable.exists() and stable.samefile(path):
        return
    with durable_path(stable) as part:
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, part)


def read_pointer(work_dir: str | Path) -> str:
    """What ``last_checkpoint`` in a work dir names; '' without one."""
    path = Path(work_dir, POINTER)
    return path.read_text().strip() if path.is_file() else ''


def relative(path: str, folder: str) -> str:
    """A path relative to a folder, where both are local."""
    return os.path.relpath(path, folder) if is_local(path) else path


def accumulated_gradients(runner: Any) -> dict[str, Tensor]:
    """The gradients of iterations without an update yet; of several processes, their mean.

    Returns:
        {parameter: gradient}, on the CPU; empty after an update.
    """
    wrapper = runner.optim_wrapper
    if not isinstance(wrapper, OptimWrapper) or (
            wrapper._inner_count % wrapper._accumulative_counts == 0):
        return {}
    found = {}
    for name, parameter in unwrap_model(runner.model).named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):  # already the mean
            found[name] = whole(gradient).cpu()
        elif gradient is not None:
            gradient = gradient.detach().clone()
            all_reduce(gradient, 'mean')
            found[name] = gradient.cpu()
    return found


def history_length(runner: Any) -> int:
    """The number of values of each logged scalar that the log, or its windows, can ask for."""
    processor = runner.log_processor
    windows = [processor.window_size, *(one.get('window_size') for one in processor.custom_cfg)]
    if 'global' in windows:
        return 10**6  # mmengine's
    loaders = [runner.train_dataloader] if 'epoch' in windows else []
    if runner.val_loop is not None:
        loaders.append(runner.val_dataloader)
    return max(1000, *map(len, loaders), *(one for one in windows if isinstance(one, int)))


def shorten_history(hub: MessageHub, length: int) -> None:
    """Let each scalar keep its last values only.

    mmengine keeps a million and copies all of them whenever one is added, and into each checkpoint.
    The whole history is in the log files.
    """
    for buffer in hub.log_scalars.values():
        buffer.max_length = min(buffer.max_length, length)
