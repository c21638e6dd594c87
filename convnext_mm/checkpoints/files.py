"""Find checkpoint files, download them once, and read them without running code in them."""
from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlparse

import numpy as np
import torch
from filelock import FileLock
from mmengine.logging import HistoryBuffer, print_log
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError
from ..inputs import INDEX_SUFFIX, find_local_checkpoint, is_url

WEIGHTS_KEYS = ('state_dict', 'model', 'model_state_dict', 'net', 'network', 'module', 'weights',
                'teacher', 'student', 'backbone', 'state_dict_ema', 'model_ema', 'ema_state_dict',
                'ema')
"""Keys under which training code stores the weights, the first of them that a file has."""
TRUST_VARIABLE = 'CONVNEXT_MM_TRUST'
"""Environment variable with the files (separated by ':') that are allowed to run code."""


def locate_checkpoint(source: str) -> Path:
    """Return the local file of a path or URL; download a URL once, to torch hub's cache.

    One process per node downloads while the others wait. A hash in the file name, as in OpenMMLab's
    files, is verified. With an index, all files that it names are located.

    Raises:
        UserError: The file does not exist or cannot be downloaded.
    """
    path = _locate_file(source)
    if path.name.endswith(INDEX_SUFFIX):
        _locate_shards(source, path)
    return path


def _locate_file(source: str) -> Path:
    """See :func:`locate_checkpoint`."""
    if not is_url(source):
        return find_local_checkpoint(source)
    path = Path(torch.hub.get_dir(), 'checkpoints', _cache_file_name(source))
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f'{path}.lock'):
            if not path.is_file():
                print_log(f'Downloading {source} to {path}', logger='current')
                digest = re.search(r'-([0-9a-f]{8,})\.\w+$', path.name)
                torch.hub.download_url_to_file(source, str(path), digest and digest[1])
    except (OSError, RuntimeError) as error:  # RuntimeError: the hash differs
        raise UserError(f'Cannot download {source} ({error}).\n'
                        f'Download it on a machine with network access and put it at {path}.'
                        ) from error
    return path


def _locate_shards(source: str, path: Path) -> dict[str, tuple[Path, list[str]]]:
    """The files that an index names, and the parameters that each should have.

    Raises:
        UserError: The index is damaged, or a file does not exist or cannot be downloaded.
    """
    try:
        places = json.loads(path.read_text(encoding='utf-8'))['weight_map']
        shards: dict[str, list[str]] = {}
        for name, file in places.items():
            shards.setdefault(str(file), []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unusable_error(path, 'is no index of checkpoint files: it has no weight_map'
                              ) from error
    found = {}
    for file, names in shards.items():
        if Path(file).name != file:
            raise _unusable_error(path, f'names {file!r}, which is outside of its folder')
        if is_url(source):
            found[file] = _locate_file(urljoin(source, file)), names
        elif (path.parent / file).is_file():
            found[file] = path.parent / file, names
        else:
            raise UserError(f'Checkpoint not found: {(path.parent / file).absolute()}\n'
                            f'{path.name} names it, as one of {len(shards)} files: put all of '
                            'them in one folder.')
    return found


def _read_shards(source: str, path: Path, map_location: Any, mmap: bool) -> dict[str, Any]:
    """Read all files that an index names as one.

    Raises:
        UserError: One of them cannot be read, or lacks parameters.
    """
    state: dict[str, Tensor] = {}
    for file, names in _locate_shards(source, path).values():
        found = extract_weights(peek_checkpoint(str(file)) if mmap else
                                read_checkpoint(str(file), map_location))
        missing = [name for name in names if name not in found]
        if missing:
            raise _unusable_error(file, f'lacks {len(missing)} parameters that {path.name} says it '
                                  f'has, such as {missing[0]}')
        state.update(found)
    return dict(state_dict=state, meta={})


def _cache_file_name(url: str) -> str:
    """The name of a URL's file in the cache: the last part of the path, as in torch hub.

    Most repositories on the Hugging Face Hub call their weights model.safetensors, so the
    repository name is prepended to those.
    """
    repository, resolve, name = urlparse(url).path.strip('/').partition('/resolve/')
    if resolve:
        return '--'.join([*repository.split('/'), *name.split('/')[1:]])
    return Path(urlparse(url).path).name


def read_checkpoint(source: str, map_location: Any = 'cpu') -> dict[str, Any]:
    """Read a checkpoint without executing anything in it.

    The format (torch.save or safetensors) is detected from the contents, not from the name.
    ``CONVNEXT_MM_TRUST=/path/file.pth`` in the environment allows code in that file to run.

    Args:
        source: Local path or URL.
        map_location: As in :func:`torch.load`; .safetensors files are read to the CPU.

    Raises:
        UserError: The file does not exist, is damaged or not a checkpoint, or contains code.
    """
    check_whole(source)
    return _read(source, map_location)


def peek_checkpoint(source: str) -> dict[str, Any]:
    """Read a checkpoint without its tensors, whose memory is mapped from the file where it can be.

    Raises:
        UserError: See :func:`read_checkpoint`; damage of tensors is not noticed.
    """
    return _read(source, 'cpu', mmap=True)


def check_whole(source: str | Path) -> None:
    """Check a file of torch.save against the checksums (CRC-32) that it has of all its contents.

    Files of PyTorch before 1.6 and .safetensors files have none, and pass.

    Raises:
        UserError: The file is damaged.
    """
    path = locate_checkpoint(str(source))
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises many types, depending on the damage
        raise _unusable_error(path, f'is damaged ({error})') from error
    if damaged is not None:
        raise _unusable_error(path, f'is damaged: {damaged} differs from its checksum')


def _read(source: str, map_location: Any, mmap: bool = False) -> dict[str, Any]:
    """See :func:`read_checkpoint` and :func:`peek_checkpoint`."""
    path = _locate_file(source)
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(source, path, map_location, mmap)
    with open(path, 'rb') as file:
        head = file.read(512)
    mmap = mmap and zipfile.is_zipfile(path)
    problem = _recognize_other_file(path, head)
    if problem:
        raise _unusable_error(path, problem)
    if head[8:9] == b'{':
        content = _read_safetensors(path)
    else:
        trusted = _is_trusted(path)
        if trusted:
            print_log(f'{path.absolute()} is trusted ({TRUST_VARIABLE}): code in it may run',
                      logger='current')
        try:
            with torch.serialization.safe_globals(_allowed_globals()):
                content = torch.load(path, map_location=map_location, weights_only=not trusted,
                                     mmap=mmap)
        except Exception as error:  # torch.load raises many types, depending on the damage
            raise _unusable_error(path, *_explain_failure(path, error, head)) from error
    if not isinstance(content, dict) or not extract_weights(content):
        raise UserError(f'Not a checkpoint: {path.absolute()} contains no weights.\nExpected a '
                        'dictionary of tensors, at the top level or under the key '
                        f'{", ".join(WEIGHTS_KEYS)}.')
    return content


def extract_weights(content: dict[str, Any]) -> dict[str, Tensor]:
    """Return the {parameter name: tensor} part of a checkpoint's contents, at any depth."""
    for key in WEIGHTS_KEYS:
        inner = content.get(key)
        if isinstance(inner, dict) and (found := extract_weights(inner)):
            return found
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def call_weights_only(loader: Callable[..., Any], filename: str, **kwargs: Any) -> Any:
    """Call a checkpoint loader of another package with ``torch.load`` limited to weights.

    Raises:
        UserError: The file contains more than weights.
    """
    try:
        with _forced_weights_only(), torch.serialization.safe_globals(_allowed_globals()):
            return loader(filename, **kwargs)
    except pickle.UnpicklingError as error:
        raise _unusable_error(filename, *_explain_failure(filename, error)) from error


@contextmanager
def _forced_weights_only() -> Iterator[None]:
    """Set PyTorch's environment variable that overrides the argument of torch.load."""
    variable = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
    before = os.environ.get(variable)
    os.environ[variable] = '1'
    try:
        yield
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Read a .safetensors file as mmengine's dictionary, with ``meta`` if we wrote it."""
    try:
        with safe_open(path, framework='pt') as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unusable_error(path, f'is cut off or damaged ({error})') from error
    try:
        meta = json.loads(metadata.get('meta', '{}'))
    except ValueError:  # another program's own "meta"
        meta = {}
    return dict(state_dict=state, meta=meta if isinstance(meta, dict) else {})


def _recognize_other_file(path: Path, head: bytes) -> str:
    """Describe a file that is obviously not a checkpoint; '' if it may be one.

    Args:
        path: The file.
        head: Its first bytes.
    """
    text = head.lstrip().lower()
    if not head:
        return 'is empty'
    if text.startswith((b'<!doctype', b'<html', b'<?xml')):
        return ('is a web page, not weights: the URL led to a page about the file, a login page '
                'or an error page')
    if text.startswith(b'version https://git-lfs'):
        return 'is a Git LFS pointer, not the file itself: download it with git lfs pull'
    if head.startswith(b'PK') and not zipfile.is_zipfile(path):
        return 'is cut off: its end is missing'
    return ''


def _explain_failure(path: Path | str, error: Exception, head: bytes = b'') -> tuple[str, ...]:
    """Explain why a file cannot be read and, if it is not just damaged, what to do about it."""
    text = str(error)
    code = re.search(r'GLOBAL ([\w.]+)|function (\S+)|class ([\w.]+)', text)
    # A pickle with opcodes that torch.save never writes: another program's.
    foreign = head.startswith(b'\x80') and 'Unsupported operand' in text
    if isinstance(error, pickle.UnpicklingError) and (code or foreign):
        name = next(filter(None, code.groups())) if code else 'a Python pickle'
        return (f'contains more than weights ({name}), which is never executed',
                'Loading it could run arbitrary code. If you trust its author, allow this file '
                f'with {TRUST_VARIABLE}={Path(path).absolute()} before the command.')
    if 'TorchScript' in text:
        return ('is a TorchScript program, not a checkpoint',)
    # PyTorch's own message is not shown: it recommends weights_only=False.
    return ('is damaged, or was not written by torch.save',)


def _unusable_error(path: Path | str, problem: str, advice: str = '') -> UserError:
    return UserError(
        f'Not a usable checkpoint: {Path(path).absolute()} {problem}.\n' +
        (advice or 'Expected weights written by torch.save (.pth, .pt) or safetensors. If the file '
                   'was downloaded or copied, delete it and try again.'))


def _is_trusted(path: Path) -> bool:
    """Whether the environment variable names this file."""
    names = [name for name in os.environ.get(TRUST_VARIABLE, '').split(os.pathsep) if name]
    return any(Path(name).expanduser().resolve() == path.resolve() for name in names)


def _history_getattr(owner: Any, name: str) -> Any:
    """``getattr``, limited to what unpickling mmengine's log history needs."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r}) is not allowed')
    return getattr(owner, name)


def _allowed_globals() -> list[Any]:
    """The types other than tensors in checkpoints of mmengine and the authors' code."""
    multiarray = (np._core if hasattr(np, '_core') else np.core).multiarray
    dtypes = {type(np.dtype(kind)) for kind in 'fdilqILQ?'}
    return [HistoryBuffer, (_history_getattr, 'builtins.getattr'), slice, np.ndarray, np.dtype,
            (multiarray._reconstruct, 'numpy._core.multiarray._reconstruct'),
            (multiarray._reconstruct, 'numpy.core.multiarray._reconstruct'),
            (multiarray.scalar, 'numpy._core.multiarray.scalar'),
            (multiarray.scalar, 'numpy.core.multiarray.scalar'), *dtypes,
            argparse.Namespace]  # the options of the authors' training script
