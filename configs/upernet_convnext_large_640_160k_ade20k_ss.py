# One scale, sliding window: the recipe as it stands.
_base_ = './upernet_convnext_large_640_160k_ade20k.py'
