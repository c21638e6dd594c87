"""The learning-rate policies of mmcv 1.x as an mmengine scheduler."""
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from mmengine.optim.scheduler.param_scheduler import _ParamScheduler

from ..errors import UserError


def regular_rate(policy: str, base: float, progress: int, total: int, *,
                 step: int | Sequence[int] = (), gamma: float | None = None,
                 power: float = 1.0, min_lr: float | None = None,
                 min_lr_ratio: float | None = None, periods: Sequence[int] = (),
                 restart_weights: Sequence[float] = (1.0,)) -> float:
    """Return the learning rate of mmcv 1.x without warm-up (``mmcv.runner.hooks.lr_updater``).

    Args:
        policy: A key of :data:`convnext_mm.migration.schedule.POLICIES`.
        base: Initial learning rate of the parameter group.
        progress: Iteration or epoch, from 0.
        total: Total iterations or epochs.
        step: When 'step' multiplies by ``gamma``: a list of times, or a period.
        gamma: Factor of 'step' (0.1 if not set), 'exp' and 'inv'.
        power: Exponent of 'poly' and 'inv'.
        min_lr: Final learning rate of every group.
        min_lr_ratio: Final learning rate relative to ``base``.
        periods: Lengths of the cosines of 'CosineRestart'.
        restart_weights: Factor of each of them.
    """
    if min_lr_ratio is not None:
        min_lr = base * min_lr_ratio
    if policy == 'step':
        count = progress // step if isinstance(step, int) else sum(progress >= s for s in step)
        rate = base * (0.1 if gamma is None else gamma) ** count
        return rate if min_lr is None else max(rate, min_lr)
    low = min_lr or 0.0
    if policy == 'poly':
        return (base - low) * (1 - progress / total) ** power + low
    if policy == 'CosineAnnealing':
        return low + 0.5 * (base - low) * (math.cos(math.pi * progress / total) + 1)
    if policy == 'CosineRestart':
        ends = list(itertools.accumulate(periods))
        i = min(sum(progress >= end for end in ends), len(ends) - 1)
        done = min((progress - ends[i] + periods[i]) / periods[i], 1)
        return low + 0.5 * restart_weights[i] * (base - low) * (math.cos(math.pi * done) + 1)
    if policy == 'LinearAnnealing':
        return base + (low - base) * progress / total
    if policy in ('exp', 'inv'):
        if gamma is None:
            raise UserError(f'PolicyLR: policy={policy!r} needs gamma')
        return base * (gamma ** progress if policy == 'exp' else (1 + gamma * progress) ** -power)
    return base


def warmup_factor(warmup: str | None, iteration: int, length: float, ratio: float) -> float:
    """Return the factor by which a warm-up of mmcv 1.x multiplies the regular learning rate.

    Args:
        warmup: 'linear', 'constant', 'exp' or None.
        iteration: Iteration, from 0.
        length: Iterations of the warm-up.
        ratio: Factor at its start.
    """
    if warmup is None or iteration >= length:
        return 1.0
    if warmup == 'constant':
        return ratio
    if warmup == 'exp':
        return ratio ** (1 - iteration / length)
    return 1 - (1 - iteration / length) * (1 - ratio)


class PolicyLR(_ParamScheduler):
    """Computes the learning rate of an ``lr_config`` of mmcv 1.x in closed form.

    mmengine's schedulers multiply the previous learning rate. They cannot express a minimum rate
    during a warm-up, the end of a cosine, or an exponential warm-up.

    Args:
        optimizer: Optimizer or optimizer wrapper.
        policy: A key of :data:`convnext_mm.migration.schedule.POLICIES`.
        whole: Total iterations, or epochs if ``epoch_length`` is set.
        epoch_length: Iterations per epoch, if the policy counts epochs. With
            ``by_epoch=True, convert_to_iter_based=True`` the Runner sets it.
        warmup: 'linear', 'constant', 'exp' or None; always counts iterations.
        warmup_iters: Length of the warm-up, in epochs if ``warmup_by_epoch``.
        warmup_ratio: Factor at its start.
        per_iteration: Whether the policy counts the iterations of ``whole`` epochs.
        step, gamma, power, min_lr, min_lr_ratio, periods, restart_weights: See
            :func:`regular_rate`.
    """

    def __init__(self, optimizer: Any, policy: str, whole: int, *, epoch_length: int | None = None,
                 warmup: str | None = None, warmup_iters: int = 0, warmup_ratio: float = 0.1,
                 warmup_by_epoch: bool = False, per_iteration: bool = False, begin: int = 0,
                 end: int = 10**9, last_step: int = -1, by_epoch: bool = False,
                 verbose: bool = False, step: int | Sequence[int] | None = None,
                 gamma: float | None = None, power: float | None = None,
                 min_lr: float | None = None, min_lr_ratio: float | None = None,
                 periods: Sequence[int] | None = None,
                 restart_weights: Sequence[float] | None = None) -> None:
        settings = dict(step=step, gamma=gamma, power=power, min_lr=min_lr,
                        min_lr_ratio=min_lr_ratio, periods=periods,
                        restart_weights=restart_weights)
        self.policy, self.whole, self.epoch_length = policy, whole, epoch_length
        self.warmup, self.warmup_ratio = warmup, warmup_ratio
        self.warmup_iters = warmup_iters * ((epoch_length or 1) if warmup_by_epoch else 1)
        self.settings: dict[str, Any] = {k: v for k, v in settings.items() if v is not None}
        self.per_iteration = per_iteration
        super().__init__(optimizer, param_name='lr', begin=begin, end=end, last_step=last_step,
                         by_epoch=by_epoch, verbose=verbose)

    @classmethod
    def build_iter_from_epoch(cls, *args: Any, epoch_length: int, begin: int = 0,
                              end: int = 10**9, by_epoch: bool = True, **kwargs: Any) -> PolicyLR:
        """Build the scheduler with the epoch length that the Runner passes."""
        return cls(*args, epoch_length=epoch_length, by_epoch=False, **kwargs)

    def _get_value(self) -> list[float]:
        iteration = self.last_step
        progress, whole = iteration, self.whole
        if self.epoch_length and self.per_iteration:
            whole *= self.epoch_length
        elif self.epoch_length:
            progress //= self.epoch_length
        factor = warmup_factor(self.warmup, iteration, self.warmup_iters, self.warmup_ratio)
        return [factor * regular_rate(self.policy, base, progress, whole, **self.settings)
                for base in self.base_values]
