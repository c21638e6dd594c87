"""Starts several processes that train together over gloo, without torchrun."""
from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.helpers import ROOT

PREAMBLE = """
import os, pathlib, sys, time
import torch, torch.distributed as dist
from tests.runs import toy, training
torch.set_num_threads(1)
dist.init_process_group('gloo')
rank, folder = dist.get_rank(), pathlib.Path(sys.argv[1])
"""


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def start(code: str, folder: Path, processes: int = 2) -> list[subprocess.Popen]:
    """Run code in each of several processes of a group; ``rank`` and ``folder`` are set."""
    port = free_port()
    folder.mkdir(exist_ok=True)
    started = []
    for rank in range(processes):
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'RANK': str(rank), 'LOCAL_RANK': str(rank),
               'WORLD_SIZE': str(processes), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port),
               'OMP_NUM_THREADS': '1'}
        with open(folder / f'output_{rank}.txt', 'w') as output:
            started.append(subprocess.Popen(
                [sys.executable, '-c', PREAMBLE + code, str(folder)], cwd=ROOT, env=env,
                stdout=output, stderr=output))
    return started


def wait(started: list[subprocess.Popen], folder: Path, timeout: float = 300
         ) -> tuple[list[int], str]:
    """Wait for all; return their exit codes and all that they wrote."""
    try:
        codes = [process.wait(timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return codes, '\n'.join((folder / f'output_{rank}.txt').read_text()
                            for rank in range(len(started)))


def run(code: str, folder: Path, processes: int = 2) -> str:
    """Start, wait, and expect that all ended well."""
    codes, output = wait(start(code, folder, processes), folder)
    assert codes == [0] * processes, output[-4000:]
    return output
