"""The authors' configs, rewritten here in the old style, convert to our recipes."""
from pathlib import Path

import pytest
from mmengine.config import Config

from convnext_mm.archs import ARCHS
from convnext_mm.bases import without_completion
from convnext_mm.engine.conversion import migrate as convert
from convnext_mm.errors import UserError
from convnext_mm.migration.writing import migrate
from tests.helpers import ROOT
from tests.recipes import RECIPES

SHORT = [(480 + 32 * i, 1333) for i in range(11)]


def old_text(name: str) -> str:
    """The authors' config of a recipe, in the style of mmcv 1.x."""
    size, _, lr, drop_path, decay, layers, amp, *_ = RECIPES[name]
    arch = ARCHS[size]
    depths, dims = list(arch.depths), list(arch.dims)
    backbone = (f"type='ConvNeXt', in_chans=3, depths={depths}, dims={dims}, "
                f'drop_path_rate={drop_path}, layer_scale_init_value=1.0, '
                'out_indices=[0, 1, 2, 3]')
    kind = 'stage_wise' if name.startswith('upernet') else 'layer_wise'
    text = f'''
optimizer = dict(constructor='LearningRateDecayOptimizerConstructor', _delete_=True, type='AdamW',
                 lr={lr}, betas=(0.9, 0.999), weight_decay=0.05,
                 paramwise_cfg={{'decay_rate': {decay}, 'decay_type': '{kind}',
                                'num_layers': {layers}}})
'''
    if amp:
        text += '''fp16 = None
optimizer_config = dict(type='DistOptimizerHook', update_interval=1, grad_clip=None, coalesce=True,
                        bucket_size_mb=-1, use_fp16=True)
'''
    if name.startswith('upernet'):
        side = 640 if '_640_' in name else 512
        test = ('' if name.endswith('_ms') else  # the base says mode='whole'
                f"test_cfg=dict(mode='slide', crop_size=crop_size, "
                f"stride=({side * 2 // 3}, {side * 2 // 3}))")
        data = 'ade20k_640x640.py' if side == 640 else 'ade20k.py'
        return f'''_base_ = ['../_base_/models/upernet_convnext.py', '../_base_/datasets/{data}',
          '../_base_/default_runtime.py', '../_base_/schedules/schedule_160k.py']
crop_size = ({side}, {side})
model = dict(
    backbone=dict({backbone}),
    decode_head=dict(in_channels={dims}, num_classes=150),
    auxiliary_head=dict(in_channels={dims[2]}, num_classes=150), {test})
{text}
lr_config = dict(_delete_=True, policy='poly', warmup='linear', warmup_iters=1500,
                 warmup_ratio=1e-6, power=1.0, min_lr=0.0, by_epoch=False)
data = dict(samples_per_gpu=2)
runner = dict(type='IterBasedRunner{'Amp' * amp}')
'''
    cascade = name.startswith('cascade')
    heads = '' if not cascade else '''
    roi_head=dict(bbox_head=[dict(
        type='ConvFCBBoxHead', num_shared_convs=4, num_shared_fcs=1, in_channels=256,
        conv_out_channels=256, fc_out_channels=1024, roi_feat_size=7, num_classes=80,
        bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0., 0., 0., 0.],
                        target_stds=stds),
        reg_class_agnostic=False, reg_decoded_bbox=True,
        norm_cfg=dict(type='SyncBN', requires_grad=True),
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type='GIoULoss', loss_weight=10.0)) for stds in (
            [0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])])'''
    fragment = 'cascade_mask_rcnn_convnext_fpn' if cascade else 'mask_rcnn_convnext_fpn'
    return f'''_base_ = ['../_base_/models/{fragment}.py', '../_base_/datasets/coco_instance.py',
          '../_base_/schedules/schedule_1x.py', '../_base_/default_runtime.py']
model = dict(backbone=dict({backbone}), neck=dict(in_channels={dims}),{heads})
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
sides = {SHORT}
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', flip_ratio=0.5),
    dict(type='AutoAugment', policies=[
        [dict(type='Resize', img_scale=sides, multiscale_mode='value', keep_ratio=True)],
        [dict(type='Resize', img_scale=[(400, 1333), (500, 1333), (600, 1333)],
              multiscale_mode='value', keep_ratio=True),
         dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600),
              allow_negative_crop=True),
         dict(type='Resize', img_scale=sides, multiscale_mode='value', override=True,
              keep_ratio=True)]]),
    dict(type='Normalize', **img_norm_cfg),
    dict(type='Pad', size_divisor=32),
    dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_bboxes', 'gt_labels', 'gt_masks'])]
data = dict(train=dict(pipeline=train_pipeline))
{text}
lr_config = dict(step=[27, 33])
runner = dict(type='EpochBasedRunner{'Amp' * amp}', max_epochs=36)
'''


def load(path: Path) -> dict:
    """The values of a config, without its helper variables."""
    with without_completion():
        cfg = Config.fromfile(path).to_dict()

    def as_lists(value):  # tuples and lists build the same model
        if isinstance(value, dict):
            return {key: as_lists(item) for key, item in value.items()}
        return [as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value
    return as_lists({key: value for key, value in cfg.items() if key not in (
        'dims', 'crop_size', 'scale', 'own', 'train_pipeline', 'test_pipeline', 'nms',
        'roi_extractor', 'rcnn_training', 'short_sides', 'norm_cfg')})


@pytest.mark.parametrize('name', RECIPES)
def test_a_config_of_the_authors_becomes_our_recipe(name, tmp_path):
    (tmp_path / f'{name}.py').write_text(old_text(name))
    report = migrate(tmp_path / f'{name}.py', tmp_path / 'new.py')
    assert 'No warnings.' in report
    assert len((tmp_path / 'new.py').read_text().splitlines()) == 2, 'a comment and the base'
    assert load(tmp_path / 'new.py') == load(ROOT / 'configs' / f'{name}.py')


@pytest.mark.parametrize('name', [n for n in RECIPES if not n.endswith('_ss')])
def test_a_config_under_another_name_trains_the_same(name, tmp_path):
    (tmp_path / 'fork.py').write_text(old_text(name))
    report = migrate(tmp_path / 'fork.py', tmp_path / 'new.py')
    assert 'randomly initialized' in report, 'the authors set the weights on the command line'
    ours, new = load(ROOT / 'configs' / f'{name}.py'), load(tmp_path / 'new.py')
    assert ours['model']['backbone'].pop('init_cfg')
    ours.pop('test_time_augmentation', None)  # the authors' data set file sets the scales
    assert new == ours


MODELS = dict(
    upernet_convnext="""norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder', pretrained=None,
    backbone=dict(type='ConvNeXt', in_chans=3, depths=[3, 3, 9, 3], dims=[96, 192, 384, 768],
                  drop_path_rate=0.2, layer_scale_init_value=1.0, out_indices=[0, 1, 2, 3]),
    decode_head=dict(
        type='UPerHead', in_channels=[128, 256, 512, 1024], in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6), channels=512, dropout_ratio=0.1, num_classes=19,
        norm_cfg=norm_cfg, align_corners=False, loss_decode=dict(
            type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=dict(
        type='FCNHead', in_channels=384, in_index=2, channels=256, num_convs=1,
        concat_input=False, dropout_ratio=0.1, num_classes=19, norm_cfg=norm_cfg,
        align_corners=False, loss_decode=dict(
            type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4)),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
""")
RUNTIME = """log_config = dict(interval=50, hooks=[
    dict(type='CustomizedTextLoggerHook', by_epoch=False)])
dist_params = dict(backend='nccl')
log_level = 'INFO'
load_from = None
resume_from = None
workflow = [('train', 1)]
cudnn_benchmark = True
"""


@pytest.fixture
def clone(tmp_path):
    """A folder of the authors' repository, with the bases of segmentation beside the configs."""
    for name, text in dict(default_runtime=RUNTIME, **{
            f'models/{name}': text for name, text in MODELS.items()}).items():
        file = tmp_path / 'configs/_base_' / f'{name}.py'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / 'configs/convnext').mkdir()
    return tmp_path / 'configs/convnext'


SEGMENTORS = [name for name in RECIPES if name.startswith('upernet')]


@pytest.mark.parametrize('name', SEGMENTORS)
@pytest.mark.parametrize('file', [None, 'mine'])
def test_a_clone_converts_with_its_bases(name, file, clone):
    """Under the authors' names and under others, every field as shipped."""
    path = clone / f'{file or name}.py'
    path.write_text(old_text(name))
    # What is built is the same under both names.
    report = (migrate if file else convert)(path, clone / 'new.py')
    ours, new = load(ROOT / 'configs' / f'{name}.py'), load(clone / 'new.py')
    if file:
        assert 'randomly initialized' in report
        assert ours['model']['backbone'].pop('init_cfg')
    else:
        assert 'No warnings.' in report
    for cfg in (ours, new):
        cfg.pop('test_time_augmentation', None)  # the authors' data set file sets the scales
        del cfg['data_root'], cfg['dataset_type']
    new['model'].pop('pretrained', None)
    assert new['env_cfg']['cudnn_benchmark'] is True
    assert new['model'].pop('backbone')['drop_path_rate'] == ours['model'].pop(
        'backbone')['drop_path_rate']
    assert new == ours


def test_the_bases_of_the_user_win(clone):
    base = clone.parent / '_base_/models/upernet_convnext.py'
    base.write_text(base.read_text().replace('drop_path_rate=0.2', 'drop_path_rate=0.15'))
    path = clone / 'upernet_convnext_tiny_512_160k_ade20k_ms.py'
    path.write_text("""_base_ = ['../_base_/models/upernet_convnext.py',
    '../_base_/datasets/ade20k.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_160k.py']
model = dict(decode_head=dict(in_channels=[96, 192, 384, 768]))
""")
    # The authors' base has the classes of Cityscapes, which they set anew in every config.
    with pytest.raises(UserError, match='num_classes=19, but the dataset has 150 classes'):
        convert(path, clone / 'new.py')
    base.write_text(base.read_text().replace('num_classes=19', 'num_classes=150'))
    convert(path, clone / 'new.py')
    model = load(clone / 'new.py')['model']
    assert model['backbone']['drop_path_rate'] == 0.15
    assert model['test_cfg'] == dict(mode='whole')
