"""Datasets with one mistake each, and the problem that is reported."""
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path

import mmcv
import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from convnext_mm import UserError
from convnext_mm.datasets import contact_sheet, detection, findings, inspection
from convnext_mm.datasets.segmentation import _mask_loader, _read_pair, format_ranges
from convnext_mm.engine import checks
from tests.helpers import DETECTION, ROOT, SEGMENTATION, call_tool

RNG = np.random.default_rng(0)
ZERO = 'reduce_zero_label = True\n'


def write_image(path: Path, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path)


def write_mask(path: Path, values: list[int], size: tuple[int, int] = (40, 30),
         mode: str = 'L', **options) -> None:
    """A mask of vertical stripes, one per value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stripes = np.array(values)[np.arange(size[0]) * len(values) // size[0]]
    array = np.broadcast_to(stripes, (size[1], size[0]))
    image = Image.fromarray(array.astype(np.uint8 if max(values) < 256 else np.uint16))
    if mode == 'P':
        image.putpalette(list(range(256)) * 3)
    elif mode == 'RGB':
        image = image.convert('RGB')
    image.save(path, **options)


class CustomData:
    """Base of datasets with a config."""

    config: Path

    @functools.cached_property
    def cfg(self) -> Config:
        return checks.read_config(str(self.config))

    def problems(self, sample: int | None = None) -> list[findings.Problem]:
        results = inspection.inspect_splits(self.cfg, sample)
        assert [one.split for one in results] == ['train', 'val']
        return [problem for one in results for problem in one.problems]


class SegmentationData(CustomData):
    """A valid dataset of three classes: 6 training and 2 validation images."""

    def __init__(self, root: Path, values: list[int] = (0, 1, 2), mode: str = 'L',
                 suffix: str = '.png', extra: str = 'reduce_zero_label = False\n') -> None:
        self.train_images = root / 'images' / 'train'
        for split, count in (('train', 6), ('val', 2)):
            for i in range(count):
                write_image(root / 'images' / split / f'{i}.jpg')
                write_mask(root / 'masks' / split / f'{i}{suffix}', list(values), mode=mode)
        self.config = root / 'mine.py'
        self.config.write_text(f"""_base_ = '{ROOT}/{SEGMENTATION}'
data_root = '{root}'
train_dataloader = dict(dataset=dict(
    data_prefix=dict(img_path='images/train', seg_map_path='masks/train')))
val_dataloader = dict(dataset=dict(
    data_prefix=dict(img_path='images/val', seg_map_path='masks/val')))
classes = ('road', 'car', 'sky')
seg_map_suffix = '{suffix}'
{extra}""")


@pytest.mark.parametrize(('values', 'options', 'level', 'message', 'fix'), [
    ([0, 255], {}, 'error', 'masks contain only 0 and 255', r'mask\[mask == 255\] = 1'),
    ([0, 255], dict(extra=ZERO), 'error', 'masks contain only 0 and 255', 'Replace 255 by 1'),
    ([0, 1, 2], dict(extra=ZERO), 'warning', r"no mask contains 3, which would be 'sky'",
     r"\('road'\), it is ignored and .* shifted: set reduce_zero_label = False"),
    ([0, 1, 2, 3], {}, 'error', 'mask values that are not classes: 3 ',
     'If 3 is no class, set ignore = 3 .*; if it is one, add its name'),
    ([1, 2, 3], {}, 'error', 'mask values that are not classes: 3 ', 'number the classes from 1'),
    ([0, 1, 7], {}, 'error', 'mask values that are not classes: 7 ', 'missing, .*by ignore = 7 '),
    ([0, 1, 7, 9], {}, 'error', 'that are not classes: 7, 9 ', r'by ignore = \(7, 9\) at'),
    ([0, 75, 113], {}, 'error', 'not classes: 75, 113', 'gray levels .*{0: 0, 75: 1, '),
    ([0, 4, 9], dict(mode='P'), 'error', 'classes: 4, 9 .*', 'palette PNGs whose indices'),
    ([0, 1, 2], dict(mode='RGB'), 'error', 'color mask', 'one channel'),
    (range(30), {}, 'error', r'not classes: 3–29', 'resizing masks with interpolation'),
    ([0, 120, 250], dict(suffix='.jpg'), 'error', 'not classes: ', 'masks are JPEGs'),
    ([0, 120, 250], dict(suffix='.gif'), 'warning', 'mask that is a GIF', 'to PNG'),
    ([0, 300], {}, 'error', 'not classes: 300', '8-bit'),
    ([0], dict(extra=ZERO), 'error', 'masks without a pixel of any class', 'If 0 is a class'),
    ([0, 2], {}, 'warning', 'classes that occur in no image: car', 'nan'),
    ([0, 1, 2], dict(extra='reduce_zero_label = False\nimg_suffix = ".png"'), 'error',
     'no image ends with .png in .*, which contains [62] .jpg', 'Set img_suffix'),
])
def test_mistakes_in_masks(tmp_path, values, options, level, message, fix):
    problems = SegmentationData(tmp_path, values, **options).problems()
    assert [p.level for p in problems] == [level] * 2, 'one per split'
    for problem in problems:
        assert re.search(message, problem.message)
        assert re.search(fix, problem.fix)


@pytest.mark.parametrize(('values', 'options'), [
    ([0, 1, 2], {}), ([0, 1, 2, 255], {}), ([0, 1, 2], dict(mode='P')),
    ([0, 1, 2, 3], dict(extra=ZERO)), ([1, 2, 3, 255], dict(extra=ZERO))])
@pytest.mark.parametrize('sample', [None, 2])
def test_valid_masks_have_no_problems(tmp_path, values, options, sample):
    assert SegmentationData(tmp_path, values, **options).problems(sample) == []


def test_mistakes_in_files(tmp_path):
    data = SegmentationData(tmp_path)
    images, masks = tmp_path / 'images/train', tmp_path / 'masks/train'
    (images / '0.jpg').write_bytes((images / '0.jpg').read_bytes()[:400])
    (images / '1.jpg').write_bytes(b'<html>')
    (masks / '2.png').unlink()
    write_mask(masks / '3.png', [0, 1, 2], size=(30, 40))
    write_mask(masks / 'unpaired.png', [0, 1, 2])
    write_mask(masks / '4.png', [255])
    (images / '5.jpg').write_bytes((tmp_path / 'images/val/1.jpg').read_bytes())
    found = {p.message: (p.level, p.where) for p in data.problems()}
    assert list(found) == ['image missing or unreadable', 'mask missing or unreadable',
                           'mask whose size differs from its image',
                           'mask without an image that ends with .jpg',
                           'mask without a pixel of any class: all its pixels are ignored',
                           'image that is also in the training data']
    level, (truncated, not_an_image) = found['image missing or unreadable']
    assert level == 'error'
    assert re.match(f'{images}/0.jpg .*truncated', truncated, re.I)
    assert not_an_image == f'{images}/1.jpg (not an image)'
    assert found['mask missing or unreadable'] == ('error', [f'{masks}/2.png (file not found)'])
    assert found['mask whose size differs from its image'] == (
        'error', [f'{masks}/3.png: image 40×30, mask 30×40'])
    assert found['mask without an image that ends with .jpg'] == (
        'warning', [f'{masks}/unpaired.png'])
    assert found['mask without a pixel of any class: all its pixels are ignored'] == (
        'warning', [f'{masks}/4.png'])
    assert found['image that is also in the training data'] == (
        'warning', [f'{tmp_path}/images/val/1.jpg = {images}/5.jpg'])


def test_exif_rotation_is_applied_as_in_mmcv(tmp_path):
    data = SegmentationData(tmp_path)
    path = tmp_path / 'images/train/0.jpg'
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    assert mmcv.imread(path).shape[:2] == (40, 30)
    assert [p.where for p in data.problems()] == [
        [f'{tmp_path}/masks/train/0.png: image 30×40, mask 40×30']]


def test_class_frequencies_of_masks(tmp_path):
    data = SegmentationData(tmp_path, [0, 0, 1, 255])
    write_mask(tmp_path / 'masks/train/0.png', [2])
    train, val = inspection.inspect_splits(data.cfg)
    assert train.label_counts == {0: 5 * 600, 1: 5 * 300, 2: 1200}
    assert train.image_counts == {0: 5, 1: 5, 2: 1}
    assert val.label_counts == {0: 1200, 1: 600}
    text = inspection.format_report([train, val])
    assert 'road         3000   52.6%         5  ████████████████████' in text


@pytest.mark.parametrize('reduce', [True, False])
@pytest.mark.parametrize('label_map', [None, {0: 3, 1: 255, 2: 0}])
def test_labels_are_those_of_the_pipeline(tmp_path, reduce, label_map):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / 'mask.png')
    load = _mask_loader(dict(pipeline=[dict(type='LoadAnnotations', reduce_zero_label=reduce)]))
    info = dict(img_path='', seg_map_path=str(tmp_path / 'mask.png'), reduce_zero_label=reduce,
                label_map=label_map)
    pair = _read_pair(info, load=mmcv.imread, label=load)
    assert len(pair.pixel_counts) == 256
    for value, label in pair.pixel_counts:
        if reduce:
            value = 255 if value in (0, 255) else value - 1
        assert label == (label_map or {}).get(value, value)


def test_ranges():
    assert format_ranges([0, 1, 2, 5, 6, 9]) == '0–2, 5, 6, 9'
    assert format_ranges([*range(0, 26, 2)]) == '0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, …'


class DetectionData(CustomData):
    """A valid dataset with two boxes per image: 6 training and 2 validation images."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.train_images = root / 'train'
        for split, count in (('train', 6), ('val', 2)):
            content = dict(images=[], annotations=[], categories=[
                dict(id=1, name='ball'), dict(id=2, name='crate')])
            for i in range(count):
                write_image(root / split / f'{i}.jpg', (60, 40))
                content['images'].append(dict(id=i, file_name=f'{i}.jpg', width=60, height=40))
                for kind in (1, 2):
                    x, y, w, h = 5 * kind, 4, 20, 20
                    content['annotations'].append(dict(
                        id=2 * i + kind, image_id=i, category_id=kind, bbox=[x, y, w, h],
                        area=w * h, iscrowd=0,
                        segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]]))
            (root / f'{split}.json').write_text(json.dumps(content))
        self.config = root / 'mine.py'
        self.config.write_text(f"""_base_ = '{ROOT}/{DETECTION}'
data_root = '{root}'
train_dataloader = dict(dataset=dict(ann_file='train.json', data_prefix=dict(img='train')))
val_dataloader = dict(dataset=dict(ann_file='val.json', data_prefix=dict(img='val')))
classes = ('ball', 'crate')
""")

    def change(self, change: Callable[[dict], object]) -> None:
        path = self.root / 'train.json'
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))



@pytest.fixture(scope='module')
def shared_detection_data(tmp_path_factory) -> DetectionData:
    return DetectionData(tmp_path_factory.mktemp('detection'))


@pytest.fixture
def detection_data(shared_detection_data):
    """Valid data whose training annotations a test may change."""
    path = shared_detection_data.root / 'train.json'
    content = path.read_bytes()
    yield shared_detection_data
    path.write_bytes(content)


def update(kind: str, index: int, **values):
    return lambda content: content[kind][index].update(values)


def write_corners(content: dict) -> None:
    """Boxes as [left, top, right, bottom], which reach outside the image."""
    for one in content['annotations']:
        x, y, w, h = one['bbox']
        one['bbox'] = [x + 20, y + 10, x + w + 20, y + h + 10]


@pytest.mark.parametrize('sample', [None, 2])
def test_valid_annotations_have_no_problems(detection_data, sample):
    assert detection_data.problems(sample) == []


def test_class_frequencies_of_boxes(detection_data):
    detection_data.change(update('annotations', 0, category_id=2))
    detection_data.change(update('annotations', 3, iscrowd=1))
    train, val = inspection.inspect_splits(detection_data.cfg)
    assert train.label_counts == {0: 5, 1: 6}
    assert train.image_counts == {0: 5, 1: 5}
    assert val.label_counts == val.image_counts == {0: 2, 1: 2}


@pytest.mark.parametrize(('change', 'level', 'message', 'where'), [
    (update('annotations', 0, bbox=[5, 4, 0, 20]), 'warning', 'box with a width or height below 1',
     ['id 1 in 0.jpg: [5, 4, 0, 20]']),
    (update('annotations', 0, bbox=[5, 4, 20]), 'error', 'box that is not four numbers',
     ['id 1 in 0.jpg: [5, 4, 20]']),
    (update('annotations', 0, bbox=[5, 4, float('nan'), 3]), 'error', 'not four numbers',
     ['id 1 in 0.jpg: [5, 4, nan, 3]']),
    (update('annotations', 0, bbox=[50, 4, 20, 20]), 'warning', 'box outside its image',
     ['id 1 in 0.jpg: [50, 4, 20, 20]']),
    (write_corners, 'error', 'looks like [left, top, right, bottom]', 12),
    (update('annotations', 0, area=0), 'warning', 'annotation with an area of 0', ['id 1']),
    (update('annotations', 0, segmentation=[]), 'error', 'without a mask', ['id 1']),
    (update('annotations', 0, segmentation=[[1, 2, 3, 4]]), 'warning', 'fewer than three points',
     ['id 1']),
    (update('annotations', 0, image_id=77), 'warning', 'annotation of an image that does not exist',
     ['id 1: image_id 77']),
    (update('annotations', 0, category_id=0), 'warning', 'annotation of a category that does',
     ['id 1: category_id 0']),
    (update('annotations', 0, id=2), 'error', 'annotations with the same id', ['id 2, 2 times']),
    (update('images', 0, id=1), 'error', 'images with the same id', ['id 1, 2 times']),
    (update('images', 0, width=30, height=40), 'error', 'image whose size differs',
     ['{train}/0.jpg: 60×40, annotated as 30×40']),
    (update('images', 0, width=31), 'note', 'image with a side below 32', ['0.jpg']),
    (lambda c: [image.update(height=31) for image in c['images']], 'error', 'side below 32', 6),
    (lambda c: [a.update(category_id=1) for a in c['annotations']], 'warning',
     'classes that occur in no image: crate', []),
    (update('images', 0, file_name='gone.jpg'), 'error', 'image missing or unreadable',
     ['{train}/gone.jpg (file not found)']),
    (update('categories', 0, name='bal'), 'error', "'ball' (Did you mean bal?)", []),
    (lambda c: (c['categories'].append(dict(id=3, name='x')), c['annotations'].append(
        dict(c['annotations'][0], id=99, category_id=3))), 'note', 'ignored: x', []),
    (lambda c: c['annotations'][0].pop('area'), 'note', 'without area, which is taken', ['id 1']),
    (lambda c: c['annotations'][0].pop('bbox'), 'error', "annotations without 'bbox'", ['id 1']),
    (lambda c: c.pop('images'), 'error', "has no list 'images'", []),
    (lambda c: c['annotations'].clear(), 'error', 'no image has a box of these classes', []),
    (lambda c: [c['annotations'].pop(0) for _ in 'ab'], 'note', 'image without a box', ['0.jpg']),
])
def test_mistakes_in_annotations(detection_data, change, level, message, where):
    detection_data.change(change)
    problem, = (p for p in detection_data.problems() if message in p.message)
    assert problem.level == level
    if isinstance(where, int):
        assert len(problem.where) == where
    else:
        assert problem.where == [place.format(train=detection_data.train_images) for place in where]


@pytest.mark.parametrize(('change', 'error'), [
    (lambda content: None, None),
    (update('annotations', 0, bbox=[5, 4, 0, 20]), None),
    (update('annotations', 0, segmentation=[[1, 2, 3, 4]]), None),
    (update('annotations', 0, segmentation=[]), KeyError),
    (lambda content: content['annotations'][0].pop('area'), None),
    (update('annotations', 0, bbox=[5, 4, 20]), UserError)])
def test_errors_stop_mmdet_and_warnings_do_not(detection_data, change, error):
    from mmdet.registry import DATASETS
    detection_data.change(change)
    config = detection_data.cfg.train_dataloader.dataset
    config.pipeline = [*config.pipeline[:2], config.pipeline[-1]]  # without random crops
    levels = {problem.level for problem in detection_data.problems()}
    if error is None:
        assert 'error' not in levels
        assert len(DATASETS.build(dict(config, _scope_='mmdet'))[0]['data_samples'].gt_instances)
    else:
        assert 'error' in levels
        with pytest.raises(error):
            DATASETS.build(dict(config, _scope_='mmdet'))[0]


def everywhere(**values) -> Callable[[dict], object]:
    return lambda content: [one.update(values) for one in content['annotations']]


def shift_masks(content: dict) -> None:
    for one in content['annotations']:
        one['segmentation'] = [[value + 30 if i % 2 == 0 else value
                                for i, value in enumerate(one['segmentation'][0])]]


def divide_boxes(content: dict) -> None:
    for one in content['annotations']:
        x, y, w, h = one['bbox']
        one['bbox'] = [x / 60, y / 40, w / 60, h / 40]


@pytest.mark.parametrize(('change', 'level', 'message'), [
    (everywhere(iscrowd=1), 'error', '12 of 12 objects are left out: 12 with "iscrowd"'),
    (everywhere(ignore=1), 'error', '12 of 12 objects are left out: 12 with "ignore"'),
    (everywhere(bbox=[100, 4, 20, 20]), 'error', '12 of 12 .* 12 with a box outside the image'),
    (everywhere(area=0), 'error', '12 of 12 objects are left out: 12 with an area of 0'),
    (update('annotations', 0, ignore=1), 'note', '1 of 12 objects are left out: 1 with "ignore"'),
    (divide_boxes, 'error', 'box in fractions of its image, from 0 to 1'),
    (shift_masks, 'error', r'object whose mask is elsewhere than its box \(12 of 12\)'),
    (everywhere(segmentation=dict(size=[60, 40], counts=[0, 2400])), 'error',
     r'size is \[width, height\]'),
    (everywhere(segmentation=dict(size=[30, 30], counts=[0, 900])), 'error', 'of another size'),
    (everywhere(segmentation=[[]]), 'error', 'annotation without a mask'),
    (update('annotations', 0, segmentation=[[1, 2, float('nan'), 4, 5, 6]]), 'error',
     'polygon with a coordinate that is no number'),
    (lambda c: c['categories'].append(dict(id=9, name='ball')), 'note', 'has the name of another'),
])
def test_what_would_starve_training(detection_data, change, level, message):
    detection_data.change(change)
    problem, = (p for p in detection_data.problems() if re.search(message, p.message))
    assert problem.level == level


def test_objects_of_images_that_are_not_used_are_not_left_out(tmp_path):
    data = DetectionData(tmp_path)
    data.cfg.train_dataloader.dataset.indices = data.cfg.val_dataloader.dataset.indices = 1
    assert not [p for p in data.problems() if 'left out' in p.message]


def test_the_order_of_categories_does_not_matter(detection_data):
    detection_data.change(lambda c: c['categories'].reverse())
    detection_data.change(update('annotations', 0, category_id=2))
    assert detection_data.problems() == []
    train, _ = inspection.inspect_splits(detection_data.cfg)
    assert train.label_counts == {0: 5, 1: 7}


def test_a_test_without_annotations_is_no_error(tmp_path):
    data = DetectionData(tmp_path)
    (tmp_path / 'val.json').write_text(json.dumps(dict(
        images=json.loads((tmp_path / 'val.json').read_text())['images'])))
    with open(data.config, 'a') as file:
        file.write("test_evaluator = dict(format_only=True, outfile_prefix='x')\n")
    found, = inspection.inspect_splits(data.cfg, splits=('test',))
    assert (found.total, found.problems) == (2, [])
    data = SegmentationData(tmp_path / 'masks')
    for mask in (tmp_path / 'masks/masks/val').iterdir():
        mask.unlink()
    with open(data.config, 'a') as file:
        file.write("test_dataloader = dict(dataset=dict(data_prefix=dict(\n"
                   "    img_path='images/val', seg_map_path=None)))\n")
    checks.check_data_exists(data.cfg, ('test',))
    found, = inspection.inspect_splits(data.cfg, splits=('test',))
    assert (found.total, found.problems) == (2, [])
    assert data.cfg.test_evaluator.format_only


def test_masks_are_judged_one_by_one(tmp_path):
    data = SegmentationData(tmp_path, [0, 1, 2])
    for i in (1, 4):
        write_mask(tmp_path / f'masks/train/{i}.png', [0, 255])
    problem, = data.problems()
    assert (problem.level, problem.where) == (
        'error', [f'{tmp_path}/masks/train/{i}.png' for i in (1, 4)])
    assert problem.message.startswith('mask that contains only 0 and 255')
    write_mask(tmp_path / 'masks/train/0.png', [0, 1, 255])
    problem, = data.problems()
    assert problem.level == 'warning', '255 may be the border of objects'


def test_ignored_pixels_have_a_row(tmp_path):
    data = SegmentationData(tmp_path, [0, 1, 2, 3], extra=ZERO)
    write_mask(tmp_path / 'masks/train/0.png', [1, 2, 3, 255])
    train, _ = inspection.inspect_splits(data.cfg)
    assert train.ignored == {0: 5 * 300, 255: 300}
    assert '    ignored: 0, 255; 25.0% of all pixels' in inspection.format_report([train])


def test_images_of_several_endings(tmp_path):
    data = SegmentationData(tmp_path)
    folder = tmp_path / 'images/train'
    (folder / '1.jpg').rename(folder / '1.JPG')
    (folder / '2.jpg').rename(folder / '2.jpeg')
    problem, = data.problems(sample=4)
    assert (problem.level, problem.where) == ('error', [f'{folder}/1.JPG', f'{folder}/2.jpeg'])
    line = re.search(r"img_suffix=\('.jpg', '.JPG', '.jpeg'\)", problem.fix).group()
    with open(data.config, 'a') as file:
        file.write(line + '\n')
    data = CustomData()
    data.config = tmp_path / 'mine.py'
    assert data.problems() == []
    assert [one.total for one in inspection.inspect_splits(data.cfg)] == [6, 2]


@pytest.mark.parametrize(('mode', 'message', 'fix'), [
    ('palette', 'in the colors of palette', 'convert_dataset.py'),
    ('colors', r'in 2 colors: \(0, 128, 0\), \(0, 0, 0\)', '--colors CONFIG'),
    ('photo', 'of [0-9]+ colors, which are no classes', 'export them again')])
def test_color_masks_are_named_as_what_they_are(tmp_path, mode, message, fix):
    extra = 'palette = [[0, 0, 0], [0, 128, 0], [9, 9, 9]]\n' if mode == 'palette' else ''
    data = SegmentationData(tmp_path, extra='reduce_zero_label = False\n' + extra)
    for mask in (tmp_path / 'masks').glob('*/*.png'):
        array = np.zeros((30, 40, 3), np.uint8)
        array[:, 10:, 1] = 128
        if mode == 'photo':
            array = RNG.integers(0, 255, (30, 40, 3), np.uint8)
        Image.fromarray(array).save(mask)
    train, val = data.problems()
    for problem in (train, val):
        assert problem.level == 'error'
        assert re.search(message, problem.message)
        assert fix in problem.fix


def test_images_of_16_bits_and_six_bands_are_read_by_the_pipeline(tmp_path):
    tifffile = pytest.importorskip('tifffile')
    data = SegmentationData(tmp_path, extra="""reduce_zero_label = False
img_suffix = '.tif'
in_chans = 6
model = dict(backbone=dict(init_cfg=None), data_preprocessor=dict(mean=[3e4], std=[2e4]))
""")
    for image in (tmp_path / 'images').glob('*/*.jpg'):
        tifffile.imwrite(image.with_suffix('.tif'),
                         RNG.integers(0, 60000, (30, 40, 6), dtype=np.uint16))
        image.unlink()
    assert data.problems() == []


NORMALIZE = 'model = dict(data_preprocessor=dict(mean={}, std={}))\n'
OTHER_UNITS = NORMALIZE.format([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
GRAY = 'in_chans = 1\n'
DO_NOT_FIT = 'the values of the images do not fit'


@pytest.mark.parametrize(('bits', 'extra', 'level', 'message', 'fix'), [
    (8, '', '', '', ''), (8, GRAY, '', '', ''),
    (8, OTHER_UNITS, 'error', rf'{DO_NOT_FIT}.*with mean=\[0.485, 0.456, 0.406\]',
     r'0 to 255: write mean=\[123.7, 116.3, 103.5\] and std=\[58.4, 57.12, 57.38\]'),
    (3, OTHER_UNITS, 'error', DO_NOT_FIT, '0 to 255'), (1, OTHER_UNITS, '', '', ''),
    (3, '', 'warning', rf'{DO_NOT_FIT}.*a spread of \[0.0', r'have mean=\[3.\d+, 3'),
    (8, NORMALIZE.format([0.0], [1.0]), 'warning', DO_NOT_FIT, r'have mean=\[1[23]\d'),
    (8, NORMALIZE.format([1000.0] * 3, [50.0] * 3), 'error', DO_NOT_FIT, r'have mean=\[1[23]\d'),
    (16, '', 'warning', 'more than 8 bits that the pipeline reads as 8', 'mean and std'),
    (12, '', 'error', 'more than 8 bits that the pipeline reads as 8', "to_float32=True"),
    (12, GRAY, 'error', 'more than 8 bits that the pipeline reads as 8', 'mean and std'),
    (12, GRAY + NORMALIZE.format([2000.0], [1200.0]), '', '', ''),
    (12, NORMALIZE.format([2000.0] * 3, [1200.0] * 3), '', '', ''),
    (16, GRAY + NORMALIZE.format([300.0], [200.0]), 'error', DO_NOT_FIT, r'have mean=\[3\d{4}\]'),
])
@pytest.mark.parametrize('task', ['segmentation', 'detection'])
def test_values_that_do_not_fit_mean_and_std(tmp_path, task, bits, extra, level, message, fix):
    if task == 'detection':
        data, endings = DetectionData(tmp_path), '*/*.jpg'
        for split in ('train', 'val'):
            file = tmp_path / f'{split}.json'
            file.write_text(file.read_text().replace('.jpg', '.png'))
        with open(data.config, 'a') as config:
            config.write(extra)
    else:
        data, endings = SegmentationData(tmp_path, extra=(
            f"reduce_zero_label = False\nimg_suffix = '.png'\n{extra}")), 'images/*/*.jpg'
    for image in tmp_path.glob(endings):
        shape = mmcv.imread(image).shape[:2 if GRAY in extra else 3]
        values = RNG.integers(0, 2**bits, shape, np.uint16 if bits > 8 else np.uint8)
        mmcv.imwrite(values, str(image.with_suffix('.png')))
        image.unlink()
    problems = data.problems()
    assert [problem.level for problem in problems] == [level] * 2 * bool(level)
    for problem in problems:
        assert re.search(message, problem.message)
        assert re.search(fix, problem.fix)


@pytest.mark.parametrize(('suffix', 'dtype', 'deep'), [
    ('.png', np.uint8, False), ('.png', np.uint16, True), ('.tif', np.uint8, False),
    ('.tif', np.uint16, True), ('.jpg', np.uint8, False)])
@pytest.mark.parametrize('shape', [(8, 9), (8, 9, 3)])
def test_files_whose_bits_are_lost(tmp_path, suffix, dtype, deep, shape):
    path = str(tmp_path / f'a{suffix}')
    mmcv.imwrite(np.full(shape, 200, dtype), path)
    facts = findings.read_image_facts(path, mmcv.imread)
    assert (facts.in_8_bits, facts.reduced) == (True, deep)
    facts = findings.read_image_facts(path, lambda path: mmcv.imread(path, 'unchanged'))
    assert (facts.in_8_bits, facts.reduced) == (not deep, False)
    assert facts.mean.tolist() == [200] * (shape[2] if len(shape) > 2 else 1)


def test_steps_of_ones_own_may_change_the_units(tmp_path):
    steps = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
             dict(type='Normalize', mean=[0.0] * 3, std=[255.0] * 3, to_rgb=False),
             dict(type='PackSegInputs')]
    extra = f'reduce_zero_label = False\n{OTHER_UNITS}'
    pipelines = f'train_pipeline = {steps}\ntest_pipeline = {steps}\n'
    assert SegmentationData(tmp_path, extra=extra + pipelines).problems() == []


def test_invalid_json_and_an_evaluator_with_another_file(tmp_path):
    data = DetectionData(tmp_path)
    (tmp_path / 'train.json').write_text('{"images": [')
    with open(data.config, 'a') as file:
        file.write(f"val_evaluator = dict(ann_file='{tmp_path}/train.json')\n")
    invalid, evaluator = data.problems()
    assert (invalid.level, evaluator.level) == ('error', 'warning')
    assert invalid.message.startswith(f'{tmp_path}/train.json is not valid JSON: Expecting')
    assert evaluator.message == ('the evaluator uses another annotation file than the dataset: '
                                 f'{tmp_path}/train.json')


def test_images_in_another_folder_are_found(tmp_path):
    data = DetectionData(tmp_path)
    (tmp_path / 'train').rename(tmp_path / 'images')
    (tmp_path / 'train').mkdir()
    (tmp_path / 'images').rename(tmp_path / 'train' / 'images')
    (problem,) = data.problems()
    assert problem.fix == (f"0.jpg is in {tmp_path}/train/images: set "
                           "data_prefix=dict(img='train/images') of the dataset")


def test_a_broken_image_is_not_looked_for_elsewhere(tmp_path):
    data = DetectionData(tmp_path)
    (tmp_path / 'train' / '0.jpg').write_bytes(b'no image')
    (problem,) = data.problems()
    assert problem.where == [f'{tmp_path}/train/0.jpg (not an image)']
    assert problem.fix == 'Replace the file, or remove it from the annotation file'


def test_a_category_without_boxes_needs_no_class(detection_data):
    detection_data.change(lambda content: content['categories'].append(dict(id=0, name='things')))
    assert detection_data.problems() == []


def test_the_quick_check_skips_large_files(detection_data, monkeypatch):
    monkeypatch.setattr(detection, 'QUICK_CHECK_BYTES', 10)
    assert [(p.level, p.message) for p in detection_data.problems(sample=2)] == [
        ('note', f'{detection_data.root}/{split}.json is large and was skipped by this quick check')
        for split in ('train', 'val')]
    assert detection_data.problems() == []


@pytest.mark.parametrize('kind', [SegmentationData, DetectionData])
def test_contact_sheet(tmp_path, kind):
    data = kind(tmp_path)
    (data.train_images / '0.jpg').write_bytes(b'')
    path = tmp_path / 'new' / 'dataset.png'
    contact_sheet.draw_contact_sheet(data.cfg, path, num_train=2, num_val=1)
    sheet = np.asarray(Image.open(path).convert('RGB'), float)
    unreadable, *readable = (sheet[60:250, left:left + 280] for left in (20, 340, 660))
    assert (unreadable == 255).mean() > 0.8, 'only text'
    for cell in readable:
        assert (cell == 255).mean() < 0.1
        assert np.abs(cell[..., 0] - cell[..., 2]).mean() > 20, 'annotations in color'


def test_contact_sheet_of_masks_in_colors(tmp_path):
    data = SegmentationData(tmp_path)
    write_mask(tmp_path / 'masks/train/0.png', [0, 1], mode='RGB')
    contact_sheet.draw_contact_sheet(data.cfg, tmp_path / 'dataset.png', num_train=2, num_val=1)
    sheet = np.asarray(Image.open(tmp_path / 'dataset.png').convert('RGB'))
    assert (sheet[60:250, 20:300] == 255).mean() > 0.8, 'only text'


def test_names_of_exports_fit_above_their_images():
    name = 'val: image-106_png.rf.2dadc4fa5109324053403338ab32181b.jpg'
    assert contact_sheet._shorten(name) == 'val: image-106_png.…403338ab32181b.jpg'
    assert contact_sheet._shorten('val: 000000000139.jpg') == 'val: 000000000139.jpg'


def test_check_dataset_reports_and_draws(tmp_path):
    data = SegmentationData(tmp_path)
    done = call_tool('tools/check_dataset.py', data.config, '--work-dir', tmp_path / 'run')
    assert done.returncode == 0
    assert '0 errors (✗), 0 warnings (!)' in done.stdout
    assert '\ntest: ' not in done.stdout, 'it is the validation data'
    Image.open(tmp_path / 'run' / 'dataset.png').verify()
    write_mask(tmp_path / 'masks/train/3.png', [0, 9])
    done = call_tool('tools/check_dataset.py', data.config, '--work-dir', tmp_path / 'run')
    assert done.returncode == 2
    assert '✗ mask values that are not classes: 9' in done.stdout
    assert f'{tmp_path}/masks/train/3.png' in done.stdout
    assert 'the data has errors' in done.stderr
    with open(data.config, 'a') as file:
        file.write("test_dataloader = dict(dataset=dict(data_prefix=dict("
                   "img_path='images/train', seg_map_path='masks/train')))\n")
    done = call_tool('tools/check_dataset.py', data.config, '--work-dir', tmp_path / 'run')
    assert f'test: 6 images in {tmp_path}/images/train' in done.stdout
    assert 'image that is also in the training data' in done.stdout


def test_training_checks_a_sample_first(tmp_path, capsys, monkeypatch):
    data = SegmentationData(tmp_path)
    cfg = data.cfg
    checks.check_data_sample(cfg, ('train', 'val'))
    assert ('Data: train 6 images, val 2 images; no problems in a sample of 16 each. '
            in capsys.readouterr().out)
    write_mask(tmp_path / 'masks/train/3.png', [0, 9])
    with pytest.raises(checks.UserError, match=r'(?s)that are not classes: 9.*check_data=False'):
        checks.check_data_sample(cfg, ('train', 'val'))
    disabled = checks.read_config(str(data.config), {'check_data': False})
    checks.check_data_sample(disabled, ('train',))
    monkeypatch.setenv('RANK', '1')
    checks.check_data_sample(cfg, ('train', 'val'))
    assert capsys.readouterr().out == ''


def test_training_warns_of_an_ignored_class(tmp_path, capsys):
    data = SegmentationData(tmp_path, extra=ZERO)
    checks.check_data_sample(data.cfg, ('train', 'val'))
    output = capsys.readouterr().out
    assert output.count('it is ignored and the other classes are shifted') == 2
    assert f'python tools/check_dataset.py {data.config}' in output
