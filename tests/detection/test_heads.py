"""The recipes' detectors compute the same as with mmdet's own classes."""
import random

import numpy as np
import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmengine.registry import MODELS, init_default_scope

from benchmarks.peers import use_stock_classes
from convnext_mm.engine.checks import read_config
from convnext_mm.engine.fallbacks import adapt_to_device
from convnext_mm.engine.speed import enable_packed_inference
from convnext_mm.fused.conv_module import FusedConv2d, FusedConvModule
from convnext_mm.fused.layers import FusedLinear
from tests.helpers import DEMO_DETECTION, DETECTION

MASK_RCNN = ('configs/mask_rcnn_convnext_tiny_patch4_window7_mstrain_480-800_adamw_3x_coco_'
             'in1k.py')


def build(config, stock):
    cfg = read_config(config, {'model.backbone.init_cfg': None,
                               'model.backbone.depths': [1, 1, 1, 1],
                               'model.backbone.dims': [8, 16, 24, 32]})
    if stock:
        use_stock_classes(cfg.model)
    adapt_to_device(cfg)
    for part in (cfg.model.train_cfg.rpn_proposal, cfg.model.test_cfg.rpn):
        part.max_per_img = 60
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for head in model.modules():
        if hasattr(head, 'fc_cls'):
            torch.nn.init.normal_(head.fc_cls.weight, std=0.1)
    return model


def batch(model):
    data = demo_mm_inputs(2, [(3, 128, 160), (3, 128, 160)], num_classes=4, with_mask=True)
    return model.data_preprocessor(data, True)


@pytest.mark.parametrize('config', [DETECTION, MASK_RCNN])
def test_losses_and_gradients_are_those_of_mmdet(config):
    results = []
    for stock in (True, False):
        model = build(config, stock).train()
        data = batch(model)
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        loss, parts = model.parse_losses(model.loss(data['inputs'], data['data_samples']))
        loss.backward()
        results.append((parts, {name: p.grad for name, p in model.named_parameters()}))
    (parts, gradients), (ours, our_gradients) = results
    assert list(ours) == list(parts)
    for name in parts:
        assert torch.allclose(ours[name], parts[name], rtol=1e-3, atol=1e-4), name
    assert list(our_gradients) == list(gradients), 'the same names of parameters'
    for name, gradient in gradients.items():
        if gradient is not None and gradient.abs().max() > 1e-4:
            # Rounding turns single ReLUs on or off.
            assert (our_gradients[name] - gradient).norm() < 2e-2 * gradient.norm(), name


@pytest.mark.parametrize('config', [DETECTION, MASK_RCNN])
def test_detections_are_those_of_mmdet(config):
    """Boxes to a thousandth of a pixel, with norms folded and weights packed."""
    results = []
    for stock in (True, False):
        model = build(config, stock).eval()
        data = batch(model)
        if not stock:
            enable_packed_inference(model)
        with torch.no_grad():
            results.append(model.predict(data['inputs'], data['data_samples'])[0].pred_instances)
    stock, ours = results
    assert len(stock) == len(ours) > 50
    assert (ours.bboxes - stock.bboxes).abs().max() < 1e-3
    assert torch.equal(ours.labels, stock.labels)
    assert (ours.masks != stock.masks).float().mean() < 1e-3


def test_all_products_are_fused():
    model = build(DEMO_DETECTION, stock=False)
    kinds = [type(module) for module in model.modules()]
    assert kinds.count(FusedConv2d) == 1, 'of the RPN'
    assert kinds.count(FusedConvModule) == 8 + 3 * 4 + 3 * 4, 'neck, box heads and mask heads'
    assert kinds.count(FusedLinear) == 3


def test_the_layout_of_the_neck_follows_the_parts_after_it():
    """mmcv's compiled RoIAlign would silently read channels_last maps as contiguous."""
    assert read_config(DETECTION).model.neck.channels_last is True
    for part, kind in (('roi_head.mask_roi_extractor', 'SingleRoIExtractor'),
                       ('rpn_head', 'RPNHead')):
        cfg = read_config(DETECTION, {f'model.{part}.type': kind})
        assert cfg.model.neck.channels_last is False
