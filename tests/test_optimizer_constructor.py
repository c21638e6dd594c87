"""Parameter groups of the optimizer constructor."""
import json

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from convnext_mm import ConvNeXt, UserError, optimizer_constructor
from convnext_mm.optimizer_constructor import LearningRateDecayOptimizerConstructor
from tests.helpers import DATA, DETECTION, SEGMENTATION, build_on_meta


def groups_of(model: nn.Module, wrapper_cfg: dict) -> dict[str, tuple[float, float, float]]:
    groups = build_optim_wrapper(model, wrapper_cfg).optimizer.param_groups
    return {name: (g['lr_scale'], g['lr'], g['weight_decay'])
            for g in groups for name in g['param_names']}


@pytest.mark.parametrize(('config', 'golden'), [
    (SEGMENTATION, 'upernet_tiny'), (DETECTION, 'cascade_tiny'),
    (SEGMENTATION.replace('tiny', 'base'), 'upernet_base'),
    (DETECTION.replace('tiny', 'base'), 'cascade_base')])
def test_groups_of_the_recipes_are_those_of_the_authors(config, golden):
    cfg, model = build_on_meta(config)
    ours = groups_of(model, cfg.optim_wrapper)
    theirs = json.loads((DATA / f'{golden}.json').read_text())
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert ours[name] == pytest.approx(values, rel=1e-9, abs=0), name


@pytest.mark.parametrize('scope', ['mmengine', 'mmseg', 'mmdet'])
def test_every_scope_finds_our_constructor(scope):
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
    """A backbone with a head."""

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


def test_v2_does_not_decay_grn_and_a_fifth_stage_counts_as_the_fourth():
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


def test_frozen_parameters_are_excluded():
    model = Model(BEiT())
    model.backbone.requires_grad_(False)
    wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3))
    built = LearningRateDecayOptimizerConstructor(wrapper, dict(num_layers=12, decay_rate=0.65))
    groups = built(model).optimizer.param_groups
    assert sorted(n for g in groups for n in g['param_names']) == [
        'decode_head.bias', 'decode_head.weight']
    # Without a weight decay in the config, AdamW's default applies.
    assert sorted(g['weight_decay'] for g in groups) == [0, 0.01]


@pytest.mark.parametrize(('paramwise', 'message'), [
    (None, 'decay_rate must be a number above 0'),
    (dict(num_layers=6), 'decay_rate must be a number above 0, got None: write'),
    (dict(num_layers=6, decay_rate=0), 'decay_rate .* got 0:'),
    (dict(num_layers=6, decay_rate=-0.9), 'decay_rate .* got -0.9'),
    (dict(num_layers=6, decay_rate='0.9'), "decay_rate .* got '0.9'"),
    (dict(decay_rate=0.9), 'num_layers must be .* got None'),
    (dict(decay_rate=0.9, num_layers=0), 'num_layers must be .* got 0'),
    (dict(decay_rate=0.9, num_layers=True), 'num_layers must be .* got True'),
    (dict(decay_rate=0.9, num_layers=6.5), 'num_layers must be .* got 6.5'),
    (dict(decay_rate=0.9, num_layers='all'), "num_layers must be .*'auto', got 'all'"),
    (dict(decay_rate=0.9, num_layers=6, decay_type='layerwise'), 'decay_type=.layerwise.: expec'),
    (dict(layer_decay_rate=0.9, num_layers=6), "no key 'layer_decay_rate'. Did you mean decay_ra"),
    (dict(decay_rate=0.9, num_layers=6, xyz=1), "no key 'xyz'. Its keys: decay_rate, num_layers"),
    (dict(decay_rate=0.9, num_layers=6, norm_decay_mult=-1), 'norm_decay_mult=-1 must be a numb'),
    (dict(decay_rate=0.9, num_layers=6, bypass_duplicate='yes'), "bypass_duplicate='yes' must be"),
    (dict(decay_rate=0.9, num_layers=6, custom_keys=['head']), "custom_keys=.'head'. must map"),
    (dict(decay_rate=0.9, num_layers=6, custom_keys=dict(head=10)), "custom_keys={'head': 10} mu"),
    (dict(decay_rate=0.9, num_layers=6, custom_keys=dict(head=dict(lr_mul=10))),
     "custom_keys.head has no key 'lr_mul'. Did you mean lr_mult"),
    (dict(decay_rate=0.9, num_layers=6, custom_keys=dict(head=dict(lr_mult=-1))),
     'custom_keys.head.lr_mult=-1 must be'),
    (dict(decay_rate=0.9, num_layers=6, bias_decay_mult=1.0), 'set optim_wrapper.optimizer.weight'),
])
def test_wrong_settings(paramwise, message):
    with pytest.raises(UserError, match=message):
        LearningRateDecayOptimizerConstructor(
            dict(optimizer=dict(type='AdamW', lr=1e-3)), paramwise)


def test_the_learning_rate_is_required():
    with pytest.raises(UserError, match=r'optim_wrapper.optimizer.lr must be a number, got None'):
        LearningRateDecayOptimizerConstructor(
            dict(optimizer=dict(type='AdamW')), dict(decay_rate=0.9, num_layers=6))(Model(small()))


def test_a_backbone_without_a_decay_rule():
    built = LearningRateDecayOptimizerConstructor(
        dict(optimizer=dict(type='AdamW', lr=1e-3)), dict(num_layers=12, decay_rate=0.65))
    with pytest.raises(NotImplementedError, match='Swin') as error:
        built(Model(Swin()))
    assert isinstance(error.value, UserError), 'the tools would print a traceback'


OPTIMIZER = dict(type='AdamW', lr=1e-3, weight_decay=0.05)


def scales_of(model: nn.Module, **paramwise) -> dict[str, tuple[float, float]]:
    """{parameter: (factor of the learning rate, weight decay)}."""
    built = LearningRateDecayOptimizerConstructor(
        dict(optimizer=dict(OPTIMIZER)), dict(dict(decay_rate=0.5, num_layers='auto'), **paramwise))
    return {name: (g['lr'] / 1e-3, g['weight_decay'])
            for g in built(model).optimizer.param_groups for name in g['param_names']}


def small(**options) -> ConvNeXt:
    return ConvNeXt(**dict(dict(depths=[1, 2, 4, 1], dims=[4] * 4), **options))


def test_auto_is_one_layer_per_block():
    found = scales_of(Model(small()))
    order = ['downsample_layers.0.0', 'stages.0.0.norm', 'stages.1.0.norm', 'stages.1.1.norm',
             *(f'stages.2.{i}.norm' for i in range(4)), 'stages.3.0.norm', 'norm3']
    steps = [found[f'backbone.{name}.weight'][0] for name in order]
    assert steps == pytest.approx([0.5 ** n for n in range(9, -1, -1)])
    assert found['backbone.downsample_layers.2.1.weight'] == found[
        'backbone.stages.2.0.pwconv1.weight']
    assert found['decode_head.weight'][0] == 1
    found = scales_of(Model(small()), decay_type='stage_wise')
    assert [found[f'backbone.stages.{i}.0.pwconv1.weight'][0] for i in range(4)] == pytest.approx(
        [0.5 ** 4, 0.5 ** 3, 0.5 ** 2, 0.5])
    assert found['backbone.downsample_layers.3.1.weight'][0] == pytest.approx(0.5 ** 5)


@pytest.mark.parametrize('options', [
    dict(depths=[2, 1], dims=[4, 4]), dict(depths=[1, 2, 5], dims=[4] * 3),
    dict(depths=[1] * 6, dims=[4] * 6), dict(out_indices=[1]),
    dict(depths=[1, 1, 40, 1]), dict(use_grn=True)])
@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
@pytest.mark.parametrize('num_layers', ['auto', 17])
def test_learning_rates_rise_towards_the_heads(options, decay_type, num_layers):
    model = Model(small(**options))
    found = scales_of(model, decay_type=decay_type, num_layers=num_layers)
    assert found.keys() == {name for name, _ in model.named_parameters()}
    steps = [found[f'backbone.stages.{s}.{b}.pwconv1.weight'][0]
             for s, stage in enumerate(model.backbone.stages) for b in range(len(stage))]
    assert steps == sorted(steps)
    assert found['backbone.downsample_layers.0.0.weight'][0] < steps[0]
    assert steps[-1] < found['decode_head.weight'][0] == 1


@pytest.mark.parametrize(('decay_type', 'num_layers', 'needed'), [
    ('layer_wise', 4, 6), ('layer_wise', 1, 6), ('stage_wise', 3, 4)])
def test_too_few_layers_are_an_error(decay_type, num_layers, needed):
    backbone = small(depths=[3, 3, 9, 3])
    with pytest.raises(UserError, match=rf'Write num_layers={needed}, or .auto.'):
        scales_of(Model(backbone), decay_type=decay_type, num_layers=num_layers)
    scales = scales_of(Model(backbone), decay_type=decay_type, num_layers=needed)
    assert max(scale for scale, _ in scales.values()) == 1


@pytest.mark.parametrize('mults', [
    dict(norm_decay_mult=0.5, bias_decay_mult=0.25, flat_decay_mult=0.75),
    dict(norm_decay_mult=0.0, bias_decay_mult=2.0, flat_decay_mult=1.0, dwconv_decay_mult=0.5,
         bias_lr_mult=2.0),
    dict(norm_decay_mult=1.0, bias_decay_mult=1.0, flat_decay_mult=1.0, custom_keys={
        'stages.1': dict(lr_mult=0.1, decay_mult=0.5), 'stages.1.0': dict(lr_mult=3, decay_mult=0),
        'decode_head': dict(lr_mult=10.0, decay_mult=1.0, betas=(0.8, 0.9))})])
def test_multipliers_are_those_of_mmengine(mults):
    """With a decay rate of 1, as in mmengine's constructor; otherwise times the layer's factor."""
    from mmengine.optim import DefaultOptimWrapperConstructor
    model = Model(small())
    theirs = DefaultOptimWrapperConstructor(dict(optimizer=dict(OPTIMIZER)), mults)(model)
    names = {id(param): name for name, param in model.named_parameters()}
    theirs = {names[id(g['params'][0])]: (g['lr'] / 1e-3, g['weight_decay'], g['betas'])
              for g in theirs.optimizer.param_groups}
    ours = scales_of(model, decay_rate=1.0, **mults)
    for name, (lr, decay, _) in theirs.items():
        assert ours[name] == pytest.approx((lr, decay)), name
    layered, plain = scales_of(model, **mults), scales_of(model)
    for name, (lr, decay, _) in theirs.items():
        assert layered[name] == pytest.approx((lr * plain[name][0], decay)), name
    built = LearningRateDecayOptimizerConstructor(
        dict(optimizer=dict(OPTIMIZER)), dict(mults, decay_rate=0.5, num_layers='auto'))(model)
    assert {name: g['betas'] for g in built.optimizer.param_groups
            for name in g['param_names']} == {name: v[2] for name, v in theirs.items()}


def test_weight_decay_without_factors():
    found = scales_of(Model(small(use_grn=True)), custom_keys=dict(backbone=dict(lr_mult=0.5)),
                   norm_decay_mult=1.0)
    assert found['backbone.stages.3.0.norm.weight'] == pytest.approx((0.25, 0))
    assert found['backbone.stages.3.0.pwconv1.weight'] == pytest.approx((0.25, 0.05))
    found = scales_of(Model(small(use_grn=True)), norm_decay_mult=1.0)
    assert found['backbone.stages.3.0.norm.weight'][1] == 0.05
    assert found['backbone.stages.3.0.grn.gamma'][1] == 0.05
    assert found['decode_head.bias'][1] == 0


@pytest.fixture
def logged(monkeypatch) -> list[str]:
    """Messages that the constructor logs."""
    lines = []
    monkeypatch.setattr(optimizer_constructor, 'print_log', lambda line, **_: lines.append(line))
    return lines


def test_a_custom_key_that_matches_nothing_is_logged(logged):
    scales_of(Model(small()), custom_keys=dict(decode_hed=dict(lr_mult=10.0)))
    assert "'decode_hed' is in no name of a trainable parameter" in logged[0]


def test_shared_parameters():
    model = Model(small())
    model.auxiliary_head = model.decode_head
    expected = scales_of(Model(small()))
    assert scales_of(model) == expected
    assert scales_of(model, bypass_duplicate=True) == expected
    with pytest.raises(UserError, match='auxiliary_head.weight shares its parameter'):
        scales_of(model, bypass_duplicate=False)


class Nested(nn.Module):
    """A model inside another one, as for distillation or test-time augmentation."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.student = inner
        self.scale = nn.Parameter(torch.ones(1))


def wrap_backbone(wrap):
    def wrapped() -> nn.Module:
        model = Model(small())
        model.backbone = wrap(model.backbone)
        return model
    return wrapped


class DataParallelLike(nn.Module):
    """Changes names like DistributedDataParallel, without a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize('wrapped', [
    lambda: DataParallelLike(Model(small())), lambda: torch.compile(Model(small())),
    lambda: DataParallelLike(torch.compile(Model(small()))), wrap_backbone(torch.compile),
    wrap_backbone(DataParallelLike)])
def test_wrapped_models_have_the_same_groups(wrapped):
    assert scales_of(wrapped()) == scales_of(Model(small()))


def test_checkpoint_wrappers_and_deeper_backbones():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    bare = scales_of(Model(small()))
    model = Model(small())
    for stage in model.backbone.stages:
        stage[0] = checkpoint_wrapper(stage[0])
    assert scales_of(model) == bare
    assert scales_of(Nested(Model(small()))) == {
        **{f'student.{name}': value for name, value in bare.items()}, 'scale': (1.0, 0.0)}
    model = Model(nn.Sequential(small()))
    assert {name.replace('backbone.0.', 'backbone.'): value
            for name, value in scales_of(model).items()} == bare
    assert scales_of(small()) == {name.removeprefix('backbone.'): value for name, value
                               in bare.items() if name.startswith('backbone.')}


def test_two_backbones_of_different_depth():
    model = Model(small())
    model.second = small(depths=[1, 1, 1, 1])
    found = scales_of(model)
    assert found['backbone.downsample_layers.0.0.weight'][0] == pytest.approx(0.5 ** 9)
    assert found['second.downsample_layers.0.0.weight'][0] == pytest.approx(0.5 ** 5)
    assert found['decode_head.weight'][0] == 1


@pytest.mark.parametrize('original', [True, False])
def test_fsdp(original, tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    from convnext_mm.layers import Block
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = FullyShardedDataParallel(
            Model(small()), auto_wrap_policy=ModuleWrapPolicy([Block]), use_orig_params=original,
            device_id=torch.device('cpu'))
        if original:
            assert scales_of(model) == scales_of(Model(small()))
        else:
            with pytest.raises(UserError, match='set use_orig_params=True'):
                scales_of(model)
    finally:
        dist.destroy_process_group()


class Layered(Vit):
    """mmpretrain's convention: the backbone has a method for the depth of its parameters."""

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        name = param_name.removeprefix(prefix)
        if name.startswith('layers.'):
            return int(name.split('.')[1]) + 1, 14
        return (13 if name.startswith('norm') else 0), 14


def test_backbones_with_get_layer_depth():
    found = scales_of(Model(Layered()))
    assert found['backbone.cls_token'][0] == pytest.approx(0.5 ** 13)
    assert found['backbone.layers.11.weight'][0] == 0.5
    assert found['backbone.norm.weight'][0] == found['decode_head.weight'][0] == 1
    assert scales_of(Model(Layered()), num_layers=12) == found
    with pytest.raises(UserError, match="has 12 layers .get_layer_depth.: write"):
        scales_of(Model(Layered()), num_layers=6)


def test_the_log_is_one_compact_table(logged):
    scales_of(Model(small()), custom_keys=dict(decode_head=dict(lr_mult=10.0)))
    assert len(logged) == 1
    lines = logged[0].splitlines()
    assert lines[1].split() == ['group', 'parameters', 'scale', 'lr', 'weight', 'decay']
    assert len(lines) == 2 + 2 * 9 + 3  # the norms after the stages do not decay
    assert lines[2].split() == ['layer_0_decay', '192', '0.001953', '1.953e-06', '0.05']
    assert lines[-2].split() == [
        'layer_9_decay_lr×10', '(decode_head)', '8', '10.000000', '1.000e-02', '0.05']


class Renamed(ConvNeXt):
    """Its name contains no library's class name of a backbone."""


Renamed.__name__ = 'MyNetwork'


class OtherConvNeXt(nn.Module):
    """Another implementation of ConvNeXt, with the authors' names and no get_layer_depth."""

    def __init__(self) -> None:
        super().__init__()
        own = small()
        self.downsample_layers, self.stages, self.norm3 = (
            own.downsample_layers, own.stages, own.norm3)


@pytest.mark.parametrize('decay_type', ['layer_wise', 'stage_wise'])
@pytest.mark.parametrize('num_layers', [6, 'auto'])
def test_class_names_do_not_matter(decay_type, num_layers):
    options = dict(decay_type=decay_type, num_layers=num_layers)
    expected = scales_of(Model(small()), **options)
    assert scales_of(Model(Renamed(depths=[1, 2, 4, 1], dims=[4] * 4)), **options) == expected
    other = scales_of(Model(OtherConvNeXt()), **options)
    assert other == {name: expected[name] for name in other}
    assert len(other) > 50


def test_a_backbone_with_layers_only_has_no_stage_wise_decay():
    with pytest.raises(UserError, match="Layered has layers only .get_layer_depth.: write decay"):
        scales_of(Model(Layered()), decay_type='stage_wise')


def test_a_decay_rate_above_1_warns(logged):
    """mmseg's own tests have one: importing this package must not make them fail."""
    found = scales_of(Model(small()), decay_rate=2)
    assert found['backbone.downsample_layers.0.0.weight'][0] == 2.0 ** 9
    assert any('decay_rate=2 is above 1' in line for line in logged)


class Whole(nn.Module):
    """mmpretrain's convention for a whole model: the depth of a parameter from its name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.head = nn.Linear(2, 2)

    def get_layer_depth(self, param_name: str) -> tuple[int, int]:
        return (int(param_name.split('.')[1]) + 1 if 'layers' in param_name else 4), 5


def test_get_layer_depth_of_a_whole_model():
    found = scales_of(Whole(), num_layers='auto')
    assert [found[f'layers.{i}.weight'][0] for i in range(3)] == [0.125, 0.25, 0.5]
    assert found['head.weight'][0] == 1
