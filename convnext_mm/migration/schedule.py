"""Converts ``lr_config`` into ``param_scheduler``."""
from __future__ import annotations

from typing import Any

from ..errors import UserError

POLICIES: dict[str, tuple[str, ...]] = {
    'fixed': (), 'step': ('step', 'gamma', 'min_lr'), 'poly': ('power', 'min_lr'),
    'CosineAnnealing': ('min_lr', 'min_lr_ratio'), 'LinearAnnealing': ('min_lr', 'min_lr_ratio'),
    'CosineRestart': ('periods', 'restart_weights', 'min_lr', 'min_lr_ratio'),
    'exp': ('gamma',), 'inv': ('gamma', 'power')}
"""The supported policies of mmcv 1.x with their settings."""

WARMUPS = (None, 'linear', 'constant', 'exp')
SHARED_SETTINGS = ('policy', 'by_epoch', 'warmup', 'warmup_iters', 'warmup_ratio',
                   'warmup_by_epoch')


def convert_lr_config(lr_config: dict[str, Any], iterations: int | None,
                      epochs: int | None) -> list[dict[str, Any]]:
    """Return the ``param_scheduler`` with the same learning rate at every iteration.

    Args:
        lr_config: The old setting.
        iterations: Length of the training, if it is counted in iterations.
        epochs: Length of the training, if it is counted in epochs.

    Raises:
        UserError: An unknown policy, warm-up or setting, or a policy that counts in epochs where
            the training counts in iterations, or the reverse.
    """
    warmup = lr_config.get('warmup')
    policies = {name.lower(): name for name in POLICIES}
    policy = policies.get(str(lr_config.get('policy')).lower())
    if policy is None:
        raise UserError(f'Unknown lr_config.policy={lr_config.get("policy")!r}; expected one of '
                        f'{", ".join(POLICIES)}')
    if warmup not in WARMUPS:
        raise UserError(f'Unknown lr_config.warmup={warmup!r}; expected linear, constant or exp')
    # The settings of every policy are allowed: bases may leave those of another one behind.
    all_settings = {setting for settings in POLICIES.values() for setting in settings}
    for key in lr_config:
        if key not in (*SHARED_SETTINGS, *all_settings, '_delete_'):
            raise UserError(f'Unknown lr_config.{key}; policy {policy!r} has the settings '
                            f'{", ".join((*SHARED_SETTINGS, *POLICIES[policy]))}')
    by_epoch = lr_config.get('by_epoch', True)
    total = epochs if by_epoch else iterations
    # Iterations of a run of epochs: their number follows from the data.
    per_iteration = not by_epoch and total is None and policy in (
        'poly', 'CosineAnnealing', 'LinearAnnealing')
    if per_iteration:
        by_epoch, total = True, epochs
    if total is None and policy in ('poly', 'CosineAnnealing', 'LinearAnnealing'):
        raise UserError('lr_config.by_epoch=True, but the runner counts iterations: set '
                        'by_epoch=False')
    if policy in ('exp', 'inv') and lr_config.get('gamma') is None:
        raise UserError(f'lr_config.policy={policy!r} needs gamma: set it')
    if policy == 'CosineRestart':
        _check_periods(lr_config, total)
    total = total or 10**9
    settings = {key: lr_config[key] for key in POLICIES[policy] if lr_config.get(key) is not None}
    if policy == 'poly' and not settings.get('min_lr'):
        settings.pop('min_lr', None)
    length = lr_config.get('warmup_iters', 0) if warmup else 0
    ratio = lr_config.get('warmup_ratio', 0.1)
    exact = (not per_iteration and policy in ('fixed', 'step', 'poly') and 'min_lr' not in settings
             and 'min_lr_ratio' not in settings and warmup in (None, 'linear', 'constant')
             and not lr_config.get('warmup_by_epoch') and (not length or 0 < ratio <= 1)
             and length < (iterations or length + 1))
    if not exact:
        warmup_settings = dict(warmup=warmup, warmup_iters=length, warmup_ratio=ratio)
        if lr_config.get('warmup_by_epoch'):
            warmup_settings['warmup_by_epoch'] = True
        return [dict(type='PolicyLR', policy=policy, whole=total, **settings,
                     **(warmup_settings if length else {}), by_epoch=by_epoch,
                     **(dict(convert_to_iter_based=True) if by_epoch else {}),
                     **(dict(per_iteration=True) if per_iteration else {}))]
    schedulers: list[dict[str, Any]] = []
    if length:
        # mmengine's warm-up schedulers reach their last factor one iteration before ``end``.
        start = (dict(type='LinearLR', start_factor=ratio) if warmup == 'linear' else
                 dict(type='ConstantLR', factor=ratio))
        schedulers.append(dict(**start, by_epoch=False, begin=0, end=length + 1))
    gamma = settings.get('gamma', 0.1)
    if policy == 'poly':
        schedulers.append(dict(type='PolyLR', power=settings.get('power', 1.0), eta_min=0.0,
                               by_epoch=by_epoch, begin=0, end=total + 1))
    elif policy == 'step' and isinstance(settings.get('step'), int):
        schedulers.append(dict(type='StepLR', step_size=settings['step'], by_epoch=by_epoch,
                               begin=0, end=total, gamma=gamma))
    elif policy == 'step':
        schedulers.append(dict(type='MultiStepLR', by_epoch=by_epoch, begin=0, end=total,
                               milestones=list(settings.get('step', ())), gamma=gamma))
    return schedulers or [
        dict(type='ConstantLR', factor=1.0, by_epoch=by_epoch, begin=0, end=total)]


def _check_periods(lr_config: dict[str, Any], total: int | None) -> None:
    """Check that CosineRestart has a weight for each period, and periods for the whole run."""
    periods, weights = lr_config.get('periods') or [], lr_config.get('restart_weights', [1])
    if not periods or len(periods) != len(weights):
        raise UserError(f'lr_config.periods={periods} and restart_weights={weights} must be lists '
                        'of the same length')
    if total and sum(periods) < total:
        raise UserError(f'lr_config.periods={periods} end after {sum(periods)} of {total} '
                        'iterations or epochs: add a period')
