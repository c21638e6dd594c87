"""``fast = dict(...)``: faster, and the same numbers."""
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from convnext_mm import UserError
from convnext_mm.engine import speed
from convnext_mm.engine.checks import read_config
from convnext_mm.engine.fallbacks import adapt_to_device
from tests.helpers import DEMO_DETECTION, DEMO_SEGMENTATION, ROOT, SEGMENTATION


def with_fast(tmp_path, text: str = '') -> Config:
    (tmp_path / 'mine.py').write_text(
        f"_base_ = ['{ROOT}/{SEGMENTATION}', '{ROOT}/configs/_base_/fast.py']\n{text}")
    return read_config(str(tmp_path / 'mine.py'))


def test_the_fragment_is_spread(tmp_path):
    plain = Config.fromfile(SEGMENTATION)
    cfg = with_fast(tmp_path)
    assert cfg.optim_wrapper.to_dict() == dict(
        plain.optim_wrapper.to_dict(), type='AmpOptimWrapper', dtype='bfloat16',
        loss_scale=dict(enabled=False),
        optimizer=dict(plain.optim_wrapper.optimizer.to_dict(), fused=True))
    assert cfg.custom_hooks[:-1] == plain.custom_hooks
    assert cfg.custom_hooks[-1].to_dict() == dict(
        type='SpeedHook', channels_last=True, compile=[], dynamic=False, cuda_graphs=False)
    speed.apply_fast(cfg)
    assert len(cfg.custom_hooks) == len(plain.custom_hooks) + 1, 'once'
    # As the toolboxes' own scripts read it.
    assert Config.fromfile(tmp_path / 'mine.py').optim_wrapper == cfg.optim_wrapper


def test_a_key_alone():
    cfg = read_config(SEGMENTATION, {'fast.fused_optimizer': True})
    assert cfg.optim_wrapper.optimizer.fused
    assert 'dtype' not in cfg.optim_wrapper
    assert not cfg.custom_hooks[-1].channels_last


@pytest.mark.parametrize(('text', 'message'), [
    ('fast = dict(chanels_last=True)', 'fast.chanels_last is unknown. Did you mean channels_l'),
    ('fast = dict(zzz=True)', 'fast.zzz is unknown. Its keys: channels_last, fused_optimizer'),
    ('fast = dict(cuda_graphs=True)', 'fast.cuda_graphs captures what fast.compile names'),
    ("fast = dict(cuda_graphs=True, compile=['backbone'], dynamic=True)", 'pictures of one size')])
def test_wrong_keys_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        with_fast(tmp_path, text)


def built(config: str, seed: int = 0) -> nn.Module:
    cfg = read_config(config, {'model.backbone.init_cfg': None})
    adapt_to_device(cfg)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(seed)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model.eval()


def predicted(model: nn.Module, scope: str):
    generator = torch.Generator().manual_seed(0)
    picture = torch.randint(0, 255, (3, 96, 128), generator=generator, dtype=torch.uint8)
    shape = dict(img_shape=(96, 128), ori_shape=(96, 128), pad_shape=(96, 128),
                 batch_input_shape=(96, 128), scale_factor=(1.0, 1.0))
    if scope == 'mmseg':
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmdet.structures import DetDataSample as Sample
    with torch.no_grad():
        return model.test_step(dict(inputs=[picture], data_samples=[Sample(metainfo=shape)]))[0]


def test_segmentation_is_the_same_in_channels_last():
    model = built(DEMO_SEGMENTATION)
    before = predicted(model, 'mmseg')
    speed.use_channels_last(model)
    seen = []
    model.decode_head.fpn_bottleneck.conv.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].is_contiguous(
            memory_format=torch.channels_last)))
    after = predicted(model, 'mmseg')
    assert seen == [True]
    assert torch.allclose(before.seg_logits.data, after.seg_logits.data, atol=1e-4)


def test_detection_is_the_same_in_channels_last():
    """RoIAlign reads memory as contiguous: without care it computes nonsense here."""
    model = built(DEMO_DETECTION)
    before = predicted(model, 'mmdet').pred_instances
    speed.use_channels_last(model)
    after = predicted(model, 'mmdet').pred_instances
    assert len(before) > 0
    assert torch.allclose(before.scores, after.scores, atol=1e-4)
    assert torch.allclose(before.bboxes, after.bboxes, atol=0.1)

    for cutter in model.modules():
        if hasattr(cutter, 'roi_layers'):
            cutter._forward_pre_hooks.clear()
    model.backbone.contiguous_outputs = False
    without = predicted(model, 'mmdet').pred_instances
    assert len(without) != len(before) or not torch.allclose(without.scores, before.scores,
                                                             atol=1e-4), 'care was needed'


@pytest.mark.parametrize(('config', 'scope', 'parts', 'times'), [
    (DEMO_SEGMENTATION, 'mmseg', ['backbone', 'decode_head'], 2),
    (DEMO_DETECTION, 'mmdet', ['neck', 'rpn_head', 'roi_head.bbox_head'], 5)])
def test_what_is_compiled_is_what_runs(config, scope, parts, times, monkeypatch):
    """mmseg's heads call forward themselves, so that compiling the module would do nothing."""
    model = built(config)
    names = list(model.state_dict())
    ran = []

    def compiler(forward, **options):
        def compiled(*args, **kwargs):
            ran.append(forward.__self__)
            return forward(*args, **kwargs)
        return compiled
    monkeypatch.setattr(torch, 'compile', compiler)
    speed.SpeedHook(compile=parts).before_train(SimpleNamespace(model=model))
    predicted(model, scope)
    assert len(set(ran)) == times
    assert list(model.state_dict()) == names


def test_a_compiled_head_computes_the_same():
    model = built(DEMO_SEGMENTATION)
    before = predicted(model, 'mmseg')
    torch._dynamo.reset()
    speed.compile_parts(model, ['decode_head'])
    after = predicted(model, 'mmseg')
    assert torch.allclose(before.seg_logits.data, after.seg_logits.data, atol=1e-4)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] > 0


def test_a_part_that_there_is_not_is_named():
    model = built(DEMO_SEGMENTATION)
    with pytest.raises(UserError, match="the model has no 'neck'; its parts: data_preprocessor, b"):
        speed.SpeedHook(compile=['neck']).before_train(SimpleNamespace(model=model))
