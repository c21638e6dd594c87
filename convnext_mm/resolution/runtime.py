"""Hooks, logs, checkpoints and test-time augmentation that a user's lists must not take away."""
from __future__ import annotations

from copy import deepcopy
from typing import Any

from ..errors import UserError
from ..precision import check_dtype
from ..utils import plain, require_package, suggest
from .batches import resizing
from .edits import Edits, pair, same


def model_in_dtype_and_base(edits: Edits) -> None:
    """A model that infers in another dtype is resolved as what it is (as in a dumped config)."""
    model = _segmentor_or_detector(edits)
    if model.get('type') == 'ModelInDtype':
        model['type'] = model.pop('base')
        del model['inference_dtype']


def inference_dtype_and_model(edits: Edits) -> None:
    """``inference_dtype`` reaches all that builds a model from a config, such as inferencers.

    Raises:
        UserError: It is no known dtype.
    """
    name, model = edits.get('inference_dtype'), _segmentor_or_detector(edits)
    if name is None:
        return
    check_dtype(name)
    if name != 'fp32' and 'type' in model:
        model.update(base=model['type'], type='ModelInDtype', inference_dtype=name)


def _segmentor_or_detector(edits: Edits) -> dict[str, Any]:
    """The config of the model, which test-time augmentation may wrap."""
    return edits.get('model.module') or edits.get('model') or {}


def custom_hooks_and_recipe_hooks(edits: Edits) -> None:
    """A user's ``custom_hooks`` come beside the recipe's, which a list would replace."""
    _add_back(edits, 'custom_hooks')


def vis_backends_and_local_log(edits: Edits) -> None:
    """A user's backends come beside the local one, whose log ``curves.png`` is drawn from."""
    _add_back(edits, 'visualizer.vis_backends')


PACKAGES = dict(TensorboardVisBackend='tensorboard', WandbVisBackend='wandb',
                MLflowVisBackend='mlflow', ClearMLVisBackend='clearml',
                NeptuneVisBackend='neptune', DVCLiveVisBackend='dvclive', AimVisBackend='aim')


def vis_backends_and_packages(edits: Edits) -> None:
    """A backend's package is installed.

    Raises:
        UserError: It is not, and how to install it.
    """
    for backend in edits.get('visualizer.vis_backends') or ():
        package = PACKAGES.get(backend.get('type'))
        if package:
            require_package(package, package + ' future' * (package == 'tensorboard'),
                            f'visualizer.vis_backends: {backend["type"]}')


def _add_back(edits: Edits, path: str) -> None:
    """Add what the recipe's list has to the user's, unless an object of that type is there.

    ``[]`` or None is a user's wish to have none.
    """
    own, before = edits.get(path), edits.inherited(path)
    if not own or not before or not edits.is_set(path):
        return
    types = {one.get('type') for one in own}
    missing = [deepcopy(one) for one in before if one.get('type') not in types]
    if missing:
        edits.put(path, [*missing, *own])
        edits.note(f'{path}: {", ".join(one["type"] for one in missing)} of the recipe are kept '
                   f'beside yours ({path}=[] has none)')


def test_pipeline_and_tta_pipeline(edits: Edits) -> None:
    """Test-time augmentation loads and resizes images as the test pipeline does.

    The recipe's augmentations are put around the user's steps, and its scales are relative to the
    user's: to its scale, or to the size of the images. Sizes of another transform stay as they are.
    """
    pipeline, tta = edits.get('test_dataloader.dataset.pipeline'), edits.get('tta_pipeline')
    before = edits.inherited('test_dataloader.dataset.pipeline')
    if edits.is_set('tta_pipeline') or not pipeline or not tta or not before or (
            plain(pipeline) == plain(before)) or any(
                step['type'] == 'TestTimeAug' for step in pipeline):
        return
    augment = next((step for step in tta if step['type'] == 'TestTimeAug'), None)
    old = next((step.get('scale') for step in before if step['type'] == 'Resize'), None)
    if augment is None or old is None:
        return
    pack = next((i for i, step in enumerate(pipeline) if str(step['type']).startswith('Pack')),
                len(pipeline))
    resizes = list(resizing(pipeline[:pack]))
    own = resizes[0] if [step['type'] for step in resizes] == ['Resize'] else None
    split = pipeline.index(own) if own else 1
    packs = [deepcopy(pipeline[pack:pack + 1])]
    groups: list[list[dict[str, Any]]] = []
    for group in augment['transforms']:
        kinds = {step['type'] for step in group}
        if kinds == {'Resize'}:
            if own or not resizes:
                groups.append([_resize(own, step, old) for step in group])
        elif kinds == {'PackDetInputs'}:
            packs = [deepcopy(group)]  # with what the merge needs to know of a flip
        elif kinds not in ({'LoadAnnotations'}, {'PackSegInputs'}):
            groups.append(deepcopy(group))
    groups += [[deepcopy(step)] for step in pipeline[split + bool(own):pack]]
    new = [*deepcopy(pipeline[:split]), dict(
        type='TestTimeAug', transforms=[*groups, *(one for one in packs if one)])]
    if not same(new, tta):
        edits.cfg.tta_pipeline = new
        edits.note('tta_pipeline follows the test pipeline')


def _resize(own: dict[str, Any] | None, recipes: dict[str, Any], old: Any) -> dict[str, Any]:
    """The user's Resize, or one of the image's own size, in the ratio of the recipe's to its test.
    """
    ratio = recipes['scale'][0] / old[0] if 'scale' in recipes else recipes['scale_factor']
    if own and 'scale' in own:
        return dict(own, scale=tuple(max(1, round(size * ratio)) for size in pair(
            'Resize: scale', own['scale'])))
    own = own or {key: value for key, value in recipes.items() if key != 'scale'}
    factor = own.get('scale_factor') or 1.0
    return dict(own, scale_factor=tuple(one * ratio for one in factor) if isinstance(
        factor, (list, tuple)) else factor * ratio)


def dataloader_and_evaluator(edits: Edits) -> None:
    """Without data there is no loop and no evaluator: one that is None takes the others away."""
    for split in ('val', 'test'):
        paths = [f'{split}_{part}' for part in ('dataloader', 'cfg', 'evaluator')]
        unset = [path for path in paths if path in edits.cfg and edits.get(path) is None]
        if unset and len(unset) < 3:
            for path in paths:
                edits.cfg[path] = None
            edits.note(f': none, as {unset[0]}=None', ', '.join(paths))


METRICS = dict(IoUMetric=('iou_metrics', ('mIoU', 'mDice', 'mFscore')),
               CocoMetric=('metric', ('bbox', 'segm', 'proposal', 'proposal_fast')))


def evaluator_and_metrics(edits: Edits) -> None:
    """An evaluator knows the metrics that are asked of it.

    Raises:
        UserError: It does not.
    """
    for path in ('val_evaluator', 'test_evaluator'):
        evaluators = edits.get(path) or []
        for one in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
            key, known = METRICS.get(str(one.get('type')), ('', ()))
            asked = one.get(key) or ()
            for name in [asked] if isinstance(asked, str) else asked:
                if name not in known:
                    raise UserError(f'{path}.{key}={asked!r}: {one["type"]} has no {name!r}.'
                                    f'{suggest(str(name), known)} It has {", ".join(known)}')


def randomness_and_seed(edits: Edits) -> None:
    """Other settings of ``randomness`` need no seed; mmengine's function does."""
    randomness = edits.get('randomness')
    if isinstance(randomness, dict):
        randomness.setdefault('seed', None)


def evaluator_and_save_best(edits: Edits) -> None:
    """The checkpoint that is kept as the best is chosen by a metric that is computed.

    Raises:
        UserError: The user's ``save_best`` names another.
    """
    path = 'default_hooks.checkpoint.save_best'
    key = edits.get(path)
    names = metric_names(edits)
    unknown = [one for one in ([key] if isinstance(key, str) else key or ())
               if one != 'auto' and one not in (names or ())]
    if not names or not unknown:
        return
    if edits.is_set(path) and not (edits.get('masks') is False and all(
            'segm' in one for one in unknown)):
        raise UserError(f'{path}={key!r}, but val_evaluator computes {", ".join(names)}: set one '
                        'of these')
    edits.put(path, names[0])
    edits.note(f'{path}={names[0]!r} follows val_evaluator')


def metric_names(edits: Edits) -> list[str] | None:
    """The names of what ``val_evaluator`` computes, the main one first; None: unknown."""
    evaluators = edits.get('val_evaluator') or []
    names: list[str] = []
    for metric in evaluators if isinstance(evaluators, (list, tuple)) else [evaluators]:
        kind = str(metric.get('type')).removeprefix('convnext_mm.')
        prefix = metric.get('prefix')
        if kind == 'IoUMetric':
            found = {'mIoU': ['mIoU', 'mAcc', 'aAcc'], 'mDice': ['mDice', 'mAcc', 'aAcc'],
                     'mFscore': ['mFscore', 'mPrecision', 'mRecall', 'aAcc']}
            wanted = metric.get('iou_metrics', ['mIoU'])
            own = [name for one in ([wanted] if isinstance(wanted, str) else wanted)
                   for name in found.get(one, [])]
        elif kind == 'CocoMetric':
            prefix = prefix or 'coco'
            wanted = metric.get('metric', 'bbox')
            kinds = [wanted] if isinstance(wanted, str) else list(wanted)
            if any(one not in ('bbox', 'segm') for one in kinds):
                return None
            own = [f'{one}_mAP{part}' for one in kinds
                   for part in ('', '_50', '_75', '_s', '_m', '_l')]
        elif kind == 'VOCMetric':
            prefix, own = prefix or 'pascal_voc', ['mAP', 'AP50']
        else:
            return None
        names += [f'{prefix}/{name}' if prefix else name for name in own]
    return list(dict.fromkeys(names))


def pretrained_and_init_cfg(edits: Edits) -> None:
    """``model.pretrained=FILE``, as configs of mmcv 1.x have it, is the backbone's init_cfg."""
    model = edits.get('model') or {}
    pretrained = model.get('pretrained')
    if pretrained is None or (model.get('backbone') or {}).get('type') != 'ConvNeXt':
        return
    if edits.is_set('model.backbone.init_cfg') and edits.get('model.backbone.init_cfg'):
        raise UserError(f'model.pretrained={pretrained!r}, but model.backbone.init_cfg is set as '
                        'well: remove one of them')
    del model['pretrained']
    edits.put('model.backbone.init_cfg', dict(type='Pretrained', checkpoint=pretrained))
    edits.note(f'model.backbone.init_cfg loads model.pretrained={pretrained}')


LEAST = {
    **{f'{split}_dataloader.{key}': least for split in ('train', 'val', 'test')
       for key, least in (('batch_size', 1), ('num_workers', 0))},
    **{f'train_cfg.{key}': 1 for key in ('max_iters', 'max_epochs', 'val_interval')},
    **{f'default_hooks.{hook}.interval': 1 for hook in ('logger', 'visualization')},
    'model.decode_head.channels': 1, 'model.auxiliary_head.channels': 1,
    'model.neck.out_channels': 1, 'optim_wrapper.accumulative_counts': 1, 'randomness.seed': 0}
"""Settings that count, and the least that they can be."""


def counts_and_whole_numbers(edits: Edits) -> None:
    """What counts is a whole number, and the log level one of Python's.

    Raises:
        UserError: It is another value, or too small.
    """
    for path, least in LEAST.items():
        value = edits.get(path)
        if value is not None and not edits.as_shipped(path) and (
                not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise UserError(f'{path}={value!r} must be a whole number from {least} up')
    level = edits.get('log_level', 'INFO')
    levels = ('DEBUG', 'INFO', 'WARNING', 'ERROR', 'CRITICAL')
    if level not in levels:
        raise UserError(f'log_level={level!r} must be one of {", ".join(levels)}')


def num_workers_and_persistent_workers(edits: Edits) -> None:
    """A loader without workers cannot keep them."""
    for split in ('train', 'val', 'test'):
        loader = edits.get(f'{split}_dataloader')
        if loader and loader.get('num_workers') == 0:
            for key, value in (('persistent_workers', False), ('prefetch_factor', None)):
                if loader.get(key) and not edits.is_set(f'{split}_dataloader.{key}'):
                    loader[key] = value
