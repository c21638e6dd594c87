# The tiny UPerNet recipe on the demo's data set. For your own data set, change the same settings.
_base_ = '../upernet_convnext_tiny_512_160k_ade20k.py'

# Data and classes. The folders in data_root have the same names as in ADE20K; 0 in a mask means
# no class.
data_root = 'data/demo/ADEChallengeData2016'
classes = ('sand', 'water', 'brick', 'grass', 'ball', 'crate', 'star', 'leaf')
palette = [[222, 203, 144], [66, 135, 214], [168, 86, 66], [96, 168, 72], [236, 64, 122],
           [255, 167, 38], [255, 238, 88], [0, 150, 136]]

# Crop size: the images have 128 to 160 pixels. Their colors already vary, so there is no
# PhotoMetricDistortion.
crop_size = (128, 128)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomResize', scale=(160, 160), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(160, 160), keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
no_workers = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(no_workers, batch_size=8, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(no_workers, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# Model size for a CPU: a third of tiny's width, trained from scratch.
depths = [2, 2, 4, 2]
dims = [32, 64, 128, 256]
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(depths=depths, dims=dims, drop_path_rate=0.0, init_cfg=None),
    decode_head=dict(in_channels=dims, channels=64),
    auxiliary_head=dict(in_channels=dims[2], channels=32),
    test_cfg=dict(mode='whole'))

# Schedule.
max_iters = 900
train_cfg = dict(max_iters=max_iters, val_interval=300)
optim_wrapper = dict(optimizer=dict(lr=4e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=max_iters + 1),
]
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=300))
randomness = dict(seed=0)
