"""Small stand-ins for data and runs; everything is on the CPU."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is first imported: its kernels then run in its interpreter.
    os.environ.setdefault('TRITON_INTERPRET', '1')

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / 'tests' / 'data'
SEGMENTATION = 'configs/upernet_convnext_tiny_512_160k_ade20k.py'
DETECTION = ('configs/cascade_mask_rcnn_convnext_tiny_patch4_window7_mstrain_480-800_giou_'
             '4conv1f_adamw_3x_coco_in1k.py')
DEMO_SEGMENTATION = 'configs/demo/upernet_convnext_demo.py'
DEMO_DETECTION = 'configs/demo/cascade_mask_rcnn_convnext_demo.py'

BACKBONE = ['model.backbone.depths=[1,1,1,1]', 'model.backbone.dims=[8,16,24,32]',
            'model.backbone.init_cfg=None']
SMALL_SEGMENTATION = [*BACKBONE, 'model.decode_head.in_channels=[8,16,24,32]',
                      'model.decode_head.channels=16', 'model.auxiliary_head.in_channels=24',
                      'train_dataloader.batch_size=2', 'train_cfg.max_iters=4',
                      'train_cfg.val_interval=2', 'default_hooks.checkpoint.interval=2',
                      'default_hooks.logger.interval=1']
SMALL_DETECTION = [*BACKBONE, 'model.neck.in_channels=[8,16,24,32]',
                   'train_dataloader.batch_size=2', 'train_cfg.max_epochs=1',
                   'train_cfg.val_interval=1', 'default_hooks.logger.interval=1']


GOLDEN_SIZE = dict(depths=[1, 2, 3, 1], dims=[8, 16, 24, 32])


def golden(name: str) -> dict:
    """A small published-style checkpoint, an input, and the feature maps of its library."""
    import torch
    return torch.load(DATA / f'{name}.pt', weights_only=True)


def assert_close(ours, theirs, tolerance: float = 1e-5) -> None:
    """Feature maps of equal number and shape, no value further apart than the tolerance."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance


@pytest.fixture(scope='session')
def demo_data(tmp_path_factory) -> Path:
    from convnext_mm.demo_data import make
    return make(tmp_path_factory.mktemp('data') / 'demo', num_train=8, num_val=4)


def run_tool(*args: object, env: dict[str, str] | None = None, check: bool = True,
             timeout: float = 300) -> subprocess.CompletedProcess:
    """Run a script of the repository from its root; with check, its status must be 0."""
    command = [str(arg) for arg in args]
    if command[0].endswith('.py'):
        command.insert(0, sys.executable)
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHON': sys.executable, 'COLUMNS': '200',
           **(env or {})}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True,
                          timeout=timeout)
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def build_without_memory(config: str):
    """A recipe's config, fitted to the CPU, and its model on the meta device."""
    from mmengine.config import Config

    from convnext_mm.complexity import build
    cfg = Config.fromfile(config)
    return cfg, build(cfg)
