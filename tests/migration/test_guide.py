"""The snippets of a guide for the old versions convert and train, unchanged."""
from pathlib import Path

import pytest
from mmengine.config import Config

from convnext_mm.engine.checks import read_config
from convnext_mm.migration.writing import migrate
from tests.helpers import SMALL_DETECTION, SMALL_SEGMENTATION, call_tool, run_tool

# Section 3.2: a segmentor of size tiny.
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
# Section 3.2: a detector of size base.
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
# Section 4.2: mixed precision, layer decay and batch size, for the segmentor above.
TINY_NAME = 'upernet_convnext_tiny_512_160k_ade20k_ms.py'
INHERIT_TINY = f"_base_ = './{TINY_NAME}'\n"
HOOK = '''optimizer_config = dict(
    type="DistOptimizerHook",
    update_interval=1,
    use_fp16=True  # Tiny/Small/Base
)
'''
DECAY = '''paramwise_cfg={'decay_rate': 0.9,
    'decay_type': 'stage_wise',
    'num_layers': 12}
'''
BATCH = 'data=dict(samples_per_gpu=2)\n'


@pytest.mark.parametrize(('name', 'text', 'get', 'expected'), [
    (TINY_NAME, TINY, lambda cfg: cfg.optim_wrapper.paramwise_cfg,
     dict(decay_rate=0.9, num_layers=6, decay_type='stage_wise')),
    ('a.py', INHERIT_TINY + HOOK, lambda cfg: cfg.optim_wrapper.type, 'AmpOptimWrapper'),
    ('a.py', INHERIT_TINY + DECAY, lambda cfg: cfg.optim_wrapper.paramwise_cfg.num_layers, 12),
    ('a.py', INHERIT_TINY + BATCH, lambda cfg: cfg.train_dataloader.batch_size, 2)],
    ids=['tiny', 'hook', 'decay', 'batch'])
def test_segmentation_snippets_convert(name, text, get, expected, tmp_path):
    (tmp_path / name).write_text(text)
    report = migrate(tmp_path / name, tmp_path / 'new' / name)
    assert report.endswith('\nNo warnings.')
    assert ("decay_type='stage_wise', as in our recipe" in report) == (text == TINY)
    cfg = read_config(str(tmp_path / 'new' / name))
    assert get(cfg) == expected
    assert cfg.model.backbone.arch == 'tiny'
    assert cfg.test_time_augmentation, 'the name is that of the recipe with augmentation'


def train(path: Path, *options: str) -> tuple[str, Config]:
    """Train an old config with ``--migrate``; return the report and the new config."""
    work_dir = path.parent / 'run'
    done = run_tool('tools/train.py', path, '--migrate', '--work-dir', work_dir, '--cfg-options',
                    'train_dataloader.num_workers=0', 'val_dataloader.num_workers=0',
                    'train_dataloader.persistent_workers=False',
                    'val_dataloader.persistent_workers=False', *options)
    report = (work_dir / 'migrated' / 'report.txt').read_text()
    assert report in done.stdout
    return report, read_config(str(work_dir / 'migrated' / path.name))


@pytest.mark.slow
def test_segmentation_snippets_train(demo_data, tmp_path):
    (tmp_path / TINY_NAME).write_text(TINY)
    (tmp_path / 'a.py').write_text(INHERIT_TINY + HOOK + DECAY + BATCH)
    small = [option.replace('max_iters=4', 'max_iters=2') for option in SMALL_SEGMENTATION]
    report, cfg = train(tmp_path / 'a.py', f'data_root={demo_data}/ADEChallengeData2016', *small)
    assert report.endswith('\nNo warnings.\n')
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert cfg.optim_wrapper.paramwise_cfg.num_layers == 12
    assert (tmp_path / 'run' / 'iter_2.pth').is_file()


@pytest.mark.slow
def test_detection_snippet_trains(demo_data, tmp_path):
    (tmp_path / 'cascade_mask_rcnn_convnext_base_coco.py').write_text(BASE)
    report, cfg = train(
        tmp_path / 'cascade_mask_rcnn_convnext_base_coco.py', f'data_root={demo_data}/coco/',
        "classes=('ball','crate','star','leaf')", *SMALL_DETECTION,
        'train_dataloader.dataset.indices=2', 'val_dataloader.dataset.indices=1',
        'val_dataloader.dataset.pipeline.1.scale=(96,96)', *(
            f'train_dataloader.dataset.pipeline.3.transforms.{step}.scales=[(96,96)]'
            for step in ('0.0', '1.0', '1.2')),
        'model.train_cfg.rpn_proposal.max_per_img=20', 'model.test_cfg.rpn.max_per_img=20')
    assert 'merged into each of the 3 stages' in report
    assert (tmp_path / 'run' / 'epoch_1.pth').is_file()
    assert cfg.model.backbone.arch == 'base'
    assert cfg.optim_wrapper.paramwise_cfg.num_layers == 12
    assert [head.bbox_coder.target_stds[0] for head in cfg.model.roi_head.bbox_head] == [
        0.1, 0.05, 0.033]
    assert [scheduler.type for scheduler in cfg.param_scheduler] == ['LinearLR', 'PolyLR']


def test_training_an_old_config_names_the_command_that_converts_it(tmp_path):
    path = tmp_path / TINY_NAME
    path.write_text(TINY)
    done = call_tool('tools/train.py', path)
    assert done.returncode == 2
    assert 'is a config for mmcv 0.x or 1.x (it sets optimizer)' in done.stderr
    new = path.with_name(f'{path.stem}_new.py')
    command = f'tools/migrate_config.py {path} {new}'
    assert f'python {command}' in done.stderr
    converted = call_tool(*command.split())
    assert (converted.returncode, converted.stderr) == (0, '')
    assert converted.stdout.startswith(f'{path} → {new}\n')
    assert read_config(str(new)).optim_wrapper.optimizer.type == 'AdamW'


def test_default_name_of_the_new_config(tmp_path):
    (tmp_path / 'old.py').write_text(TINY)
    assert call_tool('tools/migrate_config.py', tmp_path / 'old.py').returncode == 0
    assert read_config(str(tmp_path / 'old_new.py')).model.backbone.arch == 'tiny'
