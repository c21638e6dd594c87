"""Learning-rate policies of mmcv 1.x; tests/migration/test_schedule.py compares whole schedules."""
import pytest

from convnext_mm import UserError
from convnext_mm.engine.schedulers import regular_rate, warmup_factor


@pytest.mark.parametrize(('policy', 'progress', 'settings', 'expected'), [
    ('fixed', 70, {}, 0.1), ('step', 29, dict(step=[30, 60]), 0.1),
    ('step', 60, dict(step=[30, 60]), 0.001), ('step', 60, dict(step=30, gamma=0.5), 0.025),
    ('step', 60, dict(step=[30, 60], min_lr=0.01), 0.01),
    ('poly', 50, dict(power=2.0), 0.025), ('poly', 50, dict(min_lr_ratio=0.5), 0.075),
    ('CosineAnnealing', 50, dict(min_lr=0.0), 0.05),
    ('LinearAnnealing', 75, dict(min_lr=0.02), 0.04),
    ('exp', 2, dict(gamma=0.5), 0.025), ('inv', 3, dict(gamma=1.0, power=0.5), 0.05)])
def test_regular_rate(policy, progress, settings, expected):
    assert regular_rate(policy, 0.1, progress, 100, **settings) == pytest.approx(expected)


@pytest.mark.parametrize('policy', ['exp', 'inv'])
def test_a_missing_gamma_is_reported(policy):
    with pytest.raises(UserError, match=f"policy='{policy}' needs gamma"):
        regular_rate(policy, 0.1, 1, 100)


@pytest.mark.parametrize(('warmup', 'expected'), [
    (None, 1.0), ('constant', 0.01), ('linear', 0.505), ('exp', 0.1)])
def test_warmup_factor(warmup, expected):
    assert warmup_factor(warmup, 50, 100, 0.01) == pytest.approx(expected)
    assert warmup_factor(warmup, 100, 100, 0.01) == 1
