"""Predictions on your own images."""
import csv
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from pycocotools.coco import COCO

from convnext_mm import UserError, prediction, tiff, visualization
from convnext_mm.engine.checks import read_config
from convnext_mm.inputs import find_images
from convnext_mm.layers import Block
from convnext_mm.prediction import Predictor, output_names
from convnext_mm.segmentation import segmentor
from tests.helpers import DEMO_DETECTION, DEMO_SEGMENTATION, ROOT, call_tool


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


def by_rows(monkeypatch, large: int = 1000) -> None:
    """Treat pictures of more than so many pixels as large."""
    for module in (prediction, segmentor, tiff, visualization):
        monkeypatch.setattr(module, 'LARGE_PICTURE', large)


def slide_config(path: Path, steps=('LoadImageFromFile', 'PackSegInputs')) -> Path:
    """The demo's segmentor in slide mode; by default at the pictures' own scale."""
    steps = [dict(type=step) if isinstance(step, str) else step for step in steps]
    path.write_text(f'''
_base_ = {str(ROOT / DEMO_SEGMENTATION)!r}
test_pipeline = {[*steps[:-1], dict(type='LoadAnnotations', reduce_zero_label=True), steps[-1]]}
model = dict(test_cfg=dict(mode='slide', crop_size=(128, 128), stride=(85, 85)))
''')
    return path


def smooth_picture(height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (height // 9, width // 9, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height)))


def test_large_pictures_are_predicted_by_rows(checkpoints, tmp_path, monkeypatch):
    image = smooth_picture(300, 410)
    scale = (33550, 'd', 3, (0.5, 0.5, 0.0), True)
    photos = tmp_path / 'photos'
    photos.mkdir()
    tifffile.imwrite(photos / 'a.tif', image, photometric='rgb', tile=(64, 64),
                     compression='zlib', extratags=[scale])
    Image.fromarray(image).save(photos / 'b.png')
    config = slide_config(tmp_path / 'slide.py')
    checkpoint = checkpoints[DEMO_SEGMENTATION]
    predict = Predictor(read_config(str(config)), str(checkpoint), 'cpu')
    expected = predict(str(photos / 'b.png')).pred_sem_seg.data[0].numpy() + 1
    assert len(np.unique(expected)) > 1
    by_rows(monkeypatch)
    loaded = []
    monkeypatch.setattr(Predictor, '__call__', lambda self, path: loaded.append(path))
    done = call_tool('tools/image_demo.py', photos, config, checkpoint, '--out', tmp_path / 'out')
    assert done.returncode == 0, done.stderr
    assert not loaded
    names = sorted(path.name for path in (tmp_path / 'out').iterdir())
    assert names == ['a.classes.tif', 'a.png', 'b.classes.png', 'b.png']
    assert f"class map: {tmp_path / 'out' / 'b.classes.png'}" in done.stdout
    with tifffile.TiffFile(tmp_path / 'out' / 'a.classes.tif') as file:
        assert np.array_equal(file.asarray(), expected)
        assert file.pages[0].tags[33550].value == scale[3]
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'out' / 'b.classes.png')), expected)
    drawn = [np.asarray(Image.open(tmp_path / 'out' / name), int) for name in ('a.png', 'b.png')]
    assert np.abs(drawn[0] - drawn[1]).max() == 0
    assert drawn[0].std() > 20


def test_a_pipeline_that_scales_large_pictures_is_followed(checkpoints, tmp_path, monkeypatch):
    by_rows(monkeypatch)
    tifffile.imwrite(tmp_path / 'a.tif', smooth_picture(300, 410), photometric='rgb')
    settings = (str(checkpoints[DEMO_SEGMENTATION]), 'cpu')
    for resize, size in ((dict(scale=(205, 150), keep_ratio=True), '205×150'),
                         (dict(scale_factor=0.5), '205×150'),
                         (dict(scale=(100, 90), keep_ratio=False), '100×90')):
        steps = ['LoadImageFromFile', dict(type='Resize', **resize), 'PackSegInputs']
        predict = Predictor(read_config(str(slide_config(tmp_path / 'c.py', steps=steps))),
                            *settings)
        picture = predict.open(str(tmp_path / 'a.tif'))
        assert picture.reader is None
        assert picture.notes == [f'the test pipeline scales it from 410×300 to {size}. For its own '
                                 'scale, set a test_pipeline without Resize']
    for resize in (dict(scale_factor=1.0), dict(scale=(410, 300), keep_ratio=True)):
        steps[1] = dict(type='Resize', **resize)
        predict = Predictor(read_config(str(slide_config(tmp_path / 'c.py', steps=steps))),
                            *settings)
        assert predict.open(str(tmp_path / 'a.tif')).reader is not None


def test_masks_of_small_pictures_on_request(checkpoints, tmp_path):
    Image.fromarray(smooth_picture(90, 120)).save(tmp_path / 'a.png')
    command = ['tools/image_demo.py', tmp_path / 'a.png', DEMO_SEGMENTATION,
               checkpoints[DEMO_SEGMENTATION], '--out', tmp_path / 'out']
    call_tool(*command)
    assert not (tmp_path / 'out' / 'a.classes.png').exists()
    call_tool(*command, '--masks')
    predict = Predictor(read_config(DEMO_SEGMENTATION), str(checkpoints[DEMO_SEGMENTATION]), 'cpu')
    expected = predict(str(tmp_path / 'a.png')).pred_sem_seg.data[0].numpy() + 1
    found = np.asarray(Image.open(tmp_path / 'out' / 'a.classes.png'))
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)
    done = call_tool('tools/image_demo.py', tmp_path / 'a.png', DEMO_DETECTION,
                     checkpoints[DEMO_SEGMENTATION], '--masks')
    assert 'Error: --masks writes class maps of segmentation' in done.stderr


def test_detections_as_coco_and_csv(checkpoints, tmp_path):
    photos = tmp_path / 'photos'
    for name, size in (('a/x.png', (90, 120)), ('b/x.png', (120, 90))):  # equal names
        (photos / name).parent.mkdir(parents=True)
        Image.fromarray(smooth_picture(*size)).save(photos / name)
    command = ['tools/image_demo.py', photos, DEMO_DETECTION, checkpoints[DEMO_DETECTION], '--out',
               tmp_path / 'out', '--score-threshold', '0.1', '--save', 'coco', 'csv']
    done = call_tool(*command)
    assert done.returncode == 0, done.stderr
    assert {str(p.relative_to(tmp_path / 'out')) for p in (tmp_path / 'out').rglob('*.*')} == {
        'a/x.png', 'b/x.png', 'predictions.csv', 'predictions.json'}
    coco = COCO(str(tmp_path / 'out' / 'predictions.json'))
    predict = Predictor(read_config(DEMO_DETECTION), str(checkpoints[DEMO_DETECTION]), 'cpu')
    with open(tmp_path / 'out' / 'predictions.csv', newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(coco.anns) > 0
    for image in coco.dataset['images']:
        assert (image['height'], image['width']) == Image.open(image['file_name']).size[::-1]
        found = predict(image['file_name']).pred_instances
        found = found[found.scores >= 0.1]
        boxes = [[float(row[key]) for key in ('left', 'top', 'right', 'bottom')] for row in rows
                 if row['image'] == image['file_name']]
        np.testing.assert_allclose(boxes, found.bboxes.numpy(), atol=0.02)
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=image['id']))
        names = [coco.cats[one['category_id']]['name'] for one in annotations]
        assert names == [predict.meta['classes'][label] for label in found.labels]
        for one, mask in zip(annotations, found.masks.numpy(), strict=True):
            assert np.array_equal(coco.annToMask(one), mask)
    done = call_tool('tools/image_demo.py', photos, DEMO_SEGMENTATION,
                     checkpoints[DEMO_DETECTION], '--save', 'csv')
    assert 'Error: --save coco and csv write detections' in done.stderr


def test_damaged_large_pictures_and_full_disks(checkpoints, tmp_path, monkeypatch):
    by_rows(monkeypatch)
    config, out = slide_config(tmp_path / 'slide.py'), tmp_path / 'out'
    image = smooth_picture(300, 410)
    tifffile.imwrite(tmp_path / 'a.tif', image, photometric='rgb', rowsperstrip=20,
                     compression='zlib')
    data = (tmp_path / 'a.tif').read_bytes()
    (tmp_path / 'cut.tif').write_bytes(data[:-2000])
    with tifffile.TiffFile(tmp_path / 'a.tif') as file:
        start = file.pages[0].dataoffsets[10]
    (tmp_path / 'bad.tif').write_bytes(data[:start] + b'x' * 100 + data[start + 100:])
    tifffile.imwrite(tmp_path / 'six.tif', np.zeros((90, 90, 6), np.uint8), planarconfig='contig',
                     photometric='minisblack')
    command = ['tools/image_demo.py', tmp_path / 'cut.tif', tmp_path / 'bad.tif', config,
               checkpoints[DEMO_SEGMENTATION], '--out', out]
    done = call_tool(*command)
    assert done.returncode == 2
    assert f'{tmp_path}/cut.tif (truncated: it has' in done.stderr
    assert f'{tmp_path}/bad.tif (strip or tile 10 is damaged' in done.stderr
    assert list(out.iterdir()) == [], 'nothing half-written'

    bands = dict(type='LoadImageFromFile', color_type='unchanged', imdecode_backend='tifffile')
    six = slide_config(tmp_path / 'six.py', steps=[bands, 'PackSegInputs'])
    done = call_tool('tools/image_demo.py', tmp_path / 'six.tif', six,
                     checkpoints[DEMO_SEGMENTATION], '--out', out)
    assert f'{tmp_path}/six.tif (it has 6 bands, but model.backbone.in_chans is 3)' in done.stderr

    def full(*args):
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(tiff, 'keep_every', lambda *args: None)
    monkeypatch.setattr(prediction, 'write_class_map', full)
    done = call_tool('tools/image_demo.py', tmp_path / 'a.tif', *command[3:])
    assert done.returncode == 2
    assert (f'Error: cannot write the results of {tmp_path}/a.tif to {out}: No space left on '
            'device') in done.stderr
    (tmp_path / 'file').touch()
    done = call_tool(*command[:-1], tmp_path / 'file' / 'out')
    assert f'Error: cannot write to the folder {tmp_path}/file/out: Not a directory' in done.stderr


def test_a_broken_checkpoint_leaves_no_folder(tmp_path):
    (tmp_path / 'bad.pth').write_text('bad')
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    done = call_tool('tools/image_demo.py', tmp_path / 'a.png', DEMO_SEGMENTATION,
                     tmp_path / 'bad.pth', '--out', tmp_path / 'new' / 'out')
    assert 'Not a usable checkpoint' in done.stderr
    assert not (tmp_path / 'new').exists()


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
