_base_ = './default_runtime.py'
default_scope = 'mmdet'
visualizer = dict(
    type='DetLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')], name='visualizer')
default_hooks = dict(
    checkpoint=dict(interval=1, max_keep_ckpts=3, save_best='coco/bbox_mAP'),
    visualization=dict(type='DetVisualizationHook'))
log_processor = dict(by_epoch=True)
tta_model = dict(
    type='DetTTAModel',
    tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))
