# Our recipe, derived from the authors' V1 recipes; not trained yet.
_base_ = [
    './_base_/models/upernet_convnextv2.py', './_base_/datasets/ade20k.py',
    './_base_/schedules/schedule_160k_amp.py', './_base_/runtime_mmseg.py'
]
weights = 'https://dl.fbaipublicfiles.com/convnext/convnextv2/im22k/convnextv2_nano_22k_224_ema.pt'
dims = [80, 160, 320, 640]
model = dict(
    backbone=dict(
        arch='v2_nano',
        drop_path_rate=0.2,
        init_cfg=dict(type='Pretrained', checkpoint=weights)),
    decode_head=dict(in_channels=dims),
    auxiliary_head=dict(in_channels=dims[2]))
