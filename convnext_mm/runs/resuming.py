"""Finds the checkpoint that a run resumes from: the newest one that is whole."""
from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmengine.logging import print_log
from mmengine.runner import find_latest_checkpoint

from ..checkpoints.files import check_whole, peek_checkpoint
from ..errors import UserError
from .saving import POINTER, is_local, read_pointer


def checkpoint_folders(cfg: Any) -> list[str]:
    """The folders that a config's run saves to: ``out_dir`` of its checkpoint hook, the work dir.

    Args:
        cfg: A config with ``work_dir``.
    """
    work_dir = str(cfg['work_dir'])
    out_dir = ((cfg.get('default_hooks') or {}).get('checkpoint') or {}).get('out_dir')
    below = [os.path.join(out_dir, os.path.basename(work_dir.rstrip('/')))] if out_dir else []
    return [*below, work_dir]


def find_checkpoint(cfg: Any) -> str | None:
    """The newest checkpoint of a run that can be resumed from; None: there is none at all.

    It is the one that ``last_checkpoint`` names, or one of a later iteration that was saved after
    that. Where it is damaged or the pointer is missing, it is that of the latest iteration.

    Args:
        cfg: A config with ``work_dir``.

    Raises:
        UserError: There are checkpoints, but all are damaged; names each with its damage.
    """
    folders = checkpoint_folders(cfg)
    if not is_local(folders[0]):
        return find_latest_checkpoint(cfg['work_dir'])
    pointed = read_pointer(cfg['work_dir'])
    candidates = _in_order([path for folder in folders for path in Path(folder).glob('*.pt*')
                            if not path.name.startswith(('.', 'best'))],
                           os.path.basename(pointed), Path(cfg['work_dir'], POINTER))
    problems: list[str] = []
    for path, problem in candidates:
        try:
            if problem is None:
                check_whole(path)
        except UserError as error:
            problem = str(error)
        if problem is None:
            for line in problems:
                print_log(f'Skipped: {line}', logger='current')
            return str(path)
        problems.append(problem.partition('\n')[0])
    if pointed and not problems:
        problems = [f'{POINTER} names {pointed}, which is not there']
    if problems:
        listed = ''.join(f'\n  {line}' for line in problems)
        raise UserError(f'--resume: no checkpoint in {cfg["work_dir"]} can be resumed from:'
                        f'{listed}\nTo start again from scratch, leave out --resume and name '
                        'another --work-dir')
    return None


def _in_order(paths: Iterable[Path], pointed: str, pointer: Path) -> list[tuple[Path, str | None]]:
    """Checkpoints and what is wrong with them (None: nothing yet), the newest first."""
    found: list[tuple[int, Path, str | None]] = []
    for path in paths:
        try:
            content = peek_checkpoint(str(path))
        except UserError as error:
            number = re.search(r'\d+$', path.stem)  # so that it is named among its neighbors
            found.append((int(number[0]) if number else 0, path, str(error)))
            continue
        problem = None if 'optimizer' in content else f'{path} has no optimizer state'
        found.append((iteration(content), path, problem))
    named = next((one for one in found if one[1].name == pointed and one[2] is None), None)

    def rank(one: tuple[int, Path, str | None]) -> tuple[bool, bool, int]:
        later = (named is not None and one[0] > named[0]
                 and one[1].stat().st_mtime_ns > pointer.stat().st_mtime_ns)
        return later, one[1].name == pointed, one[0]
    return [(path, problem) for _, path, problem in sorted(found, key=rank, reverse=True)]


def iteration(content: dict[str, Any]) -> int:
    """The number of iterations after which a checkpoint was saved."""
    meta = content.get('meta')
    value = meta.get('iter') if isinstance(meta, dict) else None
    return value if isinstance(value, int) else 0
