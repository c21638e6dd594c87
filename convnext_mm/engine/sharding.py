"""The optimizer's state divided among the processes (ZeRO stage 1), by ``shard_optimizer=True``."""
from __future__ import annotations

from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import OPTIMIZERS
from torch.distributed.optim import ZeroRedundancyOptimizer

from ..errors import UserError


@OPTIMIZERS.register_module()
class ShardedOptimizer(ZeroRedundancyOptimizer):
    """PyTorch's ZeroRedundancyOptimizer around an optimizer that is given by name.

    Each process keeps the state of about 1/N of the parameters, updates these, and sends them to
    the others. Checkpoints are as those of the optimizer inside, and are resumed with or without
    sharding (Rajbhandari et al., ZeRO, 2020, section 5.1).

    Args:
        params: Parameters or groups of them, each with its own learning rate.
        optimizer_type: The name of a class in ``torch.optim``.
        kwargs: Its arguments.
    """

    def __init__(self, params: Any, optimizer_type: str = 'AdamW', **kwargs: Any) -> None:
        kind = getattr(torch.optim, optimizer_type, None)
        if kind is None:
            raise UserError(f'shard_optimizer=True shards the optimizers of torch.optim, such as '
                            f'AdamW, not {optimizer_type}')
        super().__init__(list(params), kind, **kwargs)


def shard_optimizer(cfg: Config, processes: int) -> None:
    """Let a config's optimizer be sharded, in place, if it says so and there are several processes.

    mmengine's own ZeroRedundancyOptimizer, which never returns from its first save, becomes ours.

    Raises:
        UserError: ``shard_optimizer`` is neither True nor False.
    """
    wanted = cfg.get('shard_optimizer', False)
    if not isinstance(wanted, bool):
        raise UserError(f'shard_optimizer={wanted!r} must be True or False')
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer')
    if not isinstance(optimizer, dict):
        return
    if optimizer.get('type') == 'ZeroRedundancyOptimizer':
        optimizer['type'] = optimizer.pop('optimizer_type', 'AdamW')
        wanted = True
    if wanted and processes > 1:
        optimizer.update(type='ShardedOptimizer', optimizer_type=optimizer['type'])


def collect_state(optimizer: Any) -> None:
    """Bring the parts of a sharded optimizer's state to the first process; all must call it."""
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict()
