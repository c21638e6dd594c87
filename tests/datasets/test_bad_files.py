"""Files that cannot be loaded are named, in training and testing, and left out up to a limit."""
import os
import re
import shutil
import signal

import cv2
import numpy as np
import pytest
import torch

from convnext_mm.datasets.bad_files import BadFile, SkippedFiles
from convnext_mm.engine.runner import ConvNeXtRunner
from convnext_mm.errors import UserError
from tests.runs.training import config, train

OPTIONS = {'check_data': False, 'train_cfg.max_iters': 4, 'seed': 0}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No log of the environment, which takes seconds."""
    monkeypatch.setattr(ConvNeXtRunner, '_log_env', lambda self, cfg: None)


IMAGES, MASKS = ('ADEChallengeData2016/' + kind for kind in ('images', 'annotations'))


@pytest.fixture
def data(demo_data, tmp_path):
    return shutil.copytree(demo_data, tmp_path / 'data')


def damage(path) -> str:
    path.write_bytes(b'not an image')
    return str(path)


def first(folder, split='training'):
    return sorted((folder / split).iterdir())[0]


@pytest.mark.parametrize('workers', [0, 1])
def test_training_names_and_leaves_out_bad_files(workers, data, tmp_path, caplog):
    path = damage(first(data / IMAGES))
    cfg = config('segmentation', data, tmp_path / 'run', {
        **OPTIONS, 'train_dataloader.num_workers': workers, 'num_workers': workers})
    record = train(cfg)
    assert sorted(record.losses) == [1, 2, 3, 4]
    assert path not in str(record.images)
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    assert log.count('Left out (file 1 of at most 10') == 1
    assert path in log
    assert 'LoadImageFromFile' in log


def test_too_many_bad_files_are_listed(data, tmp_path):
    paths = [damage(path) for path in (data / IMAGES / 'training').iterdir()]
    cfg = config('segmentation', data, tmp_path / 'run', {**OPTIONS, 'max_bad_files': 2})
    with pytest.raises(UserError, match='3 bad files, max_bad_files=2') as error:
        train(cfg)
    assert sum(path in str(error.value) for path in paths) == 3


def test_detection_leaves_out_bad_files(data, tmp_path):
    path = damage(sorted((data / 'coco' / 'train2017').iterdir())[0])
    record = train(config('detection', data, tmp_path / 'run', {
        'check_data': False, 'train_cfg.max_epochs': 1, 'val_cfg': None, 'val_dataloader': None,
        'val_evaluator': None}))
    assert path not in str(record.images)
    assert path in next((tmp_path / 'run').glob('*/*.log')).read_text()


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('kind', [IMAGES, MASKS])
def test_testing_names_the_bad_file(kind, workers, data, tmp_path):
    path = first(data / kind, 'validation')
    if kind == MASKS:  # a value of no class
        mask = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        mask[0, 0] = 200
        cv2.imwrite(str(path), mask)
    else:
        damage(path)
    cfg = config('segmentation', data, tmp_path / 'run', {**OPTIONS, 'num_workers': workers})
    with pytest.raises(BadFile) as error:
        ConvNeXtRunner.from_cfg(cfg).test()
    assert str(path) in str(error.value)
    assert 'Traceback' not in str(error.value)
    assert ('label 199' in str(error.value)) == (kind == MASKS)


def test_a_mask_of_another_size_is_named(data, tmp_path):
    path = first(data / MASKS)
    cv2.imwrite(str(path), np.ones((7, 9), np.uint8))
    cfg = config('segmentation', data, tmp_path / 'run', {**OPTIONS, 'max_bad_files': 0})
    with pytest.raises(UserError, match='the mask is 9×7 pixels') as error:
        train(cfg)
    assert str(path) in str(error.value)


@pytest.mark.parametrize('size', [(1, 1), (1, 5), (5, 1)])
def test_images_of_one_row_or_pixel(size, data, tmp_path):
    for kind, shape in ((IMAGES, (*size, 3)), (MASKS, size)):
        for split in ('training', 'validation'):
            for path in (data / kind / split).iterdir():
                cv2.imwrite(str(path), np.ones(shape, np.uint8))
    record = train(config('segmentation', data, tmp_path / 'run', OPTIONS))
    assert len(record.losses) == 4


def test_limits_are_whole_numbers():
    for limit in (-1, 1.5, True, 'many'):
        with pytest.raises(UserError, match='max_bad_files'):
            SkippedFiles(limit)


def test_a_dead_worker_ends_testing_and_training_clearly(data, tmp_path):
    for run in ('train', 'test'):
        cfg = config('segmentation', data, tmp_path / run, {**OPTIONS, 'num_workers': 1})
        runner = ConvNeXtRunner.from_cfg(cfg)
        loop = runner.test_loop if run == 'test' else runner.train_loop
        dataset = loop.dataloader.dataset
        dataset.full_init()
        dataset.pipeline.transforms.insert(0, Die())
        with pytest.raises(UserError, match=f'{run}ing ended.*DataLoader worker .*num_workers'):
            getattr(runner, run)()


class Die:
    def __call__(self, results):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has'),
    MemoryError('Unable to allocate 9 GiB'),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't "
                 'allocate memory: you tried to allocate 99 bytes. Error code 12')])
def test_out_of_memory_says_what_to_change(error, data, tmp_path, monkeypatch):
    runner = ConvNeXtRunner.from_cfg(config('segmentation', data, tmp_path / 'run', OPTIONS))

    def fail(*args, **kwargs):
        raise error
    monkeypatch.setattr(runner.model, 'train_step', fail)
    with pytest.raises(UserError, match='out of memory in training') as caught:
        runner.train()
    message = str(caught.value)
    assert 'batch_size=1' in message
    assert 'minimal' in message
    assert re.search(r'Estimated for 2 images: plain [\d.]+ GB, lean ', message)
    assert re.search(r'could not allocate (2.00 GiB|9 GiB|99 bytes)', message)
