_base_ = [
    './_base_/models/upernet_convnext_640.py', './_base_/datasets/ade20k_640.py',
    './_base_/schedules/schedule_160k.py', './_base_/runtime_mmseg.py'
]
dims = [192, 384, 768, 1536]
model = dict(
    backbone=dict(
        arch='large',
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://dl.fbaipublicfiles.com/convnext/convnext_large_22k_224.pth')),
    decode_head=dict(in_channels=dims),
    auxiliary_head=dict(in_channels=dims[2]))
optim_wrapper = dict(paramwise_cfg=dict(num_layers=12))
