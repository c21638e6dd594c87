"""Converts old configs, and builds what they become before success is reported."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from ..errors import UserError
from ..migration import writing
from ..migration.parsing import OldConfig, old_keys
from ..resolution import resolve
from . import checks
from .building import Parts, build_all

OWN_HINT = ('. If the config means a class of your own of that name, give its module: --trust '
            '--import MODULE of tools/migrate_config.py')


def migrate(source: str | Path, target: str | Path, trust: bool = False,
            imports: Sequence[str] = ()) -> str:
    """Convert a config, and write it if all that it describes can be built.

    Args:
        source, target, trust, imports: See :func:`convnext_mm.migration.writing.migrate`.

    Returns:
        The report as text.

    Raises:
        UserError: The old config cannot be converted as a whole, or the new one cannot be built.
    """
    return writing.migrate(source, target, trust, imports, check=check_result)


def migrate_folder(source: str | Path, target: str | Path, trust: bool = False,
                   imports: Sequence[str] = ()) -> str:
    """Convert the configs in a folder and those below it; bases in ``_base_`` are not converted.

    Args:
        source: A folder.
        target: The folder for the new configs, under the paths of the old ones.
        trust, imports: See :func:`convnext_mm.migration.writing.migrate`.

    Returns:
        A table: what became of each config, with counts.

    Raises:
        UserError: The folder has no old config.
    """
    source, target = Path(source), Path(target)
    rows, counts = [], {'converted and built': 0, 'refused': 0}
    for file in sorted(source.rglob('*.py')):
        name = file.relative_to(source)
        if '_base_' in name.parts or file.is_relative_to(target.resolve()):
            continue
        result, why = 'converted and built', ''
        try:
            if not old_keys(file):
                continue  # code, or a config that needs no conversion
            report = migrate(file, target / name, trust, imports)
            count = report.count('\n  ! ')
            why = f'{count} warning{"s" * (count > 1)}' if count else ''
            (target / name).with_suffix('.txt').write_text(report + '\n', encoding='utf-8')
        except UserError as error:
            result, why = 'refused', ' '.join(str(error).replace(f'{file}: ', '').split())
        counts[result] += 1
        rows.append(f'  {name!s:<60}  {result:<20} {why}'.rstrip())
    if not rows:
        raise UserError(f'{source} has no config for mmcv 0.x or 1.x, other than in _base_')
    total = ', '.join(f'{count} {result}' for result, count in counts.items())
    return '\n'.join([f'{source} → {target}', '', *rows, '', f'{len(rows)} configs: {total}'])


def check_result(path: Path, old: OldConfig | None) -> None:
    """Build all that a new config describes, and compare it with what the old one says.

    Args:
        path: The new config.
        old: The old config; None: it was in mmengine's style.

    Raises:
        UserError: What cannot be built, or what is not as in the old config.
    """
    cfg = writing.read_file(path)  # imports nothing: own parts were imported before, if trusted
    checks.check_toolbox(cfg)
    batch_size = cfg.train_dataloader.batch_size
    cfg.train_dataloader.batch_size = max(batch_size, 2)  # old configs count on several GPUs
    if cfg.get('visualizer'):
        cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]  # others may be missing here
    try:
        resolve(cfg)
        cfg.train_dataloader.batch_size = batch_size
        parts = build_all(cfg)
    except UserError as error:
        own = OWN_HINT if 'has no argument' in str(error) else ''
        raise UserError(f'{old.path if old else path}: converted, but {error}{own}') from error
    if old is None:
        return
    for where, before, after in differences(old.values, cfg, parts):
        if where.endswith('.num_classes'):
            raise UserError(f'{old.path}: {where}={before}, but the dataset has {after} classes. '
                            f'Write {after} there; if these are not the classes of your data, '
                            'name yours with classes=(...) at the top of the config')
        raise UserError(f'{old.path}: {where} is {before!r} there, but {after!r} in what the new '
                        'config builds. Please report this, with the config')


def differences(old: dict[str, Any], cfg: Config,
                parts: Parts) -> Iterator[tuple[str, Any, Any]]:
    """What was built in another way than an old config says: key, old value, built value."""
    yield from _model_differences(old.get('model') or {}, parts.model, 'model')
    optimizer = old.get('optimizer') or {}
    if parts.optim_wrapper is not None:
        for key, value in parts.optim_wrapper.optimizer.defaults.items():
            if key in optimizer and _as_lists(optimizer[key]) != _as_lists(value):
                yield f'optimizer.{key}', optimizer[key], value
        paramwise = optimizer.get('paramwise_cfg') or {}
        rate = paramwise.get('decay_rate', paramwise.get('layer_decay_rate'))
        layers, stem = paramwise.get('num_layers'), [
            group['lr_scale'] for group in parts.optim_wrapper.param_groups
            if str(group.get('group_name')).startswith('layer_0_')]
        if rate and isinstance(layers, int) and stem and 'custom_keys' not in paramwise:
            # For a larger backbone than it counts for, num_layers was completed.
            layers = max(layers, cfg.optim_wrapper.paramwise_cfg.num_layers)
            expected = rate ** (layers + 1)  # the stem is the first of num_layers + 2
            if abs(stem[0] - expected) > 1e-9 * expected:
                yield 'the learning rate of the stem, relative to the heads', expected, stem[0]
    runner = old.get('runner') or {}
    for key in ('max_iters', 'max_epochs'):
        if key in runner and cfg.train_cfg.get(key, runner[key]) != runner[key]:
            yield f'runner.{key}', runner[key], cfg.train_cfg.get(key)
    data = old.get('data') or {}
    size = (data.get('train_dataloader') or {}).get('samples_per_gpu', data.get('samples_per_gpu'))
    if size is not None and cfg.train_dataloader.batch_size != size:
        yield 'data.samples_per_gpu', size, cfg.train_dataloader.batch_size


def _model_differences(old: dict[str, Any], built: nn.Module,
                       path: str) -> Iterator[tuple[str, Any, Any]]:
    """Settings of the old config that a module keeps as attributes, with another value."""
    for key, value in old.items():
        part = getattr(built, key, None)
        if isinstance(value, dict) and isinstance(part, nn.Module):
            yield from _model_differences(value, part, f'{path}.{key}')
        elif isinstance(value, (list, tuple)) and isinstance(part, nn.ModuleList):
            for i, (one, module) in enumerate(zip(value, part, strict=False)):
                if isinstance(one, dict):
                    yield from _model_differences(one, module, f'{path}.{key}.{i}')
        elif key == 'test_cfg' and isinstance(value, dict) and isinstance(part, dict):
            for name in ('mode', 'crop_size', 'stride'):
                if name in value and _as_lists(value[name]) != _as_lists(part.get(name)):
                    yield f'{path}.{key}.{name}', value[name], part.get(name)
        elif (key != 'in_index' and isinstance(value, (int, float))  # out_indices may be fewer
              and isinstance(part, (int, float)) and part != value):
            yield f'{path}.{key}', value, part


def _as_lists(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
