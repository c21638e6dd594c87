_base_ = [
    './_base_/models/cascade_mask_rcnn_convnext_fpn.py', './_base_/datasets/coco_instance.py',
    './_base_/schedules/schedule_3x.py', './_base_/runtime_mmdet.py'
]
model = dict(
    backbone=dict(
        arch='xlarge',
        drop_path_rate=0.8,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_xlarge_22k_224.pth')),
    neck=dict(in_channels=[256, 512, 1024, 2048]))
optim_wrapper = dict(
    paramwise_cfg=dict(decay_rate=0.7, decay_type='layer_wise', num_layers=12))
