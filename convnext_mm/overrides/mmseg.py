"""Ours instead of mmseg's LearningRateDecayOptimizerConstructor, which must be there first."""
import mmseg.engine.optimizers  # noqa: F401
from mmseg.registry import OPTIM_WRAPPER_CONSTRUCTORS

from ..layer_decay import LearningRateDecayOptimizerConstructor

OPTIM_WRAPPER_CONSTRUCTORS.register_module(
    module=LearningRateDecayOptimizerConstructor, force=True)
