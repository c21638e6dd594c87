"""Imports the modules with a user's own parts, so that their types are known."""
from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..resolution.mmpretrain import PACKAGES, imports_of
from ..utils import describe
from .parsing import OldConfig

REPLACED_PACKAGES = (*PACKAGES, 'mmcv_custom')
"""Packages of old configs for which this one stands; ``mmcv_custom`` is of the authors."""

PORT_HINT = ('Code for mmcv 1.x has to be ported once: BaseModule is in mmengine.model, '
             'load_checkpoint in mmengine.runner, and a backbone or head is registered with '
             'MODELS of mmseg.registry or mmdet.registry, an optimizer constructor with '
             'OPTIM_WRAPPER_CONSTRUCTORS of mmengine.registry')


def import_own_parts(old: OldConfig, imports: Sequence[str], trust: bool) -> OldConfig:
    """Import the modules that a trusted old config and the user name.

    Modules are found as Python finds them, in the working directory and beside the old config.

    Args:
        old: The old config.
        imports: Names of modules, or ``.py`` files.
        trust: Whether code may be executed.

    Returns:
        The old config with ``imports`` in its ``custom_imports``.

    Raises:
        UserError: A module cannot be imported, or ``imports`` are given without ``trust``.
    """
    if imports and not trust:
        raise UserError(f'--import {imports[0]} executes that module: add --trust if you trust it')
    given = old.values.get('custom_imports') or {}
    names = imports_of(old.values)
    for name in imports:
        if name.endswith('.py') and not Path(name).is_file():
            raise UserError(f'--import {name}: there is no such file')
        names += [Path(name).stem if name.endswith('.py') else name]
    if not trust:
        return old
    folders = [str(Path(name).resolve().parent) for name in imports if name.endswith('.py')]
    with _search([*folders, os.getcwd(), str(old.path.parent)]):
        for name in names:
            if name.partition('.')[0] in REPLACED_PACKAGES and name not in imports:
                continue
            try:
                importlib.import_module(name)
            except Exception as error:  # a module can raise anything
                if given.get('allow_failed_imports') and name not in imports:
                    continue
                raise UserError(f'{old.path}: the module {name} cannot be imported '
                                f'({describe(error)}). {PORT_HINT}') from error
    values = dict(old.values)
    if imports:
        values['custom_imports'] = dict(given, imports=names)
    return old._replace(values=values)


@contextmanager
def _search(folders: Sequence[str]) -> Iterator[None]:
    """Let Python look for modules in more folders, after its own."""
    before = list(sys.path)
    sys.path += folders
    try:
        yield
    finally:
        sys.path[:] = before
