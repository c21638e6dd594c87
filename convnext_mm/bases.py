"""The configs that a config file inherits."""
from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.config import Config

from .errors import UserError
from .inputs import config_folder
from .utils import suggest

PACKAGES = ('mmseg', 'mmdet', 'convnext_mm')
"""Packages whose configs a file may inherit, as in ``_base_ = 'mmseg::NAME'``."""

_disabled: list[bool] = []


def completion_enabled() -> bool:
    """Whether config files are completed when read: not inside :func:`without_completion`."""
    return not _disabled


@contextmanager
def without_completion() -> Iterator[None]:
    """Config files read inside this context are not completed."""
    _disabled.append(True)
    try:
        yield
    finally:
        _disabled.pop()


def inherited_configs(path: str | None) -> Iterator[Config]:
    """The configs that a config file inherits, nearest first, each with all that it inherits."""
    if not path or not os.path.isfile(path):
        return
    for base in Config._get_base_files(path):
        file = find_base(base, path)
        with without_completion():
            yield Config.fromfile(file, import_custom_modules=False)
        yield from inherited_configs(file)


def find_base(base: str, path: str) -> str:
    """The file of a ``_base_``, as written in the config file ``path``.

    Raises:
        UserError: 'PACKAGE::NAME' is no config of an installed package.
    """
    package, separator, name = base.partition('::')
    if not separator:
        return os.path.join(os.path.dirname(path), base)
    if package not in PACKAGES:
        return Config._get_cfg_path(base, path)[0]
    folder = config_folder(package)
    if folder is None:
        raise UserError(f'{path}: _base_={base!r}, but {package} is not installed, or without its '
                        'configs: python3 tools/install.py')
    name = name if re.search(r'\.(py|json|ya?ml)$', name) else f'{name}.py'
    file = folder / name
    if not file.is_file():
        known = {str(f.relative_to(folder)) for f in folder.rglob('*.py')}
        raise UserError(f'{path}: _base_={base!r}, but {package} has no config {name}.'
                        + suggest(name, known, count=2))
    return str(file)
