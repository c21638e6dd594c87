# Single-scale test with a sliding window, as in the recipe itself.
_base_ = './upernet_convnext_base_512_160k_ade20k.py'
