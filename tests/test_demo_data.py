import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from convnext_mm import UserError
from convnext_mm.demo_data import STAMP, _polygons, draw_scene, make


def digest(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.md5(p.read_bytes()).hexdigest()
            for p in sorted(root.rglob('*')) if p.is_file()}


def test_seed_determines_the_files(tmp_path):
    first, second, third = (digest(make(tmp_path / name, 3, 2, seed))
                            for name, seed in (('a', 0), ('b', 0), ('c', 1)))
    assert first == second
    assert not {first[k] for k in first if k.endswith('.jpg')} & set(third.values())


def test_splits_share_no_image(demo_data):
    folder = demo_data / 'ADEChallengeData2016' / 'images'
    train, val = (set(digest(folder / split).values()) for split in ('training', 'validation'))
    assert (len(train), len(val)) == (8, 4)
    assert not train & val


def test_both_layouts_contain_the_same_images(demo_data):
    ade = demo_data / 'ADEChallengeData2016' / 'images' / 'validation'
    assert (sorted(digest(ade).values())
            == sorted(digest(demo_data / 'coco' / 'val2017').values()))


def drawn_instances(split: str, count: int) -> list[list[tuple[str, np.ndarray]]]:
    """Class names and masks of each image, drawn again from the fixture's seed."""
    rng = np.random.default_rng([0, split == 'val'])
    return [draw_scene(rng)[2] for _ in range(count)]


def decode(segmentation: list[list[float]], shape: tuple[int, int]) -> np.ndarray:
    """The mask that COCO's own rasterizer makes of polygons."""
    from pycocotools import mask
    return mask.decode(mask.merge(mask.frPyObjects(segmentation, *shape)))


@pytest.mark.parametrize(('split', 'count'), [('train', 8), ('val', 4)])
def test_coco_annotations_equal_what_was_drawn(split, count, demo_data):
    content = json.loads((demo_data / f'coco/annotations/instances_{split}2017.json').read_text())
    assert [c['name'] for c in content['categories']] == ['ball', 'crate', 'star', 'leaf']
    names = {c['id']: c['name'] for c in content['categories']}
    for image, instances in zip(content['images'], drawn_instances(split, count), strict=True):
        annotations = [a for a in content['annotations'] if a['image_id'] == image['id']]
        for annotation, (name, mask) in zip(annotations, instances, strict=True):
            assert mask.shape == (image['height'], image['width'])
            assert names[annotation['category_id']] == name
            np.testing.assert_array_equal(decode(annotation['segmentation'], mask.shape), mask)
            assert annotation['area'] == mask.sum() >= 60
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            # COCO's x and y are the outer edges of the first column and row.
            assert annotation['bbox'] == [columns[0], rows[0], columns[-1] - columns[0] + 1,
                                          rows[-1] - rows[0] + 1]


def test_ade20k_masks_agree_with_coco(demo_data):
    for index, instances in enumerate(drawn_instances('train', 8), 1):
        labels = cv2.imread(str(demo_data / 'ADEChallengeData2016/annotations/training'
                                / f'ADE_train_{index:08d}.png'), cv2.IMREAD_UNCHANGED)
        assert labels.min() >= 1
        assert labels.max() <= 8
        for name, mask in instances:
            label = 5 + ('ball', 'crate', 'star', 'leaf').index(name)
            assert (labels[mask > 0] == label).all()


def test_mmdet_loads_the_drawn_masks(demo_data):
    from mmcv.transforms import LoadImageFromFile
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations
    dataset = CocoDataset(
        data_root=str(demo_data / 'coco'), ann_file='annotations/instances_val2017.json',
        data_prefix=dict(img='val2017'),
        metainfo=dict(classes=('ball', 'crate', 'star', 'leaf')), pipeline=[])
    for index, instances in enumerate(drawn_instances('val', 4)):
        results = LoadImageFromFile()(dataset.get_data_info(index))
        results = LoadAnnotations(with_bbox=True, with_mask=True)(results)
        np.testing.assert_array_equal(results['gt_masks'].to_ndarray(),
                                      np.stack([mask for _, mask in instances]))
        np.testing.assert_array_equal(results['gt_masks'].get_bboxes('hbox').tensor,
                                      results['gt_bboxes'].tensor)
        assert not results['gt_ignore_flags'].any()


@pytest.mark.parametrize('rows', [
    ['1'],
    ['11', '11'],
    ['10', '01'],
    ['01110', '11011', '01110'],
    ['11111', '10101', '11111', '10001', '11111'],
    ['111', '101', '110']],
    ids=['pixel', 'image', 'diagonal', 'hole', 'three holes', 'hole open at a corner'])
def test_polygons_of_any_shape_decode_to_it(rows):
    mask = np.uint8([[int(c) for c in row] for row in rows])
    polygons = _polygons(mask)
    np.testing.assert_array_equal(decode(polygons, mask.shape), mask)
    area = 0
    for polygon in polygons:
        assert all(isinstance(value, float) for value in polygon), 'mmdet would truncate integers'
        x, y = np.reshape(polygon, (-1, 2)).T
        area += abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
    assert area == mask.sum()


def test_classes_are_balanced():
    rng = np.random.default_rng(0)
    share = np.zeros(9)
    for _ in range(60):
        _, labels, _ = draw_scene(rng)
        share += np.bincount(labels.ravel(), minlength=9) / labels.size / 60
    assert share[0] == 0
    assert share[1:].min() > 0.02


def test_second_call_writes_nothing(tmp_path):
    root = make(tmp_path / 'demo', 2, 1)
    before = {p: p.stat().st_mtime_ns for p in root.rglob('*')}
    make(root, 2, 1)
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob('*')}


def test_data_of_an_older_version_is_replaced(tmp_path):
    root = make(tmp_path / 'demo', 2, 1)
    complete = digest(root)
    stamp = json.loads((root / STAMP).read_text())
    del stamp['version']
    (root / STAMP).write_text(json.dumps(stamp))
    (root / 'coco/annotations/instances_train2017.json').write_text('{}')
    make(root, 2, 1)
    assert digest(root) == complete


def test_other_folders_are_not_touched(tmp_path):
    (tmp_path / 'thesis.txt').write_text('mine')
    with pytest.raises(UserError, match='not made by this tool'):
        make(tmp_path, 2, 1)
    assert (tmp_path / 'thesis.txt').read_text() == 'mine'
