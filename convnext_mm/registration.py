"""Puts the package's classes where configs of mmengine, mmseg and mmdet find them by plain name."""
from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.util import find_spec

from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, PARAM_SCHEDULERS

from .backbone import ConvNeXt
from .checkpoints.fitting import FitCheckpointHook
from .checkpoints.reading import use_safe_reader
from .datasets import complete, complete_when_read
from .layer_decay import LearningRateDecayOptimizerConstructor
from .migration.schedule import PolicyLR
from .training.pictures import CurvesHook, PredictionsHook
from .training.speed import SpeedHook, expand

TOOLBOXES = ('mmseg', 'mmdet')


def register() -> None:
    """Register everything; toolboxes that are not installed are passed over."""
    # mmengine's registries are the parents of the toolboxes': what stands there is found
    # from every scope that has no class of that name itself.
    MODELS.register_module(module=ConvNeXt, force=True)
    for hook in (FitCheckpointHook, CurvesHook, PredictionsHook, SpeedHook):
        HOOKS.register_module(module=hook, force=True)
    PARAM_SCHEDULERS.register_module(module=PolicyLR, force=True)
    OPTIM_WRAPPER_CONSTRUCTORS.register_module(
        module=LearningRateDecayOptimizerConstructor, force=True)
    for toolbox in TOOLBOXES:
        if find_spec(toolbox):
            _override_constructor(toolbox)
    use_safe_reader()
    complete_when_read(complete, expand)


def _override_constructor(toolbox: str) -> None:
    """Replace the toolbox's own constructor of the same name by ours.

    A toolbox registers its classes when they are first looked up. Ours joins that list
    behind them, so that neither toolbox is imported (seconds, and compiled ops for mmdet)
    before it is used.
    """
    try:
        registry = import_module(f'{toolbox}.registry').OPTIM_WRAPPER_CONSTRUCTORS
    except Exception as error:  # such as a toolbox's assertion on the version of mmcv
        warnings.warn(f'convnext_mm: {toolbox} is installed but cannot be imported: {error}',
                      stacklevel=2)
        return
    override = f'convnext_mm.overrides.{toolbox}'
    if registry._imported or f'{toolbox}.engine.optimizers' in sys.modules:
        import_module(override)
    elif override not in registry._locations:
        registry._locations = [*registry._locations, override]
