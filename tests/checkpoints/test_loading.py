"""A checkpoint is loaded completely, or nothing is loaded and a message lists what differs."""

import pytest
import torch
from mmengine.runner import load_checkpoint
from torch import nn

from convnext_mm import ConvNeXt, UserError
from convnext_mm.checkpoints import check_complete, hook, load_backbone, load_model, loading
from convnext_mm.checkpoints.hook import FitCheckpointHook
from convnext_mm.checkpoints.loading import (
    fit_backbone_weights,
    fit_model_weights,
)
from tests.helpers import GOLDEN_SIZE, assert_close, golden, load_golden, official


class Segmentor(nn.Module):
    """A whole model: our backbone and a head."""

    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.backbone = ConvNeXt(**GOLDEN_SIZE, **kwargs)
        self.decode_head = nn.Conv2d(32, 2, 1)


def whole_model(content: dict) -> dict:
    state = {f'backbone.{name}': value for name, value in content['model'].items()}
    return dict(state_dict={**state, 'decode_head.weight': torch.zeros(2)}, meta=dict(epoch=1))


def test_the_backbone_of_a_whole_model_is_loaded(tmp_path):
    content = golden('v1_official_downstream')
    torch.save(whole_model(content['checkpoint']), tmp_path / 'whole.pth')
    with torch.no_grad():
        assert_close(load_golden(tmp_path / 'whole.pth')(content['input']), content['features'])


@pytest.mark.parametrize(('damage', 'message'), [
    (lambda s: s.pop('stages.2.1.pwconv1.weight'), 'missing stages.2.1.pwconv1.weight'),
    (lambda s: s.update({'stages.9.weight': torch.zeros(1)}), 'unexpected stages.9.weight'),
    (lambda s: s.update({'fpn.weight': torch.zeros(1)}), 'unexpected fpn.weight'),
    (lambda s: s.pop('norm2.bias'), 'missing norm2.bias'),
    (lambda s: s.update({'stages.0.0.gamma': torch.zeros(9)}),
     r'stages.0.0.gamma is \[9\], the model has \[8\]')])
def test_mismatches_are_listed_and_nothing_is_loaded(damage, message, tmp_path):
    state = official('v1_official_downstream')
    damage(state)
    torch.save(dict(model=state), tmp_path / 'damaged.pth')
    backbone = ConvNeXt(**GOLDEN_SIZE)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(UserError, match=f'damaged.pth .*\n(.*\n)*.*{message}'):
        load_backbone(backbone, dict(type='Pretrained', checkpoint=str(tmp_path / 'damaged.pth')))
    with pytest.raises(UserError, match=message):
        load_checkpoint(backbone, str(tmp_path / 'damaged.pth'))
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize('name', ['v1_timm', 'v1_mmpretrain', 'v1_transformers'])
def test_a_missing_parameter_is_found_with_every_naming(name):
    state = golden(name)['checkpoint']
    state = state.get('state_dict', state)
    del state[next(key for key in state if 'stages' in key and '1.' in key and 'bias' in key)]
    with pytest.raises(UserError, match='1 parameters.*\n  missing'):
        fit_backbone_weights(state, ConvNeXt(**GOLDEN_SIZE), 'it')


@pytest.mark.parametrize(('kwargs', 'hint'), [
    (dict(arch='tiny'), r"of depths=\[1, 2, 3, 1\].*the backbone is of arch='tiny'"),
    (dict(GOLDEN_SIZE, use_grn=True), r'the backbone is of depths=.*V2 \(GRN\)'),
    (dict(depths=[1, 2, 3], dims=[8, 16, 24]), 'unexpected stages.3.0')])
def test_a_different_size_is_reported(kwargs, hint):
    with pytest.raises(UserError, match=f'(?s){hint}'):
        fit_backbone_weights(official(), ConvNeXt(**kwargs), 'it')


def test_layer_scale_that_the_model_does_not_have():
    with pytest.raises(UserError, match='unexpected stages.0.0.gamma'):
        fit_backbone_weights(official(), ConvNeXt(**GOLDEN_SIZE, layer_scale_init_value=0), 'it')


def test_a_checkpoint_without_convnext_is_reported():
    with pytest.raises(UserError, match='it contains no ConvNeXt: its names begin with layer1.0'):
        fit_backbone_weights({'layer1.0.conv1.weight': torch.zeros(1)}, ConvNeXt(**GOLDEN_SIZE),
                             'it')


def test_several_convnexts_need_a_prefix():
    state = {f'{part}.backbone.{name}': value + i for i, part in enumerate(('teacher', 'student'))
             for name, value in official().items()}
    backbone = ConvNeXt(**GOLDEN_SIZE)
    with pytest.raises(UserError, match='contains 2 ConvNeXts.*student.backbone.*prefix='):
        fit_backbone_weights(state, backbone, 'it')
    with pytest.raises(UserError, match="no ConvNeXt with the prefix 'ema.'"):
        fit_backbone_weights(state, backbone, 'it', 'ema')
    fitted = fit_backbone_weights(state, backbone, 'it', 'student').state
    name = 'stages.0.0.gamma'
    assert torch.equal(fitted[name], official()[name] + 1)


def test_unused_stages_and_norms_are_ignored():
    fitted = fit_backbone_weights(official('v1_official_downstream'),
                                  ConvNeXt(**GOLDEN_SIZE, out_indices=[1]), 'it')
    assert {name.split('.')[0] for name in fitted.ignored} == {
        'norm0', 'norm2', 'norm3', 'stages', 'downsample_layers'}
    assert not fitted.random


def test_one_log_line_describes_what_was_loaded(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(loading, 'print_log', lambda line, logger: lines.append(line))
    torch.save(golden('v1_timm')['checkpoint'], tmp_path / 'timm.pth')
    load_golden(tmp_path / 'timm.pth', in_chans=1)
    assert lines == [
        f'ConvNeXt: loaded from {tmp_path}/timm.pth: 79 tensors (timm); ignored: norm (2), head '
        '(2); randomly initialized: norm0 (2), norm1 (2), norm2 (2), norm3 (2); stem: kernels of 3 '
        'channels summed for in_chans=1']


def test_the_stem_for_one_channel_treats_gray_as_rgb(tmp_path):
    content = golden('v1_official_classification')
    torch.save(content['checkpoint'], tmp_path / 'file.pth')
    gray = content['input'][:, :1]
    with torch.no_grad():
        assert_close(load_golden(tmp_path / 'file.pth', in_chans=1)(gray),
                     load_golden(tmp_path / 'file.pth')(gray.expand(-1, 3, -1, -1)))


def test_the_stem_for_more_channels_repeats_and_scales(tmp_path):
    content = golden('v1_official_classification')
    torch.save(content['checkpoint'], tmp_path / 'file.pth')
    kernels = content['checkpoint']['model']['downsample_layers.0.0.weight']
    stem = load_golden(tmp_path / 'file.pth', in_chans=5).downsample_layers[0][0].weight
    for channel in range(5):
        torch.testing.assert_close(stem[:, channel], kernels[:, channel % 3] * 3 / 5)
    six = load_golden(tmp_path / 'file.pth', in_chans=6)
    with torch.no_grad():  # an image repeated twice is the image
        assert_close(six(content['input'].repeat(1, 2, 1, 1)), content['features'])


def test_a_subclass_may_add_modules(tmp_path):
    class Extended(ConvNeXt):
        def __init__(self, **kwargs) -> None:
            super().__init__(**kwargs)
            self.adapter = nn.Linear(8, 8)

    torch.save(golden('v1_timm')['checkpoint'], tmp_path / 'timm.pth')
    Extended(**GOLDEN_SIZE, init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'timm.pth'))).init_weights()
    fitted = fit_backbone_weights(golden('v1_timm')['checkpoint'], Extended(**GOLDEN_SIZE), 'it')
    assert [name for name in fitted.random if 'norm' not in name] == [
        'adapter.weight', 'adapter.bias']


@pytest.mark.parametrize('name', ['v1_mmpretrain', 'v1_timm'])
def test_mmengines_load_checkpoint_accepts_every_naming(name, tmp_path):
    """init_model and init_detector of the toolboxes call load_checkpoint."""
    content = golden(name)
    torch.save(content['checkpoint'], tmp_path / 'file.pth')
    backbone = ConvNeXt(**GOLDEN_SIZE).eval()
    load_checkpoint(backbone, str(tmp_path / 'file.pth'))
    with torch.no_grad():
        assert_close(backbone(content['input']), content['features'])


def test_whole_models_of_openmmlab_load_with_torch_and_mmengine(tmp_path):
    content = golden('v1_mmpretrain')
    model = Segmentor()
    state = {k: v for k, v in content['checkpoint']['state_dict'].items() if 'head' not in k}
    state.update({f'decode_head.{k}': v + 1 for k, v in model.decode_head.state_dict().items()})
    torch.save(dict(state_dict=state), tmp_path / 'whole.pth')
    check_complete(model, str(tmp_path / 'whole.pth'))
    for load in (lambda m: m.load_state_dict(state, strict=True),
                 lambda m: load_checkpoint(m, str(tmp_path / 'whole.pth'), strict=True)):
        model = Segmentor().eval()
        load(model)
        with torch.no_grad():
            assert_close(model.backbone(content['input']), content['features'])
        assert torch.equal(model.decode_head.bias, state['decode_head.bias'])


def test_backbone_weights_are_not_a_whole_model(tmp_path):
    path = str(tmp_path / 'file.pth')
    torch.save(golden('v1_official_classification')['checkpoint'], path)
    with pytest.raises(UserError, match='missing decode_head.weight'):
        check_complete(Segmentor(), path)


class Runner:
    """The attributes of mmengine's Runner that the hook reads."""

    def __init__(self, model, resume=False) -> None:
        self.model, self._resume, self._load_from = model, resume, 'file.pth'


@pytest.mark.parametrize('name', ['v1_official_classification', 'v1_timm', 'v1_mmpretrain'])
def test_load_from_accepts_backbone_weights(name):
    content = golden(name)
    model, checkpoint = Segmentor(), dict(content['checkpoint'])
    head = model.decode_head.weight.clone()
    FitCheckpointHook().after_load_checkpoint(Runner(model), checkpoint)
    model.load_state_dict(checkpoint['state_dict'], strict=False)
    with torch.no_grad():
        assert_close(model.eval().backbone(content['input']), content['features'])
    assert torch.equal(model.decode_head.weight, head)


@pytest.mark.parametrize('wrap', [
    lambda s: dict(state_dict={f'model.{k}': v for k, v in s.items()}),
    lambda s: dict(model_state_dict={f'_orig_mod.module.{k}': v for k, v in s.items()}, epoch=3),
    lambda s: dict(net=dict(state_dict={f'net.model._orig_mod.{k}': v for k, v in s.items()})),
    lambda s: dict(teacher={f'module.{k}': v for k, v in s.items()},
                   student={f'module.{k}': v + 1 for k, v in s.items()}),
    lambda s: dict(ema={k.replace('backbone.', 'backbone.module._orig_mod.'): v
                        for k, v in s.items()}),
    lambda s: {**{f'model.{k}': v for k, v in s.items()},
               **{f'model_ema.module.{k}': v + 1 for k, v in s.items()}}],
    ids=['Lightning', 'compile', 'nested', 'teacher', 'backbone', 'beside an average'])
@pytest.mark.parametrize('name', ['v1_official_downstream', 'v1_mmpretrain'])
def test_whole_models_keep_their_heads_whatever_wraps_them(wrap, name, tmp_path):
    content, trained = golden(name), Segmentor()
    inner = content['checkpoint'].get('model') or {
        k.removeprefix('backbone.'): v for k, v in content['checkpoint']['state_dict'].items()
        if 'head' not in k}
    state = {**{f'backbone.{k}': v for k, v in inner.items()},
             **{f'decode_head.{k}': v for k, v in trained.decode_head.state_dict().items()}}
    torch.save(wrap(state), tmp_path / 'file.pth')
    model = Segmentor().eval()
    load_model(model, str(tmp_path / 'file.pth'))
    assert torch.equal(model.decode_head.weight, trained.decode_head.weight)
    model, checkpoint = Segmentor().eval(), wrap(state)
    FitCheckpointHook().after_load_checkpoint(Runner(model), checkpoint)
    model.load_state_dict(checkpoint['state_dict'], strict=True)
    assert torch.equal(model.decode_head.weight, trained.decode_head.weight)
    with torch.no_grad():
        assert_close(model.backbone(content['input']), content['features'])
    backbone = ConvNeXt(**GOLDEN_SIZE)
    load_backbone(backbone, dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth')))
    assert torch.equal(backbone.norm0.weight, model.backbone.norm0.weight)


def test_a_prefix_may_begin_with_the_key_of_a_model(tmp_path):
    torch.save(dict(teacher=official(), student={k: v + 1 for k, v in official().items()}),
               tmp_path / 'file.pth')
    gamma = official()['stages.0.0.gamma']
    for prefix, expected in ((None, gamma), ('student', gamma + 1)):
        backbone = ConvNeXt(**GOLDEN_SIZE)
        load_backbone(backbone, dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth'),
                                     prefix=prefix))
        assert torch.equal(backbone.stages[0][0].gamma, expected)


def test_load_from_says_for_every_part_what_it_gets(monkeypatch):
    lines = []
    monkeypatch.setattr(hook, 'print_log', lambda line, logger: lines.append(line))
    model = Segmentor()
    model.neck = nn.Conv2d(1, 1, 1)
    state = {f'backbone.{k}': v for k, v in ConvNeXt(**GOLDEN_SIZE).state_dict().items()}
    state |= {'decode_head.weight': torch.zeros(5, 32, 1, 1), 'decode_head.bias': torch.ones(2),
              'auxiliary_head.weight': torch.zeros(1)}
    checkpoint = dict(state_dict=state)
    FitCheckpointHook().after_load_checkpoint(Runner(model), checkpoint)
    assert lines == ["""Weights of file.pth:
  backbone: loaded
  decode_head: 1 of 2 tensors loaded, fresh: weight ([5, 32, 1, 1] in the file, [2, 32, 1, 1] in \
the model)
  neck: fresh, not in the file
  dropped, the model has no place for it: auxiliary_head (1)"""]
    assert 'decode_head.bias' in checkpoint['state_dict']
    assert not {'decode_head.weight', 'auxiliary_head.weight'} & checkpoint['state_dict'].keys()


def timm_variant(change) -> dict:
    return change({**golden('v1_timm')['checkpoint']})


@pytest.mark.parametrize(('change', 'message'), [
    (lambda s: {**s, 'stem.0.weight': torch.zeros(8, 3, 3, 3), 'stem.1.weight':
                torch.zeros(8, 8, 3, 3), 'stem.2.weight': torch.zeros(8)}, 'overlapping.*_ols'),
    (lambda s: {k: v for k, v in s.items() if not k.endswith('norm.bias')}, 'without mean.*_rms')])
def test_variants_that_are_not_built_are_named(change, message):
    with pytest.raises(UserError, match=f'is a variant of ConvNeXt that is not built.*{message}'):
        fit_backbone_weights(timm_variant(change), ConvNeXt(**GOLDEN_SIZE), 'it')


def test_zepto_is_named():
    from convnext_mm.checkpoints.naming import from_official
    zepto = ConvNeXt(depths=[2, 2, 4, 2], dims=[32, 64, 128, 256]).state_dict()
    state = from_official({k: v for k, v in zepto.items() if not k.endswith('norm.bias')},
                          'timm', '')[0]
    with pytest.raises(UserError, match='the size zepto, norms without'):
        fit_backbone_weights(state, ConvNeXt('tiny'), 'it')


def test_upernet_of_transformers_as_a_whole_model(tmp_path):
    """Its logits, with norms and weights that have an effect."""
    from mmengine.registry import MODELS, init_default_scope
    from safetensors.torch import save_file
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation
    init_default_scope('mmseg')
    torch.manual_seed(0)
    names = ['stage1', 'stage2', 'stage3', 'stage4']
    theirs = UperNetForSemanticSegmentation(UperNetConfig(
        backbone_config=ConvNextConfig(depths=GOLDEN_SIZE['depths'], out_features=names,
                                       hidden_sizes=GOLDEN_SIZE['dims'],
                                       layer_scale_init_value=0.5),
        hidden_size=16, num_labels=5, auxiliary_in_channels=24, auxiliary_channels=8)).eval()
    for name, value in theirs.state_dict().items():
        if name.endswith('running_var'):
            value.uniform_(0.5, 2)
        elif 'norm' in name and value.is_floating_point():
            value.normal_(1, 0.3)
        elif 'head' in name and value.is_floating_point():
            value.normal_(0, 0.1)
    save_file(theirs.state_dict(), tmp_path / 'model.safetensors')
    head = dict(num_classes=5, norm_cfg=dict(type='BN'), align_corners=False)
    ours = MODELS.build(dict(
        type='EncoderDecoder', backbone=dict(type='ConvNeXt', **GOLDEN_SIZE),
        decode_head=dict(type='UPerHead', in_channels=GOLDEN_SIZE['dims'], channels=16,
                         in_index=[0, 1, 2, 3], **head),
        auxiliary_head=dict(type='FCNHead', in_channels=24, in_index=2, channels=8, num_convs=1,
                            concat_input=False, **head))).eval()
    load_model(ours, str(tmp_path / 'model.safetensors'))
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = theirs(image).logits
        logits = ours.encode_decode(image, [dict(img_shape=(64, 96))])
        features = ours.backbone(image)
        aux = nn.functional.interpolate(ours.auxiliary_head(features), (64, 96), mode='bilinear')
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        theirs_aux = theirs.auxiliary_head([*features])
    torch.testing.assert_close(aux, nn.functional.interpolate(
        theirs_aux, (64, 96), mode='bilinear'), rtol=1e-4, atol=1e-4)


def test_resuming_requires_the_whole_model():
    checkpoint = dict(state_dict={f'backbone.{k}': v for k, v in official().items()})
    with pytest.raises(UserError, match='missing decode_head.weight'):
        FitCheckpointHook().after_load_checkpoint(Runner(Segmentor(), resume=True), checkpoint)


def test_several_convnexts_of_a_whole_model_are_all_loaded(tmp_path):
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(nn.ModuleDict(dict(teacher=Segmentor(), student=Segmentor())))
    torch.save(dict(state_dict=models[0].state_dict()), tmp_path / 'file.pth')
    load_model(models[1], str(tmp_path / 'file.pth'))
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def test_models_without_our_convnext_are_unchanged():
    state = golden('v1_mmpretrain')['checkpoint']['state_dict']
    assert fit_model_weights(dict(state_dict=state), nn.Linear(1, 1), 'it') == (state, '')


@pytest.mark.parametrize('kept', [(), ('decode_head.',), ('backbone.stages.1.',)])
def test_parts_without_strict_return_what_is_missing(kept):
    """As PyTorch promises; the strictness of init_cfg and of the tools is their own."""
    model = nn.ModuleDict(dict(
        backbone=ConvNeXt(depths=[1, 1, 1, 1], dims=[8, 16, 24, 32]),
        decode_head=nn.Linear(2, 2)))
    state = {name: torch.ones_like(value) for name, value in model.state_dict().items()
             if name.startswith(kept or 'nothing')}
    result = model.load_state_dict(state, strict=False)
    assert sorted(result.missing_keys) == sorted(model.state_dict().keys() - state.keys())
    assert result.unexpected_keys == []
    assert all((model.state_dict()[name] == 1).all() for name in state)
    with pytest.raises((UserError, RuntimeError)):
        model.load_state_dict(state)
