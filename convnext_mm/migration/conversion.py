"""Converts an old config to mmengine's style, and reports what became of each key."""
from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.registry import OPTIMIZERS

from ..archs import ARCHS, Arch
from ..bases import PACKAGES, without_completion
from ..errors import UserError
from ..inputs import config_folder
from ..resolution.mmpretrain import map_backbone
from ..resolution.signatures import ALWAYS, accepted_arguments, beside
from ..utils import plain
from .data import DataConverter
from .own_parts import REPLACED_PACKAGES
from .parsing import CONFIGS, REGISTER_HINT, OldConfig, merge
from .schedule import convert_lr_config
from .transformers import convert_assigners, convert_detr, convert_timm_backbone

OLD_SCHEDULES: dict[str, dict[str, Any]] = {
    **{f'schedule_{k}k.py': dict(max_iters=1000 * k, interval=1000 * k // 10)
       for k in (20, 40, 80, 160, 320)},
    **{f'schedule_{name}.py': dict(max_epochs=epochs, step=step, interval=1)
       for name, epochs, step in (('1x', 12, [8, 11]), ('2x', 24, [16, 22]), ('3x', 36, [27, 33]),
                                  ('20e', 20, [16, 19]))}}
"""The base schedules of the old toolboxes: length, and steps or evaluation interval."""

POLY_POLICY = dict(policy='poly', warmup='linear', warmup_iters=1500, warmup_ratio=1e-6, power=1.0,
                   min_lr=0.0, by_epoch=False)
STEP_POLICY = dict(policy='step', warmup='linear', warmup_iters=500, warmup_ratio=0.001)
FRAGMENTS = dict(
    models=dict(EncoderDecoder='upernet_convnext.py', MaskRCNN='mask_rcnn_convnext_fpn.py',
                CascadeRCNN='cascade_mask_rcnn_convnext_fpn.py'),
    datasets=dict(mmseg='ade20k.py', mmdet='coco_instance.py'))
VIS_BACKENDS: dict[str, str | None] = dict(
    TextLoggerHook=None, TensorboardLoggerHook='TensorboardVisBackend',
    WandbLoggerHook='WandbVisBackend', MMSegWandbHook='WandbVisBackend',
    MMDetWandbHook='WandbVisBackend', MlflowLoggerHook='MLflowVisBackend',
    ClearMLLoggerHook='ClearMLVisBackend', NeptuneLoggerHook='NeptuneVisBackend')
LAYER_DECAY = ('LearningRateDecayOptimizerConstructor', 'LayerDecayOptimizerConstructor')
CONSTRUCTORS: dict[str, str | None] = dict(
    **dict.fromkeys(LAYER_DECAY, LAYER_DECAY[0]), DefaultOptimizerConstructor=None)
OWN_MODULE_HINT = ', with --trust --import MODULE of tools/migrate_config.py'
UNNEEDED_KEYS = dict(gpu_ids='the launcher sets it', device='chosen automatically')


class ReportRow(NamedTuple):
    """An old key, what became of it, and a warning if something should be checked."""

    old: str
    new: str
    warning: str = ''


class ConvertedConfig(NamedTuple):
    """A converted config.

    Args:
        bases: Our files that the new config inherits.
        inherited: Their merged values.
        target: All values of the new config, inherited ones included.
        rows: The rows of the report.
    """

    bases: list[Path]
    inherited: dict[str, Any]
    target: dict[str, Any]
    rows: list[ReportRow]


def convert_config(old: OldConfig) -> ConvertedConfig:
    """Convert an old config.

    Raises:
        UserError: An unknown policy, hook, pipeline step or type.
    """
    scope = detect_scope(old)
    recipe = next((file for _, file in old.own_bases if file.parent == CONFIGS), None)
    same_name = CONFIGS / old.path.name
    if recipe is None and same_name.is_file() and not has_model(old):
        recipe = same_name  # a config of the authors
    recipe = recipe or nearest_recipe(old, scope)
    bases = [recipe] if recipe else choose_fragments(old, scope)
    return Conversion(old, scope, bases).run()


def has_model(old: OldConfig) -> bool:
    """Whether an old config, with the bases that are there, defines a whole model."""
    return 'type' in old.values.get('model', {}) and not any(
        file.parent == CONFIGS or file.parent.name == 'models' for _, file in old.own_bases)


def nearest_recipe(old: OldConfig, scope: str) -> Path | None:
    """Our recipe that best completes a snippet: a config without ``_base_`` and model type."""
    model = old.values.get('model', {})
    if old.own_bases or 'type' in model or 'backbone' not in model:
        return None
    arch = use_arch_name(dict(model['backbone'], type='ConvNeXt')).get('arch', 'tiny')
    prefix = 'upernet' if scope == 'mmseg' else (
        'mask_rcnn' if old.path.stem.startswith('mask_rcnn') else 'cascade_mask_rcnn')
    # Sorted, so that ImageNet-1K weights and the smaller crop size come first.
    return next(iter(sorted(CONFIGS.glob(f'{prefix}_convnext_{arch}_*[0-9k].py'))), None)


def detect_scope(old: OldConfig) -> str:
    """Return 'mmseg' or 'mmdet'.

    Raises:
        UserError: Neither the config nor its names indicate the task.
    """
    model = old.values.get('model', {})
    words = ' '.join([str(model.get('type')), *model, *(str(f) for _, f in old.own_bases),
                      old.path.stem, str(old.values.get('data'))]).lower()
    for scope, keywords in (('mmseg', ('decode_head', 'encoderdecoder', 'upernet', 'ade20k')),
                            ('mmdet', ('roi_head', 'rpn_head', 'bbox_head', 'rcnn', 'coco'))):
        if any(keyword in words for keyword in keywords):
            return scope
    raise UserError(f'{old.path}: cannot tell whether this is segmentation or detection: there is '
                    'neither decode_head nor roi_head. Add _base_, for example '
                    "['../_base_/models/upernet_convnext.py', ...]")


def choose_fragments(old: OldConfig, scope: str) -> list[Path]:
    """Return our fragments that the new config inherits: those that ``old`` names, and defaults."""
    chosen = {file.parent.name: file for _, file in old.own_bases}
    model = old.values.get('model', {})
    kind = model.get('type') or (
        'EncoderDecoder' if scope == 'mmseg' else
        'MaskRCNN' if old.path.stem.startswith('mask_rcnn') else 'CascadeRCNN')
    if 'models' not in chosen and kind in FRAGMENTS['models'] and (
            kind != 'EncoderDecoder' or 'UPerHead' in str(old.values.get('model', 'UPerHead')) or
            'type' not in model.get('decode_head', {})):
        chosen['models'] = CONFIGS / '_base_/models' / FRAGMENTS['models'][kind]
    chosen.setdefault('datasets', CONFIGS / '_base_/datasets' / FRAGMENTS['datasets'][scope])
    if (chosen['datasets'].name, chosen.get('models', Path()).name) == (
            'ade20k_640.py', 'upernet_convnext.py'):
        chosen['models'] = CONFIGS / '_base_/models/upernet_convnext_640.py'  # pads to 640
    by_iteration = 'Iter' in str(old.values.get('runner', {}).get('type')) or (
        'runner' not in old.values and 'total_epochs' not in old.values and scope == 'mmseg')
    schedule = 'schedule_160k' if by_iteration else 'schedule_3x'
    amp = '_amp' if uses_mixed_precision(old.values) else ''
    chosen['schedules'] = CONFIGS / f'_base_/schedules/{schedule}{amp}.py'
    chosen['runtime'] = CONFIGS / f'_base_/runtime_{scope}.py'
    return [chosen[key] for key in ('models', 'datasets', 'schedules', 'runtime') if key in chosen]


def uses_mixed_precision(values: dict[str, Any]) -> bool:
    """Whether an old config trains in mixed precision, using PyTorch or apex.

    An empty ``fp16`` does; ``fp16 = None`` does not.
    """
    hook = values.get('optimizer_config') or {}
    return (isinstance(values.get('fp16'), dict) or bool(hook.get('use_fp16'))
            or 'Fp16' in hook.get('type', ''))


def use_variants(old: Any, inherited: Any) -> None:
    """Name our variant of a class where the inherited fragment has it, in place."""
    if isinstance(old, dict) and isinstance(inherited, dict):
        if inherited.get('type') == f'convnext_mm.{old.get("type")}':
            old['type'] = inherited['type']
        for key in old.keys() & inherited.keys():
            use_variants(old[key], inherited[key])
    elif isinstance(old, list) and isinstance(inherited, list):
        for one, other in zip(old, inherited, strict=False):
            use_variants(one, other)


class Conversion:
    """Converts one config, with one method per subject.

    Args:
        old: The old config.
        scope: 'mmseg' or 'mmdet'.
        bases: Our files that the new config inherits.
    """

    def __init__(self, old: OldConfig, scope: str, bases: list[Path]) -> None:
        self.old, self.values, self.scope, self.bases = old, old.values, scope, bases
        self.inherited = load_bases(bases)
        self.target = deepcopy(self.inherited)
        self.rows: list[ReportRow] = []
        self.used_keys: set[str] = {'_base_'}
        # The kinds of bases whose values the old config has inherited too.
        self.shared_kinds = {file.parent.name for _, file in old.own_bases}
        if any(base.parent == CONFIGS for base in bases) and (
                not old.own_bases or CONFIGS.name in self.shared_kinds):
            self.shared_kinds |= {'models', 'schedules'}

    def run(self) -> ConvertedConfig:
        """Convert all subjects, then report the remaining keys.

        Raises:
            UserError: An unknown policy, hook, pipeline step or type.
        """
        for name, file in self.old.own_bases:
            if file.parent.name == '_base_':  # the runtime, which is different for each toolbox
                file = file.with_name(f'runtime_{self.scope}.py')
            ours, warning = file.is_relative_to(CONFIGS), ''
            if not ours:
                warning = ('not found: the current file of that name stands for it, which may '
                           'have other values')
            elif file.parent.name == 'datasets' and self.scope == 'mmdet' and "'pipeline'" not in (
                    str((self.values.get('data') or {}).get('train'))):
                warning = ('not found: ours trains at several scales, that of mmdet 2.x at '
                           '1333×800 only. Give data.train.pipeline if it must be the same')
            self.add_row(f'_base_ {name}', f'{shown_base(file)} of ' + (
                'this package' if ours else f'the installed {self.scope}'), warning)
        if not self.old.own_bases:
            self.add_row('(no _base_)', 'inherits ' + ', '.join(map(shown_base, self.bases)))
        self.convert_model()
        self.convert_schedule()
        self.convert_optimizer()
        self.convert_data()
        self.convert_evaluation()
        self.convert_runtime()
        self.report_other_keys()
        return ConvertedConfig(self.bases, self.inherited, self.target, self.rows)

    def add_row(self, old: str, new: str, warning: str = '') -> None:
        """Add a row to the report, once."""
        row = ReportRow(old, new, warning)
        if row not in self.rows:
            self.rows.append(row)

    def use_key(self, key: str, default: Any = None) -> Any:
        """Return a copy of a top-level value of the old config, and mark its key as used."""
        self.used_keys.add(key)
        value = self.values.get(key, default)
        return {} if value is None and default == {} else deepcopy(value)

    def convert_model(self) -> None:
        """Convert the model, its weights, and ``train_cfg`` and ``test_cfg`` outside of it."""
        model = self.use_key('model', {})
        for key in ('train_cfg', 'test_cfg'):
            if key in self.values:
                model[key] = self.use_key(key) or {}
                self.add_row(key, f'model.{key}')
        where = f'{self.old.path}: model'
        for row in (*convert_detr(model, where), *convert_assigners(model),
                    *(convert_timm_backbone(model, where) if self.scope == 'mmseg' else ())):
            self.add_row(*row)
        inherited = self.target.get('model') or {}
        use_variants(model, inherited)
        if has_model(self.old):  # the old model is complete
            inherited = {k: v for k, v in inherited.items() if k == 'data_preprocessor'}
        else:
            self.complete_model(model, inherited)
        pretrained = model.pop('pretrained', None)
        if 'pretrained' in model.get('backbone', {}):
            pretrained = model['backbone'].pop('pretrained') or pretrained
        if model.get('backbone'):
            kind = (inherited.get('backbone') or {}).get('type')
            model['backbone'] = self.convert_backbone({'type': kind, **model['backbone']} if kind
                                                      else model['backbone'])
        self.fill_box_heads(model, inherited)
        if pretrained:
            model.setdefault('backbone', {})['init_cfg'] = dict(
                type='Pretrained', checkpoint=pretrained)
            self.add_row('model.pretrained', 'model.backbone.init_cfg')
        recipe = CONFIGS / self.old.path.name
        if has_model(self.old) and recipe.is_file() and not pretrained:
            init_cfg = load_bases([recipe])['model']['backbone'].get('init_cfg')
            inherited = dict(inherited, backbone=dict(init_cfg=init_cfg))
        merged = merge(inherited, model)
        if merged.get('backbone'):
            merged['backbone'] = use_arch_name(merged['backbone'])
            if merged['backbone'].get('type') == 'ConvNeXt' and not merged['backbone'].get(
                    'init_cfg'):
                self.add_row('(no pretrained)', 'no pretrained weights', 'the backbone is randomly '
                             'initialized: set model.backbone.init_cfg=dict(type="Pretrained", '
                             'checkpoint=...). The authors set it on the command line')
            elif not pretrained and 'init_cfg' not in model.get('backbone', {}):
                self.add_row('(no pretrained)', 'model.backbone.init_cfg of our recipe; the '
                             'authors set it on the command line')
        self.target['model'] = merged
        for path, part in typed_parts(model):
            kind = part['type'].rsplit('.', 1)[-1]
            if import_module(f'{self.scope}.registry').MODELS.get(kind) is None:
                raise UserError(f'{self.old.path}: {path}.type={part["type"]!r} is not registered '
                                f'in {self.scope}. {REGISTER_HINT}')
        whole = import_module(f'{self.scope}.registry').MODELS.get(str(merged.get('type')))
        own = whole is None or not whole.__module__.startswith((f'{self.scope}.', 'convnext_mm.'))
        for name, part in merged.items():
            if (name in ('backbone', 'neck') or name.endswith('_head')) and part and isinstance(
                    part, dict) and 'type' not in part and not own:
                raise UserError(f'{self.old.path}: model.{name} has no type, in this file and its '
                                'bases: set it')
        for path, part in typed_parts(merged):
            if path.rpartition('.')[2].startswith('loss'):
                self.drop_arguments(path, part)
        if model:
            self.add_row('model', 'model')

    def complete_model(self, model: dict, inherited: dict) -> None:
        """Add what a missing base says: the size of the backbone, and testing of whole images."""
        backbone, stem = model.get('backbone') or {}, self.old.path.stem
        reader = model.get('decode_head') or model.get('neck') or {}
        given = reader.get('in_channels') if isinstance(reader, dict) else None
        known = {name: arch for name, arch in ARCHS.items() if not arch.use_grn}
        word = next((name for name in sorted(known, key=len, reverse=True) if name in stem), None)
        fits = [name for name, arch in known.items() if list(arch.dims) == plain(given)]
        current = (inherited.get('backbone') or {}).get('arch', 'tiny')
        if (not {'arch', 'depths', 'dims', '_delete_'} & backbone.keys() and fits
                and inherited.get('backbone', {}).get('type') == 'ConvNeXt'
                and (current not in fits or word not in (None, current))):
            arch = word if word in fits else fits[0]
            model['backbone'] = dict(backbone, arch=arch)
            self.add_row('(no model.backbone)', f'arch={arch!r}', 'its base is missing: the size '
                         'is that of model.decode_head or model.neck and of the name of the file')
        names = {name.rsplit('/', 1)[-1] for name, _ in self.old.own_bases}
        if 'upernet_convnext.py' in names and 'test_cfg' not in {**model, **self.values}:
            model['test_cfg'] = dict(_delete_=True, mode='whole')
            self.add_row('_base_ upernet_convnext.py', "model.test_cfg.mode='whole', as in the "
                         "authors' and mmseg's file of that name")

    def convert_backbone(self, old: dict) -> dict:
        """Convert the ConvNeXt of mmcls, mmpretrain or the authors to ours."""
        kind = old.get('type', '')
        if kind.rsplit('.', 1)[-1] != 'ConvNeXt':
            return old
        foreign = kind.startswith(('mmcls.', 'mmpretrain.'))
        try:
            mapped = map_backbone(old, f'{self.old.path}: model.backbone', complete=foreign)
        except UserError as error:
            own = OWN_MODULE_HINT if 'another class' in str(error) else ''
            raise UserError(f'{error}{own}') from error
        new = mapped.values
        if foreign:
            self.add_row(f'model.backbone.type {kind}', 'ConvNeXt of this package')
            new['_delete_'] = True
        for theirs, ours in mapped.renamed:
            self.add_row(f'model.backbone.{theirs}', f'model.backbone.{ours}')
        for key in mapped.dropped:
            self.add_row(f'model.backbone.{key}', 'removed: the same in our ConvNeXt')
        if isinstance(new.get('init_cfg'), dict) and new['init_cfg'].pop('prefix', None):
            self.add_row('model.backbone.init_cfg.prefix', 'removed: names are recognized')
        return new

    def drop_arguments(self, path: str, loss: dict) -> None:
        """Leave out the arguments that a loss no longer has, in place."""
        kind = import_module(f'{self.scope}.registry').MODELS.get(loss['type'])
        known = accepted_arguments(kind) if kind else None
        for key in loss.keys() - (loss.keys() if known is None else known | ALWAYS | beside(path)):
            del loss[key]
            self.add_row(f'{path}.{key}', 'left out', f'look at it: {loss["type"]} no longer has '
                         'this argument')

    def fill_box_heads(self, model: dict, inherited: dict) -> None:
        """Repeat the last box head if there are fewer than the inherited cascade has stages."""
        roi_head = model.get('roi_head') or {}
        if not isinstance(roi_head, dict):
            return
        heads = roi_head.get('bbox_head')
        stages = (inherited.get('roi_head') or {}).get('bbox_head')
        if isinstance(heads, list) and isinstance(stages, list) and 0 < len(heads) < len(stages):
            repeated = [*heads, *[heads[-1]] * (len(stages) - len(heads))]
            roi_head['bbox_head'] = [merge(stage, head)
                                     for stage, head in zip(stages, repeated, strict=True)]
            self.add_row('model.roi_head.bbox_head',
                         f'merged into each of the {len(stages)} stages of the recipe',
                         f'defines only {len(heads)} of {len(stages)} stages: its last one is '
                         'repeated')

    def convert_schedule(self) -> None:
        """Convert ``runner``, ``total_epochs``, ``total_iters`` and ``lr_config``."""
        names = [name.rsplit('/', 1)[-1] for name, _ in self.old.own_bases]
        old_schedule = next((OLD_SCHEDULES[name] for name in names if name in OLD_SCHEDULES), {})
        runner = merge(old_schedule, self.use_key('runner', {}))
        for key in ('total_epochs', 'total_iters'):
            if key == 'total_iters' and self.values.get('runner') and key in self.values:
                self.used_keys.add(key)
                self.add_row(key, 'removed: runner sets the length, as in mmseg 0.x')
            elif key in self.values:
                stated = {key.replace('total', 'max'): self.values[key]}
                given = {unit: value for unit, value in (self.values.get('runner') or {}).items()
                         if unit in ('max_epochs', 'max_iters')}
                if given and given != stated:
                    raise UserError(f'{self.old.path}: {key}={self.values[key]} contradicts '
                                    f'runner={given}: remove one of them')
                runner[key.replace('total', 'max')] = self.use_key(key)
                runner.pop('max_iters' if key == 'total_epochs' else 'max_epochs', None)
        inherited = self.inherited['train_cfg']
        kind = runner.get('type', '')
        if kind and kind.removesuffix('Amp') not in ('IterBasedRunner', 'EpochBasedRunner'):
            raise UserError(f'{self.old.path}: unknown runner.type={kind!r}; expected '
                            'IterBasedRunner, EpochBasedRunner, IterBasedRunnerAmp or '
                            'EpochBasedRunnerAmp')
        by_iteration = 'Iter' in kind or (not kind and (
            'max_iters' in runner or ('max_epochs' not in runner and 'max_iters' in inherited)))
        unit = 'max_iters' if by_iteration else 'max_epochs'
        length: Any = runner.get(unit)
        if not old_schedule:
            length = runner.get(unit, inherited.get(unit))
        if length is None:
            raise UserError(f'{self.old.path}: runner has no {unit}: set it')
        self.target['train_cfg'] = dict(
            type='IterBasedTrainLoop' if by_iteration else 'EpochBasedTrainLoop', **{unit: length},
            val_interval=inherited.get('val_interval', 1) if unit in inherited else 1)
        if unit in old_schedule:
            self.target['train_cfg']['val_interval'] = old_schedule['interval']
        keys = [key for key in ('runner', 'total_epochs', 'total_iters') if key in self.values]
        if keys:
            self.add_row(' and '.join(keys), f'train_cfg: {unit}={length}')
        if by_iteration != (self.scope == 'mmseg'):
            self.set_unit(by_iteration)
        if 'lr_config' not in self.values and (
                length == inherited.get(unit) or 'schedules' not in self.shared_kinds):
            return
        lr_config = self.use_key('lr_config', {})
        base: dict[str, Any] = {**STEP_POLICY, 'step': old_schedule.get('step', [27, 33])}
        if 'max_iters' in (old_schedule or {'max_iters' if by_iteration else 'max_epochs': 0}):
            base = {**POLY_POLICY}
        if 'schedules' not in self.shared_kinds:
            base = {'policy': None}
        other_policy = lr_config.get('policy', base['policy']) != base['policy']
        if other_policy and not lr_config.get('_delete_'):
            base = {k: v for k, v in base.items() if k.startswith('warmup') and old_schedule}
        lr_config = merge({'x': base}, {'x': lr_config})['x']  # nested, so that _delete_ works
        try:
            self.target['param_scheduler'] = convert_lr_config(
                lr_config, length if by_iteration else None, None if by_iteration else length)
        except UserError as error:
            raise UserError(f'{self.old.path}: {error}') from error
        self.add_row('lr_config', 'param_scheduler with the same learning rate at every iteration')

    def set_unit(self, by_iteration: bool) -> None:
        """Let hooks, logs and sampler count in iterations, or in epochs."""
        self.target['log_processor'] = dict(self.target.get('log_processor', {}),
                                            by_epoch=not by_iteration)
        hooks = self.target['default_hooks']
        hooks['checkpoint'] = dict(hooks['checkpoint'], by_epoch=not by_iteration)
        if not by_iteration:
            hooks['checkpoint']['interval'] = 1
            hooks['logger'] = dict(hooks['logger'], log_metric_by_epoch=True)
        self.target['train_dataloader']['sampler'] = dict(
            type='InfiniteSampler' if by_iteration else 'DefaultSampler', shuffle=True)

    def convert_optimizer(self) -> None:
        """Convert ``optimizer``, ``optimizer_config`` and ``fp16`` to ``optim_wrapper``."""
        wrapper = self.target['optim_wrapper']
        paramwise_cfg = self.use_key('paramwise_cfg')  # some guides put it outside of optimizer
        if paramwise_cfg and not _contains(self.values.get('optimizer'), paramwise_cfg):
            self.values = dict(self.values, optimizer=merge(
                self.values.get('optimizer', {}), dict(paramwise_cfg=paramwise_cfg)))
            self.add_row('paramwise_cfg', 'optim_wrapper.paramwise_cfg')
        if 'optimizer' in self.values:
            given = self.use_key('optimizer')
            base: dict[str, Any] = {'type': None}
            if 'schedules' in self.shared_kinds:
                base = dict(wrapper['optimizer'], **{key: wrapper[key] for key in (
                    'constructor', 'paramwise_cfg') if key in wrapper})
            if given.get('type', base['type']) != base['type']:
                base = {k: base[k] for k in ('constructor', 'paramwise_cfg') if k in base}
            optimizer = merge({'x': base}, {'x': given})['x']
            constructor = optimizer.pop('constructor', None)
            paramwise = optimizer.pop('paramwise_cfg', None)
            if constructor in LAYER_DECAY and 'layer_decay_rate' in (paramwise or {}):
                paramwise['decay_rate'] = paramwise.pop('layer_decay_rate')
                self.add_row('optimizer.paramwise_cfg.layer_decay_rate', 'decay_rate')
            if constructor == 'LayerDecayOptimizerConstructor' and paramwise:
                paramwise.setdefault('decay_type', 'layer_wise')
            if constructor not in CONSTRUCTORS and constructor and import_module(
                    f'{self.scope}.registry').OPTIM_WRAPPER_CONSTRUCTORS.get(constructor) is None:
                raise UserError(f'{self.old.path}: optimizer.constructor={constructor!r} is not '
                                f'registered; expected one of {", ".join(CONSTRUCTORS)}. '
                                f'{REGISTER_HINT}')
            if optimizer.get('type') is None:
                raise UserError(f"{self.old.path}: optimizer has no type: set it, such as "
                                "type='AdamW'")
            if OPTIMIZERS.get(optimizer['type']) is None:
                raise UserError(f'{self.old.path}: optimizer.type={optimizer.get("type")!r} is '
                                f'not registered. {REGISTER_HINT}')
            wrapper = {key: value for key, value in wrapper.items()
                       if key not in ('constructor', 'paramwise_cfg')}
            wrapper['optimizer'] = optimizer
            constructor = CONSTRUCTORS.get(constructor, constructor)
            if constructor:
                wrapper['constructor'] = constructor
            if paramwise:
                wrapper['paramwise_cfg'] = paramwise
                decay_type = paramwise.get('decay_type')
                if 'decay_rate' in paramwise and 'decay_type' not in given.get('paramwise_cfg', {}):
                    self.add_row('optimizer.paramwise_cfg', f'decay_type={decay_type!r}, as in our '
                                 'recipe' if decay_type else "decay_type='layer_wise', the default")
            self.add_row('optimizer', 'optim_wrapper.optimizer, constructor and paramwise_cfg')
        keys = [key for key in ('optimizer_config', 'fp16') if key in self.values]
        hook, fp16 = self.use_key('optimizer_config', {}), self.use_key('fp16')
        kind = hook.get('type', 'OptimizerHook')
        if kind not in ('OptimizerHook', 'DistOptimizerHook', 'Fp16OptimizerHook',
                        'GradientCumulativeOptimizerHook', 'GradientCumulativeFp16OptimizerHook'):
            raise UserError(f'{self.old.path}: unknown optimizer_config.type={kind!r}; expected '
                            'OptimizerHook, DistOptimizerHook, Fp16OptimizerHook or '
                            'GradientCumulativeOptimizerHook')
        if keys:
            amp = uses_mixed_precision(self.values)
            wrapper = {k: v for k, v in wrapper.items() if k != 'loss_scale'}
            wrapper['type'] = 'AmpOptimWrapper' if amp else 'OptimWrapper'
            if amp:
                # The default of mmcv's hook; apex, which use_fp16 stands for, scales dynamically.
                default = 'dynamic' if hook.get('use_fp16') else 512.0
                wrapper['loss_scale'] = {**hook, **(fp16 or {})}.get('loss_scale', default)
            self.add_row(' and '.join(keys), 'optim_wrapper.type=' + wrapper['type'])
        key = 'update_interval' if 'update_interval' in hook else 'cumulative_iters'
        if (hook.get(key) or 1) > 1:
            wrapper['accumulative_counts'] = hook[key]
            self.add_row(f'optimizer_config.{key}', 'optim_wrapper.accumulative_counts')
        if hook.get('grad_clip'):
            wrapper['clip_grad'] = hook['grad_clip']
            self.add_row('optimizer_config.grad_clip', 'optim_wrapper.clip_grad')
        removed = [key for key in ('coalesce', 'bucket_size_mb') if key in hook]
        if removed:
            self.add_row(f'optimizer_config.{", ".join(removed)}',
                         'removed: DistributedDataParallel groups gradients itself')
        self.target['optim_wrapper'] = wrapper

    def convert_data(self) -> None:
        """Convert ``data`` with its data sets and pipelines."""
        converter = DataConverter(self)
        if 'data_root' in self.values:
            self.target['data_root'] = self.use_key('data_root')
        if 'data' in self.values:
            converter.convert(self.use_key('data'))
        preprocessor = self.target['model'].setdefault('data_preprocessor', {})
        if not converter.pipelines.get('train'):  # that of the base, which normalizes
            kind = 'EncoderDecoder' if self.scope == 'mmseg' else 'CascadeRCNN'
            default = load_bases([CONFIGS / '_base_/models' / FRAGMENTS['models'][kind]])
            for key, value in default['model']['data_preprocessor'].items():
                if key != 'size' or 'size_divisor' not in preprocessor:
                    preprocessor.setdefault(key, self.crop_size(value) if key == 'size' else value)
        elif not any('mean' in pipeline.preprocessor for pipelines in converter.pipelines.values()
                     for pipeline in pipelines):
            preprocessor.update(mean=None, std=None, bgr_to_rgb=False)
            self.add_row('data.train.pipeline (no Normalize)', 'model.data_preprocessor.mean=None',
                         'look at it: images are not normalized, as in the old config')

    def crop_size(self, default: Any) -> Any:
        """The size that training crops images to."""
        dataset = self.target['train_dataloader']['dataset']
        while dataset.get('dataset'):
            dataset = dataset['dataset']
        return next((step['crop_size'] for step in dataset.get('pipeline', ())
                     if step['type'] == 'RandomCrop' and 'crop_size' in step), default)

    def convert_evaluation(self) -> None:
        """Convert ``evaluation`` to ``val_interval``, evaluators and the hook's ``save_best``."""
        if 'evaluation' not in self.values:
            return
        old = self.use_key('evaluation', {})
        if 'interval' in old:
            self.target['train_cfg']['val_interval'] = old['interval']
        hook = dict(self.target['default_hooks']['checkpoint'])
        for key in ('save_best', 'rule'):
            if old.get(key):
                value = old[key]
                if key == 'save_best' and self.scope == 'mmdet' and value != 'auto':
                    value = f'coco/{value}' if '/' not in value else value
                hook[key] = value
        self.target['default_hooks']['checkpoint'] = hook
        metric = old.get('metric')
        metrics = [metric] if isinstance(metric, str) else list(metric or ())
        for evaluator in ('val_evaluator', 'test_evaluator'):
            if metrics:
                name = 'iou_metrics' if self.scope == 'mmseg' else 'metric'
                self.target[evaluator] = dict(self.target[evaluator], **{name: metrics})
            for key in ('classwise', 'proposal_nums', 'iou_thrs', 'metric_items'):
                if key in old and self.scope == 'mmdet':
                    self.target[evaluator][key] = old[key]
        known = ('interval', 'save_best', 'rule', 'metric', 'classwise', 'proposal_nums',
                 'iou_thrs', 'metric_items', '_delete_')
        for key in old:
            if key not in known:
                self.add_row(f'evaluation.{key}', 'removed', '' if key in (
                    'pre_eval', 'efficient_test', 'gpu_collect', 'by_epoch', 'tmpdir',
                    'dynamic_intervals', 'type') else 'mmengine has no counterpart')
        self.add_row('evaluation', 'train_cfg.val_interval, val_evaluator, checkpoint hook')

    def convert_runtime(self) -> None:
        """Convert the settings of checkpoints, logs, processes, imports and hooks."""
        hooks = self.target['default_hooks']
        if 'checkpoint_config' in self.values:
            old = self.use_key('checkpoint_config', {})
            hooks['checkpoint'] = dict(hooks['checkpoint'], **{key: old[key] for key in (
                'interval', 'by_epoch', 'max_keep_ckpts', 'save_optimizer', 'save_last', 'out_dir')
                if key in old})
            self.add_row('checkpoint_config', 'default_hooks.checkpoint')
        if 'log_config' in self.values:
            self.convert_log_config(self.use_key('log_config', {}))
        env = dict(self.target.get('env_cfg', {}))
        if 'dist_params' in self.values:
            env['dist_cfg'] = self.use_key('dist_params', {})
            env['dist_cfg'].pop('port', None)
            self.add_row('dist_params', 'env_cfg.dist_cfg')
        if 'cudnn_benchmark' in self.values:
            env['cudnn_benchmark'] = self.use_key('cudnn_benchmark')
        for key in ('opencv_num_threads', 'mp_start_method'):
            if key in self.values:
                env['mp_cfg'] = dict(env.get('mp_cfg', {}), **{key: self.use_key(key)})
        self.target['env_cfg'] = env
        resume = self.use_key('resume_from')
        if resume:
            self.target.update(load_from=resume, resume=True)
            self.add_row('resume_from', 'load_from and resume=True')
        if self.use_key('auto_resume'):
            self.target['resume'] = True
        if self.use_key('seed') is not None:
            self.target['randomness'] = dict(seed=self.values['seed'])
        for key in ('load_from', 'work_dir', 'log_level', 'find_unused_parameters',
                    'auto_scale_lr', 'classes', 'palette', 'reduce_zero_label'):
            value = self.use_key(key)
            if value is not None and not (key == 'load_from' and resume):
                self.target[key] = value
        workflow = self.use_key('workflow')
        if workflow and any(mode == 'val' for mode, _ in workflow):
            self.add_row('workflow', 'removed',
                         'the loss on the validation set is no longer computed')
        imports = self.use_key('custom_imports', {}).get('imports', ())
        kept = [name for name in ([imports] if isinstance(imports, str) else imports)
                if name.partition('.')[0] not in REPLACED_PACKAGES]
        if kept:
            self.target['custom_imports'] = dict(imports=['convnext_mm', *kept],
                                                 allow_failed_imports=False)
            self.add_row('custom_imports', f'custom_imports: {", ".join(kept)}',
                         'code for mmcv 0.x or 1.x may need changes')
        custom_hooks = []
        for hook in self.use_key('custom_hooks') or []:
            gone = {'warm_up', 'resume_from'} & hook.keys() if hook.get('type') == 'EMAHook' else ()
            for key in gone:
                del hook[key]
                self.add_row(f'custom_hooks EMAHook.{key}', 'left out', 'look at it: mmengine has '
                             'begin_iter, and resumes by itself')
            if self.is_hook(hook):
                custom_hooks.append(hook)
            else:
                self.add_row(f'custom_hooks {hook.get("type")}', 'left out', 'look at it: it is '
                             'not registered, or takes other arguments now. '
                             + REGISTER_HINT)
        if custom_hooks:
            self.target['custom_hooks'] = [*self.target.get('custom_hooks', []), *custom_hooks]
            self.add_row('custom_hooks', 'custom_hooks, after ours')

    def is_hook(self, config: dict) -> bool:
        """Whether a hook can be built."""
        settings = {key: value for key, value in config.items() if key not in ('type', 'priority')}
        try:  # not build(), which looks in the toolbox that was used last
            import_module(f'{self.scope}.registry').HOOKS.get(config['type'])(**settings)
        except Exception:  # a hook can raise anything
            return False
        return True

    def convert_log_config(self, old: dict) -> None:
        """Convert ``log_config`` to the logger's interval and the visualizer's backends."""
        hooks = self.target['default_hooks']
        if 'interval' in old:
            hooks['logger'] = dict(hooks['logger'], interval=old['interval'])
        backends: list[dict[str, Any]] = [dict(type='LocalVisBackend')]
        for hook in old.get('hooks', ()):
            kind = hook.get('type')
            backend = VIS_BACKENDS.get(kind)
            if kind not in VIS_BACKENDS and 'TextLogger' not in str(kind):
                self.add_row(f'log_config.hooks {kind}', 'left out', 'look at it: it is not known '
                             f'here. Known are {", ".join(VIS_BACKENDS)}')
            if backend:
                backends.append(dict(type=backend, **{
                    key: hook[key] for key in ('init_kwargs',) if key in hook}))
                self.add_row(f'log_config.hooks {kind}', f'visualizer.vis_backends {backend}')
        if len(backends) > 1:
            self.target['visualizer'] = dict(self.target['visualizer'], vis_backends=backends)
        self.add_row('log_config', 'default_hooks.logger')

    def report_other_keys(self) -> None:
        """Report variables, and keys that no other method has used."""
        for key, value in self.values.items():
            if key in self.used_keys:
                continue
            if key in UNNEEDED_KEYS:
                self.add_row(key, f'removed: {UNNEEDED_KEYS[key]}')
            elif _contains([v for k, v in self.values.items() if k != key], value):
                self.add_row(key, 'variable: its value is inserted where it is used')
            elif isinstance(value, dict):
                self.add_row(key, 'removed', 'unknown key: the new config does not use it')
            else:
                self.add_row(key, 'removed: nothing uses it')


def load_bases(bases: list[Path]) -> dict[str, Any]:
    """Merge the values of several config files."""
    names = [relative_base(base, CONFIGS) if not base.is_relative_to(CONFIGS) else str(base)
             for base in bases]
    with without_completion():
        return Config.fromstring(f'_base_ = {names!r}', '.py').to_dict()


def use_arch_name(backbone: dict) -> dict:
    """Replace the depths and dims of a published size by ``arch``."""
    if backbone.get('type') != 'ConvNeXt' or not {'depths', 'dims'} & backbone.keys():
        return backbone
    published = ARCHS[backbone.get('arch', 'tiny')]
    size = Arch(tuple(backbone.get('depths', published.depths)),
                tuple(backbone.get('dims', published.dims)),
                backbone.get('use_grn', published.use_grn))
    name = next((name for name, arch in ARCHS.items() if arch == size), None)
    if name is None:
        return {k: v for k, v in backbone.items() if k != 'arch'}
    new = {k: v for k, v in backbone.items() if k not in ('depths', 'dims', 'use_grn')}
    if new.get('in_chans') == 3:
        del new['in_chans']
    return dict(new, arch=name)


def typed_parts(node: Any, path: str = 'model') -> Iterator[tuple[str, dict]]:
    """Yield the path and the dict of each part of a model that the registry MODELS builds."""
    if not isinstance(node, dict):
        return
    if isinstance(node.get('type'), str):
        yield path, node
    for key, value in node.items():
        if key in ('backbone', 'neck') or key.endswith('_head') or key.startswith('loss'):
            for part in value if isinstance(value, list) else [value]:
                yield from typed_parts(part, f'{path}.{key}')


def _contains(container: Any, value: Any) -> bool:
    """Whether a value occurs in another one: as an item, part of a string, or subset of a dict."""
    if isinstance(value, str) and isinstance(container, str):
        return value in container
    if type(value) is type(container) and value == container:
        return True
    if isinstance(container, dict):
        if isinstance(value, dict) and value and all(
                key in container and container[key] == item for key, item in value.items()):
            return True
        return any(_contains(item, value) for item in container.values())
    if isinstance(container, (list, tuple)):
        return any(_contains(item, value) for item in container)
    return False


def shown_base(path: Path) -> str:
    """A base as ``configs/…`` of this package, or as ``mmseg::…`` of a toolbox."""
    if path.is_relative_to(CONFIGS):
        return str(path.relative_to(CONFIGS.parent))
    folders = {name: folder for name in PACKAGES if (folder := config_folder(name))}
    return next(f'{name}::{path.relative_to(folder)}' for name, folder in folders.items()
                if path.is_relative_to(folder))


def relative_base(path: Path, folder: Path) -> str:
    """Return ``path`` as ``_base_`` of a config in ``folder``."""
    if not path.is_relative_to(CONFIGS):
        return shown_base(path)
    text = os.path.relpath(path, folder)
    return text if text.startswith('.') else f'./{text}'
