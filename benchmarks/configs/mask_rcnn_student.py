# A small Mask R-CNN on the demo's data set, for benchmarks/distillation.py.
_base_ = ('../../configs/mask_rcnn_convnext_tiny_patch4_window7_mstrain_480-800_adamw_'
          '3x_coco_in1k.py')

data_root = 'data/demo/coco/'
classes = ('ball', 'crate', 'star', 'leaf')
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomChoiceResize', scales=[(s, s) for s in (128, 144, 160)], keep_ratio=True),
    dict(type='PackDetInputs'),
]
scale = (160, 160)
max_epochs = 3
batch_size = 4
depths = [1, 1, 2, 1]
dims = [16, 32, 64, 128]
drop_path_rate = 0.0
lr = 1e-3
num_workers = 0
model = dict(
    backbone=dict(init_cfg=None),
    # As the demo's Cascade Mask R-CNN, the teacher
    neck=dict(out_channels=64),
    rpn_head=dict(feat_channels=64, anchor_generator=dict(scales=[4])),
    roi_head=dict(bbox_head=dict(fc_out_channels=256), mask_head=dict(conv_out_channels=32)),
    train_cfg=dict(rpn_proposal=dict(nms_pre=500, max_per_img=200),
                   rcnn=dict(sampler=dict(num=48))),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100)))
