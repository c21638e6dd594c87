"""Constants and functions that several test modules share."""
from __future__ import annotations

import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from benchmarks.measuring import saved_activation_memory
from convnext_mm import ConvNeXt
from convnext_mm.engine.checks import read_config
from convnext_mm.engine.fallbacks import adapt_to_device

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
    return torch.load(DATA / f'{name}.pt', weights_only=True)


def assert_close(ours, theirs, tolerance: float = 1e-5) -> None:
    """Feature maps of equal number and shape, no value further apart than the tolerance."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance


FILES = ('v1_official_downstream', 'v1_official_classification', 'v1_mmpretrain', 'v1_timm',
         'v1_transformers', 'v2_official_classification')
"""Golden files, one per published naming."""


def official(name: str = 'v1_official_classification') -> dict:
    """The weights of a golden file of the authors."""
    return golden(name)['checkpoint']['model']


def load_golden(path, **kwargs) -> ConvNeXt:
    """A backbone of the golden size with a file's weights."""
    backbone = ConvNeXt(**{**GOLDEN_SIZE, **kwargs},
                        init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    backbone.init_weights()
    return backbone.eval()


def saved_by(call: Callable, parameters: list, autocast: bool) -> float:
    """MiB of activations that ``call()`` saves for the backward pass, without ``parameters``."""
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        return saved_activation_memory(call, parameters)


def log_line(step: int, loss: float = 1.0) -> dict:
    """A line of training as mmengine logs it."""
    return dict(step=step, iter=step, loss=loss, lr=0.1, lowest_lr=0.1, highest_lr=0.2)


def write_log(folder: Path, lines: list[dict]) -> None:
    """Write mmengine's scalar log, whose last line was cut off."""
    (folder / 'vis_data').mkdir(parents=True)
    (folder / 'vis_data' / 'scalars.json').write_text(
        '\n'.join(json.dumps(line) for line in lines) + '\n{"loss": 1, "st')


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


def operators_are_compiled() -> bool:
    """Whether mmcv was installed with its compiled operators."""
    mmcv = find_spec('mmcv')
    return mmcv is not None and any(Path(str(mmcv.origin)).parent.glob('_ext*.so'))


def build_on_meta(config: str):
    """A recipe's config, fitted to the CPU, and its model on the meta device."""
    from convnext_mm import complexity
    cfg = Config.fromfile(config)
    return cfg, complexity.build_on_meta(cfg)


def call_tool(script: str, *args: object) -> subprocess.CompletedProcess:
    """Run a tool from the root in this process, which has imported the toolboxes already.

    Only for runs that end before a Runner is built: mmengine's visualizers and loggers are global.
    """
    out, err, status, cwd = io.StringIO(), io.StringIO(), 0, os.getcwd()
    command = [script, *(str(arg) for arg in args)]
    os.chdir(ROOT)
    try:
        with mock.patch.object(sys, 'argv', command), mock.patch.dict(os.environ), \
                redirect_stdout(out), redirect_stderr(err):
            runpy.run_path(script, run_name='__main__')
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    finally:
        os.chdir(cwd)
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def build_model(config: str, options: dict | None = None) -> nn.Module:
    """Build a demo model with random weights and options, in eval mode."""
    cfg = read_config(config, {'model.backbone.init_cfg': None, **(options or {})})
    if 'decode_head' in cfg.model:
        cfg.model.test_cfg.seg_logits = True
    adapt_to_device(cfg)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model.eval()


def predict(model: nn.Module, scope: str):
    """Return the prediction for an image of noise."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 255, (3, 96, 128), generator=generator, dtype=torch.uint8)
    shape = dict(img_shape=(96, 128), ori_shape=(96, 128), pad_shape=(96, 128),
                 batch_input_shape=(96, 128), scale_factor=(1.0, 1.0))
    if scope == 'mmseg':
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmdet.structures import DetDataSample as Sample
    with torch.no_grad():
        return model.test_step(dict(inputs=[image], data_samples=[Sample(metainfo=shape)]))[0]
