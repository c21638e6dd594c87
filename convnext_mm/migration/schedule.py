"""lr_config and runner of the old style → param_scheduler and train_cfg."""
from __future__ import annotations

from ..errors import UserError

POLICIES: dict[str, tuple[str, ...]] = {
    'fixed': (), 'step': ('step', 'gamma', 'min_lr'), 'poly': ('power', 'min_lr'),
    'CosineAnnealing': ('min_lr', 'min_lr_ratio'), 'LinearAnnealing': ('min_lr', 'min_lr_ratio'),
    'exp': ('gamma',), 'inv': ('gamma', 'power')}
"""Policies of mmcv 1.x that are known here, with their settings."""

WARMUPS = (None, 'linear', 'constant', 'exp')
SHARED = ('policy', 'by_epoch', 'warmup', 'warmup_iters', 'warmup_ratio', 'warmup_by_epoch')


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
