"""Names at the top of a config: short ways to set what stands deep inside, and misspelt keys."""
from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from ..datasets import DATA_KEYS
from ..datasets.completion import find_transforms, wrapped_datasets_of_split
from ..errors import UserError
from ..utils import plain, suggest
from .edits import Edits, lookup, pair, same
from .runtime import metric_names

RUNNER_KEYS = (
    'model', 'work_dir', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'train_cfg',
    'val_cfg', 'test_cfg', 'auto_scale_lr', 'optim_wrapper', 'param_scheduler', 'val_evaluator',
    'test_evaluator', 'default_hooks', 'custom_hooks', 'data_preprocessor', 'load_from', 'resume',
    'launcher', 'env_cfg', 'log_processor', 'log_level', 'visualizer', 'default_scope',
    'randomness', 'experiment_name', 'runner_type', 'custom_imports', 'tta_model', 'tta_pipeline',
    'find_unused_parameters', 'model_wrapper_cfg', 'sync_bn', 'compile', 'strategy')
OWN_KEYS = ('test_time_augmentation', 'check_data', 'fast', 'early_stopping', 'log_to',
            'inference_dtype', 'max_bad_files', 'process_timeout', 'shard_optimizer',
            'shard_model', 'distil', *DATA_KEYS)

SHORT: dict[str, tuple[str, ...]] = dict(
    max_iters=('train_cfg.max_iters',), max_epochs=('train_cfg.max_epochs',),
    val_interval=('train_cfg.val_interval',), batch_size=('train_dataloader.batch_size',),
    num_workers=tuple(f'{split}_dataloader.num_workers' for split in ('train', 'val', 'test')),
    dataset_type=tuple(f'{split}_dataloader.dataset.type' for split in ('train', 'val', 'test')),
    lr=('optim_wrapper.optimizer.lr',), weight_decay=('optim_wrapper.optimizer.weight_decay',),
    seed=('randomness.seed',), drop_path_rate=('model.backbone.drop_path_rate',),
    arch=('model.backbone.arch',), depths=('model.backbone.depths',),
    dims=('model.backbone.dims',), in_chans=('model.backbone.in_chans',),
    norm_cfg=('model.decode_head.norm_cfg', 'model.auxiliary_head.norm_cfg'),
    train_pipeline=('train_dataloader.dataset.pipeline',),
    test_pipeline=tuple(f'{split}_dataloader.dataset.pipeline' for split in ('val', 'test')))
"""Short names, and where their values belong."""

INSTEAD = dict(
    epochs='max_epochs', num_epochs='max_epochs', total_epochs='max_epochs', iters='max_iters',
    num_iters='max_iters', total_iters='max_iters', learning_rate='lr',
    samples_per_gpu='batch_size',
    workers_per_gpu='num_workers', img_size='crop_size and scale', image_size='crop_size and scale',
    img_scale='scale', input_size='crop_size and scale', num_class='classes=(...)',
    class_names='classes=(...)', CLASSES='classes=(...)', PALETTE='palette=[...]',
    pretrained="model=dict(backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=...)))",
    optimizer='optim_wrapper=dict(optimizer=dict(...))')
"""Names that other frameworks use, and what to write here."""


def misspelt_keys(edits: Edits) -> None:
    """A key that nothing reads is not one that somebody meant.

    Variables of a config stand at its top level as well: only what is close to a key is refused.

    Raises:
        UserError: Names the key that was meant.
    """
    if not edits.recipe:
        return  # such as a config that mmengine wrote into a work dir, with all variables
    known = [*RUNNER_KEYS, *OWN_KEYS]
    for key, value in edits.cfg.items():
        if key in known or key in edits.recipe or key in SHORT or not isinstance(
                value, (dict, list, tuple)):
            continue
        hint = suggest(key, known, cutoff=0.85)
        if hint and not _is_used(edits, key, value):
            raise UserError(f'The config sets {key}, which nothing reads.{hint}')
    for key, instead in INSTEAD.items():
        if key in edits.cfg and key not in edits.recipe and not _is_used(
                edits, key, edits.cfg[key]):
            raise UserError(f'The config sets {key}={_short(edits.cfg[key])}, which nothing reads: '
                            f'write {instead}')


def short_names_and_settings(edits: Edits) -> None:
    """A name of :data:`SHORT` reaches where it belongs.

    Raises:
        UserError: The setting has another value of the user's.
    """
    for name, paths in SHORT.items() if edits.recipe else ():
        value = edits.get(name)
        if value is None or not edits.is_set(name):
            continue
        for path in _inside_datasets(edits, paths):
            parent = path.rpartition('.')[0]
            if not isinstance(edits.get(parent), dict):
                if name == 'seed' and edits.get(parent) is None:
                    edits.put(parent, {})
                else:
                    continue
            if same(edits.get(path), value):
                continue
            name_set, path_set = edits.set_in(name), edits.set_in(path)
            if name_set == path_set and len(paths) == 1 and not isinstance(value, (dict, list)):
                raise UserError(f'{name}={_short(value)} contradicts {path}='
                                f'{_short(edits.get(path))}: remove one of them')
            if name_set >= path_set:
                continue  # a variable that the setting has since overridden
            if name in ('max_iters', 'max_epochs') and path.rpartition('.')[2] not in (
                    edits.get('train_cfg') or {}):
                other = 'max_epochs' if name == 'max_iters' else 'max_iters'
                raise UserError(f'{name}={value}, but this recipe trains by '
                                f'{other.removeprefix("max_")}: set {other}')
            edits.put(path, deepcopy(value))
            if path.rpartition('.')[2] != name:
                edits.note(f'={_short(value)} follows {name}', path)


def _inside_datasets(edits: Edits, paths: tuple[str, ...]) -> Iterator[str]:
    """The paths; those of a dataset that is a wrapper are in each dataset inside."""
    for path in paths:
        split, dataset, key = path.partition('_dataloader.dataset.')
        if not dataset:
            yield path
        for chain in wrapped_datasets_of_split(edits.cfg, split) if dataset else ():
            yield f'{next(iter(chain))}.{key}'


def crop_size_and_pipeline(edits: Edits) -> None:
    """``crop_size``, (height, width), reaches every crop of the training's images.

    Raises:
        UserError: The user has set another crop.
    """
    if edits.get('default_scope') != 'mmseg' or not edits.recipe or not edits.is_set('crop_size'):
        return
    chosen = pair('crop_size', edits.get('crop_size'))
    for path in edits.pipelines('train'):
        before = [one.get('crop_size') for one in edits.recipes_pipeline(path)
                  if one['type'] == 'RandomCrop']
        for i, step in enumerate(edits.get(path)):
            if step['type'] != 'RandomCrop' or pair(
                    f'{path}.{i}.crop_size', step.get('crop_size')) == chosen:
                continue
            newer = edits.set_in('crop_size') < edits.set_in(path)
            if not newer and not any(same(step.get('crop_size'), one) for one in before):
                raise UserError(f'crop_size={chosen} contradicts {path}.{i}.crop_size='
                                f'{step.get("crop_size")}: remove one of them')
            step['crop_size'] = chosen
            edits.note(f'={chosen} follows crop_size', f'{path}.{i}.crop_size')


def scale_and_pipelines(edits: Edits) -> None:
    """``scale``, (width, height), reaches every resize of images that had the recipe's.

    For a detector, the sizes and crops of its training keep their share of the test's size.

    Raises:
        UserError: It is no pair of numbers, or ``crop_size`` is set for a detector.
    """
    detector = edits.get('default_scope') == 'mmdet'
    if detector and edits.recipe and edits.is_set('crop_size') and not _is_used(
            edits, 'crop_size', edits.get('crop_size')):
        raise UserError(f'crop_size={edits.get("crop_size")!r} is a setting of segmentation: a '
                        'detector sees whole images, whose size is scale=(width, height)')
    if edits.get('scale') is None or not edits.is_set('scale') or not edits.recipe:
        return
    scale = pair('scale', edits.get('scale'))
    # The recipe, and the config that this scale was set on, which may have pipelines of its own.
    written = [(state, old) for state in (
        edits.recipe, edits.history[min(edits.set_in('scale') + 1, len(edits.history) - 1)])
        if (old := _scale_of(state)) is not None]

    def scaled(pair: Any, old: Any) -> tuple[int, int]:
        return tuple(max(1, round(one * end(scale) / end(old))) for one, end in zip(
            pair, (min, max) if pair[0] <= pair[1] else (max, min), strict=True))
    for path in edits.pipelines('train', 'val', 'test'):  # tta_pipeline follows that of the test
        for kind in ('Resize', 'RandomResize'):
            for step in find_transforms(edits.get(path), kind):
                if any(same(step.get('scale'), old) for _, old in written):
                    step['scale'] = scale
                    edits.note(f' scale images to {scale}', path)
        if not detector or not same(lookup(edits.history[0], path), edits.recipes_pipeline(path)):
            continue
        for kind, key in (('RandomChoiceResize', 'scales'), ('RandomCrop', 'crop_size')):
            before = [(list(find_transforms(lookup(state, place), kind)), old)
                      for state, old in written
                      for place in (path, f'{path.partition("_")[0]}_pipeline')]
            for i, step in enumerate(find_transforms(edits.get(path), kind)):
                values = step.get(key) or ()
                old = next((old for steps, old in before if i < len(steps)
                            and same(values, steps[i].get(key))), None)
                if old is not None:
                    # The crop is a range of heights and widths.
                    step[key] = [scaled(one, old) for one in values] if key == 'scales' else tuple(
                        max(1, round(one * min(scale) / min(old))) for one in values)
                    edits.note(f' {kind} in the same share', path)


def _scale_of(state: dict[str, Any]) -> Any:
    """The scale of a config's images, otherwise of its test's."""
    return state.get('scale') or next((step.get('scale') for step in find_transforms(
        lookup(state, 'test_dataloader.dataset.pipeline'), 'Resize')), None)


def early_stopping_and_hooks(edits: Edits) -> None:
    """``early_stopping=N``: stop after N validations without a better metric.

    The metric is that of ``save_best``; if this names none, the main one of ``val_evaluator``.

    Raises:
        UserError: It is no whole number from 1 up, or the metric is unknown.
    """
    patience = edits.get('early_stopping')
    if patience is None:
        return
    if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
        raise UserError(f'early_stopping={patience!r} must be a whole number from 1 up: the '
                        'validations to wait for a better metric')
    hooks = list(edits.get('custom_hooks') or [])
    if not any(hook.get('type') == 'EarlyStoppingHook' for hook in hooks):
        best = edits.get('default_hooks.checkpoint.save_best')
        metric = best if isinstance(best, str) else next(iter(best or ()), None)
        if metric in (None, 'auto'):
            metric = next(iter(metric_names(edits) or ()), None)
        if metric is None:
            raise UserError(f'early_stopping={patience} needs a metric of the validation: name it '
                            "in default_hooks=dict(checkpoint=dict(save_best='…'))")
        edits.cfg.custom_hooks = [*hooks, dict(
            type='EarlyStoppingHook', monitor=metric, rule='greater', patience=patience)]
        edits.note(f'EarlyStoppingHook: stops after {patience} validations without a better '
                   f'{metric}')


LOG_TO = dict(tensorboard='TensorboardVisBackend', wandb='WandbVisBackend',
              mlflow='MLflowVisBackend')
"""Where scalars are logged in addition to files, and the class of mmengine."""


def log_to_and_vis_backends(edits: Edits) -> None:
    """``log_to='tensorboard'``: the scalars of the log there as well.

    Raises:
        UserError: It is not a name of :data:`LOG_TO`, or several.
    """
    names = edits.get('log_to')
    if names is None:
        return
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, (list, tuple)) or not all(
            isinstance(name, str) and name in LOG_TO for name in names):
        raise UserError(f'log_to={edits.get("log_to")!r} must be one of '
                        f'{", ".join(map(repr, LOG_TO))}, or a list of them')
    backends = list(edits.get('visualizer.vis_backends') or [])
    for name in names:
        if not any(backend.get('type') == LOG_TO[name] for backend in backends):
            backends.append(dict(type=LOG_TO[name]))
            edits.note(f'{LOG_TO[name]}: scalars also go to {name}')
    edits.cfg.visualizer.vis_backends = backends


def _is_used(edits: Edits, name: str, value: Any) -> bool:
    """Whether a value stands somewhere else in the config: then the name is a variable."""
    wanted = plain(value)

    def stands(node: Any) -> bool:
        if plain(node) == wanted:
            return True
        children = node.values() if isinstance(node, dict) else node if isinstance(
            node, (list, tuple)) else ()
        return any(stands(child) for child in children)
    return any(stands(node) for key, node in edits.cfg.items() if key != name)


def _short(value: Any) -> str:
    text = repr(plain(value)) if isinstance(value, dict) else repr(value)
    return text if len(text) <= 60 else f'{text[:57]}...'


