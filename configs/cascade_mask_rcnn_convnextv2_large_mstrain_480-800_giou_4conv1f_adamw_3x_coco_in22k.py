# Our recipe, derived from the authors' V1 recipes; not trained yet.
_base_ = [
    './_base_/models/cascade_mask_rcnn_convnextv2_fpn.py', './_base_/datasets/coco_instance.py',
    './_base_/schedules/schedule_3x.py', './_base_/runtime_mmdet.py'
]
weights = 'https://dl.fbaipublicfiles.com/convnext/convnextv2/im22k/convnextv2_large_22k_224_ema.pt'
model = dict(
    backbone=dict(
        arch='v2_large',
        drop_path_rate=0.7,
        init_cfg=dict(type='Pretrained', checkpoint=weights)),
    neck=dict(in_channels=[192, 384, 768, 1536]))
optim_wrapper = dict(
    paramwise_cfg=dict(decay_rate=0.7, decay_type='layer_wise', num_layers=12))
