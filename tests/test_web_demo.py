"""The page of tools/web_demo.py: what it shows for an image."""
from importlib.util import find_spec

import cv2
import numpy as np
import pytest
import torch

import convnext_mm as cm
from convnext_mm import web_demo
from convnext_mm.api import Model
from tests.helpers import DEMO_DETECTION, DEMO_SEGMENTATION, build_model, call_tool

needs_gradio = pytest.mark.skipif(not find_spec('gradio'), reason='gradio is not installed')
DIMS = dict(depths=[1, 1, 1, 1], dims=[8, 16, 24, 32])


@pytest.fixture(scope='module')
def models(tmp_path_factory) -> dict[str, Model]:
    """A small model of each task."""
    found = {}
    for config in (DEMO_SEGMENTATION, DEMO_DETECTION):
        path = tmp_path_factory.mktemp('model') / 'model.pth'
        torch.save(dict(state_dict=build_model(config, DIMS).state_dict()), path)
        found[config] = cm.load(config, path, 'cpu', **DIMS)
    return found


@pytest.fixture(params=[DEMO_SEGMENTATION, DEMO_DETECTION])
def model(request, models) -> Model:
    return models[request.param]


@pytest.fixture
def image(tmp_path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'a.png'), pixels)
    return str(tmp_path / 'a.png')


def test_regions_are_those_of_the_model(model, image):
    picture, regions = web_demo.find_regions(model, image, 0.0)
    assert np.array_equal(picture, cv2.imread(image)[..., ::-1])
    result = model(image, score_threshold=0.0)
    if model.cfg.default_scope == 'mmseg':
        assert sum(mask for mask, _ in regions).tolist() == np.ones((90, 120)).tolist()
        for mask, name in regions:
            assert np.array_equal(mask == 1, result.class_map == model.class_names.index(name))
    else:
        assert len(regions) == len(result.labels) > 0
        assert [name for _, name in regions] == [model.class_names[i] for i in result.labels]
        assert all(np.array_equal(mask == 1, found)
                   for (mask, _), found in zip(regions, result.masks, strict=True))


def test_boxes_stand_for_detections_without_masks(models, image, monkeypatch):
    model = models[DEMO_DETECTION]
    monkeypatch.setattr(type(model(image)), 'masks', None)
    _, regions = web_demo.find_regions(model, image, 0.0)
    boxes = model(image, score_threshold=0.0).boxes
    assert [shape for shape, _ in regions] == [tuple(map(round, box)) for box in boxes.tolist()]


def test_unusable_images_are_named(model, image, tmp_path, monkeypatch):
    (tmp_path / 'broken.jpg').write_bytes(b'no image')
    with pytest.raises(cm.UserError, match='The image cannot be read'):
        web_demo.find_regions(model, str(tmp_path / 'broken.jpg'), 0.3)
    monkeypatch.setattr('convnext_mm.prediction.LARGE_PICTURE', 10_000)
    with pytest.raises(cm.UserError, match=r'120×90 pixels are too many .* tools/image_demo.py'):
        web_demo.find_regions(model, image, 0.3)


@needs_gradio
def test_the_page(model, image, tmp_path):
    import gradio
    page = web_demo.build_page(model)
    assert page.fn(None) is None
    picture, regions = page.fn(image)
    assert picture.shape == (90, 120, 3)
    names = {name for _, name in regions}
    assert names <= set(page.output_components[0].color_map)
    (tmp_path / 'broken.jpg').write_bytes(b'no image')
    with pytest.raises(gradio.Error, match='cannot be read'):
        page.fn(str(tmp_path / 'broken.jpg'))


@pytest.mark.skipif(bool(find_spec('gradio')), reason='gradio is installed')
def test_a_missing_gradio_is_named():
    done = call_tool('tools/web_demo.py', DEMO_SEGMENTATION, 'none.pth')
    assert done.returncode == 2
    assert "pip install 'convnext-mm[web]'" in done.stderr
