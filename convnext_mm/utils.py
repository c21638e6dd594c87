"""Small helpers that several modules share. Those that import it may do without PyTorch."""
from __future__ import annotations

import difflib
import os
import platform
import re
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress
    from torch import Tensor, nn

LARGE_PICTURE = 2**24
"""Pixels above which a picture is processed piece by piece where that is possible."""


def suggest(name: object, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> str:
    """A question that ends an error message: ' Did you mean A or B?', or '' if nothing is close.

    Args:
        name: What the user wrote.
        known: The names that exist.
        count: How many to suggest at most.
        cutoff: Similarity from 0 to 1 that a suggestion needs.
    """
    known = list(known)
    close = [one for one in known if one.lower() == str(name).lower()][:count] or (
        difflib.get_close_matches(str(name), known, n=count, cutoff=cutoff))
    return f' Did you mean {" or ".join(close)}?' if close else ''


def describe(error: BaseException) -> str:
    """The type and first line of an error; of one without a message, the line that raised it."""
    text = str(error).strip().partition('\n')[0]
    frames = traceback.extract_tb(error.__traceback__)
    if not text and frames:
        text = f'{frames[-1].line} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})'
    return f'{type(error).__name__}: {text}'


def processor_has(*instructions: str) -> bool:
    """Whether the processor has any of some instructions, such as 'amx_int8'."""
    flags = _processor_info().split()
    return any(name in flags for name in instructions)


def processor_name() -> str:
    """The name of the processor."""
    found = re.search(r'model name\s*: (.*)', _processor_info())
    return found[1] if found else platform.processor() or platform.machine()


def _processor_info() -> str:
    """What Linux says of the processor; elsewhere nothing."""
    try:
        return Path('/proc/cpuinfo').read_text(encoding='utf-8')
    except OSError:
        return ''


def require_package(module: str, package: str, what: str) -> None:
    """Check that an optional package is installed.

    Args:
        module: The name that is imported.
        package: The names that pip installs.
        what: The setting that needs it.

    Raises:
        UserError: It is not.
    """
    if not find_spec(module):
        raise UserError(f'{what} needs the package {module}, which is not installed: '
                        f'pip install {package}')


def is_first_process() -> bool:
    """Whether this process has rank 0 and so prints and writes files; needs no process group.

    torchrun, Slurm and MPI each tell the rank in a variable of their own; mmengine sets the first
    one later.
    """
    names = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')
    return next((os.environ[name] for name in names if name in os.environ), '0') == '0'


def has_several_processes() -> bool:
    """Whether a launcher has started several processes for this run."""
    return int(os.environ.get('WORLD_SIZE', 1)) > 1


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers such as DistributedDataParallel."""
    from torch import nn

    while isinstance(inner := getattr(model, 'module', None), nn.Module):
        model = inner
    return model


def plain(value: Any) -> Any:
    """A config's value with plain dicts, and lists for tuples, which its text may change."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def track_rows(rows: Iterable[tuple[slice, Tensor]], total: int,
               progress: Progress | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a large picture's class map, with progress and the time left.

    Args:
        rows: Which rows, and their classes, from the top.
        total: Number of rows of the picture.
        progress: Gets a line; None: one of its own.
    """
    from rich.progress import Progress

    # Rows come in bursts, one for each row of windows.
    bar = progress or Progress(speed_estimate_period=600)
    with nullcontext() if progress else bar:
        task = bar.add_task('Rows of the picture', total=total)
        for block, classes in rows:
            yield block, classes
            bar.update(task, completed=block.stop)
        bar.remove_task(task)


def writable_folder(path: str | Path) -> Path:
    """Create a folder, and check that files can be written to it.

    Raises:
        UserError: They cannot.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise UserError(f'cannot write to the folder {folder.absolute()}: {error.strerror}. Name '
                        'another one') from error


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that replaces it on success and is removed on an error.

    Readers see the old file or the new one, never a partial one. The suffix stays the same, since
    some writers choose the format by it. The caller may move the temporary file elsewhere.
    """
    path = Path(path)
    part = path.with_name(f'.{path.stem}_part{path.suffix}')
    try:
        yield part
        if part.exists():
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
