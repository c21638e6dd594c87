"""Focal losses: equal to the paper's formula and to its gradient."""
import pytest
import torch
import torch.nn.functional as F

from tests.ops.extensions import OURS, operators


def batch(classes=5, dtype=torch.float64):
    torch.manual_seed(0)
    logits = (4 * torch.randn(12, classes)).to(dtype)
    return logits, torch.arange(12) % (classes + 1), torch.rand(classes).to(dtype)


def sigmoid_formula(logits, target, gamma, alpha):
    positive = F.one_hot(target, logits.shape[1] + 1)[:, :-1].bool()  # the last is background
    p = torch.where(positive, logits.sigmoid(), 1 - logits.sigmoid())
    return -torch.where(positive, alpha, 1 - alpha) * (1 - p)**gamma * p.log()


@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (1.5, 0.6), (0.0, 0.5)])
@pytest.mark.parametrize('weighted', [False, True])
def test_sigmoid_focal_loss(gamma, alpha, weighted):
    logits, target, weight = batch()
    expected = sigmoid_formula(logits, target, gamma, alpha)
    if weighted:  # background, which mmcv's kernels look up outside the memory, counts 1
        expected = expected * torch.cat([weight, torch.ones(1)])[target][:, None]
    with operators(OURS) as ops:
        def loss(x, reduction='none'):
            return ops.sigmoid_focal_loss(x, target, gamma, alpha, weight if weighted else None,
                                          reduction)
        torch.testing.assert_close(loss(logits), expected)
        torch.testing.assert_close(loss(logits, 'mean'), expected.sum() / len(logits))
        x = logits.requires_grad_()
        assert torch.autograd.gradcheck(lambda x: loss(x, 'sum'), x)


def test_sigmoid_focal_loss_is_mmdets():
    from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss
    logits, target, _ = batch()
    one_hot = F.one_hot(target, logits.shape[1] + 1)[:, :-1]
    with operators(OURS) as ops:
        ours = ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, None, 'sum')
    torch.testing.assert_close(ours, py_sigmoid_focal_loss(logits, one_hot, reduction='sum'))


@pytest.mark.parametrize('gamma', [2.0, 0.5, 0.0])
@pytest.mark.parametrize('weighted', [False, True])
def test_softmax_focal_loss(gamma, weighted):
    logits, target, weight = batch()
    target = target.clamp(max=4)
    p = logits.softmax(1).gather(1, target[:, None])[:, 0]
    expected = -0.25 * (1 - p)**gamma * p.log() * (weight[target] if weighted else 1)
    target[3], expected[3] = -1, 0
    with operators(OURS) as ops:
        def loss(x):
            return ops.softmax_focal_loss(x, target, gamma, 0.25, weight if weighted else None,
                                          'none')
        torch.testing.assert_close(loss(logits.clone()), expected)
        x = logits.requires_grad_()
        # mmcv's backward pass supports only 'mean' and 'sum'.
        assert torch.autograd.gradcheck(lambda x: ops.softmax_focal_loss(
            x, target, gamma, 0.25, weight if weighted else None, 'sum'), x)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['sigmoid_focal_loss', 'softmax_focal_loss'])
def test_half_precision(name, dtype):
    logits, target, _ = batch()
    target = target.clamp(max=4)
    with operators(OURS) as ops:
        half = logits.to(dtype)
        ours = getattr(ops, name)(half, target, 2.0, 0.25, None, 'none')
        exact = getattr(ops, name)(half.double(), target, 2.0, 0.25, None, 'none')
    assert ours.dtype == dtype
    assert (ours.double() - exact).abs().max() < 0.02 * exact.max()


def test_saturated_logits_have_finite_losses_and_gradients():
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    with operators(OURS) as ops:
        for gamma in (2.0, 0.5):
            for loss in (ops.sigmoid_focal_loss, ops.softmax_focal_loss):
                value = loss(logits, torch.tensor([0, 0]), gamma, 0.25, None, 'sum')
                assert value.isfinite()
                assert torch.autograd.grad(value, logits)[0].isfinite().all()


def test_a_target_that_is_no_class_is_an_error():
    with (operators(OURS) as ops,
          pytest.raises(ValueError, match='Target 2, but there are 2 classes')):
        ops.softmax_focal_loss(torch.zeros(1, 2), torch.tensor([2]), 2.0, 0.25, None, 'none')
