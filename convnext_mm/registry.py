"""The scope ``convnext_mm`` of mmengine's registries: variants of classes that toolboxes have.

``type='convnext_mm.UPerHead'`` in a config builds ours, ``type='UPerHead'`` mmseg's. mmengine
imports this module when it meets the scope, and the locations on the first lookup.
"""
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='convnext_mm',
                  locations=['convnext_mm.segmentation'])
