"""A checkpoint is loaded completely, or nothing is loaded and a message lists what differs."""

import pytest
import torch
from mmengine.runner import load_checkpoint
from torch import nn

from convnext_mm import ConvNeXt, UserError
from convnext_mm.checkpoints import check_complete, load_backbone, load_model, loading
from convnext_mm.checkpoints.loading import (
    FitCheckpointHook,
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
    with pytest.raises(UserError, match="contain nothing for the ConvNeXt at 'backbone'"):
        load_checkpoint(Segmentor(), path)
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
