"""A converted config as a file: our fragments, and what differs from them."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from ..datasets import as_written
from ..errors import UserError
from ..utils import atomic_path
from .conversion import Migrated, Row, convert, relative
from .parsing import read

PIPELINES = ('train_pipeline', 'test_pipeline')


def migrate(source: str | Path, target: str | Path, trust: bool = False) -> str:
    """Convert an old config file into a new one.

    Args:
        source: The old file.
        target: The new file; written whole or not at all.
        trust: Run the old file where it does more than assign values.

    Returns:
        The report, as text.

    Raises:
        UserError: The old config cannot be converted; ``target`` is the old file.
    """
    source, target = Path(source), Path(target)
    if target.resolve() == source.resolve():
        raise UserError(f'{target}: the old config would be overwritten: name another file')
    found = convert(read(source, trust))
    text = as_text(found, source, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as part:
        part.write_text(text, encoding='utf-8')
        with as_written():
            written = Config.fromfile(part, import_custom_modules=False).to_dict()
        differ = sorted(key for key in found.target.keys() | written.keys()
                        if _plain(written.get(key)) != _plain(found.target.get(key))
                        and key not in PIPELINES)
        if differ:  # ours to mend: the new file would train something else
            raise RuntimeError(f'the converted file differs in {", ".join(differ)}')
    return report(found.rows, source, target)


def as_text(found: Migrated, source: Path, target: Path) -> str:
    """The new file."""
    own = difference(found.inherited, found.target)
    bases = [relative(base, target.parent.resolve()) for base in found.bases]
    lines = [f'# Converted from {source.name}, a config for mmcv 0.x or 1.x.']
    listed = ',\n    '.join(map(repr, bases))
    lines.append(f'_base_ = {bases[0]!r}' if len(bases) == 1 else f'_base_ = [\n    {listed}\n]')
    names = {}
    for split, name in zip(('train', 'val'), PIPELINES, strict=True):
        pipeline = own.get(f'{split}_dataloader', {}).get('dataset', {}).get('pipeline')
        if pipeline:
            lines.append(_pretty({name: pipeline}))
            names[name] = pipeline
    # Said once, and named where it is used.
    text = _pretty(_with_names(own, names)) if own else ''
    for name in names:
        text = text.replace(f"'@{name}'", name)
    return '\n'.join([*lines, text]).rstrip() + '\n'


def difference(base: dict, target: dict) -> dict:
    """What is laid over ``base`` to get ``target``."""
    own: dict[str, Any] = {}
    for key, value in target.items():
        if key in base and _plain(base[key]) == _plain(value):
            continue
        below = base.get(key)
        if isinstance(value, dict) and isinstance(below, dict):
            if below.keys() - value.keys():
                own[key] = dict(value, _delete_=True)
            else:
                own[key] = difference(below, value)
        else:
            own[key] = value
    return own


def report(rows: list[Row], source: Path, target: Path) -> str:
    """What became of each key, and what to look at."""
    width = min(58, max([len(row.old) for row in rows] + [4]))
    lines = [f'{source} → {target}', '']
    lines += [f'  {row.old:<{width}}  → {row.new}' for row in rows]
    warnings = [row for row in rows if row.warning]
    if warnings:
        lines += ['', 'Look at:']
        lines += [f'  ! {row.old}: {row.warning}' for row in warnings]
    else:
        lines += ['', 'Nothing was lost.']
    return '\n'.join(lines)


def _plain(value: Any) -> Any:
    """Tuples as lists: a config's text does not always keep them apart."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value


def _with_names(node: Any, names: dict[str, list]) -> Any:
    """``node`` with '@name' for what equals a named value."""
    for name, value in names.items():
        if isinstance(node, list) and _plain(node) == _plain(value):
            return f'@{name}'
    if isinstance(node, dict):
        return {key: _with_names(value, names) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_with_names(value, names) for value in node)
    return node


def _pretty(values: dict[str, Any]) -> str:
    return Config(ConfigDict(values)).pretty_text.rstrip()
