"""Masks with values to ignore, and images of several endings."""
import numpy as np
import pytest
import torch
from mmseg.registry import DATASETS, METRICS
from PIL import Image

from convnext_mm import UserError

PIPELINE = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
            dict(type='PackSegInputs')]


@pytest.fixture
def data(tmp_path):
    """Builds a data set of three images whose masks have the values 0 to 11."""
    def data(**settings):
        return DATASETS.build(dict(
            type='convnext_mm.SegmentationDataset', data_root=str(tmp_path), _scope_='mmseg',
            data_prefix=dict(img_path='images', seg_map_path='masks'), pipeline=PIPELINE,
            metainfo=dict(classes=[str(i) for i in range(11)]), **settings))
    for i, suffix in enumerate(('.jpg', '.JPG', '.jpeg')):
        for folder in ('images', 'masks'):
            (tmp_path / folder).mkdir(exist_ok=True)
        Image.new('RGB', (12, 6)).save(tmp_path / 'images' / f'{i}{suffix}', 'JPEG')
        mask = np.tile(np.arange(12, dtype=np.uint8), (6, 1))
        Image.fromarray(mask).save(tmp_path / 'masks' / f'{i}.png')
    return data


@pytest.mark.parametrize(('settings', 'labels'), [
    (dict(), range(12)),
    (dict(ignore=(11,)), [*range(11), 255]),
    (dict(ignore=(0, 11)), [255, *range(1, 11), 255]),
    (dict(ignore=(3,), reduce_zero_label=True), [255, 0, 1, 255, *range(3, 11)])])
def test_ignored_values_become_255(data, settings, labels):
    mask = data(**settings)[0]['data_samples'].gt_sem_seg.data
    assert mask[0, 0].tolist() == list(labels)


def test_the_metric_leaves_ignored_values_out(data):
    sample = data(ignore=(11,))[0]['data_samples']
    metric = METRICS.build(dict(type='IoUMetric', _scope_='mmseg'))
    metric.dataset_meta = data(ignore=(11,)).metainfo
    prediction = torch.arange(12).clamp(max=10).expand(6, 12)  # 11 predicted as 10
    metric.process({}, [dict(gt_sem_seg=dict(data=sample.gt_sem_seg.data),
                             pred_sem_seg=dict(data=prediction[None]), img_path='a.jpg')])
    assert metric.evaluate(1)['mIoU'] == 100


def test_the_endings_that_are_there_are_named(data):
    with pytest.raises(UserError, match=r'none of 1 \.jpg, 1 \.JPG, 1 \.jpeg ends with \.png, set'):
        data(img_suffix='.png')


def test_endings(data, tmp_path):
    assert len(data()) == 1
    several = data(img_suffix=('.jpg', '.JPG', '.jpeg'))
    assert [several.get_data_info(i)['img_path'] for i in range(3)] == [
        f'{tmp_path}/images/{name}' for name in ('0.jpg', '1.JPG', '2.jpeg')]
    assert several.get_data_info(2)['seg_map_path'] == f'{tmp_path}/masks/2.png'
    (tmp_path / 'list.txt').write_text('0\n2\n')
    listed = data(img_suffix=('.jpg', '.JPG', '.jpeg'), ann_file='list.txt')
    assert [listed.get_data_info(i)['img_path'][-6:] for i in range(2)] == ['/0.jpg', '2.jpeg']
