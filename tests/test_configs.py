"""The recipes compared with the published settings."""
import argparse
import functools
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS

from convnext_mm.archs import ARCHS
from convnext_mm.cli import add_config
from convnext_mm.engine import launch
from convnext_mm.layer_decay import convnext_layer_id
from tests.helpers import (
    DEMO_DETECTION,
    DEMO_SEGMENTATION,
    DETECTION,
    ROOT,
    SEGMENTATION,
    build_on_meta,
)
from tests.recipes import BOXES, CASCADE, DETECTORS, MASK, RECIPES

ALL = sorted(str(p.relative_to(ROOT)) for p in (ROOT / 'configs').glob('*.py'))
V2 = sorted(Path(config).stem for config in ALL if 'convnextv2' in config)


def recipe_path(name: str) -> Path:
    """Return the config file of a recipe."""
    return ROOT / 'configs' / f'{name}.py'


def base_recipe(name: str) -> str:
    """Return the recipe that a recipe for single- or multi-scale tests inherits."""
    return name.removesuffix('_ss').removesuffix('_ms')


@functools.cache
def read_recipe(name: str) -> Config:
    """Return the config of a recipe; tests share it and must not change it."""
    return Config.fromfile(recipe_path(name))


@functools.cache
def build_recipe(name: str):
    """Return config and model of a recipe, adapted to the CPU; tests share them."""
    return build_on_meta(recipe_path(name))


def test_every_recipe_is_tested():
    assert {Path(config).stem for config in ALL} == {*RECIPES, *V2, *BOXES}
    assert {(name.split('_')[0], name.split('convnextv2_')[1].split('_')[0]) for name in V2} == {
        (task, size) for task in ('upernet', 'cascade')
        for size in ('atto', 'nano', 'tiny', 'base', 'large')}
    assert {name.split('_')[0] for name in (*RECIPES, *V2)} == set(ITERATIONS)


@pytest.mark.parametrize('name', V2)
def test_v2_recipe(name):
    size = name.split('convnextv2_')[1].split('_')[0]
    cfg, model = build_recipe(name)
    assert model.backbone.arch == ARCHS[f'v2_{size}']
    assert f'/convnextv2_{size}_' in cfg.model.backbone.init_cfg.checkpoint
    dims = list(model.backbone.arch.dims)
    assert dims == (cfg.model.decode_head.in_channels if name.startswith('upernet')
                    else cfg.model.neck.in_channels)
    # The third stage ends one decay step below the last stage.
    layers = cfg.optim_wrapper.paramwise_cfg.num_layers
    assert convnext_layer_id(f'stages.2.{model.backbone.arch.depths[2] - 1}.norm.weight',
                             layers) == layers - 1
    text = recipe_path(name).read_text()
    assert text.startswith('# Our recipe, ')
    assert 'not trained yet' in text.splitlines()[0]


@pytest.mark.parametrize(('name', 'origin'), BOXES.items())
def test_recipe_without_masks(name, origin):
    """All but the masks is as in the recipe that it comes from."""
    cfg, model = read_recipe(name), build_recipe(name)[1]
    _, other = build_recipe(origin)
    assert not model.with_mask
    shapes = {key: value.shape for key, value in other.state_dict().items() if 'mask' not in key}
    assert {key: value.shape for key, value in model.state_dict().items()} == shapes
    before = read_recipe(origin)
    assert cfg.optim_wrapper == before.optim_wrapper
    assert cfg.param_scheduler == before.param_scheduler
    assert (cfg.model.train_cfg, cfg.model.test_cfg) == (
        before.model.train_cfg, before.model.test_cfg)
    assert 'with_mask' not in str((cfg.train_dataloader, cfg.test_dataloader, cfg.tta_pipeline))
    assert len(cfg.train_dataloader.dataset.pipeline) == len(
        before.train_dataloader.dataset.pipeline)
    assert cfg.val_evaluator == cfg.test_evaluator == dict(before.val_evaluator, metric=['bbox'])
    assert recipe_path(name).read_text().startswith('# Our recipe, ')


@pytest.mark.parametrize('name', RECIPES)
def test_recipe(name):
    """Size, weights, optimizer and parameters of every recipe are the published ones."""
    size, weights, lr, drop_path, decay, layers, amp, millions, _ = RECIPES[name]
    segmentation = name.startswith('upernet')
    cfg, base = (read_recipe(n) for n in (name, base_recipe(name)))
    backbone, wrapper = cfg.model.backbone, cfg.optim_wrapper
    assert (backbone.arch, backbone.drop_path_rate, backbone.layer_scale_init_value) == (
        size, drop_path, 1.0)
    assert backbone.init_cfg == dict(
        type='Pretrained', checkpoint='https://dl.fbaipublicfiles.com/convnext/'
        f'convnext_{size}_{weights}_224.pth')
    assert wrapper.optimizer == dict(type='AdamW', lr=lr, betas=(0.9, 0.999), weight_decay=0.05)
    assert wrapper.paramwise_cfg == dict(
        decay_rate=decay, decay_type='stage_wise' if segmentation else 'layer_wise',
        num_layers=layers)
    assert wrapper.type == ('AmpOptimWrapper' if amp else 'OptimWrapper')
    assert (wrapper, cfg.param_scheduler) == (base.optim_wrapper, base.param_scheduler), (
        'the learning rates of the base recipe are tested below')
    assert cfg.train_dataloader.batch_size == 2
    assert dict(cfg.model, test_cfg=None) == dict(base.model, test_cfg=None)
    cfg, model = build_recipe(base_recipe(name))
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.005)
    if segmentation:
        heads = cfg.model.decode_head, cfg.model.auxiliary_head
        assert [(h.type, h.channels, h.num_classes, h.align_corners) for h in heads] == [
            ('convnext_mm.UPerHead', 512, 150, False),
            ('convnext_mm.FCNHead', 256, 150, False)]
        assert heads[0].pool_scales == (1, 2, 3, 6)
    dims = list(model.backbone.arch.dims)
    assert [dims, dims[2]] == ([cfg.model.decode_head.in_channels,
                                cfg.model.auxiliary_head.in_channels] if segmentation else
                               [cfg.model.neck.in_channels, dims[2]])


@pytest.mark.parametrize('name', [name for name in RECIPES if name.startswith('upernet')])
def test_image_sizes_and_test_mode_of_segmentation(name):
    cfg = read_recipe(name)
    size = 640 if '_640_' in name else 512
    assert cfg.model.data_preprocessor.size == (size, size)
    train = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert train['RandomResize'].scale == (4 * size, size)
    assert train['RandomResize'].ratio_range == (0.5, 2.0)
    assert train['RandomCrop'].crop_size == (size, size)
    assert train['RandomCrop'].cat_max_ratio == 0.75
    assert list(train) == ['LoadImageFromFile', 'LoadAnnotations', 'RandomResize', 'RandomCrop',
                           'RandomFlip', 'PhotoMetricDistortion', 'PackSegInputs']
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert {step.type: step for step in loader.dataset.pipeline}['Resize'].scale == (
            4 * size, size)
    scales = [step.scale for step in cfg.tta_pipeline[1].transforms[0]]
    assert scales == [(round(4 * size * r), round(size * r)) for r in (
        0.5, 0.75, 1.0, 1.25, 1.5, 1.75)]
    assert cfg.get('test_time_augmentation', False) == name.endswith('_ms')
    stride = {512: 341, 640: 426}[size]
    assert cfg.model.test_cfg == (dict(mode='whole') if name.endswith('_ms') else dict(
        mode='slide', crop_size=(size, size), stride=(stride, stride)))


@pytest.mark.parametrize('name', [*DETECTORS, *(n for n in V2 if n.startswith('cascade'))])
def test_data_and_heads_of_detection_are_those_of_tiny(name):
    """The values of tiny are tested below."""
    cfg, tiny = (read_recipe(n) for n in (name, CASCADE.format('tiny') + '1k'))
    assert cfg.train_dataloader == tiny.train_dataloader
    assert cfg.test_dataloader == cfg.val_dataloader == tiny.test_dataloader
    assert cfg.model.test_cfg == tiny.model.test_cfg
    assert cfg.model.data_preprocessor == tiny.model.data_preprocessor
    mask_head = cfg.model.roi_head.mask_head
    assert (mask_head.num_convs, mask_head.conv_out_channels, mask_head.num_classes) == (4, 256, 80)
    if name != MASK:
        assert cfg.model.roi_head == tiny.model.roi_head
        assert cfg.model.train_cfg == tiny.model.train_cfg


@pytest.mark.parametrize('config', ALL)
def test_no_recipe_inherits_from_an_installed_toolbox(config):
    def bases(path: Path):
        for base in Config._get_base_files(str(path)):
            yield (path.parent / base).resolve()
            yield from bases((path.parent / base).resolve())
    files = list(bases(ROOT / config))
    assert ROOT / 'configs/_base_/default_runtime.py' in files
    assert all(path.is_relative_to(ROOT / 'configs') for path in files)


EPOCH = 600  # iterations per epoch in these tests, more than the warm-up
ITERATIONS = {
    'upernet': [0, 1, 750, 1499, 1500, 1501, 80000, 159999],
    'mask': [0, 250, 499, 500, *(epoch * EPOCH for epoch in (26, 27, 33, 35))]}
ITERATIONS['cascade'] = ITERATIONS['mask']


def official_rate(name: str, lr: float, paramwise: dict, t: int, segmentation: bool) -> float:
    """Return the authors' learning rate of the parameter ``name`` at iteration ``t``."""
    part, layers = name.removeprefix('backbone.').split('.'), paramwise['num_layers']
    depth = layers + 1
    if part[0] in ('downsample_layers', 'stages') and name.startswith('backbone.'):
        stage = int(part[1])
        if segmentation:
            depth = stage + 1 if part[0] == 'stages' else 0
        elif part[0] == 'stages':
            depth = [1, 2, 3 + int(part[2]) // 3, layers][stage]
        else:
            depth = [0, 2, 3, layers][stage]
    scale = paramwise['decay_rate'] ** (layers + 2 - depth - 1)
    length, start = (1500, 1e-6) if segmentation else (500, 0.001)
    warmup = 1 - (1 - t / length) * (1 - start) if t < length else 1
    decay = (1 - t / 160000 if segmentation else
             0.1 ** sum(t // EPOCH >= step for step in (27, 33)))
    return lr * scale * warmup * decay


def simulated_rates(schedulers: list[dict], initial: list[float],
                    points: list[int]) -> dict[int, list[float]]:
    """Return each group's learning rate at some iterations, as mmengine's schedulers set it."""
    wrapper = OptimWrapper(torch.optim.SGD(
        [dict(params=[torch.nn.Parameter(torch.zeros(1))], lr=lr) for lr in initial]))
    schedulers = [PARAM_SCHEDULERS.build(dict(s, optimizer=wrapper)) for s in schedulers]
    wrapper.optimizer.step()
    rates = {}
    for t in range(max(points) + 1):
        if t in points:
            rates[t] = [group['lr'] for group in wrapper.optimizer.param_groups]
        for scheduler in schedulers:
            if not scheduler.by_epoch or (t + 1) % EPOCH == 0:
                scheduler.step()
    return rates


@pytest.mark.parametrize('task', ITERATIONS)
def test_every_learning_rate_of_every_recipe_is_the_authors(task):
    recipes = [name for name in (*RECIPES, *V2) if name == base_recipe(name)
               and name.startswith(f'{task}_')]
    groups = [(*build_recipe(name), group) for name in recipes for group in build_optim_wrapper(
        build_recipe(name)[1], build_recipe(name)[0].optim_wrapper).optimizer.param_groups]
    schedule = groups[0][0].param_scheduler
    assert all(cfg.param_scheduler == schedule for cfg, _, _ in groups)
    # The schedule multiplies all rates by the same factor, so that two groups are enough for it.
    initial = [group['lr'] for *_, group in groups]
    extremes = [min(initial), max(initial)]
    rates = simulated_rates(schedule, extremes, ITERATIONS[task])
    assert list(rates) == ITERATIONS[task]
    for t, (lowest, highest) in rates.items():
        factor = highest / extremes[1]
        assert lowest / extremes[0] == pytest.approx(factor, rel=1e-9)
        for cfg, _, group in groups:
            settings = cfg.optim_wrapper
            for parameter in group['param_names']:
                official = official_rate(parameter, settings.optimizer.lr, settings.paramwise_cfg,
                                         t, task == 'upernet')
                assert group['lr'] * factor == pytest.approx(official, rel=1e-9), parameter


def test_segmentation_values():
    cfg = read_recipe(Path(SEGMENTATION).stem)
    model, wrapper = cfg.model, cfg.optim_wrapper
    assert model.backbone.drop_path_rate == 0.4
    assert model.backbone.layer_scale_init_value == 1.0
    assert model.backbone.init_cfg.checkpoint.endswith('/convnext_tiny_1k_224.pth')
    assert wrapper.type == 'AmpOptimWrapper'
    assert wrapper.optimizer == dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
    assert wrapper.paramwise_cfg == dict(decay_rate=0.9, decay_type='stage_wise', num_layers=6)
    assert wrapper.get('clip_grad') is None
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.train_cfg.max_iters == 160000
    assert model.test_cfg == dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
    assert (model.decode_head.channels, model.auxiliary_head.channels) == (512, 256)
    assert model.auxiliary_head.loss_decode.loss_weight == 0.4
    assert model.auxiliary_head.in_index == 2
    pipeline = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert pipeline['RandomResize'].scale == (2048, 512)
    assert pipeline['RandomResize'].ratio_range == (0.5, 2.0)
    assert pipeline['RandomCrop'].cat_max_ratio == 0.75
    scales = [step.scale for step in cfg.tta_pipeline[1].transforms[0]]
    assert scales == [(1024, 256), (1536, 384), (2048, 512), (2560, 640), (3072, 768), (3584, 896)]


def test_detection_values():
    cfg = read_recipe(Path(DETECTION).stem)
    model, wrapper = cfg.model, cfg.optim_wrapper
    assert model.backbone.drop_path_rate == 0.4
    assert wrapper.type == 'AmpOptimWrapper'
    assert wrapper.optimizer == dict(type='AdamW', lr=2e-4, betas=(0.9, 0.999), weight_decay=0.05)
    assert wrapper.paramwise_cfg == dict(decay_rate=0.7, decay_type='layer_wise', num_layers=6)
    assert cfg.train_cfg.max_epochs == 36
    heads = model.roi_head.bbox_head
    assert [head.bbox_coder.target_stds for head in heads] == [
        [0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
    for head in heads:
        assert (head.num_shared_convs, head.num_shared_fcs, head.fc_out_channels) == (4, 1, 1024)
        assert head.norm_cfg.type == 'SyncBN'
        assert (head.loss_bbox.type, head.loss_bbox.loss_weight) == ('GIoULoss', 10.0)
        assert head.reg_decoded_bbox
        assert not head.reg_class_agnostic
    assert model.roi_head.stage_loss_weights == [1, 0.5, 0.25]
    assert [stage.assigner.pos_iou_thr for stage in model.train_cfg.rcnn] == [0.5, 0.6, 0.7]
    choice = cfg.train_dataloader.dataset.pipeline[3]
    assert [s[0] for s in choice.transforms[0][0].scales] == list(range(480, 801, 32))
    assert choice.transforms[1][1].crop_size == (384, 600)
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (1333, 800)


@pytest.mark.parametrize(('demo', 'recipe'), [
    (DEMO_SEGMENTATION, SEGMENTATION), (DEMO_DETECTION, DETECTION)])
def test_demo_configs_inherit_the_recipes(demo, recipe):
    base = (ROOT / demo).parent / Config._get_base_files(str(ROOT / demo))[0]
    assert base.resolve() == ROOT / recipe
    demo, recipe = Config.fromfile(ROOT / demo), Config.fromfile(ROOT / recipe)
    assert demo.optim_wrapper.constructor == recipe.optim_wrapper.constructor
    assert demo.model.type == recipe.model.type
    assert demo.model.backbone.type == 'ConvNeXt'


@pytest.mark.parametrize(('suffix', 'model'), [
    ('', 'convnext_mm.EncoderDecoder'), ('_ss', 'convnext_mm.EncoderDecoder'),
    ('_ms', 'SegTTAModel')])
def test_multi_scale_recipes_use_tta_without_an_option(suffix, model, monkeypatch):
    class Stop(Exception):
        pass

    def build(cfg, splits):
        built.append(cfg)
        raise Stop
    built = []
    monkeypatch.setattr(launch, '_build_runner', build)
    parser = argparse.ArgumentParser()
    add_config(parser)
    args = parser.parse_args([SEGMENTATION.replace('.py', f'{suffix}.py')])
    for key in ('show', 'show_dir', 'tta', 'out'):
        setattr(args, key, None)
    args.checkpoint = 'file.pth'
    with pytest.raises(Stop):
        launch.test(args)
    assert built[0].model.type == model
    steps = [step.type for step in built[0].test_dataloader.dataset.pipeline]
    assert ('TestTimeAug' in steps) == (suffix == '_ms')
