"""Converted schedules have mmcv 1.x's learning rate at every iteration."""
import math

import pytest
import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS

from convnext_mm import UserError
from convnext_mm.engine.schedulers import PolicyLR
from convnext_mm.migration.schedule import convert_lr_config

ITERATIONS, EPOCHS, LENGTH = 400, 8, 50
BASES = [1e-4, 3e-7]


def old_rate(cfg: dict, base: float, iteration: int) -> float:
    """The learning rate of mmcv 1.x, written from its documentation."""
    by_epoch = cfg.get('by_epoch', True)
    t, total = (iteration // LENGTH, EPOCHS) if by_epoch else (iteration, ITERATIONS)
    low = cfg.get('min_lr', base * cfg.get('min_lr_ratio', 0.0))
    match cfg['policy']:
        case 'poly':
            lr = (base - low) * (1 - t / total) ** cfg.get('power', 1.0) + low
        case 'step' if isinstance(cfg['step'], int):
            lr = max(base * cfg.get('gamma', 0.1) ** (t // cfg['step']), low)
        case 'step':
            lr = max(base * cfg.get('gamma', 0.1) ** sum(s <= t for s in cfg['step']), low)
        case 'CosineAnnealing':
            lr = low + (base - low) / 2 * (1 + math.cos(math.pi * t / total))
        case 'LinearAnnealing':
            lr = base + (low - base) * t / total
        case 'exp':
            lr = base * cfg['gamma'] ** t
        case 'inv':
            lr = base * (1 + cfg['gamma'] * t) ** -cfg.get('power', 1.0)
        case _:
            lr = base
    length = cfg.get('warmup_iters', 0) * (LENGTH if cfg.get('warmup_by_epoch') else 1)
    if cfg.get('warmup') and iteration < length:
        ratio = cfg.get('warmup_ratio', 0.1)
        lr *= {'linear': 1 - (1 - iteration / length) * (1 - ratio), 'constant': ratio,
               'exp': ratio ** (1 - iteration / length)}[cfg['warmup']]
    return lr


def new_rates(cfg: dict) -> list[list[float]]:
    """The learning rates of the converted schedule, for each iteration and parameter group."""
    wrapper = OptimWrapper(torch.optim.SGD([
        dict(params=[torch.nn.Parameter(torch.zeros(1))], lr=lr) for lr in BASES]))
    schedulers = []
    for settings in convert_lr_config(cfg, ITERATIONS, EPOCHS):
        if settings.pop('convert_to_iter_based', False):
            settings.pop('type')
            schedulers.append(PolicyLR.build_iter_from_epoch(wrapper, epoch_length=LENGTH,
                                                             **settings))
        else:
            schedulers.append(PARAM_SCHEDULERS.build(dict(settings, optimizer=wrapper)))
    rates = []
    wrapper.optimizer.step()
    for t in range(ITERATIONS):
        rates.append([group['lr'] for group in wrapper.optimizer.param_groups])
        for scheduler in schedulers:
            if not scheduler.by_epoch or (t + 1) % LENGTH == 0:
                scheduler.step()
    return rates


CONFIGS = [dict(policy, **by, **warmup) for policy in (
    dict(policy='poly', power=1.0, min_lr=0.0), dict(policy='poly', power=0.9, min_lr=1e-8),
    dict(policy='step', step=[5, 7]), dict(policy='step', step=3, gamma=0.5),
    dict(policy='step', step=[2], min_lr=1e-5), dict(policy='CosineAnnealing', min_lr=0),
    dict(policy='CosineAnnealing', min_lr_ratio=1e-2), dict(policy='fixed'),
    dict(policy='LinearAnnealing', min_lr=1e-9), dict(policy='exp', gamma=0.99),
    dict(policy='inv', gamma=0.1, power=0.5)) for by in (
    dict(by_epoch=True), dict(by_epoch=False)) for warmup in (
    {}, dict(warmup='linear', warmup_iters=60, warmup_ratio=1e-6),
    dict(warmup='constant', warmup_iters=75, warmup_ratio=0.3),
    dict(warmup='exp', warmup_iters=30), dict(warmup='linear', warmup_iters=40, warmup_ratio=0.0))]
CONFIGS.append(dict(policy='step', step=[5], warmup='linear', warmup_iters=2, warmup_by_epoch=True))


@pytest.mark.parametrize('cfg', CONFIGS, ids=lambda cfg: '-'.join(map(str, cfg.values())))
def test_rates_equal_those_of_mmcv(cfg):
    if cfg.get('by_epoch', True) is False and isinstance(cfg.get('step'), list):
        cfg = dict(cfg, step=[s * LENGTH for s in cfg['step']])
    rates = new_rates(cfg)
    assert len(rates) == ITERATIONS
    for t, group_rates in enumerate(rates):
        assert group_rates == pytest.approx([old_rate(cfg, base, t) for base in BASES],
                                            rel=1e-9, abs=0), t


def test_mmengine_schedulers_are_used_where_they_are_exact():
    schedulers = convert_lr_config(
        dict(policy='poly', warmup='linear', warmup_iters=1500, warmup_ratio=1e-6, power=1.0,
             min_lr=0.0, by_epoch=False), 160000, None)
    assert [scheduler['type'] for scheduler in schedulers] == ['LinearLR', 'PolyLR']
    schedulers = convert_lr_config(
        dict(policy='step', warmup='linear', warmup_iters=500, warmup_ratio=0.001, step=[27, 33]),
        None, 36)
    assert [scheduler['type'] for scheduler in schedulers] == ['LinearLR', 'MultiStepLR']


def test_runner_passes_the_length_of_an_epoch():
    """Built as mmengine's Runner does for ``convert_to_iter_based``."""
    wrapper = OptimWrapper(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    cfg, = convert_lr_config(dict(policy='CosineAnnealing', min_lr=0), None, EPOCHS)
    scheduler = PARAM_SCHEDULERS.build(
        dict(cfg, end=EPOCHS), default_args=dict(optimizer=wrapper, epoch_length=LENGTH))
    assert isinstance(scheduler, PolicyLR)
    assert (scheduler.epoch_length, scheduler.by_epoch) == (LENGTH, False)


@pytest.mark.parametrize(('cfg', 'message'), [
    (dict(policy='OneCycle'), "Unknown lr_config.policy='OneCycle'; expected one of fixed, step"),
    (dict(), 'Unknown lr_config.policy=None'),
    (dict(policy='poly', warmup='cosine'), "Unknown lr_config.warmup='cosine'"),
    (dict(policy='poly', powr=0.9), "Unknown lr_config.powr; policy 'poly' has")])
def test_errors_name_the_unknown_value(cfg, message):
    with pytest.raises(UserError, match=message):
        convert_lr_config(cfg, 100, None)


@pytest.mark.parametrize('policy', [
    dict(policy='poly', power=0.9, min_lr=1e-8), dict(policy='CosineAnnealing', min_lr_ratio=0.1),
    dict(policy='LinearAnnealing', min_lr=0.0, warmup='linear', warmup_iters=60)])
def test_iterations_of_a_run_of_epochs(policy, monkeypatch):
    """by_epoch=False under an EpochBasedRunner, which knows their number when it starts."""
    cfg = dict(policy, by_epoch=False)
    settings, = convert_lr_config(cfg, None, EPOCHS)
    assert (settings['whole'], settings['per_iteration']) == (EPOCHS, True)
    monkeypatch.setitem(globals(), 'convert_lr_config', lambda *_: [settings])
    for t, rates in enumerate(new_rates(cfg)):
        assert rates == pytest.approx([old_rate(cfg, base, t) for base in BASES], rel=1e-9), t


def test_cosine_with_restarts():
    cfg = dict(policy='CosineRestart', periods=[100, 300], restart_weights=[1, 0.5], min_lr=1e-7,
               by_epoch=False)
    rates = [group[0] for group in new_rates(cfg)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[50] == pytest.approx(1e-7 + 0.5 * (1e-4 - 1e-7))
    assert rates[100] == pytest.approx(1e-7 + 0.5 * (1e-4 - 1e-7))
    assert rates[250] == pytest.approx(1e-7 + 0.25 * (1e-4 - 1e-7))
    with pytest.raises(UserError, match='end after 100 of 400'):
        convert_lr_config(dict(cfg, periods=[100], restart_weights=[1]), ITERATIONS, None)
    with pytest.raises(UserError, match='must be lists of the same length'):
        convert_lr_config(dict(cfg, periods=[400]), ITERATIONS, None)


def test_a_warm_up_longer_than_the_run():
    cfg = dict(policy='poly', warmup='linear', warmup_iters=500, warmup_ratio=0.1, by_epoch=False)
    for t, rates in enumerate(new_rates(cfg)):
        assert rates == pytest.approx([old_rate(cfg, base, t) for base in BASES], rel=1e-9), t
    assert [one['type'] for one in convert_lr_config(cfg, 500, None)] == ['PolicyLR']
    assert [one['type'] for one in convert_lr_config(cfg, 501, None)] == ['LinearLR', 'PolyLR']


def test_policy_and_runner_must_count_alike():
    with pytest.raises(UserError, match='the runner counts iterations: set by_epoch=False'):
        convert_lr_config(dict(policy='poly'), 1000, None)
