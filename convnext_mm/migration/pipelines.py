"""Converts pipelines of both tasks, and settings that moved to the model's preprocessor."""
from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from ..errors import UserError
from .parsing import REGISTER_HINT

REMOVED_STEPS = {
    **dict.fromkeys(('DefaultFormatBundle', 'DefaultFormatBundle3D', 'ImageToTensor', 'ToTensor',
                     'Collect'), 'removed: the packing step does this'),
    'SegRescale': 'removed: masks are resized with their image'}
"""Steps whose work something else does now."""

COLOR_STEPS = dict(ColorTransform='Color', BrightnessTransform='Brightness',
                   ContrastTransform='Contrast', EqualizeTransform='Equalize')
"""Steps of mmdet 2.x that have another name, and another default probability."""

RESIZE_STEPS = ('Resize', 'SETR_Resize')
LONG_SIDE = 100_000
"""The longer side of a scale that only limits the shorter side of an image, in pixels."""


class ConvertedPipeline(NamedTuple):
    """A converted pipeline.

    Args:
        steps: The new steps.
        preprocessor: Settings for the model's ``data_preprocessor``.
        augmentation: ``scales``, ``flip`` and ``keep_ratio`` of a MultiScaleFlipAug, or empty.
        notes: Rows for the report: (old, new) pairs.
    """

    steps: list[dict]
    preprocessor: dict[str, Any]
    augmentation: dict[str, Any]
    notes: list[tuple[str, str]]


class PipelineConverter:
    """Converts the pipelines of one task.

    Args:
        scope: 'mmseg' or 'mmdet'.
        location: File and key of the pipeline, for error messages.
    """

    def __init__(self, scope: str, location: str) -> None:
        self.scope, self.location = scope, location
        self.preprocessor: dict[str, Any] = {}
        self.augmentation: dict[str, Any] = {}
        self.notes: list[tuple[str, str]] = []

    def convert(self, pipeline: list[dict], test: bool) -> ConvertedPipeline:
        """Convert a pipeline.

        Args:
            pipeline: The old steps.
            test: Whether the pipeline is for evaluation, which loads annotations after Resize.

        Raises:
            UserError: A step that cannot be converted.
        """
        steps = self.convert_steps(pipeline)
        if test and not any(step['type'] == 'LoadAnnotations' for step in steps):
            # After Resize, so that the annotations keep the size of the original image.
            load = (dict(type='LoadAnnotations') if self.scope == 'mmseg' else
                    dict(type='LoadAnnotations', with_bbox=True, with_mask=True))
            steps.append(load)
            self.add_note('(missing)', 'LoadAnnotations: mmengine evaluates against them')
        if self.scope == 'mmseg':
            steps.append(dict(type='PackSegInputs'))
        elif test:
            steps.append(dict(type='PackDetInputs', meta_keys=(
                'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')))
        else:
            steps.append(dict(type='PackDetInputs'))
        return ConvertedPipeline(steps, self.preprocessor, self.augmentation, self.notes)

    def convert_steps(self, pipeline: list[dict]) -> list[dict]:
        """Convert the steps, without adding the packing step at the end."""
        steps: list[dict] = []
        for old in pipeline:
            if not isinstance(old, dict) or 'type' not in old:
                raise UserError(f'{self.location}: {old!r} is not a dict with a type')
            settings = {key: value for key, value in old.items() if key != 'type'}
            kind = old['type'].rsplit('.', 1)[-1]
            convert: Callable[[dict], list[dict]] | None = getattr(
                self, f'_convert_{kind.lower()}', None)
            if convert:
                steps += convert(settings)
            elif kind in COLOR_STEPS and self.scope == 'mmdet':
                steps.append(dict(dict(type=COLOR_STEPS[kind], prob=0.5), **settings))
                self.add_note(kind, COLOR_STEPS[kind] + (
                    ', which rounds its magnitude to 0.1' if 'level' in settings else ''))
            elif kind in REMOVED_STEPS:
                self.add_note(kind, REMOVED_STEPS[kind])
            elif import_module(f'{self.scope}.registry').TRANSFORMS.get(kind):
                steps.append(dict(type=kind, **settings))
            else:
                raise UserError(f'{self.location}: step {kind!r} is not registered in {self.scope} '
                                f'or mmcv. {REGISTER_HINT}')
        return steps

    def add_note(self, old: str, new: str) -> None:
        """Add a row to the report, once."""
        if (old, new) not in self.notes:
            self.notes.append((old, new))

    def _convert_normalize(self, settings: dict) -> list[dict]:
        self.preprocessor.update(mean=list(settings['mean']), std=list(settings['std']),
                                 bgr_to_rgb=settings.get('to_rgb', True))
        self.add_note('Normalize', 'model.data_preprocessor')
        return []

    def _convert_pad(self, settings: dict) -> list[dict]:
        size = settings.get('size')
        if size is not None:
            size = (size, size) if isinstance(size, int) else tuple(size)
            if self.scope == 'mmseg':
                self.preprocessor['size'] = size
            else:  # large-scale jitter: all batches have one size
                value = settings.get('pad_val') or 0
                self.preprocessor['batch_augments'] = [dict(
                    type='BatchFixedSizePad', size=size, pad_mask=True,
                    img_pad_value=value.get('img', 0) if isinstance(value, dict) else value)]
        if settings.get('size_divisor') is not None:
            divisor = 'size_divisor' if self.scope == 'mmseg' else 'pad_size_divisor'
            self.preprocessor[divisor] = settings['size_divisor']
        pad_value = settings.get('pad_val')
        if self.scope == 'mmseg':
            self.preprocessor.update(pad_val=0 if pad_value is None else pad_value,
                                     seg_pad_val=settings.get('seg_pad_val', 255))
        elif isinstance(pad_value, dict):
            self.preprocessor['pad_value'] = pad_value.get('img', 0)
        elif pad_value:
            self.preprocessor['pad_value'] = pad_value
        self.add_note('Pad', 'model.data_preprocessor')
        return []

    def _convert_resize(self, settings: dict) -> list[dict]:
        scale = settings.get('img_scale')
        keep_ratio = settings.get('keep_ratio', True)
        if settings.get('setr_multi_scale'):
            raise UserError(f'{self.location}: setr_multi_scale is known in MultiScaleFlipAug '
                            'only: remove it here, or set img_scale to what it computes')
        for key in ('override', 'bbox_clip_border', 'backend', 'interpolation', 'min_size'):
            if key in settings:
                self.add_note(f'Resize.{key}', 'removed' if key == 'override' else
                              'removed: the new default is the same or close')
        if settings.get('ratio_range') is not None:
            return [dict(type='RandomResize', scale=_as_tuple(scale),
                         ratio_range=tuple(settings['ratio_range']), keep_ratio=keep_ratio)]
        if isinstance(scale, list) and len(scale) > 1:
            scales = list(map(tuple, scale))
            if settings.get('multiscale_mode', 'range') == 'value':
                return [dict(type='RandomChoiceResize', scales=scales, keep_ratio=keep_ratio)]
            if self.scope == 'mmdet':
                return [dict(type='RandomResize', scale=scales, keep_ratio=keep_ratio)]
            raise UserError(f"{self.location}: Resize with multiscale_mode='range' samples width "
                            'and height independently, which mmseg no longer supports: use '
                            'ratio_range')
        return [dict(type='Resize', scale=_as_tuple(scale), keep_ratio=keep_ratio)] if scale else []

    _convert_setr_resize = _convert_resize  # of BEiT: the same, except in tests at several scales

    def _convert_albu(self, settings: dict) -> list[dict]:
        """Labels have another name in mmdet 3.x, and boxes to ignore are among the others."""
        params = settings.get('bbox_params')
        if self.scope == 'mmdet' and isinstance(params, dict) and 'label_fields' in params:
            fields = ['gt_bboxes_labels' if name == 'gt_labels' else name
                      for name in params['label_fields']]
            settings['bbox_params'] = dict(params, label_fields=[
                *fields, *(['gt_ignore_flags'] * ('gt_ignore_flags' not in fields))])
            self.add_note('Albu.bbox_params.label_fields', ', '.join(
                settings['bbox_params']['label_fields']))
        if 'update_pad_shape' in settings:
            del settings['update_pad_shape']
            self.add_note('Albu.update_pad_shape', 'removed: images are padded in the model')
        return [dict(type='Albu', **settings)]

    def _convert_rotate(self, settings: dict) -> list[dict]:
        if self.scope == 'mmdet' and not settings.keys() - {'level', 'prob'}:
            settings.setdefault('prob', 0.5)  # the default has changed
        return [dict(type='Rotate', **settings)]

    def _convert_randomflip(self, settings: dict) -> list[dict]:
        prob = settings.get('prob', settings.get('flip_ratio'))
        if prob is None:  # inside MultiScaleFlipAug, which decides whether to flip
            return []
        direction = settings.get('direction', 'horizontal')
        return [dict(type='RandomFlip', prob=prob,
                     **({} if direction == 'horizontal' else dict(direction=direction)))]

    def _convert_autoaugment(self, settings: dict) -> list[dict]:
        return [dict(type='RandomChoice',
                     transforms=[self.convert_steps(policy) for policy in settings['policies']])]

    def _convert_multiscaleflipaug(self, settings: dict) -> list[dict]:
        scale, ratios = settings.get('img_scale'), settings.get('img_ratios')
        if not scale:
            raise UserError(f'{self.location}: MultiScaleFlipAug has no img_scale: set it')
        ratios = [ratios] if isinstance(ratios, (int, float)) else list(ratios or [1.0])
        scales = list(map(tuple, scale)) if isinstance(scale, list) and isinstance(
            scale[0], (list, tuple)) else [tuple(scale)]
        resized = [(round(width * ratio), round(height * ratio))
                   for width, height in scales for ratio in ratios]
        resize: dict[str, Any] = next((step for step in settings['transforms']
                                       if step['type'] in RESIZE_STEPS), {})
        keep_ratio = resize.get('keep_ratio', True)
        if resize.get('setr_multi_scale') and keep_ratio:
            least = resize['crop_size'][0]
            scales, resized = ([(LONG_SIDE, max(min(scale), least)) for scale in some]
                               for some in (scales, resized))
            self.add_note('SETR_Resize', 'Resize: the shorter side, at least that of the crop')
        flip = bool(settings.get('flip'))
        self.augmentation.update(scales=resized, flip=flip, keep_ratio=keep_ratio)
        self.add_note('MultiScaleFlipAug', 'Resize' + (
            ', and tta_pipeline with its scales and horizontal flips'
            if len(resized) > 1 or flip else ''))
        inner = [step for step in settings['transforms']
                 if step['type'] not in (*RESIZE_STEPS, 'RandomFlip')]
        return [dict(type='Resize', scale=scales[0], keep_ratio=keep_ratio),
                *self.convert_steps(inner)]


def tta_pipeline(augmentation: dict[str, Any], test_pipeline: list[dict]) -> list[dict]:
    """Return the pipeline for test-time augmentation that corresponds to a MultiScaleFlipAug."""
    load = [step for step in test_pipeline if step['type'] == 'LoadAnnotations']
    pack = dict(test_pipeline[-1])
    if pack['type'] == 'PackDetInputs':
        pack['meta_keys'] = (*pack['meta_keys'], 'flip', 'flip_direction')
    flip_probs = (0.0, 1.0) if augmentation['flip'] else (0.0,)
    return [test_pipeline[0], dict(type='TestTimeAug', transforms=[
        [dict(type='Resize', scale=scale, keep_ratio=augmentation['keep_ratio'])
         for scale in augmentation['scales']],
        [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in flip_probs],
        load, [pack]])]


def _as_tuple(scale: Any) -> Any:
    """(2048, 512) from (2048, 512), [2048, 512] or [(2048, 512)]; other types unchanged."""
    if isinstance(scale, list) and len(scale) == 1:
        scale = scale[0]
    return tuple(scale) if isinstance(scale, (list, tuple)) else scale
