"""A training process is killed at random moments, and resumed each time: nothing is lost.

CONVNEXT_MM_KILLS in the environment sets the number of kills of each task (20 in the nightly run).
"""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from convnext_mm.checkpoints.files import check_whole
from tests.helpers import ROOT
from tests.runs.training import assert_equal, iterations, last

KILLS = int(os.environ.get('CONVNEXT_MM_KILLS', 4))

# Marks the file parts while they are written, so that a kill can be aimed at a save; a save is
# slowed down, as on a large model or a network file system.
RUN = """
import pathlib, sys, time
import torch
from mmengine.runner import runner
from tests.runs.training import config, start
if sys.argv[5] == 'slow':
    def save(checkpoint, path, **kwargs):
        with open(path, 'wb') as file:
            pathlib.Path(sys.argv[3], 'saving').touch()
            torch.save(checkpoint, file)
            size = file.tell()
            file.truncate(size // 2)
            file.flush()
            time.sleep(0.5)
            file.seek(0)
            torch.save(checkpoint, file)
        pathlib.Path(sys.argv[3], 'saving').unlink()
    runner.save_checkpoint = save
start(config(sys.argv[1], pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]),
             {'seed': 0, 'check_data': False, **eval(sys.argv[4])}))
"""


def begin(task: str, data: Path, work_dir: Path, options: dict, slow: bool) -> subprocess.Popen:
    """Start a process that trains, or resumes what is in the work dir."""
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    with open(work_dir / 'output.txt', 'a') as output:
        return subprocess.Popen(
            [sys.executable, '-c', RUN, task, str(data), str(work_dir), repr(options),
             'slow' if slow else 'fast'], cwd=ROOT, env=env, stdout=output, stderr=output)


def wait_until(process: subprocess.Popen, condition, seconds: float = 240) -> None:
    """Wait until a condition holds or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, 'the process hangs'
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize('task', ['segmentation', 'detection'])
def test_no_kill_loses_anything(task, demo_data, tmp_path):
    choice = random.Random(task)
    options = {'default_hooks.checkpoint.max_keep_ckpts': 1, 'train_dataloader.num_workers': 0}
    options |= ({'train_cfg.max_iters': 20 + 4 * KILLS, 'train_cfg.val_interval': 4,
                 'default_hooks.checkpoint.interval': 2} if task == 'segmentation'
                else {'train_cfg.max_epochs': 2 + KILLS})
    killed = tmp_path / 'killed'
    killed.mkdir()
    before, kills_in_saves, resumed = -1, 0, []
    for kill in range(KILLS):
        process = begin(task, demo_data, killed, options, slow=True)
        started = killed / 'started'
        wait_until(process, started.is_file)
        if kill % 2:  # in a save
            for _ in range(choice.randint(1, 3)):
                wait_until(process, lambda: not (killed / 'saving').is_file())
                wait_until(process, (killed / 'saving').is_file)
            time.sleep(choice.uniform(0, 0.5))
            kills_in_saves += (killed / 'saving').is_file()
        else:
            time.sleep(choice.uniform(0, 4))
        assert process.poll() is None, (killed / 'output.txt').read_text()[-3000:]
        process.send_signal(signal.SIGKILL)
        process.wait()
        started.unlink()
        (killed / 'saving').unlink(missing_ok=True)
        # What is there is whole and not earlier than before, and there is a best one.
        if (killed / 'last_checkpoint').is_file():
            checkpoint = last(killed)
            assert checkpoint['meta']['iter'] >= before
            before = checkpoint['meta']['iter']
            best = checkpoint['message_hub']['runtime_info'].get('best_ckpt')
            if best:
                assert list(killed.glob('best_*.pth'))
                check_whole(killed / 'best.pth')
        else:
            assert before == -1
        resumed.append(before)
    process = begin(task, demo_data, killed, options, slow=False)
    assert process.wait(600) == 0, (killed / 'output.txt').read_text()[-3000:]
    assert 'Traceback' not in (killed / 'output.txt').read_text()
    print(f'{task}: {KILLS} kills, {kills_in_saves} while a file was written; resumed from '
          f'{resumed}')
    assert kills_in_saves > 0
    # The same, bit for bit, as a run that was never killed.
    whole = tmp_path / 'whole'
    whole.mkdir()
    process = begin(task, demo_data, whole, options, slow=False)
    assert process.wait(600) == 0, (whole / 'output.txt').read_text()[-3000:]
    assert_equal(last(killed), last(whole))
    assert iterations(killed) == iterations(whole)
    names = [sorted(path.name for path in folder.glob('*.pth')) for folder in (killed, whole)]
    assert names[0] == names[1]
    assert not list(killed.glob('.*'))
