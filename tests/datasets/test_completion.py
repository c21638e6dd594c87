"""Four lines of a config, and what follows from them."""
from pathlib import Path

import pytest

from convnext_mm import UserError
from convnext_mm.datasets.completion import heads
from convnext_mm.engine.checks import read_config
from tests.helpers import DETECTION, ROOT, SEGMENTATION, run_tool

SEG = f'''_base_ = '{ROOT}/{SEGMENTATION}'
data_root = 'data/mine'
train_dataloader = dict(dataset=dict(data_prefix=dict(img_path='a', seg_map_path='b')))
val_dataloader = dict(dataset=dict(data_prefix=dict(img_path='c', seg_map_path='d')))
classes = ('road', 'car', 'sky')
'''
DET = f'''_base_ = '{ROOT}/{DETECTION}'
data_root = 'data/mine'
train_dataloader = dict(dataset=dict(ann_file='train.json', data_prefix=dict(img='a')))
val_dataloader = dict(dataset=dict(ann_file='val.json', data_prefix=dict(img='b')))
classes = ('ball', 'crate')
'''


@pytest.fixture
def read(tmp_path):
    def read(text: str, options: dict | None = None, name: str = 'mine.py'):
        (tmp_path / name).write_text(text)
        return read_config(str(tmp_path / name), options)
    return read


def loaders(cfg) -> list:
    return [cfg[f'{split}_dataloader'].dataset for split in ('train', 'val', 'test')]


def test_segmentation_in_four_lines(read):
    cfg = read(SEG)
    assert [dict(d.data_prefix) for d in loaders(cfg)] == [
        dict(img_path='a', seg_map_path='b'), *[dict(img_path='c', seg_map_path='d')] * 2]
    for dataset in loaders(cfg):
        assert dataset.type == 'BaseSegDataset', "ADE20K's would look for its own names"
        assert dataset.data_root == 'data/mine'
        assert dataset.metainfo == dict(classes=('road', 'car', 'sky'))
        assert (dataset.img_suffix, dataset.seg_map_suffix) == ('.jpg', '.png')
        assert dataset.reduce_zero_label is True, 'as in the recipe'
    assert dict(heads(cfg.model)).keys() == {'model.decode_head', 'model.auxiliary_head'}
    assert {head.num_classes for _, head in heads(cfg.model)} == {3}


def test_detection_in_four_lines(read):
    cfg = read(DET)
    assert [(d.ann_file, d.data_prefix.img) for d in loaders(cfg)] == [
        ('train.json', 'a'), ('val.json', 'b'), ('val.json', 'b')]
    assert {d.data_root for d in loaders(cfg)} == {'data/mine'}
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == 'data/mine/val.json'
    assert [path for path, _ in heads(cfg.model)] == [
        'model.roi_head.mask_head', *(f'model.roi_head.bbox_head.{i}' for i in range(3))]
    assert {head.num_classes for _, head in heads(cfg.model)} == {2}


def test_three_mask_heads(read):
    cfg = read(DET + '''
model = dict(roi_head=dict(mask_head=[_base_.model.roi_head.mask_head] * 3))
''')
    found = [head.num_classes for path, head in heads(cfg.model)]
    assert found == [2] * 6


def test_the_models_are_built_with_these_classes(read):
    from convnext_mm.complexity import build_on_meta
    model = build_on_meta(read(SEG))
    assert [h.conv_seg.out_channels for h in (model.decode_head, model.auxiliary_head)] == [3, 3]
    model = build_on_meta(read(DET))
    assert [head.fc_cls.out_features for head in model.roi_head.bbox_head] == [3, 3, 3]
    assert [head.conv_logits.out_channels for head in model.roi_head.mask_head] == [2, 2, 2]


def test_a_recipe_itself_is_left_as_it_is():
    from mmengine.config import Config

    from convnext_mm.datasets import as_written
    for config in (SEGMENTATION, DETECTION, SEGMENTATION.replace('.py', '_ms.py')):
        with as_written():
            before = Config.fromfile(config)
        cfg = read_config(config)
        for dataset in (*loaders(before), *loaders(cfg)):
            dataset.setdefault('reduce_zero_label', True)  # what ADE20K's data set has anyway
        assert cfg.to_dict() == before.to_dict()


def test_other_readers_of_configs_get_it_complete(tmp_path):
    """Such as the scripts and inferencers of mmseg and mmdet, in a process of their own."""
    (tmp_path / 'mine.py').write_text(SEG)
    read = ('from mmengine.config import Config; '
            f'cfg = Config.fromfile("{tmp_path}/mine.py"); '
            'print(cfg.model.decode_head.num_classes, cfg.test_dataloader.dataset.data_root)')
    (tmp_path / 'read.py').write_text(read)
    assert run_tool(tmp_path / 'read.py').stdout.strip().endswith('3 data/mine')


def test_palette_masks_and_suffixes_follow(read):
    cfg = read(SEG + '''palette = [[0, 0, 0], [255, 0, 0], [0, 0, 255]]
reduce_zero_label = False
img_suffix = '.tif'
seg_map_suffix = '_mask.png'
''')
    for dataset in loaders(cfg):
        assert dataset.metainfo.palette == [(0, 0, 0), (255, 0, 0), (0, 0, 255)]
        assert (dataset.img_suffix, dataset.seg_map_suffix) == ('.tif', '_mask.png')
        assert dataset.reduce_zero_label is False
        assert [step.reduce_zero_label for step in dataset.pipeline
                if step.type == 'LoadAnnotations'] == [False]
    assert cfg.tta_pipeline[1].transforms[2][0].reduce_zero_label is False


def test_a_pipeline_follows_its_data_set(read):
    """mmseg stops in the first iteration where they differ."""
    cfg = read(SEG + 'train_dataloader["dataset"]["reduce_zero_label"] = False\n')
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert steps['LoadAnnotations'].reduce_zero_label is False


def test_one_more_level_and_options(read, tmp_path):
    read(SEG)
    cfg = read(f"_base_ = '{tmp_path}/mine.py'\ndata_root = 'data/other'\nclasses = ('x', 'y')\n",
               name='other.py')
    assert {d.data_root for d in loaders(cfg)} == {'data/other'}
    assert {d.metainfo.classes for d in loaders(cfg)} == {('x', 'y')}
    assert {head.num_classes for _, head in heads(cfg.model)} == {2}
    cfg = read(DET, {'data_root': 'elsewhere', 'classes': ('z',)})
    assert {d.data_root for d in loaders(cfg)} == {'elsewhere'}
    assert cfg.test_evaluator.ann_file == 'elsewhere/val.json'
    assert {head.num_classes for _, head in heads(cfg.model)} == {1}


def test_classes_from_a_file_and_from_metainfo(read, tmp_path):
    (tmp_path / 'names.txt').write_text('road\ncar\n\nsky\nsea\n')
    cfg = read(SEG.replace("('road', 'car', 'sky')", f"'{tmp_path}/names.txt'"))
    assert loaders(cfg)[0].metainfo.classes == ('road', 'car', 'sky', 'sea')
    cfg = read(f'''_base_ = '{ROOT}/{SEGMENTATION}'
mine = dict(type='BaseSegDataset', data_root='data/mine', metainfo=dict(classes=['a', 'b']))
train_dataloader = dict(dataset=mine)
val_dataloader = dict(dataset=mine)
test_dataloader = dict(dataset=mine)
''')
    assert {head.num_classes for _, head in heads(cfg.model)} == {2}
    assert loaders(cfg)[0].reduce_zero_label is True


def test_some_classes_of_ade20k(read):
    """The recipe's data with some of its classes: mmseg maps them by name."""
    cfg = read(f"_base_ = '{ROOT}/{SEGMENTATION}'\nclasses = ('wall', 'sky')\n")
    assert {d.type for d in loaders(cfg)} == {'ADE20KDataset'}
    assert {head.num_classes for _, head in heads(cfg.model)} == {2}


def test_data_sets_in_wrappers(read):
    cfg = read(SEG.replace('train_dataloader = dict(dataset=dict(', '''
train_dataloader = dict(dataset=dict(_delete_=True, type='RepeatDataset', times=2, dataset=dict(
    type='ADE20KDataset', data_root='data/ade/ADEChallengeData2016', pipeline=[], ''', 1).replace(
        "seg_map_path='b')))", "seg_map_path='b'))))", 1))
    inner = cfg.train_dataloader.dataset.dataset
    assert (inner.type, inner.data_root) == ('BaseSegDataset', 'data/mine')
    assert inner.metainfo.classes == ('road', 'car', 'sky')


def test_what_begins_like_the_root_is_not_below_it(read):
    cfg = read(DET + "val_evaluator = dict(ann_file='data/coco_small/v.json')\n")
    assert cfg.val_evaluator.ann_file == 'data/coco_small/v.json'


@pytest.mark.parametrize(('text', 'message'), [
    (SEG + 'model = dict(decode_head=dict(num_classes=4))',
     r'model.decode_head.num_classes=4, but the data set has 3 classes: road, car, sky. Leave'),
    (DET + 'model = dict(roi_head=dict(mask_head=dict(num_classes=3)))',
     r'model.roi_head.mask_head.num_classes=3, but the data set has 2 classes: ball, crate'),
    (f"_base_ = '{ROOT}/{SEGMENTATION}'\nmodel = dict(decode_head=dict(num_classes=4))",
     r'num_classes=4, but the data set has 150 classes: wall, building, .* and 142 more'),
    (SEG + "val_dataloader['dataset']['metainfo'] = dict(classes=('road', 'car'))",
     r"classes=.* contradicts val_dataloader.dataset.metainfo.classes=\('road', 'car'\)"),
    (f"_base_ = '{ROOT}/{DETECTION}'\nval_dataloader = dict(dataset=dict(metainfo="
     "dict(classes=('a',))))", r'train_dataloader has the classes person.* has a: say classes'),
    (SEG.replace("('road', 'car', 'sky')", "('road')"), r"is one word: write \('road',\)"),
    (SEG.replace("'sky'", "'car'"), r'classes: car stands there more than once'),
    (SEG.replace("'sky'", '7'), r'must be names, such as'),
    (SEG + 'palette = [[0, 0, 0]]', r'a colour .* for each of the 3 classes'),
    (SEG + 'palette = [[0, 0, 0], [0, 0, 0], [0, 0, 256]]', r'from 0 to 255'),
    (SEG.replace('classes', 'palette'), r'palette is set without classes'),
    (SEG + 'reduce_zero_label = 1', r'reduce_zero_label=1 must be True .* or False')])
def test_contradictions_are_named(read, text, message):
    with pytest.raises(UserError, match=message):
        read(text)


def test_training_stops_before_it_starts(tmp_path):
    path = Path(tmp_path, 'wrong.py')
    path.write_text(SEG + 'model = dict(auxiliary_head=dict(num_classes=4))')
    done = run_tool('tools/train.py', path, '--work-dir', tmp_path / 'run', check=False)
    assert done.returncode == 2
    assert 'model.auxiliary_head.num_classes=4' in done.stderr
    assert 'Traceback' not in done.stderr
    assert not (tmp_path / 'run').exists()
