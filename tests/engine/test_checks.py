"""Checks of config, options, data and weights."""
import pytest
import torch
from mmengine.config import Config
from PIL import Image

from convnext_mm import UserError
from convnext_mm.engine import cfg_options, checks
from tests.helpers import DETECTION, ROOT, SEGMENTATION


def test_unknown_config_suggests_a_similar_one():
    with pytest.raises(UserError, match=r'Config not found.*\n.*upernet_convnext_tiny_512_160k'):
        checks.load_config('configs/upernet_convnext_tiny_512_ade20k.py')


def test_broken_config_is_named(tmp_path):
    path = tmp_path / 'broken.py'
    path.write_text('model = dict(\n')
    with pytest.raises(UserError, match=r'broken.py cannot be read: SyntaxError'):
        checks.load_config(str(path))


@pytest.mark.parametrize(('option', 'message'), [
    ({'modle.backbone.dims': [1]}, 'no key .modle.. Did you mean model'),
    ({'optim_wrapper.optimizer.lrr': 1}, "optim_wrapper.optimizer has no key 'lrr'.*mean lr"),
    ({'train_dataloader.batchsize': 4}, 'mean batch_size'),
    ({'model.decode_hed.num_classes': 4}, 'mean decode_head'),
    ({'param_scheduler.7.end': 4}, 'param_scheduler is a list of length 2'),
    ({'model.backbone.drop_path_rate.x': 4}, "model.backbone.drop_path_rate is 0.4.* no key 'x'"),
    ({'zzz': 4}, 'Its keys: '),
    ({'model': 4}, 'is a group of keys')])
def test_misspelled_options_are_named_and_change_nothing(option, message):
    cfg = Config.fromfile(SEGMENTATION)
    before = cfg.to_dict()
    with pytest.raises(UserError, match=message):
        cfg_options.apply_options(cfg, option)
    assert cfg.to_dict() == before


@pytest.mark.parametrize(('option', 'value', 'get'), [
    ('optim_wrapper.optimizer.lr', 1, lambda cfg: cfg.optim_wrapper.optimizer.lr),
    ('model.backbone.init_cfg', None, lambda cfg: cfg.model.backbone.init_cfg),
    ('optim_wrapper.clip_grad.max_norm', 1, lambda cfg: cfg.optim_wrapper.clip_grad.max_norm),
    ('optim_wrapper.dtype', 'bfloat16', lambda cfg: cfg.optim_wrapper.dtype),
    ('optim_wrapper.accumulative_counts', 4, lambda cfg: cfg.optim_wrapper.accumulative_counts),
    ('model.backbone.with_cp', True, lambda cfg: cfg.model.backbone.with_cp),
    ('randomness.seed', 3, lambda cfg: cfg.randomness.seed),
    ('find_unused_parameters', True, lambda cfg: cfg.find_unused_parameters),
    ('param_scheduler.0.end', 9, lambda cfg: cfg.param_scheduler[0].end),
    ('train_dataloader.dataset.pipeline.2.scale', (9, 9),
     lambda cfg: cfg.train_dataloader.dataset.pipeline[2].scale)])
def test_valid_options_are_applied(option, value, get):
    cfg = Config.fromfile(SEGMENTATION)
    cfg_options.apply_options(cfg, {option: value})
    assert get(cfg) == value


def test_missing_data_is_listed_with_advice():
    cfg = Config.fromfile(SEGMENTATION)
    with pytest.raises(UserError) as error:
        checks.check_data_exists(cfg, ('train', 'val'))
    message = str(error.value)
    for expected in ('data/ade/ADEChallengeData2016/images/training  images (train)',
                     'annotations/validation  masks (val)', 'ADEChallengeData2016.zip',
                     'make demo', '--cfg-options data_root='):
        assert expected in message
    with pytest.raises(UserError, match=r'instances_train2017.json  annotation file \(train\)'):
        checks.check_data_exists(Config.fromfile(DETECTION), ('train', 'val'))


@pytest.mark.parametrize(('config', 'folder'), [
    (SEGMENTATION, 'ADEChallengeData2016'), (DETECTION, 'coco')])
def test_data_root_replaces_every_path(config, folder, demo_data):
    cfg = Config.fromfile(config)
    with pytest.raises(UserError, match='Data not found'):
        checks.check_data_exists(cfg, ('train', 'val', 'test'))
    cfg_options.apply_options(cfg, {'data_root': str(demo_data / folder)})
    checks.check_data_exists(cfg, ('train', 'val', 'test'))


def test_a_similar_folder_is_named(tmp_path):
    (tmp_path / 'images' / 'train').mkdir(parents=True)
    data = dict(type='BaseSegDataset', data_root=str(tmp_path),
                data_prefix=dict(img_path='images/trian'))
    cfg = Config(dict(default_scope='mmseg', train_dataloader=dict(dataset=data)))
    with pytest.raises(UserError, match=r'images/trian  images \(train\)\. Did you mean train\?\n'):
        checks.check_data_exists(cfg, ('train',))


def test_an_empty_folder_is_missing_data(tmp_path):
    cfg = Config.fromfile(SEGMENTATION)
    for part in ('images', 'annotations'):
        for split in ('training', 'validation'):
            (tmp_path / part / split).mkdir(parents=True)
    cfg_options.apply_options(cfg, {'data_root': str(tmp_path)})
    with pytest.raises(UserError, match=r'images \(train\), empty'):
        checks.check_data_exists(cfg, ('train',))


INNER = dict(type='CocoDataset', data_root='/nowhere', ann_file='a.json',
             data_prefix=dict(img='b/'))


@pytest.mark.parametrize('dataset', [
    dict(type='RepeatDataset', times=2, dataset=INNER),
    dict(type='ConcatDataset', datasets=[INNER])])
def test_wrapped_datasets_are_checked(dataset):
    cfg = Config(dict(train_dataloader=dict(dataset=dataset), default_scope='mmdet'))
    with pytest.raises(UserError, match='/nowhere/a.json'):
        checks.check_data_exists(cfg, ('train',))


@pytest.mark.parametrize('load_from', [None, 'weights.pth'])
def test_a_missing_pretrained_file_is_found_before_a_model_is_built(load_from, tmp_path):
    if load_from:
        load_from = str(tmp_path / load_from)
        torch.save(dict(state_dict={'a': torch.zeros(1)}), load_from)
    cfg = Config(dict(load_from=load_from, model=dict(backbone=dict(
        type='ConvNeXt', init_cfg=dict(type='Pretrained', checkpoint='/nowhere/tiny.pth')))))
    with pytest.raises(UserError, match=r'(?s)/nowhere/tiny.pth.*model.backbone.init_cfg=None'):
        checks.check_weights(cfg, training=True)
    checks.check_weights(cfg, training=False)


@pytest.mark.parametrize(('absent', 'message'), [
    ('mmdet', 'needs mmdet, which is not installed'),
    ('mmcv._ext', 'CONVNEXT_MM_PATCHES switches off ours')])
def test_a_missing_package_is_named(absent, message, monkeypatch):
    monkeypatch.setattr(checks, 'find_spec', lambda name: None if name == absent else name)
    checks.check_toolbox(Config(dict(default_scope='mmseg')))
    with pytest.raises(UserError, match=message):
        checks.check_toolbox(Config(dict(default_scope='mmdet')))


def test_a_toolbox_for_an_old_mmcv_is_named(monkeypatch):
    def assertion(name):
        raise AssertionError('MMCV==2.1.0 is used but incompatible. Please install mmcv<=1.4.0.')
    monkeypatch.setattr(checks, 'import_module', assertion)
    message = (r'needs mmseg, but /.*/mmseg/__init__.py cannot be imported \(AssertionError: '
               r'MMCV==2.1.0 .*PYTHONPATH')
    with pytest.raises(UserError, match=message):
        checks.check_toolbox(Config(dict(default_scope='mmseg')))


def test_unknown_backbone_arguments_are_named(tmp_path):
    message = "model.backbone.zzz: ConvNeXt has no argument 'zzz'.*arch, "
    with pytest.raises(UserError, match=message):
        checks.read_config(SEGMENTATION, {'model.backbone.zzz': 1})
    path = tmp_path / 'mine.py'
    path.write_text(f"_base_ = '{ROOT}/{DETECTION}'\nmodel = dict(backbone=dict(drop_rate=0.1))\n")
    with pytest.raises(UserError, match=r"no argument 'drop_rate'.*mean drop_path_rate"):
        checks.read_config(str(path))


@pytest.mark.parametrize(('length', 'fails'), [(6, False), (5, False), (12, True)])
def test_a_run_that_is_resumed_for_longer_than_its_schedule(length, fails):
    cfg = Config(dict(train_cfg=dict(max_iters=length)))
    states = [dict(by_epoch=False, begin=0, end=3, param_name='lr'),
              dict(by_epoch=False, begin=3, end=7, param_name='lr'),
              dict(by_epoch=False, begin=0, end=10**9, param_name='momentum')]
    if not fails:
        checks.check_resumed_schedule(cfg, 'iter_6.pth', dict(param_schedulers=states))
        return
    with pytest.raises(UserError, match='trains for 12 iterations, but iter_6.pth.* ends at 6.*'
                                        'load_from=iter_6.pth'):
        checks.check_resumed_schedule(cfg, 'iter_6.pth', dict(param_schedulers=states))


def test_only_unknown_structures_are_not_checked(monkeypatch, capsys):
    cfg = Config(dict(default_scope='mmseg'))

    def inspect(*args):
        raise error
    monkeypatch.setattr(checks.inspection, 'inspect_splits', inspect)
    error: Exception = KeyError('img_path')
    checks.check_data_sample(cfg, ('train',))
    assert "Data: not checked (KeyError: 'img_path')" in capsys.readouterr().out
    error = UserError('a mistake')
    with pytest.raises(UserError, match='a mistake'):
        checks.check_data_sample(cfg, ('train',))


def training(folder, sizes: list[tuple[int, int]], text: str) -> Config:
    """The config of a segmentor that trains on images of these sizes, by epochs."""
    for name in ('images', 'masks'):
        (folder / name).mkdir()
        for i, (width, height) in enumerate(sizes):
            Image.new('L', (width, height)).save(folder / name / f'{i}.png')
    (folder / 'mine.py').write_text(f"""_base_ = '{ROOT / SEGMENTATION}'
data_root, classes, reduce_zero_label = '{folder}', ('a', 'b'), False
train_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
                  dict(type='PackSegInputs')]
train_dataloader = dict(dataset=dict(img_suffix='.png', data_prefix=dict(
    img_path='images', seg_map_path='masks')))
{text}""")
    return checks.read_config(str(folder / 'mine.py'), notes=[])


def test_images_of_training_have_one_size(tmp_path):
    """Where they are padded to one."""
    cfg = training(tmp_path, [(500, 100), (40, 512), (600, 300), (300, 700)],
                   'model = dict(data_preprocessor=dict(size=(512, 500)))')
    with pytest.raises(UserError, match=(
            r'(?s)train_dataloader.batch_size=2, but images have different sizes: .*0.png \(500×512'
            r'\), .*2.png \(600×512\). Set model.data_preprocessor.size_divisor=32 instead')):
        checks.check_batches(cfg, ('train',))
    cfg.model.data_preprocessor.size = (700, 600)
    checks.check_batches(cfg, ('train',))


EPOCHS = """train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=5)
param_scheduler = []
"""


@pytest.mark.parametrize(('count', 'loader', 'left_out'), [
    (5, '', True), (4, '', None), (5, ', batch_size=3', None), (5, ', drop_last=False', 'refused'),
    (1, '', 'refused')])
def test_a_last_batch_of_one_image(count, loader, left_out, tmp_path, capsys):
    cfg = training(tmp_path, [(64, 64)] * count, EPOCHS + (
        f"train_dataloader['sampler'] = dict(type='DefaultSampler')\n"
        f'train_dataloader.update(dict({loader[2:]}))'))
    if left_out == 'refused':
        with pytest.raises(UserError, match=f'has {count} images, 2 in a batch: the last.* one'):
            checks.check_batches(cfg, ('train',))
        return
    checks.check_batches(cfg, ('train',))
    assert cfg.train_dataloader.get('drop_last') is left_out
    assert ('It is left out (train_dataloader.drop_last=True)' in capsys.readouterr().out) == bool(
        left_out)
