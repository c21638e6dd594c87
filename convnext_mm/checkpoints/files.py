"""Checkpoints are found, downloaded once, and read without running what they contain."""
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
from urllib.parse import urlparse

import numpy as np
import torch
from filelock import FileLock
from mmengine.logging import HistoryBuffer, print_log
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError

WEIGHTS_KEYS = ('state_dict', 'model', 'state_dict_ema', 'model_ema')
"""Where training frameworks keep the weights: mmengine's files, the authors' files."""
TRUST = 'CONVNEXT_MM_TRUST'
"""The environment variable that names the files (separated by ':') whose code may run."""


def locate(source: str) -> Path:
    """The local file of a path or URL; a URL's file is downloaded once, to torch hub's cache.

    One process a node downloads, the others wait for it. A hash in the name, as OpenMMLab's
    files have it, is verified.

    Raises:
        UserError: There is no such file, or it cannot be downloaded.
    """
    if urlparse(source).scheme not in ('http', 'https'):
        path = Path(source).expanduser()
        if path.is_dir():
            inside = sorted(p.name for p in path.iterdir() if p.suffix in (
                '.pth', '.pt', '.bin', '.safetensors'))
            raise UserError(f'Checkpoint is a folder: {path.absolute()}\nGive the file in it: '
                            f'{", ".join(inside[:8]) or "there is none"}')
        if not path.is_file():
            raise UserError(f'Checkpoint not found: {path.absolute()}\n'
                            'Expected a .pth, .pt or .safetensors file (training writes .pth '
                            'files to work_dirs/CONFIG/).')
        return path
    path = Path(torch.hub.get_dir(), 'checkpoints', _cache_name(source))
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
                        f'Fetch it on a machine with a network and put it at {path}, or train '
                        'from scratch with --cfg-options model.backbone.init_cfg=None.'
                        ) from error
    return path


def _cache_name(url: str) -> str:
    """The name of a URL's file in the cache: its last part, as torch hub does.

    All repositories of the Hugging Face hub call their weights model.safetensors: there the
    repository's name is put before it.
    """
    repository, resolve, name = urlparse(url).path.strip('/').partition('/resolve/')
    if resolve:
        return '--'.join([*repository.split('/'), *name.split('/')[1:]])
    return Path(urlparse(url).path).name


def read(source: str, map_location: Any = 'cpu') -> dict[str, Any]:
    """A checkpoint's contents; nothing in it is executed.

    Files that torch.save or safetensors wrote are told apart by their contents, not their names.
    ``CONVNEXT_MM_TRUST=/path/file.pth`` in the environment has that file's code run.

    Args:
        source: Local path or URL.
        map_location: As in :func:`torch.load`.

    Raises:
        UserError: No such file, not a checkpoint, or one that carries code.
    """
    path = locate(source)
    with open(path, 'rb') as file:
        head = file.read(512)
    what = _no_checkpoint(path, head)
    if what:
        raise _unusable(path, what)
    if head[8:9] == b'{':
        return _read_safetensors(path)
    trusted = _is_trusted(path)
    if trusted:
        print_log(f'{path.absolute()} is trusted ({TRUST}): what it contains may run code',
                  logger='current')
    try:
        with open(path, 'rb') as file, torch.serialization.safe_globals(_allowed()):
            content = torch.load(file, map_location=map_location, weights_only=not trusted)
    except Exception as error:  # torch.load raises a different class for each kind of damage
        raise _unusable(path, *_reason(path, error, head)) from error
    if not isinstance(content, dict) or not weights(content):
        raise UserError(f'Not a checkpoint: {path.absolute()} holds no weights.\nExpected a '
                        f'dictionary of tensors, by itself or under {" or ".join(WEIGHTS_KEYS)}.')
    return content


def weights(content: dict[str, Any]) -> dict[str, Tensor]:
    """The {parameter name: tensor} part of a checkpoint's contents."""
    for key in WEIGHTS_KEYS:
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def read_only_weights(loader: Callable, filename: str, **kwargs: Any) -> Any:
    """Call another loader of checkpoints so that ``torch.load`` in it executes nothing.

    Raises:
        UserError: The file holds more than weights.
    """
    try:
        with _forced_weights_only(), torch.serialization.safe_globals(_allowed()):
            return loader(filename, **kwargs)
    except pickle.UnpicklingError as error:
        raise _unusable(filename, *_reason(filename, error)) from error


@contextmanager
def _forced_weights_only() -> Iterator[None]:
    """Set PyTorch's switch, which overrides the argument of torch.load."""
    switch = 'TORCH_FORCE_WEIGHTS_ONLY_LOAD'
    before = os.environ.get(switch)
    os.environ[switch] = '1'
    try:
        yield
    finally:
        os.environ.pop(switch)
        if before is not None:
            os.environ[switch] = before


def _read_safetensors(path: Path) -> dict[str, Any]:
    """A .safetensors file as a checkpoint of mmengine, with the ``meta`` we may have put in."""
    try:
        with safe_open(path, framework='pt') as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            meta = json.loads((file.metadata() or {}).get('meta', '{}'))
    except (SafetensorError, ValueError, OSError) as error:
        raise _unusable(path, f'is cut off or damaged ({error})') from error
    return dict(state_dict=state, meta=meta)


def _no_checkpoint(path: Path, head: bytes) -> str:
    """What a file that begins with ``head`` plainly is instead of a checkpoint; '' if unclear."""
    text = head.lstrip().lower()
    if not head:
        return 'is empty'
    if text.startswith((b'<!doctype', b'<html', b'<?xml')):
        return ('is a web page, not weights: the address led to a page about the file, to a login '
                'or to an error')
    if text.startswith(b'version https://git-lfs'):
        return 'is a pointer of Git LFS, not the file itself: fetch it with git lfs pull'
    if head.startswith(b'PK') and not zipfile.is_zipfile(path):
        return 'is cut off: its end is missing'
    return ''


def _reason(path: Path | str, error: Exception, head: bytes = b'') -> tuple[str, ...]:
    """What keeps a file from being read, and what to do about it."""
    text = str(error)
    code = re.search(r'GLOBAL ([\w.]+)|function (\S+)|class ([\w.]+)', text)
    # A pickle with what torch.save never writes: one of something else.
    foreign = head.startswith(b'\x80') and 'Unsupported operand' in text
    if isinstance(error, pickle.UnpicklingError) and (code or foreign):
        name = next(filter(None, code.groups())) if code else 'a Python pickle'
        return (f'holds more than weights ({name}), which is never executed',
                'Loading it could run any code. If you trust who made it, say so for this one '
                f'file: {TRUST}={Path(path).absolute()} before the command.')
    if 'TorchScript' in text:
        return ('is a TorchScript program, not a checkpoint',)
    return ('is damaged, or no file of torch.save',)  # PyTorch's own words advise to run it


def _unusable(path: Path | str, what: str, advice: str = '') -> UserError:
    return UserError(
        f'Not a usable checkpoint: {Path(path).absolute()} {what}.\n' +
        (advice or 'Expected weights as torch.save (.pth, .pt) or safetensors write them. If the '
                   'file was downloaded or copied, delete it and do that again.'))


def _is_trusted(path: Path) -> bool:
    """Whether the user named this very file in the environment."""
    named = [name for name in os.environ.get(TRUST, '').split(os.pathsep) if name]
    return any(Path(name).expanduser().resolve() == path.resolve() for name in named)


def _history_method(owner: Any, name: str) -> Any:
    """What mmengine's log history needs of ``getattr``, and no more of it."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r}) is not allowed')
    return getattr(owner, name)


def _allowed() -> list[Any]:
    """The classes beside tensors that checkpoints of mmengine and the authors' code hold."""
    multiarray = (np._core if hasattr(np, '_core') else np.core).multiarray
    dtypes = {type(np.dtype(kind)) for kind in 'fdilqILQ?'}
    return [HistoryBuffer, (_history_method, 'builtins.getattr'), slice, np.ndarray, np.dtype,
            (multiarray._reconstruct, 'numpy._core.multiarray._reconstruct'),
            (multiarray._reconstruct, 'numpy.core.multiarray._reconstruct'),
            (multiarray.scalar, 'numpy._core.multiarray.scalar'),
            (multiarray.scalar, 'numpy.core.multiarray.scalar'), *dtypes,
            argparse.Namespace]  # the options of the authors' training script
