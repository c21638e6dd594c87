_base_ = './cascade_mask_rcnn_convnext_fpn.py'
model = dict(backbone=dict(arch='v2_tiny', layer_scale_init_value=0.0))
