"""mmdet's detectors on this backbone: one training step and a prediction with our operators.

Where mmcv has compiled operators, both give the same losses, gradients and boxes.
"""
import random

import numpy as np
import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.logging import MessageHub
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData

from tests.detectors import build_detector
from tests.ops.extensions import COMPILED, OURS, operators

DETECTORS = [
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco', 'retinanet/retinanet_r50_fpn_1x_coco',
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco', 'atss/atss_r50_fpn_1x_coco',
    'gfl/gfl_r50_fpn_1x_coco', 'yolact/yolact_r50_1xb8-55e_coco',
    'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance',
    'deformable_detr/deformable-detr_r50_16xb2-50e_coco', 'dino/dino-4scale_r50_8xb2-12e_coco',
    'solov2/solov2_r50_fpn_1x_coco', 'point_rend/point-rend_r50-caffe_fpn_ms-1x_coco',
    'htc/htc_r50_fpn_1x_coco', 'ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco',
    'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco', 'mask2former/mask2former_r50_8xb2-lsj-50e_coco',
    # with deformable convolutions, CARAFE, soft NMS
    'tood/tood_r50_fpn_1x_coco', 'vfnet/vfnet_r50_fpn_1x_coco',
    'reppoints/reppoints-moment_r50_fpn_1x_coco', 'carafe/faster-rcnn_r50_fpn-carafe_1x_coco',
    'atss/atss_r50_fpn_dyhead', 'yolox/yolox_tiny_8xb8-300e_coco']


def step(model, extension):
    """Losses, gradients and predictions of a model with the operators of an extension."""
    inputs = demo_mm_inputs(2, [[3, 128, 128]] * 2, num_items=[2, 3], num_classes=4,
                            with_mask=True, with_semantic=True)
    for sample in inputs['data_samples']:
        if model.__class__.__name__ == 'HybridTaskCascade':  # labels at stride 8
            sample.gt_sem_seg = PixelData(sem_seg=sample.gt_sem_seg.sem_seg[:, ::8, ::8])
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    with operators(extension):
        model.train()
        losses = model(**model.data_preprocessor(inputs, True), mode='loss')
        total, log = model.parse_losses(losses)
        model.zero_grad()
        total.backward()
        gradients = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
        model.eval()
        with torch.no_grad():
            results = model(**model.data_preprocessor(inputs, False), mode='predict')
    return log, gradients, [sample.pred_instances for sample in results]


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', DETECTORS)
def test_detector(name):
    init_default_scope('mmdet')
    MessageHub.get_current_instance().update_info('epoch', 0)  # TOOD asks for it
    model = build_detector(name)
    log, gradients, results = step(model, OURS)
    assert all(torch.as_tensor(value).isfinite().all() for value in log.values())
    assert gradients.isfinite().all()
    assert gradients.max() > 0
    assert len(results) == 2
    assert all(hasattr(result, 'scores') for result in results)
    if COMPILED is None or 'carafe' in name:  # which is compiled only for GPUs
        return
    their_log, their_gradients, their_results = step(model, COMPILED)
    assert log.keys() == their_log.keys()
    for key, value in log.items():
        torch.testing.assert_close(value, their_log[key], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, their_gradients, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(results, their_results, strict=True):
        torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours.labels, theirs.labels)
        if 'bboxes' in ours:
            torch.testing.assert_close(ours.bboxes, theirs.bboxes, rtol=1e-4, atol=1e-2)
