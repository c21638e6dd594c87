"""Models as functions of tensors give what the models give."""
import copy

import pytest
import torch
from mmengine.registry import init_default_scope
from torch import nn

from convnext_mm import UserError
from convnext_mm.backbone import ConvNeXt
from convnext_mm.deployment import rewriting
from convnext_mm.deployment.pipelines import build_pipeline
from convnext_mm.deployment.rewriting import (
    AdaptivePool,
    ConvolutionalBlock,
    Form,
    PyramidConvolution,
    exportable,
    form_of,
    interpolation,
)
from convnext_mm.deployment.runtimes import paste
from convnext_mm.fused.conv_module import FusedConvModule
from convnext_mm.layers import Block
from tests.helpers import DEMO_DETECTION, DEMO_SEGMENTATION, build_model

FORMS = [Form(), Form(channels_last=True), Form(full_size=2)]
SMALL = {'model.backbone.depths': [1, 1, 1, 1], 'model.backbone.dims': [8, 16, 24, 32]}
SLIDE = {'model.test_cfg.mode': 'slide', 'model.test_cfg.crop_size': (96, 96),
         'model.test_cfg.stride': (64, 64)}
PAD = {'model.data_preprocessor.test_cfg': dict(size_divisor=32)}
V2 = {'model.backbone.use_grn': True}
BOXES = {'model.roi_head.mask_head': None, 'model.roi_head.mask_roi_extractor': None,
         'default_hooks.checkpoint.save_best': 'coco/bbox_mAP'}
MASK_RCNN = 'configs/mask_rcnn_convnext_tiny_patch4_window7_mstrain_480-800_adamw_3x_coco_in1k.py'
FASTER_RCNN = MASK_RCNN.replace('mask_rcnn', 'faster_rcnn')
CHANNELS = {'model.roi_head.bbox_head.fc_out_channels': 64, 'model.test_cfg.rpn.max_per_img': 60,
            'model.test_cfg.rpn.nms_pre': 100}


def noise(height: int, width: int, count: int = 1) -> torch.Tensor:
    """Images (count, H, W, 3) of smooth noise."""
    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand(count, 3, 6, 8, generator=generator)
    fine = nn.functional.interpolate(coarse, size=(height, width), mode='bicubic').clamp(0, 1)
    return (255 * fine).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def predicted(model: nn.Module, images: torch.Tensor, size: tuple[int, int]) -> list:
    """What a model predicts of images that were resized from ``size``."""
    segments = hasattr(model, 'decode_head')
    if segments:
        from mmseg.structures import SegDataSample as Sample
        model.test_cfg.seg_logits = False
    else:
        from mmdet.structures import DetDataSample as Sample
    init_default_scope('mmseg' if segments else 'mmdet')
    height, width = images.shape[1:3]
    meta = dict(img_shape=(height, width), ori_shape=size,
                scale_factor=(width / size[1], height / size[0]))
    with torch.no_grad():
        return model.test_step(dict(inputs=list(images.permute(0, 3, 1, 2)), data_samples=[
            Sample(metainfo=meta) for _ in images]))


@pytest.mark.parametrize('options', [{}, V2, SLIDE, PAD, {**SLIDE, **PAD}],
                         ids=['whole', 'v2', 'slide', 'padded', 'padded slide'])
@pytest.mark.parametrize('shape', [(160, 128), (101, 203), (64, 200), (70, 80)])
@torch.no_grad()
def test_segmentors(options, shape):
    model = build_model(DEMO_SEGMENTATION, {**SMALL, **options})
    images, size = noise(*shape, count=2), (shape[0] + 9, shape[1] - 5)
    expected = torch.stack([one.pred_sem_seg.data[0] for one in predicted(model, images, size)])
    assert len(expected.unique()) > 2
    for form in FORMS:
        pipeline = build_pipeline(exportable(model, form), channels_last=form.channels_last)
        classes = pipeline(images, torch.tensor(size))
        assert classes.dtype == torch.uint8
        assert classes.shape == (2, *size)
        assert (classes == expected).float().mean() > 0.9999


@pytest.mark.parametrize(('config', 'options'), [
    (DEMO_DETECTION, {}), (DEMO_DETECTION, V2), (DEMO_DETECTION, BOXES), (MASK_RCNN, CHANNELS),
    (FASTER_RCNN, CHANNELS)], ids=['cascade', 'v2', 'boxes', 'mask', 'faster'])
@torch.no_grad()
def test_detectors(config, options):
    model = build_model(config, {**SMALL, **options, 'model.test_cfg.rcnn.score_thr': 0.01})
    spread_scores(model)
    images, size = noise(101, 203, count=2), (120, 190)
    found = dict(zip(('boxes', 'scores', 'labels', 'masks'), build_pipeline(exportable(model))(
        images, torch.tensor(size)), strict=False))
    assert ('masks' in found) == model.with_mask
    for i, sample in enumerate(predicted(model, images, size)):
        expected = sample.pred_instances
        count = int((found['scores'][i] > 0).sum())
        assert count == len(expected.scores) > 3
        assert found['labels'][i, :count].equal(expected.labels)
        assert (found['boxes'][i, :count] - expected.bboxes).abs().max() < 1e-3
        assert (found['scores'][i, :count] - expected.scores).abs().max() < 1e-5
        assert set(found['labels'][i, count:].tolist()) <= {-1}
        if 'masks' in found:
            masks = paste(found['masks'][i, :count], found['boxes'][i, :count], size, 0.5)
            assert (masks == expected.masks).float().mean() > 0.9999


def spread_scores(model: nn.Module) -> None:
    """Let the random heads of a detector give scores and boxes far from each other."""
    generator = torch.Generator().manual_seed(0)
    for name, layer in model.named_modules():
        if name.endswith(('fc_cls', 'rpn_cls')):
            layer.weight.data.normal_(std=0.5, generator=generator)


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('dilation', [1, 2])
@pytest.mark.parametrize('form', FORMS)
@torch.no_grad()
def test_convolutions_at_the_maps_own_sizes(align_corners, dilation, form):
    torch.manual_seed(0)
    module = FusedConvModule(12, 8, 3, padding=dilation, dilation=dilation,
                             norm_cfg=dict(type='BN')).eval()
    module.norm.running_mean.normal_()
    module.norm.running_var.uniform_(0.5, 2)
    maps = [torch.randn(2, channels, *size) for channels, size in (
        (5, (13, 18)), (4, (7, 9)), (2, (2, 1)), (1, (13, 18)))]
    whole = torch.cat([nn.functional.interpolate(
        x, (13, 18), mode='bilinear', align_corners=align_corners) for x in maps], 1)
    ours = PyramidConvolution(module, [5, 4, 2, 1], form)
    assert (ours.of_pyramid(maps, (13, 18), align_corners) - module(whole)).abs().max() < 1e-5
    assert (ours.of_pyramid(maps, (13, 18), align_corners, activate=False)
            - module(whole, activate=False)).abs().max() < 1e-5
    assert (ours(whole) - module(whole)).abs().max() < 1e-5


@torch.no_grad()
def test_bottlenecks_of_upernet_are_at_the_maps_own_sizes():
    model = build_model(DEMO_SEGMENTATION, SMALL)
    head = exportable(model).decode_head
    assert type(head.bottleneck) is type(head.fpn_bottleneck) is PyramidConvolution
    maps = model.extract_feat(torch.randn(2, 3, 96, 160))
    assert (head.forward(maps) - model.decode_head.forward(maps)).abs().max() < 1e-5


@pytest.mark.parametrize('amx', [False, True])
def test_forms_suit_the_runtime(amx, monkeypatch):
    monkeypatch.setattr(rewriting, 'processor_has', lambda *_: amx)
    assert form_of('onnx', False) == form_of('openvino', False) == form_of('aoti', False) == Form()
    assert form_of('onnx', True) == Form(channels_last=True)
    assert form_of('openvino', True) == (Form(full_size=2) if amx else Form())


def test_the_example_has_several_windows():
    pipeline = build_pipeline(build_model(DEMO_SEGMENTATION, {**SMALL, **SLIDE}))
    assert pipeline.example(noise(64, 300)).shape == (2, 161, 300, 3)
    pipeline.slides = False
    assert pipeline.example(noise(64, 300)).shape == (2, 64, 300, 3)


@torch.no_grad()
def test_nothing_detected_leaves_one_empty_entry():
    model = build_model(DEMO_DETECTION, {**SMALL, 'model.test_cfg.rcnn.score_thr': 0.999})
    boxes, scores, labels, masks = build_pipeline(model)(noise(64, 96), torch.tensor([64, 96]))
    assert scores.tolist() == [[0.0]]
    assert labels.tolist() == [[-1]]
    assert boxes.tolist() == [[[0.0] * 4]]
    assert masks.shape[:2] == (1, 1)


@torch.no_grad()
def test_a_fixed_number_of_detections():
    model = build_model(DEMO_DETECTION, SMALL)
    boxes, scores, *_ = build_pipeline(model, fixed=(64, 96))(noise(64, 96))
    assert boxes.shape == (1, 100, 4)
    assert scores.shape == (1, 100)


@pytest.mark.parametrize('use_grn', [False, True])
@torch.no_grad()
def test_blocks_become_convolutions_of_the_same_numbers(use_grn):
    torch.manual_seed(0)
    block = Block(8, layer_scale_init_value=0 if use_grn else 0.5, use_grn=use_grn).eval()
    if use_grn:
        block.grn.gamma.normal_()
        block.grn.beta.normal_()
    x = torch.randn(2, 8, 9, 7)
    new = ConvolutionalBlock(block)
    assert not [layer for layer in new.modules() if isinstance(layer, nn.Linear)]
    assert (new(x) - block(x)).abs().max() < 1e-5


@torch.no_grad()
def test_an_exportable_model_is_a_copy():
    model = nn.Sequential(ConvNeXt(depths=[1, 1], dims=[8, 16], layer_scale_init_value=0.5),
                          nn.AdaptiveAvgPool2d(2))
    before = copy.deepcopy(model.state_dict())
    new = exportable(model)
    assert isinstance(new[1], AdaptivePool)
    assert isinstance(model[1], nn.AdaptiveAvgPool2d)
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    assert all(isinstance(block, Block) for stage in model[0].stages for block in stage)


@pytest.mark.parametrize('size', [1, 2, 3, 6, (2, 5), (None, 3)])
@pytest.mark.parametrize('shape', [(5, 7), (16, 16), (1, 2)])
def test_pooling_is_that_of_pytorch(size, shape):
    x = torch.randn(2, 3, *shape)
    assert (AdaptivePool(size)(x) - nn.AdaptiveAvgPool2d(size)(x)).abs().max() < 1e-6


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize(('length', 'out'), [(4, 16), (7, 5), (1, 6), (9, 9), (5, 1)])
def test_interpolation_is_that_of_pytorch(align_corners, length, out):
    x = torch.randn(1, 1, length, 1)
    ours = interpolation(length, out, align_corners, x) @ x[0, 0]
    theirs = nn.functional.interpolate(x, size=(out, 1), mode='bilinear',
                                       align_corners=align_corners)
    assert (ours - theirs[0, 0]).abs().max() < 1e-5


@pytest.mark.parametrize(('key', 'value'), [
    ('model.test_cfg.rcnn.nms.type', 'soft_nms'), ('model.test_cfg.rpn.nms.type', 'soft_nms')])
def test_what_has_no_pipeline_is_refused(key, value):
    model = build_model(DEMO_DETECTION, {**SMALL, key: value})
    with pytest.raises(UserError, match=r"soft_nms.*expected\s+dict\(type='nms'"):
        build_pipeline(model)
    with pytest.raises(UserError, match='neither an EncoderDecoder'):
        build_pipeline(nn.Linear(1, 1))
