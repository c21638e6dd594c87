"""Random numbers that follow from the place in a run, so that no state must be kept.

Each training iteration and each sample draws from generators that are seeded by where it stands:
the run's seed, the iteration and the process, or the epoch and the sample's place in it. A run that
is resumed at an iteration therefore draws what it would have drawn without the interruption,
however many workers load its data and whatever a validation drew before.
"""
from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

ITERATION, VALIDATION, SAMPLE = range(3)
"""What a seed is for; parts of a run with equal numbers draw differently."""


def seed_generators(*place: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch (CPU, GPUs in use) by a place in the run.

    Args:
        place: Integers from 0 up, hashed by NumPy's SeedSequence.
    """
    # torch.manual_seed, which queues seeds for devices that are not in use, takes a millisecond.
    first, second = np.random.SeedSequence(place).generate_state(2, np.uint64)
    random.seed(int(first))
    np.random.seed(int(first) % 2**32)
    torch.default_generator.manual_seed(int(second) % 2**63)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(int(second) % 2**63)


def run_seed(runner: Any) -> int:
    """The seed that all processes of a run share, given or drawn."""
    differs = runner._randomness_cfg.get('diff_rank_seed', False)
    return int(runner.seed) - (runner.rank if differs else 0)
