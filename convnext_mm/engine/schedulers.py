"""The learning-rate policies of mmcv 1.x, as a scheduler for mmengine."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mmengine.optim.scheduler.param_scheduler import _ParamScheduler


def regular_rate(policy: str, base: float, progress: float, whole: float, *,
                 step: int | Sequence[int] = (), gamma: float | None = None,
                 power: float = 1.0, min_lr: float | None = None,
                 min_lr_ratio: float | None = None) -> float:
    """The learning rate of mmcv 1.x without warm-up (``mmcv.runner.hooks.lr_updater``).

    Args:
        policy: A key of :data:`convnext_mm.migration.schedule.POLICIES`.
        base: The group's initial learning rate.
        progress: Iteration or epoch, from 0.
        whole: Iterations or epochs of the training.
        step: Where 'step' multiplies by ``gamma``: a list, or one that repeats.
        gamma: 0.1 for 'step' where it is not given.
        power: Of 'poly' and 'inv'.
        min_lr: The rate at the end, of every group.
        min_lr_ratio: The same as a share of ``base``.
    """
    if min_lr_ratio is not None:
        min_lr = base * min_lr_ratio
    if policy == 'step':
        times = progress // step if isinstance(step, int) else sum(progress >= s for s in step)
        rate = base * (0.1 if gamma is None else gamma) ** times
        return rate if min_lr is None else max(rate, min_lr)
    low = min_lr or 0.0
    if policy == 'poly':
        return (base - low) * (1 - progress / whole) ** power + low
    if policy == 'CosineAnnealing':
        return low + 0.5 * (base - low) * (math.cos(math.pi * progress / whole) + 1)
    if policy == 'LinearAnnealing':
        return base + (low - base) * progress / whole
    if policy == 'exp':
        return base * gamma ** progress
    if policy == 'inv':
        return base * (1 + gamma * progress) ** -power
    return base


def warmup_factor(warmup: str | None, iteration: int, length: float, ratio: float) -> float:
    """What a warm-up of mmcv 1.x multiplies the regular rate with."""
    if warmup is None or iteration >= length:
        return 1.0
    if warmup == 'constant':
        return ratio
    if warmup == 'exp':
        return ratio ** (1 - iteration / length)
    return 1 - (1 - iteration / length) * (1 - ratio)


class PolicyLR(_ParamScheduler):
    """The learning rate of an ``lr_config`` of mmcv 1.x, by its closed form.

    For what mmengine's own schedulers, which multiply the last rate on, do not reach: a least rate
    under a warm-up, the end of a cosine, an exponential warm-up.

    Args:
        optimizer: Optimizer or wrapper.
        policy: A key of :data:`convnext_mm.migration.schedule.POLICIES`.
        whole: Iterations of the training, or epochs with ``epoch_length``.
        epoch_length: Iterations an epoch, where the policy goes by epochs. With
            ``by_epoch=True, convert_to_iter_based=True`` the Runner says it.
        warmup: 'linear', 'constant', 'exp' or None, always by iterations.
        warmup_iters: Length of the warm-up, in epochs with ``warmup_by_epoch``.
        warmup_ratio: Factor at its beginning.
        settings: As in :func:`regular_rate`.
    """

    def __init__(self, optimizer: Any, policy: str, whole: int, *, epoch_length: int | None = None,
                 warmup: str | None = None, warmup_iters: int = 0, warmup_ratio: float = 0.1,
                 warmup_by_epoch: bool = False, begin: int = 0, end: int = 10**9,
                 last_step: int = -1, by_epoch: bool = False, verbose: bool = False,
                 **settings: Any) -> None:
        self.policy, self.whole, self.epoch_length = policy, whole, epoch_length
        self.warmup, self.warmup_ratio = warmup, warmup_ratio
        self.warmup_iters = warmup_iters * ((epoch_length or 1) if warmup_by_epoch else 1)
        self.settings = settings
        super().__init__(optimizer, param_name='lr', begin=begin, end=end, last_step=last_step,
                         by_epoch=by_epoch, verbose=verbose)

    @classmethod
    def build_iter_from_epoch(cls, *args: Any, epoch_length: int, begin: int = 0,
                              end: int = 10**9, by_epoch: bool = True, **kwargs: Any) -> PolicyLR:
        """The Runner's way to a scheduler that knows the length of an epoch."""
        return cls(*args, epoch_length=epoch_length, by_epoch=False, **kwargs)

    def _get_value(self) -> list[float]:
        iteration = self.last_step
        progress = iteration // self.epoch_length if self.epoch_length else iteration
        factor = warmup_factor(self.warmup, iteration, self.warmup_iters, self.warmup_ratio)
        return [factor * regular_rate(self.policy, base, progress, self.whole, **self.settings)
                for base in self.base_values]
