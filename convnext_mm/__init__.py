"""ConvNeXt for OpenMMLab: importing this package registers it with mmengine, mmseg and mmdet."""
from .backbone import ConvNeXt
from .errors import UserError
from .layer_decay import LearningRateDecayOptimizerConstructor
from .registration import register

__version__ = '0.1.0'
__all__ = ['ConvNeXt', 'LearningRateDecayOptimizerConstructor', 'UserError', '__version__']

register()
