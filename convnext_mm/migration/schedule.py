"""lr_config and runner of the old style → param_scheduler and train_cfg."""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mmengine.optim.scheduler.param_scheduler import _ParamScheduler

from ..errors import UserError

POLICIES: dict[str, tuple[str, ...]] = {
    'fixed': (), 'step': ('step', 'gamma', 'min_lr'), 'poly': ('power', 'min_lr'),
    'CosineAnnealing': ('min_lr', 'min_lr_ratio'), 'LinearAnnealing': ('min_lr', 'min_lr_ratio'),
    'exp': ('gamma',), 'inv': ('gamma', 'power')}
"""Policies of mmcv 1.x that are known here, with their settings."""

WARMUPS = (None, 'linear', 'constant', 'exp')
SHARED = ('policy', 'by_epoch', 'warmup', 'warmup_iters', 'warmup_ratio', 'warmup_by_epoch')


def regular_rate(policy: str, base: float, progress: float, whole: float, *,
                 step: int | Sequence[int] = (), gamma: float | None = None,
                 power: float = 1.0, min_lr: float | None = None,
                 min_lr_ratio: float | None = None) -> float:
    """The learning rate of mmcv 1.x without warm-up (``mmcv.runner.hooks.lr_updater``).

    Args:
        policy: A key of :data:`POLICIES`.
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
        policy: A key of :data:`POLICIES`.
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


def schedulers(lr_config: dict, iterations: int | None, epochs: int | None) -> list[dict]:
    """``param_scheduler`` for an ``lr_config``, with its rates at every iteration.

    Args:
        lr_config: Old.
        iterations: Of the training, where it goes by iterations.
        epochs: Of the training, where it goes by epochs.

    Raises:
        UserError: An unknown policy, warm-up or setting, or a policy that goes by what the training
            does not.
    """
    policy, warmup = lr_config.get('policy'), lr_config.get('warmup')
    names = {name.lower(): name for name in POLICIES}
    if str(policy).lower() not in names:
        raise UserError(f'lr_config.policy={policy!r} is not known here: {", ".join(POLICIES)}')
    policy = names[policy.lower()]
    if warmup not in WARMUPS:
        raise UserError(f'lr_config.warmup={warmup!r} is not known: linear, constant or exp')
    unknown = [k for k in lr_config if k not in (*SHARED, *POLICIES[policy], '_delete_')
               # mmcv merges what another policy of a base has left behind
               and k not in {name for keys in POLICIES.values() for name in keys}]
    if unknown:
        raise UserError(f'lr_config.{unknown[0]} is no setting of the policy {policy}: '
                        f'{", ".join((*SHARED, *POLICIES[policy]))}')
    by_epoch = lr_config.get('by_epoch', True)
    whole = epochs if by_epoch else iterations
    if whole is None and policy not in ('fixed', 'step', 'exp', 'inv'):
        raise UserError(f'lr_config.by_epoch={by_epoch}, but the runner goes by '
                        f'{"iterations" if by_epoch else "epochs"}: set by_epoch={not by_epoch}')
    whole = whole or 10**9
    settings = {key: lr_config[key] for key in POLICIES[policy] if lr_config.get(key) is not None}
    if policy == 'poly' and not settings.get('min_lr'):
        settings.pop('min_lr', None)
    length = lr_config.get('warmup_iters', 0) if warmup else 0
    ratio = lr_config.get('warmup_ratio', 0.1)
    exact = (policy in ('fixed', 'step', 'poly') and 'min_lr' not in settings
             and 'min_lr_ratio' not in settings and warmup in (None, 'linear', 'constant')
             and not lr_config.get('warmup_by_epoch') and (not length or 0 < ratio <= 1))
    if not exact:
        by = dict(by_epoch=True, convert_to_iter_based=True) if by_epoch else dict(by_epoch=False)
        warm = dict(warmup=warmup, warmup_iters=length, warmup_ratio=ratio) if length else {}
        if length and lr_config.get('warmup_by_epoch'):
            warm['warmup_by_epoch'] = True
        return [dict(type='PolicyLR', policy=policy, whole=whole, **settings, **warm, **by)]
    made = []
    if length:
        # mmengine's warm-ups arrive one iteration before their end.
        made.append(dict(type='LinearLR', start_factor=ratio, by_epoch=False, begin=0,
                         end=length + 1) if warmup == 'linear' else
                    dict(type='ConstantLR', factor=ratio, by_epoch=False, begin=0, end=length + 1))
    if policy == 'poly':
        made.append(dict(type='PolyLR', power=settings.get('power', 1.0), eta_min=0.0,
                         by_epoch=by_epoch, begin=0, end=whole + 1))
    elif policy == 'step' and isinstance(settings.get('step'), int):
        made.append(dict(type='StepLR', step_size=settings['step'], by_epoch=by_epoch, begin=0,
                         end=whole, gamma=settings.get('gamma', 0.1)))
    elif policy == 'step':
        made.append(dict(type='MultiStepLR', by_epoch=by_epoch, begin=0, end=whole,
                         milestones=list(settings.get('step', ())),
                         gamma=settings.get('gamma', 0.1)))
    return made or [dict(type='ConstantLR', factor=1.0, by_epoch=by_epoch, begin=0, end=whole)]
