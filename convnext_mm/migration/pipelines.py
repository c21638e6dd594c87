"""Pipelines of the old style, for both tasks: steps to steps, and what goes to the model."""
from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from ..errors import UserError

DROPPED = {
    **dict.fromkeys(('DefaultFormatBundle', 'DefaultFormatBundle3D', 'ImageToTensor', 'ToTensor'),
                    'the packing step makes tensors'),
    'Collect': 'the packing step collects', 'SegRescale': 'masks are resized with their picture'}
"""Steps without a counterpart, which something else now does."""


class Pipeline(NamedTuple):
    """A converted pipeline.

    Args:
        steps: In mmengine's style.
        preprocessor: Settings that go to the model's data_preprocessor.
        augmentation: ``scales`` and ``flips`` of a MultiScaleFlipAug.
        notes: (old, what became of it) pairs.
    """

    steps: list[dict]
    preprocessor: dict[str, Any]
    augmentation: dict[str, Any]
    notes: list[tuple[str, str]]


class Converter:
    """Converts the pipelines of one task.

    Args:
        scope: 'mmseg' or 'mmdet'.
        where: The pipeline's place, for messages.
    """

    def __init__(self, scope: str, where: str) -> None:
        self.scope, self.where = scope, where
        self.preprocessor: dict[str, Any] = {}
        self.augmentation: dict[str, Any] = {}
        self.notes: list[tuple[str, str]] = []

    def convert(self, pipeline: list[dict], test: bool) -> Pipeline:
        """The whole of a pipeline.

        Args:
            pipeline: Old steps.
            test: Whether pictures are evaluated: the truth is loaded behind Resize then.

        Raises:
            UserError: A step that has no counterpart.
        """
        steps = self.steps(pipeline)
        if test and not any(step['type'] == 'LoadAnnotations' for step in steps):
            # The truth stays at the picture's own size.
            load = (dict(type='LoadAnnotations') if self.scope == 'mmseg' else
                    dict(type='LoadAnnotations', with_bbox=True, with_mask=True))
            steps.append(load)
            self.note('(nothing)', 'LoadAnnotations: mmengine evaluates by what the pipeline loads')
        if self.scope == 'mmseg':
            steps.append(dict(type='PackSegInputs'))
        elif test:
            steps.append(dict(type='PackDetInputs', meta_keys=(
                'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')))
        else:
            steps.append(dict(type='PackDetInputs'))
        return Pipeline(steps, self.preprocessor, self.augmentation, self.notes)

    def steps(self, pipeline: list[dict]) -> list[dict]:
        """Old steps → new ones, without the packing at the end."""
        found: list[dict] = []
        for old in pipeline:
            if not isinstance(old, dict) or 'type' not in old:
                raise UserError(f'{self.where}: {old!r} is no step with a type')
            settings = {key: value for key, value in old.items() if key != 'type'}
            kind = old['type'].rsplit('.', 1)[-1]
            special: Callable | None = getattr(self, f'_{kind.lower()}', None)
            if special:
                made = special(settings)
            elif kind in DROPPED:
                self.note(kind, DROPPED[kind])
                made = []
            elif self._known(kind):
                made = [dict(type=kind, **settings)]
            else:
                raise UserError(f'{self.where}: the step {kind!r} is registered neither in '
                                f'{self.scope} nor in mmcv: import the module that has it '
                                '(custom_imports), or take it out')
            found += made
        return found

    def note(self, old: str, new: str) -> None:
        if (old, new) not in self.notes:
            self.notes.append((old, new))

    def _known(self, kind: str) -> bool:
        return import_module(f'{self.scope}.registry').TRANSFORMS.get(kind) is not None

    def _normalize(self, s: dict) -> list[dict]:
        self.preprocessor.update(mean=list(s['mean']), std=list(s['std']),
                                 bgr_to_rgb=s.get('to_rgb', True))
        self.note('Normalize', 'the model normalises (data_preprocessor)')
        return []

    def _pad(self, s: dict) -> list[dict]:
        if s.get('size') is not None:
            size = s['size']
            self.preprocessor['size'] = (size, size) if isinstance(size, int) else tuple(size)
        if s.get('size_divisor') is not None:
            divisor = 'size_divisor' if self.scope == 'mmseg' else 'pad_size_divisor'
            self.preprocessor[divisor] = s['size_divisor']
        value = s.get('pad_val')
        if self.scope == 'mmseg':
            self.preprocessor.update(pad_val=0 if value is None else value,
                                     seg_pad_val=s.get('seg_pad_val', 255))
        elif isinstance(value, dict):
            self.preprocessor['pad_value'] = value.get('img', 0)
        elif value:
            self.preprocessor['pad_value'] = value
        self.note('Pad', 'the model pads (data_preprocessor)')
        return []

    def _resize(self, s: dict) -> list[dict]:
        scale = s.get('img_scale')
        keep = s.get('keep_ratio', True)
        for key in ('override', 'bbox_clip_border', 'backend', 'interpolation', 'min_size'):
            if key in s:
                self.note(f'Resize.{key}', 'left out' if key == 'override' else
                          'left out: the new default is the same or close')
        if s.get('ratio_range') is not None:
            return [dict(type='RandomResize', scale=_pair(scale),
                         ratio_range=tuple(s['ratio_range']), keep_ratio=keep)]
        if isinstance(scale, list) and len(scale) > 1:
            scales = [tuple(one) for one in scale]
            if s.get('multiscale_mode', 'range') == 'value':
                return [dict(type='RandomChoiceResize', scales=scales, keep_ratio=keep)]
            if self.scope == 'mmdet':
                return [dict(type='RandomResize', scale=scales, keep_ratio=keep)]
            raise UserError(f"{self.where}: Resize with multiscale_mode='range' draws both sides "
                            'on their own, which mmseg has no more: use ratio_range')
        return [dict(type='Resize', scale=_pair(scale), keep_ratio=keep)] if scale else []

    def _randomflip(self, s: dict) -> list[dict]:
        prob = s.get('prob', s.get('flip_ratio'))
        made = dict(type='RandomFlip', **({} if prob is None else dict(prob=prob)))
        if s.get('direction', 'horizontal') != 'horizontal':
            made['direction'] = s['direction']
        # Inside MultiScaleFlipAug it flips where that says so.
        return [made] if prob is not None else []

    def _autoaugment(self, s: dict) -> list[dict]:
        return [dict(type='RandomChoice',
                     transforms=[self.steps(policy) for policy in s['policies']])]

    def _multiscaleflipaug(self, s: dict) -> list[dict]:
        scale, ratios = s.get('img_scale'), s.get('img_ratios')
        ratios = [ratios] if isinstance(ratios, (int, float)) else list(ratios or [1.0])
        scales = [tuple(one) for one in scale] if isinstance(scale, list) and scale and isinstance(
            scale[0], (list, tuple)) else [tuple(scale)]
        sizes = [(round(w * r), round(h * r)) for w, h in scales for r in ratios]
        keep = next((step.get('keep_ratio', True) for step in s['transforms']
                     if step['type'] == 'Resize'), True)
        self.augmentation.update(scales=sizes, flip=bool(s.get('flip')), keep_ratio=keep)
        several = len(sizes) > 1 or s.get('flip')
        self.note('MultiScaleFlipAug', 'Resize' + (
            ' and, with the flips and other scales, tta_pipeline' if several else ''))
        inner = [step for step in s['transforms'] if step['type'] not in ('Resize', 'RandomFlip')]
        return [dict(type='Resize', scale=scales[0], keep_ratio=keep), *self.steps(inner)]


def tta_pipeline(augmentation: dict[str, Any], test_pipeline: list[dict]) -> list[dict]:
    """mmcv's TestTimeAug for what MultiScaleFlipAug did."""
    load = [step for step in test_pipeline if step['type'] == 'LoadAnnotations']
    pack = dict(test_pipeline[-1])
    if pack['type'] == 'PackDetInputs':
        pack['meta_keys'] = (*pack['meta_keys'], 'flip', 'flip_direction')
    flips = (0.0, 1.0) if augmentation['flip'] else (0.0,)
    return [test_pipeline[0], dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale=scale, keep_ratio=augmentation['keep_ratio'])
         for scale in augmentation['scales']],
        [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in flips],
        load, [pack]])]


def _pair(scale: Any) -> Any:
    """(2048, 512) from any of the ways it is written."""
    if isinstance(scale, list) and len(scale) == 1:
        scale = scale[0]
    return tuple(scale) if isinstance(scale, (list, tuple)) else scale
