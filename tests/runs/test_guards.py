"""Signals end a run with its state saved, and no worker outlives it."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from convnext_mm.errors import UserError
from convnext_mm.runs import batches, guards
from tests.helpers import ROOT
from tests.runs import toy
from tests.runs.training import last

RUN = """
import pathlib, sys, time
from mmengine.hooks import Hook
from tests.runs import toy

class Slow(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 1:
            pathlib.Path(sys.argv[1], 'started').touch()
        time.sleep(0.2)

runner = toy.build(pathlib.Path(sys.argv[1]), workers=2, length=1000)
runner.register_hook(Slow())
runner.train()
"""


def begin(folder: Path) -> subprocess.Popen:
    """Start a run with 2 workers in a process group of its own, and wait until it trains."""
    process = subprocess.Popen(
        [sys.executable, '-c', RUN, str(folder)], cwd=ROOT, start_new_session=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)}, stderr=subprocess.PIPE, text=True)
    while not (folder / 'started').is_file():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    return process


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(child) for task in Path(f'/proc/{pid}/task').iterdir()
            for child in (task / 'children').read_text().split()]


def wait_for_end(pids: list[int], seconds: float = 10) -> list[int]:
    """Those of some processes that are still running after some seconds."""
    end = time.monotonic() + seconds
    while (running := [pid for pid in pids if is_running(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    return running


def is_running(pid: int) -> bool:
    try:
        return ') Z' not in Path(f'/proc/{pid}/stat').read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
@pytest.mark.parametrize(('number', 'to_group', 'code'), [
    (signal.SIGTERM, False, guards.EXIT_CODE), (signal.SIGINT, True, guards.EXIT_CODE),
    (signal.SIGTERM, True, guards.EXIT_CODE), (signal.SIGKILL, False, -9)])
def test_a_signal_ends_the_run_and_its_workers(number, to_group, code, tmp_path):
    process = begin(tmp_path)
    workers = children(process.pid)
    assert len(workers) >= 2
    (os.killpg if to_group else os.kill)(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code, error
    assert wait_for_end(workers) == []
    assert 'Traceback' not in error
    if code == guards.EXIT_CODE:
        assert signal.Signals(number).name in error
        assert 1 < last(tmp_path)['meta']['iter'] < 1000
        assert (tmp_path / 'last_checkpoint').read_text() in ('interrupted.pth', 'iter_4.pth')


def test_a_second_signal_ends_the_process_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, '_exit', codes.append)
    with guards.stop_request as request:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # from the terminal and from torchrun
        assert codes == []
        monkeypatch.setattr(guards, 'REPEATED', 0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert codes == [128 + signal.SIGTERM]
        assert request.signal == signal.SIGINT


def test_handlers_are_restored():
    before = [signal.getsignal(number) for number in guards.StopRequest.SIGNALS]
    with guards.stop_request as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signal == signal.SIGTERM
    assert [signal.getsignal(number) for number in guards.StopRequest.SIGNALS] == before


class Hangs(Dataset):
    def __getitem__(self, index):
        time.sleep(1000)

    def __len__(self) -> int:
        return 4


def test_a_worker_that_hangs_ends_the_run_with_a_message(tmp_path, monkeypatch):
    monkeypatch.setattr(batches, 'HUNG_AFTER', 1)
    monkeypatch.setattr(toy.Noisy, 'prepare_data', Hangs.__getitem__)
    before = time.monotonic()
    with pytest.raises(UserError, match=r'no batch came from the data loader in 1 s'):
        toy.train(tmp_path, workers=1)
    assert time.monotonic() - before < 30


def test_the_start_of_a_loader_is_asked_late_by_workers():
    """mmengine 0.10.7 asks for the iterator before it resumes."""
    loader = batches.make_resumable(DataLoader(torch.arange(8), batch_size=2), seed=0)
    iterator = iter(loader)
    loader.start_at(0, 2)
    assert [batch.tolist() for batch in iterator] == [[4, 5], [6, 7]]


def test_loaders_without_an_order_stay():
    loader = DataLoader(torch.arange(8), batch_size=None)
    assert batches.make_resumable(loader, seed=0) is loader
