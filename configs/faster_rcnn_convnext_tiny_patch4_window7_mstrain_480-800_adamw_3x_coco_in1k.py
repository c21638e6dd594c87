# Our recipe, the authors' without its masks; not trained yet.
_base_ = [
    './_base_/models/faster_rcnn_convnext_fpn.py', './_base_/datasets/coco_detection.py',
    './_base_/schedules/schedule_3x_amp.py', './_base_/runtime_mmdet.py'
]
model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_tiny_1k_224.pth')))
optim_wrapper = dict(
    paramwise_cfg=dict(decay_rate=0.95, decay_type='layer_wise'))
