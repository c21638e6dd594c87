"""Fixtures, and the settings of libraries that must be made before they are imported."""
from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is first imported: its kernels then run in its interpreter.
    os.environ.setdefault('TRITON_INTERPRET', '1')

# Gives mmcv operators where it has none, before a test module imports a toolbox.
import convnext_mm  # noqa: F401


@pytest.fixture(scope='module', autouse=True)
def without_old_objects() -> Iterator[None]:
    """Leave what a module's tests left behind out of later garbage collections.

    mmengine collects for every dataset, which takes seconds beside the graphs of exported models.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(scope='session')
def demo_data(tmp_path_factory) -> Path:
    """A small set of demo data for both tasks."""
    from convnext_mm.demo_data import make
    return make(tmp_path_factory.mktemp('data') / 'demo', num_train=8, num_val=4)
