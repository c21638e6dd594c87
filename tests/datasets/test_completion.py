"""Configs with four lines for custom data, and what is completed from them."""
import pytest

from convnext_mm import UserError
from convnext_mm.datasets.completion import heads_with_classes
from convnext_mm.engine.checks import read_config
from convnext_mm.visualization import distinct_colors
from tests.helpers import (
    DEMO_DETECTION,
    DEMO_SEGMENTATION,
    DETECTION,
    ROOT,
    SEGMENTATION,
    call_tool,
    run_tool,
)

SEG = f'''_base_ = '{ROOT}/{SEGMENTATION}'
data_root = 'data/mine'
train_dataloader = dict(dataset=dict(data_prefix=dict(img_path='a', seg_map_path='b')))
val_dataloader = dict(dataset=dict(data_prefix=dict(img_path='c', seg_map_path='d')))
classes = ('road', 'car', 'sky')
reduce_zero_label = True
'''
DET = f'''_base_ = '{ROOT}/{DETECTION}'
data_root = 'data/mine'
train_dataloader = dict(dataset=dict(ann_file='train.json', data_prefix=dict(img='a')))
val_dataloader = dict(dataset=dict(ann_file='val.json', data_prefix=dict(img='b')))
classes = ('ball', 'crate')
'''


@pytest.fixture
def load(tmp_path):
    """Writes a config file and reads it as the tools do."""
    def load(text: str, options: dict | None = None, name: str = 'mine.py'):
        (tmp_path / name).write_text(text)
        return read_config(str(tmp_path / name), options)
    return load


def datasets(cfg) -> list:
    return [cfg[f'{split}_dataloader'].dataset for split in ('train', 'val', 'test')]


def test_segmentation_in_four_lines(load):
    cfg = load(SEG)
    assert [dict(d.data_prefix) for d in datasets(cfg)] == [
        dict(img_path='a', seg_map_path='b'), *[dict(img_path='c', seg_map_path='d')] * 2]
    for dataset in datasets(cfg):
        assert dataset.type == 'BaseSegDataset', 'ADE20KDataset would map its own class names'
        assert dataset.data_root == 'data/mine'
        assert dataset.metainfo.classes == ('road', 'car', 'sky')
        assert dataset.metainfo.palette == distinct_colors(3), 'in every picture the same'
        assert (dataset.img_suffix, dataset.seg_map_suffix) == ('.jpg', '.png')
        assert dataset.reduce_zero_label is True, 'the value of the recipe'
    assert [path for path, _ in heads_with_classes(cfg.model)] == [
        'model.decode_head', 'model.auxiliary_head']
    assert {head.num_classes for _, head in heads_with_classes(cfg.model)} == {3}


def test_detection_in_four_lines(load):
    cfg = load(DET)
    assert [(d.ann_file, d.data_prefix.img) for d in datasets(cfg)] == [
        ('train.json', 'a'), ('val.json', 'b'), ('val.json', 'b')]
    assert {d.data_root for d in datasets(cfg)} == {'data/mine'}
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == 'data/mine/val.json'
    assert [path for path, _ in heads_with_classes(cfg.model)] == [
        'model.roi_head.mask_head', *(f'model.roi_head.bbox_head.{i}' for i in range(3))]
    assert {head.num_classes for _, head in heads_with_classes(cfg.model)} == {2}


def test_three_mask_heads(load):
    cfg = load(DET + '''
model = dict(roi_head=dict(mask_head=[_base_.model.roi_head.mask_head] * 3))
''')
    assert [head.num_classes for _, head in heads_with_classes(cfg.model)] == [2] * 6


def test_models_are_built_with_the_number_of_classes(load):
    from convnext_mm.complexity import build_on_meta
    model = build_on_meta(load(SEG))
    assert [h.conv_seg.out_channels for h in (model.decode_head, model.auxiliary_head)] == [3, 3]
    model = build_on_meta(load(DET))
    assert [head.fc_cls.out_features for head in model.roi_head.bbox_head] == [3, 3, 3]
    assert [head.conv_logits.out_channels for head in model.roi_head.mask_head] == [2, 2, 2]


def test_recipes_stay_unchanged():
    from mmengine.config import Config

    from convnext_mm.bases import without_completion
    for config in (SEGMENTATION, DETECTION, SEGMENTATION.replace('.py', '_ms.py')):
        with without_completion():
            before = Config.fromfile(config)
        cfg = read_config(config)
        for dataset in (*datasets(before), *datasets(cfg)):
            dataset.setdefault('reduce_zero_label', True)  # the default of ADE20KDataset
        assert cfg.to_dict() == before.to_dict()


@pytest.mark.slow
def test_mmengine_completes_configs_in_a_new_process(tmp_path):
    """The scripts and inferencers of mmseg and mmdet import this package through the config."""
    (tmp_path / 'mine.py').write_text(SEG)
    script = ('from mmengine.config import Config; '
              f'cfg = Config.fromfile("{tmp_path}/mine.py"); '
              'print(cfg.model.decode_head.num_classes, cfg.test_dataloader.dataset.data_root)')
    (tmp_path / 'script.py').write_text(script)
    assert run_tool(tmp_path / 'script.py').stdout.strip().endswith('3 data/mine')


def test_data_sets_that_name_their_classes_have_the_same_colors_everywhere(load):
    text = """
_base_ = '{}'
meta = dict(classes=('ball', 'crate'){})
train_dataloader = dict(dataset=dict(ann_file='a.json', metainfo=meta))
val_dataloader = dict(dataset=dict(ann_file='b.json', metainfo=meta))
"""
    recipe = DET.split("'")[1]
    for dataset in datasets(load(text.format(recipe, ''))):
        assert dataset.metainfo.palette == distinct_colors(2)
    own = [(1, 2, 3), (4, 5, 6)]
    for classes in ('', "classes = ('ball', 'crate')"):
        for dataset in datasets(load(text.format(recipe, f', palette={own}') + classes)):
            assert dataset.metainfo.palette == own
    for dataset in datasets(load(text.format(recipe, '').replace("'ball', 'crate'",
                                                                 "'car', 'person'"))):
        assert dataset.metainfo.palette == [(0, 0, 142), (220, 20, 60)], "COCO's"


def test_the_palette_of_other_classes_is_not_inherited(load, tmp_path):
    base = f"_base_ = '{ROOT}/{DEMO_SEGMENTATION}'\nclasses = ('a', 'b')\n"
    for dataset in datasets(load(base)):
        assert dataset.metainfo.palette == distinct_colors(2)
    with pytest.raises(UserError, match='a color .* for each of the 2 classes'):
        load(base + 'palette = [[0, 0, 0]]')
    (tmp_path / 'a.json').write_text(
        '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "cell"}]}')
    for dataset in datasets(load(f"""_base_ = '{ROOT}/{DEMO_DETECTION}'
data_root = '{tmp_path}'
train_dataloader = dict(dataset=dict(ann_file='a.json', data_prefix=dict(img='')))
val_dataloader = dict(dataset=dict(ann_file='a.json', data_prefix=dict(img='')))
classes = None
""")):
        assert dict(dataset.metainfo) == dict(classes=('cell',), palette=distinct_colors(1))


def test_palette_and_mask_options_are_copied(load):
    cfg = load(SEG + '''palette = [[0, 0, 0], [255, 0, 0], [0, 0, 255]]
reduce_zero_label = False
img_suffix = '.tif'
seg_map_suffix = '_mask.png'
''')
    for dataset in datasets(cfg):
        assert dataset.metainfo.palette == [(0, 0, 0), (255, 0, 0), (0, 0, 255)]
        assert (dataset.img_suffix, dataset.seg_map_suffix) == ('.tif', '_mask.png')
        assert dataset.reduce_zero_label is False
        assert [transform.reduce_zero_label for transform in dataset.pipeline
                if transform.type == 'LoadAnnotations'] == [False]
    assert cfg.tta_pipeline[1].transforms[2][0].reduce_zero_label is False


def test_pipelines_follow_their_dataset(load):
    """If they differ, mmseg raises an error in the first iteration."""
    cfg = load(SEG.replace('reduce_zero_label = True\n', '')
               + 'train_dataloader["dataset"]["reduce_zero_label"] = False\n')
    transforms = {t.type: t for t in cfg.train_dataloader.dataset.pipeline}
    assert transforms['LoadAnnotations'].reduce_zero_label is False


def test_inherited_configs_and_command_line_options(load, tmp_path):
    load(SEG)
    cfg = load(f"_base_ = '{tmp_path}/mine.py'\ndata_root = 'data/other'\nclasses = ('x', 'y')\n",
               name='other.py')
    assert {d.data_root for d in datasets(cfg)} == {'data/other'}
    assert {d.metainfo.classes for d in datasets(cfg)} == {('x', 'y')}
    assert {head.num_classes for _, head in heads_with_classes(cfg.model)} == {2}
    cfg = load(DET, {'data_root': 'elsewhere', 'classes': ('z',)})
    assert {d.data_root for d in datasets(cfg)} == {'elsewhere'}
    assert cfg.test_evaluator.ann_file == 'elsewhere/val.json'
    assert {head.num_classes for _, head in heads_with_classes(cfg.model)} == {1}


def test_classes_from_a_text_file_and_from_metainfo(load, tmp_path):
    (tmp_path / 'names.txt').write_text('road\ncar\n\nsky\nsea\n')
    cfg = load(SEG.replace("('road', 'car', 'sky')", f"'{tmp_path}/names.txt'"))
    assert datasets(cfg)[0].metainfo.classes == ('road', 'car', 'sky', 'sea')
    cfg = load(f'''_base_ = '{ROOT}/{SEGMENTATION}'
mine = dict(type='BaseSegDataset', data_root='data/mine', metainfo=dict(classes=['a', 'b']))
train_dataloader = dict(dataset=mine)
val_dataloader = dict(dataset=mine)
test_dataloader = dict(dataset=mine)
''')
    assert {head.num_classes for _, head in heads_with_classes(cfg.model)} == {2}
    assert datasets(cfg)[0].reduce_zero_label is True


def test_a_subset_of_the_recipes_classes(load):
    """On the recipe's own data, mmseg maps them by name."""
    cfg = load(f"_base_ = '{ROOT}/{SEGMENTATION}'\nclasses = ('wall', 'sky')\n")
    assert {d.type for d in datasets(cfg)} == {'ADE20KDataset'}
    assert {head.num_classes for _, head in heads_with_classes(cfg.model)} == {2}


def test_wrapped_datasets(load):
    cfg = load(SEG.replace('train_dataloader = dict(dataset=dict(', '''
train_dataloader = dict(dataset=dict(_delete_=True, type='RepeatDataset', times=2, dataset=dict(
    type='ADE20KDataset', data_root='data/ade/ADEChallengeData2016', pipeline=[], ''', 1).replace(
        "seg_map_path='b')))", "seg_map_path='b'))))", 1))
    inner = cfg.train_dataloader.dataset.dataset
    assert (inner.type, inner.data_root) == ('BaseSegDataset', 'data/mine')
    assert inner.metainfo.classes == ('road', 'car', 'sky')


def test_settings_of_the_validation_hold_for_the_test(load):
    cfg = load(DET + 'val_evaluator = dict(classwise=True)\n')
    assert cfg.test_evaluator.to_dict() == cfg.val_evaluator.to_dict()
    assert cfg.test_evaluator.classwise
    assert cfg.test_evaluator.ann_file == 'data/mine/val.json'


SEVERAL = """
def named(name):
    return dict(type='{}', {}, pipeline=_base_.val_dataloader.dataset.pipeline)
val_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset',
                                   datasets=[named('one'), named('two')]))
del named
"""
SEVERAL_MASKS = SEVERAL.format(
    'BaseSegDataset', "data_prefix=dict(img_path=f'{name}/i', seg_map_path=f'{name}/m')")
SEVERAL_FILES = SEVERAL.format('CocoDataset', "ann_file=f'{name}.json', data_prefix=dict(img='b')")


def test_several_sets_that_validate_are_tested(load):
    cfg = load(SEG + SEVERAL_MASKS)
    prefixes = [one.data_prefix.img_path for one in cfg.val_dataloader.dataset.datasets]
    assert prefixes == ['one/i', 'two/i']
    assert cfg.test_dataloader.dataset.to_dict() == cfg.val_dataloader.dataset.to_dict()
    assert [one.metainfo.classes for one in cfg.test_dataloader.dataset.datasets] == [
        ('road', 'car', 'sky')] * 2
    steps = [dict(type='LoadImageFromFile'), dict(type='PackSegInputs')]
    cfg = load(f"{SEG}{SEVERAL_MASKS}test_dataloader = dict(dataset=dict(pipeline={steps}))\n")
    assert [one.pipeline for one in cfg.test_dataloader.dataset.datasets] == [steps] * 2
    cfg = load(SEG + SEVERAL_MASKS
               + "test_dataloader = dict(dataset=dict(data_prefix=dict(img_path='e')))\n")
    assert cfg.test_dataloader.dataset.data_prefix.img_path == 'e', 'as set'


def test_detections_on_several_sets_need_a_file_of_all(load):
    for evaluator in ('', "val_evaluator = dict(ann_file='two.json')\n"):
        with pytest.raises(UserError, match='val_dataloader has 2 annotation files, one.json, two'
                                            '.json, but val_evaluator compares with one'):
            load(DET + SEVERAL_FILES + evaluator)
    cfg = load(DET + SEVERAL_FILES + "val_evaluator = dict(ann_file='all.json')\n")
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == 'all.json'
    assert cfg.test_dataloader.dataset.to_dict() == cfg.val_dataloader.dataset.to_dict()


def test_paths_that_only_begin_like_the_root_stay(load):
    cfg = load(DET + "val_evaluator = dict(ann_file='data/coco_small/v.json')\n")
    assert cfg.val_evaluator.ann_file == 'data/coco_small/v.json'


@pytest.mark.parametrize(('text', 'message'), [
    (SEG + 'model = dict(decode_head=dict(num_classes=4))',
     r'model.decode_head.num_classes=4, but the dataset has 3 classes: road, car, sky. Remove num'),
    (DET + 'model = dict(roi_head=dict(mask_head=dict(num_classes=3)))',
     r'model.roi_head.mask_head.num_classes=3, but the dataset has 2 classes: ball, crate'),
    (f"_base_ = '{ROOT}/{SEGMENTATION}'\nmodel = dict(decode_head=dict(num_classes=4))",
     r'num_classes=4, but the dataset has 150 classes: wall, building, .* and 142 more'),
    (SEG + "val_dataloader['dataset']['metainfo'] = dict(classes=('road', 'car'))",
     r"classes=.* contradicts val_dataloader.dataset.metainfo.classes=\('road', 'car'\)"),
    (f"_base_ = '{ROOT}/{DETECTION}'\nval_dataloader = dict(dataset=dict(metainfo="
     "dict(classes=('a',))))", r'train_dataloader has the classes p.*, but val_dataloader has a:'),
    (SEG.replace("('road', 'car', 'sky')", "('road')"),
     r"'road' is not a file: write \('road',\), with a comma"),
    (SEG.replace("'sky'", "'car'"), r'classes: car occurs more than once'),
    (SEG.replace("'sky'", '7'), r'must be names, such as'),
    (SEG + 'palette = [[0, 0, 0]]', r'a color .* for each of the 3 classes'),
    (SEG + 'palette = [[0, 0, 0], [0, 0, 0], [0, 0, 256]]', r'from 0 to 255'),
    (SEG.replace('classes', 'palette'), r'palette is set without classes'),
    (SEG + 'reduce_zero_label = 1', r'reduce_zero_label=1 must be True .* or False')])
def test_contradictions_raise_a_clear_error(load, text, message):
    with pytest.raises(UserError, match=message):
        load(text)


def test_contradictions_stop_training_before_it_starts(tmp_path):
    path = tmp_path / 'wrong.py'
    path.write_text(SEG + 'model = dict(auxiliary_head=dict(num_classes=4))')
    done = call_tool('tools/train.py', path, '--work-dir', tmp_path / 'run')
    assert done.returncode == 2
    assert 'Error: model.auxiliary_head.num_classes=4' in done.stderr
    assert list(tmp_path.iterdir()) == [path], 'no work dir'
