"""An old config → one of mmengine's style, with a report of what became of each key."""
from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config

from ..archs import ARCHS, Arch
from ..datasets import as_written
from ..errors import UserError
from .data import DataConverter
from .parsing import CONFIGS, OldConfig, merge
from .schedule import schedulers

LENGTHS: dict[str, dict[str, Any]] = {
    **{f'schedule_{k}k.py': dict(max_iters=1000 * k, interval=1000 * k // 10)
       for k in (20, 40, 80, 160, 320)},
    **{f'schedule_{name}.py': dict(max_epochs=epochs, step=step, interval=1)
       for name, epochs, step in (('1x', 12, [8, 11]), ('2x', 24, [16, 22]), ('3x', 36, [27, 33]),
                                  ('20e', 20, [16, 19]))}}
"""How long the schedules of the old toolboxes are, and where they step."""

POLY = dict(policy='poly', warmup='linear', warmup_iters=1500, warmup_ratio=1e-6, power=1.0,
            min_lr=0.0, by_epoch=False)
STEP = dict(policy='step', warmup='linear', warmup_iters=500, warmup_ratio=0.001)
FRAGMENTS = dict(
    models=dict(EncoderDecoder='upernet_convnext.py', MaskRCNN='mask_rcnn_convnext_fpn.py',
                CascadeRCNN='cascade_mask_rcnn_convnext_fpn.py'),
    datasets=dict(mmseg='ade20k.py', mmdet='coco_instance.py'))
BACKENDS = dict(TextLoggerHook=None, TensorboardLoggerHook='TensorboardVisBackend',
                WandbLoggerHook='WandbVisBackend', MMSegWandbHook='WandbVisBackend',
                MMDetWandbHook='WandbVisBackend', MlflowLoggerHook='MLflowVisBackend',
                ClearMLLoggerHook='ClearMLVisBackend', NeptuneLoggerHook='NeptuneVisBackend')
CONSTRUCTORS = dict(LearningRateDecayOptimizerConstructor='LearningRateDecayOptimizerConstructor',
                    LayerDecayOptimizerConstructor='LearningRateDecayOptimizerConstructor',
                    DefaultOptimizerConstructor=None)
NOT_NEEDED = dict(
    workflow=([('train', 1)], 'validation is val_cfg'), gpu_ids=(None, 'the launcher says it'),
    device=(None, 'the best there is'), custom_imports=(None, ''))


class Row(NamedTuple):
    """A line of the report: an old key, what became of it, and a warning where it is not safe."""

    old: str
    new: str
    warning: str = ''


class Migrated(NamedTuple):
    """A converted config.

    Args:
        bases: Files of ours that it inherits.
        inherited: What they say.
        target: The whole of the new config.
        rows: The report.
    """

    bases: list[Path]
    inherited: dict[str, Any]
    target: dict[str, Any]
    rows: list[Row]


def convert(old: OldConfig) -> Migrated:
    """Convert an old config.

    Raises:
        UserError: A policy, hook, step or type that there is not.
    """
    scope = task_of(old)
    recipe = next((file for _, file in old.bases if file.parent == CONFIGS), None)
    same_name = CONFIGS / old.path.name
    if recipe is None and same_name.is_file():
        recipe = same_name  # one of the authors' files, or the guide's
    recipe = recipe or nearest_recipe(old, scope)
    bases = [recipe] if recipe else fragments(old, scope)
    return Conversion(old, scope, bases).run()


def nearest_recipe(old: OldConfig, scope: str) -> Path | None:
    """The recipe of ours that a part of a config without any ``_base_`` is most likely cut from."""
    model = old.values.get('model', {})
    if old.bases or 'type' in model or 'backbone' not in model:
        return None
    arch = named_size(dict(model['backbone'], type='ConvNeXt')).get('arch', 'tiny')
    start = 'upernet' if scope == 'mmseg' else (
        'mask_rcnn' if old.path.stem.startswith('mask_rcnn') else 'cascade_mask_rcnn')
    # Those trained on ImageNet-1K, with the smaller pictures, come first.
    found = sorted(CONFIGS.glob(f'{start}_convnext_{arch}_*[0-9k].py'))
    return found[0] if found else None


def task_of(old: OldConfig) -> str:
    """'mmseg' or 'mmdet'."""
    model = old.values.get('model', {})
    words = ' '.join([str(model.get('type')), *model, *(str(f) for _, f in old.bases),
                      old.path.stem, str(old.values.get('data'))]).lower()
    for scope, signs in (('mmseg', ('decode_head', 'encoderdecoder', 'upernet', 'ade20k')),
                         ('mmdet', ('roi_head', 'rpn_head', 'bbox_head', 'rcnn', 'coco'))):
        if any(sign in words for sign in signs):
            return scope
    raise UserError(f'{old.path}: neither decode_head nor roi_head, no base and no name that says '
                    'whether it segments or detects: add _base_, e.g. '
                    "['../_base_/models/upernet_convnext.py', ...]")


def fragments(old: OldConfig, scope: str) -> list[Path]:
    """Ours that the new config inherits: those that are meant, and what completes them."""
    meant = {file.parent.name: file for _, file in old.bases}
    kind = old.values.get('model', {}).get('type') or (
        'EncoderDecoder' if scope == 'mmseg' else
        'MaskRCNN' if old.path.stem.startswith('mask_rcnn') else 'CascadeRCNN')
    if 'models' not in meant and kind in FRAGMENTS['models'] and (
            kind != 'EncoderDecoder' or 'UPerHead' in str(old.values.get('model', 'UPerHead')) or
            'type' not in old.values.get('model', {}).get('decode_head', {})):
        meant['models'] = CONFIGS / '_base_/models' / FRAGMENTS['models'][kind]
    meant.setdefault('datasets', CONFIGS / '_base_/datasets' / FRAGMENTS['datasets'][scope])
    if (meant['datasets'].name, meant.get('models', Path()).name) == (
            'ade20k_640.py', 'upernet_convnext.py'):
        meant['models'] = CONFIGS / '_base_/models/upernet_convnext_640.py'  # pads to 640
    by_iteration = 'Iter' in str(old.values.get('runner', {}).get('type')) or (
        'runner' not in old.values and 'total_epochs' not in old.values and scope == 'mmseg')
    schedule = 'schedule_160k' if by_iteration else 'schedule_3x'
    amp = '_amp' if mixed_precision(old.values) else ''
    meant['schedules'] = CONFIGS / f'_base_/schedules/{schedule}{amp}.py'
    meant['runtime'] = CONFIGS / f'_base_/runtime_{scope}.py'
    return [meant[key] for key in ('models', 'datasets', 'schedules', 'runtime') if key in meant]


def mixed_precision(values: dict[str, Any]) -> bool:
    """Whether an old config trains in mixed precision, natively or by apex."""
    hook = values.get('optimizer_config') or {}
    return bool(values.get('fp16')) or bool(hook.get('use_fp16')) or 'Fp16' in hook.get('type', '')


class Conversion:
    """The conversion of one config: a method a subject."""

    def __init__(self, old: OldConfig, scope: str, bases: list[Path]) -> None:
        self.old, self.values, self.scope, self.bases = old, old.values, scope, bases
        self.inherited = load_bases(bases)
        self.target = deepcopy(self.inherited)
        self.rows: list[Row] = []
        self.used: set[str] = {'_base_'}
        # What our schedule or recipe says stands only where the old config means it by a base.
        self.meant = {file.parent.name for _, file in old.bases} | (
            {'models', 'schedules'} if any(base.parent == CONFIGS for base in bases) else set())

    def run(self) -> Migrated:
        """All subjects, then what is left."""
        for name, file in self.old.bases:
            if file.parent.name == '_base_':  # the runtime, of which there is one a task
                file = file.with_name(f'runtime_{self.scope}.py')
            self.note(f'_base_ {name}', f'{file.relative_to(CONFIGS.parent)}, ours of this name')
        if not self.old.bases:
            self.note('(no _base_)', ', '.join(f'{base.relative_to(CONFIGS.parent)}'
                                               for base in self.bases))
        self.model()
        self.schedule()
        self.optimizer()
        self.data()
        self.evaluation()
        self.runtime()
        self.rest()
        return Migrated(self.bases, self.inherited, self.target, self.rows)

    def note(self, old: str, new: str, warning: str = '') -> None:
        if Row(old, new, warning) not in self.rows:
            self.rows.append(Row(old, new, warning))

    def take(self, key: str, default: Any = None) -> Any:
        """A top-level value of the old config, which is then accounted for."""
        self.used.add(key)
        value = self.values.get(key, default)
        return {} if value is None and default == {} else deepcopy(value)

    def model(self) -> None:
        """The model, its pretrained weights, and train_cfg and test_cfg where they stood apart."""
        model = self.take('model', {})
        for key in ('train_cfg', 'test_cfg'):
            if key in self.values:
                model[key] = self.take(key) or {}
                self.note(key, f'model.{key}')
        before = self.target.get('model') or {}
        if 'type' in model and 'models' not in self.meant:  # all of it is said
            before = {k: v for k, v in before.items() if k == 'data_preprocessor'}
        pretrained = model.pop('pretrained', None)
        if 'pretrained' in model.get('backbone', {}):
            pretrained = model['backbone'].pop('pretrained') or pretrained
        if model.get('backbone'):
            model['backbone'] = self.backbone(model['backbone'])
        self.widen_stages(model, before)
        if pretrained:
            model.setdefault('backbone', {})['init_cfg'] = dict(
                type='Pretrained', checkpoint=pretrained)
            self.note('model.pretrained', 'model.backbone.init_cfg')
        merged = merge(before, model)
        if merged.get('backbone'):
            merged['backbone'] = named_size(merged['backbone'])
            if merged['backbone'].get('type') == 'ConvNeXt' and not merged['backbone'].get(
                    'init_cfg'):
                self.note('(no pretrained)', 'no weights to start from', 'training starts from '
                          'noise: set model.backbone.init_cfg = dict(type="Pretrained", '
                          'checkpoint=...); the authors gave it on the command line')
            elif not pretrained and 'init_cfg' not in model.get('backbone', {}):
                self.note('(no pretrained)', 'model.backbone.init_cfg, as in our recipe; the '
                          'authors gave it on the command line')
        self.target['model'] = merged
        for path, part in parts_of(model):
            kind = part['type'].rsplit('.', 1)[-1]
            if import_module(f'{self.scope}.registry').MODELS.get(kind) is None:
                raise UserError(f'{self.old.path}: {path}.type={part["type"]!r} is not registered '
                                f'in {self.scope}: import the module that has it (custom_imports)')
        if model:
            self.note('model', 'model')

    def backbone(self, old: dict) -> dict:
        """mmcls's and mmpretrain's ConvNeXt, or the authors', as ours."""
        kind = old.get('type', '')
        if kind.rsplit('.', 1)[-1] != 'ConvNeXt':
            return old
        new = {key: value for key, value in old.items() if key not in (
            'gap_before_final_norm', 'linear_pw_conv', 'norm_cfg', 'act_cfg', 'stem_patch_size')}
        new['type'] = 'ConvNeXt'
        if kind.startswith(('mmcls.', 'mmpretrain.')):
            self.note(f'model.backbone.type {kind}', 'ConvNeXt of this package, no other is needed')
            new['_delete_'] = True
            new.setdefault('layer_scale_init_value', 0.0 if old.get('use_grn') else 1e-6)
            if old.get('frozen_stages', 0) == 0:
                new.pop('frozen_stages', None)  # 0 is none there, the stem with us
            new.setdefault('out_indices', [-1])
        for key, default in (('stem_patch_size', 4), ('norm_cfg', None), ('act_cfg', 'GELU')):
            value = old.get(key, default)
            if key in old and value not in (default, dict(type='LN2d', eps=1e-6),
                                            dict(type='GELU')):
                raise UserError(f'{self.old.path}: model.backbone.{key}={value!r}: ConvNeXt of '
                                "this package is the authors', without this setting")
        for key in ('gap_before_final_norm', 'linear_pw_conv', 'norm_cfg', 'act_cfg',
                    'stem_patch_size'):
            if key in old:
                self.note(f'model.backbone.{key}', 'left out: ' + (
                    'it is for classification' if key[0] == 'g' else 'as ours is anyway'))
        if 'in_channels' in new:
            new['in_chans'] = new.pop('in_channels')
            self.note('model.backbone.in_channels', 'model.backbone.in_chans')
        if isinstance(new.get('arch'), dict):
            arch = new.pop('arch')
            new.update(depths=list(arch['depths']), dims=list(arch['channels']))
            self.note('model.backbone.arch', 'model.backbone.depths and dims')
        elif new.get('use_grn') and isinstance(new.get('arch'), str):
            new['arch'] = f'v2_{new["arch"]}'
        if isinstance(new.get('init_cfg'), dict) and new['init_cfg'].pop('prefix', None):
            self.note('model.backbone.init_cfg.prefix', 'left out: names are recognised')
        return new

    def widen_stages(self, model: dict, before: dict) -> None:
        """A list of one box head is meant for each of Cascade's stages."""
        roi, known = model.get('roi_head') or {}, (before.get('roi_head') or {}).get('bbox_head')
        heads = roi.get('bbox_head')
        if isinstance(heads, list) and isinstance(known, list) and 0 < len(heads) < len(known):
            heads = [*heads, *[heads[-1]] * (len(known) - len(heads))]
            roi['bbox_head'] = [merge(stage, head)
                                for stage, head in zip(known, heads, strict=True)]
            self.note('model.roi_head.bbox_head', f'each of the {len(known)} stages, over what the '
                      'recipe says of it', 'the list is shorter than the stages: alone it would '
                      'not build')

    def schedule(self) -> None:
        """runner, total_epochs and lr_config."""
        lengths = [LENGTHS[name.rsplit('/', 1)[-1]] for name, _ in self.old.bases
                   if name.rsplit('/', 1)[-1] in LENGTHS]
        runner = merge(lengths[0] if lengths else {}, self.take('runner', {}))
        for key in ('total_epochs', 'total_iters'):
            if key in self.values:
                runner[key.replace('total', 'max')] = self.take(key)
                runner.pop('max_iters' if key == 'total_epochs' else 'max_epochs', None)
        inherited = self.inherited['train_cfg']
        kind = runner.get('type', '')
        if kind and kind.removesuffix('Amp') not in ('IterBasedRunner', 'EpochBasedRunner'):
            raise UserError(f'{self.old.path}: runner.type={kind!r} is not known: IterBasedRunner '
                            'or EpochBasedRunner, each with or without Amp')
        by_iteration = 'Iter' in kind or (not kind and (
            'max_iters' in runner or ('max_epochs' not in runner and 'max_iters' in inherited)))
        unit = 'max_iters' if by_iteration else 'max_epochs'
        length = runner.get(unit, inherited.get(unit))
        if length is None:
            raise UserError(f'{self.old.path}: runner says no {unit}: set it')
        self.target['train_cfg'] = dict(
            type='IterBasedTrainLoop' if by_iteration else 'EpochBasedTrainLoop', **{unit: length},
            val_interval=inherited.get('val_interval', 1) if unit in inherited else 1)
        if lengths and unit in lengths[0]:
            self.target['train_cfg']['val_interval'] = lengths[0]['interval']
        if 'runner' in self.values or 'total_epochs' in self.values:
            self.note('runner', f'train_cfg: {unit}={length}')
        if by_iteration != (self.scope == 'mmseg'):
            self.by_iteration(by_iteration)
        if 'lr_config' not in self.values and (
                length == inherited.get(unit) or 'schedules' not in self.meant):
            return
        lr_config = self.take('lr_config', {})
        base = {**POLY} if by_iteration else {**STEP, 'step': (
            lengths[0].get('step') if lengths else None) or [27, 33]}
        if 'schedules' not in self.meant:
            base = {'policy': None}
        other = lr_config.get('policy', base['policy']) != base['policy']
        if other and not lr_config.get('_delete_'):
            base = {k: v for k, v in base.items() if k.startswith('warmup')} if lengths else {}
        lr_config = merge({'x': base}, {'x': lr_config})['x']
        self.target['param_scheduler'] = schedulers(
            lr_config, length if by_iteration else None, None if by_iteration else length)
        self.note('lr_config', 'param_scheduler, the same rate at every iteration')

    def by_iteration(self, yes: bool) -> None:
        """What goes with a training by iterations or by epochs."""
        self.target['log_processor'] = dict(self.target.get('log_processor', {}), by_epoch=not yes)
        hooks = self.target['default_hooks']
        hooks['checkpoint'] = dict(hooks['checkpoint'], by_epoch=not yes)
        if not yes:
            hooks['checkpoint']['interval'] = 1
            hooks['logger'] = dict(hooks['logger'], log_metric_by_epoch=True)
        self.target['train_dataloader']['sampler'] = dict(
            type='InfiniteSampler' if yes else 'DefaultSampler', shuffle=True)

    def optimizer(self) -> None:
        """optimizer, optimizer_config and fp16 → optim_wrapper."""
        wrapper = self.target['optim_wrapper']
        loose = self.take('paramwise_cfg')  # as guides show it, outside of the optimizer
        if loose and not _stands_in(loose, self.values.get('optimizer')):
            self.values = dict(self.values, optimizer=merge(
                self.values.get('optimizer', {}), dict(paramwise_cfg=loose)))
            self.note('paramwise_cfg', "optim_wrapper.paramwise_cfg: it is the optimizer's")
        if 'optimizer' in self.values:
            given = self.take('optimizer')
            base: dict[str, Any] = {'type': None}
            if 'schedules' in self.meant:
                base = dict(wrapper['optimizer'], **{key: wrapper[key] for key in (
                    'constructor', 'paramwise_cfg') if key in wrapper})
            if given.get('type', base['type']) != base['type']:
                base = {k: base[k] for k in ('constructor', 'paramwise_cfg') if k in base}
            optimizer = merge({'x': base}, {'x': given})['x']
            constructor = optimizer.pop('constructor', None)
            paramwise = optimizer.pop('paramwise_cfg', None)
            if constructor not in CONSTRUCTORS and constructor and import_module(
                    f'{self.scope}.registry').OPTIM_WRAPPER_CONSTRUCTORS.get(constructor) is None:
                raise UserError(f'{self.old.path}: optimizer.constructor={constructor!r} is not '
                                f'registered; known: {", ".join(CONSTRUCTORS)}')
            from mmengine.registry import OPTIMIZERS
            if OPTIMIZERS.get(optimizer.get('type')) is None:
                raise UserError(f'{self.old.path}: optimizer.type={optimizer.get("type")!r} is '
                                'not registered')
            wrapper = {key: value for key, value in wrapper.items()
                       if key not in ('constructor', 'paramwise_cfg')}
            wrapper['optimizer'] = optimizer
            constructor = CONSTRUCTORS.get(constructor, constructor)
            if constructor:
                wrapper['constructor'] = constructor
            if paramwise:
                wrapper['paramwise_cfg'] = paramwise
                kind = paramwise.get('decay_type')
                if 'decay_rate' in paramwise and 'decay_type' not in given.get('paramwise_cfg', {}):
                    self.note('optimizer.paramwise_cfg', f"decay_type={kind!r}, as in our recipe"
                              if kind else "decay_type='layer_wise', the default")
            self.note('optimizer', 'optim_wrapper.optimizer, constructor and paramwise_cfg')
        says = [key for key in ('optimizer_config', 'fp16') if key in self.values]
        hook, fp16 = self.take('optimizer_config', {}), self.take('fp16')
        kind = hook.get('type', 'OptimizerHook')
        if kind not in ('OptimizerHook', 'DistOptimizerHook', 'Fp16OptimizerHook',
                        'GradientCumulativeOptimizerHook', 'GradientCumulativeFp16OptimizerHook'):
            raise UserError(f'{self.old.path}: optimizer_config.type={kind!r} is not known: '
                            'DistOptimizerHook, Fp16OptimizerHook, GradientCumulativeOptimizerHook')
        if says:
            amp = mixed_precision(self.values)
            wrapper = {k: v for k, v in wrapper.items() if k != 'loss_scale'}
            wrapper['type'] = 'AmpOptimWrapper' if amp else 'OptimWrapper'
            if amp:
                scale = (fp16 or hook).get('loss_scale', 'dynamic')
                wrapper['loss_scale'] = scale
            self.note(' and '.join(says), 'optim_wrapper.type=' + wrapper['type'])
        steps = hook.get('update_interval', hook.get('cumulative_iters', 1))
        if steps and steps > 1:
            wrapper['accumulative_counts'] = steps
            self.note('optimizer_config.update_interval', 'optim_wrapper.accumulative_counts')
        if hook.get('grad_clip'):
            wrapper['clip_grad'] = hook['grad_clip']
            self.note('optimizer_config.grad_clip', 'optim_wrapper.clip_grad')
        dropped = [key for key in ('coalesce', 'bucket_size_mb') if key in hook]
        if dropped:
            self.note(f'optimizer_config.{", ".join(dropped)}',
                      'left out: DistributedDataParallel gathers gradients by itself')
        self.target['optim_wrapper'] = wrapper

    def data(self) -> None:
        """data, with its data sets and pipelines."""
        if 'data_root' in self.values:
            self.target['data_root'] = self.take('data_root')
        if 'data' in self.values:
            DataConverter(self).convert(self.take('data'))

    def evaluation(self) -> None:
        """evaluation → val_interval, the checkpoint hook's save_best, and the evaluators."""
        if 'evaluation' not in self.values:
            return
        old = self.take('evaluation')
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
                self.note(f'evaluation.{key}', 'left out', '' if key in (
                    'pre_eval', 'efficient_test', 'gpu_collect', 'by_epoch', 'tmpdir',
                    'dynamic_intervals', 'type') else 'it has no counterpart')
        self.note('evaluation', 'train_cfg.val_interval, val_evaluator, checkpoint hook')

    def runtime(self) -> None:
        """Logs, checkpoints, processes."""
        hooks = self.target['default_hooks']
        if 'checkpoint_config' in self.values:
            old = self.take('checkpoint_config', {})
            keep = ('interval', 'by_epoch', 'max_keep_ckpts', 'save_optimizer', 'save_last',
                    'out_dir')
            hooks['checkpoint'] = dict(hooks['checkpoint'], **{k: old[k] for k in keep if k in old})
            self.note('checkpoint_config', 'default_hooks.checkpoint')
        if 'log_config' in self.values:
            self.logs(self.take('log_config', {}))
        env = dict(self.target.get('env_cfg', {}))
        if 'dist_params' in self.values:
            env['dist_cfg'] = {k: v for k, v in self.take('dist_params', {}).items() if k != 'port'}
            self.note('dist_params', 'env_cfg.dist_cfg')
        if 'cudnn_benchmark' in self.values:
            env['cudnn_benchmark'] = self.take('cudnn_benchmark')
        for key in ('opencv_num_threads', 'mp_start_method'):
            if key in self.values:
                env['mp_cfg'] = dict(env.get('mp_cfg', {}), **{key: self.take(key)})
        self.target['env_cfg'] = env
        resume = self.take('resume_from')
        if resume:
            self.target.update(load_from=resume, resume=True)
            self.note('resume_from', 'load_from and resume=True')
        if self.take('auto_resume'):
            self.target['resume'] = True
        if self.take('seed') is not None:
            self.target['randomness'] = dict(seed=self.values['seed'])
        for key in ('load_from', 'work_dir', 'log_level', 'find_unused_parameters',
                    'auto_scale_lr', 'classes', 'palette'):
            value = self.take(key)
            if value is not None and not (key == 'load_from' and resume):
                self.target[key] = value
        workflow = self.take('workflow')
        if workflow and any(mode == 'val' for mode, _ in workflow):
            self.note('workflow', 'left out',
                      'the loss on the validation set is no longer computed')
        imports = self.take('custom_imports', {}).get('imports', ())
        kept = [name for name in ([imports] if isinstance(imports, str) else imports)
                if not name.startswith(('mmcls', 'mmpretrain', 'mmcv_custom'))]
        if kept:
            self.target['custom_imports'] = dict(imports=['convnext_mm', *kept],
                                                 allow_failed_imports=False)
            self.note('custom_imports', f'custom_imports: {", ".join(kept)}', 'code for the old '
                      'versions may have to be changed')
        own = self.take('custom_hooks') or []
        for one in own:
            if import_module(f'{self.scope}.registry').HOOKS.get(one['type']) is None:
                raise UserError(f'{self.old.path}: custom_hooks: the hook {one["type"]!r} is not '
                                'registered: import the module that has it, or take it out')
        if own:
            ours = self.target.get('custom_hooks', [])
            self.target['custom_hooks'] = [*ours, *own]
            self.note('custom_hooks', 'custom_hooks, behind ours')

    def logs(self, old: dict) -> None:
        """log_config → the logger's interval and the visualizer's backends."""
        hooks = self.target['default_hooks']
        if 'interval' in old:
            hooks['logger'] = dict(hooks['logger'], interval=old['interval'])
        backends = [dict(type='LocalVisBackend')]
        for hook in old.get('hooks', ()):
            kind = hook.get('type')
            if kind not in BACKENDS:
                raise UserError(f'{self.old.path}: log_config.hooks: {kind!r} is not known: '
                                f'{", ".join(BACKENDS)}')
            if BACKENDS[kind]:
                made = dict(type=BACKENDS[kind])
                if 'init_kwargs' in hook:
                    made['init_kwargs'] = hook['init_kwargs']
                backends.append(made)
                self.note(f'log_config.hooks {kind}', f'visualizer.vis_backends {BACKENDS[kind]}')
        if len(backends) > 1:
            self.target['visualizer'] = dict(self.target['visualizer'], vis_backends=backends)
        self.note('log_config', 'default_hooks.logger')

    def rest(self) -> None:
        """Helper variables, and keys that nothing here knows."""
        for key, value in self.values.items():
            if key in self.used or key == '_base_':
                continue
            if key in NOT_NEEDED:
                self.note(key, f'left out: {NOT_NEEDED[key][1]}')
            elif _stands_in(value, [v for k, v in self.values.items() if k != key]):
                self.note(key, 'a helper variable: its value stands where it was used')
            elif isinstance(value, dict):
                self.note(key, 'left out', 'no counterpart is known, and nothing here uses it')
            else:
                self.note(key, 'left out: nothing uses it')


def load_bases(bases: list[Path]) -> dict[str, Any]:
    """What files of ours say together."""
    merged: dict[str, Any] = {}
    for file in bases:
        with as_written():
            merged = merge(merged, Config.fromfile(file, import_custom_modules=False).to_dict())
    return merged


def named_size(backbone: dict) -> dict:
    """``arch`` for depths and dims that are published ones."""
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


def parts_of(node: Any, path: str = 'model') -> Iterator[tuple[str, dict]]:
    """Every (path, dict with a type) of a model that MODELS is asked for."""
    if not isinstance(node, dict):
        return
    if isinstance(node.get('type'), str):
        yield path, node
    for key, value in node.items():
        if key in ('backbone', 'neck') or key.endswith('_head') or key.startswith('loss'):
            for one in value if isinstance(value, list) else [value]:
                yield from parts_of(one, f'{path}.{key}')


def _stands_in(value: Any, places: Any) -> bool:
    """Whether a value is somewhere in others, itself or with what it holds."""
    if isinstance(value, str) and isinstance(places, str):
        return value in places
    if type(value) is type(places) and value == places:
        return True
    if isinstance(places, dict):
        if isinstance(value, dict) and value and all(
                key in places and places[key] == one for key, one in value.items()):
            return True
        return any(_stands_in(value, place) for place in places.values())
    if isinstance(places, (list, tuple)):
        return any(_stands_in(value, place) for place in places)
    return False


def relative(path: Path, folder: Path) -> str:
    """A path as it is written in a config of ``folder``."""
    text = os.path.relpath(path, folder)
    return text if text.startswith('.') else f'./{text}'
