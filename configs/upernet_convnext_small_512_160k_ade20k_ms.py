# Tested on the whole picture in six scales, each flipped as well.
_base_ = './upernet_convnext_small_512_160k_ade20k.py'
model = dict(test_cfg=dict(_delete_=True, mode='whole'))
test_time_augmentation = True
