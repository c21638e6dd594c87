"""Write checkpoints with the naming and file format of another library."""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..errors import UserError
from ..inputs import CHECKPOINT_SUFFIXES
from ..utils import atomic_path
from . import naming
from .files import WEIGHTS_KEYS, extract_weights, locate_checkpoint, read_checkpoint
from .loading import count_by_module
from .naming import SCHEMES, StateDict


def main(args: argparse.Namespace) -> None:
    """Convert with the arguments ``source``, ``target``, ``to`` and ``publish``; print a report."""
    path, report = convert_checkpoint(args.source, args.target, args.to, args.publish)
    print('\n'.join([*report, f'Wrote {path} ({path.stat().st_size / 2**20:.1f} MiB)']))


def convert_checkpoint(source: str, target: str | Path, to: str | None = None,
                       publish: bool = False) -> tuple[Path, list[str]]:
    """Write the weights of ``source`` to ``target``, in the file format of its suffix.

    Values never change, only names and, where libraries differ, dimensions of length 1. 'official'
    and 'mmpretrain' keep the neck and heads of a whole model, whose names are the same in both;
    files of the other libraries contain a backbone with or without a classifier.

    Args:
        source: Path or URL of a checkpoint with any naming.
        target: A file name that ends in .safetensors, .pth, .pt or .bin.
        to: A name in :data:`convnext_mm.choices.EXPORT_SCHEMES`. Default: names stay the same.
        publish: Put the first 8 digits of the file's SHA-256 into its name.

    Returns:
        The path that was written, and lines that describe what it contains and lacks.

    Raises:
        UserError: The source cannot be read or converted, or the target cannot be written.
    """
    target = Path(target).expanduser()
    if target.suffix not in CHECKPOINT_SUFFIXES:
        raise UserError(f'Target {target}: expected a name that ends in .pth, .pt, .bin or '
                        '.safetensors')
    if not target.absolute().parent.is_dir():
        raise UserError(f'Target {target}: the folder {target.absolute().parent} does not exist')
    path = locate_checkpoint(source)
    if target.exists() and target.samefile(path):
        raise UserError(f'Target {target} is the source itself and would be overwritten: choose '
                        'another name')
    content = read_checkpoint(source)
    state = naming.without_wrappers(extract_weights(content))
    report = []
    if to:
        state, lost, summary = translate_names(state, source, to)
        report.append(summary)
        if lost:
            report.append(f'Excluded, since files of {SCHEMES[to].title} have no place for it: '
                          f'{count_by_module(lost)}')
    other_keys = [key for key, value in content.items()
                  if key not in ('meta', *WEIGHTS_KEYS) and not isinstance(value, torch.Tensor)]
    if other_keys:
        report.append(f'Excluded, since only weights and meta are written: {", ".join(other_keys)}')
    meta = content.get('meta')
    return _write_checkpoint(target, state, meta if isinstance(meta, dict) else {}, publish), report


def translate_names(state: StateDict, source: str, to: str) -> tuple[StateDict, list[str], str]:
    """Convert the weights to the naming ``to``.

    Returns:
        The weights, the names that have no place there, and a line that describes the source.

    Raises:
        UserError: There is no ConvNeXt, or one that the library ``to`` does not have.
    """
    scheme = SCHEMES[to]
    state = naming.sparse_to_dense(state)
    convnext = naming.find_convnext(state, source)
    ours, beside, outside = naming.to_official(state, convnext)
    arch = naming.infer_arch(ours)
    if arch.use_grn and scheme.grn is None:
        raise UserError(f'{source} is a ConvNeXt V2, which {scheme.title} does not have: '
                        'choose another --to')
    # In mmpretrain a classifier's norm is the norm of the last feature map.
    last = f'norm{len(arch.depths) - 1}'
    norms = {name.split('.')[0] for name in ours if re.match(r'norm\d*\.', name)}
    if convnext.scheme == 'mmpretrain' and 'head.weight' in ours and norms == {last}:
        ours, norms = _rename_module(ours, last, 'norm'), {'norm'}
    if to == 'mmpretrain' and norms == {'norm'}:
        ours = _rename_module(ours, 'norm', last)
    whole = convnext.prefix == 'backbone.' and bool(outside) and to in ('official', 'mmpretrain')
    prefix = 'backbone.' if whole else scheme.prefix[arch.use_grn]
    if to == 'transformers' and norms - {'norm'}:
        prefix = ''  # its backbones have output norms and no prefix, its classifiers the reverse
    converted, lost = naming.from_official(ours, to, prefix)
    if whole:
        converted.update(outside)
    else:
        lost += outside
    return converted, [*lost, *beside], f'{source}: {arch}, with the names of {convnext}'


def _rename_module(state: StateDict, old: str, new: str) -> StateDict:
    return {new + name.removeprefix(old) if name.startswith(old + '.') else name: value
            for name, value in state.items()}


def _write_checkpoint(target: Path, state: StateDict, meta: dict[str, Any], publish: bool) -> Path:
    """Write a file completely or not at all; return its path."""
    # Views would be written with their whole storage, or refused.
    state = {name: value.detach().clone(memory_format=torch.contiguous_format)
             for name, value in state.items()}
    path = target
    try:
        with atomic_path(target) as part:
            if target.suffix == '.safetensors':
                # Not save_file, which makes the file unreadable for other users.
                part.write_bytes(save(state, dict(format='pt', **_encode_meta(meta))))
            else:
                torch.save(_wrap_weights(state, meta), part)
            if publish:
                digest = hashlib.sha256()
                with open(part, 'rb') as file:
                    while chunk := file.read(2**20):
                        digest.update(chunk)
                path = target.with_stem(f'{target.stem}-{digest.hexdigest()[:8]}')
                os.replace(part, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: from torch.save
        raise UserError(f'Cannot write {target}: {error}') from error
    return path


def _wrap_weights(state: StateDict, meta: dict[str, Any]) -> dict[str, Any]:
    """Put the weights under the key that the library's own files use, if any."""
    detected = naming.detect_convnexts(state)
    if detected and detected[0].prefix != 'backbone.':
        key = SCHEMES[detected[0].scheme].wrapper_key
    else:
        key = 'state_dict' if detected or meta else None
    if key == 'state_dict':
        return dict(meta=meta, state_dict=state)
    return {key: state} if key else dict(state)


def _encode_meta(meta: dict[str, Any]) -> dict[str, str]:
    """Encode the part of a checkpoint's ``meta`` that fits in JSON, such as class names."""
    encodable = {}
    for key, value in meta.items():
        try:
            encodable[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return dict(meta=json.dumps(encodable)) if encodable else {}
