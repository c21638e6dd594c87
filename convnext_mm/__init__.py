"""ConvNeXt for OpenMMLab: importing this package registers it with mmengine, mmseg and mmdet."""
from typing import TYPE_CHECKING, Any

from .backbone import ConvNeXt
from .errors import UserError
from .optimizer_constructor import LearningRateDecayOptimizerConstructor
from .patches import apply
from .registration import register

if TYPE_CHECKING:
    from .api import check, evaluate, load, train

__version__ = '0.2.0'
__all__ = ['ConvNeXt', 'LearningRateDecayOptimizerConstructor', 'UserError', '__version__',
           'check', 'evaluate', 'load', 'train']

register()
apply()


def __getattr__(name: str) -> Any:
    """The functions of :mod:`convnext_mm.api`, imported on their first use: configs need none."""
    if name in ('check', 'evaluate', 'load', 'train'):
        from . import api
        return getattr(api, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
