"""What a run that is resumed has in another way than the run that saved the checkpoint."""
from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..errors import UserError
from ..migration.parsing import ConfigEvaluator
from ..utils import plain

UNIMPORTANT = {
    'work_dir', 'resume', 'load_from', 'launcher', 'log_level', 'experiment_name', 'visualizer',
    'check_data', 'num_workers', 'persistent_workers', 'pin_memory', 'prefetch_factor', 'out_dir',
    'save_dir', 'out_folder', 'seed', 'process_timeout', 'log_processor', 'logger', 'shard_model',
    'model_wrapper_cfg'}
"""Keys, at any depth, that change nothing of what is trained; the seed is that of the checkpoint.
"""
MISSING = object()


def changed_settings(saved: object, cfg: Config) -> list[str]:
    """The settings of a config that differ from those in a checkpoint.

    Args:
        saved: ``meta['cfg']`` of the checkpoint, a config's text; it is read as data.
        cfg: The present config.

    Returns:
        Lines 'key: old → new', by key; empty if the text cannot be read.
    """
    old = _read(saved)
    if not old:
        return []
    before, after = _flat(old), _flat(_read(cfg.pretty_text))
    return [f'{key}: {_short(before.get(key, MISSING))} → {_short(after.get(key, MISSING))}'
            for key in sorted({**before, **after})
            if before.get(key, MISSING) != after.get(key, MISSING)]


def _read(text: object) -> dict[str, Any]:
    """The values of a config's text without running it; {} if it is none."""
    try:
        tree = ast.parse(text if isinstance(text, str) else '')
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found: dict[str, Any] = {}
    for statement in tree.body:
        try:
            found.update(ConfigEvaluator(Path('checkpoint'), {}).evaluate(
                ast.Module([statement], [])))
        except (UserError, RecursionError):  # an object, such as a class
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                found[statement.targets[0].id] = ast.unparse(statement.value)
    return found


def _flat(value: Any, path: tuple[str, ...] = ()) -> dict[str, Any]:
    """{dotted key: value} of what matters in a config; lists without dicts are values."""
    if path and path[-1] in UNIMPORTANT:
        return {}
    value = plain(value)
    if isinstance(value, dict) and value:
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        return {'.'.join(path): value}
    found: dict[str, Any] = {}
    for key, item in items:
        found.update(_flat(item, (*path, key)))
    return found


def _short(value: Any) -> str:
    if value is MISSING:
        return '(not set)'
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + '…'
