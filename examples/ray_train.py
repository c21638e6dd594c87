"""Train on a Ray cluster: python examples/ray_train.py PROCESSES CONFIG [options of tools/train.py]

Ray starts the processes and their process group; all else is as with tools/dist_train.sh. Without
GPUs in the cluster, the processes run on CPUs. Paths must be the same on all nodes.
"""
from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

ROOT = Path(__file__).resolve().parent.parent


def work(settings: dict) -> None:
    """Train in one of the processes."""
    os.chdir(settings['folder'])
    sys.argv = ['tools/train.py', *settings['options'], '--launcher', 'pytorch', '--resume']
    try:
        runpy.run_path(str(ROOT / 'tools' / 'train.py'), run_name='__main__')
    except SystemExit as end:
        if end.code:  # Ray starts all processes again, and they resume
            raise RuntimeError(f'tools/train.py ended with {end.code}') from None


if __name__ == '__main__':
    processes = ScalingConfig(num_workers=int(sys.argv[1]), use_gpu=torch.cuda.is_available())
    TorchTrainer(
        work, train_loop_config=dict(folder=os.getcwd(), options=sys.argv[2:]),
        scaling_config=processes,
        run_config=RunConfig(failure_config=FailureConfig(max_failures=3))).fit()
