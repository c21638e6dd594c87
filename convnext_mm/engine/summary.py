"""The lines of a config that matter, as every run begins with."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.config import Config

from ..datasets import dataset_classes, datasets_of_split
from ..datasets.completion import find_transforms
from ..resolution.schedule import run_length
from .building import Parts, build_parts, learning_rates
from .speed import find_backbones


def summarize(cfg: Config, notes: Sequence[str] = (), training: bool = True) -> str:
    """What a run will do, a line for each subject, and what followed from the user's changes.

    Args:
        cfg: A resolved config; it stays as it is.
        notes: See :func:`convnext_mm.resolution.resolve`.
        training: Whether the run trains.

    Raises:
        UserError: The model, its optimizer or its schedule cannot be built.
    """
    lines = dict(_model_lines(cfg, parts := build_parts(cfg), training))
    lines |= dict(_data_lines(cfg, ('train', 'val') if training else ('test',)))
    if training and parts.optim_wrapper is not None:
        lines |= dict(_training_lines(cfg, parts.optim_wrapper))
    width = max(map(len, lines)) + 2
    text = '\n'.join(f'{name:<{width}}{value}' for name, value in lines.items())
    if notes:
        text += '\nAdjusted to your changes:' + ''.join(f'\n  {line}' for line in notes)
    return text


def _model_lines(cfg: Config, parts: Parts, training: bool) -> Iterator[tuple[str, str]]:
    backbones = [_backbone(config) for _, config in find_backbones(cfg.model)] or [
        _name((cfg.model.get('backbone') or cfg.model).get('type'))]
    head = cfg.model.get('decode_head') or cfg.model.get('roi_head') or cfg.model.get('bbox_head')
    name = (head[0] if isinstance(head, (list, tuple)) and head else head or cfg.model).get('type')
    count = sum(p.numel() for p in parts.model.parameters())
    yield 'Model', f'{_name(name)} on {", ".join(backbones)}, {count / 1e6:.1f} M parameters'
    init = next((config.get('init_cfg') for _, config in find_backbones(cfg.model)), None)
    if cfg.get('load_from'):
        weights = f'all from {cfg.load_from}'
    elif cfg.get('resume'):
        weights = 'all from the latest checkpoint in the work dir, if there is one'
    elif isinstance(init, dict) and init.get('checkpoint'):
        weights = f'backbone from {init["checkpoint"]}'
    else:
        weights = 'random'
    if training or cfg.get('load_from'):
        yield 'Weights', weights


def _data_lines(cfg: Config, splits: Sequence[str]) -> Iterator[tuple[str, str]]:
    for split in splits:
        for i, dataset in enumerate(datasets_of_split(cfg, split)):
            prefix = dataset.get('data_prefix') or {}
            places = [dataset.get('ann_file'), *(prefix.values() if isinstance(prefix, dict)
                                                 else [prefix])]
            yield f'{split.title()} data{"" if i == 0 else f" {i + 1}"}', (
                f'{_name(dataset.get("type"))} in {dataset.get("data_root") or "."}: '
                + ', '.join(str(place) for place in places if place))
    dataset = next(iter(datasets_of_split(cfg, splits[0])), {})
    classes = dataset_classes(dataset, cfg.default_scope) if dataset else ()
    zero = dataset.get('reduce_zero_label')
    yield 'Classes', f'{len(classes)}: {_shorten(classes, 8)}' + (
        '' if zero is None else '; 0 in a mask is ' + ('no class' if zero else
                                                       'the first class'))
    pipeline = cfg.get(f'{splits[0]}_dataloader', {}).get('dataset', {}).get('pipeline')
    sizes = [f'{verb} {_size(value)}' for kind, key, verb in (
        ('RandomResize', 'scale', 'scaled to'), ('Resize', 'scale', 'scaled to'),
        ('RandomChoiceResize', 'scales', 'scaled to'), ('RandomCrop', 'crop_size', 'cropped to'))
        for step in find_transforms(pipeline, kind) if (value := step.get(key))]
    batch = cfg.get(f'{splits[0]}_dataloader', {}).get('batch_size', 1)
    yield 'Images', ', '.join([*dict.fromkeys(sizes), f'{batch} in a batch of one process'])


def _training_lines(cfg: Config, optim_wrapper: Any) -> Iterator[tuple[str, str]]:
    length = run_length(cfg.train_cfg)
    first, last = learning_rates(cfg)
    base = optim_wrapper.optimizer.defaults.get('lr', 0.0)
    unit = '' if length is None else f'{length[0]} {"epochs" if length[1] else "iterations"}, '
    steps = f'{first:.3g} to {base:.3g}, at the end {last:.3g}'
    checkpoint = cfg.get('default_hooks', {}).get('checkpoint') or {}
    yield 'Schedule', (f'{unit}learning rate from {steps}; '
                       f'validation every {cfg.train_cfg.get("val_interval", 1)}, checkpoint every '
                       f'{checkpoint.get("interval", "-")}')
    optimizer = optim_wrapper.optimizer
    precision = 'mixed precision' if 'Amp' in type(optim_wrapper).__name__ else 'fp32'
    yield 'Optimizer', (f'{type(optimizer).__name__}, weight decay '
                        f'{optimizer.defaults.get("weight_decay", 0)}, {precision}')
    rates = sorted({group['lr'] for group in optimizer.param_groups})
    paramwise = cfg.optim_wrapper.get('paramwise_cfg') or {}
    rate = paramwise.get('decay_rate', paramwise.get('layer_decay_rate'))
    decay = 'none' if rate is None else (
        f'{paramwise.get("decay_type", "layer_wise")}, {rate} a layer')
    yield 'Layer decay', (f'{decay}; {len(optimizer.param_groups)} parameter groups, learning rates'
                          f' from {rates[0]:.3g} to {rates[-1]:.3g}')


def _backbone(config: dict[str, Any]) -> str:
    own = [f'{key} {list(config[key])}' for key in ('depths', 'dims') if config.get(key)]
    return ' '.join(['ConvNeXt', *([] if len(own) == 2 else [config.get('arch', 'tiny')]), *own])


def _name(kind: Any) -> str:
    return getattr(kind, '__name__', str(kind)).removeprefix('convnext_mm.')


def _size(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)):
        return ' … '.join(dict.fromkeys(_size(one) for one in (value[0], value[-1])))
    return '×'.join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _shorten(names: Sequence[str], count: int) -> str:
    return ', '.join(name.strip() for name in names[:count]) + (', …' if len(names) > count else '')
