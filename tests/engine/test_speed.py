"""``fast = dict(...)``: its keys take effect, and results stay the same."""
from types import SimpleNamespace

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from convnext_mm import UserError
from convnext_mm.engine import speed
from convnext_mm.engine.checks import read_config
from convnext_mm.engine.fallbacks import adapt_to_device
from convnext_mm.fused import FusedBlock
from tests.helpers import (
    DEMO_DETECTION,
    DEMO_SEGMENTATION,
    ROOT,
    SEGMENTATION,
    build_model,
    operators_are_compiled,
    predict,
)

STOCK_EXTRACTORS = {f'model.roi_head.{part}_roi_extractor.type': 'SingleRoIExtractor'
                    for part in ('bbox', 'mask')}


def read_fast_config(tmp_path, text: str = '') -> Config:
    """The segmentation recipe with the fragment fast.py and more settings."""
    (tmp_path / 'mine.py').write_text(
        f"_base_ = ['{ROOT}/{SEGMENTATION}', '{ROOT}/configs/_base_/fast.py']\n{text}")
    return read_config(str(tmp_path / 'mine.py'))


def test_the_fragment_is_applied(tmp_path):
    plain = Config.fromfile(SEGMENTATION)
    cfg = read_fast_config(tmp_path)
    assert cfg.optim_wrapper.to_dict() == dict(
        plain.optim_wrapper.to_dict(), type='AmpOptimWrapper', dtype='bfloat16',
        loss_scale=dict(enabled=False),
        optimizer=dict(plain.optim_wrapper.optimizer.to_dict(), fused=True))
    assert cfg.custom_hooks[:-1] == plain.custom_hooks
    assert cfg.custom_hooks[-1].to_dict() == dict(
        type='SpeedHook', channels_last=True, compile=[], dynamic=False, cuda_graphs=False)
    speed.apply_fast(cfg)
    assert len(cfg.custom_hooks) == len(plain.custom_hooks) + 1, 'added only once'
    # The scripts of the toolboxes read configs without this package's read_config.
    assert Config.fromfile(tmp_path / 'mine.py').optim_wrapper == cfg.optim_wrapper


def test_a_single_key_leaves_the_others_off():
    cfg = read_config(SEGMENTATION, {'fast.fused_optimizer': True})
    assert cfg.optim_wrapper.optimizer.fused
    assert 'dtype' not in cfg.optim_wrapper
    assert not cfg.custom_hooks[-1].channels_last


@pytest.mark.parametrize('config', [DEMO_SEGMENTATION, DEMO_DETECTION])
@pytest.mark.parametrize(('options', 'expected'), [
    ({}, False), ({'fast.channels_last': True}, False), ({'fast.triton': False}, False),
    ({'fast.triton': True}, True)])
def test_triton_kernels_are_used_only_on_request(config, options, expected):
    """They have not run on a GPU yet."""
    cfg = read_config(config, options)
    assert cfg.model.backbone.get('triton', False) is expected
    adapt_to_device(cfg)
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        backbone = MODELS.build(cfg.model.backbone)
    blocks = [block for block in backbone.modules() if isinstance(block, FusedBlock)]
    assert [block.triton for block in blocks] == [expected] * sum(cfg.model.backbone.depths)


def test_triton_reaches_every_backbone_of_a_wrapped_model():
    model = dict(type='Wrapper', teacher=dict(backbone=dict(type='ConvNeXt')),
                 students=[dict(backbone=dict(type='ConvNeXt')), dict(backbone=dict(type='Other'))])
    cfg = Config(dict(model=model, fast=dict(triton=True)))
    speed.apply_fast(cfg)
    assert cfg.model.teacher.backbone.triton is True
    assert cfg.model.students[0].backbone.triton is True
    assert 'triton' not in cfg.model.students[1].backbone


@pytest.mark.parametrize(('text', 'message'), [
    ('fast = dict(chanels_last=True)', 'fast.chanels_last is unknown. Did you mean channels_l'),
    ('fast = -1', 'fast=-1 must be a dict'),
    ('fast = dict(zzz=True)', 'fast.zzz is unknown. Its keys: channels_last, fused_optimizer'),
    ('fast = dict(cuda_graphs=True)', 'fast.cuda_graphs needs fast.compile'),
    ("fast = dict(cuda_graphs=True, compile=['backbone'], dynamic=True)", 'images of one size')])
def test_wrong_keys_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_fast_config(tmp_path, text)


def test_segmentation_is_the_same_in_channels_last():
    model = build_model(DEMO_SEGMENTATION)
    before = predict(model, 'mmseg')
    speed.use_channels_last(model)
    is_channels_last = []
    model.decode_head.fpn_bottleneck.conv.register_forward_pre_hook(
        lambda module, args: is_channels_last.append(args[0].is_contiguous(
            memory_format=torch.channels_last)))
    after = predict(model, 'mmseg')
    assert is_channels_last == [True]
    assert torch.allclose(before.seg_logits.data, after.seg_logits.data, atol=1e-4)


@pytest.mark.parametrize(('config', 'scope'), [
    (DEMO_SEGMENTATION, 'mmseg'), (DEMO_DETECTION, 'mmdet')])
def test_packed_inference_is_the_same(config, scope):
    model = build_model(config)
    names = list(model.state_dict())
    before = predict(model, scope)
    speed.enable_packed_inference(model)
    after = predict(model, scope)
    packed = [m for m in model.modules() if getattr(m, '_packed', None) is not None]
    assert any(isinstance(m, ConvModule) for m in packed)
    assert list(model.state_dict()) == names
    if scope == 'mmseg':
        assert torch.allclose(before.seg_logits.data, after.seg_logits.data, atol=1e-4)
    else:
        before, after = before.pred_instances, after.pred_instances
        assert len(before) > 0
        assert torch.allclose(before.scores, after.scores, atol=1e-4)
        assert torch.allclose(before.bboxes, after.bboxes, atol=1e-2)


def test_detection_is_the_same_in_channels_last():
    """RoIAlign reads memory as contiguous, so that other layouts give wrong results."""
    model = build_model(DEMO_DETECTION, STOCK_EXTRACTORS)
    before = predict(model, 'mmdet').pred_instances
    speed.use_channels_last(model)
    after = predict(model, 'mmdet').pred_instances
    assert len(before) > 0
    assert torch.allclose(before.scores, after.scores, atol=1e-4)
    assert torch.allclose(before.bboxes, after.bboxes, atol=0.1)

    if not operators_are_compiled():
        return  # only the compiled RoIAlign needs contiguous maps
    for module in model.modules():
        if hasattr(module, 'roi_layers'):
            module._forward_pre_hooks.clear()
    model.backbone.contiguous_outputs = False
    wrong = predict(model, 'mmdet').pred_instances
    assert len(wrong) != len(before) or not torch.allclose(wrong.scores, before.scores,
                                                           atol=1e-4), 'the hooks are needed'


@pytest.mark.parametrize(('config', 'scope', 'parts', 'times'), [
    (DEMO_SEGMENTATION, 'mmseg', ['backbone', 'decode_head'], 2),
    (DEMO_DETECTION, 'mmdet', ['neck', 'rpn_head', 'roi_head.bbox_head'], 5)])
def test_compiled_parts_are_used(config, scope, parts, times, monkeypatch):
    """mmseg's heads call forward directly, so that compiling the module would have no effect."""
    model = build_model(config)
    names = list(model.state_dict())
    ran = []

    def fake_compile(forward, **options):
        def compiled(*args, **kwargs):
            ran.append(forward.__self__)
            return forward(*args, **kwargs)
        return compiled
    monkeypatch.setattr(torch, 'compile', fake_compile)
    speed.SpeedHook(compile=parts).before_train(SimpleNamespace(model=model))
    predict(model, scope)
    assert len(set(ran)) == times
    assert list(model.state_dict()) == names


@pytest.mark.slow
def test_a_compiled_head_gives_the_same_result():
    model = build_model(DEMO_SEGMENTATION)
    before = predict(model, 'mmseg')
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    speed.compile_parts(model, ['decode_head'])
    after = predict(model, 'mmseg')
    assert torch.allclose(before.seg_logits.data, after.seg_logits.data, atol=1e-4)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0


def test_an_unknown_part_is_named():
    model = build_model(DEMO_SEGMENTATION)
    with pytest.raises(UserError, match="the model has no 'neck'; its parts: data_preprocessor, b"):
        speed.SpeedHook(compile=['neck']).before_train(SimpleNamespace(model=model))
