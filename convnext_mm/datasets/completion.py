"""Completes a config that sets ``data_root``, paths and ``classes``.

mmengine merges a config into the recipe that it inherits, but values that the recipe derived from
others (dataset roots, the evaluator's file, the heads' ``num_classes``) stay as they were.
:func:`complete_config` updates them, unless the user has set them too.
"""
from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from copy import deepcopy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from mmengine.config import Config

from ..bases import inherited_configs
from ..errors import UserError
from ..visualization import distinct_colors
from .coco import read_categories

SPLITS = ('train', 'val', 'test')
DATA_KEYS = ('data_root', 'classes', 'palette', 'reduce_zero_label', 'ignore', 'masks',
             'val', 'img_suffix', 'seg_map_suffix')
"""Top-level keys of a config that :func:`complete_config` copies to where they are used."""


def complete_config(cfg: Config) -> None:
    """Update datasets, evaluators and heads of ``cfg`` from its :data:`DATA_KEYS`, in place.

    - ``data_root`` replaces the recipe's in every dataset and evaluator.
    - Paths of ``val_dataloader`` are copied to ``test_dataloader`` and the evaluators.
    - ``classes`` (a sequence, or a file: :func:`class_names`) and ``palette`` are copied to the
      datasets.
    - The number of classes, from ``classes`` or from a dataset's ``metainfo``, is copied to every
      head.
    - ``reduce_zero_label``, ``img_suffix`` and ``seg_map_suffix`` (segmentation) are copied to
      datasets and pipelines.

    Args:
        cfg: Read from a file, whose name leads to the inherited configs, and merged with the
            options of the command line.

    Raises:
        UserError: Values contradict each other.
    """
    if cfg.get('default_scope') not in ('mmseg', 'mmdet') or not find_spec(cfg.default_scope):
        return
    follow_data_root(cfg)
    inherited = list(inherited_configs(cfg.filename))
    _follow_validation(cfg, inherited)
    _set_classes(cfg, inherited)
    if cfg.default_scope == 'mmseg':
        _set_mask_options(cfg)
    _set_num_classes(cfg, inherited)


def follow_data_root(cfg: Config, changed: Config | None = None) -> None:
    """Replace the recipe's ``data_root`` in every dataset and evaluator by the user's, in place.

    Args:
        cfg: The user's config.
        changed: The config to change; None: ``cfg``.
    """
    if cfg.get('data_root') is not None:
        roots = {base.get('data_root') for base in inherited_configs(cfg.filename)}
        for root in roots - {None, cfg.data_root}:
            replace_data_root(cfg if changed is None else changed, root, cfg.data_root)


def replace_data_root(node: Any, old: str, new: str) -> None:
    """Replace ``old`` as the root of every path below ``node``, in place."""
    if isinstance(node, Config):
        node = node._cfg_dict
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        if isinstance(value, (dict, list)):
            replace_data_root(value, old, new)
        elif key in ('data_root', 'ann_file') and isinstance(value, str):
            if value.rstrip('/') == old.rstrip('/'):
                node[key] = new
            elif value.startswith(old.rstrip('/') + '/'):
                node[key] = os.path.join(new, value[len(old):].lstrip('/'))


def wrapped_datasets(dataset: Any, path: str) -> Iterator[dict[str, dict]]:
    """Each dataset config, and those of wrappers such as RepeatDataset around it.

    Yields:
        {path: config}, the innermost first, in the order in which an image passes their pipelines.
    """
    if not isinstance(dataset, dict):
        return
    key = 'dataset' if dataset.get('dataset') else 'datasets'
    inner: Any = dataset.get(key)
    if inner is None:
        yield {path: dataset}
    listed = isinstance(inner, (list, tuple))
    for i, one in enumerate(inner if listed else [inner]):
        for chain in wrapped_datasets(one, f'{path}.{key}' + f'.{i}' * listed):
            yield {**chain, path: dataset}


def wrapped_datasets_of_split(cfg: Config | dict, split: str) -> list[dict[str, dict]]:
    """The :func:`wrapped_datasets` of 'train', 'val' or 'test'."""
    loader = cfg.get(f'{split}_dataloader')
    return list(wrapped_datasets(loader.get('dataset') if loader else None,
                                 f'{split}_dataloader.dataset'))


def datasets_of_split(cfg: Config, split: str) -> list[dict]:
    """The dataset configs of 'train', 'val' or 'test', without wrappers."""
    return [next(iter(chain.values())) for chain in wrapped_datasets_of_split(cfg, split)]


def metrics_of_split(cfg: Config, split: str) -> list[dict]:
    """The metric configs of 'val' or 'test'."""
    evaluator = cfg.get(f'{split}_evaluator') or []
    return list(evaluator) if isinstance(evaluator, (list, tuple)) else [evaluator]


def dataset_classes(dataset: dict, scope: str) -> tuple[str, ...]:
    """The classes of a dataset config, by default those of its type; () if it has none."""
    return class_names(dataset_metainfo(dataset, scope).get('classes') or ())


def dataset_metainfo(dataset: dict, scope: str) -> dict:
    """``classes`` and ``palette`` of a dataset config, by default those of its type.

    With classes of its own, it does not take the palette of its type.
    """
    own = dict(dataset.get('metainfo') or {})
    return own if own.get('classes') else {**metainfo_of_type(dataset, scope), **own}


def heads_with_classes(model: Any, path: str = 'model') -> Iterator[tuple[str, dict]]:
    """Every (path, head config) in a model config that sets ``num_classes``."""
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
                yield from heads_with_classes(value, f'{path}.{key}')


def _follow_validation(cfg: Config, inherited: Sequence[Config]) -> None:
    """Copy changed settings of the validation data to the test data and evaluators.

    Only where the recipe tests on its validation data and evaluates with the dataset's file. The
    recipe is the farthest config with both: what lies between is the user's as well.

    Raises:
        UserError: Detections on several datasets would be compared with the file of one of them.
    """
    recipe = next((base for base in reversed(inherited)
                   if 'val_dataloader' in base and 'test_dataloader' in base), None)
    if recipe is None:
        return
    recipe = deepcopy(recipe)
    follow_data_root(cfg, recipe)
    (vals, tests), (old_vals, old_tests) = (
        [datasets_of_split(c, split) for split in ('val', 'test')] for c in (cfg, recipe))
    if len(tests) == len(old_vals) == len(old_tests) == 1:
        test, old_val, old_test = tests[0], old_vals[0], old_tests[0]

        def follows(key: str) -> bool:
            return test.get(key) == old_test.get(key) == old_val.get(key)
        if len(vals) == 1:
            for key, value in vals[0].items():
                if value != old_val.get(key) and follows(key):
                    test[key] = value
        elif vals and all(map(follows, ('data_root', 'ann_file', 'data_prefix', 'indices'))):
            cfg.test_dataloader.dataset = deepcopy(cfg.val_dataloader.dataset)
            if not follows('pipeline'):
                for dataset in datasets_of_split(cfg, 'test'):
                    dataset['pipeline'] = deepcopy(test['pipeline'])
    val_evaluator, old_evaluator = cfg.get('val_evaluator'), recipe.get('val_evaluator')
    if (val_evaluator and val_evaluator != old_evaluator
            and cfg.get('test_evaluator') == recipe.get('test_evaluator') == old_evaluator):
        cfg.test_evaluator = deepcopy(val_evaluator)
    for split in ('val', 'test'):
        found = datasets_of_split(cfg, split)
        files = list(dict.fromkeys(os.path.join(one.get('data_root') or '', one['ann_file'])
                                   for one in found if one.get('ann_file')))
        old_file = next(iter(datasets_of_split(recipe, split)), {}).get('ann_file')
        roots = {one.get('data_root') or '' for one in (cfg, *found, *inherited)}
        old_files = {os.path.normpath(os.path.join(root, old_file)) for root in roots
                     } if old_file else set()
        for metric in metrics_of_split(cfg, split):
            path = os.path.normpath(metric.get('ann_file') or '')
            if len(files) > 1 and path in old_files | set(map(os.path.normpath, files)):
                raise UserError(
                    f'{split}_dataloader has {len(files)} annotation files, {", ".join(files)}, '
                    f'but {split}_evaluator compares with one, in which the images of the others '
                    'are missing or have the same ids. Join them to one file with unique ids, or '
                    f'name one dataset in {split}_dataloader')
            if files and path in old_files:
                metric['ann_file'] = files[0]


def _set_classes(cfg: Config, inherited: Sequence[Config]) -> None:
    """Copy ``classes`` and ``palette`` to the datasets.

    Raises:
        UserError: Invalid or repeated names, or names that contradict a dataset's own.
    """
    classes, palette = cfg.get('classes'), cfg.get('palette')
    if classes is None:
        if palette is not None:
            raise UserError('palette is set without classes: set classes=(...) as well, with one '
                            'name per color')
        _set_palettes(cfg)
        return
    classes = class_names(classes, cfg.get('data_root'))
    if palette is not None:
        invalid = [c for c in palette if not isinstance(c, (list, tuple)) or len(c) != 3
                   or not all(isinstance(v, int) and 0 <= v <= 255 for v in c)]
        if invalid or len(palette) != len(classes):
            raise UserError(f'palette={palette!r} must have a color [red, green, blue] from 0 to '
                            f'255 for each of the {len(classes)} classes')
    for split in SPLITS:
        old = [(dataset.get('metainfo') or {}).get('classes')
               for base in inherited for dataset in datasets_of_split(base, split)]
        for dataset in datasets_of_split(cfg, split):
            before = dataset.get('metainfo') or {}
            own = before.get('classes')
            if own is not None and own not in old and class_names(own) != classes:
                raise UserError(f'classes={classes!r} contradicts {split}_dataloader.dataset.'
                                f'metainfo.classes={tuple(own)!r}: remove one of them')
            # Without one, mmseg would draw random colors, and each picture others.
            given = before.get('palette') or ()
            meta: dict[str, Sequence] = dict(classes=classes, palette=[
                tuple(color) for color in palette or (
                    given if len(given) == len(classes) else distinct_colors(len(classes)))])
            _replace_dataset_type(cfg, dataset, classes, inherited)
            dataset['metainfo'] = meta


def _set_palettes(cfg: Config) -> None:
    """Give data sets that name their classes themselves the colors that all pictures have."""
    for split in SPLITS:
        for dataset in datasets_of_split(cfg, split):
            own = dataset.get('metainfo') or {}
            if not own.get('classes') or own.get('palette'):
                continue
            names, kind = class_names(own['classes']), metainfo_of_type(dataset, cfg.default_scope)
            colors = dict(zip(kind.get('classes') or (), kind.get('palette') or (), strict=False))
            dataset['metainfo'] = dict(own, palette=[
                tuple(color) for color in ([colors[name] for name in names]
                                           if set(names) <= set(colors)
                                           else distinct_colors(len(names)))])


def _replace_dataset_type(cfg: Config, dataset: dict, classes: Sequence[str],
                          inherited: Sequence[Config]) -> None:
    """Change a type with classes of its own, such as ADE20KDataset, to BaseSegDataset.

    mmseg maps mask values from the type's classes to the configured ones. The type stays only
    where that is intended: the recipe's data, with some of its classes.
    """
    if cfg.default_scope != 'mmseg':
        return
    type_classes = metainfo_of_type(dataset, 'mmseg').get('classes')
    if not type_classes:
        return
    recipe_data = [(d.get('data_root'), d.get('data_prefix')) for base in inherited
                   for split in SPLITS for d in datasets_of_split(base, split)]
    if set(classes) <= set(type_classes) and (
            dataset.get('data_root'), dataset.get('data_prefix')) in recipe_data:
        return
    defaults = inspect.signature(dataset_registry('mmseg').get(dataset['type']).__init__).parameters
    for key in ('img_suffix', 'seg_map_suffix'):
        if key in defaults and defaults[key].default is not inspect.Parameter.empty:
            dataset.setdefault(key, defaults[key].default)
    dataset['type'] = 'BaseSegDataset'


def _set_mask_options(cfg: Config) -> None:
    """Copy ``reduce_zero_label`` and the suffixes to datasets and pipelines.

    A dataset's value overrides its pipeline's, since mmseg raises an error if they differ.
    """
    for split in SPLITS:
        for dataset in datasets_of_split(cfg, split):
            loaders = list(find_transforms(dataset.get('pipeline'), 'LoadAnnotations'))
            values = [cfg.get('reduce_zero_label'), dataset.get('reduce_zero_label'),
                      *(loader.get('reduce_zero_label') for loader in loaders)]
            reduce = next((value for value in values if value is not None), None)
            if reduce is not None:
                if not isinstance(reduce, bool):
                    raise UserError(f'reduce_zero_label={reduce!r} must be True (0 in a mask is '
                                    '"no class") or False (0 is the first class)')
                for node in (dataset, *loaders):
                    node['reduce_zero_label'] = reduce
            for key in ('img_suffix', 'seg_map_suffix'):
                if cfg.get(key) is not None:
                    dataset[key] = cfg[key]
    reduce = cfg.get('reduce_zero_label')
    if reduce is not None:
        for loader in find_transforms(cfg.get('tta_pipeline'), 'LoadAnnotations'):
            loader['reduce_zero_label'] = reduce


def _set_num_classes(cfg: Config, inherited: Sequence[Config]) -> None:
    """Copy the number of classes to every head.

    Raises:
        UserError: Splits have different classes, or the user has set another number for a head.
    """
    classes_of_split = [(f'{split}_dataloader', dataset_classes(dataset, cfg.default_scope))
                        for split in SPLITS for dataset in datasets_of_split(cfg, split)]
    classes_of_split = [(split, classes) for split, classes in classes_of_split if classes]
    if not classes_of_split:
        return
    first, classes = classes_of_split[0]
    for split, others in classes_of_split:
        if others != classes:
            raise UserError(f'{first} has the classes {_join_names(classes)}, but {split} has '
                            f'{_join_names(others)}: set classes=(...) once, at the top of the '
                            'config')
    old = {head['num_classes'] for base in inherited
           for _, head in heads_with_classes(base.get('model'))}
    for path, head in heads_with_classes(cfg.get('model')):
        if head['num_classes'] == len(classes):
            continue
        if head['num_classes'] not in old:
            raise UserError(
                f'{path}.num_classes={head["num_classes"]}, but the dataset has {len(classes)} '
                f'classes: {_join_names(classes)}. Remove num_classes: it is set from '
                'classes=(...) at the top of the config. If these are not the classes of your '
                'data, name yours there')
        head['num_classes'] = len(classes)


def class_names(classes: Any, data_root: str | None = None) -> tuple[str, ...]:
    """Class names from a sequence or a file.

    Args:
        classes: Names, or the path of a file: text with one name per line, YAML with ``names`` as
            YOLO's data.yaml has them, or JSON in COCO format.
        data_root: Folder in which a file is looked for as well.

    Raises:
        UserError: Not a sequence of unique names.
    """
    if isinstance(classes, str):
        file = classes
        if not os.path.isfile(file) and data_root:
            file = os.path.join(data_root, classes)
        if not os.path.isfile(file):
            raise UserError(f"classes={classes!r} is not a file: write ('{classes}',), with a "
                            'comma, for a single class, or the path of a text file with one name '
                            "per line, of YOLO's data.yaml, or of a file in COCO format")
        classes = _names_of_file(file)
    if not isinstance(classes, (list, tuple)) or not all(isinstance(c, str) for c in classes):
        raise UserError(f"classes={classes!r} must be names, such as classes=('road', 'car')")
    repeated = sorted({name for name in classes if classes.count(name) > 1})
    if repeated:
        raise UserError(f'classes: {", ".join(repeated)} occurs more than once')
    return tuple(classes)


def _names_of_file(file: str) -> list:
    """The names in a text, YAML or COCO file.

    Raises:
        UserError: There are none.
    """
    if file.endswith('.json'):
        return read_categories(file)
    text = Path(file).read_text(encoding='utf-8')
    if not file.endswith(('.yaml', '.yml')):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        names = (yaml.safe_load(text) or {}).get('names')
    except (yaml.YAMLError, AttributeError):
        names = None
    if isinstance(names, dict):  # {index: name}
        names = [names[index] for index in sorted(names)]
    if not isinstance(names, list) or not names:
        raise UserError(f'{file} has no list names, which YOLO writes the classes in')
    return [str(name) for name in names]


def _join_names(names: Sequence[str], count: int = 8) -> str:
    more = f' and {len(names) - count} more' if len(names) > count else ''
    return ', '.join(names[:count]) + more


def find_transforms(pipeline: Any, kind: str) -> Iterator[dict]:
    """Every transform of type ``kind`` in a pipeline, including nested ones."""
    if isinstance(pipeline, dict):
        if pipeline.get('type') == kind:
            yield pipeline
        pipeline = list(pipeline.values())
    for transform in pipeline if isinstance(pipeline, (list, tuple)) else ():
        yield from find_transforms(transform, kind)


def metainfo_of_type(dataset: dict, scope: str) -> dict:
    """The ``METAINFO`` of a dataset config's class."""
    kind = dataset.get('type')
    kind = dataset_registry(scope).get(kind) if isinstance(kind, str) else kind
    return getattr(kind, 'METAINFO', {})


def dataset_registry(scope: str) -> Any:
    """DATASETS of mmseg or mmdet, imported on demand."""
    return import_module(f'{scope}.registry').DATASETS
