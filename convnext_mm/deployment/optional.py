"""Packages that only exports need."""
from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ..errors import UserError


def require(name: str, *others: str, extra: str = 'export') -> Any:
    """Import an optional package.

    Args:
        name: What to import and return.
        others: Packages that it is used with.
        extra: The extra of this package that installs them.

    Raises:
        UserError: Some of them are not installed.
    """
    check_installed(name, *others, extra=extra)
    return import_module(name)


def check_installed(*names: str, extra: str) -> None:
    """Check that optional packages are installed, without importing them.

    Raises:
        UserError: Some are not.
    """
    missing = [one for one in names if find_spec(one.partition('.')[0]) is None]
    if missing:
        raise UserError(f'{" and ".join(missing)} must be installed for this: '
                        f"pip install 'convnext-mm[{extra}]'")
