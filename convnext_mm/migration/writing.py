"""Writes a converted config: our files as bases, and the values that differ from them."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from ..bases import without_completion
from ..errors import UserError
from ..resolution import resolve
from ..resolution.mmpretrain import PACKAGES, imports_of, uses
from ..utils import atomic_path, describe, plain
from .conversion import (
    ConvertedConfig,
    ReportRow,
    convert_config,
    detect_scope,
    relative_base,
)
from .own_parts import import_own_parts
from .parsing import OldConfig, check_is_data, find_styles, old_keys, parse_config

Check = Callable[[Path, OldConfig | None], None]
PIPELINES = ('train_pipeline', 'test_pipeline')


def migrate(source: str | Path, target: str | Path, trust: bool = False,
            imports: Sequence[str] = (), check: Check | None = None) -> str:
    """Convert a config file for mmcv 0.x or 1.x, or with mmpretrain's ConvNeXt, to a new one.

    Args:
        source: The old file.
        target: The new file. It is not written if the conversion fails.
        trust: Execute the old file instead of reading it as data, and import the modules that it
            and ``imports`` name.
        imports: Modules or ``.py`` files that register types which the old config uses.
        check: Called with the new file before it is in place, and with the old config.

    Returns:
        The report as text.

    Raises:
        UserError: The old config cannot be converted as a whole, needs no conversion, or
            ``target`` is the same file; ``check`` raises it.
    """
    source, target = Path(source), Path(target)
    if target.resolve() == source.resolve():
        raise UserError(f'{target} is the old config, which would be overwritten: choose another '
                        'name for the new one')
    try:
        old_keys(source)  # refuses a mix of styles
        if find_styles(source).is_current:
            return _migrate_current(source, target, trust, check)
        old = parse_config(source, trust)
        converted = convert_config(import_own_parts(old, imports, trust, detect_scope(old)))
        _write(target, format_config(converted, source, target), converted.target, check, old)
        return format_report(converted.rows, source, target)
    except (TypeError, ValueError, AttributeError, LookupError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'{source} cannot be converted, because a value is of another kind than '
                        f'its key takes ({describe(error)})') from error


def _migrate_current(source: Path, target: Path, trust: bool, check: Check | None) -> str:
    """Write a config in mmengine's style with our ConvNeXt for mmpretrain's.

    Nothing is inherited any more: the file has all values, those of the bases included, as they are
    when the tools of this package run it.
    """
    if not trust:
        check_is_data(source)
    cfg = read_file(source)
    if not list(uses(cfg)) and not any(
            name.partition('.')[0] in PACKAGES for name in imports_of(cfg)):
        raise UserError(f"{source} is in mmengine's style and runs as it is, without conversion: "
                        f'python tools/train.py {source}')
    if cfg.get('default_scope') not in ('mmseg', 'mmdet'):
        raise UserError(f'{source}: default_scope={cfg.get("default_scope")!r} is not supported: '
                        "expected 'mmseg' or 'mmdet'")
    rows = [ReportRow('(all keys)', 'written with all that they inherit')]
    rows += [ReportRow('(resolved)', line) for line in resolve(cfg)]
    values = cfg.to_dict()
    _write(target, f'# Converted from {source.name} and all that it inherits.\n'
           + _format_values(values) + '\n', values, check)
    return format_report(rows, source, target)


def _write(target: Path, text: str, values: dict[str, Any], check: Check | None = None,
           old: OldConfig | None = None) -> None:
    """Write a config and check that it has these values when it is read, and can be built."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as part:
        part.write_text(text, encoding='utf-8')
        written = read_file(part).to_dict()
        different = sorted(
            key for key in values.keys() | written.keys() if key not in PIPELINES
            and plain(written.get(key)) != plain(values.get(key)))
        if different:  # a bug in this module: the new file would train differently
            raise RuntimeError(f'The written config differs in {", ".join(different)}')
        if check:
            check(part, old)


def read_file(path: Path) -> Config:
    """Read a file in mmengine's style, without completing it or importing what it names.

    Raises:
        UserError: It cannot be read.
    """
    try:
        with without_completion():
            return Config.fromfile(path, import_custom_modules=False)
    except Exception as error:  # a config is Python code and can raise anything
        raise UserError(f'Config {path} cannot be read: {type(error).__name__}: {error}') from error


def format_config(converted: ConvertedConfig, source: Path, target: Path) -> str:
    """Return the text of the new file."""
    own = difference(converted.inherited, converted.target)
    bases = [relative_base(base, target.parent.resolve()) for base in converted.bases]
    lines = [f'# Converted from {source.name}, a config for mmcv 0.x or 1.x.']
    listed = ',\n    '.join(map(repr, bases))
    lines.append(f'_base_ = {bases[0]!r}' if len(bases) == 1 else f'_base_ = [\n    {listed}\n]')
    pipelines: dict[str, list] = {}
    for split, name in zip(('train', 'val'), PIPELINES, strict=True):
        pipeline = own.get(f'{split}_dataloader', {}).get('dataset', {}).get('pipeline')
        if pipeline:
            lines.append(_format_values({name: pipeline}))
            pipelines[name] = pipeline
    # A pipeline is written once, as a variable that data sets refer to.
    text = _format_values(_replace_by_names(own, pipelines)) if own else ''
    for name in pipelines:
        text = text.replace(f"'@{name}'", name)
    return '\n'.join([*lines, text]).rstrip() + '\n'


def difference(base: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """Return the values that turn ``base`` into ``target`` when they are merged into it."""
    own: dict[str, Any] = {}
    for key, value in target.items():
        inherited = base.get(key)
        if key in base and plain(inherited) == plain(value):
            continue
        if isinstance(value, dict) and key in base:
            if not isinstance(inherited, dict) or inherited.keys() - value.keys():
                own[key] = dict(value, _delete_=True)
            else:
                own[key] = difference(inherited, value)
        else:
            own[key] = value
    return own


def format_report(rows: list[ReportRow], source: Path, target: Path) -> str:
    """Return a text with a line for each row, and the warnings at its end."""
    width = min(58, max([len(row.old) for row in rows] + [4]))
    lines = [f'{source} → {target}', '']
    lines += [f'  {row.old:<{width}}  → {row.new}' for row in rows]
    warnings = [f'  ! {row.old}: {row.warning}' for row in rows if row.warning]
    lines += ['', 'Warnings:', *warnings] if warnings else ['', 'No warnings.']
    return '\n'.join(lines)


def _replace_by_names(node: Any, pipelines: dict[str, list]) -> Any:
    """Replace each occurrence of a pipeline by '@' and its name."""
    for name, pipeline in pipelines.items():
        if isinstance(node, list) and plain(node) == plain(pipeline):
            return f'@{name}'
    if isinstance(node, dict):
        return {key: _replace_by_names(value, pipelines) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_replace_by_names(value, pipelines) for value in node)
    return node


def _format_values(values: dict[str, Any]) -> str:
    return Config(ConfigDict(values)).pretty_text.rstrip()
