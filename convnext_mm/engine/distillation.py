"""Training with a teacher: ``distil=dict(teacher=CONFIG, checkpoint=FILE)`` in any recipe.

Segmentors learn the teacher's logits, each class as a distribution over the pixels (Shu et al.,
"Channel-wise Knowledge Distillation for Dense Prediction", 2021, equation 4). Detectors learn the
maps of its neck up to scale and shift of each channel (Cao et al., "PKD: General Distillation
Framework for Object Detectors via Pearson Correlation Coefficient", 2022, section 3). Neither has
parameters. A detector starts with the teacher's weights of the neck and the heads that fit it, as
the students of Yang et al., "Focal and Global Knowledge Distillation for Detectors", 2022. The
teacher is no part of the model: it is not saved, averaged or optimized.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS
from torch import Tensor, nn

from .. import checkpoints
from ..datasets import dataset_metainfo, datasets_of_split
from ..errors import UserError
from ..utils import unwrap_model
from . import checks

LOSS = 'loss_distil'
WEIGHTS = dict(mmseg=5.0, mmdet=1.0)
"""Default weights of the loss."""


class Settings(NamedTuple):
    """The key ``distil``.

    Args:
        teacher: Config of the teacher, or the name of a recipe.
        checkpoint: File or URL of its weights.
        weight: Factor of the loss; None: :data:`WEIGHTS`.
        temperature: Of the distributions over pixels (segmentation).
        inherit: Whether the student starts with the teacher's neck and heads; None: a detector.
    """

    teacher: str
    checkpoint: str
    weight: float | None = None
    temperature: float = 1.0
    inherit: bool | None = None


def read_settings(cfg: Config) -> Settings | None:
    """The settings of a config, or None if it has no teacher.

    Raises:
        UserError: A key is missing, unknown, or has a value of another kind.
    """
    given = cfg.get('distil')
    if not given:
        return None
    example = "distil=dict(teacher='work_dirs/big/big.py', checkpoint='work_dirs/big/best.pth')"
    if not isinstance(given, dict) or not {'teacher', 'checkpoint'} <= {*given}:
        raise UserError(f'distil={given!r}: expected e.g. {example}')
    unknown = {*given} - {*Settings._fields}
    if unknown:
        raise UserError(f'distil.{sorted(unknown)[0]} is not known: the keys are '
                        f'{", ".join(Settings._fields)}')
    settings = Settings(**given)
    for name, value, least in (('weight', settings.weight, 0), ('temperature', settings.temperature,
                                                               1e-3)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))
                                  or not value >= least):
            raise UserError(f'distil.{name}={value!r} must be a number from {least} up')
    if not isinstance(settings.inherit, bool | None):
        raise UserError(f'distil.inherit={settings.inherit!r} must be True or False')
    return settings


def read_teacher(cfg: Config) -> tuple[Settings, Config] | None:
    """The settings and the teacher's config, checked against the student's.

    Raises:
        UserError: The teacher cannot be read, or is for another task, other classes or bands.
    """
    settings = read_settings(cfg)
    if settings is None:
        return None
    teacher = checks.read_config(settings.teacher, notes=[])
    checkpoints.locate_checkpoint(settings.checkpoint)
    if cfg.default_scope not in WEIGHTS or teacher.default_scope != cfg.default_scope:
        raise UserError(f'distil.teacher={settings.teacher} is of {teacher.default_scope}, but '
                        f'this config of {cfg.default_scope}: both must be segmentors of mmseg or '
                        'detectors of mmdet')
    found = [_classes(one) for one in (cfg, teacher)]
    if found[0] and found[1] and [*found[0]] != [*found[1]]:
        raise UserError(f'distil.teacher={settings.teacher} has {len(found[1])} classes '
                        f'{_shortened(found[1])}, but this config {len(found[0])} '
                        f'{_shortened(found[0])}: a teacher must know the same, in this order')
    bands = [one.model.get('backbone', {}).get('in_chans', 3) for one in (cfg, teacher)]
    if bands[0] != bands[1]:
        raise UserError(f'distil.teacher={settings.teacher} reads images of {bands[1]} bands, but '
                        f'this config of {bands[0]}')
    return settings, teacher


def _classes(cfg: Config) -> Sequence[str]:
    dataset = next(iter(datasets_of_split(cfg, 'train')), None)
    return () if dataset is None else dataset_metainfo(dataset, cfg.default_scope).get(
        'classes') or ()


def _shortened(names: Sequence[str]) -> str:
    return f'({", ".join(names[:4])}{", …" if len(names) > 4 else ""})'


class DistillationHook(Hook):
    """Adds the loss to the student's, which ``forward(mode='loss')`` returns.

    In each training iteration, forward hooks keep the student's maps; the teacher sees the
    student's augmented images, in eval mode and without gradients.
    """

    priority = 'HIGHEST'  # weights are inherited before they are divided among processes

    def __init__(self) -> None:
        self.handles: list[Any] = []
        self.kept: list[Any] = []

    def before_train(self, runner) -> None:
        """Build the teacher; a student that starts anew inherits from it.

        Raises:
            UserError: See :func:`read_teacher`; the weights do not fit it, or its maps do not fit
                the student's.
        """
        found = read_teacher(runner.cfg)
        assert found is not None
        self.settings, cfg = found
        self.student = unwrap_model(runner.model)
        cfg.model.backbone.init_cfg = None
        teacher = revert_sync_batchnorm(MODELS.build(cfg.model))
        checkpoints.load_model(teacher, self.settings.checkpoint)
        self.teacher = teacher.to(next(self.student.parameters()).device).eval()
        self.teacher.requires_grad_(False)
        self.rescale = _rescaling(self.student.data_preprocessor, teacher.data_preprocessor)
        self.segments = cfg.default_scope == 'mmseg'
        self.weight = (WEIGHTS[cfg.default_scope] if self.settings.weight is None
                       else self.settings.weight)
        for model in (self.student, self.teacher):
            _source(model, self.segments)
        print_log(f'Teacher: {self.settings.teacher} with {self.settings.checkpoint}, '
                  f'{sum(p.numel() for p in teacher.parameters()) / 1e6:.1f} M parameters; '
                  f'{LOSS} × {self.weight:g}', logger='current')
        starts_anew = not runner.iter and not runner.cfg.get('load_from')
        inherits = self.settings.inherit
        if starts_anew and (not self.segments if inherits is None else inherits):
            names = inherit(self.student, self.teacher)
            parts = ', '.join(dict.fromkeys(name.partition('.')[0] for name in names))
            print_log(f'{len(names)} weights of the teacher start the student'
                      f'{f" ({parts})" if parts else ""}. distil.inherit=False: none',
                      logger='current')

    def before_train_iter(self, runner, batch_idx: int, data_batch: Any = None) -> None:
        """Start to keep the student's maps."""
        self.handles = [
            _source(self.student, self.segments).register_forward_hook(
                lambda module, inputs, output: self.kept.append(output)),
            self.student.register_forward_hook(self._add_loss, with_kwargs=True)]

    def after_train_iter(self, runner, batch_idx: int, data_batch: Any = None,
                         outputs: Any = None) -> None:
        """Remove the hooks, so that validation runs as without them."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.kept = [], []

    def _add_loss(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get('mode') != 'loss':
            return output
        kept, self.kept = self.kept, []
        if not kept:
            raise UserError("distil sees no maps of this model's head or neck: a compiled part "
                            '(fast.compile) hides them')
        images = kwargs['inputs'] if 'inputs' in kwargs else args[0]
        with torch.no_grad():
            maps = teacher_maps(self.teacher, self.rescale(images), self.segments)
        loss = (channel_wise(kept[-1], maps[0], self.settings.temperature) if self.segments
                else pearson(kept[0], maps))
        return {**output, LOSS: self.weight * loss}


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module) -> list[str]:
    """Copy the weights outside the backbone whose names and shapes are those of the student.

    The heads of Mask R-CNN are compared with those of the last stage of Cascade Mask R-CNN.

    Returns:
        Their names.
    """
    other = dict(teacher.state_dict())
    for kind in ('bbox_head', 'mask_head'):
        stages = getattr(getattr(teacher, 'roi_head', None), kind, None)
        if isinstance(stages, nn.ModuleList):
            other |= {f'roi_head.{kind}.{name}': value
                      for name, value in stages[-1].state_dict().items()}
    names = []
    for name, value in student.state_dict().items():
        found = None if name.startswith('backbone.') else other.get(name)
        if found is not None and found.shape == value.shape:
            value.copy_(found)
            names.append(name)
    return names


def _source(model: nn.Module, segments: bool) -> nn.Module:
    """The layer whose output is learnt: the last convolution of a head, or the neck."""
    layer = (getattr(getattr(model, 'decode_head', None), 'conv_seg', None) if segments
             else getattr(model, 'neck', None))
    if not isinstance(layer, nn.Module):
        raise UserError(f'distil: {type(model).__name__} has no '
                        f'{"decode_head with a conv_seg" if segments else "neck"}')
    return layer


def teacher_maps(teacher: Any, images: Tensor, segments: bool) -> Sequence[Tensor]:
    """Logits (N, classes, H, W) of a segmentor, alone in a list, or the maps of a detector."""
    features = teacher.extract_feat(images)
    return [teacher.decode_head.forward(features)] if segments else features


def _rescaling(student: Any, teacher: Any) -> Any:
    """From images that the student's preprocessor has normalized to those of the teacher's."""
    def affine(one: Any) -> tuple[Any, Any]:
        normalizes = getattr(one, '_enable_normalize', False)
        return (one.mean, one.std) if normalizes else (0.0, 1.0)
    order = [getattr(one, '_channel_conversion', getattr(one, 'channel_conversion', None))
             for one in (student, teacher)]
    if order[0] != order[1]:
        raise UserError('distil: the teacher reads the bands of images in another order '
                        '(model.data_preprocessor.bgr_to_rgb)')
    (mean, std), (other_mean, other_std) = affine(student), affine(teacher)
    if torch.equal(torch.as_tensor(mean).cpu(), torch.as_tensor(other_mean).cpu()) and torch.equal(
            torch.as_tensor(std).cpu(), torch.as_tensor(other_std).cpu()):
        return lambda images: images

    def rescale(images: Tensor) -> Tensor:
        own, other = ([torch.as_tensor(value).to(images) for value in pair]
                      for pair in ((mean, std), (other_mean, other_std)))
        return (images * own[1] + own[0] - other[0]) / other[1]
    return rescale


def channel_wise(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of each channel's distribution over the pixels, averaged over N and C.

    Args:
        student: Logits (N, C, H, W).
        teacher: Logits (N, C, h, w); resized to the student's if they differ.
        temperature: Divides both.

    Raises:
        UserError: The numbers of channels differ.
    """
    if student.shape[1] != teacher.shape[1]:
        raise UserError(f'distil: the teacher has {teacher.shape[1]} classes, the student '
                        f'{student.shape[1]}')
    student, teacher = student.float(), teacher.float()
    if student.shape[2:] != teacher.shape[2:]:
        teacher = F.interpolate(teacher, student.shape[2:], mode='bilinear')
    own, other = ((x / temperature).flatten(2).log_softmax(-1) for x in (student, teacher))
    divergence = F.kl_div(own, other, reduction='sum', log_target=True)
    return divergence * temperature**2 / (student.shape[0] * student.shape[1])


def pearson(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Half of the mean squared difference of normalized channels, summed over the levels.

    It is 1 - r for Pearson's correlation coefficient r of each channel, averaged over them.

    Args:
        student: Maps (N, C, H_i, W_i).
        teacher: The same number of maps (N, C, h_i, w_i), resized to the student's.

    Raises:
        UserError: The numbers of maps or channels differ.
    """
    shapes = [[x.shape[1] for x in maps] for maps in (student, teacher)]
    if shapes[0] != shapes[1]:
        raise UserError(f"distil: the neck of the teacher gives maps of {shapes[1]} channels, the "
                        f"student's {shapes[0]}. Set model.neck.out_channels and num_outs alike")
    losses = []
    for own, other in zip(student, teacher, strict=True):
        own, other = own.float(), other.float()
        if own.shape[2:] != other.shape[2:]:
            other = F.interpolate(other, own.shape[2:], mode='bilinear')
        losses.append(F.mse_loss(_normalized(own), _normalized(other)) / 2)
    return torch.stack(losses).sum()


def _normalized(x: Tensor) -> Tensor:
    """Each channel with mean 0 and variance 1 over images and pixels."""
    flat = x.transpose(0, 1).flatten(1)
    centered = flat - flat.mean(1, keepdim=True)
    return centered / (centered.square().mean(1, keepdim=True).sqrt() + 1e-6)
