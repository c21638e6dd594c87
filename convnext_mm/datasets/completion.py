"""A config that says ``data_root``, paths and ``classes`` becomes one that says all of it.

mmengine merges a config into the recipe it inherits, but what the recipe has derived from its own
values (the data sets' roots, the evaluator's file, the heads' ``num_classes``) stays as it was.
:func:`complete` lets these follow, where the user has not set them as well.
"""
from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..errors import UserError

SPLITS = ('train', 'val', 'test')
KEYS = ('data_root', 'classes', 'palette', 'reduce_zero_label', 'img_suffix', 'seg_map_suffix')
"""Keys at the top of a config that :func:`complete` spreads over it."""


def complete(cfg: Config) -> None:
    """Let data sets, evaluators and heads of ``cfg`` follow its :data:`KEYS`, in place.

    - ``data_root``: into every data set and evaluator that has the recipe's.
    - paths of ``val_dataloader``: into ``test_dataloader`` and the evaluators.
    - ``classes`` (a tuple, or a text file with a name a line) and ``palette``: into the data sets.
    - the number of classes: into every head, whether ``classes`` or a data set's ``metainfo``
      says them.
    - ``reduce_zero_label``, ``img_suffix``, ``seg_map_suffix`` (segmentation): into data sets
      and pipelines.

    Args:
        cfg: As read from its file, which says what was inherited, and with the options of the
            command line.

    Raises:
        UserError: Values that contradict each other.
    """
    if cfg.get('default_scope') not in ('mmseg', 'mmdet') or not find_spec(cfg.default_scope):
        return
    inherited = ancestors(cfg.filename)
    if cfg.get('data_root') is not None:
        for root in {a.get('data_root') for a in inherited} - {None, cfg.data_root}:
            move_data(cfg, root, cfg.data_root)
    _follow_validation(cfg, inherited)
    _spread_classes(cfg, inherited)
    if cfg.default_scope == 'mmseg':
        _spread_mask_settings(cfg)
    _spread_num_classes(cfg, inherited)


_raw: list[bool] = []


def completes_configs() -> bool:
    """Whether config files are completed when read: not inside :func:`as_written`."""
    return not _raw


@contextmanager
def as_written() -> Iterator[None]:
    """Config files read inside this context are not completed."""
    _raw.append(True)
    try:
        yield
    finally:
        _raw.pop()


def ancestors(path: str | None) -> list[Config]:
    """The configs that a config file inherits, nearest first."""
    found: list[Config] = []
    for base in Config._get_base_files(path) if path and os.path.isfile(path) else ():
        if '::' not in base:  # those of an installed toolbox are no recipes of ours
            file = os.path.join(os.path.dirname(path), base)
            with as_written():
                found.append(Config.fromfile(file, import_custom_modules=False))
            found += ancestors(file)
    return found


def move_data(node: Any, old: str, new: str) -> None:
    """Replace ``old`` as the root of every path below ``node``."""
    if isinstance(node, Config):
        node = node._cfg_dict
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        if isinstance(value, (dict, list)):
            move_data(value, old, new)
        elif key in ('data_root', 'ann_file') and isinstance(value, str):
            if value.rstrip('/') == old.rstrip('/'):
                node[key] = new
            elif value.startswith(old.rstrip('/') + '/'):
                node[key] = os.path.join(new, value[len(old):].lstrip('/'))


def unwrapped(dataset: Any) -> Iterator[dict]:
    """The data sets inside wrappers such as RepeatDataset and ConcatDataset."""
    if not isinstance(dataset, dict):
        return
    inner = dataset.get('dataset') or dataset.get('datasets')
    if inner is None:
        yield dataset
    for one in inner if isinstance(inner, (list, tuple)) else [inner]:
        yield from unwrapped(one)


def of_split(cfg: Config, split: str) -> list[dict]:
    """The data sets of 'train', 'val' or 'test'."""
    loader = cfg.get(f'{split}_dataloader')
    return list(unwrapped(loader.get('dataset') if loader else None))


def evaluators(cfg: Config, split: str) -> list[dict]:
    """The metrics of 'val' or 'test'."""
    found = cfg.get(f'{split}_evaluator') or []
    return list(found) if isinstance(found, (list, tuple)) else [found]


def classes_of(dataset: dict, scope: str) -> tuple[str, ...]:
    """The classes of a data set's config: its own or, without any, those of its type."""
    return _names(meta_of(dataset, scope).get('classes') or ())


def meta_of(dataset: dict, scope: str) -> dict:
    """``classes`` and ``palette`` of a data set's config; a type's colours are of its classes."""
    own = dict(dataset.get('metainfo') or {})
    return own if own.get('classes') else {**_meta(dataset, scope), **own}


def heads(model: Any, path: str = 'model') -> Iterator[tuple[str, dict]]:
    """Every (path, head) in a model's config that says ``num_classes``."""
    if isinstance(model, dict):
        for key, value in model.items():
            # Proposals have no classes; a semantic branch has classes of its own.
            if key in ('rpn_head', 'semantic_head', 'backbone', 'train_cfg', 'test_cfg'):
                continue
            if key.endswith('_head') and isinstance(value, dict) and 'num_classes' in value:
                yield f'{path}.{key}', value
            elif key.endswith('_head') and isinstance(value, (list, tuple)):
                for i, head in enumerate(value):
                    if 'num_classes' in head:
                        yield f'{path}.{key}.{i}', head
            else:
                yield from heads(value, f'{path}.{key}')


def _follow_validation(cfg: Config, inherited: Sequence[Config]) -> None:
    """Test on what is validated on, and evaluate by the data set's file, as the recipe does."""
    recipe = next((a for a in inherited if 'val_dataloader' in a and 'test_dataloader' in a), None)
    if recipe is None:
        return
    (val, test), (old_val, old_test) = ([next(iter(of_split(c, s)), {}) for s in ('val', 'test')]
                                        for c in (cfg, recipe))
    for key in ('ann_file', 'data_prefix', 'data_root', 'type', 'metainfo'):
        if (key in val and val[key] != old_val.get(key) and test
                and test.get(key) == old_test.get(key) == old_val.get(key)):
            test[key] = val[key]
    for split in ('val', 'test'):
        dataset = next(iter(of_split(cfg, split)), {})
        before = next(iter(of_split(recipe, split)), {}).get('ann_file')
        for metric in evaluators(cfg, split):
            path, root = metric.get('ann_file'), dataset.get('data_root') or ''
            roots = {root, *(a.get('data_root') or '' for a in inherited)}
            if path and before and dataset.get('ann_file') and any(
                    os.path.normpath(path) == os.path.normpath(os.path.join(r, before))
                    for r in roots):
                metric['ann_file'] = os.path.join(root, dataset['ann_file'])


def _spread_classes(cfg: Config, inherited: Sequence[Config]) -> None:
    """``classes`` and ``palette`` into the data sets.

    Raises:
        UserError: Names that are none, repeated, or others than a data set's own.
    """
    classes, palette = cfg.get('classes'), cfg.get('palette')
    if classes is None:
        if palette is not None:
            raise UserError('palette is set without classes: set classes=(...) as well, a name '
                            'for every colour')
        return
    classes = _names(classes)
    if palette is not None:
        wrong = [c for c in palette if not isinstance(c, (list, tuple)) or len(c) != 3
                 or not all(isinstance(v, int) and 0 <= v <= 255 for v in c)]
        if wrong or len(palette) != len(classes):
            raise UserError(f'palette={palette!r} must have a colour [red, green, blue] from 0 to '
                            f'255 for each of the {len(classes)} classes')
    for split in SPLITS:
        old = [(d.get('metainfo') or {}).get('classes')
               for a in inherited for d in of_split(a, split)]
        for dataset in of_split(cfg, split):
            own = (dataset.get('metainfo') or {}).get('classes')
            if own is not None and own not in old and _names(own) != classes:
                raise UserError(f'classes={classes!r} contradicts {split}_dataloader.dataset.'
                                f'metainfo.classes={tuple(own)!r}: leave one of them out')
            meta = dict(classes=classes)
            if palette is not None:
                meta['palette'] = [tuple(color) for color in palette]
            _drop_type(cfg, dataset, classes, inherited)
            dataset['metainfo'] = meta


def _drop_type(cfg: Config, dataset: dict, classes: Sequence[str],
               inherited: Sequence[Config]) -> None:
    """Make of a recipe's data set, such as ADE20K's, one without classes of its own.

    mmseg maps a mask's values from the classes of the type to those that are asked for. That is
    meant where the data is the recipe's and the classes are some of its classes.
    """
    if cfg.default_scope != 'mmseg':
        return
    known = _meta(dataset, 'mmseg').get('classes')
    if not known:
        return
    places = [(d.get('data_root'), d.get('data_prefix')) for a in inherited for split in SPLITS
              for d in of_split(a, split)]
    if set(classes) <= set(known) and (
            dataset.get('data_root'), dataset.get('data_prefix')) in places:
        return
    defaults = inspect.signature(registry_of('mmseg').get(dataset['type']).__init__).parameters
    for key in ('img_suffix', 'seg_map_suffix'):
        if key in defaults and defaults[key].default is not inspect.Parameter.empty:
            dataset.setdefault(key, defaults[key].default)
    dataset['type'] = 'BaseSegDataset'


def _spread_mask_settings(cfg: Config) -> None:
    """``reduce_zero_label`` and the suffixes into data sets and pipelines.

    What a data set says goes before its pipeline's, since mmseg stops where they differ.
    """
    for split in SPLITS:
        for dataset in of_split(cfg, split):
            loaders = list(steps_of(dataset.get('pipeline'), 'LoadAnnotations'))
            said = [cfg.get('reduce_zero_label'), dataset.get('reduce_zero_label'),
                    *(step.get('reduce_zero_label') for step in loaders)]
            reduce = next((value for value in said if value is not None), None)
            if reduce is not None:
                if not isinstance(reduce, bool):
                    raise UserError(f'reduce_zero_label={reduce!r} must be True (0 in a mask is no '
                                    'class) or False (0 is the first class)')
                for node in (dataset, *loaders):
                    node['reduce_zero_label'] = reduce
            for key in ('img_suffix', 'seg_map_suffix'):
                if cfg.get(key) is not None:
                    dataset[key] = cfg[key]
    reduce = cfg.get('reduce_zero_label')
    if reduce is not None:
        for step in steps_of(cfg.get('tta_pipeline'), 'LoadAnnotations'):
            step['reduce_zero_label'] = reduce


def _spread_num_classes(cfg: Config, inherited: Sequence[Config]) -> None:
    """The number of classes into every head.

    Raises:
        UserError: Splits with other classes, or a head with a number of its own.
    """
    found = {f'{split}_dataloader': classes_of(dataset, cfg.default_scope)
             for split in SPLITS for dataset in of_split(cfg, split)}
    found = {where: classes for where, classes in found.items() if classes}
    if not found:
        return
    first, classes = next(iter(found.items()))
    for where, others in found.items():
        if others != classes:
            raise UserError(f'{first} has the classes {_listed(classes)}, {where} has '
                            f'{_listed(others)}: say classes=(...) once, at the top of the config')
    old = {head['num_classes'] for a in inherited for _, head in heads(a.get('model'))}
    for path, head in heads(cfg.get('model')):
        if head['num_classes'] == len(classes):
            continue
        if head['num_classes'] not in old:
            raise UserError(
                f'{path}.num_classes={head["num_classes"]}, but the data set has {len(classes)} '
                f'classes: {_listed(classes)}. Leave num_classes out, it follows; the classes '
                'are those that classes=(...) says at the top of the config')
        head['num_classes'] = len(classes)


def _names(classes: Any) -> tuple[str, ...]:
    """Class names from a sequence or a text file.

    Raises:
        UserError: Not a sequence of different names.
    """
    if isinstance(classes, str):
        if not os.path.isfile(classes):
            raise UserError(f"classes={classes!r} is one word: write ('{classes}',) with a comma "
                            'for a single class, or the path of a text file with a name a line')
        lines = Path(classes).read_text(encoding='utf-8').splitlines()
        classes = [line.strip() for line in lines if line.strip()]
    if not isinstance(classes, (list, tuple)) or not all(isinstance(c, str) for c in classes):
        raise UserError(f"classes={classes!r} must be names, such as classes=('road', 'car')")
    twice = sorted({name for name in classes if classes.count(name) > 1})
    if twice:
        raise UserError(f'classes: {", ".join(twice)} stands there more than once')
    return tuple(classes)


def _listed(names: Sequence[str], count: int = 8) -> str:
    more = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(names[:count]) + more


def steps_of(pipeline: Any, kind: str) -> Iterator[dict]:
    """Every step of a type in a pipeline, also inside others."""
    if isinstance(pipeline, dict):
        if pipeline.get('type') == kind:
            yield pipeline
        pipeline = list(pipeline.values())
    for step in pipeline if isinstance(pipeline, (list, tuple)) else ():
        yield from steps_of(step, kind)


def _meta(dataset: dict, scope: str) -> dict:
    """What the class of a data set says about itself."""
    kind = dataset.get('type')
    kind = registry_of(scope).get(kind) if isinstance(kind, str) else kind
    return getattr(kind, 'METAINFO', {})


def registry_of(scope: str) -> Any:
    """The DATASETS of mmseg or mmdet, which is imported now."""
    return import_module(f'{scope}.registry').DATASETS
