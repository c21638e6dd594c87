"""Ends of a run: signals, losses that are not finite, and data loader workers without a parent."""
from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from torch import Tensor

from ..errors import UserError
from . import heartbeat

EXIT_CODE = 75
"""Of a run that was asked to stop, and saved itself: EX_TEMPFAIL of sysexits.h, 'try again'."""
REPEATED = 2
"""Seconds in which a signal can come twice: from Ctrl-C in a terminal, and from torchrun."""
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


class StopRequest:
    """Whether SIGTERM or SIGINT has asked this process to stop.

    The first signal lets the iteration end and the run be saved. One that follows after more than
    :data:`REPEATED` ends the process at once, with the exit code of shells, 128 + its number.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[int, Any] = {}
        self._since = 0.0

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive)
                            for number in self.SIGNALS}
        self.signal = None
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _receive(self, number: int, frame: object) -> None:
        if self.signal is not None:
            if time.monotonic() - self._since > REPEATED:
                os._exit(128 + number)
            return
        self.signal, self._since = signal.Signals(number), time.monotonic()
        # print() and logging are not safe inside a signal handler
        os.write(2, f'\n{self.signal.name}: the run is saved after this iteration; a second '
                    f'signal after {REPEATED} s ends it at once.\n'.encode())


stop_request = StopRequest()


def end_run(saved: str | None, iteration: int) -> None:
    """End the process after a stop request.

    Args:
        saved: The checkpoint to resume from; None: there is none.
        iteration: The number of iterations that were trained.

    Raises:
        SystemExit: Always, with :data:`EXIT_CODE`.
    """
    name = stop_request.signal.name if stop_request.signal else 'A signal to another process'
    print_log(f'{name} stopped the run after iteration {iteration}. ' + (
        f'Saved: {saved}. Continue with --resume' if saved else 'Nothing was saved'),
        logger='current', level=logging.WARNING)
    sys.exit(EXIT_CODE)


def any_process(flag: bool) -> bool:
    """Whether a flag is set in any process of the run; all must ask at the same place."""
    if get_world_size() == 1:
        return flag
    count = torch.tensor(int(flag))
    all_reduce(count)
    return bool(count)


class WorkerGuard:
    """A ``worker_init_fn`` after which no worker outlives its run.

    Linux kills the worker when the main process ends, however that ends. Signals to the whole
    process group, such as Ctrl-C, are left to the main process, which still needs the worker.

    Args:
        init: The function to call as well.
    """

    def __init__(self, init: Callable[[int], None] | None) -> None:
        self.init = init

    def __call__(self, worker: int) -> None:
        for number in StopRequest.SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if sys.platform == 'linux':
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():  # before it could be watched
            os._exit(1)
        if self.init is not None:
            self.init(worker)


def end_workers(loader: Any) -> None:
    """End the workers that a data loader keeps between epochs, while its queues still work.

    Left to the garbage collector, which ends the queues first, PyTorch waits 10 s for each of them.
    """
    iterator = getattr(loader, '_iterator', None)
    if iterator is not None:
        iterator._shutdown_workers()
        loader._iterator = None


def end_hung_workers() -> None:
    """Kill this process's children, which ignore the SIGTERM that Python ends them with."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report them
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class OutOfMemory(UserError):
    """A device, or the machine, has no more memory."""


MEMORY_ERROR = re.compile(r"can't allocate memory|not enough memory|[Oo]ut of memory|"
                          'Cannot allocate memory')
WORKER_ERROR = re.compile(r'DataLoader worker .*(killed by signal|exited unexpectedly)')


PEER_ERROR = re.compile(r'Connection (closed|reset) by peer|gloo/transport|Broken pipe')


@contextmanager
def clear_ends(doing: str) -> Iterator[None]:
    """Inside, errors of the machine that no code is to blame for become errors with a message.

    Args:
        doing: What is done inside, 'training' or 'testing'.

    Raises:
        OutOfMemory: PyTorch or NumPy could not get memory.
        UserError: A data loader worker, or another process of the run, died.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(_memory_message(doing, error)) from error
    except RuntimeError as error:
        text = str(error)
        if WORKER_ERROR.search(text):
            end_hung_workers()
            reason = ' '.join(text.partition('It is possible')[0].split()).rstrip('. ')
            raise UserError(
                f'{doing} ended, because a process that loads data ended: {reason}. '
                'Often the main memory is full: lower num_workers or prefetch_factor of the data '
                'loader. On a bus error /dev/shm is: enlarge it (docker run --shm-size)'
                ) from error
        if get_world_size() > 1 and PEER_ERROR.search(text):
            raise UserError(heartbeat.lost_process()) from error
        if MEMORY_ERROR.search(text):
            raise OutOfMemory(_memory_message(doing, error)) from error
        raise


def _memory_message(doing: str, error: BaseException) -> str:
    asked = re.search(r'allocate [\d.]+ \w+', str(error))
    return f'out of memory in {doing}' + (f' (it could not {asked[0]})' if asked else '')


class FiniteLossHook(Hook):
    """Ends a run whose loss is NaN or infinite.

    Args:
        stop_after: The run ends when so many iterations in a row have such a loss.
        skip: Leave out the update of such an iteration (of its whole accumulation of gradients),
            and never end the run. The loss is then read before each backward pass, which a GPU
            waits for.
    """

    priority = 'HIGH'

    def __init__(self, stop_after: int = 5, skip: bool = False) -> None:
        if not isinstance(stop_after, int) or stop_after < 1:
            raise UserError(f'default_hooks.finite.stop_after={stop_after!r} must be a whole '
                            'number from 1 up')
        self.stop_after, self.skip = stop_after, skip
        self.images: list[str] = []
        self.count = 0

    def before_train(self, runner: Any) -> None:
        """Put a check before the update."""
        if self.skip:
            wrapper = runner.optim_wrapper
            wrapper.update_params = _SkippingUpdate(wrapper)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None,
                         outputs: dict[str, Any] | None = None) -> None:
        """Count iterations with such a loss.

        Raises:
            UserError: There were too many in a row; names the iteration, the images and the last
                checkpoint.
        """
        loss = (outputs or {}).get('loss', 0.0)  # mmengine's sum of all losses
        if not any_process(not _is_finite(loss)):
            self.count, self.images = 0, []
            return
        self.count += 1
        names = image_names(data_batch)
        self.images += names
        iteration = runner.iter + 1
        print_log(f'The loss of iteration {iteration} is not finite. Images: {", ".join(names)}',
                  logger='current', level=logging.WARNING)
        if self.count < self.stop_after or self.skip:
            return
        saved = runner.message_hub.get_info('last_ckpt')
        raise UserError(
            f'the loss was not finite in {self.count} iterations in a row, the last of them '
            f'{iteration}. Images: {", ".join(self.images[:8])}'
            f'{", …" if len(self.images) > 8 else ""}\n'
            f'The last good checkpoint: {saved or "none was saved before"}\n'
            'Lower the learning rate (optim_wrapper.optimizer.lr), clip gradients '
            "(optim_wrapper.clip_grad=dict(max_norm=1)), or check the images "
            '(tools/check_dataset.py). To leave out the updates of such iterations instead: '
            '--cfg-options default_hooks.finite.skip=True')


class _SkippingUpdate:
    """``update_params`` of an optimizer wrapper, without updates by a loss that is not finite."""

    def __init__(self, wrapper: Any) -> None:
        self.wrapper, self.update = wrapper, wrapper.update_params

    def __call__(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if any_process(not _is_finite(loss)):
            self.wrapper._inner_count += 1
            self.wrapper.zero_grad()
        else:
            self.update(loss, *args, **kwargs)


def _is_finite(value: Any) -> bool:
    return bool(torch.isfinite(torch.as_tensor(value)).all())


def image_names(batch: Any) -> list[str]:
    """The paths of a batch's images, as far as its data samples have them."""
    samples = batch.get('data_samples') if isinstance(batch, dict) else None
    return [str(sample.img_path) for sample in samples or () if hasattr(sample, 'img_path')]
