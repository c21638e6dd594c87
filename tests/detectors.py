"""mmdet's own detectors with our backbone, small."""
from pathlib import Path

import mmdet
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS

import convnext_mm  # noqa: F401

CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'
DIMS = [8, 16, 24, 32]


def build_detector(name):
    """A small detector of mmdet with our backbone."""
    config = CONFIGS / f'{name}.py'
    if 'dyhead' in name:
        config = CONFIGS / 'dyhead' / 'atss_r50_fpn_dyhead_1x_coco.py'
    cfg = Config.fromfile(config).model
    stages = cfg.backbone.get('out_indices', (1, 2, 3))
    stages = [1, 2, 3] if len(stages) == 3 else [0, 1, 2, 3]
    cfg.data_preprocessor.batch_augments = None
    cfg.backbone = dict(type='ConvNeXt', depths=[1, 1, 1, 1], dims=DIMS, out_indices=stages)
    channels = [DIMS[i] for i in stages]
    if cfg.get('neck'):
        (cfg.neck[0] if isinstance(cfg.neck, list) else cfg.neck).in_channels = channels
    else:
        cfg.panoptic_head.in_channels = channels
    if 'num_queries' in cfg:
        cfg.num_queries = 50
    for part in ('train_cfg', 'test_cfg'):
        for proposals in ('rpn', 'rpn_proposal'):
            if 'max_per_img' in (cfg.get(part) or {}).get(proposals, {}):
                cfg[part][proposals].max_per_img = 60
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.backbone.init_cfg = None
    MMLogger.get_instance('mmengine', log_level='WARNING')  # hide how each is initialized
    model.init_weights()
    return model
