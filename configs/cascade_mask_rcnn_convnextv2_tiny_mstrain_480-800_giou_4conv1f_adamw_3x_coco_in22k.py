# Our recipe, derived from the authors' V1 recipes; not trained yet.
_base_ = [
    './_base_/models/cascade_mask_rcnn_convnextv2_fpn.py', './_base_/datasets/coco_instance.py',
    './_base_/schedules/schedule_3x_amp.py', './_base_/runtime_mmdet.py'
]
weights = 'https://dl.fbaipublicfiles.com/convnext/convnextv2/im22k/convnextv2_tiny_22k_224_ema.pt'
model = dict(
    backbone=dict(
        init_cfg=dict(type='Pretrained', checkpoint=weights)))
optim_wrapper = dict(
    optimizer=dict(lr=2e-4),
    paramwise_cfg=dict(decay_rate=0.7, decay_type='layer_wise'))
