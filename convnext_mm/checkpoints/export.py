"""Checkpoints are written again in the naming and file format of another library."""
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
from ..utils import atomic_path
from . import naming
from .files import WEIGHTS_KEYS, locate, read, weights
from .loading import grouped
from .naming import FAMILIES, State


def main(args: argparse.Namespace) -> None:
    """Convert by ``args``: ``source``, ``target``, ``to`` and ``publish``; says what was done."""
    written, report = convert(args.source, args.target, args.to, args.publish)
    print('\n'.join([*report, f'written: {written} ({written.stat().st_size / 2**20:.1f} MiB)']))


def convert(source: str, target: str | Path, to: str | None = None,
            publish: bool = False) -> tuple[Path, list[str]]:
    """Write the weights of ``source`` to ``target``, whose suffix says the file format.

    Values are never changed, only their names and, where libraries differ, axes of length 1.
    Neck and heads of a whole model are kept in 'official' and 'mmpretrain', where they are the
    same; the other libraries' files hold a backbone, or a backbone with a classifier.

    Args:
        source: Path or URL of a checkpoint in any naming.
        target: A name that ends in .safetensors, or .pth, .pt or .bin.
        to: A name of :data:`naming.TARGETS`; not given: names stay.
        publish: Put the first 8 digits of the file's SHA-256 into its name.

    Returns:
        The file that was written, and lines that say what is in it and what is not.

    Raises:
        UserError: The source cannot be read or has no such form, or the target is no good.
    """
    target = Path(target).expanduser()
    if target.suffix not in ('.pth', '.pt', '.bin', '.safetensors'):
        raise UserError(f'Target {target}: expected a name that ends in .pth, .pt, .bin or '
                        '.safetensors')
    if not target.absolute().parent.is_dir():
        raise UserError(f'Target {target}: there is no folder {target.absolute().parent}')
    path = locate(source)
    if target.exists() and target.samefile(path):
        raise UserError(f'Target {target} is the source itself, which would be lost: choose '
                        'another name')
    content = read(source)
    state = {name.removeprefix('module.'): value for name, value in weights(content).items()}
    report = []
    if to:
        state, lost, line = translate(state, source, to)
        report.append(line)
        if lost:
            report.append(f'left out, as files of {FAMILIES[to].title} have no place for it: '
                          f'{grouped(lost)}')
    beside = [key for key, value in content.items()
              if key not in ('meta', *WEIGHTS_KEYS) and not isinstance(value, torch.Tensor)]
    if beside:
        report.append(f'left out, as it is not weights: {", ".join(beside)}')
    meta = content.get('meta')
    return _write(target, state, meta if isinstance(meta, dict) else {}, publish), report


def translate(state: State, source: str, to: str) -> tuple[State, list[str], str]:
    """The weights in the naming ``to``.

    Returns:
        They, the names of those that have no place there, and a line on what they are.

    Raises:
        UserError: They hold no ConvNeXt, or one that the library ``to`` does not have.
    """
    family = FAMILIES[to]
    state = naming.dense(state)
    found = naming.find(state, source)
    ours, beside, outside = naming.to_official(state, found)
    size = naming.architecture(ours)
    if size.use_grn and family.grn is None:
        raise UserError(f'{source} is a ConvNeXt V2, which {family.title} does not have: '
                        'choose another --to')
    # mmpretrain has a classifier's norm as the norm of the last feature map.
    last = f'norm{len(size.depths) - 1}'
    norms = {name.split('.')[0] for name in ours if re.match(r'norm\d*\.', name)}
    if found.family == 'mmpretrain' and 'head.weight' in ours and norms == {last}:
        ours, norms = _renamed(ours, last, 'norm'), {'norm'}
    if to == 'mmpretrain' and norms == {'norm'}:
        ours = _renamed(ours, 'norm', last)
    whole = found.prefix == 'backbone.' and bool(outside) and to in ('official', 'mmpretrain')
    prefix = 'backbone.' if whole else family.prefix[size.use_grn]
    if to == 'transformers' and norms - {'norm'}:
        prefix = ''  # its backbones have such norms and no prefix, its classifiers the reverse
    out, lost = naming.from_official(ours, to, prefix)
    if whole:
        out.update(outside)
    else:
        lost += outside
    return out, [*lost, *beside], f'{source}: {size}, in the naming of {found}'


def _renamed(state: State, old: str, new: str) -> State:
    return {new + name.removeprefix(old) if name.startswith(old + '.') else name: value
            for name, value in state.items()}


def _write(target: Path, state: State, meta: dict[str, Any], publish: bool) -> Path:
    """Write a file all or nothing; returns its path."""
    state = {name: value.detach().clone(memory_format=torch.contiguous_format)
             for name, value in state.items()}  # views would be written whole, or refused
    final = target
    try:
        with atomic_path(target) as part:
            if target.suffix == '.safetensors':
                # Its save_file would let nobody else read the file.
                part.write_bytes(save(state, dict(format='pt', **_as_json(meta))))
            else:
                torch.save(_wrapped(state, meta), part)
            if publish:
                digest = hashlib.sha256()
                with open(part, 'rb') as file:
                    while chunk := file.read(2**20):
                        digest.update(chunk)
                final = target.with_stem(f'{target.stem}-{digest.hexdigest()[:8]}')
                os.replace(part, final)
    except OSError as error:
        raise UserError(f'Cannot write {target}: {error}') from error
    return final


def _wrapped(state: State, meta: dict[str, Any]) -> dict[str, Any]:
    """The weights under the key where files of their kind have them."""
    found = naming.recognise(state)
    if found and found[0].prefix != 'backbone.':
        key = FAMILIES[found[0].family].wrapped
    else:
        key = 'state_dict' if found or meta else None
    if key == 'state_dict':
        return dict(meta=meta, state_dict=state)
    return {key: state} if key else state


def _as_json(meta: dict[str, Any]) -> dict[str, str]:
    """What of a checkpoint's ``meta`` a .safetensors file can keep, such as names of classes."""
    kept = {}
    for key, value in meta.items():
        try:
            kept[key] = json.loads(json.dumps(value))
        except (TypeError, ValueError):
            continue
    return dict(meta=json.dumps(kept)) if kept else {}
