import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from convnext_mm import UserError
from convnext_mm.demo_data import draw_scene, make


def digest(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.md5(p.read_bytes()).hexdigest()
            for p in sorted(root.rglob('*')) if p.is_file()}


def test_same_seed_same_bytes_other_seed_other_pictures(tmp_path):
    first, second, third = (digest(make(tmp_path / name, 3, 2, seed))
                            for name, seed in (('a', 0), ('b', 0), ('c', 1)))
    assert first == second
    assert not {first[k] for k in first if k.endswith('.jpg')} & set(third.values())


def test_splits_share_no_picture(demo_data):
    folder = demo_data / 'ADEChallengeData2016' / 'images'
    train, val = (set(digest(folder / split).values()) for split in ('training', 'validation'))
    assert (len(train), len(val)) == (8, 4)
    assert not train & val


def test_both_layouts_hold_the_same_pictures(demo_data):
    ade = demo_data / 'ADEChallengeData2016' / 'images' / 'validation'
    assert (sorted(digest(ade).values())
            == sorted(digest(demo_data / 'coco' / 'val2017').values()))


def test_masks_and_boxes_agree(demo_data):
    content = json.loads((demo_data / 'coco/annotations/instances_train2017.json').read_text())
    assert [c['name'] for c in content['categories']] == ['ball', 'crate', 'star', 'leaf']
    assert len(content['annotations']) >= 12
    for image in content['images']:
        labels = cv2.imread(str(demo_data / 'ADEChallengeData2016/annotations/training'
                                / f'ADE_train_{image["id"]:08d}.png'), cv2.IMREAD_UNCHANGED)
        assert labels.shape == (image['height'], image['width'])
        assert labels.min() >= 1
        assert labels.max() <= 8
        for ann in (a for a in content['annotations'] if a['image_id'] == image['id']):
            x, y, w, h = ann['bbox']
            inside = labels[y:y + h, x:x + w] == 4 + ann['category_id']
            assert inside.sum() >= ann['area'] >= 60
            drawn = annotated(ann['segmentation'], labels.shape)
            assert int(drawn.sum()) == pytest.approx(ann['area'], rel=0.1)
            assert cv2.boundingRect(drawn) == (x, y, w, h)


def annotated(segmentation: list | dict, shape: tuple[int, int]) -> np.ndarray:
    """The mask that polygons or run lengths stand for, drawn by another library."""
    if isinstance(segmentation, dict):
        from pycocotools import mask
        return mask.decode(mask.frPyObjects(segmentation, *shape))
    drawn = np.zeros(shape, np.uint8)
    for polygon in segmentation:
        cv2.fillPoly(drawn, [np.array(polygon).reshape(-1, 2)], 1)
    return drawn


def test_classes_are_all_there_and_in_balance():
    rng = np.random.default_rng(0)
    share = np.zeros(9)
    for _ in range(60):
        _, labels, _ = draw_scene(rng)
        share += np.bincount(labels.ravel(), minlength=9) / labels.size / 60
    assert share[0] == 0
    assert share[1:].min() > 0.02


def test_a_second_call_writes_nothing(tmp_path):
    root = make(tmp_path / 'demo', 2, 1)
    before = {p: p.stat().st_mtime_ns for p in root.rglob('*')}
    make(root, 2, 1)
    assert before == {p: p.stat().st_mtime_ns for p in root.rglob('*')}


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / 'thesis.txt').write_text('mine')
    with pytest.raises(UserError, match='not made by this tool'):
        make(tmp_path, 2, 1)
    assert (tmp_path / 'thesis.txt').read_text() == 'mine'
