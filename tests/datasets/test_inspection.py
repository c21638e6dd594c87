"""Data sets with one mistake each, and what is said of it."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convnext_mm.datasets import contact_sheet, findings, inspection
from convnext_mm.datasets.segmentation import _ranges, label_of
from convnext_mm.engine import checks
from tests.helpers import DETECTION, ROOT, SEGMENTATION, run_tool

RNG = np.random.default_rng(0)


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (size[1], size[0], 3), np.uint8)).save(path)


def mask(path: Path, values: list[int], size: tuple[int, int] = (40, 30),
         mode: str = 'L', **options) -> None:
    """Stripes of the values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stripes = np.array(values)[np.arange(size[0]) * len(values) // size[0]]
    array = np.broadcast_to(stripes, (size[1], size[0]))
    image = Image.fromarray(array.astype(np.uint8 if max(values) < 256 else np.uint16))
    if mode == 'P':
        image.putpalette(list(range(256)) * 3)
    elif mode == 'RGB':
        image = image.convert('RGB')
    image.save(path, **options)


class Segmentation:
    """Six pictures of three classes for training, two for validation, without a mistake."""

    def __init__(self, root: Path, values: list[int] = (0, 1, 2), mode: str = 'L',
                 suffix: str = '.png', extra: str = 'reduce_zero_label = False\n') -> None:
        self.root = root
        for split, count in (('train', 6), ('val', 2)):
            for i in range(count):
                picture(root / 'images' / split / f'{i}.jpg')
                mask(root / 'masks' / split / f'{i}{suffix}', list(values), mode=mode)
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

    def found(self, sample: int | None = None) -> list[findings.Problem]:
        cfg = checks.read_config(str(self.config))
        return [p for one in inspection.inspect(cfg, sample) for p in one.problems]


@pytest.mark.parametrize(('values', 'options', 'level', 'what', 'fix'), [
    ([0, 255], {}, 'error', 'the masks hold 0 and 255 only', r'mask\[mask == 255\] = 1'),
    ([0, 255], dict(extra=''), 'error', 'the masks hold 0 and 255 only', 'Write 1 for 255'),
    ([0, 1, 2], dict(extra=''), 'warning', r"masks hold no 3, which would be 'sky'",
     r"\('road'\), it is swallowed and the others are shifted: set reduce_zero_label = False"),
    ([0, 1, 2, 3], {}, 'error', 'values outside of the classes: 3 ',
     'If 0 is "no class", set reduce_zero_label = True'),
    ([1, 2, 3], {}, 'error', 'values outside of the classes: 3 ', 'count from 1: set reduce_ze'),
    ([0, 1, 7], {}, 'error', 'values outside of the classes: 7 ', 'Are classes missing'),
    ([0, 75, 113], {}, 'error', 'outside of the classes: 75, 113', 'grey levels .*{0: 0, 75: 1, '),
    ([0, 4, 9], dict(mode='P'), 'error', 'classes: 4, 9 .*', 'palette PNGs whose indices'),
    ([0, 1, 2], dict(mode='RGB'), 'error', 'mask in colours', 'one channel'),
    (range(30), {}, 'error', r'outside of the classes: 3–29', 'resized with interpolation'),
    ([0, 120, 250], dict(suffix='.jpg'), 'error', 'outside of the classes', 'masks are JPEGs'),
    ([0, 300], {}, 'error', 'outside of the classes: 300', '8 bits'),
    ([0], dict(extra=''), 'error', 'no pixel of any class in any mask', 'Is 0 a class'),
    ([0, 2], {}, 'warning', 'classes that are in no picture: car', 'nan'),
    ([0, 1, 2], dict(extra='reduce_zero_label = False\nimg_suffix = ".png"'), 'error',
     'no picture ends in .png in .*: there are . .jpg', 'Set img_suffix'),
])
def test_labels(tmp_path, values, options, level, what, fix):
    problems = Segmentation(tmp_path, values, **options).found()
    assert {p.level for p in problems} == {level}
    import re
    assert all(re.search(what, p.what) and re.search(fix, p.fix) for p in problems), problems
    assert len(problems) == 2, 'one for each split'


@pytest.mark.parametrize(('values', 'options'), [
    ([0, 1, 2], {}), ([0, 1, 2, 255], {}), ([0, 1, 2], dict(mode='P')),
    ([0, 1, 2, 3], dict(extra='')), ([1, 2, 3, 255], dict(extra=''))])
@pytest.mark.parametrize('sample', [None, 2])
def test_what_is_right_is_left_alone(tmp_path, values, options, sample):
    assert Segmentation(tmp_path, values, **options).found(sample) == []


def test_files(tmp_path):
    data = Segmentation(tmp_path)
    images, masks = tmp_path / 'images/train', tmp_path / 'masks/train'
    (images / '0.jpg').write_bytes((images / '0.jpg').read_bytes()[:400])
    (images / '1.jpg').write_bytes(b'<html>')
    (masks / '2.png').unlink()
    mask(masks / '3.png', [0, 1, 2], size=(30, 40))
    mask(masks / 'lonely.png', [0, 1, 2])
    mask(masks / '4.png', [255])
    (images / '5.jpg').write_bytes((tmp_path / 'images/val/1.jpg').read_bytes())
    found = {p.what: (p.level, p.where) for p in data.found()}
    assert list(found) == ['picture missing or unreadable', 'mask missing or unreadable',
                           'mask of another size than its picture',
                           'mask without a picture that ends in .jpg',
                           'mask without a pixel of any class: all of it is ignored',
                           'pictures are in the training data as well']
    broken = found['picture missing or unreadable'][1]
    assert 'truncated' in broken[0].lower()
    assert broken[1] == f'{images}/1.jpg (no picture)'
    assert found['mask missing or unreadable'][1] == [f'{masks}/2.png (not there)']
    assert found['mask of another size than its picture'][1] == [
        f'{masks}/3.png: picture 40×30, mask 30×40']
    assert found['mask without a picture that ends in .jpg'] == (
        'warning', [f'{masks}/lonely.png'])
    assert found['pictures are in the training data as well'] == (
        'warning', [f'{tmp_path}/images/val/1.jpg = {images}/5.jpg'])


def test_a_turned_picture_has_the_size_that_mmcv_reads(tmp_path):
    data = Segmentation(tmp_path)
    path = tmp_path / 'images/train/0.jpg'
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    import mmcv
    assert mmcv.imread(path).shape[:2] == (40, 30)
    assert [p.where for p in data.found()] == [
        [f'{tmp_path}/masks/train/0.png: picture 30×40, mask 40×30']]


def test_frequencies_are_those_of_the_masks(tmp_path):
    data = Segmentation(tmp_path, [0, 0, 1, 255])
    mask(tmp_path / 'masks/train/0.png', [2])
    train, val = inspection.inspect(checks.read_config(str(data.config)))
    assert train.amounts == {0: 5 * 600, 1: 5 * 300, 2: 1200}
    assert train.pictures == {0: 5, 1: 5, 2: 1}
    assert val.amounts == {0: 1200, 1: 600}
    text = inspection.report([train, val])
    assert 'road         3000   52.6%         5  ████████████████████' in text


def test_labels_are_those_of_mmseg():
    from mmseg.datasets.transforms import LoadAnnotations
    raw = np.arange(256, dtype=np.uint8).reshape(16, 16)
    import cv2
    for reduce in (True, False):
        for label_map in (None, {0: 3, 1: 255, 2: 0}):
            load = LoadAnnotations()
            result = dict(seg_map_path='x', seg_fields=[], reduce_zero_label=reduce,
                          label_map=label_map)
            from unittest import mock
            with mock.patch('mmengine.fileio.get',
                            return_value=cv2.imencode('.png', raw)[1].tobytes()):
                load._load_seg_map(result)
            labels = [label_of(v, reduce, label_map) for v in range(256)]
            assert result['gt_seg_map'].ravel().tolist() == labels


def test_ranges():
    assert _ranges([0, 1, 2, 5, 6, 9]) == '0–2, 5, 6, 9'


class Detection:
    """Six pictures with two boxes each for training, two for validation, without a mistake."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for split, count in (('train', 6), ('val', 2)):
            content = dict(images=[], annotations=[], categories=[
                dict(id=1, name='ball'), dict(id=2, name='crate')])
            for i in range(count):
                picture(root / split / f'{i}.jpg', (60, 40))
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

    def change(self, change) -> None:
        path = self.root / 'train.json'
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    found = Segmentation.found


def set_in(kind: str, index: int, **values):
    return lambda content: content[kind][index].update(values)


def corners(content: dict) -> None:
    for one in content['annotations']:
        x, y, w, h = one['bbox']
        one['bbox'] = [x + 20, y + 10, x + w + 20, y + h + 10]


@pytest.mark.parametrize('sample', [None, 2])
def test_detection_that_is_right_is_left_alone(tmp_path, sample):
    assert Detection(tmp_path).found(sample) == []


@pytest.mark.parametrize(('change', 'level', 'what', 'where'), [
    (set_in('annotations', 0, bbox=[5, 4, 0, 20]), 'warning', 'box without a width or height',
     ['id 1 in 0.jpg: [5, 4, 0, 20]']),
    (set_in('annotations', 0, bbox=[5, 4, 20]), 'error', 'box that is not four numbers', 1),
    (set_in('annotations', 0, bbox=[5, 4, float('nan'), 3]), 'error', 'not four numbers', 1),
    (set_in('annotations', 0, bbox=[50, 4, 20, 20]), 'warning', 'box that leaves its picture',
     ['id 1 in 0.jpg: [50, 4, 20, 20]']),
    (corners, 'error', 'looks like [left, top, right, bottom]', 12),
    (set_in('annotations', 0, area=0), 'warning', 'annotation with an area of 0', ['id 1']),
    (set_in('annotations', 0, segmentation=[]), 'error', 'without a mask', ['id 1']),
    (set_in('annotations', 0, segmentation=[[1, 2, 3, 4]]), 'warning', 'less than three points',
     ['id 1']),
    (set_in('annotations', 0, image_id=77), 'warning', 'annotation of a picture that is not there',
     ['id 1: image_id 77']),
    (set_in('annotations', 0, category_id=0), 'warning', 'annotation of a category that is not',
     ['id 1: category_id 0']),
    (set_in('annotations', 0, id=2), 'error', 'annotations that share an id', ['id 2, 2 times']),
    (set_in('images', 0, id=1), 'error', 'images that share an id', ['id 1, 2 times']),
    (set_in('images', 0, width=30, height=40), 'error', 'picture of another size', 1),
    (set_in('images', 0, width=31), 'note', 'picture with a side below 32', ['0.jpg']),
    (lambda c: [image.update(height=31) for image in c['images']], 'error', 'side below 32', 6),
    (lambda c: [a.update(category_id=1) for a in c['annotations']], 'warning',
     'classes that are in no picture: crate', 0),
    (set_in('images', 0, file_name='gone.jpg'), 'error', 'picture missing or unreadable', 1),
    (set_in('categories', 0, name='bal'), 'error', "'ball' (Did you mean bal?)", 0),
    (lambda c: c['categories'].append(dict(id=3, name='x')), 'note', 'left out: x', 0),
    (lambda c: c['annotations'][0].pop('area'), 'error', "annotations without 'area'", ['id 1']),
    (lambda c: c.pop('images'), 'error', "has no list 'images'", 0),
    (lambda c: c['annotations'].clear(), 'error', 'no picture has a box of these classes', 0),
    (lambda c: [c['annotations'].pop(0) for _ in 'ab'], 'note', 'picture without a box', ['0.jpg']),
])
def test_annotations(tmp_path, change, level, what, where):
    data = Detection(tmp_path)
    data.change(change)
    found = [p for p in data.found() if what in p.what]
    assert [p.level for p in found] == [level], data.found()
    assert (found[0].where if isinstance(where, list) else len(found[0].where)) == where


def test_what_mmdet_needs_is_what_is_called_an_error(tmp_path):
    """The annotations that are called errors do stop mmdet; those of a warning do not."""
    from mmdet.registry import DATASETS

    def loads(change) -> bool:
        data = Detection(tmp_path)
        data.change(change)
        cfg = checks.read_config(str(data.config))
        try:
            dataset = DATASETS.build(dict(cfg.train_dataloader.dataset, _scope_='mmdet'))
            [dataset[i] for i in range(len(dataset))]
        except Exception:
            return False
        return True
    assert loads(lambda content: None)
    assert loads(set_in('annotations', 0, bbox=[5, 4, 0, 20]))
    assert loads(set_in('annotations', 0, segmentation=[[1, 2, 3, 4]]))
    assert not loads(set_in('annotations', 0, segmentation=[]))
    assert not loads(lambda content: content['annotations'][0].pop('area'))
    assert not loads(set_in('annotations', 0, bbox=[5, 4, 20]))


def test_a_broken_file_and_another_evaluator(tmp_path):
    data = Detection(tmp_path)
    (tmp_path / 'train.json').write_text('{"images": [')
    with open(data.config, 'a') as file:
        file.write(f"val_evaluator = dict(ann_file='{tmp_path}/train.json')\n")
    assert [(p.level, p.what[:40]) for p in data.found()] == [
        ('error', f'{tmp_path}/train.json is no JSON: Expecting'[:40]),
        ('warning', 'evaluated by another file than the data ')]


def test_a_large_file_is_left_out_of_the_quick_check(tmp_path, monkeypatch):
    from convnext_mm.datasets import detection
    monkeypatch.setattr(detection, 'QUICK_BYTES', 10)
    data = Detection(tmp_path)
    assert {p.level for p in data.found(sample=2)} == {'note'}
    assert data.found() == []


@pytest.mark.parametrize('kind', [Segmentation, Detection])
def test_contact_sheet(tmp_path, kind):
    data = kind(tmp_path)
    cfg = checks.read_config(str(data.config))
    contact_sheet.draw(cfg, tmp_path / 'a' / 'dataset.png', train=4, val=2)
    whole = np.asarray(Image.open(tmp_path / 'a' / 'dataset.png').convert('RGB'), float)
    assert whole.shape[0] > 300
    assert (whole[:, :, 0] != whole[:, :, 2]).mean() > 0.05, 'annotations have colours'
    for path in (tmp_path / 'images/train', tmp_path / 'train'):
        if path.is_dir():
            (path / '0.jpg').write_bytes(b'')
    contact_sheet.draw(cfg, tmp_path / 'a' / 'dataset.png', train=4, val=2)
    broken = np.asarray(Image.open(tmp_path / 'a' / 'dataset.png').convert('RGB'), float)
    quarter = np.s_[40:250, 20:300]
    assert broken[quarter].std() < whole[quarter].std() / 1.5, 'the first cell says why'


def test_the_tool_reports_and_draws(tmp_path):
    data = Segmentation(tmp_path)
    done = run_tool('tools/check_dataset.py', data.config, '--work-dir', tmp_path / 'run')
    assert '0 errors (✗), 0 warnings (!)' in done.stdout
    assert (tmp_path / 'run' / 'dataset.png').stat().st_size > 10_000
    mask(tmp_path / 'masks/train/3.png', [0, 9])
    done = run_tool('tools/check_dataset.py', data.config, '--work-dir', tmp_path / 'run',
                    check=False)
    assert done.returncode == 2
    assert '✗ values outside of the classes: 9' in done.stdout
    assert f'{tmp_path}/masks/train/3.png' in done.stdout
    assert 'Traceback' not in done.stdout + done.stderr


def test_training_looks_at_some_of_it_first(tmp_path, capsys, monkeypatch):
    data = Segmentation(tmp_path)
    cfg = checks.read_config(str(data.config))
    checks.check_data_sample(cfg, ('train', 'val'))
    assert ('Data: train 6 images, val 2 images; no problems in a sample of 16 each. '
            in capsys.readouterr().out)
    mask(tmp_path / 'masks/train/3.png', [0, 9])
    with pytest.raises(checks.UserError, match=r'(?s)values outside of the classes: 9.*check_data'):
        checks.check_data_sample(cfg, ('train', 'val'))
    checks.check_data_sample(checks.read_config(str(data.config), {'check_data': False}), ('train',))
    monkeypatch.setenv('RANK', '1')
    checks.check_data_sample(cfg, ('train', 'val'))
    assert capsys.readouterr().out == ''


def test_a_swallowed_class_is_said_at_the_start(tmp_path, capsys):
    data = Segmentation(tmp_path, extra='')
    checks.check_data_sample(checks.read_config(str(data.config)), ('train', 'val'))
    said = capsys.readouterr().out
    assert said.count('it is swallowed and the others are shifted') == 2
    assert f'python tools/check_dataset.py {data.config}' in said
