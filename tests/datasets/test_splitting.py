"""Splits of images, with near-duplicates on one side."""
import json

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from convnext_mm import UserError
from convnext_mm.datasets.splitting import group_duplicates, split_indices
from tests.helpers import call_tool


@pytest.fixture
def pictures(tmp_path):
    """Twenty pictures, of which 1 is a copy of 0 at half size, and 3 a brighter one of 2."""
    generator = np.random.default_rng(0)
    paths = []
    for i in range(20):
        path = tmp_path / 'images' / f'{i:02}.jpg'
        path.parent.mkdir(exist_ok=True)
        image = Image.fromarray(generator.integers(0, 255, (12, 16, 3), np.uint8)).resize(
            (160, 120), Image.Resampling.BICUBIC)
        if i == 1:
            image = Image.open(paths[0]).resize((80, 60))
        elif i == 3:
            image = ImageEnhance.Brightness(Image.open(paths[2])).enhance(1.02)
        image.save(path, quality=90)
        paths.append(str(path))
    return paths


def test_near_duplicates_are_one_group(pictures):
    groups = [group for group in group_duplicates(pictures) if len(group) > 1]
    assert groups == [[0, 1], [2, 3]]


def test_unreadable_images_are_groups_of_their_own(tmp_path):
    assert group_duplicates([str(tmp_path / 'a.jpg'), str(tmp_path / 'b.jpg')]) == [[0], [1]]


@pytest.mark.parametrize('seed', range(5))
def test_groups_stay_on_one_side(seed):
    groups = [[0, 1, 2], *([i] for i in range(3, 20))]
    train, val = split_indices(groups, 0.2, seed)
    assert sorted(train + val) == list(range(20))
    assert len(val) == 4
    assert {0, 1, 2} <= set(train) or {0, 1, 2} <= set(val)
    assert split_indices(groups, 0.2, seed) == (train, val)
    assert len({tuple(split_indices(groups, 0.2, one)[1]) for one in range(5)}) > 1


def test_one_image_cannot_be_split():
    with pytest.raises(UserError, match='2 images cannot be split'):
        split_indices([[0, 1]], 0.5)


def test_the_tool(pictures, tmp_path):
    done = call_tool('tools/split_dataset.py', tmp_path / 'images', tmp_path / 'out', '--val', 0.3)
    assert f"ann_file='{tmp_path}/out/train.txt'" in done.stdout
    lists = [(tmp_path / 'out' / f'{split}.txt').read_text().split() for split in ('train', 'val')]
    assert [len(one) for one in lists] == [14, 6]
    assert sorted(lists[0] + lists[1]) == [f'{i:02}' for i in range(20)]
    (tmp_path / 'a.json').write_text(json.dumps(dict(
        images=[dict(id=i, file_name=f'{i:02}.jpg', width=9, height=9) for i in range(20)],
        annotations=[], categories=[dict(id=1, name='a')])))
    done = call_tool('tools/split_dataset.py', tmp_path / 'images', tmp_path / 'coco',
                     '--annotations', tmp_path / 'a.json')
    assert f"ann_file='{tmp_path}/coco/val.json'" in done.stdout
    assert len(json.loads((tmp_path / 'coco/val.json').read_text())['images']) == 4
    done = call_tool('tools/split_dataset.py', tmp_path / 'images', tmp_path / 'out', '--val', 2)
    assert (done.returncode, 'must be a share' in done.stderr) == (2, True)
