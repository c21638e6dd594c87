"""ConvNeXt for OpenMMLab: importing this package registers it with mmengine, mmseg and mmdet."""
from .backbone import ConvNeXt
from .errors import UserError
from .optimizer_constructor import LearningRateDecayOptimizerConstructor
from .patches import apply
from .registration import register

__version__ = '0.2.0'
__all__ = ['ConvNeXt', 'LearningRateDecayOptimizerConstructor', 'UserError', '__version__']

register()
apply()
