# ade20k.py with scales and crops for 640 instead of 512 pixels.
_base_ = './ade20k.py'
crop_size = (640, 640)
scale = (2560, 640)

sizes = dict(
    RandomResize=dict(scale=scale), RandomCrop=dict(crop_size=crop_size), Resize=dict(scale=scale))
train_pipeline = [
    dict(step, **sizes.get(step['type'], {})) for step in _base_.train_pipeline
]
test_pipeline = [
    dict(step, **sizes.get(step['type'], {})) for step in _base_.test_pipeline
]
tta_pipeline = [
    _base_.tta_pipeline[0],
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(step, scale=(step['scale'][0] * 5 // 4, step['scale'][1] * 5 // 4))
                for step in _base_.tta_pipeline[1]['transforms'][0]
            ],
            *_base_.tta_pipeline[1]['transforms'][1:],
        ]),
]

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
