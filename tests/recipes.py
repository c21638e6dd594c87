"""The nineteen recipes with their published settings."""

CASCADE = ('cascade_mask_rcnn_convnext_{}_patch4_window7_mstrain_480-800_giou_4conv1f_adamw_3x_'
           'coco_in')
MASK = 'mask_rcnn_convnext_tiny_patch4_window7_mstrain_480-800_adamw_3x_coco_in1k'
# name: size, weights, lr, drop path, decay, layers, mixed precision, millions of parameters,
# published FLOPs in billions
SEGMENTORS = {
    'upernet_convnext_tiny_512': ('tiny', '1k', 1e-4, 0.4, 0.9, 6, True, 60.24, 939),
    'upernet_convnext_small_512': ('small', '1k', 1e-4, 0.3, 0.9, 12, True, 81.88, 1027),
    'upernet_convnext_base_512': ('base', '1k', 1e-4, 0.4, 0.9, 12, True, 122.10, 1170),
    'upernet_convnext_base_640': ('base', '22k', 1e-4, 0.4, 0.9, 12, True, 122.10, 1828),
    'upernet_convnext_large_640': ('large', '22k', 1e-4, 0.4, 0.9, 12, False, 234.99, 2458),
    'upernet_convnext_xlarge_640': ('xlarge', '22k', 8e-5, 0.4, 0.9, 12, False, 391.14, 3335)}
DETECTORS = {
    MASK: ('tiny', '1k', 1e-4, 0.4, 0.95, 6, True, 48.10, 262),  # published: 48
    CASCADE.format('tiny') + '1k': ('tiny', '1k', 2e-4, 0.4, 0.7, 6, True, 85.93, 741),
    CASCADE.format('small') + '1k': ('small', '1k', 2e-4, 0.6, 0.7, 12, True, 107.57, 827),
    CASCADE.format('base') + '1k': ('base', '1k', 2e-4, 0.7, 0.8, 12, True, 145.80, 964),
    CASCADE.format('base') + '22k': ('base', '22k', 1e-4, 0.6, 0.8, 12, True, 145.80, 964),
    CASCADE.format('large') + '22k': ('large', '22k', 1e-4, 0.7, 0.7, 12, False, 254.71, 1354),
    CASCADE.format('xlarge') + '22k': ('xlarge', '22k', 1e-4, 0.8, 0.7, 12, False, 406.88, 1898)}
RECIPES = {
    **{f'{name}_160k_ade20k{test}': row for name, row in SEGMENTORS.items()
       for test in ('', '_ss', '_ms')}, **DETECTORS}
BOXES = {
    'cascade_rcnn_convnext_tiny_patch4_window7_mstrain_480-800_giou_4conv1f_adamw_3x_coco_in1k':
        CASCADE.format('tiny') + '1k',
    'faster_rcnn_convnext_tiny_patch4_window7_mstrain_480-800_adamw_3x_coco_in1k': MASK}
"""Recipes without masks, and the recipes that they are of."""
