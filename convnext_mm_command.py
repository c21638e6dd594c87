"""The start of the command ``convnext-mm`` and of the scripts in ``tools/``.

Importing convnext_mm registers its classes with mmengine, and so imports PyTorch and mmengine,
which takes seconds: too long for a help text, or for the message that a file does not exist. This
module is beside the package, not in it, because Python runs a package's ``__init__`` before any of
its modules. Here, the modules come first: :func:`convnext_mm.cli.register` runs the ``__init__``
when a command needs what it registers.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec, module_from_spec


def main(command: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Run a command; see :func:`convnext_mm.cli.main`."""
    put_off_registration()
    from convnext_mm import cli
    cli.main(command, argv)


def run(action: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Call a function of the parsed arguments; see :func:`convnext_mm.cli.run`."""
    put_off_registration()
    from convnext_mm import cli
    cli.run(action, args)


def put_off_registration() -> None:
    """Let the modules of convnext_mm be imported without running its ``__init__``.

    Nothing changes if it has been imported before.
    """
    spec = find_spec('convnext_mm')
    if spec is not None and 'convnext_mm' not in sys.modules:
        sys.modules['convnext_mm'] = module_from_spec(spec)
