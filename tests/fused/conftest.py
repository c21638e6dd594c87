"""Fixtures of the fast path."""
from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope='session', autouse=True)
def one_config_per_kernel() -> None:
    """Without tuning on a GPU, which compiles every kernel six times."""
    if not torch.cuda.is_available():
        return
    nvidia = pytest.importorskip('convnext_mm.fused.nvidia')
    for kernel in vars(nvidia).values():
        if hasattr(kernel, 'configs'):
            del kernel.configs[1:]
