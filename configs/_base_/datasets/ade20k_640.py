# As in ade20k.py, with pictures and crops of 640 instead of 512.
_base_ = './ade20k.py'
crop_size = (640, 640)
scale = (2560, 640)

own = dict(
    RandomResize=dict(scale=scale), RandomCrop=dict(crop_size=crop_size), Resize=dict(scale=scale))
train_pipeline = [
    dict(step, **own.get(step['type'], {})) for step in _base_.train_pipeline
]
test_pipeline = [
    dict(step, **own.get(step['type'], {})) for step in _base_.test_pipeline
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale=(round(scale[0] * r), round(scale[1] * r)),
                     keep_ratio=True) for r in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            *_base_.tta_pipeline[1].transforms[1:],
        ]),
]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
