"""``--cfg-options KEY=VALUE``: from the parsed options to the config."""
from __future__ import annotations

from typing import Any

from mmengine.config import Config, ConfigDict

from .. import datasets
from ..errors import UserError
from ..resolution.signatures import arguments_at
from ..resolution.top_level import SHORT
from ..utils import suggest
from . import speed

UNSET_KEYS = {
    '': ('work_dir', 'resume', 'load_from', 'launcher', 'randomness', 'auto_scale_lr',
         'find_unused_parameters', 'model_wrapper_cfg', 'sync_bn', 'compile',
         'experiment_name', 'custom_hooks', 'val_cfg', 'test_cfg', 'test_time_augmentation',
         'check_data', 'fast', 'early_stopping', 'log_to', 'inference_dtype', 'max_bad_files',
         'process_timeout', 'shard_optimizer', 'shard_model', 'distil', *SHORT,
         *datasets.DATA_KEYS),
    'fast': tuple(speed.DEFAULTS),
    'distil': ('teacher', 'checkpoint', 'weight', 'temperature', 'inherit'),
    'optim_wrapper': ('dtype', 'loss_scale', 'accumulative_counts', 'clip_grad')}
"""Valid keys, by group ('': the top level), that a config may leave unset."""


def apply_options(cfg: Config, options: dict[str, Any] | None) -> None:
    """Merge ``--cfg-options`` into ``cfg``.

    Raises:
        UserError: A key looks misspelled, or a value replaces a group of keys.
    """
    for key, value in (options or {}).items():
        node: Any = cfg
        parts = key.split('.')
        for depth, part in enumerate(parts):
            parent = '.'.join(parts[:depth]) or 'the config'
            if isinstance(node, (list, tuple)):
                if not part.isdigit() or int(part) >= len(node):
                    raise UserError(f'--cfg-options {key}: {parent} is a list of length '
                                    f'{len(node)}, expected a smaller index, got {part!r}')
                node = node[int(part)]
                continue
            if not isinstance(node, dict) and not isinstance(node, Config):
                if node is None:
                    break
                raise UserError(f'--cfg-options {key}: {parent} is {node!r} and has no key '
                                f'{part!r}')
            if part not in node:
                names = [*node.keys(), *UNSET_KEYS.get('.'.join(parts[:depth]), ())]
                hint = suggest(part, names, count=3, cutoff=0.5 if depth == 0 else 0.75)
                if part not in names and (depth == 0 or hint) and (
                        part not in arguments_at(cfg, '.'.join(parts[:depth]), node)):
                    known = ', '.join(sorted(n for n in names if not n.startswith('_')))
                    raise UserError(f'--cfg-options {key}: {parent} has no key {part!r}.'
                                    + (hint or f' Its keys: {known}'))
                break
            node = node[part]
        else:
            if isinstance(node, dict) and value is not None and not isinstance(value, dict):
                raise UserError(f'--cfg-options {key}={value!r}: {key} is a group of keys '
                                f'({", ".join(node)}). Set one of them: {key}.KEY=VALUE')
    if options and options.get('data_root') and cfg.get('data_root'):
        datasets.replace_data_root(cfg, cfg.data_root, options['data_root'])
    for key in options or {}:
        _replace_short_names(cfg, key)
    for key, value in (options or {}).items():
        _set_option(cfg, key.split('.'), value)


def _replace_short_names(cfg: Config, key: str) -> None:
    """Let an option override the short name that would set the same value.

    The short name's value moves to all places that it sets, and the name goes: the option may be
    the recipe's own value, which would not look like a change.
    """
    for name, paths in SHORT.items():
        if name not in cfg or not any(f'{path}.'.startswith(f'{key}.') for path in paths):
            continue
        value = cfg._cfg_dict.pop(name)
        for path in paths:
            *parents, last = path.split('.')
            node: Any = cfg
            for parent in parents:
                node = node.get(parent) if isinstance(node, (dict, Config)) else None
            if isinstance(node, dict):
                node[last] = value


def _set_option(cfg: Config, parts: list[str], value: Any) -> None:
    """Set one option, in place; parts may be indices of lists and tuples."""
    node: Any = cfg
    for depth, part in enumerate(parts):
        key: Any = int(part) if isinstance(node, list) else part
        inner = node[key] if isinstance(node, list) else node.get(key)
        if depth == len(parts) - 1:
            merged = isinstance(value, dict) and isinstance(inner, dict)
            node[key] = Config._merge_a_into_b(value, inner) if merged else value
        elif isinstance(inner, tuple):
            node[key] = list(inner)
        elif inner is None:
            node[key] = ConfigDict()
        node = node[key]
