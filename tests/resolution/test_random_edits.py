"""Any edits together are resolved, with the values that were asked for, or refused."""
import random

import pytest
from mmengine.config import Config

from convnext_mm import UserError
from convnext_mm.bases import without_completion
from convnext_mm.resolution import resolve
from convnext_mm.resolution.edits import lookup, same
from tests.helpers import DETECTION, ROOT, SEGMENTATION

SHARED = {
    'model.backbone.arch': ['small', 'base', 'v2_nano', 'v9'],
    'model.backbone.drop_path_rate': [0.0, 0.5], 'model.backbone.out_indices': [[0, 1, 2, 3], [3]],
    'model.backbone.in_chans': [1, 3, 6], 'model.backbone.dims': [[8, 16, 24, 32]],
    'model.backbone.layer_scale_init_value': [0.0],
    'model.data_preprocessor.mean': [[0.0], [1.0] * 3, [1.0] * 6],
    'optim_wrapper.type': ['OptimWrapper', 'AmpOptimWrapper'],
    'optim_wrapper.optimizer.type': ['SGD', 'AdamW'], 'optim_wrapper.optimizer.lr': [1e-3],
    'train_dataloader.batch_size': [1, 8], 'train_dataloader.num_workers': [0],
    'train_dataloader.batch_sise': [1], 'custom_hooks': [[], None],
    'default_hooks.checkpoint.interval': [7], 'default_hooks.checkpoint.save_best': ['auto', None],
    'batch_size': [3], 'lr': [1e-4], 'early_stopping': [2, -1], 'optim_wraper': [{'type': 'x'}],
    'classes': [('a', 'b'), ('a',), 'a'], 'data_root': ['data/mine'], 'seed': [1],
    'model.backbone.frozen_stages': [2], 'model.backbone.type': ['ResNet'], 'dims': [[4, 4, 4, 4]]}
TASKS = {
    SEGMENTATION: {
        'crop_size': [(64, 64), 32], 'scale': [(128, 128)], 'max_iters': [10, 2000],
        'train_cfg.max_iters': [50], 'model.decode_head.num_classes': [3, 150],
        'model.decode_head.out_channels': [1], 'model.auxiliary_head': [None],
        'model.auxiliary_head.in_index': [1, 9], 'reduce_zero_label': [True, False],
        'dataset_type': ['CityscapesDataset', 'BaseSegDataset'],
        'model.test_cfg': [{'mode': 'whole'}], 'val_evaluator.iou_metrics': [['mDice'], ['mIoU']],
        'norm_cfg': [{'type': 'BN'}]},
    DETECTION: {
        'max_epochs': [1, 12, 50], 'train_cfg.max_epochs': [3], 'val_evaluator.metric': ['bbox'],
        'model.roi_head.mask_head': [None], 'model.neck.in_channels': [[1, 2, 3, 4]],
        'train_dataloader.dataset.ann_file': ['a.json']}}


def edit(recipe: str, changes: dict) -> Config:
    with without_completion():
        cfg = Config.fromfile(ROOT / recipe)
    for path, value in changes.items():
        parent = lookup(cfg, path.rpartition('.')[0])
        if isinstance(parent, (dict, Config)):
            parent[path.rpartition('.')[2]] = value
    return cfg


@pytest.mark.parametrize('recipe', TASKS)
def test_random_edits(recipe):
    rng, refused, resolved = random.Random(0), 0, 0
    settings = {**SHARED, **TASKS[recipe]}
    for _ in range(120):
        changes = {path: rng.choice(settings[path])
                   for path in rng.sample(sorted(settings), rng.choice([1, 2, 2]))}
        cfg, shipped = edit(recipe, changes), edit(recipe, {})
        # A value that the recipe has is not seen as the user's.
        asked = {path: lookup(cfg, path) for path in changes
                 if not same(lookup(cfg, path), lookup(shipped, path))}
        try:
            resolve(cfg)
        except UserError:
            refused += 1
            continue
        resolved += 1
        once = cfg.to_dict()
        assert resolve(cfg) == [], changes
        assert cfg.to_dict() == once, changes
        for path, value in asked.items():
            if path not in ('custom_hooks', 'optim_wraper'):
                assert same(lookup(cfg, path), value), (path, changes)
    assert min(refused, resolved) >= 20
