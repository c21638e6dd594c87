import json

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from convnext_mm import ConvNeXt, UserError, layer_decay
from convnext_mm.layer_decay import LearningRateDecayOptimizerConstructor
from tests.conftest import DATA, DETECTION, SEGMENTATION, build_without_memory


def groups_of(model: nn.Module, wrapper_cfg: dict) -> dict[str, tuple[float, float, float]]:
    groups = build_optim_wrapper(model, wrapper_cfg).optimizer.param_groups
    return {name: (g['lr_scale'], g['lr'], g['weight_decay'])
            for g in groups for name in g['param_names']}


@pytest.mark.parametrize(('config', 'scope', 'golden'), [
    (SEGMENTATION, 'mmseg', 'upernet_tiny'), (DETECTION, 'mmdet', 'cascade_tiny'),
    (SEGMENTATION.replace('tiny', 'base'), 'mmseg', 'upernet_base'),
    (DETECTION.replace('tiny', 'base'), 'mmdet', 'cascade_base')])
def test_every_parameter_of_the_recipes_as_the_authors_group_it(config, scope, golden):
    cfg, model = build_without_memory(config, scope)
    ours = groups_of(model, cfg.optim_wrapper)
    theirs = json.loads((DATA / f'{golden}.json').read_text())
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=1e-9, abs=0), name


@pytest.mark.parametrize('scope', ['mmengine', 'mmseg', 'mmdet'])
def test_plain_name_is_ours_in_every_scope(scope):
    built = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(
        type='LearningRateDecayOptimizerConstructor', _scope_=scope,
        optim_wrapper_cfg=dict(optimizer={}), paramwise_cfg=dict(decay_rate=0.9, num_layers=6)))
    assert type(built) is LearningRateDecayOptimizerConstructor


class Vit(nn.Module):
    """A backbone with the parameter names of BEiT and MAE."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.patch_embed = nn.Conv2d(3, 4, 2)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(12))
        self.norm = nn.LayerNorm(4)


class BEiT(Vit):
    pass


class MAE(Vit):
    pass


class Swin(Vit):
    pass


class Model(nn.Module):
    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.decode_head = nn.Conv2d(4, 2, 1)


@pytest.mark.parametrize('backbone', [BEiT, MAE])
@pytest.mark.parametrize('decay_type', ['layer_wise', 'layer_wise_vit'])
def test_other_backbones_as_in_mmseg(backbone, decay_type):
    from mmseg.engine.optimizers.layer_decay_optimizer_constructor import (
        LearningRateDecayOptimizerConstructor as Theirs,
    )
    model = Model(backbone())
    model.backbone.layers[0].requires_grad_(False)
    wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
    paramwise = dict(num_layers=12, decay_rate=0.65, decay_type=decay_type)
    groups = []
    for constructor in (LearningRateDecayOptimizerConstructor, Theirs):
        built = constructor(dict(wrapper, optimizer=dict(wrapper['optimizer'])), dict(paramwise))
        groups.append({g['group_name']: (sorted(g['param_names']), g['lr'], g['weight_decay'])
                       for g in built(model).optimizer.param_groups})
    assert groups[0] == groups[1]
    assert len(groups[0]) > 20


@pytest.mark.parametrize(('name', 'layer', 'stage'), [
    ('backbone.downsample_layers.0.0.weight', 0, 0), ('backbone.downsample_layers.3.1.bias', 12, 0),
    ('backbone.stages.0.2.gamma', 1, 1), ('backbone.stages.2.26.norm.weight', 11, 3),
    ('backbone.stages.3.0.dwconv.weight', 12, 4), ('backbone.norm3.weight', 13, 13),
    ('decode_head.conv_seg.weight', 13, 13)])
def test_depth_from_name(name, layer, stage):
    assert layer_decay.convnext_layer_id(name, 12) == layer
    assert layer_decay.convnext_stage_id(name, 12) == stage


def test_v2_decays_no_grn_and_a_fifth_stage_counts_as_the_fourth():
    backbone = ConvNeXt(depths=[1] * 5, dims=[8] * 5, use_grn=True)
    wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05))
    built = LearningRateDecayOptimizerConstructor(wrapper, dict(num_layers=6, decay_rate=0.9))
    decay = {name: (g['weight_decay'], g['lr_scale'])
             for g in built(Model(backbone)).optimizer.param_groups for name in g['param_names']}
    assert decay['backbone.stages.0.0.grn.gamma'][0] == 0
    assert decay['backbone.stages.0.0.grn.beta'][0] == 0
    assert decay['backbone.stages.0.0.pwconv1.weight'][0] == 0.05
    last = [decay[f'backbone.stages.{i}.0.pwconv1.weight'] for i in (3, 4)]
    assert last[0] == last[1]


def test_factor_from_depth():
    assert layer_decay.lr_scale(13, 12, 0.8) == 1.0
    assert layer_decay.lr_scale(0, 6, 0.9) == pytest.approx(0.9 ** 7)


def test_frozen_parameters_are_left_out():
    model = Model(BEiT())
    model.backbone.requires_grad_(False)
    wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
    built = LearningRateDecayOptimizerConstructor(wrapper, dict(num_layers=12, decay_rate=0.65))
    groups = built(model).optimizer.param_groups
    assert sorted(n for g in groups for n in g['param_names']) == [
        'decode_head.bias', 'decode_head.weight']
    # AdamW's own weight decay, where the config sets none.
    assert sorted(g['weight_decay'] for g in groups) == [0, 0.01]


@pytest.mark.parametrize(('paramwise', 'key'), [
    (dict(num_layers=6), 'decay_rate'), (dict(decay_rate=0.9), 'num_layers'),
    (dict(decay_rate=0.9, num_layers=6, decay_type='layerwise'), 'decay_type')])
def test_wrong_settings_are_named(paramwise, key):
    with pytest.raises(UserError, match=f'paramwise_cfg.{key}'):
        LearningRateDecayOptimizerConstructor(dict(optimizer={}), paramwise)


def test_a_backbone_without_rule_is_named():
    built = LearningRateDecayOptimizerConstructor(
        dict(optimizer=dict(type='AdamW', lr=1e-3)), dict(num_layers=12, decay_rate=0.65))
    with pytest.raises(NotImplementedError, match='Swin') as error:
        built(Model(Swin()))
    assert isinstance(error.value, UserError), 'the tools would print a traceback'
