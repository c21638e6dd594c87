import json

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData, PixelData
from PIL import Image

from convnext_mm.training import pictures

META = dict(classes=('a', 'b'), palette=[(255, 0, 0), (0, 0, 255)])


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / 'photo.jpg'
    Image.fromarray(np.full((60, 80, 3), 128, np.uint8)).save(path)
    return path


def panels(path) -> list[np.ndarray]:
    """The three panels of a picture, each as float colours."""
    image = np.asarray(Image.open(path).convert('RGB'), dtype=float)
    third = image.shape[1] // 3
    height = image.shape[0]
    return [image[height // 4: height * 3 // 4, i * third + third // 4: i * third + third * 3 // 4]
            for i in range(3)]


def test_segmentation_shows_input_truth_and_prediction(photo, tmp_path):
    from mmseg.structures import SegDataSample
    sample = SegDataSample(metainfo=dict(img_path=str(photo)))
    sample.gt_sem_seg = PixelData(data=torch.zeros(1, 60, 80, dtype=torch.long))
    sample.pred_sem_seg = PixelData(data=torch.ones(1, 60, 80, dtype=torch.long))
    pictures.draw_sample(sample, META, tmp_path / 'out.png')
    photo_panel, truth, prediction = panels(tmp_path / 'out.png')
    assert photo_panel.std() < 5
    assert (truth[..., 0] > truth[..., 2] + 80).mean() > 0.9
    assert (prediction[..., 2] > prediction[..., 0] + 80).mean() > 0.9


def test_ignored_pixels_are_not_painted(photo, tmp_path):
    from mmseg.structures import SegDataSample
    sample = SegDataSample(metainfo=dict(img_path=str(photo)))
    sample.gt_sem_seg = PixelData(data=torch.full((1, 60, 80), 255))
    sample.pred_sem_seg = PixelData(data=torch.ones(1, 60, 80, dtype=torch.long))
    pictures.draw_sample(sample, META, tmp_path / 'out.png')
    assert panels(tmp_path / 'out.png')[1].std() < 5


def test_detection_draws_what_is_likely(photo, tmp_path):
    from mmdet.structures import DetDataSample
    full = torch.tensor([[0.0, 0.0, 79.0, 59.0]])
    sample = DetDataSample(metainfo=dict(img_path=str(photo)))
    sample.gt_instances = InstanceData(bboxes=full, labels=torch.tensor([0]),
                                       masks=torch.ones(1, 60, 80, dtype=torch.bool))
    sample.pred_instances = InstanceData(
        bboxes=full.repeat(2, 1), labels=torch.tensor([1, 0]), scores=torch.tensor([0.9, 0.2]),
        masks=torch.ones(2, 60, 80, dtype=torch.bool))
    pictures.draw_sample(sample, META, tmp_path / 'out.png')
    _, truth, prediction = panels(tmp_path / 'out.png')
    assert (truth[..., 0] > truth[..., 2] + 60).mean() > 0.8
    assert (prediction[..., 2] > prediction[..., 0] + 60).mean() > 0.8


@pytest.mark.parametrize('palette', [None, 'random', [(1, 2, 3)]])
def test_colours_without_a_palette_differ(palette):
    colors = pictures.class_colors(palette, 5)
    assert len({tuple(c) for c in colors}) == 5


def write_log(folder, lines):
    (folder / 'vis_data').mkdir(parents=True)
    (folder / 'vis_data' / 'scalars.json').write_text(
        '\n'.join(json.dumps(line) for line in lines) + '\n{"loss": 1, "st')


def line(step, loss=1.0):
    return dict(step=step, iter=step, loss=loss, lr=0.1, lowest_lr=0.1, highest_lr=0.2)


def test_curves_of_a_resumed_run_are_one(tmp_path, monkeypatch):
    write_log(tmp_path / '20260101_000000',
              [line(10), line(20), dict(mIoU=50.0, step=20), line(30)])
    write_log(tmp_path / '20260102_000000', [line(30, 0.5), line(40), dict(mIoU=60.0, step=40)])
    log = pictures.read_log(tmp_path)
    drawn = {}
    monkeypatch.setattr(pictures, 'save',
                        lambda figure, path: drawn.update(axes=figure.axes))
    assert pictures.draw_curves(log, tmp_path / 'curves.png')
    loss, score, rates = drawn['axes']
    assert loss.lines[0].get_xdata().tolist() == [10, 20, 30, 40]
    assert loss.lines[0].get_ydata().tolist() == [1.0, 1.0, 0.5, 1.0]
    assert score.lines[0].get_xydata().tolist() == [[20, 50], [40, 60]]
    assert [text.get_text() for text in rates.get_legend().get_texts()] == [
        'last layer group (heads)', 'first layer group (stem)']
    assert [r.get_ydata()[0] for r in rates.lines] == [0.2, 0.1]


def test_no_log_no_curves(tmp_path):
    assert not pictures.draw_curves(pictures.read_log(tmp_path), tmp_path / 'curves.png')
    assert not (tmp_path / 'curves.png').exists()


def test_a_picture_that_fails_does_not_stop_the_run(tmp_path, monkeypatch):
    from types import SimpleNamespace

    def full(figure, path):
        raise OSError('No space left on device')
    said = []
    monkeypatch.setattr(pictures, 'save', full)
    monkeypatch.setattr(pictures, 'print_log', lambda text, **kwargs: said.append(text))
    write_log(tmp_path / '20260101_000000', [line(10)])
    pictures.CurvesHook().after_train(SimpleNamespace(work_dir=str(tmp_path)))
    assert said == ['No picture: OSError: No space left on device']


@pytest.mark.parametrize('batch_size', [1, 5])
def test_pictures_are_spread_over_the_data_set(batch_size, tmp_path, monkeypatch):
    from types import SimpleNamespace
    drawn = []
    monkeypatch.setattr(pictures, 'draw_sample', lambda sample, meta, path: drawn.append(path.stem))
    samples = [SimpleNamespace(img_path=f'{i}.jpg') for i in range(20)]
    loader = SimpleNamespace(dataset=samples, batch_size=batch_size)
    runner = SimpleNamespace(work_dir=str(tmp_path), val_loop=SimpleNamespace(dataloader=loader),
                             visualizer=SimpleNamespace(dataset_meta=META))
    hook = pictures.PredictionsHook(num_pictures=4)
    for batch in range(20 // batch_size):
        hook.after_val_iter(runner, batch,
                            outputs=samples[batch * batch_size:(batch + 1) * batch_size])
    assert drawn == ['0', '5', '10', '15']
