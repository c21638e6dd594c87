"""Inputs that nobody writes on purpose end in one UserError: no traceback, no hang, no crash.

CONVNEXT_MM_FUZZ in the environment sets the number of inputs of each kind (60; nightly 1000). Each
is read in a process of its own, which may crash and whose memory is limited.
"""
from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import resource
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout, suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmengine.registry import DATASETS, init_default_scope

from convnext_mm import ConvNeXt, UserError
from convnext_mm.checkpoints.files import check_whole, peek_checkpoint, read_checkpoint
from convnext_mm.datasets.bad_files import name_bad_files
from convnext_mm.engine import checks
from convnext_mm.engine.changes import changed_settings
from convnext_mm.key_values import parse_value
from convnext_mm.migration.writing import migrate
from convnext_mm.runs.resuming import find_checkpoint
from tests.helpers import SEGMENTATION

INPUTS = int(os.environ.get('CONVNEXT_MM_FUZZ', 60))
LIMITS = settings(max_examples=INPUTS, deadline=None, derandomize=True, database=None,
                  suppress_health_check=list(HealthCheck))
SECONDS = 60
MEMORY = 8 * 2**30
WEIRD = [None, True, -1, 0, 1, 2**40, 1e300, float('nan'), float('inf'), '', 'a', '7', '\0', 'ä\n',
         [], {}, [[]], [None], [1, 2], {'a': 1}, '../x', 'type', [0] * 200]
SIZE = dict(depths=[1, 1, 1, 1], dims=[8, 16, 24, 32])


@pytest.fixture(scope='module')
def process() -> Iterator[list]:
    """A pool of one process; the list lets a test replace a broken one."""
    pools: list[ProcessPoolExecutor] = []
    yield pools
    for pool in pools:
        pool.shutdown(cancel_futures=True)


def check(pools: list, read: Callable, *args: Any) -> None:
    """Read an input in the other process; it must end well or with a UserError, and soon."""
    if not pools:
        pools.append(ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context('fork'), initializer=limit_memory))
    try:
        problem = pools[0].submit(outcome, read, *args).result(SECONDS)
    except Exception as error:  # a crash or a hang
        for child in pools.pop().__dict__['_processes'].values():
            child.kill()
        raise AssertionError(f'{type(error).__name__} in {read.__name__}') from error
    assert not problem, problem


def limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY + 2**33, MEMORY + 2**33))
    torch.set_num_threads(1)


def outcome(read: Callable, *args: Any) -> str:
    """'' or the traceback of an error that is no UserError."""
    try:
        with redirect_stdout(io.StringIO()):
            read(*args)
    except UserError as error:
        return '' if str(error) else 'a UserError without a message'
    except BaseException:
        return traceback.format_exc()[-3000:]
    return ''


@st.composite
def mutated(draw: Any, value: Any) -> Any:
    """A structure of dicts and lists with one to three parts replaced, removed or doubled."""
    value = deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        node = value
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inside = node[key]
            if isinstance(inside, (dict, list)) and inside and draw(st.integers(0, 3)):
                node = inside
                continue
            how = draw(st.sampled_from(['replace', 'replace', 'remove', 'double']))
            if how == 'replace':
                node[key] = deepcopy(draw(st.sampled_from(WEIRD)))
            elif how == 'remove':
                del node[key]
            elif isinstance(node, list):
                node.append(deepcopy(inside))
            break
    return value


@st.composite
def damaged(draw: Any, data: bytes) -> bytes:
    """Bytes with bits flipped, a part cut out, or an end missing."""
    changed = bytearray(data)
    how = draw(st.sampled_from(['flip', 'flip', 'cut', 'end', 'zero', 'grow']))
    place = draw(st.integers(0, len(data) - 1))
    length = draw(st.integers(1, 200))
    if how == 'flip':
        for offset in draw(st.lists(st.integers(0, len(data) - 1), min_size=1, max_size=8)):
            changed[offset] ^= 1 << draw(st.integers(0, 7))
    elif how == 'cut':
        del changed[place:place + length]
    elif how == 'end':
        del changed[place:]
    elif how == 'zero':
        changed[place:place + length] = bytes(length)
    else:
        changed[place:place] = draw(st.binary(min_size=1, max_size=50))
    return bytes(changed)


def checkpoint() -> dict[str, Any]:
    model = ConvNeXt(**SIZE)
    return dict(
        meta=dict(iter=4, epoch=0, seed=1, cfg='a = dict(b=1)\nwork_dir = "x"\n',
                  dataset_meta=dict(classes=['a'])),
        state_dict={f'backbone.{name}': value for name, value in model.state_dict().items()},
        optimizer=dict(state={0: dict(step=torch.ones(()))}, param_groups=[dict(lr=1.0)]),
        message_hub=dict(runtime_info=dict(iter=4)), param_schedulers=[dict(end=4)])


CHECKPOINT = checkpoint()


def saved(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def read_a_checkpoint(path: Path) -> None:
    for read in (check_whole, peek_checkpoint, read_checkpoint):
        with suppress(UserError):
            read(str(path))
    with suppress(UserError):
        found = find_checkpoint(dict(work_dir=str(path.parent)))
        content = peek_checkpoint(found) if found else {}
        meta = content.get('meta')
        changed_settings(meta.get('cfg') if isinstance(meta, dict) else None,
                         checks.Config(dict(a=1)))
    ConvNeXt(**SIZE, init_cfg=dict(type='Pretrained', checkpoint=str(path))).init_weights()


@LIMITS
@given(data=st.data())
def test_checkpoints(data, process, tmp_path_factory):
    if data.draw(st.booleans()):
        content = data.draw(damaged(saved(CHECKPOINT)))
    else:
        content = saved(data.draw(mutated(CHECKPOINT) | st.sampled_from(WEIRD)))
    path = tmp_path_factory.mktemp('fuzz') / 'iter_4.pth'
    path.write_bytes(content)
    check(process, read_a_checkpoint, path)


SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
COCO = dict(
    images=[dict(id=i, file_name=f'{i}.jpg', width=60, height=40) for i in (1, 2)],
    categories=[dict(id=1, name='ball'), dict(id=3, name='box', supercategory='x')],
    annotations=[
        dict(id=1, image_id=1, category_id=1, bbox=[10, 10, 20, 20], area=400, iscrowd=0,
             segmentation=[SQUARE]),
        dict(id=2, image_id=1, category_id=3, bbox=[1, 1, 2, 2], area=4, iscrowd=1,
             segmentation=dict(size=[40, 60], counts=[0, 400, 2000])),
        dict(id=3, image_id=2, category_id=3, bbox=[1, 1, 2, 2], area=4, iscrowd=0,
             segmentation=dict(size=[40, 60], counts='PWl05'))])


def read_annotations(path: Path) -> None:
    dataset = DATASETS.build(dict(
        type='convnext_mm.CocoDataset', ann_file=str(path), data_prefix=dict(img=''), pipeline=[
            dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=True)],
        metainfo=dict(classes=('ball', 'box')), filter_cfg=dict(filter_empty_gt=True)))
    name_bad_files(dataset)
    for index in range(len(dataset)):
        dataset[index]
    api = dataset.coco if hasattr(dataset, 'coco') else None
    for one in api.dataset['annotations'] if api else ():
        api.annToMask(one)


@LIMITS
@given(data=st.data())
def test_annotation_files(data, process, tmp_path_factory):
    init_default_scope('mmdet')
    path = tmp_path_factory.mktemp('fuzz') / 'a.json'
    text = json.dumps(data.draw(mutated(COCO)))
    if data.draw(st.integers(0, 4)) == 0:
        path.write_bytes(data.draw(damaged(text.encode())))
    else:
        path.write_text(text)
    check(process, read_annotations, path)


def encoded(kind: str, array: np.ndarray) -> bytes:
    return cv2.imencode(kind, array)[1].tobytes()


RANDOM = np.random.default_rng(0)
IMAGE = encoded('.jpg', RANDOM.integers(0, 255, (20, 30, 3), np.uint8))
MASKS = [encoded('.png', RANDOM.integers(0, top, shape).astype(kind)) for top, shape, kind in (
    (3, (20, 30), np.uint8), (255, (20, 30), np.uint8), (3, (20, 30, 3), np.uint8),
    (3, (20, 30), np.uint16), (3, (1, 1), np.uint8), (3, (20, 30, 4), np.uint8))]


def read_a_mask(folder: Path) -> None:
    init_default_scope('mmseg')
    dataset = DATASETS.build(dict(
        type='convnext_mm.SegmentationDataset', data_root=str(folder), img_suffix='.jpg',
        seg_map_suffix='.png', data_prefix=dict(img_path='images', seg_map_path='masks'),
        metainfo=dict(classes=('a', 'b', 'c')), pipeline=[
            dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
            dict(type='RandomCrop', crop_size=(8, 8)), dict(type='PackSegInputs')]))
    name_bad_files(dataset)
    sample = dataset[0]['data_samples'].gt_sem_seg.data
    assert set(sample.unique().tolist()) <= {0, 1, 2, 255}


@LIMITS
@given(data=st.data())
def test_masks(data, process, tmp_path_factory):
    folder = tmp_path_factory.mktemp('fuzz')
    image, mask = IMAGE, data.draw(st.sampled_from(MASKS))
    which = data.draw(st.sampled_from(['image', 'mask', 'none']))
    if which == 'image':
        image = data.draw(damaged(image))
    elif which == 'mask':
        mask = data.draw(damaged(mask))
    for name, content in (('images/a.jpg', image), ('masks/a.png', mask)):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(content)
    check(process, read_a_mask, folder)


KEYS = ['model.backbone.arch', 'model.backbone.depths', 'model.decode_head.num_classes', 'lr',
        'train_cfg.max_iters', 'train_cfg', 'optim_wrapper.paramwise_cfg', 'param_scheduler.0.end',
        'train_dataloader.batch_size', 'train_dataloader.dataset.pipeline.0.type', 'classes',
        'data_root', 'max_bad_files', 'process_timeout', 'shard_optimizer', 'default_hooks', 'fast',
        'crop_size', 'model', 'a.b', '', '.', 'model.backbone', 'randomness.seed', 'test_cfg',
        'val_evaluator.iou_metrics', 'env_cfg.dist_cfg', 'work_dir', 'early_stopping']
TEXTS = ['[1,2', 'None', "{'a':1}", '(1,)', 'open("x")', '1e400', '[[[', '"', 'nan', '-1', '[]', '',
         '0x', 'True', '()', 'a,b', '9' * 400, '[1,"a"]', 'dict(type=1)', '{}']


def read_options(options: list[tuple[str, str]]) -> None:
    cfg = checks.read_config(SEGMENTATION, {key: parse_value(text) for key, text in options}, [])
    assert cfg.pretty_text


@LIMITS
@given(options=st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(TEXTS) | st.text(
    max_size=6)), min_size=1, max_size=3))
def test_options(options, process):
    check(process, read_options, options)


OLD = """
_base_ = []
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(type='EncoderDecoder', pretrained=None,
    backbone=dict(type='ConvNeXt', in_chans=3, depths=[3, 3, 9, 3], dims=[96, 192, 384, 768],
                  drop_path_rate=0.4, layer_scale_init_value=1.0, out_indices=[0, 1, 2, 3]),
    decode_head=dict(type='UPerHead', in_channels=[96, 192, 384, 768], num_classes=150,
                     norm_cfg=norm_cfg),
    train_cfg=dict(), test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(341, 341)))
img_norm_cfg = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
train_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
    dict(type='Resize', img_scale=(2048, 512), ratio_range=(0.5, 2.0)),
    dict(type='Normalize', **img_norm_cfg), dict(type='DefaultFormatBundle'),
    dict(type='Collect', keys=['img', 'gt_semantic_seg'])]
data = dict(samples_per_gpu=2, workers_per_gpu=2, train=dict(type='ADE20KDataset',
    data_root='data/ade', img_dir='images', ann_dir='annotations', pipeline=train_pipeline))
optimizer = dict(constructor='LearningRateDecayOptimizerConstructor', type='AdamW', lr=0.0001,
    betas=(0.9, 0.999), weight_decay=0.05, paramwise_cfg={'decay_rate': 0.9, 'num_layers': 6})
lr_config = dict(policy='poly', warmup='linear', warmup_iters=1500, power=1.0, by_epoch=False)
runner = dict(type='IterBasedRunner', max_iters=160000)
checkpoint_config = dict(by_epoch=False, interval=16000)
evaluation = dict(interval=16000, metric='mIoU')
"""
PIECES = ['None', '[]', '{}', 'dict()', '-1', "'a'", '1 +', '**1', 'lambda: 0', 'x for x in y', '(',
          ')', ',', '=', '\0', '9' * 500, "dict(type='X')", '*', 'import os\n', '# é\n', "f'{1}'"]


def read_an_old_config(path: Path) -> None:
    try:
        migrate(path, path.with_name('new.py'))
    finally:
        checks.load_config(str(path))


@LIMITS
@given(data=st.data())
def test_old_configs(data, process, tmp_path_factory):
    words = re.findall(r'\w+|\s+|.', OLD)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(words) - 1))
        words[place] = data.draw(st.sampled_from([*PIECES, '', words[place] * 2]))
    path = tmp_path_factory.mktemp('fuzz') / 'old.py'
    path.write_text(''.join(words), encoding='utf-8')
    check(process, read_an_old_config, path)
