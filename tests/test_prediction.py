"""Predictions on your own images."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convnext_mm import UserError
from convnext_mm.engine.checks import read_config
from convnext_mm.layers import Block
from convnext_mm.prediction import Predictor, find_images, output_names
from tests.helpers import DEMO_DETECTION, DEMO_SEGMENTATION, call_tool


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """Randomly initialized weights of the demo's models, which are enough to draw predictions."""
    from mmengine.registry import MODELS, init_default_scope
    found = {}
    for config in (DEMO_SEGMENTATION, DEMO_DETECTION):
        cfg = read_config(config)
        cfg.model.backbone.init_cfg = None
        init_default_scope(cfg.default_scope)
        from convnext_mm.engine.fallbacks import adapt_to_device
        adapt_to_device(cfg)
        torch.manual_seed(0)
        model = MODELS.build(cfg.model)
        model.init_weights()
        found[config] = tmp_path_factory.mktemp('weights') / 'model.pth'
        torch.save(dict(state_dict=model.state_dict()), found[config])
    return found


@pytest.mark.parametrize('config', [DEMO_SEGMENTATION, DEMO_DETECTION])
def test_image_demo_draws_a_folder_and_names_broken_files(config, checkpoints, tmp_path):
    photos = tmp_path / 'photos'
    (photos / 'deep').mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    Image.fromarray(noise).save(photos / 'a.jpg')
    Image.fromarray(noise[..., 0]).save(photos / 'a.png')  # grayscale
    Image.fromarray(noise).save(photos / 'deep' / 'b.JPG')
    (photos / 'cut.jpg').write_bytes((photos / 'a.jpg').read_bytes()[:2000])
    (photos / 'notes.txt').write_text('not an image')
    done = call_tool('tools/image_demo.py', photos, config, checkpoints[config], '--out',
                     tmp_path / 'out', '--score-threshold', '0')
    assert done.returncode == 2
    assert f"3 images written to {tmp_path / 'out'}" in done.stdout
    assert f'1 of 4 images could not be read:\n  {photos}/cut.jpg (image file' in done.stderr
    names = sorted(str(p.relative_to(tmp_path / 'out')) for p in (tmp_path / 'out').rglob('*.*'))
    assert names == ['a.png', 'a.png.png', 'deep/b.png']
    drawn = np.asarray(Image.open(tmp_path / 'out' / 'a.png').convert('RGB'), float)
    left, right = drawn[60:300, 20:380], drawn[60:300, 420:780]
    assert np.abs(left.mean((0, 1)) - right.mean((0, 1))).max() > 2, 'the prediction is drawn'


def test_predictions_have_the_size_of_the_image(checkpoints, tmp_path):
    Image.fromarray(np.zeros((70, 333, 3), np.uint8)).save(tmp_path / 'wide.png')
    predict = Predictor(read_config(DEMO_SEGMENTATION), str(checkpoints[DEMO_SEGMENTATION]), 'cpu')
    assert predict(str(tmp_path / 'wide.png')).pred_sem_seg.data.shape == (1, 70, 333)
    blocks = [module for module in predict.model.modules() if isinstance(module, Block)]
    assert blocks
    assert all(block._packed for block in blocks), 'packed, since the weights are final'
    assert predict.meta['classes'][0] == 'sand'
    assert predict.meta['palette'][0] == (222, 203, 144)


def test_weights_of_another_model_are_refused(checkpoints):
    with pytest.raises(UserError, match='does not fit the model of this config'):
        Predictor(read_config(DEMO_DETECTION, {'model.backbone.init_cfg': None}),
                  str(checkpoints[DEMO_SEGMENTATION]), 'cpu')


def test_files_folders_and_patterns_are_expanded(tmp_path):
    for name in ('a.jpg', 'b.png', 'c.txt', 'sub/d.webp'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    inside = [str(tmp_path / name) for name in ('a.jpg', 'b.png', 'sub/d.webp')]
    assert find_images([str(tmp_path)]) == inside
    assert find_images([f'{tmp_path}/*']) == inside[:2]
    assert find_images([f'{tmp_path}/**']) == inside
    assert find_images([inside[1], str(tmp_path)]) == [inside[1], inside[0], inside[2]]
    named = str(tmp_path / 'c.txt')
    assert find_images([named]) == [named], 'a named file may have any suffix'
    for place in ('nothing', '*.bmp'):
        with pytest.raises(UserError, match=r'No image found: .*Expected an image, a folder'):
            find_images([str(tmp_path / place)])


@pytest.mark.parametrize(('files', 'names'), [
    (['one/p.jpg'], ['p.png']),
    (['x/a.jpg', 'x/a.png', 'x/y/a.jpg', 'x/b.tif'], ['a.png', 'a.png.png', 'y/a.png', 'b.png']),
    (['a.png.jpg', 'a.jpg', 'a.png'], ['a.png.png', 'a.png', 'a.png.png.png'])])
def test_output_names_are_unique(files, names):
    assert [str(name) for name in output_names(files)] == names


def test_missing_images_are_reported_before_the_model_is_built(tmp_path):
    done = call_tool('tools/image_demo.py', tmp_path / 'no.jpg', DEMO_SEGMENTATION, 'no.pth')
    assert done.returncode == 2
    assert f'Error: No image found: {tmp_path}/no.jpg.' in done.stderr
