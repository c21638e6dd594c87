"""Adapts a recipe for several GPUs to a machine without one."""
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from torch import nn

from ..errors import UserError
from ..resolution.edits import nodes
from ..utils import is_first_process


class CPUAmpOptimWrapper(OptimWrapper):
    """bf16 mixed precision on a CPU, where mmengine's AmpOptimWrapper refuses to start."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Inside, the forward pass of ``model`` runs under autocast in bf16."""
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


def adapt_to_device(cfg: Config) -> list[str]:
    """Replace settings that need a GPU, in place, if there is none.

    Returns:
        A description of each change.
    """
    if get_device() != 'cpu':
        return []
    changes = []
    wrapper = cfg.get('optim_wrapper')
    if wrapper and wrapper.get('type') == 'AmpOptimWrapper':
        bf16 = wrapper.get('dtype') == 'bfloat16'
        wrapper.type = 'CPUAmpOptimWrapper' if bf16 else 'OptimWrapper'
        for key in ('loss_scale', 'dtype', 'use_fsdp'):
            wrapper.pop(key, None)
        if not bf16:
            changes.append('mixed precision → fp32')
    if _replace_sync_bn(cfg.get('model')):
        changes.append('SyncBN → BN')
    dist_cfg = cfg.get('env_cfg', {}).get('dist_cfg', {})
    if cfg.get('launcher', 'none') != 'none':
        if dist_cfg.get('backend') == 'nccl':
            dist_cfg.backend = 'gloo'
            changes.append('nccl → gloo')
        # mmengine's default wrapper passes a GPU index.
        cfg.setdefault('model_wrapper_cfg', ConfigDict(
            type='MMDistributedDataParallel', device_ids=None,
            find_unused_parameters=cfg.get('find_unused_parameters', False)))
    return changes


def check_losses(cfg: Config) -> None:
    """Check that the losses of a training can be computed on the device.

    Raises:
        UserError: mmseg's FocalLoss on a CPU, where it fails with more than one class.
    """
    if get_device() != 'cpu' or cfg.get('default_scope') != 'mmseg':
        return
    for path, node in nodes(cfg.get('model'), 'model'):
        if node.get('type') in ('FocalLoss', 'mmseg.FocalLoss'):
            raise UserError(f'{path}.type={node["type"]!r}: mmseg computes this loss on a GPU '
                            'only, and none was found: train with one, or use another loss, such '
                            'as DiceLoss')


def log_changes(changes: list[str]) -> None:
    """Log the changes of :func:`adapt_to_device` in one line."""
    if changes and is_first_process():
        print_log(f'No GPU found, running on the CPU: {", ".join(changes)}.', logger='current')


@contextmanager
def process_group(cfg: Config) -> Iterator[None]:
    """Initialize a process group on CPUs, and destroy it on exit.

    mmengine's launchers require GPUs. A process group that is still open when the interpreter
    exits can crash in its background threads.

    Raises:
        UserError: The launcher needs GPUs, or its environment variables are missing.
    """
    if not _needs_process_group(cfg):
        yield
        return
    dist.init_process_group('gloo')
    try:
        yield
        dist.barrier()  # a process that leaves early would break the others' last messages
    finally:
        dist.destroy_process_group()


def _needs_process_group(cfg: Config) -> bool:
    """Whether ``cfg.launcher`` started several processes on CPUs.

    Raises:
        UserError: See :func:`process_group`.
    """
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none' or get_device() != 'cpu' or dist.is_initialized():
        return False
    if launcher != 'pytorch':
        raise UserError(f'--launcher {launcher} needs a GPU for each process, but none was found. '
                        'On CPUs use tools/dist_train.sh CONFIG PROCESSES.')
    missing = [key for key in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK') if key not in os.environ]
    if missing:
        raise UserError(f'--launcher pytorch expects torchrun, which sets {", ".join(missing)}: '
                        'use tools/dist_train.sh CONFIG PROCESSES.')
    # By default, each process would start one thread per core.
    if 'OMP_NUM_THREADS' not in os.environ:
        local = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
    return True


def _replace_sync_bn(node: object) -> int:
    """Replace SyncBN with BN in a config node; return the number of replacements."""
    if isinstance(node, dict):
        count = int(node.get('type') in ('SyncBN', 'MMSyncBN'))
        if count:
            node['type'] = 'BN'
        return count + sum(_replace_sync_bn(value) for value in node.values())
    if isinstance(node, (list, tuple)):
        return sum(_replace_sync_bn(value) for value in node)
    return 0
