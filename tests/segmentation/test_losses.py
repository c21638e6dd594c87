"""The cross-entropy of upsampled logits, with mmseg's numbers."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from torch import Tensor

pytest.importorskip('mmseg')
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from convnext_mm.segmentation import heads
from tests.helpers import saved_by


def samples(labels: Tensor) -> list[SegDataSample]:
    found = []
    for label in labels:
        found.append(SegDataSample())
        found[-1].gt_sem_seg = PixelData(data=label[None])
    return found


def build(ours: bool, **options: Any) -> Any:
    init_default_scope('mmseg')
    return MODELS.build(dict(dict(
        type=f'{"convnext_mm." if ours else ""}FCNHead', in_channels=8, channels=8, in_index=0,
        num_classes=19), **options))


def losses(head: Any, logits: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The losses, and the gradient of the logits."""
    logits = logits.clone().requires_grad_()
    found = head.loss_by_feat(logits, samples(labels))
    sum(value for key, value in found.items() if 'loss' in key).backward()
    return found, logits.grad


@pytest.mark.filterwarnings('ignore:Default ``avg_non_ignore``')
@pytest.mark.parametrize(('options', 'fused'), [
    ({}, True), (dict(align_corners=True), True), (dict(ignore_index=3), True),
    (dict(loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.4, avg_non_ignore=True)), True),
    (dict(loss_decode=dict(type='CrossEntropyLoss', class_weight=[0.5] * 19)), False),
    (dict(loss_decode=[dict(type='CrossEntropyLoss'), dict(type='DiceLoss')]), False),
    (dict(sampler=dict(type='OHEMPixelSampler', thresh=0.7, min_kept=100)), False)])
@pytest.mark.parametrize('size', [(90, 133), (23, 33), (11, 70)])
def test_losses_and_gradients_are_those_of_mmseg(options, fused, size, monkeypatch):
    calls = []
    original = heads.upsampled_cross_entropy
    monkeypatch.setattr(heads, 'upsampled_cross_entropy',
                        lambda *args: calls.append(1) or original(*args))
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 19, 23, 33)
    labels = torch.randint(0, 19, (2, *size))
    if 'class_weight' not in str(options):  # mmseg 1.2.2 looks the weight of ignored pixels up
        labels[:, :5, 3:20] = options.get('ignore_index', 255)
    (expected, g), (found, dlogits) = (losses(build(ours, **options), logits, labels)
                                       for ours in (False, True))
    assert bool(calls) == fused
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].shape == value.shape
        assert torch.allclose(found[key], value, rtol=1e-5), key
    assert (dlogits - g).norm() / g.norm() < 1e-5


def test_images_without_labels_have_no_loss():
    logits, labels = torch.randn(1, 19, 8, 8), torch.full((1, 32, 32), 255)
    for options in ({}, dict(loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True))):
        (expected, _), (found, gradient) = (losses(build(ours, **options), logits, labels)
                                            for ours in (False, True))
        assert found['loss_ce'] == expected['loss_ce'] == 0
        assert torch.allclose(found['acc_seg'], expected['acc_seg'])
        assert not gradient.any()


def test_bf16_logits_and_saved_memory():
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 19, 16, 16).bfloat16(), torch.randint(0, 19, (1, 64, 64))
    with torch.autocast('cpu', torch.bfloat16):
        (expected, g), (found, gradient) = (losses(build(ours), logits, labels)
                                            for ours in (False, True))
    assert torch.allclose(found['loss_ce'], expected['loss_ce'], rtol=1e-4)
    assert gradient.dtype == torch.bfloat16
    assert (gradient.float() - g.float()).norm() / g.float().norm() < 1e-2
    wide, head = logits.float().requires_grad_(), build(True)
    saved = saved_by(lambda: head.loss_by_feat(wide, samples(labels)), [], False)
    assert saved == 4 * 19 * 16 * 16 / 2**20, 'the gradient of the logits'
