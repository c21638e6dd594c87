# Test-time augmentation: whole images at six scales, each also flipped.
_base_ = './upernet_convnext_xlarge_640_160k_ade20k.py'
model = dict(test_cfg=dict(_delete_=True, mode='whole'))
test_time_augmentation = True
