# The tiny Cascade Mask R-CNN recipe on the demo's data set. For your own data set, change the same
# settings.
_base_ = ('../cascade_mask_rcnn_convnext_tiny_patch4_window7_mstrain_480-800_giou_4conv1f_adamw_'
          '3x_coco_in1k.py')

# Data and classes. The files in data_root have the same names as in COCO.
data_root = 'data/demo/coco/'
classes = ('ball', 'crate', 'star', 'leaf')
palette = [(236, 64, 122), (255, 167, 38), (255, 238, 88), (0, 150, 136)]

# Image size: the images have 128 to 160 pixels.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomChoiceResize', scales=[(s, s) for s in (128, 144, 160)], keep_ratio=True),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(160, 160), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
no_workers = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(no_workers, batch_size=4, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(no_workers, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# Model size for a CPU. The backbone is that of the segmentation demo and starts from its weights,
# as the recipes start from ImageNet weights.
depths = [2, 2, 4, 2]
dims = [32, 64, 128, 256]
channels = 64
model = dict(
    backbone=dict(
        depths=depths,
        dims=dims,
        drop_path_rate=0.0,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/demo/upernet_convnext_demo/iter_900.pth')),
    neck=dict(in_channels=dims, out_channels=channels),
    rpn_head=dict(
        in_channels=channels, feat_channels=channels, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels),
        # A list replaces that of the recipe, so each stage repeats the recipe's settings.
        bbox_head=[
            dict(
                stage,
                in_channels=channels,
                conv_out_channels=32,
                fc_out_channels=256) for stage in _base_.model.roi_head.bbox_head
        ],
        mask_roi_extractor=dict(out_channels=channels),
        mask_head=dict(in_channels=channels, conv_out_channels=32)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=[
            dict(stage, sampler=dict(stage.sampler, num=48))
            for stage in _base_.model.train_cfg.rcnn
        ]),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)))

# Schedule.
train_cfg = dict(max_epochs=3, val_interval=1)
optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=3, milestones=[2], gamma=0.1),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(save_best='coco/segm_mAP'))
randomness = dict(seed=0)
