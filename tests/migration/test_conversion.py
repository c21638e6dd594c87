"""Conversion of each subject of an old config."""
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import TRANSFORMS, init_default_scope

from convnext_mm import UserError
from convnext_mm.bases import without_completion
from convnext_mm.complexity import build_on_meta
from convnext_mm.migration.writing import migrate
from convnext_mm.resolution.edits import Edits, State
from convnext_mm.resolution.signatures import types_and_registries

SEG = '''_base_ = ['../_base_/models/upernet_convnext.py', '../_base_/datasets/ade20k.py',
          '../_base_/default_runtime.py', '../_base_/schedules/schedule_160k.py']
'''
DET = '''_base_ = ['../_base_/models/mask_rcnn_convnext_fpn.py',
          '../_base_/datasets/coco_instance.py', '../_base_/schedules/schedule_2x.py',
          '../_base_/default_runtime.py']
'''
NORM = 'norm = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], to_rgb=True)\n'


@pytest.fixture
def convert(tmp_path):
    def convert(text: str, trust: bool = False):
        (tmp_path / 'old.py').write_text(text)
        report = migrate(tmp_path / 'old.py', tmp_path / 'new.py', trust)
        with without_completion():
            return Config.fromfile(tmp_path / 'new.py', import_custom_modules=False), report
    return convert


@pytest.mark.parametrize(('text', 'wrapper'), [
    ("fp16 = dict(loss_scale=512.)", dict(type='AmpOptimWrapper', loss_scale=512.0)),
    ("optimizer_config = dict(type='Fp16OptimizerHook', loss_scale='dynamic')",
     dict(type='AmpOptimWrapper', loss_scale='dynamic')),
    ("optimizer_config = dict(type='DistOptimizerHook', update_interval=4, use_fp16=False, "
     'grad_clip=dict(max_norm=1.0, norm_type=2))',
     dict(type='OptimWrapper', accumulative_counts=4, clip_grad=dict(max_norm=1.0, norm_type=2))),
    ("optimizer_config = dict(type='GradientCumulativeOptimizerHook', cumulative_iters=8)",
     dict(type='OptimWrapper', accumulative_counts=8)),
    ('optimizer_config = dict(grad_clip=None)', dict(type='OptimWrapper'))])
def test_optimizer_config(convert, text, wrapper):
    cfg, _ = convert(SEG + text)
    assert {key: value for key, value in cfg.optim_wrapper.items()
            if key not in ('optimizer', 'constructor', 'paramwise_cfg')} == wrapper


def test_another_optimizer_inherits_no_settings(convert):
    cfg, _ = convert(SEG + "optimizer = dict(_delete_=True, type='SGD', lr=0.01, momentum=0.9)")
    assert cfg.optim_wrapper.to_dict() == dict(
        type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
    cfg, _ = convert(SEG + "optimizer = dict(type='SGD', lr=0.01, momentum=0.9)")
    assert cfg.optim_wrapper.optimizer == dict(type='SGD', lr=0.01, momentum=0.9)
    cfg, _ = convert(SEG + "optimizer = dict(constructor='DefaultOptimizerConstructor', lr=1e-3, "
                     "_delete_=True, type='AdamW', paramwise_cfg=dict(norm_decay_mult=0.0))")
    assert 'constructor' not in cfg.optim_wrapper
    assert cfg.optim_wrapper.paramwise_cfg == dict(norm_decay_mult=0.0)


@pytest.mark.parametrize(('text', 'loop', 'kinds'), [
    (SEG + "runner = dict(type='IterBasedRunner', max_iters=40000)",
     dict(type='IterBasedTrainLoop', max_iters=40000), ['LinearLR', 'PolyLR']),
    (SEG.replace('160k', '80k') + 'a = 1', dict(type='IterBasedTrainLoop', max_iters=80000),
     ['LinearLR', 'PolyLR']),
    (DET, dict(type='EpochBasedTrainLoop', max_epochs=24), ['LinearLR', 'MultiStepLR']),
    (DET + 'total_epochs = 10', dict(type='EpochBasedTrainLoop', max_epochs=10),
     ['LinearLR', 'MultiStepLR']),
    (SEG + "runner = dict(type='EpochBasedRunner', max_epochs=50)\n"
     "lr_config = dict(_delete_=True, policy='CosineAnnealing', min_lr=1e-7, warmup='linear', "
     'warmup_iters=10, warmup_ratio=0.1)', dict(type='EpochBasedTrainLoop', max_epochs=50),
     ['PolicyLR'])])
def test_length_and_policy(convert, text, loop, kinds):
    cfg, _ = convert(text)
    assert {key: cfg.train_cfg[key] for key in loop} == loop
    assert [scheduler.type for scheduler in cfg.param_scheduler] == kinds
    by_epoch = loop['type'].startswith('Epoch')
    assert cfg.log_processor.by_epoch == by_epoch
    assert cfg.default_hooks.checkpoint.get('by_epoch', True) == by_epoch
    assert (cfg.train_dataloader.sampler.type == 'DefaultSampler') == by_epoch
    assert cfg.train_cfg.val_interval == {40000: 16000, 80000: 8000}.get(
        loop.get('max_iters'), 1)


def test_steps_of_the_old_schedules(convert):
    cfg, _ = convert(DET)
    assert cfg.param_scheduler[1].milestones == [16, 22]


def test_runtime(convert):
    cfg, report = convert(SEG + '''
checkpoint_config = dict(by_epoch=False, interval=2000, max_keep_ckpts=2, create_symlink=True)
evaluation = dict(interval=4000, metric=['mIoU', 'mDice'], pre_eval=True, save_best='mIoU')
log_config = dict(interval=10, hooks=[
    dict(type='TextLoggerHook', by_epoch=False), dict(type='TensorboardLoggerHook'),
    dict(type='WandbLoggerHook', init_kwargs=dict(project='p'))])
dist_params = dict(backend='gloo')
workflow = [('train', 1)]
cudnn_benchmark = True
resume_from = 'work/latest.pth'
load_from = None
custom_imports = dict(imports=['mmcls.models', 'my_models'], allow_failed_imports=False)
seed = 3
find_unused_parameters = True
forgotten = dict(a=1)
''')
    assert cfg.default_hooks.checkpoint == dict(
        type='CheckpointHook', by_epoch=False, interval=2000, max_keep_ckpts=2, save_best='mIoU')
    assert cfg.train_cfg.val_interval == 4000
    assert cfg.val_evaluator.iou_metrics == cfg.test_evaluator.iou_metrics == ['mIoU', 'mDice']
    assert cfg.default_hooks.logger.interval == 10
    assert [backend.type for backend in cfg.visualizer.vis_backends] == [
        'LocalVisBackend', 'TensorboardVisBackend', 'WandbVisBackend']
    assert cfg.visualizer.vis_backends[2].init_kwargs == dict(project='p')
    assert cfg.env_cfg.dist_cfg.backend == 'gloo'
    assert cfg.env_cfg.cudnn_benchmark
    assert (cfg.load_from, cfg.resume) == ('work/latest.pth', True)
    assert cfg.custom_imports['imports'] == ['convnext_mm', 'my_models']
    assert cfg.randomness.seed == 3
    assert cfg.find_unused_parameters
    assert '! forgotten: unknown key' in report
    assert '! custom_imports: code for mmcv 0.x or 1.x' in report


@pytest.mark.parametrize('kind', ['mmcls', 'mmpretrain'])
def test_backbones_of_mmcls_and_mmpretrain(convert, kind):
    cfg, report = convert(f'''_base_ = {SEG.split('=', 1)[1]}
custom_imports = dict(imports='{kind}.models', allow_failed_imports=False)
model = dict(
    backbone=dict(_delete_=True, type='{kind}.ConvNeXt', arch='small', out_indices=[0, 1, 2, 3],
                  drop_path_rate=0.3, layer_scale_init_value=1.0, gap_before_final_norm=False,
                  in_channels=3, frozen_stages=0, init_cfg=dict(
                      type='Pretrained', checkpoint='small.pth', prefix='backbone.')))
''')
    assert cfg.model.backbone == dict(
        type='ConvNeXt', arch='small', out_indices=[0, 1, 2, 3], drop_path_rate=0.3, in_chans=3,
        layer_scale_init_value=1.0, init_cfg=dict(type='Pretrained', checkpoint='small.pth'))
    assert 'model.backbone.gap_before_final_norm' in report
    cfg, _ = convert(SEG + "model = dict(pretrained='a.pth', backbone=dict(_delete_=True, "
                     f"type='{kind}.ConvNeXt', arch=dict(depths=[1, 1], channels=[8, 16])))")
    backbone = cfg.model.backbone
    assert (backbone.depths, backbone.dims, backbone.out_indices) == ([1, 1], [8, 16], [-1])
    assert backbone.init_cfg == dict(type='Pretrained', checkpoint='a.pth')
    assert backbone.layer_scale_init_value == 1e-6
    with pytest.raises(UserError, match="act_cfg={'type': 'ReLU'} is not supported"):
        convert(SEG + "model = dict(backbone=dict(_delete_=True, type='mmcls.ConvNeXt', "
                "act_cfg=dict(type='ReLU')))")


def test_segmentation_data(convert):
    cfg, report = convert(SEG + NORM + '''
crop = (256, 256)
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=False),
    dict(type='Resize', img_scale=(1024, 256), ratio_range=(0.5, 2.0)),
    dict(type='RandomCrop', crop_size=crop, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5), dict(type='PhotoMetricDistortion'),
    dict(type='Normalize', **norm), dict(type='Pad', size=crop, pad_val=0, seg_pad_val=255),
    dict(type='DefaultFormatBundle'), dict(type='Collect', keys=['img', 'gt_semantic_seg'])]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(1024, 256), img_ratios=[0.5, 1.0], flip=True,
         transforms=[dict(type='Resize', keep_ratio=True), dict(type='RandomFlip'),
                     dict(type='Normalize', **norm), dict(type='ImageToTensor', keys=['img']),
                     dict(type='Collect', keys=['img'])])]
one = dict(type='CustomDataset', data_root='data/x', img_dir='img', ann_dir='ann',
           classes=('a', 'b'), palette=[[0, 0, 0], [1, 1, 1]], pipeline=train_pipeline)
data = dict(samples_per_gpu=4, workers_per_gpu=0,
            train=dict(type='RepeatDataset', times=3, dataset=one),
            val=dict(one, img_dir=['v1', 'v2'], ann_dir=['w1', 'w2'], pipeline=test_pipeline),
            test=dict(one, split='test.txt', pipeline=test_pipeline))
''')
    train = cfg.train_dataloader
    assert (train.batch_size, train.num_workers, train.persistent_workers) == (4, 0, False)
    assert (cfg.val_dataloader.batch_size, cfg.val_dataloader.num_workers) == (1, 0)
    assert (train.dataset.type, train.dataset.times) == ('RepeatDataset', 3)
    inner = train.dataset.dataset
    assert (inner.type, inner.data_root, inner.reduce_zero_label) == (
        'BaseSegDataset', 'data/x', False)
    assert inner.data_prefix == dict(img_path='img', seg_map_path='ann')
    assert inner.metainfo == dict(classes=('a', 'b'), palette=[[0, 0, 0], [1, 1, 1]])
    assert [step.type for step in inner.pipeline] == [
        'LoadImageFromFile', 'LoadAnnotations', 'RandomResize', 'RandomCrop', 'RandomFlip',
        'PhotoMetricDistortion', 'PackSegInputs']
    assert inner.pipeline[2] == dict(type='RandomResize', scale=(1024, 256),
                                     ratio_range=(0.5, 2.0), keep_ratio=True)
    val = cfg.val_dataloader.dataset
    assert val.type == 'ConcatDataset'
    assert [one.data_prefix.seg_map_path for one in val.datasets] == ['w1', 'w2']
    test = cfg.test_dataloader.dataset
    assert test.ann_file == 'test.txt'
    assert [step.type for step in test.pipeline] == [
        'LoadImageFromFile', 'Resize', 'LoadAnnotations', 'PackSegInputs']
    assert cfg.model.data_preprocessor.to_dict() == dict(
        type='SegDataPreProcessor', mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], bgr_to_rgb=True,
        size=(256, 256), pad_val=0, seg_pad_val=255)
    assert cfg.test_time_augmentation
    assert [step.scale for step in cfg.tta_pipeline[1].transforms[0]] == [(512, 128), (1024, 256)]
    assert [step.prob for step in cfg.tta_pipeline[1].transforms[1]] == [0.0, 1.0]
    assert 'test_time_augmentation=True' in report


def test_detection_data(convert):
    cfg, _ = convert(DET + NORM + '''
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', img_scale=[(1333, 640), (1333, 800)], multiscale_mode='range',
         keep_ratio=True),
    dict(type='RandomFlip', flip_ratio=0.5), dict(type='Normalize', **norm),
    dict(type='Pad', size_divisor=64), dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_bboxes', 'gt_labels', 'gt_masks'])]
data = dict(
    train=dict(type='ClassBalancedDataset', oversample_thr=1e-3, dataset=dict(
        type='CocoDataset', ann_file='data/coco/annotations/a.json', img_prefix='data/coco/imgs/',
        classes=('x', 'y'), filter_empty_gt=False, pipeline=train_pipeline)),
    val=dict(ann_file='elsewhere/b.json'),
    test=dict(ann_file='data/coco/annotations/c.json'))
evaluation = dict(interval=2, metric=['bbox'], classwise=True, save_best='bbox_mAP')
''')
    train = cfg.train_dataloader.dataset
    assert (train.type, train.oversample_thr) == ('ClassBalancedDataset', 1e-3)
    inner = train.dataset
    assert (inner.data_root, inner.ann_file, inner.data_prefix.img) == (
        'data/coco/', 'annotations/a.json', 'imgs/')
    assert inner.filter_cfg == dict(filter_empty_gt=False, min_size=32)
    assert inner.pipeline[2] == dict(type='RandomResize', scale=[(1333, 640), (1333, 800)],
                                     keep_ratio=True)
    assert inner.pipeline[-1] == dict(type='PackDetInputs')
    val, test = cfg.val_dataloader.dataset, cfg.test_dataloader.dataset
    assert (val.data_root, val.ann_file, val.data_prefix.img) == (
        '', 'elsewhere/b.json', 'data/coco/val2017/')
    assert (test.data_root, test.ann_file) == ('data/coco/', 'annotations/c.json')
    assert (cfg.val_evaluator.ann_file, cfg.test_evaluator.ann_file) == (
        'elsewhere/b.json', 'data/coco/annotations/c.json')
    assert (cfg.val_evaluator.metric, cfg.val_evaluator.classwise) == (['bbox'], True)
    assert cfg.default_hooks.checkpoint.save_best == 'coco/bbox_mAP'
    preprocessor = cfg.model.data_preprocessor
    assert (preprocessor.pad_size_divisor, preprocessor.pad_mask) == (64, True)


@pytest.mark.parametrize(('text', 'message'), [
    (SEG + "lr_config = dict(policy='cyclic')", "Unknown lr_config.policy='cyclic'; expected one"),
    (SEG + "optimizer_config = dict(type='MyHook')", "unknown optimizer_config.type='MyHook'"),
    (SEG + "runner = dict(type='DynamicRunner')", "unknown runner.type='DynamicRunner'; expected"),
    (SEG + "optimizer = dict(_delete_=True, type='Lamp', lr=1)", "optimizer.type='Lamp' is not"),
    (SEG + "optimizer = dict(constructor='Mine')", "constructor='Mine' is not registered"),
    (SEG + "model = dict(decode_head=dict(_delete_=True, type='MyHead'))",
     "model.decode_head.type='MyHead' is not registered in mmseg"),
    (SEG + "data = dict(train=dict(pipeline=[dict(type='MyStep')]))",
     "data.train.pipeline: step 'MyStep' is not registered in mmseg or mmcv"),
    (SEG + "data = dict(train=dict(type='MySet', pipeline=[]))", "data.train.type='MySet' is not"),
    (SEG + 'data = dict(sample_per_gpu=2)', 'unknown key data.sample_per_gpu; expected one of sam'),
    (SEG + 'data = dict(val_dataloader=dict(batch=2))', 'unknown key data.val_dataloader.batch; '),
    (SEG + "data = dict(test=dict(pipeline=[dict(type='MultiScaleFlipAug', img_scale=None)]))",
     'data.test.pipeline: MultiScaleFlipAug has no img_scale'),
    ('lr = 1\noptimizer = dict(lr=lr)\n', 'neither decode_head nor roi_head')])
def test_errors_name_the_unknown_value(convert, text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        convert(text)
    assert not (tmp_path / 'new.py').exists()


def test_the_old_file_is_never_overwritten(tmp_path):
    (tmp_path / 'old.py').write_text(SEG)
    with pytest.raises(UserError, match='would be overwritten'):
        migrate(tmp_path / 'old.py', tmp_path / 'old.py')
    assert (tmp_path / 'old.py').read_text() == SEG


def test_a_trusted_config_may_register_its_types(convert, tmp_path, monkeypatch):
    (tmp_path / 'my_heads.py').write_text(
        'from mmseg.models import FCNHead\nfrom mmseg.registry import MODELS\n'
        "MODELS.register_module(module=FCNHead, name='TrustedHead', force=True)\n")
    monkeypatch.syspath_prepend(tmp_path)
    text = SEG + 'model = dict(decode_head=dict(_delete_=True, type="TrustedHead"))\n'
    with pytest.raises(UserError, match='--trust --import MODULE of tools/migrate_config.py'):
        convert(text)
    cfg, _ = convert('import my_heads\n' + text, trust=True)
    assert cfg.model.decode_head == dict(type='TrustedHead')


def test_a_complete_old_config_inherits_only_its_own_bases(convert, tmp_path):
    (tmp_path / '_base_').mkdir()
    (tmp_path / '_base_' / 'model.py').write_text('''
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder', pretrained=None,
    backbone=dict(type='ConvNeXt', in_chans=3, depths=[3, 3, 9, 3], dims=[96, 192, 384, 768],
                  drop_path_rate=0.2, layer_scale_init_value=1.0, out_indices=[0, 1, 2, 3]),
    decode_head=dict(type='FCNHead', in_channels=768, in_index=3, channels=128, num_convs=1,
                     num_classes=7, norm_cfg=norm_cfg, align_corners=False,
                     loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False)))
train_cfg = dict()
test_cfg = dict(mode='whole')
''')
    (tmp_path / '_base_' / 'schedule.py').write_text('''
optimizer = dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0005)
optimizer_config = dict()
lr_config = dict(policy='poly', power=0.9, min_lr=1e-4, by_epoch=False)
runner = dict(type='IterBasedRunner', max_iters=20000)
checkpoint_config = dict(by_epoch=False, interval=2000)
evaluation = dict(interval=2000, metric='mIoU', pre_eval=True)
''')
    cfg, _ = convert('''_base_ = ['./_base_/model.py', './_base_/schedule.py']
model = dict(decode_head=dict(num_classes=5))
data = dict(samples_per_gpu=3)
''')
    assert cfg.model.decode_head.type == 'FCNHead'
    assert cfg.model.decode_head.num_classes == 5
    assert 'auxiliary_head' not in cfg.model
    assert cfg.model.test_cfg == dict(mode='whole')
    assert cfg.optim_wrapper.to_dict() == dict(type='OptimWrapper', optimizer=dict(
        type='SGD', lr=0.01, momentum=0.9, weight_decay=0.0005))
    assert cfg.param_scheduler == [dict(type='PolicyLR', policy='poly', whole=20000, power=0.9,
                                        min_lr=1e-4, by_epoch=False)], 'without a warm-up'
    assert build_on_meta(cfg).decode_head.conv_seg.out_channels == 5


COMPLETE = """model = dict(type='EncoderDecoder', backbone=dict(type='ConvNeXt'), decode_head=dict(
    type='FCNHead', in_channels=768, in_index=3, channels=8, num_classes=150))
"""
MEAN = [123.675, 116.28, 103.53]


@pytest.mark.parametrize(('text', 'expected'), [
    ("_base_ = '../_base_/datasets/ade20k.py'\n" + COMPLETE,
     dict(mean=MEAN, bgr_to_rgb=True, size=(512, 512), seg_pad_val=255)),
    ("_base_ = '../_base_/datasets/cityscapes.py'\n" + COMPLETE,
     dict(mean=MEAN, size=(512, 1024))),
    (SEG.replace('upernet_convnext', 'fcn_r50-d8'), dict(mean=MEAN, size=(512, 512))),
    ("_base_ = '../_base_/datasets/coco_detection.py'\nmodel = dict(type='RetinaNet')\n",
     dict(mean=MEAN, bgr_to_rgb=True, pad_size_divisor=32))])
def test_images_are_normalized_and_padded_as_in_the_missing_base(convert, text, expected):
    """There, the pipeline of the data set did it; now it is the model."""
    cfg, _ = convert(text + 'total_epochs = 12\n')
    preprocessor = cfg.model.data_preprocessor
    assert {key: preprocessor[key] for key in expected} == expected
    assert preprocessor.type == (
        'DetDataPreprocessor' if 'coco' in text else 'SegDataPreProcessor')


def test_a_pipeline_without_normalize_normalizes_nothing(convert):
    cfg, report = convert(SEG + "data = dict(train=dict(pipeline=[dict(type='LoadImageFromFile'), "
                          'dict(type="Pad", size=(64, 64))]))')
    preprocessor = cfg.model.data_preprocessor
    assert (preprocessor.mean, preprocessor.bgr_to_rgb) == (None, False)
    assert preprocessor.size == (64, 64)
    assert '! data.train.pipeline (no Normalize): look at it' in report


def test_a_missing_data_set_that_augments_in_another_way_is_a_warning(convert):
    _, report = convert(DET)
    assert 'coco_instance.py: not found: ours trains at several scales' in report
    step = "dict(type='LoadImageFromFile')"
    cfg, report = convert(f'{DET}data = dict(train=dict(pipeline=[{step}]))\n')
    assert 'not found' not in report, 'what the warning advises'
    assert cfg.train_dataloader.dataset.pipeline[0].type == 'LoadImageFromFile'


def test_report(convert, tmp_path):
    _, report = convert("""_base_ = '../_base_/default_runtime.py'
model = dict(decode_head=dict(num_classes=5))
unused = 1
gpu_ids = [0]
""")
    assert report.splitlines() == [
        f'{tmp_path}/old.py → {tmp_path}/new.py', '',
        '  _base_ ../_base_/default_runtime.py  → configs/_base_/runtime_mmseg.py of this package',
        '  (no pretrained)                      → no pretrained weights',
        '  model                                → model',
        '  unused                               → removed: nothing uses it',
        '  gpu_ids                              → removed: the launcher sets it', '',
        'Warnings:',
        '  ! (no pretrained): the backbone is randomly initialized: set '
        'model.backbone.init_cfg=dict(type="Pretrained", checkpoint=...). The authors set it on '
        'the command line']


def test_cosmetic_settings_are_never_fatal(convert):
    init_default_scope('mmdet')  # which has another hook, as after the conversion of a detector
    cfg, report = convert(SEG + """
log_config = dict(interval=20, hooks=[dict(type='CustomizedTextLoggerHook', by_epoch=False),
                                      dict(type='PaviLoggerHook')])
custom_hooks = [dict(type='EmptyCacheHook', after_epoch=True), dict(type='MyHook'),
                dict(type='NumClassCheckHook'),
                dict(type='SyncBuffersHook', gone=1), dict(type='EMAHook', warm_up=100)]
""")
    assert cfg.default_hooks.logger.interval == 20
    assert [backend.type for backend in cfg.visualizer.vis_backends] == ['LocalVisBackend']
    assert cfg.custom_hooks[-2:] == [dict(type='EmptyCacheHook', after_epoch=True),
                                     dict(type='EMAHook')]
    assert '! log_config.hooks PaviLoggerHook: look at it' in report
    assert '! custom_hooks MyHook: look at it' in report
    assert '! custom_hooks NumClassCheckHook: look at it' in report, "it is mmdet's"
    assert '! custom_hooks SyncBuffersHook: look at it' in report
    assert '! custom_hooks EMAHook.warm_up: look at it' in report
    assert '! log_config.hooks CustomizedTextLoggerHook' not in report


@pytest.mark.parametrize(('text', 'scale'), [
    ("optimizer_config = dict(type='Fp16OptimizerHook')", 512.0), ('fp16 = dict()', 512.0),
    ("optimizer_config = dict(type='Fp16OptimizerHook', loss_scale='dynamic')\nfp16 = dict()",
     'dynamic'), ('fp16 = dict(loss_scale=dict(init_scale=512.0))', dict(init_scale=512.0))])
def test_loss_scale(convert, text, scale):
    """mmcv's hook scales by 512 unless told; a dict replaces the text of our base."""
    cfg, _ = convert(SEG + text)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.loss_scale == scale


def test_layer_decay_under_its_other_name(convert):
    cfg, report = convert(SEG + """
optimizer = dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05,
                 constructor='LayerDecayOptimizerConstructor',
                 paramwise_cfg=dict(num_layers=12, layer_decay_rate=0.65))
""")
    assert cfg.optim_wrapper.constructor == 'LearningRateDecayOptimizerConstructor'
    assert cfg.optim_wrapper.paramwise_cfg == dict(
        num_layers=12, decay_rate=0.65, decay_type='layer_wise')
    assert 'layer_decay_rate' in report


def test_the_size_of_a_missing_base_is_that_of_the_heads(convert, tmp_path):
    dims = [128, 256, 512, 1024]
    cfg, report = convert(SEG + f'model = dict(decode_head=dict(in_channels={dims}), '
                          'auxiliary_head=dict(in_channels=512))')
    assert cfg.model.backbone.arch == 'base'
    assert "! (no model.backbone): its base is missing" in report
    (tmp_path / 'upernet_small.py').write_text(
        SEG + 'model = dict(decode_head=dict(in_channels=[96, 192, 384, 768]))')
    migrate(tmp_path / 'upernet_small.py', tmp_path / 'new.py')
    with without_completion():
        assert Config.fromfile(tmp_path / 'new.py').model.backbone.arch == 'small'


def test_a_missing_base_tests_whole_images(convert):
    """As the authors' file of that name does."""
    cfg, _ = convert(SEG + 'model = dict(decode_head=dict(num_classes=4))')
    assert cfg.model.test_cfg == dict(mode='whole')


def test_bases_of_the_toolbox_stand_for_missing_ones(convert):
    cfg, report = convert("""_base_ = ['../_base_/models/upernet_beit.py',
    '../_base_/datasets/pascal_voc12.py', '../_base_/default_runtime.py',
    '../_base_/schedules/schedule_40k.py']
optimizer = dict(_delete_=True, type='AdamW', lr=3e-5, weight_decay=0.05,
                 constructor='LayerDecayOptimizerConstructor',
                 paramwise_cfg=dict(num_layers=12, layer_decay_rate=0.9))
""")
    assert cfg.model.backbone.type.endswith('BEiT')
    assert cfg.train_dataloader.dataset.type.endswith('PascalVOCDataset')
    assert 'mmseg::_base_/models/upernet_beit.py of the installed mmseg' in report
    assert '! _base_ ../_base_/models/upernet_beit.py: not found' in report


def test_large_scale_jitter_pads_all_batches_alike(convert):
    cfg, _ = convert(DET + NORM + """
train_pipeline = [dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', img_scale=(1024, 1024), ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(type='Normalize', **norm), dict(type='Pad', size=(1024, 1024)),
    dict(type='DefaultFormatBundle'), dict(type='Collect', keys=['img'])]
data = dict(train=dict(pipeline=train_pipeline))
""")
    assert cfg.model.data_preprocessor.batch_augments == [dict(
        type='BatchFixedSizePad', size=(1024, 1024), pad_mask=True, img_pad_value=0)]
    assert 'size' not in cfg.model.data_preprocessor


def test_arguments_that_a_loss_no_longer_has(convert):
    cfg, report = convert(SEG + "model = dict(decode_head=dict(loss_decode=dict("
                          "type='CrossEntropyLoss', loss_weight=0.5, gone=1)))")
    assert cfg.model.decode_head.loss_decode.loss_weight == 0.5
    assert 'gone' not in cfg.model.decode_head.loss_decode
    assert '! model.decode_head.loss_decode.gone: look at it' in report


def test_norms_that_we_have_anyway(convert):
    cfg, _ = convert(SEG + "model = dict(backbone=dict(norm_cfg=dict(type='LN', eps=1e-6), "
                     'kernel_size=7, num_stages=4))')
    assert not {'norm_cfg', 'kernel_size', 'num_stages'} & cfg.model.backbone.keys()
    cfg, _ = convert(SEG + "model = dict(backbone=dict(norm_cfg=dict(type='LN', eps=1e-6, "
                     "data_format='channels_first')))")
    assert 'norm_cfg' not in cfg.model.backbone
    with pytest.raises(UserError, match='norm_cfg=.* is not supported'):
        convert(SEG + "model = dict(backbone=dict(norm_cfg=dict(type='GN', num_groups=8)))")
    with pytest.raises(UserError, match="has an argument 'variant'"):
        convert(SEG + "model = dict(backbone=dict(variant='1d'))")


@pytest.mark.parametrize(('text', 'data', 'scales'), [
    (SEG, "type='ADE20KDataset', data_root='x'", [(1280, 320), (4480, 1120)]),
    (DET, "type='CocoDataset', ann_file='a.json'", [(2560, 640), (2560, 640)])])
def test_augmented_tests_follow_the_old_scale(convert, text, data, scales):
    cfg, _ = convert(text + NORM + f"""
pipeline = [dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(2560, 640), flip=False,
         transforms=[dict(type='Resize', keep_ratio=True), dict(type='RandomFlip'),
                     dict(type='Normalize', **norm), dict(type='ImageToTensor', keys=['img']),
                     dict(type='Collect', keys=['img'])])]
data = dict(test=dict({data}, pipeline=pipeline))
""")
    resizes = cfg.tta_pipeline[1].transforms[0]
    assert [resizes[0].scale, resizes[-1].scale] == scales
    assert 'test_time_augmentation' not in cfg


@pytest.mark.parametrize(('crop', 'shorter'), [(512, [512, 512, 896]), (128, [256, 512, 896])])
def test_tests_of_beit_at_several_scales(convert, crop, shorter):
    """Its own resizing limits the shorter side of an image alone, to at least the crop."""
    cfg, report = convert(SEG + NORM + f"""
pipeline = [dict(type='LoadImageFromFile'),
    dict(type='MultiScaleFlipAug', img_scale=(2048, 512), img_ratios=[0.5, 1.0, 1.75], flip=True,
         transforms=[dict(type='SETR_Resize', keep_ratio=True, crop_size=({crop}, {crop}),
                          setr_multi_scale=True), dict(type='RandomFlip'),
                     dict(type='Normalize', **norm), dict(type='ImageToTensor', keys=['img']),
                     dict(type='Collect', keys=['img'])])]
data = dict(test=dict(pipeline=pipeline))
""")
    assert [min(step.scale) for step in cfg.tta_pipeline[1].transforms[0]] == shorter
    assert 'SETR_Resize' in report
    init_default_scope('mmseg')
    resize = TRANSFORMS.build(cfg.tta_pipeline[1].transforms[0][0])
    for shape in ((400, 3000, 3), (3000, 400, 3)):  # a scale of (2048, 512) would limit 3000
        assert min(resize(dict(img=np.zeros(shape, np.uint8)))['img_shape']) == shorter[0]
    step = cfg.test_dataloader.dataset.pipeline[1]
    assert (step.type, min(step.scale), step.keep_ratio) == ('Resize', 512, True)


def test_steps_of_mmdet_2_that_have_changed(convert):
    cfg, report = convert(DET + NORM + """
data = dict(train=dict(pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
    dict(type='AutoAugment', policies=[
        [dict(type='ColorTransform', level=4), dict(type='EqualizeTransform', prob=0.8)],
        [dict(type='Rotate', level=6)]]),
    dict(type='Albu', transforms=[dict(type='Blur', p=0.1)], update_pad_shape=False,
         bbox_params=dict(type='BboxParams', format='pascal_voc', label_fields=['gt_labels'],
                          filter_lost_elements=True), skip_img_without_anno=True),
    dict(type='Normalize', **norm)]))
""")
    _, _, augment, albu, _ = cfg.train_dataloader.dataset.pipeline
    assert augment.transforms == [
        [dict(type='Color', prob=0.5, level=4), dict(type='Equalize', prob=0.8)],
        [dict(type='Rotate', prob=0.5, level=6)]]
    assert albu.bbox_params.label_fields == ['gt_bboxes_labels', 'gt_ignore_flags']
    assert 'update_pad_shape' not in albu
    assert albu.skip_img_without_anno
    assert 'rounds its magnitude' in report
    types_and_registries(Edits(cfg, [State(cfg, {})]))  # those of albumentations are in no registry


def test_a_length_in_runner_wins_over_total_iters(convert):
    cfg, report = convert(SEG + "total_iters = 20\nrunner = dict(type='IterBasedRunner', "
                          'max_iters=20000)')
    assert cfg.train_cfg.max_iters == 20000
    assert 'removed: runner sets the length' in report
    assert convert(SEG + 'total_iters = 20')[0].train_cfg.max_iters == 20
