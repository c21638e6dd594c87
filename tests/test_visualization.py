"""Figures of training curves and predictions."""
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData, PixelData
from PIL import Image

from convnext_mm import visualization
from tests.helpers import log_line, write_log

META = dict(classes=('a', 'b'), palette=[(255, 0, 0), (0, 0, 255)])


@pytest.fixture
def image_path(tmp_path):
    path = tmp_path / 'image.jpg'
    Image.fromarray(np.full((60, 80, 3), 128, np.uint8)).save(path)
    return path


def panels(path) -> list[np.ndarray]:
    """The center of each of the three panels of an image, as float colors."""
    image = np.asarray(Image.open(path).convert('RGB'), dtype=float)
    third = image.shape[1] // 3
    height = image.shape[0]
    return [image[height // 4: height * 3 // 4, i * third + third // 4: i * third + third * 3 // 4]
            for i in range(3)]


@pytest.mark.parametrize('dtype', [torch.long, torch.uint8, torch.float32])
def test_segmentation_draws_input_truth_and_prediction(dtype, image_path, tmp_path):
    from mmseg.structures import SegDataSample
    sample = SegDataSample(metainfo=dict(img_path=str(image_path)))
    sample.gt_sem_seg = PixelData(data=torch.zeros(1, 60, 80, dtype=torch.long))
    sample.pred_sem_seg = PixelData(data=torch.ones(1, 60, 80, dtype=dtype))
    visualization.draw_sample(sample, META, tmp_path / 'out.png')
    input_panel, truth, prediction = panels(tmp_path / 'out.png')
    assert input_panel.std() < 5
    assert (truth[..., 0] > truth[..., 2] + 80).mean() > 0.9
    assert (prediction[..., 2] > prediction[..., 0] + 80).mean() > 0.9


def test_ignored_pixels_are_not_drawn(image_path, tmp_path):
    from mmseg.structures import SegDataSample
    sample = SegDataSample(metainfo=dict(img_path=str(image_path)))
    sample.gt_sem_seg = PixelData(data=torch.full((1, 60, 80), 255))
    sample.pred_sem_seg = PixelData(data=torch.ones(1, 60, 80, dtype=torch.long))
    visualization.draw_sample(sample, META, tmp_path / 'out.png')
    assert panels(tmp_path / 'out.png')[1].std() < 5


def test_detections_below_the_score_threshold_are_not_drawn(image_path, tmp_path):
    from mmdet.structures import DetDataSample
    full = torch.tensor([[0.0, 0.0, 79.0, 59.0]])
    sample = DetDataSample(metainfo=dict(img_path=str(image_path)))
    sample.gt_instances = InstanceData(bboxes=full, labels=torch.tensor([0]),
                                       masks=torch.ones(1, 60, 80, dtype=torch.bool))
    sample.pred_instances = InstanceData(
        bboxes=full.repeat(2, 1), labels=torch.tensor([1, 0]), scores=torch.tensor([0.9, 0.2]),
        masks=torch.ones(2, 60, 80, dtype=torch.bool))
    visualization.draw_sample(sample, META, tmp_path / 'out.png')
    _, truth, prediction = panels(tmp_path / 'out.png')
    assert (truth[..., 0] > truth[..., 2] + 60).mean() > 0.8
    assert (prediction[..., 2] > prediction[..., 0] + 60).mean() > 0.8


def test_boxes_align_with_their_masks():
    figure, axis = visualization.pyplot().subplots()
    masks = torch.zeros(1, 60, 80, dtype=torch.bool)
    masks[0, 10:20, 30:50] = True
    visualization.draw_instances(
        axis, InstanceData(bboxes=torch.tensor([[30.0, 10.0, 50.0, 20.0]]),
                           labels=torch.tensor([0]), masks=masks),
        META['classes'], np.eye(3))
    left, right, bottom, top = axis.images[0].get_extent()
    columns = np.linspace(left, right, 81)  # the edges of the drawn pixels
    rows = np.linspace(top, bottom, 61)
    visualization.pyplot().close(figure)
    assert axis.patches[0].get_bbox().extents.tolist() == [columns[30], rows[10], columns[50],
                                                           rows[20]]


def test_names_at_the_top_edge_are_inside_the_image():
    figure, axis = visualization.pyplot().subplots()
    axis.imshow(np.zeros((60, 80, 3), np.uint8))
    visualization.draw_instances(
        axis, InstanceData(bboxes=torch.tensor([[30.0, 1.0, 50.0, 20.0], [30.0, 30.0, 50.0, 50.0]]),
                           labels=torch.tensor([0, 0])), META['classes'], np.eye(3))
    figure.canvas.draw()
    top = axis.get_window_extent().y1
    high, low = axis.texts
    assert high.get_window_extent().y1 <= top
    assert high.get_window_extent().y1 < axis.transData.transform((0, 0.5))[1] + 1
    assert low.get_window_extent().y0 >= axis.transData.transform((0, 30))[1] - 1, 'above its box'
    visualization.pyplot().close(figure)


def test_many_objects_are_drawn_without_names():
    for count, names in ((60, 60), (61, 0)):
        figure, axis = visualization.pyplot().subplots()
        drawn = visualization.draw_instances(
            axis, InstanceData(bboxes=torch.rand(count + 5, 4), scores=torch.tensor(
                [0.9] * count + [0.1] * 5), labels=torch.ones(count + 5, dtype=torch.int)),
            META['classes'], np.eye(3))
        assert (drawn, len(axis.patches), len(axis.texts)) == ({1: count}, count, names)
        visualization.pyplot().close(figure)


@pytest.mark.parametrize('palette', [None, 'random', [(1, 2, 3)]])
def test_colors_without_a_palette_differ(palette):
    colors = visualization.class_colors(palette, 5)
    assert len({tuple(c) for c in colors}) == 5


def test_curves_of_a_resumed_run_are_continuous(tmp_path, monkeypatch):
    write_log(tmp_path / '20260101_000000',
              [log_line(10), log_line(20), dict(mIoU=50.0, step=20), log_line(30)])
    write_log(tmp_path / '20260102_000000', [
        log_line(30, 0.5), log_line(40), dict(mIoU=60.0, step=40)])
    log = visualization.read_log(tmp_path)
    drawn = {}
    monkeypatch.setattr(visualization, 'save_figure',
                        lambda figure, path: drawn.update(axes=figure.axes))
    assert visualization.draw_curves(log, tmp_path / 'curves.png')
    loss, score, rates = drawn['axes']
    assert loss.lines[0].get_xdata().tolist() == [10, 20, 30, 40]
    assert loss.lines[0].get_ydata().tolist() == [1.0, 1.0, 0.5, 1.0]
    assert score.lines[0].get_xydata().tolist() == [[20, 50], [40, 60]]
    assert [text.get_text() for text in rates.get_legend().get_texts()] == [
        'last layer group (heads)', 'first layer group (stem)']
    assert [r.get_ydata()[0] for r in rates.lines] == [0.2, 0.1]


@pytest.mark.parametrize(('step', 'drawn_at'), [(50, 50), (2, 40)])  # iterations, epochs
def test_a_metric_is_drawn_where_it_was_computed(tmp_path, monkeypatch, step, drawn_at):
    write_log(tmp_path / '1', [log_line(20), log_line(40), dict(mIoU=50.0, step=step),
                               log_line(60)])
    drawn = {}
    monkeypatch.setattr(visualization, 'save_figure',
                        lambda figure, path: drawn.update(axes=figure.axes))
    visualization.draw_curves(visualization.read_log(tmp_path), tmp_path / 'curves.png')
    assert drawn['axes'][1].lines[0].get_xdata().tolist() == [drawn_at]


def test_nothing_is_drawn_without_a_log(tmp_path):
    assert not visualization.draw_curves(visualization.read_log(tmp_path), tmp_path / 'curves.png')
    assert not (tmp_path / 'curves.png').exists()


@pytest.mark.parametrize(('image', 'picture'), [
    (np.array([[[1, 2, 3]]], np.uint8), [[[3, 2, 1]]]),  # BGR
    (np.array([[7]], np.uint8), [[[7, 7, 7]]]),
    (np.array([[[10, 20, 30, 40, 50, 60]]], np.uint8), [[[10, 20, 30]]]),
    (np.array([[[1.0, 2.0, 200.0]]], np.float32), [[[200, 2, 1]]]),
    (np.linspace(0, 5000, 101, dtype=np.uint16)[None], None)])
def test_images_of_any_kind_as_pictures(image, picture):
    drawn = visualization.to_picture(image)
    assert drawn.dtype == np.uint8
    if picture is not None:
        assert drawn.tolist() == picture
    else:  # from the 2nd to the 98th percentile
        assert [drawn[0, i, 0] for i in (0, 2, 50, 98, 100)] == [0, 0, 127, 255, 255]


def test_colors_without_a_palette_are_distinct_and_stay():
    colors = np.array(visualization.distinct_colors(150))
    distances = np.abs(colors[:, None] - colors[None]).sum(-1)[np.triu_indices(150, 1)]
    assert distances.min() > 40
    few = np.abs(colors[:8, None] - colors[None, :8]).sum(-1)[np.triu_indices(8, 1)]
    assert few.min() > 150
    assert visualization.distinct_colors(3) == [tuple(color) for color in colors[:3].tolist()]
    assert visualization.distinct_colors(0) == []
    drawn = visualization.class_colors(None, 5)
    np.testing.assert_array_equal(drawn * 255, colors[:5])


def test_names_without_a_font_are_numbered_and_reported_once(monkeypatch):
    lines = []
    monkeypatch.setattr(visualization, 'print_log', lambda line, **kwargs: lines.append(line))
    monkeypatch.setattr(visualization, 'wide_fonts', lambda: [])
    monkeypatch.setattr(visualization, 'known_letters',
                        visualization.known_letters.__wrapped__)
    visualization.drawn_names.cache_clear()
    visualization._warn_about_letters.cache_clear()
    for names in (('car', 'Straße'), ('car', '道路', 'background'), ('car', '道路')):
        drawn = visualization.drawn_names(names)
    assert drawn == ('car', 'class 1')
    assert visualization.drawn_names(('car', 'Straße')) == ('car', 'Straße')
    assert len(lines) == 1
    assert 'class names such as 道路: pictures show "class 1" instead. Install' in lines[0]
    monkeypatch.setattr(visualization, 'known_letters', lambda: frozenset(map(ord, '行人')))
    assert visualization.drawn_names(('行人',)) == ('行人',)
    assert len(lines) == 1


def test_a_font_with_chinese_letters_is_used(monkeypatch):
    monkeypatch.setattr(visualization, 'wide_fonts', lambda: ['SimHei'])
    plt = visualization.pyplot()
    assert plt.rcParams['font.family'] == ['sans-serif', 'SimHei']
