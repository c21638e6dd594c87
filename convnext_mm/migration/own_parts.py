"""Imports the modules with a user's own parts, so that their types are known."""
from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError
from ..resolution.mmpretrain import PACKAGES, imports_of
from ..utils import describe
from .moved_names import OLD_PACKAGES, find_changes
from .parsing import OldConfig

REPLACED_PACKAGES = (*PACKAGES, 'mmcv_custom')
"""Packages of old configs for which this one stands; ``mmcv_custom`` is of the authors."""

PACKAGE = Path(__file__).resolve().parents[1]
PORT_HINT = ('Code for mmcv 1.x has to be ported once: BaseModule is in mmengine.model, '
             'load_checkpoint in mmengine.runner, and a backbone or head is registered with '
             'MODELS of mmseg.registry or mmdet.registry, an optimizer constructor with '
             'OPTIM_WRAPPER_CONSTRUCTORS of mmengine.registry')


def import_own_parts(old: OldConfig, imports: Sequence[str], trust: bool,
                     scope: str) -> OldConfig:
    """Import the modules that a trusted old config and the user name.

    Modules are found as Python finds them, in the working directory and beside the old config.

    Args:
        old: The old config.
        imports: Names of modules, or ``.py`` files.
        trust: Whether code may be executed.
        scope: 'mmseg' or 'mmdet': the toolbox of the config, for advice on the modules.

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
                                f'({describe(error)}). {_advice(error, scope)}') from error
    values = dict(old.values)
    if imports:
        values['custom_imports'] = dict(given, imports=names)
    return old._replace(values=values)


def _advice(error: Exception, scope: str) -> str:
    """What to do about an error while a module was imported: its lines, with what replaces them."""
    missing = (error.name or '') if isinstance(error, ModuleNotFoundError) else ''
    if missing and missing.partition('.')[0] not in OLD_PACKAGES:
        return (f'Install {missing.partition(".")[0]}, or start the command in the folder from '
                f'which {missing} is imported')
    if 'is already registered' in str(error):
        return ('Write register_module(force=True) there if yours is meant, or give it another '
                'name, in the old config too')
    found = {path: changes for path in _own_files(error) if (changes := find_changes(path, scope))}
    if any('mmcv_custom' in change.old and 'mmcv_custom' not in change.new
           for changes in found.values() for change in changes):  # then nothing imports it
        found = {path: changes for path, changes in found.items()
                 if 'mmcv_custom' not in path.parts}
    if not found:
        return PORT_HINT
    return 'It is for mmcv 1.x. Change these lines, and convert again:\n' + '\n'.join(
        '\n'.join([f'{path}:', *map(str, changes)]) for path, changes in found.items())


def _own_files(error: Exception) -> list[Path]:
    """The user's files in the traceback of an error, the outermost first."""
    library = Path(os.__file__).parent
    files: list[Path] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        if path.is_file() and path not in files and 'site-packages' not in path.parts and not (
                path.is_relative_to(library) or path.is_relative_to(PACKAGE)):
            files.append(path)
    return files


@contextmanager
def _search(folders: Sequence[str]) -> Iterator[None]:
    """Let Python look for modules in more folders, after its own."""
    before = list(sys.path)
    sys.path += folders
    try:
        yield
    finally:
        sys.path[:] = before
