_base_ = './upernet_convnext.py'
model = dict(backbone=dict(arch='v2_tiny', layer_scale_init_value=0.0))
