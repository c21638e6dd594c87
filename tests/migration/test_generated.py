"""Old configs that nobody wrote: each is converted and built, or refused with one message.

The settings are those of mmcv 1.x's documentation. CONVNEXT_MM_OLD_CONFIGS in the environment sets
the number of configs (25; the long form is 2000).
"""
from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convnext_mm import UserError
from convnext_mm.engine.conversion import migrate

LIMITS = settings(max_examples=int(os.environ.get('CONVNEXT_MM_OLD_CONFIGS', 25)), deadline=None,
                  derandomize=True, database=None, suppress_health_check=list(HealthCheck))

BASES = dict(
    mmseg="['../_base_/models/upernet_convnext.py', '../_base_/datasets/ade20k.py', "
          "'../_base_/default_runtime.py', '../_base_/schedules/schedule_160k.py']",
    mmdet="['../_base_/models/mask_rcnn_convnext_fpn.py', '../_base_/datasets/coco_instance.py', "
          "'../_base_/schedules/schedule_1x.py', '../_base_/default_runtime.py']")
SMALL = dict(type='ConvNeXt', in_chans=3, depths=[1, 1, 3, 1], dims=[8, 16, 24, 32],
             drop_path_rate=0.1, layer_scale_init_value=1.0, out_indices=[0, 1, 2, 3])
MODEL = dict(type='EncoderDecoder', pretrained=None, backbone=SMALL, decode_head=dict(
    type='FCNHead', in_channels=32, in_index=3, channels=8, num_convs=1, num_classes=150,
    norm_cfg=dict(type='SyncBN', requires_grad=True), align_corners=False,
    loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
MODELS = dict(
    mmseg=[MODEL, dict(backbone=SMALL, decode_head=dict(in_channels=[8, 16, 24, 32]),
                       auxiliary_head=dict(in_channels=24))],
    mmdet=[dict(backbone=SMALL, neck=dict(in_channels=[8, 16, 24, 32]))])


def some(**options: list[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A dict with some of the keys, each with one of its values."""
    return st.fixed_dictionaries({}, optional={
        key: st.sampled_from(values) for key, values in options.items()})


PARAMWISE = [dict(decay_rate=0.9, decay_type='stage_wise', num_layers=6),
             dict(decay_rate=0.7, decay_type='layer_wise', num_layers=12),
             dict(layer_decay_rate=0.65, num_layers=6), dict(norm_decay_mult=0.0), {}, None,
             dict(custom_keys={'head': dict(lr_mult=10.0)}), dict(num_layers=6)]
OPTIMIZER = some(
    _delete_=[True], type=['AdamW', 'SGD', 'Adam', 'Lamb'], lr=[1e-4, 0.01], momentum=[0.9],
    betas=[(0.9, 0.999)], weight_decay=[0.05, 0.0], paramwise_cfg=PARAMWISE, constructor=[
        'LearningRateDecayOptimizerConstructor', 'LayerDecayOptimizerConstructor',
        'DefaultOptimizerConstructor', 'MyConstructor'])
OPTIMIZER_CONFIG = some(
    _delete_=[True], type=['OptimizerHook', 'Fp16OptimizerHook', 'DistOptimizerHook',
                           'GradientCumulativeOptimizerHook', 'MyOptimizerHook'],
    grad_clip=[None, dict(max_norm=35, norm_type=2)], loss_scale=[
        512.0, 'dynamic', dict(init_scale=512)], cumulative_iters=[4], update_interval=[1, 2],
    use_fp16=[True, False], coalesce=[True], bucket_size_mb=[-1])
POLICY = some(
    _delete_=[True], policy=['fixed', 'step', 'exp', 'poly', 'inv', 'CosineAnnealing',
                             'CosineRestart', 'FlatCosineAnnealing', 'cyclic', 'OneCycle'],
    by_epoch=[True, False], warmup=[None, 'linear', 'constant', 'exp'], warmup_iters=[10, 1500],
    warmup_ratio=[1e-6, 0.1], warmup_by_epoch=[True], step=[[8, 11], 5, []], gamma=[0.1, 0.5],
    power=[0.9, 1.0], min_lr=[0.0, 1e-5], min_lr_ratio=[0.01], periods=[[10, 20], [200000]],
    restart_weights=[[1], [1, 0.5]])
LR_CONFIG = st.builds(lambda cfg, policy: {'policy': policy, **cfg}, POLICY,
                      st.sampled_from(['poly', 'step', 'CosineAnnealing']))
RUNNER = some(type=['IterBasedRunner', 'EpochBasedRunner', 'EpochBasedRunnerAmp'],
              max_iters=[1000, 80000], max_epochs=[12, 36])
CHECKPOINT = some(interval=[1, 1000], by_epoch=[True, False], max_keep_ckpts=[-1, 3],
                  save_optimizer=[True], meta=[dict(a=1)], create_symlink=[False])
EVALUATION = some(interval=[1, 2000], metric=['mIoU', ['bbox', 'segm'], 'mDice', 'bbox', 'x'],
                  save_best=['auto', 'mIoU', 'bbox_mAP'], pre_eval=[True], classwise=[True],
                  start=[1], rule=['greater'], dynamic_intervals=[[(1, 2)]])
LOG_HOOKS = st.lists(some(by_epoch=[False], interval=[10], type=[
    'TextLoggerHook', 'TensorboardLoggerHook', 'WandbLoggerHook', 'CustomizedTextLoggerHook',
    'PaviLoggerHook', 'MyLoggerHook']), max_size=2)
HOOKS = st.lists(some(priority=['LOW', 49], momentum=[0.0002], type=[
    'NumClassCheckHook', 'EMAHook', 'MyHook', 'SyncNormHook', 'EmptyCacheHook']), max_size=2)
PIPELINE = st.permutations([
    dict(type='RandomFlip', prob=0.5), dict(type='Normalize', mean=[1, 2, 3], std=[4, 5, 6]),
    dict(type='PhotoMetricDistortion'), dict(type='Pad', size=(64, 64)),
    dict(type='Pad', size_divisor=32), dict(type='MyStep'),
    dict(type='Resize', img_scale=(128, 64), ratio_range=(0.5, 2.0)),
    dict(type='Resize', img_scale=[(128, 64), (128, 96)], multiscale_mode='value'),
    dict(type='DefaultFormatBundle')]).flatmap(lambda steps: st.integers(0, 7).map(
        lambda count: [dict(type='LoadImageFromFile'), *steps[:count]]))
LOADER = dict(samples_per_gpu=[1, 2, 8], workers_per_gpu=[0, 2], persistent_workers=[True],
              sampler_per_gpu=[2])


@st.composite
def old_configs(draw: st.DrawFn) -> str:
    """The text of an old config."""
    scope = draw(st.sampled_from(list(BASES)))
    values: dict[str, Any] = draw(st.fixed_dictionaries({}, optional=dict(
        optimizer=OPTIMIZER, optimizer_config=OPTIMIZER_CONFIG, lr_config=LR_CONFIG, runner=RUNNER,
        checkpoint_config=CHECKPOINT, evaluation=EVALUATION, custom_hooks=HOOKS,
        log_config=st.fixed_dictionaries(dict(interval=st.sampled_from([1, 50]), hooks=LOG_HOOKS)),
        fp16=st.sampled_from([None, {}, dict(loss_scale=512.0), dict(loss_scale='dynamic'),
                              dict(loss_scale=dict(init_scale=512.0))]),
        total_epochs=st.sampled_from([12, 36]), workflow=st.sampled_from([
            [('train', 1)], [('train', 1), ('val', 1)]]),
        dist_params=st.sampled_from([dict(backend='nccl'), dict(backend='gloo', port=29500)]),
        cudnn_benchmark=st.booleans(), seed=st.sampled_from([0, None]),
        resume_from=st.sampled_from([None, 'a.pth']), load_from=st.sampled_from([None, 'b.pth']),
        momentum_config=st.just(dict(policy='cyclic')), log_level=st.just('INFO'),
        opencv_num_threads=st.just(0), mp_start_method=st.just('fork'),
        auto_resume=st.booleans())))
    data = draw(some(**LOADER))
    if draw(st.booleans()):
        data['train'] = dict(pipeline=draw(PIPELINE))
    if data:
        values['data'] = data
    model = draw(st.sampled_from(MODELS[scope]))
    lines = [f'model = {model!r}', *(f'{key} = {value!r}' for key, value in values.items())]
    return '\n'.join([f'_base_ = {BASES[scope]}', *lines]) + '\n'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('old')


def test_configs_are_built_or_refused(folder):
    built = []

    @LIMITS
    @given(text=old_configs())
    def check(text: str) -> None:
        (folder / 'old.py').write_text(text)
        new = folder / 'new.py'
        new.unlink(missing_ok=True)
        message = ''
        try:
            report = migrate(folder / 'old.py', new)
        except UserError as error:
            message = str(error)
        assert new.is_file() != bool(message)
        built.append(not message)
        if message:
            assert 20 < len(message) < 1500
            assert 'Please report' not in message, text
            assert 'PolicyLR' not in message, text  # a type that no old config names
        else:
            assert 'arnings' in report
    check()
    assert sum(built) > len(built) / 4, 'most that is refused has one wrong name among many keys'
