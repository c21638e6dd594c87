"""Checkpoints: found, downloaded once, read without running code, and fitted exactly."""
from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from .errors import UserError

WEIGHTS_KEYS = ('state_dict', 'model')
"""Where training frameworks keep the weights: mmengine's files, the authors' files."""


def _history_method(owner: Any, name: str) -> Any:
    """What mmengine's log history needs of ``getattr``, and no more of it."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'getattr({owner!r}, {name!r}) is not allowed')
    return getattr(owner, name)


def _allowed() -> list[Any]:
    """The classes beside tensors that mmengine's own checkpoints hold."""
    multiarray = (np._core if hasattr(np, '_core') else np.core).multiarray
    dtypes = {type(np.dtype(kind)) for kind in 'fdilqILQ?'}
    return [HistoryBuffer, (_history_method, 'builtins.getattr'), slice, np.ndarray, np.dtype,
            (multiarray._reconstruct, 'numpy._core.multiarray._reconstruct'),
            (multiarray._reconstruct, 'numpy.core.multiarray._reconstruct'),
            (multiarray.scalar, 'numpy._core.multiarray.scalar'),
            (multiarray.scalar, 'numpy.core.multiarray.scalar'), *dtypes]


def locate(source: str) -> Path:
    """The local file of a path or URL; a URL's file is downloaded once, to torch hub's cache.

    Raises:
        UserError: There is no such file, or it cannot be downloaded.
    """
    if urlparse(source).scheme not in ('http', 'https'):
        path = Path(source).expanduser()
        if not path.is_file():
            raise UserError(f'Checkpoint not found: {path.absolute()}\n'
                            'Expected a .pth file (training writes them to work_dirs/CONFIG/).')
        return path
    path = Path(torch.hub.get_dir(), 'checkpoints', Path(urlparse(source).path).name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        print_log(f'Downloading {source} to {path}', logger='current')
        try:
            torch.hub.download_url_to_file(source, str(path),
                                           progress=os.environ.get('LOCAL_RANK', '0') == '0')
        except OSError as error:
            raise UserError(f'Cannot download {source} ({error}).\n'
                            f'Fetch it on a machine with a network and put it at {path}, or train '
                            'from scratch with --cfg-options model.backbone.init_cfg=None.'
                            ) from error
    return path


def read(source: str, map_location: Any = 'cpu') -> dict[str, Any]:
    """A checkpoint's contents; nothing in it is executed.

    Args:
        source: Local path or URL.
        map_location: As in :func:`torch.load`.

    Raises:
        UserError: No such file, not a checkpoint, or one that carries code.
    """
    path = locate(source)
    try:
        with torch.serialization.safe_globals(_allowed()):
            content = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch.load raises a different class for each kind of damage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if 'Weights only load failed' in reason or isinstance(error, pickle.UnpicklingError):
            what = 'holds more than weights, which is never executed, or is damaged'
        else:
            what = f'cannot be read ({reason[:200]})'
        raise UserError(f'Not a usable checkpoint: {path.absolute()} {what}.\nExpected a file that '
                        'torch.save wrote, holding tensors: a .pth file of this package or of the '
                        "ConvNeXt authors. If it was downloaded, download it again.") from error
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


def check_complete(model: nn.Module, source: str) -> None:
    """See that a checkpoint has every parameter of a whole model, in its shape.

    Without this, a checkpoint of another task or size leaves parts of the model random.

    Raises:
        UserError: Lists what is missing or differs.
    """
    state = {name.removeprefix('module.'): value
             for name, value in weights(read(source)).items()}
    own = model.state_dict()
    problems = _differences(own, state)
    if problems:
        raise UserError(f'{source} does not fit the model of this config ({len(problems)} of '
                        f'{len(own)} parameters):\n  {_shown(problems)}\nGive the checkpoint that '
                        'was trained with this config, or the config it was trained with.')


def _differences(own: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    """What of ``own`` is missing from ``state`` or has another shape there."""
    return [f'missing {name}' for name in own if name not in state] + [
        f'{name} is {list(state[name].shape)}, the model has {list(value.shape)}'
        for name, value in own.items() if name in state and state[name].shape != value.shape]


def _shown(problems: list[str], count: int = 12) -> str:
    return '\n  '.join(problems[:count] + ['…'] * (len(problems) > count))


def load_backbone(backbone: nn.Module, init_cfg: dict[str, Any]) -> None:
    """Load published or trained weights into a ConvNeXt backbone, all of them or none.

    Takes the authors' classification files (their classifier is dropped, the output norms
    start fresh), backbone files, and whole models, whose ``backbone.`` part is used.

    Args:
        backbone: The backbone to fill.
        init_cfg: ``dict(type='Pretrained', checkpoint=PATH_OR_URL, prefix=...)``; prefix
            is 'backbone.' unless given.

    Raises:
        UserError: A parameter is missing, unexpected or of another shape.
    """
    source = init_cfg.get('checkpoint')
    if init_cfg.get('type') != 'Pretrained' or not source:
        raise UserError(f'ConvNeXt: init_cfg={init_cfg}: expected '
                        "dict(type='Pretrained', checkpoint='PATH or URL')")
    state = weights(read(source))
    prefix = init_cfg.get('prefix', 'backbone.').rstrip('.') + '.'
    if any(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items()
                 if name.startswith(prefix)}
    dropped = [name for name in state if name.startswith(('head.', 'norm.'))]
    state = {name: value for name, value in state.items() if name not in dropped}

    own = backbone.state_dict()
    fresh = [name for name in own if name not in state and name.startswith('norm')]
    problems = _differences({name: own[name] for name in own if name not in fresh}, state)
    problems += [f'unexpected {name}' for name in state if name not in own]
    if problems:
        raise UserError(f'{source} does not fit this ConvNeXt ({len(problems)} parameters):\n  '
                        f'{_shown(problems)}\nCheck depths and dims, or choose the checkpoint of '
                        'this size.')
    backbone.load_state_dict(state, strict=False)
    print_log(f'ConvNeXt: {len(state)} parameters loaded from {source}; dropped: '
              f'{", ".join(dropped) or "none"}; fresh: {", ".join(fresh) or "none"}',
              logger='current')


def use_safe_reader() -> None:
    """Have all of mmengine (``load_from``, ``resume``, ``init_cfg``) read files by :func:`read`."""
    CheckpointLoader.register_scheme(('', 'http://', 'https://'), read, force=True)
