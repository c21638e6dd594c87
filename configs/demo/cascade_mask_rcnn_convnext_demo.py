# The tiny Cascade Mask R-CNN recipe on the demo's data set. For your own data set, change the same
# settings.
_base_ = ('../cascade_mask_rcnn_convnext_tiny_patch4_window7_mstrain_480-800_giou_4conv1f_adamw_'
          '3x_coco_in1k.py')

# Data and classes. The files in data_root have the same names as in COCO.
data_root = 'data/demo/coco/'
classes = ('ball', 'crate', 'star', 'leaf')
palette = [(236, 64, 122), (255, 167, 38), (255, 238, 88), (0, 150, 136)]

# Without the recipe's random crops: the images are small as they are.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomChoiceResize', scales=[(s, s) for s in (128, 144, 160)], keep_ratio=True),
    dict(type='PackDetInputs'),
]

# Smaller images and a shorter run. Pipelines, schedule and intervals follow.
scale = (160, 160)  # the images have 128 to 160 pixels
max_epochs = 3
batch_size = 4

# Model size for a CPU. The backbone is that of the segmentation demo and starts from its weights,
# as the recipes start from ImageNet weights. The inputs of neck and heads follow.
depths = [2, 2, 4, 2]
dims = [32, 64, 128, 256]
drop_path_rate = 0.0
lr = 1e-3
num_workers = 0
seed = 0
model = dict(
    backbone=dict(init_cfg=dict(
        type='Pretrained', checkpoint='work_dirs/demo/upernet_convnext_demo/iter_900.pth')),
    neck=dict(out_channels=64),
    rpn_head=dict(feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        # A list replaces that of the recipe, so each stage repeats the recipe's settings.
        bbox_head=[
            dict(stage, conv_out_channels=32, fc_out_channels=256)
            for stage in _base_.model.roi_head.bbox_head
        ],
        mask_head=dict(conv_out_channels=32)),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=[
            dict(stage, sampler=dict(stage.sampler, num=48))
            for stage in _base_.model.train_cfg.rcnn
        ]),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)))
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(save_best='coco/segm_mAP'))
