# The tiny UPerNet recipe on the demo's data set. For your own data set, change the same settings.
_base_ = '../upernet_convnext_tiny_512_160k_ade20k.py'

# Data and classes. The folders in data_root have the same names as in ADE20K; 0 in a mask means
# no class.
data_root = 'data/demo/ADEChallengeData2016'
classes = ('sand', 'water', 'brick', 'grass', 'ball', 'crate', 'star', 'leaf')
palette = [[222, 203, 144], [66, 135, 214], [168, 86, 66], [96, 168, 72], [236, 64, 122],
           [255, 167, 38], [255, 238, 88], [0, 150, 136]]

# The colors of the images already vary, so there is no PhotoMetricDistortion.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomResize', scale=(160, 160), ratio_range=(0.8, 1.25), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(128, 128), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]

# Smaller images and a shorter run. Pipelines, padding, schedule and intervals follow.
crop_size = (128, 128)
scale = (160, 160)  # the images have 128 to 160 pixels
max_iters = 900
val_interval = 300
batch_size = 8

# Model size for a CPU: a third of tiny's width, trained from scratch. The heads' inputs follow.
depths = [2, 2, 4, 2]
dims = [32, 64, 128, 256]
drop_path_rate = 0.0
lr = 4e-3
num_workers = 0
seed = 0
model = dict(
    backbone=dict(init_cfg=None),
    decode_head=dict(channels=64),
    auxiliary_head=dict(channels=32),
    test_cfg=dict(mode='whole'))
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=300))
