"""The scope ``convnext_mm`` of mmengine's registries: variants of classes that toolboxes have.

``type='convnext_mm.UPerHead'`` in a config builds ours, ``type='UPerHead'`` mmseg's. mmengine
imports this module when it meets the scope.
"""
from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import DefaultScope, Registry

ROOMS = dict(mmseg='convnext_mm.segmentation', mmdet='convnext_mm.detection')
"""The variants of each toolbox's classes."""


class VariantRegistry(Registry):
    """A registry that imports the variants of the toolbox in use, which imports the toolbox."""

    def import_from_location(self) -> None:
        """Import the room of the default scope; without one, of all installed toolboxes."""
        current = DefaultScope.get_current_instance()
        scope = None if current is None else current.scope_name
        for toolbox, room in ROOMS.items():
            if toolbox == scope or (scope not in ROOMS and find_spec(toolbox)):
                import_module(room)


MODELS = VariantRegistry('model', parent=MMENGINE_MODELS, scope='convnext_mm')
DATASETS = VariantRegistry('dataset', parent=MMENGINE_DATASETS, scope='convnext_mm')
METRICS = VariantRegistry('metric', parent=MMENGINE_METRICS, scope='convnext_mm')
