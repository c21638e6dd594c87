"""Runs of several processes end with a message when one of them hangs or is gone.

Each process tells the others, by a key in PyTorch's store, that it lives and how far it is. A
thread does so, which also lives while the process waits for the others.
"""
from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from mmengine.dist import get_dist_info, is_main_process
from mmengine.hooks import Hook

from ..errors import UserError, print_error
from ..utils import has_several_processes

TIMEOUT = 1800
"""Seconds without progress after which a run ends, unless ``process_timeout`` is set."""
LINGER = 8
"""Seconds for which process 0 outlives an error where it keeps the store, as without torchrun."""
WAITING = ('torch/distributed', 'torch/autograd', 'torch/nn/parallel')
"""Where the code stands of a process that waits for others: gradients are averaged in backward."""


class Beat(NamedTuple):
    """What a process tells the others.

    Args:
        number: Grows while the process lives.
        step: Grows while it makes progress, as all processes do in the same steps.
        place: What it does, in words.
        line: The line of code where it stands.
        waits: Whether that is inside of a communication.
        host: The name of its machine.
    """

    number: int = 0
    step: int = 0
    place: str = 'has not begun'
    line: str = ''
    waits: bool = False
    host: str = ''


class Watch(threading.Thread):
    """The thread that tells how far this process is, and looks for what the others tell.

    Args:
        timeout: Seconds without progress after which the run ends.
        store: A client of the store, of this thread alone.
        rank: The number of this process.
        processes: How many there are.
    """

    def __init__(self, timeout: float, store: Any, rank: int, processes: int) -> None:
        super().__init__(daemon=True, name='heartbeat')
        self.timeout, self.store, self.rank, self.processes = timeout, store, rank, processes
        self.period = min(2.0, timeout / 10)
        self.stopped = threading.Event()
        self.count = self.step = 0
        self.place = 'begins'
        self.since = time.monotonic()

    def advance(self, place: str) -> None:
        """Tell that this process has begun something new."""
        self.place, self.step, self.since = place, self.step + 1, time.monotonic()

    def run(self) -> None:
        """Beat until it is stopped; end the process if there is no progress."""
        self._beat()
        while not self.stopped.wait(self.period):
            self._beat()
            if time.monotonic() - self.since > self.timeout:
                report(self.accuse(), self.store)
                os._exit(2)

    def accuse(self) -> str:
        """Which processes the others wait for."""
        try:
            before = self._read()
            for _ in range(3):
                time.sleep(self.period)
                self._beat()
            now = self._read()
        except Exception:
            return (f'no progress in {self.timeout:.0f} s (process_timeout): process 0 does not '
                    'answer. After removing the cause, continue with --resume')
        silent = [rank for rank, one in enumerate(now) if one.number == before[rank].number]
        least = min(one.step for one in now)
        late = [rank for rank, one in enumerate(now) if one.step == least]
        if len(late) == len(now):  # the others wait inside of the same step
            late = [rank for rank, one in enumerate(now) if not one.waits] or late
        lines = [f'\n  process {rank} on {now[rank].host}: {now[rank].place}, at '
                 f'{now[rank].line}' + (', and does not answer' if rank in silent else '')
                 for rank in silent or late]
        return (f'no progress in {self.timeout:.0f} s (process_timeout): of {self.processes} '
                f'processes, the others wait for{"".join(lines)}\nAfter removing the cause, '
                'continue with --resume')

    def lost(self) -> str:
        """Which processes are gone, for one whose connection to another has ended."""
        try:
            before = self._read()
            time.sleep(2.5 * self.period)
            gone = [rank for rank, one in enumerate(self._read())
                    if one.number == before[rank].number and rank != self.rank]
        except Exception:  # the store is gone with process 0
            return ('process 0 has ended, and the run with it. Continue with --resume')
        named = ', '.join(f'process {rank} on {before[rank].host} ({before[rank].place})'
                          for rank in gone) or 'another process'
        return (f'{named} has ended, and the run with it. It may have been killed, for example by '
                'the system for its memory. Continue with --resume')

    def _beat(self) -> None:
        self.count += 1
        frame: Any = sys._current_frames().get(threading.main_thread().ident or 0)
        line = f'{frame.f_code.co_filename}:{frame.f_lineno}' if frame else ''
        waits, depth = False, 0
        while frame is not None and depth < 8:
            waits = waits or any(part in frame.f_code.co_filename for part in WAITING)
            frame, depth = frame.f_back, depth + 1
        beat = Beat(self.count, self.step, self.place, line, waits, socket.gethostname())
        with suppress(Exception):  # the process that keeps the store is gone, which others see
            self.store.set(_key(self.rank), json.dumps(beat))

    def _read(self) -> list[Beat]:
        found = []
        for rank in range(self.processes):
            known = self.store.check([_key(rank)])
            found.append(Beat(*json.loads(self.store.get(_key(rank)))) if known else Beat())
        return found


class HeartbeatHook(Hook):
    """Lets a run of several processes watch over them; without effect in a single one.

    Args:
        timeout: Seconds without progress after which the run ends, with a message that names the
            processes that the others wait for. Longer than the longest step: a validation's
            metrics are computed by one process.

    Raises:
        UserError: The timeout is no number above 0.
    """

    priority = 'VERY_LOW'

    def __init__(self, timeout: float = TIMEOUT) -> None:
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or timeout <= 0:
            raise UserError(f'process_timeout={timeout!r} must be a number of seconds above 0')
        self.timeout = timeout

    def before_run(self, runner: Any) -> None:
        """Begin to watch."""
        start(self.timeout)

    def after_run(self, runner: Any) -> None:
        """The run is complete: processes may leave one after another."""
        stop()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Tell that a batch is loaded."""
        advance(f'in iteration {runner.iter + 1}')

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Tell that an iteration is done."""
        advance(f'after iteration {runner.iter + 1}')

    def before_val_epoch(self, runner: Any) -> None:
        """Tell that a validation begins."""
        advance(f'in the validation after iteration {runner.iter}')

    def _after_iter(self, runner: Any, batch_idx: int, data_batch: Any = None,
                    outputs: Any = None, mode: str = 'train') -> None:
        """Processes may have different numbers of batches: progress, but no common step."""
        if _watch is not None:
            _watch.since = time.monotonic()


_watch: Watch | None = None


def start(timeout: float) -> None:
    """Watch over the processes of this run, if there are several."""
    global _watch
    rank, processes = get_dist_info()
    store = _connect() if processes > 1 and _watch is None else None
    if store is not None:
        _watch = Watch(timeout, store, rank, processes)
        _watch.start()


def stop() -> None:
    """Watch no longer."""
    global _watch
    if _watch is not None:
        _watch.stopped.set()
        _watch.join(10)
        _watch = None


def advance(place: str) -> None:
    """Tell that this process has begun something new."""
    if _watch is not None:
        _watch.advance(place)


def lost_process() -> str:
    """A message that names the process whose connection has ended."""
    return (_watch.lost() if _watch is not None else
            'another process has ended, and the run with it. Continue with --resume')


def report(message: str, store: Any = None) -> None:
    """Print an error, if this process is the first of the run that has one.

    Those of the others follow from it. A process that keeps the store waits for them to ask.
    """
    several = has_several_processes()
    first = True
    if several:
        with suppress(Exception):  # the process that keeps the store has ended
            store = store or _connect()
            mine = f'{os.environ.get("RANK")}: {message}'
            first = store is None or store.compare_set(_key('error'), '', mine) == mine.encode()
    if first:
        print_error(message)
    if several and dist.is_initialized() and is_main_process() and not os.environ.get(
            'TORCHELASTIC_USE_AGENT_STORE'):
        time.sleep(LINGER)


def _connect() -> Any:
    """A new client of the store that the processes found each other by; None: there is none."""
    address, port = os.environ.get('MASTER_ADDR'), os.environ.get('MASTER_PORT')
    if not address or not port:
        return None
    try:
        return dist.TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=20))
    except Exception:
        return None


def _key(name: object) -> str:
    return f'convnext_mm/{os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}/{name}'
