# COCO's boxes without its masks.
_base_ = './coco_instance.py'
load_boxes = dict(type='LoadAnnotations', with_bbox=True)
train_pipeline = [
    load_boxes if step['type'] == 'LoadAnnotations' else step for step in _base_.train_pipeline
]
test_pipeline = [
    load_boxes if step['type'] == 'LoadAnnotations' else step for step in _base_.test_pipeline
]
tta_pipeline = [
    _base_.tta_pipeline[0],
    dict(
        type='TestTimeAug',
        transforms=[
            [load_boxes] if steps[0]['type'] == 'LoadAnnotations' else steps
            for steps in _base_.tta_pipeline[1]['transforms']
        ]),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(metric=['bbox'])
test_evaluator = val_evaluator
