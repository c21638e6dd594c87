"""Registers the package's classes under the names that configs use."""
from __future__ import annotations

from mmengine.registry import (
    HOOKS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    OPTIM_WRAPPERS,
    PARAM_SCHEDULERS,
    RUNNERS,
)

from .backbone import ConvNeXt
from .checkpoints.hook import FitCheckpointHook
from .engine.fallbacks import CPUAmpOptimWrapper
from .engine.hooks import AbsentClassesHook, CurvesHook, PredictionsHook, ResultsHook
from .engine.runner import ConvNeXtRunner
from .engine.schedulers import PolicyLR
from .engine.speed import SpeedHook
from .optimizer_constructor import LearningRateDecayOptimizerConstructor
from .precision import model_in_dtype
from .preprocessing import multi_band_preprocessor
from .runs.guards import FiniteLossHook
from .runs.saving import SafeCheckpointHook


def register() -> None:
    """Register all classes with mmengine, whose registries are parents of the toolboxes'.

    Every scope without a class of the same name finds them there.
    """
    for registry, classes in (
            (MODELS, (ConvNeXt,)), (RUNNERS, (ConvNeXtRunner,)), (PARAM_SCHEDULERS, (PolicyLR,)),
            (HOOKS, (FitCheckpointHook, CurvesHook, PredictionsHook, ResultsHook,
                     AbsentClassesHook, SpeedHook, SafeCheckpointHook, FiniteLossHook)),
            (OPTIM_WRAPPERS, (CPUAmpOptimWrapper,)),
            (OPTIM_WRAPPER_CONSTRUCTORS, (LearningRateDecayOptimizerConstructor,))):
        for cls in classes:
            registry.register_module(module=cls, force=True)
    MODELS.register_module('MultiBandPreprocessor', module=multi_band_preprocessor, force=True)
    MODELS.register_module('ModelInDtype', module=model_in_dtype, force=True)
