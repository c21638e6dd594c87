"""mmengine's two training loops, which begin anywhere and draw as if they had never stopped."""
from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.dist import get_rank
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch.utils.data import DataLoader

from ..errors import UserError
from ..utils import unwrap_model
from . import guards
from .batches import MAX_BAD_FILES, ResumableLoader, make_resumable
from .random_state import ITERATION, VALIDATION, run_seed, seed_generators
from .saving import SafeCheckpointHook, history_length, shorten_history
from .shards import divided_like


class ResumableLoop:
    """What both loops share; mixed in before mmengine's class.

    Each iteration seeds the random generators (:mod:`convnext_mm.runs.random_state`). After one,
    the loop can be stopped by a signal. A checkpoint that was saved before the validation that its
    iteration ends with is validated first when it is resumed.
    """

    runner: Any
    dataloader: DataLoader
    val_interval: int
    val_begin: int
    _iter: int
    _epoch: int

    def __init__(self, runner: Any, dataloader: Any, *args: Any, **kwargs: Any) -> None:
        self.seed = run_seed(runner)
        if isinstance(dataloader, dict):
            differs = runner._randomness_cfg.get('diff_rank_seed', False)
            dataloader = runner.build_dataloader(dataloader, seed=runner.seed,
                                                 diff_rank_seed=differs)
        limit = runner.cfg.get('max_bad_files', MAX_BAD_FILES)
        super().__init__(runner, make_resumable(  # type: ignore[call-arg]
            dataloader, self.seed, limit), *args, **kwargs)
        self.taken = (0, 0)
        self._order: dict[str, Any] | None = None
        self.validated = -1
        self.resumed: dict[str, Any] | None = None

    def state(self, iteration: int) -> dict[str, Any]:
        """The place in the run, for a checkpoint that is saved after an iteration."""
        return dict(epoch=self.taken[0], batches=self.taken[1], seed=self.seed,
                    validated=self.validated == iteration, order=self._order)

    def run(self) -> Any:
        """Train, until the end or a stop request.

        Raises:
            SystemExit: A signal asked for it.
        """
        with guards.stop_request:
            self._keep = history_length(self.runner)
            return self._run()

    def _run(self) -> Any:
        raise NotImplementedError

    def run_iter(self, *batch: Any) -> None:
        """Run one iteration."""
        seed_generators(self.seed, ITERATION, get_rank(), self._iter)
        super().run_iter(*batch)  # type: ignore[misc]
        shorten_history(self.runner.message_hub, self._keep)
        self._stop_if_asked()

    def _batches(self, epoch: int, start: int) -> Iterator[Any]:
        """The batches of an epoch, from one on.

        Raises:
            UserError: The workers of the data loader hang.
        """
        if isinstance(self.dataloader, ResumableLoader):
            self.dataloader.start_at(epoch, start)
        batches = iter(self.dataloader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if 'timed out' not in str(error):
                    raise
                guards.end_hung_workers()
                raise UserError(
                    f'no batch came from the data loader in {self.dataloader.timeout:.0f} s: its '
                    'workers hang, often on a file system that does not answer. Longer: '
                    'train_dataloader.timeout=SECONDS') from error
            start += 1
            self.taken = (epoch, start)
            if isinstance(self.dataloader, ResumableLoader):
                self._order = self.dataloader.order(start)
            yield batch

    def _begin(self) -> None:
        """Continue a resumed run: its place, gradients, and the validation it was killed in."""
        if self.resumed is None:
            return
        if self.resumed:
            self.taken = self.resumed['epoch'], self.resumed['batches']
            self.validated = self._iter if self.resumed['validated'] else -1
            self._order = self.resumed.get('order')
            if isinstance(self.dataloader, ResumableLoader):
                self.dataloader.restore(self._order)
        else:  # saved by mmengine's own hook
            self.taken = self._place_by_count()
        parameters = dict(unwrap_model(self.runner.model).named_parameters())
        for name, gradient in (self.resumed.get('gradients') or {}).items():
            parameters[name].grad = divided_like(gradient, parameters[name])
        self._decide_current_val_interval()  # type: ignore[attr-defined]
        if self._due() and self.validated != self._iter:
            print_log('This checkpoint was saved before its validation, which follows',
                      logger='current')
            self._validate()
        elif self._iter >= self.max_iters:  # type: ignore[attr-defined]
            print_log(f'This run is finished: all {self._iter} iterations are trained. To train '
                      'for longer, start a new run from its weights (load_from)',
                      logger='current', level=logging.WARNING)

    def _place_by_count(self) -> tuple[int, int]:
        """Epoch of the data loader and batches taken from it, by the number of iterations."""
        raise NotImplementedError

    def _due(self) -> bool:
        """Whether a validation follows now."""
        raise NotImplementedError

    def _validate(self) -> None:
        self._stop_if_asked()
        seed_generators(self.seed, VALIDATION, get_rank(), self._iter)
        self.runner.val_loop.run()
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if guards.any_process(guards.stop_request.signal is not None):
            hook = next((hook for hook in self.runner.hooks
                         if isinstance(hook, SafeCheckpointHook)), None)
            guards.end_run(hook.save_interrupted(self.runner) if hook else None, self._iter)


class ResumableIterLoop(ResumableLoop, IterBasedTrainLoop):
    """Training by iteration, over an infinite sampler or over epochs of a finite one."""

    def _run(self) -> Any:
        runner = self.runner
        runner.call_hook('before_train')
        runner.call_hook('before_train_epoch')
        self._begin()
        batches = self._endless()
        while self._iter < self._max_iters and not self.stop_training:
            runner.model.train()
            self.run_iter(next(batches))
            self._decide_current_val_interval()
            if self._due():
                self._validate()
        runner.call_hook('after_train_epoch')
        runner.call_hook('after_train')
        return runner.model

    def _endless(self) -> Iterator[Any]:
        epoch, start = self.taken
        while True:
            yield from self._batches(epoch, start)
            epoch, start = epoch + 1, 0

    def _place_by_count(self) -> tuple[int, int]:
        sampler = getattr(self.dataloader.batch_sampler, 'sampler', None)
        return (0, self._iter) if isinstance(sampler, InfiniteSampler) else divmod(
            self._iter, len(self.dataloader))

    def _due(self) -> bool:
        return (self.runner.val_loop is not None and self._iter >= self.val_begin
                and (self._iter % self.val_interval == 0 or self._iter == self._max_iters))


class ResumableEpochLoop(ResumableLoop, EpochBasedTrainLoop):
    """Training by epoch, which can begin inside of one."""

    def _run(self) -> Any:
        runner = self.runner
        runner.call_hook('before_train')
        self._begin()
        while self._epoch < self._max_epochs and not self.stop_training:
            self.run_epoch()
            self._decide_current_val_interval()
            if self._due():
                self._validate()
        runner.call_hook('after_train')
        return runner.model

    def run_epoch(self) -> None:
        """Run an epoch, or what is left of it."""
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        start = self.taken[1] if self.taken[0] == self._epoch else 0
        for index, batch in enumerate(self._batches(self._epoch, start), start):
            self.run_iter(index, batch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _place_by_count(self) -> tuple[int, int]:
        return self._epoch, max(0, self._iter - self._epoch * len(self.dataloader))

    def _due(self) -> bool:
        inside = self.taken[0] == self._epoch and self.taken[1] > 0
        return (self.runner.val_loop is not None and not inside and self._epoch >= self.val_begin
                and (self._epoch % self.val_interval == 0 or self._epoch == self._max_epochs))


LOOPS = {'IterBasedTrainLoop': ResumableIterLoop, 'EpochBasedTrainLoop': ResumableEpochLoop}
"""mmengine's loops and those that stand in for them."""
