"""The module that stands in for mmcv's compiled extension, mmcv._ext.

mmcv's Python files load their operators from the module of that name, and stay as they are.
"""
from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from typing import Any

from mmengine.logging import print_log

from ..errors import UserError
from ..utils import is_first_process
from . import boxes, losses, roi, sampling, torchvision

NAME = 'mmcv._ext'
COMPILE = ("python3 tools/install.py --ops compiled in a clone, or see 'Operators' in "
           'docs/install.md')


def build() -> types.ModuleType:
    """Return a module with our operators; any other operator raises an error when it is called."""
    module = types.ModuleType(NAME, __doc__)
    for source in (boxes, losses, roi, sampling):
        module.__dict__.update({
            name: item for name, item in vars(source).items()
            if isinstance(item, types.FunctionType) and item.__module__ == source.__name__
            and not name.startswith('_')})
    module.__dict__.update(get_compiler_version=lambda: 'not compiled',
                           get_compiling_cuda_version=lambda: 'not available')

    def missing(name: str) -> Callable[..., Any]:
        if name.startswith('__'):
            raise AttributeError(name)

        def operator(*args: Any, **kwargs: Any) -> Any:
            raise UserError(f"mmcv's operator {name} exists only compiled, and the installed mmcv "
                            f'has no compiled operators. To compile them: {COMPILE}')
        operator.__name__ = name
        return operator
    module.__dict__['__getattr__'] = missing
    return module


class ExtensionFinder(MetaPathFinder):
    """Finds mmcv's compiled extension, else ours."""

    def find_spec(self, fullname: str, path: Sequence[str] | None,
                  target: types.ModuleType | None = None) -> ModuleSpec | None:
        if fullname != NAME:
            return None
        compiled = PathFinder.find_spec(fullname, path)
        return ModuleSpec(fullname, ExtensionLoader(compiled),
                          origin=compiled.origin if compiled else __file__)


def find_when_missing(path: Sequence[str] | None) -> ModuleSpec | None:
    """Find ours for a process that imported mmcv's operators before convnext_mm.

    Called by the finder in convnext_mm_operators.pth, after all others have found nothing. The
    import of this module has applied the patches; with that of the operators switched off, there is
    no finder of ours.
    """
    return next((finder.find_spec(NAME, path) for finder in sys.meta_path
                 if isinstance(finder, ExtensionFinder)), None)


class ExtensionLoader(Loader):
    """Loads mmcv's compiled extension, or ours if it is missing or does not fit this PyTorch.

    Args:
        compiled: Where the compiled one is, if there is one.
    """

    def __init__(self, compiled: ModuleSpec | None) -> None:
        self.compiled = compiled

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        reason = 'has no compiled operators'
        if self.compiled and self.compiled.loader:
            try:
                module = module_from_spec(self.compiled)
                self.compiled.loader.exec_module(module)
            except ImportError as error:  # compiled for another PyTorch
                reason = f'has compiled operators that cannot be loaded ({error})'
            else:
                _log("mmcv's compiled operators are used")
                return module
        found = torchvision.version()
        extra = f", on a GPU torchvision {found}'s" if found else ''
        _log(f"mmcv {reason}: convnext_mm's in PyTorch are used{extra}")
        return build()

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _log(message: str) -> None:
    if is_first_process():
        print_log(message, logger='current')
