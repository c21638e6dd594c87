"""The recipes against the published facts."""
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import PARAM_SCHEDULERS

from convnext_mm.archs import ARCHS
from convnext_mm.layer_decay import convnext_layer_id
from convnext_mm.training import launch
from tests.conftest import (
    DEMO_DETECTION,
    DEMO_SEGMENTATION,
    DETECTION,
    ROOT,
    SEGMENTATION,
    build_without_memory,
)

ALL = sorted(str(p.relative_to(ROOT)) for p in (ROOT / 'configs').glob('*.py'))


CASCADE = ('cascade_mask_rcnn_convnext_{}_patch4_window7_mstrain_480-800_giou_4conv1f_adamw_3x_'
           'coco_in')
MASK = 'mask_rcnn_convnext_tiny_patch4_window7_mstrain_480-800_adamw_3x_coco_in1k'
# name: size, weights, lr, drop path, decay, layers, mixed precision, millions of parameters
SEGMENTORS = {
    'upernet_convnext_tiny_512': ('tiny', '1k', 1e-4, 0.4, 0.9, 6, True, 60.24),
    'upernet_convnext_small_512': ('small', '1k', 1e-4, 0.3, 0.9, 12, True, 81.88),
    'upernet_convnext_base_512': ('base', '1k', 1e-4, 0.4, 0.9, 12, True, 122.10),
    'upernet_convnext_base_640': ('base', '22k', 1e-4, 0.4, 0.9, 12, True, 122.10),
    'upernet_convnext_large_640': ('large', '22k', 1e-4, 0.4, 0.9, 12, False, 234.99),
    'upernet_convnext_xlarge_640': ('xlarge', '22k', 8e-5, 0.4, 0.9, 12, False, 391.14)}
DETECTORS = {
    MASK: ('tiny', '1k', 1e-4, 0.4, 0.95, 6, True, 48.10),  # published: 48
    CASCADE.format('tiny') + '1k': ('tiny', '1k', 2e-4, 0.4, 0.7, 6, True, 85.93),
    CASCADE.format('small') + '1k': ('small', '1k', 2e-4, 0.6, 0.7, 12, True, 107.57),
    CASCADE.format('base') + '1k': ('base', '1k', 2e-4, 0.7, 0.8, 12, True, 145.80),
    CASCADE.format('base') + '22k': ('base', '22k', 1e-4, 0.6, 0.8, 12, True, 145.80),
    CASCADE.format('large') + '22k': ('large', '22k', 1e-4, 0.7, 0.7, 12, False, 254.71),
    CASCADE.format('xlarge') + '22k': ('xlarge', '22k', 1e-4, 0.8, 0.7, 12, False, 406.88)}
RECIPES = {
    **{f'{name}_160k_ade20k{test}': row for name, row in SEGMENTORS.items()
       for test in ('', '_ss', '_ms')}, **DETECTORS}


V2 = sorted(Path(config).stem for config in ALL if 'convnextv2' in config)


def test_every_recipe_is_in_the_table():
    assert {Path(config).stem for config in ALL} == {*RECIPES, *V2}
    assert {(name.split('_')[0], name.split('convnextv2_')[1].split('_')[0]) for name in V2} == {
        (task, size) for task in ('upernet', 'cascade')
        for size in ('atto', 'nano', 'tiny', 'base', 'large')}


@pytest.mark.parametrize('name', V2)
def test_v2_recipe(name):
    size = name.split('convnextv2_')[1].split('_')[0]
    cfg, model = build_without_memory(ROOT / 'configs' / f'{name}.py',
                                      'mmseg' if name.startswith('upernet') else 'mmdet')
    assert model.backbone.arch == ARCHS[f'v2_{size}']
    assert f'/convnextv2_{size}_' in cfg.model.backbone.init_cfg.checkpoint
    dims = list(model.backbone.arch.dims)
    assert dims == (cfg.model.decode_head.in_channels if name.startswith('upernet')
                    else cfg.model.neck.in_channels)
    # The last stage is one step of the decay before the heads, and the one before it another.
    layers = cfg.optim_wrapper.paramwise_cfg.num_layers
    assert convnext_layer_id(f'backbone.stages.2.{model.backbone.arch.depths[2] - 1}.norm.weight',
                             layers) == layers - 1
    assert (ROOT / 'configs' / f'{name}.py').read_text().startswith('# Ours')


@pytest.mark.parametrize('name', RECIPES)
def test_recipe(name):
    """Sizes, weights, optimizer and parameters of every recipe against the published ones."""
    size, weights, lr, drop_path, decay, layers, amp, millions = RECIPES[name]
    segmentation = name.startswith('upernet')
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
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
    assert cfg.param_scheduler == Config.fromfile(
        SEGMENTATION if segmentation else DETECTION).param_scheduler, 'whose rates are tested below'
    assert cfg.train_dataloader.batch_size == 2
    cfg, model = build_without_memory(ROOT / 'configs' / f'{name}.py',
                                      'mmseg' if segmentation else 'mmdet')
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=0.005)
    dims = list(model.backbone.arch.dims)
    assert [dims, dims[2]] == ([cfg.model.decode_head.in_channels,
                                cfg.model.auxiliary_head.in_channels] if segmentation else
                               [cfg.model.neck.in_channels, dims[2]])


@pytest.mark.parametrize('name', [name for name in RECIPES if name.startswith('upernet')])
def test_pictures_and_test_mode_of_segmentation(name):
    cfg = Config.fromfile(ROOT / 'configs' / f'{name}.py')
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


@pytest.mark.parametrize('config', ALL)
def test_nothing_comes_from_an_installed_toolbox(config):
    def bases(path: Path):
        yield path
        for base in Config._get_base_files(str(path)):
            yield from bases((path.parent / base).resolve())
    assert all(path.is_relative_to(ROOT / 'configs') for path in bases(ROOT / config))


def rates(cfg: Config, iterations: list[int], epoch_length: int | None = None) -> dict[int, float]:
    """The learning rate of a group whose rate is 1 at the given iterations."""
    param = torch.nn.Parameter(torch.zeros(1))
    wrapper = OptimWrapper(torch.optim.SGD([param], lr=1.0))
    schedulers = [PARAM_SCHEDULERS.build(dict(s, optimizer=wrapper)) for s in cfg.param_scheduler]
    wrapper.optimizer.step()
    found = {}
    for t in range(max(iterations) + 1):
        if t in iterations:
            found[t] = wrapper.optimizer.param_groups[0]['lr']
        for scheduler in schedulers:
            if not scheduler.by_epoch or (t + 1) % epoch_length == 0:
                scheduler.step()
    return found


def test_segmentation_learning_rate_is_the_authors():
    def official(t: int) -> float:
        warmup = 1 - (1 - t / 1500) * (1 - 1e-6) if t < 1500 else 1
        return (1 - t / 160000) * warmup
    points = [0, 1, 750, 1499, 1500, 1501, 80000, 159999]
    for t, rate in rates(Config.fromfile(SEGMENTATION), points).items():
        assert rate == pytest.approx(official(t), rel=1e-9), t


def test_detection_learning_rate_is_the_authors():
    length = 600  # iterations an epoch, more than the warm-up

    def official(t: int) -> float:
        warmup = 1 - (1 - t / 500) * (1 - 0.001) if t < 500 else 1
        return warmup * 0.1 ** sum(t // length >= step for step in (27, 33))
    points = [0, 1, 250, 499, 500, *(epoch * length for epoch in (26, 27, 33, 35))]
    for t, rate in rates(Config.fromfile(DETECTION), points, length).items():
        assert rate == pytest.approx(official(t), rel=1e-9), t


def test_segmentation_values():
    cfg = Config.fromfile(SEGMENTATION)
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
    cfg = Config.fromfile(DETECTION)
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
    ('', 'EncoderDecoder'), ('_ss', 'EncoderDecoder'), ('_ms', 'SegTTAModel')])
def test_multi_scale_needs_no_tta(suffix, model, monkeypatch):
    class Seen(Exception):
        pass

    def build(cfg, splits):
        seen.append(cfg)
        raise Seen
    seen = []
    monkeypatch.setattr(launch, '_build_runner', build)
    parser = launch.common_parser('')
    args = parser.parse_args([SEGMENTATION.replace('.py', f'{suffix}.py')])
    for key in ('show', 'show_dir', 'tta', 'out'):
        setattr(args, key, None)
    args.checkpoint = 'file.pth'
    with pytest.raises(Seen):
        launch.test(args)
    assert seen[0].model.type == model
    steps = [step.type for step in seen[0].test_dataloader.dataset.pipeline]
    assert ('TestTimeAug' in steps) == (suffix == '_ms')
