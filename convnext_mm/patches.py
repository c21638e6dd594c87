"""All changes to other packages that importing convnext_mm makes, and their switch.

``CONVNEXT_MM_PATCHES`` in the environment names the patches to apply, separated by commas;
``none`` applies none. Without it all are applied:

- ``checkpoints``: mmengine reads checkpoint files without executing what they contain.
- ``bases``: ``_base_ = 'convnext_mm::NAME'`` and 'mmseg::NAME' name a recipe.
- ``config``: a config that imports this package is completed when mmengine reads it.
- ``constructors``: in mmseg and mmdet, LearningRateDecayOptimizerConstructor is ours.
- ``operators``: where mmcv has no compiled operators, it uses ours.
"""
from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.runner import CheckpointLoader

from .bases import PACKAGES, completion_enabled, find_base
from .checkpoints.files import call_weights_only, read_checkpoint
from .engine.speed import apply_fast
from .errors import UserError
from .ops import ExtensionFinder
from .optimizer_constructor import LearningRateDecayOptimizerConstructor
from .resolution import resolve
from .utils import suggest

SWITCH = 'CONVNEXT_MM_PATCHES'
TOOLBOXES = ('mmseg', 'mmdet')


def apply() -> None:
    """Apply the patches that :data:`SWITCH` names; applying them again changes nothing.

    Raises:
        UserError: An unknown patch.
    """
    names = os.environ.get(SWITCH)
    chosen = list(PATCHES) if names is None else [
        name.strip() for name in names.split(',') if name.strip() not in ('', 'none')]
    for name in chosen:
        if name not in PATCHES:
            raise UserError(f'{SWITCH}={names}: unknown patch {name!r}.{suggest(name, PATCHES)} '
                            f'Expected some of {", ".join(PATCHES)}, separated by commas, or none')
        PATCHES[name]()


def read_checkpoints_safely() -> None:
    """Let mmengine (``load_from``, ``resume``, ``init_cfg``) read files with our reader.

    Why: mmengine falls back to unpickling, which runs any code in a file. Affects everything that
    mmengine's CheckpointLoader reads. Its loaders for other places, such as s3:// and
    open-mmlab://, remain, but read only weights. Without the patch, mmengine reads files in its own
    way, and only ConvNeXt's ``init_cfg`` accepts .safetensors files and other namings.
    """
    def restrict(loader: Callable, ours: bool) -> Callable:
        @functools.wraps(loader)  # mmengine logs its name
        def load(filename: str, map_location: Any = None, **kwargs: Any) -> Any:
            if ours:
                return read_checkpoint(filename, map_location, **kwargs)
            return call_weights_only(loader, filename, map_location=map_location, **kwargs)
        load.reads_only_weights = True  # type: ignore[attr-defined]
        return load

    for scheme, loader in list(CheckpointLoader._schemes.items()):
        if not hasattr(loader, 'reads_only_weights'):
            ours = scheme in ('', 'http://', 'https://')
            CheckpointLoader.register_scheme(scheme, restrict(loader, ours), force=True)


def find_bases() -> None:
    """Let a config inherit a recipe of an installed package by its name.

    Why: mmengine knows the packages of OpenMMLab by the names of their distributions, and so
    neither ours nor the fork of mmseg. Affects ``_base_`` with '::' and one of
    :data:`convnext_mm.bases.PACKAGES`. Without the patch, recipes are inherited by their paths.
    """
    if hasattr(Config._get_cfg_path, 'finds'):
        return
    original = Config._get_cfg_path

    def find(cfg_path: str, filename: str) -> tuple[str, str | None]:
        package, separator, _ = cfg_path.partition('::')
        if separator and package in PACKAGES:
            # Types of ours are found from every scope.
            return find_base(cfg_path, filename), None if package == 'convnext_mm' else package
        return original(cfg_path, filename)
    find.finds = True  # type: ignore[attr-defined]
    Config._get_cfg_path = staticmethod(find)


def complete_configs() -> None:
    """Let mmengine complete config files that import this package, when it reads them.

    Why: the inferencers of mmseg and mmdet build a model from the path of a config; a recipe with
    custom ``classes`` would get heads of the recipe's size. Affects only configs with
    ``convnext_mm`` in ``custom_imports``. Without the patch, training and testing still complete
    configs (:class:`convnext_mm.engine.runner.ConvNeXtRunner`); inferencers do not.
    """
    if hasattr(Config.__init__, 'completes'):
        return
    original = Config.__init__

    @functools.wraps(original)
    def completing(self: Config, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        imports = (self.get('custom_imports') or {}).get('imports') or ()
        if completion_enabled() and self.filename and 'convnext_mm' in imports:
            resolve(self)
            apply_fast(self)
    completing.completes = True  # type: ignore[attr-defined]
    Config.__init__ = completing


def override_constructors() -> None:
    """Replace mmseg's and mmdet's LearningRateDecayOptimizerConstructor with ours.

    Why: theirs support neither V2 nor ``'auto'``, and reject some models. Affects configs with that
    name in the scopes of mmseg and mmdet. Without the patch, ``_scope_='mmengine'`` beside the name
    selects ours.
    """
    for toolbox in TOOLBOXES:
        if not find_spec(toolbox):
            continue
        try:
            registry = import_module(f'{toolbox}.registry').OPTIM_WRAPPER_CONSTRUCTORS
        except Exception as error:  # such as a toolbox's assertion on the version of mmcv
            warnings.warn(f'convnext_mm: {toolbox} is installed but cannot be imported: {error}',
                          stacklevel=2)
            continue
        if registry._imported or f'{toolbox}.engine.optimizers' in sys.modules:
            _register(registry)
        _register_after_import(registry)


def _register(registry: Registry) -> None:
    registry.register_module(module=LearningRateDecayOptimizerConstructor, force=True)


def _register_after_import(registry: Registry) -> None:
    """Register ours after the toolbox has registered its own, on the first lookup of a name.

    This avoids importing a toolbox, which takes seconds, before it is used.
    """
    if hasattr(registry.import_from_location, 'overrides'):
        return
    import_all = registry.import_from_location

    def import_from_location() -> None:
        imported = registry._imported
        import_all()
        if not imported:
            _register(registry)
    import_from_location.overrides = True  # type: ignore[attr-defined]
    registry.import_from_location = import_from_location


def replace_missing_operators() -> None:
    """Let Python find our operators under the name of mmcv's compiled extension, mmcv._ext.

    Why: mmdet, and OpenMMLab's mmseg, cannot be imported without it, and it must be compiled for
    each PyTorch, CUDA and Python. A compiled extension that can be loaded is used as without the
    patch. Nothing is imported until mmcv asks for its operators; one log line then says which ones
    it got. Without the patch, mmdet needs compiled operators.
    """
    if not any(isinstance(finder, ExtensionFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ExtensionFinder())


PATCHES: dict[str, Callable[[], None]] = {
    'checkpoints': read_checkpoints_safely, 'bases': find_bases, 'config': complete_configs,
    'constructors': override_constructors, 'operators': replace_missing_operators}
