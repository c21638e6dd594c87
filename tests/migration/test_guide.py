"""The snippets of the guide that users come from, as they stand there, train on the demo's data."""
import pytest

from tests.helpers import SMALL_DETECTION, SMALL_SEGMENTATION, run_tool

# Section 3.2: an embedded segmentor, tiny.
TINY = '''# upernet_convnext_tiny_512_160k_ade20k_ms.py
model = dict(
    backbone=dict(
        type='ConvNeXt',
        in_chans=3,
        depths=[3, 3, 9, 3],
        dims=[96, 192, 384, 768],
        drop_path_rate=0.4,
        layer_scale_init_value=1.0,
        out_indices=[0, 1, 2, 3],
    ),
    decode_head=dict(
        in_channels=[96, 192, 384, 768],
        num_classes=150,
    ),
    auxiliary_head=dict(
        in_channels=384,
        num_classes=150
    ),
)
optimizer = dict(
    constructor='LearningRateDecayOptimizerConstructor',
    type='AdamW',
    lr=0.0001,
    betas=(0.9, 0.999),
    weight_decay=0.05,
    paramwise_cfg={'decay_rate': 0.9, 'num_layers': 6}
)
'''
# Section 3.2: a detector, base.
BASE = '''# cascade_mask_rcnn_convnext_base_coco.py
model = dict(
    backbone=dict(
        type='ConvNeXt',
        in_chans=3,
        depths=[3, 3, 27, 3],
        dims=[128, 256, 512, 1024],
        drop_path_rate=0.7,
        layer_scale_init_value=1.0,
        out_indices=[0, 1, 2, 3],
    ),
    neck=dict(
        in_channels=[128, 256, 512, 1024]
    ),
    roi_head=dict(
        bbox_head=[
            dict(
                type='ConvFCBBoxHead',
                num_shared_convs=4,
                in_channels=256,
                num_classes=80,
                loss_bbox=dict(type='GIoULoss', loss_weight=10.0)
            )
        ]
    )
)
lr_config = dict(
    policy='poly',
    warmup='linear',
    warmup_iters=1500,
    power=1.0,
    min_lr=0.0
)
'''
# Section 4.2: mixed precision, layer decay, batch size; each over the guide's tiny segmentor.
OVER_TINY = "_base_ = './upernet_convnext_tiny_512_160k_ade20k_ms.py'\n"
HOOK = OVER_TINY + '''optimizer_config = dict(
    type="DistOptimizerHook",
    update_interval=1,
    use_fp16=True  # Tiny/Small/Base
)
'''
DECAY = OVER_TINY + '''paramwise_cfg={'decay_rate': 0.9,
    'decay_type': 'stage_wise',
    'num_layers': 12}
'''
BATCH = OVER_TINY + 'data=dict(samples_per_gpu=2)\n'


def train(name: str, text: str, tmp_path, *options: str) -> tuple[str, dict]:
    """Train an old config by ``--migrate``; what was said, and the new config."""
    from convnext_mm.engine.checks import read_config
    (tmp_path / name).write_text(text)
    done = run_tool('tools/train.py', tmp_path / name, '--migrate', '--work-dir', tmp_path / 'run',
                    '--cfg-options', *options)
    assert 'Traceback' not in done.stderr
    report = (tmp_path / 'run' / 'migrated' / 'report.txt').read_text()
    assert report in done.stdout
    return done.stdout + done.stderr, read_config(str(tmp_path / 'run' / 'migrated' / name))


@pytest.mark.parametrize(('name', 'text', 'check'), [
    ('upernet_convnext_tiny_512_160k_ade20k_ms.py', TINY, lambda cfg, said: (
        cfg.optim_wrapper.paramwise_cfg == dict(
            decay_rate=0.9, num_layers=6, decay_type='stage_wise')
        and "decay_type='stage_wise', as in our recipe" in said)),
    ('a.py', HOOK, lambda cfg, _: cfg.optim_wrapper.type == 'AmpOptimWrapper'),
    ('a.py', DECAY, lambda cfg, _: cfg.optim_wrapper.paramwise_cfg.num_layers == 12),
    ('a.py', BATCH, lambda cfg, _: cfg.train_dataloader.batch_size == 2)],
    ids=['tiny', 'hook', 'decay', 'batch'])
def test_segmentation(name, text, check, demo_data, tmp_path):
    small = [o.replace('max_iters=4', 'max_iters=2') for o in SMALL_SEGMENTATION]
    said, cfg = train(name, text, tmp_path, f'data_root={demo_data}/ADEChallengeData2016',
                      *small, 'train_dataloader.num_workers=0', 'val_dataloader.num_workers=0',
                      'train_dataloader.persistent_workers=False',
                      'val_dataloader.persistent_workers=False')
    assert 'Nothing was lost.' in said
    assert (tmp_path / 'run' / 'iter_2.pth').is_file()
    assert cfg.model.backbone.arch == 'tiny'
    assert cfg.test_time_augmentation, 'the guide names the recipe of multi-scale tests'
    assert check(cfg, said)


def test_detection(demo_data, tmp_path):
    said, cfg = train(
        'cascade_mask_rcnn_convnext_base_coco.py', BASE, tmp_path, f'data_root={demo_data}/coco/',
        "classes=('ball','crate','star','leaf')", *SMALL_DETECTION,
        'train_dataloader.dataset.indices=2', 'val_dataloader.dataset.indices=1',
        'train_dataloader.batch_size=1', 'train_dataloader.num_workers=0',
        'val_dataloader.num_workers=0', 'train_dataloader.persistent_workers=False',
        'val_dataloader.persistent_workers=False')
    assert 'each of the 3 stages' in said
    assert (tmp_path / 'run' / 'epoch_1.pth').is_file()
    assert cfg.model.backbone.arch == 'base'
    assert cfg.optim_wrapper.paramwise_cfg.num_layers == 12
    assert [head.bbox_coder.target_stds[0] for head in cfg.model.roi_head.bbox_head] == [
        0.1, 0.05, 0.033]
    assert [scheduler.type for scheduler in cfg.param_scheduler] == ['LinearLR', 'PolyLR']


def test_without_migrate_the_command_is_said(tmp_path):
    path = tmp_path / 'upernet_convnext_tiny_512_160k_ade20k_ms.py'
    path.write_text(TINY)
    done = run_tool('tools/train.py', path, check=False)
    assert done.returncode == 2
    assert 'is a config for mmcv 0.x or 1.x (it sets optimizer)' in done.stderr
    command = f'tools/migrate_config.py {path} {tmp_path}/{path.stem}_new.py'
    assert f'python {command}' in done.stderr
    assert 'Traceback' not in done.stderr
    run_tool(*command.split())
    assert (tmp_path / f'{path.stem}_new.py').is_file()
