"""Labels of COCO data by name, in training and in evaluation."""
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS, METRICS
from mmengine.registry import init_default_scope

from convnext_mm import UserError

CLASSES = ('ball', 'crate', 'star')


@pytest.fixture(autouse=True)
def scope():
    """Names without a scope are mmdet's, whatever ran before."""
    init_default_scope('mmdet')


def annotations(order: tuple[int, ...], first_id: int = 1) -> dict:
    """An object of each class in each of two images; category ids are 10, 20 and 30."""
    categories = [dict(id=10, name='ball'), dict(id=20, name='crate'), dict(id=30, name='star')]
    content = dict(images=[], annotations=[], categories=[categories[i] for i in order])
    for image in (1, 2):
        content['images'].append(dict(id=image, file_name=f'{image}.jpg', width=200, height=100))
        for i, category in enumerate(categories):
            x = 10 + 60 * i
            content['annotations'].append(dict(
                id=first_id + len(content['annotations']), image_id=image, iscrowd=0,
                category_id=category['id'], bbox=[x, 10, 40, 50], area=2000,
                segmentation=[[x, 10, x + 40, 10, x + 40, 60, x, 60]]))
    return content


def write(path: Path, content: dict) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def evaluate(path: str, kind: str, wrong: int = -1, **settings) -> dict:
    """The metrics of predictions that are right, but for those of one class."""
    metric = METRICS.build(dict(type=kind, ann_file=path, metric='bbox', **settings))
    metric.dataset_meta = dict(classes=CLASSES)
    samples = []
    for image in (1, 2):
        boxes = torch.tensor([[10. + 60 * i, 10, 50 + 60 * i, 60] for i in range(3)])
        if wrong >= 0:
            boxes[wrong] += 70
        samples.append(dict(img_id=image, ori_shape=(100, 200), pred_instances=dict(
            bboxes=boxes, scores=torch.full((3,), 0.9), labels=torch.arange(3))))
    metric.process({}, samples)
    return metric.evaluate(2)


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_labels_follow_classes(tmp_path, order):
    path = write(tmp_path / 'a.json', annotations(order))
    config = dict(type='convnext_mm.CocoDataset', ann_file=path, pipeline=[],
                  data_prefix=dict(img=str(tmp_path)), metainfo=dict(classes=CLASSES))
    dataset = DATASETS.build(dict(config, _scope_='mmdet'))
    assert [one['bbox_label'] for one in dataset.get_data_info(0)['instances']] == [0, 1, 2]
    assert dataset.metainfo['classes'] == CLASSES
    assert evaluate(path, 'convnext_mm.CocoMetric')['coco/bbox_mAP'] == 1
    theirs = evaluate(path, 'CocoMetric')['coco/bbox_mAP']
    assert (theirs == 1) == (order == (0, 1, 2))


@pytest.mark.parametrize('order', [(0, 1, 2), (2, 0, 1)])
def test_the_table_of_classes_follows_names(tmp_path, order):
    path = write(tmp_path / 'a.json', annotations(order))
    found = evaluate(path, 'convnext_mm.CocoMetric', wrong=1, classwise=True)
    assert [found[f'coco/{name}_precision'] for name in CLASSES] == [1, 0, 1]


def test_an_annotation_0_counts(tmp_path):
    path = write(tmp_path / 'a.json', annotations((0, 1, 2), first_id=0))
    assert evaluate(path, 'convnext_mm.CocoMetric')['coco/bbox_mAP'] == 1
    assert evaluate(path, 'CocoMetric')['coco/bbox_mAP'] < 1


@pytest.mark.parametrize('missing', [True, False])
def test_objects_without_iscrowd_are_evaluated(tmp_path, missing):
    content = annotations((0, 1, 2))
    for one in content['annotations']:
        one['iscrowd'] = None
        if missing:
            del one['iscrowd']
    found = evaluate(write(tmp_path / 'a.json', content), 'convnext_mm.CocoMetric')
    assert found['coco/bbox_mAP'] == 1


def test_objects_without_a_polygon_are_ignored_as_in_training(tmp_path):
    content = annotations((0, 1, 2))
    content['annotations'][0]['segmentation'] = [[10, 10, 12, 12]]
    metric = METRICS.build(dict(type='convnext_mm.CocoMetric', metric=['segm'],
                                ann_file=write(tmp_path / 'a.json', content)))
    metric.dataset_meta = dict(classes=CLASSES)
    masks = np.zeros((3, 100, 200), bool)
    for i in range(3):
        masks[i, 10:60, 10 + 60 * i:50 + 60 * i] = True
    for image in (1, 2):
        labels = torch.arange(3)[(1 if image == 1 else 0):]
        kept = masks[labels.numpy()]
        metric.process({}, [dict(img_id=image, ori_shape=(100, 200), pred_instances=dict(
            bboxes=torch.zeros(len(labels), 4), scores=torch.ones(len(labels)), labels=labels,
            masks=torch.from_numpy(kept)))])
    assert metric.evaluate(2)['coco/segm_mAP'] == 1


def test_a_folder_of_images_is_a_test_set(tmp_path):
    for name in ('day/b.JPG', 'a.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.zeros((8, 9, 3), np.uint8))
    (tmp_path / 'notes.txt').write_text('')
    config = dict(type='convnext_mm.CocoDataset', ann_file='', data_prefix=dict(img=str(tmp_path)),
                  metainfo=dict(classes=CLASSES), _scope_='mmdet', pipeline=[
                      dict(type='LoadImageFromFile'), dict(type='PackDetInputs')])
    dataset = DATASETS.build(dict(config, test_mode=True))
    assert [dataset[i]['data_samples'].img_path for i in range(len(dataset))] == [
        str(tmp_path / 'a.png'), str(tmp_path / 'day/b.JPG')]
    with pytest.raises(UserError, match='none has no image'):
        DATASETS.build(dict(config, data_prefix=dict(img=str(tmp_path / 'none')), test_mode=True))


def test_detections_without_annotations_are_written(tmp_path):
    file = tmp_path / 'new' / 'found.json'
    metric = METRICS.build(dict(type='convnext_mm.DetectionWriter', out_file=str(file)))
    metric.dataset_meta = dict(classes=CLASSES)
    for name in ('a.jpg', 'b.jpg'):
        metric.process({}, [dict(img_path=name, ori_shape=(100, 200), pred_instances=dict(
            bboxes=torch.tensor([[10., 10, 30, 40], [0, 0, 5, 5]]), labels=torch.tensor([2, 0]),
            scores=torch.tensor([0.9, 0.01])))])
    assert metric.evaluate(2) == {}
    content = json.loads(file.read_text())
    assert [(one['id'], one['file_name']) for one in content['images']] == [
        (1, 'a.jpg'), (2, 'b.jpg')]
    assert [(one['id'], one['image_id'], one['category_id'], one['bbox'])
            for one in content['annotations']] == [(1, 1, 3, [10, 10, 20, 30]),
                                                   (2, 2, 3, [10, 10, 20, 30])]


def test_a_list_of_images_without_categories_can_be_tested(tmp_path):
    content = dict(annotations((0, 1, 2)))
    path = write(tmp_path / 'a.json', dict(images=content['images']))
    assert evaluate(path, 'convnext_mm.CocoMetric', format_only=True,
                    outfile_prefix=str(tmp_path / 'found')) == {}
    found = json.loads((tmp_path / 'found.bbox.json').read_text())
    assert [(one['image_id'], one['category_id']) for one in found] == [
        (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
