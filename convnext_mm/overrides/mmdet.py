"""Ours instead of mmdet's LearningRateDecayOptimizerConstructor, which must be there first."""
import mmdet.engine.optimizers  # noqa: F401
from mmdet.registry import OPTIM_WRAPPER_CONSTRUCTORS

from ..layer_decay import LearningRateDecayOptimizerConstructor

OPTIM_WRAPPER_CONSTRUCTORS.register_module(
    module=LearningRateDecayOptimizerConstructor, force=True)
