"""Any one or two edits of a recipe train a step with what was asked, or end in one UserError."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from mmengine.config import Config
from mmengine.registry import RUNNERS

from convnext_mm import UserError
from convnext_mm.engine import checks, fallbacks
from convnext_mm.engine.hooks import AbsentClassesHook, PredictionsHook
from convnext_mm.engine.summary import summarize
from convnext_mm.resolution import resolve
from convnext_mm.resolution.edits import lookup, same
from tests.helpers import ROOT, SEGMENTATION
from tests.recipes import MASK

EXAMPLES = int(os.environ.get('CONVNEXT_MM_EXAMPLES', 8))
V2_SEGMENTATION = 'configs/upernet_convnextv2_tiny_512_160k_ade20k.py'
V2_DETECTION = ('configs/cascade_mask_rcnn_convnextv2_tiny_mstrain_480-800_giou_4conv1f_adamw_'
                '3x_coco_in22k.py')
MASK_RCNN = f'configs/{MASK}.py'

BOTH: dict[str, list[Any]] = {
    'model.backbone.arch': ['small', 'v2_nano', 'v9'],
    'model.backbone.depths': [[1, 1, 2, 1], [1, 1, 1]],
    'model.backbone.dims': [[8, 8, 16, 16], [8, 16], 'wide'],
    'model.backbone.drop_path_rate': [0.0, 0.3, -1.0, 'a'],
    'model.backbone.layer_scale_init_value': [0.0, 1e-6],
    'model.backbone.use_grn': [True, False],
    'model.backbone.out_indices': [[0, 1, 2, 3], [3], [1, 3], [7]],
    'model.backbone.frozen_stages': [0, 2, 9], 'model.backbone.in_chans': [1, 3, 4],
    'model.backbone.with_cp': [True], 'model.backbone.norm_eval': [True],
    'model.backbone.output_stride': [16, 8, 3],
    'model.backbone.init_cfg': [None, {'type': 'Pretrained', 'checkpoint': 'nowhere.pth'}],
    'model.backbone.type': ['ResNet', 'ConvNeXtt'], 'model.backbone.drop_rate': [0.1],
    'model.pretrained': ['nowhere.pth', None],
    'model.data_preprocessor.mean': [[0.0], [1.0] * 3, [1.0] * 6],
    'model.data_preprocessor.std': [[2.0] * 3, [0.5] * 2],
    'model.data_preprocessor.bgr_to_rgb': [False],
    'optim_wrapper.type': ['OptimWrapper', 'AmpOptimWrapper', 'Optim'],
    'optim_wrapper.optimizer.type': ['SGD', 'AdamW', 'Adan'],
    'optim_wrapper.optimizer.lr': [1e-3, 0.0, -1.0], 'optim_wrapper.optimizer.betas': [(0.8, 0.9)],
    'optim_wrapper.optimizer.weight_decay': [0.0, 0.1],
    'optim_wrapper.accumulative_counts': [2], 'optim_wrapper.clip_grad': [{'max_norm': 1.0}],
    'optim_wrapper.constructor': ['DefaultOptimWrapperConstructor'],
    'optim_wrapper.paramwise_cfg.decay_rate': [0.7, 1.0, 0.0, 2.0],
    'optim_wrapper.paramwise_cfg.num_layers': [12, 'auto', 5],
    'optim_wrapper.paramwise_cfg.decay_type': ['layer_wise', 'stage_wise', 'all'],
    'param_scheduler': [[], [{'type': 'PolyLR', 'by_epoch': False, 'end': 20}],
                        [{'type': 'OneCycleLR', 'eta_max': 1e-3, 'total_steps': 9}],
                        [{'type': 'CosineAnnealingLR', 'by_epoch': False, 'T_max': 90,
                          'eta_min': 1e-5}]],
    'train_dataloader.batch_size': [1, 3], 'train_dataloader.num_workers': [1],
    'train_dataloader.batch_sise': [1], 'train_dataloader.sampler.type': [
        'InfiniteSampler', 'DefaultSampler'],
    'val_dataloader.batch_size': [2], 'val_dataloader.persistent_workers': [True],
    'train_dataloader.dataset.ann_file': ['a.json', ''], 'val_dataloader': [None],
    'train_cfg.val_interval': [1, 7],
    'train_cfg.type': ['IterBasedTrainLoop', 'EpochBasedTrainLoop'],
    'default_hooks.checkpoint.interval': [7], 'default_hooks.checkpoint.intervall': [7],
    'default_hooks.checkpoint.save_best': ['auto', None, 'mDice', 'coco/bbox_mAP'],
    'default_hooks.logger.interval': [1], 'default_hooks.logger.type': ['Logger'],
    'custom_hooks': [[], None, [{'type': 'EMAHook'}], [{'type': 'EMAHok'}]],
    'visualizer.vis_backends': [[], [{'type': 'TensorboardVisBackend'}]],
    'classes': [('a', 'b'), ('a',), 'a', ('a', 'a'), 3], 'palette': [[(1, 2, 3)]],
    'data_root': ['nowhere'], 'seed': [1, 'x'], 'lr': [1e-4], 'batch_size': [3, 0],
    'early_stopping': [2, -1], 'log_to': ['tensorboard', ['wandb'], 'x', 3],
    'num_workers': [0], 'optim_wraper': [{'type': 'x'}],
    'learning_rate': [1.0], 'dims': [[4, 4, 8, 8]], 'weight_decay': [0.1],
    'fast': [{'channels_last': True}, {'channel_last': True}], 'load_from': ['nowhere.pth'],
    'randomness.seed': [3], 'randomness.deterministic': [True], 'env_cfg.cudnn_benchmark': [True],
    'log_level': ['WARNING', 'LOUD'], 'test_evaluator': [None], 'find_unused_parameters': [True]}
TASKS: dict[str, dict[str, list[Any]]] = {
    SEGMENTATION: {
        'crop_size': [(64, 64), 32, (64,), 'big'], 'scale': [(128, 128), 'big'],
        'max_iters': [10, 2000, '10'], 'train_cfg.max_iters': [50, 0], 'max_epochs': [3],
        'model.decode_head.num_classes': [3, 8], 'model.decode_head.channels': [8, 0],
        'model.decode_head.out_channels': [1], 'model.decode_head.dropout_ratio': [0.5],
        'model.decode_head.pool_scales': [(1, 2), (1,)],
        'model.decode_head.in_channels': [[8, 16, 24, 32], [1, 2, 3, 4]],
        'model.decode_head.in_index': [[0, 1, 2, 3], [0, 1]],
        'model.decode_head.align_corners': [True], 'model.decode_head.ignore_index': [0],
        'model.decode_head.loss_decode.class_weight': [[1.0] * 8, [1.0] * 3],
        'model.decode_head.loss_decode.use_sigmoid': [True],
        'model.decode_head.loss_decode.type': ['FocalLoss', 'DiceLoss', 'Loss'],
        'model.decode_head.type': ['FCNHead', 'PSPHead'],
        'model.auxiliary_head': [None], 'model.auxiliary_head.in_index': [1, 9],
        'reduce_zero_label': [True, False, 1], 'img_suffix': ['.jpg', '.tif'],
        'ignore': [3, (3, 4), 'x'],
        'dataset_type': ['CityscapesDataset', 'BaseSegDataset', 'NoDataset'],
        'model.data_preprocessor.size': [(64, 64)],
        'model.test_cfg': [{'mode': 'whole'}, {'mode': 'slide'}],
        'model.test_cfg.mode': ['slide', 'whole', 'all'],
        'val_evaluator.iou_metrics': [['mDice'], ['mIoU', 'mFscore'], ['IoU']],
        'val_evaluator.type': ['CocoMetric'], 'norm_cfg': [{'type': 'BN'}, {'type': 'LN2'}]},
    MASK_RCNN: {
        'max_epochs': [1, 12, 50], 'train_cfg.max_epochs': [3, 0], 'max_iters': [3],
        'val_evaluator.metric': ['bbox', ['segm'], 'proposal', 'box'],
        'val_evaluator.type': ['VOCMetric', 'IoUMetric'],
        'model.roi_head.mask_head': [None], 'model.roi_head.mask_head.num_classes': [4, 5],
        'model.neck.in_channels': [[1, 2, 3, 4], [8, 16, 24, 32]],
        'model.neck.out_channels': [8], 'model.neck.num_outs': [4, 5],
        'model.neck.type': ['PAFPN'], 'model.rpn_head.anchor_generator.scales': [[4]],
        'model.rpn_head.in_channels': [8], 'model.test_cfg.rcnn.score_thr': [0.5],
        'model.test_cfg.rcnn.max_per_img': [1], 'model.train_cfg.rpn_proposal.max_per_img': [3],
        'dataset_type': ['CocoDataset', 'VOCDataset'], 'crop_size': [(64, 64)],
        'masks': [False, True, 'no'],
        'train_dataloader.dataset.filter_cfg.min_size': [1000],
        'train_dataloader.batch_sampler': [None]}}
TASKS[V2_SEGMENTATION], TASKS[V2_DETECTION] = TASKS[SEGMENTATION], TASKS[MASK_RCNN]
SMALL = dict.fromkeys((SEGMENTATION, V2_SEGMENTATION), '''
data_root = '{data}/ADEChallengeData2016'
classes = ('sand', 'water', 'brick', 'grass', 'ball', 'crate', 'star', 'leaf')
reduce_zero_label = True
dims = [8, 16, 24, 32]
crop_size = (64, 64)
scale = (96, 96)
max_iters = 20
num_workers = 0
model = dict(backbone=dict(depths=[1, 1, 1, 1], init_cfg=None), decode_head=dict(channels=8),
             auxiliary_head=dict(channels=8))
''') | dict.fromkeys((MASK_RCNN, V2_DETECTION), '''
data_root = '{data}/coco/'
classes = ('ball', 'crate', 'star', 'leaf')
dims = [8, 16, 24, 32]
scale = (96, 96)
max_epochs = 2
num_workers = 0
model = dict(backbone=dict(depths=[1, 1, 1, 1], init_cfg=None), neck=dict(out_channels=16),
             train_cfg=dict(rpn_proposal=dict(nms_pre=100, max_per_img=50)),
             test_cfg=dict(rpn=dict(nms_pre=100, max_per_img=50)))
''')


@st.composite
def edits(draw, recipe: str) -> dict[str, Any]:
    choices = {**BOTH, **TASKS[recipe]}
    paths = draw(st.lists(st.sampled_from(sorted(choices)), min_size=1, max_size=2, unique=True))
    return {path: draw(st.sampled_from(choices[path])) for path in paths}


def nested(changes: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as a config file has them; a later one inside an earlier value is left out."""
    result: dict[str, Any] = {}
    for path, value in changes.items():
        node = result
        *parents, key = path.split('.')
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                return nested({path: value})
        node[key] = value
    return result


def run_one_step(cfg: Config) -> None:
    """As tools/train.py starts, then one step of training and one batch of validation.

    Data is loaded without workers, which could deadlock when forked in a process with threads.
    """
    summarize(cfg)
    fallbacks.adapt_to_device(cfg)
    fallbacks.check_losses(cfg)
    checks.check_input(cfg, ('train', 'val') if cfg.get('val_cfg') else ('train',))
    for split in ('train', 'val'):
        if cfg.get(f'{split}_dataloader'):
            cfg[f'{split}_dataloader'].update(num_workers=0, persistent_workers=False)
    runner = RUNNERS.build(cfg)
    loop = runner.build_train_loop(runner._train_loop)
    runner._train_loop = loop
    wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.optim_wrapper = wrapper
    runner.build_param_scheduler(runner.param_schedulers)
    loss = runner.model.train_step(next(iter(loop.dataloader)), wrapper)
    assert all(value.isfinite().all() for value in loss.values())
    if runner._val_loop is None:
        return
    val = runner._val_loop = runner.build_val_loop(runner._val_loop)
    runner.model.eval()
    batch = next(iter(val.dataloader))
    with torch.no_grad():
        outputs = runner.model.val_step(batch)
    for hook in runner.hooks:
        if isinstance(hook, (AbsentClassesHook, PredictionsHook)):
            hook.after_val_iter(runner, 0, batch, outputs)
    val.evaluator.process(data_samples=outputs, data_batch=batch)
    val.evaluator.evaluate(len(outputs))


def read(folder: Path, changes: dict[str, Any], as_options: bool) -> Config:
    """The resolved config of a user's file, or of options; it has what was asked for."""
    lines = ''.join(f'{key} = {value!r}\n' for key, value in nested(changes).items())
    (folder / 'mine.py').write_text("_base_ = './small.py'\n" + ('' if as_options else lines))
    cfg = checks.read_config(str(folder / 'mine.py'), changes if as_options else {}, [])
    for path, value in changes.items():
        # Lists of hooks get the recipe's; a recipe's own value is not seen as the user's.
        if path not in ('custom_hooks', 'visualizer.vis_backends', 'model.pretrained',
                        'val_dataloader.persistent_workers'):
            found = lookup(cfg, path)
            assert same(found, value) or contains(found, value), (path, found)
    return cfg


def small(folder: Path, recipe: str, data: Path) -> Path:
    """A folder with the recipe made small for the demo's data."""
    (folder / 'small.py').write_text(f"_base_ = '{ROOT}/{recipe}'\n"
                                     + SMALL[recipe].format(data=data))
    return folder


def names(path: str) -> str:
    return Path(path).stem[:30]


@pytest.mark.parametrize('recipe', TASKS, ids=names)
def test_resolved_configs_stay_as_they_are(recipe, demo_data, tmp_path_factory):
    folder = small(tmp_path_factory.mktemp('edits'), recipe, demo_data)

    @settings(max_examples=3 * EXAMPLES, deadline=None, derandomize=EXAMPLES < 20, database=None,
              suppress_health_check=list(HealthCheck))
    @given(edits(recipe), st.booleans())
    def check(changes: dict[str, Any], as_options: bool) -> None:
        try:
            cfg = read(folder, changes, as_options)
        except UserError:
            return
        once = cfg.to_dict()
        assert resolve(cfg) == []
        assert cfg.to_dict() == once
    check()


@pytest.mark.slow
@pytest.mark.parametrize('recipe', TASKS, ids=names)
@pytest.mark.parametrize('as_options', [False, True], ids=['file', 'options'])
def test_edits(recipe, as_options, demo_data, tmp_path_factory):
    folder = small(tmp_path_factory.mktemp('edits'), recipe, demo_data)

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES < 20, database=None,
              suppress_health_check=list(HealthCheck))
    @given(edits(recipe))
    def check(changes: dict[str, Any]) -> None:
        try:
            cfg = read(folder, changes, as_options)
            cfg.work_dir = str(folder / 'work_dir')
            run_one_step(cfg)
        except UserError:
            event('refused')
        else:
            event('trained')
    check()


def contains(found: Any, value: Any) -> bool:
    """Whether a dict was merged into an inherited one."""
    return isinstance(found, dict) and isinstance(value, dict) and all(
        same(found.get(key), item) for key, item in value.items())
