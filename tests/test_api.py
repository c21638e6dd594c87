"""Training, checking and predicting from Python."""
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import convnext_mm as cm
from convnext_mm import UserError
from convnext_mm.api import Model
from convnext_mm.key_values import parse_value
from tests.helpers import (
    DEMO_DETECTION,
    DEMO_SEGMENTATION,
    ROOT,
    SMALL_DETECTION,
    SMALL_SEGMENTATION,
    build_model,
)


def as_keywords(options: list[str]) -> dict[str, object]:
    return {key: parse_value(value) for key, value in (one.split('=', 1) for one in options)}


SMALL = {DEMO_SEGMENTATION: as_keywords(SMALL_SEGMENTATION),
         DEMO_DETECTION: as_keywords(SMALL_DETECTION)}


@pytest.fixture(scope='module')
def models(tmp_path_factory) -> dict[str, Model]:
    """Small models of both tasks with random weights, in a folder of their own."""
    made = {}
    for config, options in SMALL.items():
        folder = tmp_path_factory.mktemp('run')
        torch.save(dict(state_dict=build_model(config, options).state_dict()),
                   folder / 'best_1.pth')
        made[config] = cm.load(ROOT / config, folder / 'best_1.pth', 'cpu', **options)
    return made


@pytest.fixture
def picture(tmp_path) -> tuple[Path, np.ndarray]:
    """An image file without loss, and its pixels in RGB."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    noise[..., 0] //= 4  # bands in another order are another image
    image = Image.fromarray(noise).resize((120, 90))
    image.save(tmp_path / 'a.png')
    return tmp_path / 'a.png', np.asarray(image)


def values(result) -> np.ndarray:
    if 'pred_sem_seg' in result.sample:
        return result.class_map
    return np.concatenate([result.boxes, result.scores[:, None], result.labels[:, None]], axis=1)


@pytest.mark.parametrize('config', [DEMO_SEGMENTATION, DEMO_DETECTION])
def test_files_arrays_and_images_give_the_same(config, models, picture):
    path, rgb = picture
    model = models[config]
    threshold = dict(score_threshold=0.0)
    expected = values(model(str(path), **threshold))
    assert len(np.unique(expected)) > 1
    bgr = cv2.imread(str(path))
    for image, channels in ((path, None), (rgb, 'rgb'), (bgr, 'bgr'), (Image.open(path), None)):
        assert np.array_equal(values(model(image, channels, **threshold)), expected)
    assert not np.array_equal(values(model(rgb, 'bgr', **threshold)), expected)
    several = model([path, rgb], 'rgb', **threshold)
    assert [np.array_equal(values(one), expected) for one in several] == [True, True]


def test_results_of_segmentation(models, picture, tmp_path):
    result = models[DEMO_SEGMENTATION](picture[0])
    assert result.class_map.shape == (90, 120)
    assert result.class_map.dtype == np.int64
    assert np.array_equal(result.sample.pred_sem_seg.data[0].numpy(), result.class_map)
    assert result.class_names[0] == 'sand'
    assert result._repr_png_().startswith(b'\x89PNG')
    result.save(tmp_path / 'out.png')
    assert Image.open(tmp_path / 'out.png').width == 800
    with pytest.raises(UserError, match='segmentation has a class_map'):
        _ = result.boxes


def test_results_of_detection(models, picture):
    everything = models[DEMO_DETECTION](picture[0], score_threshold=0.0)
    assert len(everything.scores) == len(everything.sample.pred_instances) > 1
    assert everything.masks.shape == (len(everything.boxes), 90, 120)
    assert everything.masks.dtype == bool
    threshold = float(np.median(everything.scores))
    some = models[DEMO_DETECTION](picture[0], score_threshold=threshold)
    kept = everything.scores >= threshold
    assert 0 < kept.sum() < len(kept)
    assert np.array_equal(some.boxes, everything.boxes[kept])
    assert np.array_equal(some.labels, everything.labels[kept])
    with pytest.raises(UserError, match='class_map is of segmentation'):
        _ = some.class_map


def test_gray_arrays_are_read_as_gray_files(models, picture, tmp_path):
    gray = picture[1][..., 0]
    Image.fromarray(gray).save(tmp_path / 'gray.png')
    model = models[DEMO_SEGMENTATION]
    expected = model(tmp_path / 'gray.png').class_map
    for image in (gray, gray[..., None], Image.fromarray(gray)):
        assert np.array_equal(model(image).class_map, expected)


@pytest.mark.parametrize(('image', 'message'), [
    (np.zeros((9, 9, 3), np.uint8), "channels='rgb' or 'bgr' must say"),
    (np.zeros((9, 9, 4), np.uint8), r'shape \(9, 9, 4\): expected \(height, width, 3\)'),
    (np.zeros((9,), np.uint8), r'image of shape \(9,\)'),
    (np.zeros((9, 9)), 'values from 0 to 1'), (3, 'image of type int'),
    ('no.png', r'No image found: .*/no.png'), (b'text', 'cannot be read: not an image')])
def test_images_that_cannot_be_used(image, message, models, tmp_path):
    if isinstance(image, bytes):
        (tmp_path / 'a.png').write_bytes(image)
        image = tmp_path / 'a.png'
    with pytest.raises(UserError, match=message):
        models[DEMO_SEGMENTATION](image)


def test_checkpoints_are_found_beside_the_config(models, tmp_path, monkeypatch):
    model = models[DEMO_SEGMENTATION]
    model.cfg.dump(tmp_path / 'mine.py')
    with pytest.raises(UserError, match=f'{tmp_path} has no checkpoint'):
        cm.load(tmp_path / 'mine.py')
    os.link(model.checkpoint, tmp_path / 'iter_2.pth')
    (tmp_path / 'last_checkpoint').write_text('iter_2.pth')  # as training writes it
    os.link(model.checkpoint, tmp_path / 'iter_1.pth')
    assert cm.load(tmp_path / 'mine.py', device='cpu').checkpoint == str(tmp_path / 'iter_2.pth')
    os.link(model.checkpoint, tmp_path / 'best_mIoU_iter_1.pth')
    best = str(tmp_path / 'best_mIoU_iter_1.pth')
    assert cm.load(tmp_path / 'mine.py', device='cpu').checkpoint == best
    (tmp_path / 'best.pth').write_bytes(Path(best).read_bytes())
    assert cm.load(tmp_path / 'mine.py', device='cpu').checkpoint == str(tmp_path / 'best.pth')
    monkeypatch.chdir('/')
    assert cm.load(tmp_path / 'mine.py', 'best_mIoU_iter_1.pth', 'cpu').checkpoint == best


def test_options_and_dtype_reach_the_config(models):
    model = cm.load(DEMO_SEGMENTATION, models[DEMO_SEGMENTATION].checkpoint, 'cpu', 'bf16',
                    **SMALL[DEMO_SEGMENTATION])
    assert model.cfg.inference_dtype == 'bf16'
    with pytest.raises(UserError, match='train_cfgs'):
        cm.load(DEMO_SEGMENTATION, 'x.pth', **{'train_cfgs.max_iters': 1})


def test_data_is_checked(demo_data, tmp_path):
    data = dict(data_root=f'{demo_data}/ADEChallengeData2016', work_dir=tmp_path)
    found = cm.check('demo/upernet_convnext_demo', **data)
    assert found.errors == []
    assert [one.split for one in found.found] == ['train', 'val']
    assert 'sand' in str(found)
    assert found.picture == tmp_path / 'dataset.png'
    assert found.picture.is_file()
    wrong = cm.check(DEMO_SEGMENTATION, reduce_zero_label=False, **data)
    assert wrong.errors


def test_importing_the_package_stays_light():
    code = ('import sys, convnext_mm as cm; print([m for m in ("mmseg.models", '
            '"mmdet.models", "mmcv.ops", "matplotlib.pyplot", "convnext_mm.api", '
            '"convnext_mm.prediction") if m in sys.modules]); print(cm.load.__name__)')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == ['[]', 'load'], done.stderr
    with pytest.raises(AttributeError, match='no attribute'):
        _ = cm.nothing


@pytest.mark.slow
def test_the_notebook_runs(demo_data, tmp_path):
    """Its code, cell by cell, with the options of a small model after the cell of parameters."""
    cells = json.loads((ROOT / 'docs' / 'notebook.ipynb').read_text(encoding='utf-8'))['cells']
    options = dict(SMALL[DEMO_SEGMENTATION], data_root=f'{demo_data}/ADEChallengeData2016')
    code = []
    for cell in cells:
        if cell['cell_type'] == 'code':
            code.append(''.join(cell['source']))
            if 'parameters' in cell['metadata'].get('tags', ()):
                code.append(f'options = {options!r}')
    code.append("assert metrics['mIoU'] >= 0 and result._repr_png_() and run.checkpoint.is_file()")
    done = subprocess.run(
        [sys.executable, '-c', '\n'.join(code)], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / 'work_dirs/upernet_convnext_demo/curves.png').is_file()
