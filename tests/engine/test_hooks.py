"""Hooks that draw figures during a run."""
import csv
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from PIL import Image

from convnext_mm.engine import hooks
from tests.helpers import log_line, write_log


def test_a_failed_figure_does_not_stop_the_run(tmp_path, monkeypatch):
    def fail(figure, path):
        raise OSError('No space left on device')
    logged = []
    monkeypatch.setattr('convnext_mm.visualization.save_figure', fail)
    monkeypatch.setattr(hooks, 'print_log', lambda text, **kwargs: logged.append(text))
    write_log(tmp_path / '20260101_000000', [log_line(10)])
    hooks.CurvesHook().after_train(SimpleNamespace(work_dir=str(tmp_path)))
    assert logged == ['Cannot draw: OSError: No space left on device']


@pytest.mark.parametrize('batch_size', [1, 5])
def test_drawn_images_are_spread_over_the_data_set(batch_size, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(hooks, 'draw_sample',
                        lambda sample, meta, path, **_: drawn.append(path.stem))
    samples = [SimpleNamespace(img_path=f'{i}.jpg') for i in range(20)]
    loader = SimpleNamespace(dataset=samples, batch_size=batch_size)
    runner = SimpleNamespace(work_dir=str(tmp_path), val_loop=SimpleNamespace(dataloader=loader),
                             visualizer=SimpleNamespace(dataset_meta=dict(classes=('a', 'b'))))
    hook = hooks.PredictionsHook(num_pictures=4)
    for batch in range(20 // batch_size):
        hook.after_val_iter(runner, batch,
                            outputs=samples[batch * batch_size:(batch + 1) * batch_size])
    assert drawn == ['0', '5', '10', '15']


@pytest.mark.parametrize('loaded', [False, True])
def test_all_images_of_any_number_of_bands_are_drawn(loaded, tmp_path):
    load = LoadImageFromFile(color_type='unchanged', imdecode_backend='tifffile')
    dataset = SimpleNamespace(pipeline=SimpleNamespace(transforms=[load]),
                              data_prefix=dict(img_path=str(tmp_path / 'images')),
                              metainfo=dict(classes=('a', 'b'), palette=[[255, 0, 0], [0, 0, 255]]))
    runner = SimpleNamespace(visualizer=None, test_loop=SimpleNamespace(
        dataloader=SimpleNamespace(dataset=dataset, batch_size=1)))
    hook = hooks.PredictionsHook(num_pictures=None, folder=str(tmp_path / 'out'), width=None)
    for index, (folder, label) in enumerate((('one', 0), ('two', 1))):
        path = tmp_path / 'images' / folder / 'a.tif'
        path.parent.mkdir(parents=True)
        tifffile.imwrite(path, np.full((60, 80, 6), 99, np.uint16), photometric='minisblack',
                         planarconfig='contig')
        mask = PixelData(data=torch.full((1, 60, 80), label))
        sample = BaseDataElement(pred_sem_seg=mask, metainfo=dict(img_path=str(path)))
        batch = None
        if loaded:  # then the file is not read again
            path.unlink()
            batch = dict(inputs=[torch.full((6, 60, 80), 99)])
        hook.after_test_iter(runner, index, batch, outputs=[sample])
    drawn = [np.asarray(Image.open(tmp_path / 'out' / folder / 'a.png').convert('RGB'), int)
             for folder in ('one', 'two')]
    right = [image[100:200, -300:-100].mean((0, 1)) for image in drawn]
    assert right[0][0] - right[1][0] > 100, 'red and blue'
    assert right[1][2] - right[0][2] > 100


@pytest.mark.parametrize('dtype', [torch.long, torch.float32])
def test_classes_that_no_prediction_names(dtype, monkeypatch):
    logged = []
    monkeypatch.setattr(hooks, 'print_log', lambda text, **kwargs: logged.append(text))
    dataset = SimpleNamespace(metainfo=dict(classes=('a', 'b', 'c', 'd')))
    runner = SimpleNamespace(val_loop=SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset)))
    hook = hooks.AbsentClassesHook()
    for labels in ([0, 0, 2], [2, 2, 2]):
        mask = PixelData(data=torch.tensor(labels, dtype=dtype).view(1, 1, 3))
        hook.after_val_iter(runner, 0, outputs=[BaseDataElement(pred_sem_seg=mask)])
    assert logged == []
    hook.after_val_epoch(runner)
    assert logged == ['No prediction names 2 of 4 classes: b, d']
    boxes = InstanceData(labels=torch.tensor([3, 1, 0, 2]))
    hook.after_val_iter(runner, 0, outputs=[BaseDataElement(pred_instances=boxes)])
    hook.after_val_epoch(runner)
    assert len(logged) == 1


def test_figures_of_an_older_run_are_moved_away(tmp_path):
    (tmp_path / 'predictions').mkdir()
    (tmp_path / 'predictions' / 'old.png').touch()
    runner = SimpleNamespace(work_dir=str(tmp_path), _resume=True)
    hooks.PredictionsHook(folder=str(tmp_path / 'predictions')).before_run(runner)
    hooks.PredictionsHook().before_run(runner)
    assert (tmp_path / 'predictions' / 'old.png').is_file(), 'a resumed run goes on'
    runner._resume = False
    hooks.PredictionsHook().before_run(runner)
    assert [path.parent.name[:14] for path in tmp_path.glob('*/old.png')] == ['predictions_20']
    hooks.PredictionsHook().before_run(runner)  # nothing to move


def test_results_of_each_class_agree_with_mmseg(tmp_path):
    from mmseg.evaluation import IoUMetric
    generator = torch.Generator().manual_seed(0)
    classes = ('a', 'b', 'c', 'absent')
    hook, metric = hooks.ResultsHook(), IoUMetric(iou_metrics=['mIoU'])
    metric.dataset_meta = dict(classes=classes)
    dataset = SimpleNamespace(metainfo=dict(classes=classes))
    runner = SimpleNamespace(work_dir=str(tmp_path), test_loop=SimpleNamespace(
        dataloader=SimpleNamespace(dataset=dataset)))
    for _ in range(2):
        truth, found = (torch.randint(0, 3, (1, 20, 30), generator=generator) for _ in range(2))
        truth[0, :3] = 255  # ignored
        sample = BaseDataElement(gt_sem_seg=PixelData(data=truth),
                                 pred_sem_seg=PixelData(data=found))
        hook.after_test_iter(runner, 0, outputs=[sample])
        metric.process({}, [sample.to_dict()])
    hook.after_test_epoch(runner)
    totals = [sum(parts) for parts in zip(*metric.results, strict=True)]
    expected = metric.total_area_to_metrics(*totals, ['mIoU'])
    with open(tmp_path / 'results.csv', newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert [row['class'] for row in rows] == list(classes)
    for column, key in (('IoU', 'IoU'), ('recall', 'Acc')):
        np.testing.assert_allclose([float(row[column]) for row in rows], expected[key], atol=1e-4)
    assert sum(int(row['pixels']) for row in rows) == 2 * 17 * 30
    assert rows[3]['IoU'] == 'nan'
    for name in ('results.png', 'confusion.png'):
        assert np.asarray(Image.open(tmp_path / name).convert('L')).std() > 5


def test_results_of_each_class_of_a_detector(tmp_path):
    METRICS = pytest.importorskip('mmdet.registry').METRICS
    classes = ('ball', 'crate', 'absent')
    square = dict(iscrowd=0, area=400)
    file = tmp_path / 'a.json'
    file.write_text(json.dumps(dict(
        images=[dict(id=1, file_name='a.jpg', width=100, height=100)],
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(classes)],
        annotations=[dict(square, id=1, image_id=1, category_id=1, bbox=[0, 0, 20, 20],
                          segmentation=[[0, 0, 20, 0, 20, 20, 0, 20]]),
                     dict(square, id=2, image_id=1, category_id=2, bbox=[50, 50, 20, 20],
                          segmentation=[[50, 50, 70, 50, 70, 70, 50, 70]])])))
    metric = METRICS.build(dict(type='mmdet.CocoMetric', ann_file=str(file),
                                metric=['bbox', 'segm']))
    metric.dataset_meta = dict(classes=classes)
    masks = torch.zeros(2, 100, 100, dtype=torch.bool)
    masks[0, :20, :20] = True  # of the other, the box alone is right
    boxes = torch.tensor([[0., 0, 20, 20], [50, 50, 70, 70]])
    sample = BaseDataElement(
        metainfo=dict(img_id=1, ori_shape=(100, 100)),
        gt_instances=InstanceData(bboxes=boxes, labels=torch.tensor([0, 1])),
        pred_instances=InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]), masks=masks,
                                    scores=torch.tensor([0.9, 0.8])))
    runner = SimpleNamespace(
        work_dir=str(tmp_path), test_evaluator=SimpleNamespace(metrics=[metric]),
        test_loop=SimpleNamespace(dataloader=SimpleNamespace(dataset=SimpleNamespace(
            metainfo=dict(classes=classes)))))
    hook = hooks.ResultsHook()
    hook.before_test_epoch(runner)
    hook.after_test_iter(runner, 0, outputs=[sample])
    metric.process({}, [sample.to_dict()])
    metrics = metric.evaluate(1)
    hook.after_test_epoch(runner, metrics)
    with open(tmp_path / 'results.csv', newline='', encoding='utf-8') as table:
        rows = list(csv.reader(table))
    assert rows == [['class', 'box AP', 'mask AP', 'recall', 'precision', 'objects'],
                    ['ball', '1.0000', '1.0000', '1.0000', '1.0000', '1'],
                    ['crate', '1.0000', '0.0000', '1.0000', '1.0000', '1'],
                    ['absent', 'nan', 'nan', 'nan', 'nan', '0']]
    assert (metrics['coco/bbox_mAP'], metrics['coco/segm_mAP']) == (1, 0.5)
    assert not any('precision' in name for name in metrics)
    for name in ('results.png', 'confusion.png'):
        assert np.asarray(Image.open(tmp_path / name).convert('L')).std() > 5


def test_test_data_without_annotations_has_no_table(tmp_path):
    hook = hooks.ResultsHook()
    nothing = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    found = InstanceData(bboxes=torch.ones(1, 4), labels=torch.tensor([0]),
                         scores=torch.tensor([0.9]))
    runner = SimpleNamespace(work_dir=str(tmp_path), test_loop=SimpleNamespace(
        dataloader=SimpleNamespace(dataset=SimpleNamespace(metainfo=dict(classes=('a',))))))
    for truth in (dict(gt_instances=nothing), dict(gt_instances=InstanceData()), {}):
        hook.after_test_iter.__wrapped__(hook, runner, 0, outputs=[
            BaseDataElement(pred_instances=found, **truth)])
        hook.after_test_epoch(runner)
    assert not list(tmp_path.iterdir())
