"""The lines that every run begins with, and what a config builds before it."""
import re
from pathlib import Path

import pytest
from mmengine.config import Config

from convnext_mm import UserError
from convnext_mm.engine import building, checks
from convnext_mm.engine.summary import summarize
from tests.helpers import DETECTION, ROOT, SEGMENTATION, call_tool


def lines_of(config: str, options: dict | None = None, training: bool = True) -> dict[str, str]:
    notes: list[str] = []
    cfg = checks.read_config(config, options, notes)
    before = cfg.to_dict()
    text = summarize(cfg, notes, training)
    assert cfg.to_dict() == before
    top, _, followed = text.partition('\nAdjusted to your changes:')
    lines = dict(re.split('  +', line, maxsplit=1) for line in top.splitlines())
    return {**lines, 'followed': followed}


def test_a_segmentor():
    lines = lines_of(SEGMENTATION)
    assert list(lines) == ['Model', 'Weights', 'Train data', 'Val data', 'Classes', 'Images',
                           'Schedule', 'Optimizer', 'Layer decay', 'followed']
    assert lines['Model'] == 'UPerHead on ConvNeXt tiny, 60.2 M parameters'
    assert lines['Classes'].startswith('150: wall, building')
    assert lines['Classes'].endswith('; 0 in a mask is no class')
    assert '2048×512, cropped to 512×512, 2 in a batch' in lines['Images']
    assert lines['Schedule'] == ('160000 iterations, learning rate from 1e-10 to 0.0001, at the '
                                 'end 6.25e-10; validation every 16000, checkpoint every 16000')
    assert lines['Layer decay'] == ('stage_wise, 0.9 a layer; 12 parameter groups, learning rates '
                                    'from 4.78e-05 to 0.0001')
    assert lines['followed'] == ''


def test_a_detector():
    lines = lines_of(DETECTION)
    assert lines['Model'].startswith('CascadeRoIHead on ConvNeXt tiny, ')
    assert lines['Train data'].endswith('annotations/instances_train2017.json, train2017/')
    assert 'at the end 2e-06; validation every 1' in lines['Schedule']
    assert lines['Layer decay'].startswith('layer_wise, 0.7 a layer; 16 parameter groups')


def test_what_followed_is_listed_once_for_all_places():
    lines = lines_of(SEGMENTATION, {'num_workers': 0, 'scale': (64, 64), 'max_iters': 80})
    assert ('\n  train_dataloader.dataset.pipeline, val_dataloader.dataset.pipeline, '
            'test_dataloader.dataset.pipeline scale images to (64, 64)') in lines['followed']
    assert '80 iterations instead of 160000' in lines['followed']
    assert 'num_workers' not in lines['followed']  # as asked
    assert lines['Schedule'].startswith('80 iterations')


def test_a_test_has_no_schedule():
    assert list(lines_of(SEGMENTATION, training=False)) == [
        'Model', 'Test data', 'Classes', 'Images', 'followed']


@pytest.mark.parametrize(('option', 'message'), [
    ({'model.decode_head.in_index': [0, 1, 9]}, 'in_index names map 9'),
    ({'model.backbone.drop_path_rate': -1.0}, 'drop_path_rate'),
    ({'model.decode_head.in_index': 'all'}, 'cannot be built|in_index'),
    ({'optim_wrapper.optimizer.lr': -1.0}, 'optim_wrapper cannot be built: .*learning rate: -1'),
    ({'param_scheduler.1.power': 'x'}, r'param_scheduler cannot be built: TypeError')])
def test_what_cannot_be_built_is_named(option, message):
    with pytest.raises(UserError, match=message):
        lines_of(SEGMENTATION, option)


def test_rates_are_those_of_mmengine():
    cfg = Config(dict(
        train_cfg=dict(max_iters=10), optim_wrapper=dict(optimizer=dict(lr=1.0)),
        param_scheduler=[dict(type='PolyLR', power=1.0, by_epoch=False, begin=0, end=11)]))
    assert building.learning_rates(cfg) == (1.0, pytest.approx(0.1))
    cfg.train_cfg = dict(max_epochs=3)
    cfg.param_scheduler = [dict(type='LinearLR', start_factor=0.5, by_epoch=False, end=5),
                           dict(type='MultiStepLR', milestones=[1, 2], gamma=0.1)]
    assert building.learning_rates(cfg) == (0.5, pytest.approx(0.01))


def test_a_dry_run_writes_the_config_and_trains_nothing(demo_data, tmp_path):
    done = call_tool('tools/train.py', 'configs/demo/upernet_convnext_demo.py', '--dry-run',
                     '--work-dir', tmp_path, '--cfg-options',
                     f'data_root={demo_data}/ADEChallengeData2016')
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ['upernet_convnext_demo.py']
    assert f'Whole config: {tmp_path}/upernet_convnext_demo.py' in done.stdout
    assert 'Data: train ' in done.stdout
    assert len(done.stdout.splitlines()) < 25


def test_a_config_in_the_work_dir_is_not_replaced(demo_data, tmp_path):
    config = tmp_path / 'mine.py'
    text = (f"_base_ = 'convnext_mm::demo/upernet_convnext_demo.py'  # by hand\n"
            f"data_root = '{demo_data}/ADEChallengeData2016'\n")
    config.write_text(text)
    done = call_tool('tools/train.py', config, '--dry-run', '--work-dir', tmp_path)
    assert done.returncode == 0, done.stderr
    assert config.read_text() == text


def build(tmp_path: Path, text: str, recipe: str = f'{ROOT}/{SEGMENTATION}') -> None:
    """Build the model of a recipe with some lines of a user's, as every run does first."""
    (tmp_path / 'mine.py').write_text(f"_base_ = '{recipe}'\n{text}")
    building.build_parts(checks.read_config(str(tmp_path / 'mine.py'), notes=[]))


RESNET = """model = dict(backbone=dict(type='ResNet', depth=50){})
optim_wrapper = dict(constructor='DefaultOptimWrapperConstructor', paramwise_cfg=None)"""


def test_heads_fit_the_maps_of_any_backbone(tmp_path):
    with pytest.raises(UserError, match=r'model.decode_head does not fit maps of \[256, 512, 1024, '
                                        r'2048\] channels, see its in_channels'):
        build(tmp_path, RESNET.format(''))
    build(tmp_path, RESNET.format(', decode_head=dict(in_channels=[256, 512, 1024, 2048]), '
                                  'auxiliary_head=dict(in_channels=1024)'))


@pytest.mark.parametrize('recipe', [
    'mmdet::double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py',  # boxes of two inputs
    'mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
    'mmdet::pascal_voc/faster-rcnn_r50-caffe-c4_ms-18k_voc0712.py',  # a stage before the heads
    'mmdet::carafe/faster-rcnn_r50_fpn-carafe_1x_coco.py',  # an operator without shapes alone
    'mmseg::ocrnet/ocrnet_hr18_4xb4-80k_ade20k-512x512.py'])  # a head that reads another's
def test_parts_that_need_more_than_maps_are_not_run(recipe, tmp_path):
    build(tmp_path, '', recipe)
