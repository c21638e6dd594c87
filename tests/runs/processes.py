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


def start(code: str, folder: Path, processes: int = 2, launcher: str = 'pytorch',
          preamble: str = PREAMBLE) -> list[subprocess.Popen]:
    """Run code in each of several processes of a group; ``rank`` and ``folder`` are set."""
    address = {'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
    folder.mkdir(exist_ok=True)
    started = []
    for rank in range(processes):
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **address,
               **environment(launcher, rank, processes, folder)}
        with open(folder / f'output_{rank}.txt', 'w') as output:
            started.append(subprocess.Popen(
                [sys.executable, '-c', preamble + code, str(folder)], cwd=ROOT, env=env,
                stdout=output, stderr=output))
    return started


def environment(launcher: str, rank: int, processes: int, folder: Path) -> dict[str, str]:
    """The variables that a launcher sets: torchrun, srun or mpirun."""
    if launcher == 'slurm':
        scontrol = folder / 'scontrol'  # there is no Slurm; `scontrol show hostname` lists nodes
        scontrol.write_text('#!/bin/sh\necho localhost\n')
        scontrol.chmod(0o755)
        return {'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(rank),
                'SLURM_NTASKS': str(processes), 'SLURM_NODELIST': 'localhost',
                'PATH': f'{folder}:{os.environ["PATH"]}'}
    names = (('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_LOCAL_RANK', 'OMPI_COMM_WORLD_SIZE')
             if launcher == 'mpi' else ('RANK', 'LOCAL_RANK', 'WORLD_SIZE'))
    return dict(zip(names, map(str, (rank, rank, processes)), strict=True))


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


def run(code: str, folder: Path, processes: int = 2, **how: str) -> str:
    """Start, wait, and expect that all ended well."""
    codes, output = wait(start(code, folder, processes, **how), folder)
    assert codes == [0] * processes, output[-4000:]
    return output
