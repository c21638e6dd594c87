"""What follows from data of the user's own."""
import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from convnext_mm import UserError
from convnext_mm.bases import without_completion
from convnext_mm.resolution import resolve
from tests.helpers import DETECTION, ROOT, SEGMENTATION
from tests.recipes import MASK

MASK_RECIPE = f'configs/{MASK}.py'

PREFIXES = '''
train_dataloader = dict(dataset=dict(data_prefix=dict(img_path='a', seg_map_path='b')))
val_dataloader = dict(dataset=dict(data_prefix=dict(img_path='c', seg_map_path='d')))
'''
CLASSES = "classes = ('road', 'car', 'sky')\n"


@pytest.fixture
def resolved(tmp_path):
    """Resolves a recipe with lines of a user's; the notes are kept."""
    def resolved(text: str, recipe: str = SEGMENTATION) -> Config:
        (tmp_path / 'mine.py').write_text(f"_base_ = '{ROOT}/{recipe}'\n"
                                          f"data_root = '{tmp_path}'\n{text}")
        with without_completion():
            cfg = Config.fromfile(tmp_path / 'mine.py')
        resolved.notes = resolve(cfg)
        once = cfg.to_dict()
        assert resolve(cfg) == []
        assert cfg.to_dict() == once
        return cfg
    return resolved


def data_of(cfg: Config) -> list:
    return [cfg[f'{split}_dataloader'].dataset for split in ('train', 'val', 'test')]


def test_what_0_means_is_asked_once(resolved, tmp_path):
    (tmp_path / 'b').mkdir()
    mask = Image.new('L', (4, 4))
    mask.putpixel((1, 1), 2)
    mask.save(tmp_path / 'b' / '0.png')
    with pytest.raises(UserError) as error:
        resolved(PREFIXES + CLASSES)
    text = str(error.value)
    assert "reduce_zero_label = False  # 0 is 'road', the last of the 3 classes is 2" in text
    assert "reduce_zero_label = True   # 0 is no class and is ignored, 1 is 'road'" in text
    assert text.endswith(f'The first masks in {tmp_path}/b have the values 0, 2.')
    mask.putpixel((2, 1), 3)  # "unlabelled" is numbered after the classes
    mask.save(tmp_path / 'b' / '0.png')
    with pytest.raises(UserError, match=r'values 0, 2, 3\. .*or 3, .*\(False, and ignore = 3\)'):
        resolved(PREFIXES + CLASSES)


LOAD = "dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'{}), dict(type='PackSegInputs')"


@pytest.mark.parametrize(('text', 'reduce'), [
    ('reduce_zero_label = False\n', False), ('reduce_zero_label = True\n', True),
    (f'train_pipeline = [{LOAD.format(", reduce_zero_label=False")}]\n', False),
    (f'train_pipeline = [{LOAD.format(", reduce_zero_label=True")}]\n', True),
    ("train_dataloader['dataset']['reduce_zero_label'] = False\n", False),
    ("dataset_type = 'BaseSegDataset'\nval_dataloader['dataset']['reduce_zero_label'] = False\n",
     False)])
def test_an_answer_is_for_all_splits(resolved, text, reduce):
    for dataset in data_of(resolved(PREFIXES + CLASSES + text)):
        assert dataset.reduce_zero_label is reduce
        loader = next(one for one in dataset.pipeline if one.type == 'LoadAnnotations')
        assert loader.get('reduce_zero_label', reduce) is reduce


@pytest.mark.parametrize('text', [
    PREFIXES + CLASSES + 'crop_size = (256, 256)\nscale = (512, 512)\n',
    PREFIXES + CLASSES + f'train_pipeline = [{LOAD.format("")}]\n'])
def test_a_changed_pipeline_is_no_answer(resolved, text):
    with pytest.raises(UserError, match='not what 0 in a mask means'):
        resolved(text)


def test_masks_of_ones_own_need_classes(resolved):
    with pytest.raises(UserError, match='masks of your own, but classes is not set'):
        resolved(PREFIXES)
    assert data_of(resolved(''))[0].type == 'ADE20KDataset', 'ADE20K in another folder'


@pytest.mark.parametrize(('ignore', 'values'), [('11', (11,)), ('(11, 0)', (11, 0))])
def test_ignore_reaches_every_split(resolved, ignore, values):
    cfg = resolved(PREFIXES + CLASSES + f'reduce_zero_label = False\nignore = {ignore}\n')
    for dataset in data_of(cfg):
        assert (dataset.type, dataset.ignore) == ('convnext_mm.SegmentationDataset', values)


@pytest.mark.parametrize(('text', 'message'), [
    (PREFIXES + CLASSES + "reduce_zero_label = False\nignore = 'void'\n", 'must be a mask value'),
    (PREFIXES + CLASSES + 'reduce_zero_label = False\nignore = 300\n', 'must be a mask value'),
    ('ignore = 11\n', 'set classes')])
def test_wrong_values_to_ignore(resolved, text, message):
    with pytest.raises(UserError, match=message):
        resolved(text)


def write_coco(path, names: list[str]) -> None:
    path.write_text(json.dumps(dict(images=[], annotations=[], categories=[
        dict(id=i, name=name) for i, name in enumerate(names, 1)])))


DET = '''train_dataloader = dict(dataset=dict(ann_file='train.json', data_prefix=dict(img='a')))
val_dataloader = dict(dataset=dict(ann_file='val.json', data_prefix=dict(img='b')))
'''


def test_classes_of_coco_files_are_read(resolved, tmp_path):
    write_coco(tmp_path / 'train.json', ['apple', 'pear'])
    cfg = resolved(DET, DETECTION)
    assert [tuple(dataset.metainfo.classes) for dataset in data_of(cfg)] == [('apple', 'pear')] * 3
    assert {head.num_classes for head in cfg.model.roi_head.bbox_head} == {2}
    assert f"classes=('apple', 'pear'), the categories of {tmp_path}/train.json" in resolved.notes


def test_coco_in_another_folder_stays_coco(resolved, tmp_path):
    from mmdet.datasets import CocoDataset
    write_coco(tmp_path / 'train.json', CocoDataset.METAINFO['classes'])
    cfg = resolved(DET, DETECTION)
    assert cfg.model.roi_head.mask_head.num_classes == 80
    assert 'metainfo' not in cfg.train_dataloader.dataset


def test_own_coco_data_is_read_by_name(resolved):
    cfg = resolved(DET + "classes = ('apple', 'pear')\n", DETECTION)
    assert {dataset.type for dataset in data_of(cfg)} == {'convnext_mm.CocoDataset'}
    assert cfg.val_evaluator.type == cfg.test_evaluator.type == 'convnext_mm.CocoMetric'
    with pytest.raises(UserError, match='setting of segmentation'):
        resolved(DET + "classes = ('apple', 'pear')\nignore = 3\n", DETECTION)


@pytest.mark.parametrize('text', [
    "test_evaluator = dict(format_only=True, output_dir='out')\n",
    "test_dataloader = dict(dataset=dict(data_prefix=dict(img_path='e', seg_map_path=None)))\n"])
def test_a_test_without_masks_loads_none(resolved, text):
    cfg = resolved(PREFIXES + CLASSES + 'reduce_zero_label = False\n' + text)
    assert 'LoadAnnotations' not in str(cfg.test_dataloader) + str(cfg.tta_pipeline)
    assert 'LoadAnnotations' in str(cfg.val_dataloader)
    assert cfg.test_evaluator.format_only
    folder = 'out' if 'out' in text else 'work_dirs/mine/test_masks'
    assert cfg.test_evaluator.output_dir == folder


@pytest.mark.parametrize('nothing', ["''", 'None'])
def test_a_test_of_a_folder_of_images_writes_detections(resolved, nothing):
    pytest.importorskip('mmdet')
    cfg = resolved(DET + "classes = ('apple', 'pear')\nwork_dir = 'out'\n"
                   f"test_dataloader = dict(dataset=dict(ann_file={nothing}, "
                   "data_prefix=dict(img='photos')))\n", DETECTION)
    assert cfg.test_dataloader.dataset.type == 'convnext_mm.CocoDataset'
    assert 'LoadAnnotations' not in str(cfg.test_dataloader) + str(cfg.tta_pipeline)
    assert 'LoadAnnotations' in str(cfg.val_dataloader)
    assert cfg.test_evaluator == dict(type='convnext_mm.DetectionWriter',
                                      out_file='out/test_detections.json')
    assert cfg.val_evaluator.type == 'convnext_mm.CocoMetric'
    assert any('writes detections to out/test_detections.json' in note for note in resolved.notes)


@pytest.mark.parametrize(('name', 'text'), [
    ('data.yaml', 'names: [apple, pear]\nnc: 2\n'),
    ('data.yaml', 'names:\n  1: pear\n  0: apple\n'),
    ('names.txt', 'apple\npear\n'),
    ('a.json', '{"categories": [{"id": 2, "name": "pear"}, {"id": 1, "name": "apple"}]}')])
def test_classes_from_a_file_of_the_data(resolved, tmp_path, name, text):
    write_coco(tmp_path / 'train.json', ['apple', 'pear'])
    (tmp_path / name).write_text(text)
    cfg = resolved(DET + f"classes = '{name}'\n", DETECTION)
    assert tuple(cfg.train_dataloader.dataset.metainfo.classes) == ('apple', 'pear')
    (tmp_path / name).write_text('{}')
    if name != 'names.txt':
        with pytest.raises(UserError, match='names'):
            resolved(DET + f"classes = '{name}'\n", DETECTION)


# ---- boxes without masks


@pytest.mark.parametrize('recipe', [DETECTION, MASK_RECIPE])
def test_masks_false_makes_a_detector_of_boxes(resolved, recipe):
    from convnext_mm.complexity import build_on_meta
    cfg = resolved(DET + "classes = ('apple', 'pear')\nmasks = False\n"
                   "val_evaluator = dict(metric=['bbox', 'segm'], classwise=True)\n", recipe)
    for pipeline in (*(dataset.pipeline for dataset in data_of(cfg)), cfg.tta_pipeline):
        assert 'with_bbox' in str(pipeline)
        assert "'with_mask': True" not in str(pipeline)
    assert cfg.val_evaluator.metric == cfg.test_evaluator.metric == ['bbox']
    model = build_on_meta(cfg)
    assert not model.with_mask
    assert not [name for name, _ in model.named_parameters() if 'mask' in name]


@pytest.mark.parametrize(('masks', 'recipe', 'message'), [
    ("'no'", DETECTION, 'must be False'), ('False', SEGMENTATION, 'setting of detectors')])
def test_wrong_values_of_masks(resolved, masks, recipe, message):
    with pytest.raises(UserError, match=message):
        resolved(f'masks = {masks}\n', recipe)


# ---- splits and formats


def make_pictures(folder, count: int) -> None:
    """Pictures of noise; the last is a copy of the first, saved again."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(generator.integers(0, 255, (24, 32, 3), np.uint8).repeat(4, 0).repeat(
            4, 1)).save(folder / f'{i}.jpg', quality=95)
    Image.open(folder / '0.jpg').save(folder / 'again.jpg', quality=60)


def test_a_share_of_the_training_images_validates(resolved, tmp_path):
    make_pictures(tmp_path / 'a', 9)
    text = PREFIXES.split('val_dataloader')[0] + CLASSES + 'reduce_zero_label = False\nval = 0.2\n'
    train, val, test = data_of(resolved(text))
    out = tmp_path / 'split_0.2'
    assert (train.ann_file, val.ann_file, test.ann_file) == (
        f'{out}/train.txt', f'{out}/val.txt', f'{out}/val.txt')
    assert val.data_prefix == test.data_prefix == dict(img_path='a', seg_map_path='b')
    lists = [(out / f'{split}.txt').read_text().split() for split in ('train', 'val')]
    assert len(lists[1]) == 2
    assert sorted(lists[0] + lists[1]) == [*map(str, range(9)), 'again']
    assert {'0', 'again'} <= set(lists[0]) or {'0', 'again'} <= set(lists[1])
    times = [(out / f'{split}.txt').stat().st_mtime_ns for split in ('train', 'val')]
    resolved(text)
    assert times == [(out / f'{split}.txt').stat().st_mtime_ns for split in ('train', 'val')]


def test_a_share_of_a_coco_file(resolved, tmp_path):
    make_pictures(tmp_path / 'a', 4)
    (tmp_path / 'train.json').write_text(json.dumps(dict(
        images=[dict(id=i, file_name=f'{i}.jpg', width=128, height=96) for i in range(4)],
        annotations=[dict(id=i + 1, image_id=i, category_id=1, bbox=[1, 2, 30, 40], area=1200)
                     for i in range(4)], categories=[dict(id=1, name='apple')])))
    cfg = resolved(DET.split('val_dataloader')[0] + 'val = 0.25\n', DETECTION)
    train, val, test = data_of(cfg)
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == val.ann_file
    assert test.ann_file == val.ann_file == f'{tmp_path}/split_0.25/val.json'
    assert test.data_prefix == dict(img='a')
    contents = [json.loads(Path(one.ann_file).read_text()) for one in (train, val)]
    assert [len(one['images']) for one in contents] == [3, 1]
    for one in contents:
        assert [a['image_id'] for a in one['annotations']] == [i['id'] for i in one['images']]


@pytest.mark.parametrize(('text', 'message'), [
    (PREFIXES + CLASSES + 'reduce_zero_label = False\nval = 0.2\n', 'data_prefix is set: remove'),
    ('val = 2\n', 'must be a share'), ('val = 1.5\n', 'must be a share')])
def test_wrong_shares(resolved, text, message):
    with pytest.raises(UserError, match=message):
        resolved(text)


def test_variables_of_these_names_stay_variables(resolved):
    cfg = resolved("val = 'c'\nmasks = 'all/b'\n" + PREFIXES.replace("img_path='c'", 'img_path=val')
                   + CLASSES + 'reduce_zero_label = False\n')
    assert cfg.val_dataloader.dataset.data_prefix.img_path == 'c'


def test_other_formats_are_recognised(resolved, tmp_path):
    (tmp_path / 'labels').mkdir()
    (tmp_path / 'labels' / 'a.xml').write_text('<annotation></annotation>')
    with pytest.raises(UserError, match=f'(?s){tmp_path}/labels is in the format of Pascal VOC.*'
                       f'convert_dataset.py {tmp_path} {tmp_path}/coco_format'):
        resolved(DET.replace('train.json', 'labels'), DETECTION)
    (tmp_path / 'data.yaml').write_text('names: [apple]\n')
    with pytest.raises(UserError, match='data.yaml is in the format of YOLO'):
        resolved(DET.replace('train.json', 'data.yaml'), DETECTION)
