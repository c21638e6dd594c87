"""Weights of any published naming, fitted exactly to a ConvNeXt backbone or a whole model."""
from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from torch import Tensor, nn

from ..archs import Arch
from ..errors import UserError
from ..utils import unwrap_model
from . import naming
from .files import read, weights
from .naming import State


@dataclass
class Fitted:
    """Weights with a backbone's own names, and what became of the rest."""

    state: State
    family: naming.Found
    dropped: list[str]
    fresh: list[str]
    adapted: str

    def __str__(self) -> str:
        return (f'{len(self.state)} tensors ({self.family}); dropped: {grouped(self.dropped)}; '
                f'fresh: {grouped(self.fresh)}{self.adapted}')


def fit(state: State, backbone: nn.Module, source: str, prefix: str | None = None) -> Fitted:
    """The part of ``state`` that is the ConvNeXt ``backbone``, under its names.

    Classifiers, heads of whole models, and stages and norms that ``out_indices`` leaves out
    are dropped. Norms of feature maps, and what a subclass adds beside stem and stages, may be
    missing and start fresh.

    Args:
        state: Weights in a published naming.
        backbone: A :class:`convnext_mm.ConvNeXt`.
        source: Where they come from, for messages.
        prefix: What stands before the backbone's names, see :func:`naming.find`.

    Raises:
        UserError: A parameter is missing, unexpected or of another shape; none is loaded then.
    """
    state = naming.dense({name.removeprefix('module.'): value for name, value in state.items()})
    found = naming.find(state, source, prefix)
    ours, beside, outside = naming.to_official(state, found)
    size = naming.architecture(ours)
    own = backbone.state_dict()
    # What a subclass adds, and what stands there by the backbone's own names already.
    ours.update({name: beside.pop(name) for name in [*beside] if name in own})
    unused = [name for name in ours if name not in own and _is_unused(name, backbone)]
    aside = [name for name in beside if name.split('.')[0] in naming.LEFT_ASIDE]
    problems = [f'unexpected {name}' for name in [*ours, *beside]
                if name not in own and name not in unused and name not in aside]
    fitted = {name: value for name, value in ours.items() if name in own}
    fresh = [name for name in own if name not in fitted
             and not name.startswith(('downsample_layers.', 'stages.'))
             # Half a norm is damage.
             and not any(other.startswith(name.rpartition('.')[0] + '.') for other in fitted)]
    adapted = adapt_stem(fitted, own)
    problems += differences({name: own[name] for name in own if name not in fresh}, fitted)
    if problems:
        advice = (f'The weights are of {size}, the backbone is of {backbone.arch}.\nMake them the '
                  'same, or choose other weights.' if size != backbone.arch else
                  'The sizes agree: the file is damaged, or of a variant that is none of ConvNeXt.')
        raise UserError(f'{source} ({found}) does not fit this ConvNeXt ({len(problems)} '
                        f'parameters):\n  {shown(problems)}\n{advice}')
    return Fitted(fitted, found, [*outside, *unused, *aside], fresh, adapted)


def adapt_stem(state: State, own: State) -> str:
    """Fit the stem's kernels for pictures in RGB to another number of channels, as timm does.

    For one channel they are summed: grey pictures give what they give as RGB. For more they are
    repeated (RGBRG…) and scaled by 3 / channels, which keeps the size of the answer.

    Args:
        state: Weights with the authors' names; the stem's is replaced.
        own: The state dict of the backbone.

    Returns:
        What was done, for the log; '' if nothing.
    """
    name = 'downsample_layers.0.0.weight'
    if name not in state or state[name].ndim != 4:
        return ''
    theirs, channels = state[name].shape[1], own[name].shape[1]
    if theirs != 3 or channels == 3:
        return ''
    if channels == 1:
        state[name], how = state[name].sum(dim=1, keepdim=True), 'summed'
    else:
        index = torch.arange(channels) % 3
        state[name], how = state[name][:, index] * (3 / channels), f'repeated, times 3/{channels}'
    return f'; stem: kernels of 3 channels {how} for in_chans={channels}'


def load_backbone(backbone: nn.Module, init_cfg: dict[str, Any]) -> None:
    """Load published or trained weights into a ConvNeXt backbone, all of them or none.

    Args:
        backbone: The backbone to fill.
        init_cfg: ``dict(type='Pretrained', checkpoint=PATH_OR_URL, prefix=...)``; prefix is
            needed only where a file holds several ConvNeXts.

    Raises:
        UserError: The file cannot be read (:func:`read`) or does not fit (:func:`fit`).
    """
    source = init_cfg.get('checkpoint')
    if init_cfg.get('type') != 'Pretrained' or not source:
        raise UserError(f'ConvNeXt: init_cfg={init_cfg}: expected '
                        "dict(type='Pretrained', checkpoint='PATH or URL')")
    fitted = fit(weights(read(source)), backbone, source, init_cfg.get('prefix'))
    backbone.load_state_dict(fitted.state, strict=False)
    print_log(f'ConvNeXt: loaded from {source}: {fitted}', logger='current')


def rename_for(backbone: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    """Bring a state dict that is being loaded to the names of ``backbone``, in place.

    Args:
        backbone: Whose turn it is.
        state: The names that begin with ``prefix``, of any family.
        prefix: The backbone's place in the model, such as 'backbone.'.

    Raises:
        UserError: Nothing, or not all, of the backbone is there.
    """
    # At the top there may be a whole file, whose weights mmengine did not find.
    part = weights(state) if not prefix else {
        name.removeprefix(prefix): value for name, value in state.items()
        if name.startswith(prefix)}
    own = backbone.state_dict()
    if not differences(own, part) and len(part) == len(own):
        return
    if not part:
        raise UserError(f"The weights hold nothing for the ConvNeXt at {prefix.rstrip('.')!r} of "
                        'this model, which would stay random. Weights of a backbone alone go into '
                        "its init_cfg=dict(type='Pretrained', checkpoint=...), or into load_from")
    fitted = fit(part, backbone, 'The state dict')
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]
    state.update({prefix + name: value for name, value in fitted.state.items()})
    if fitted.family != naming.Found('official', ''):
        print_log(f'ConvNeXt: loaded from a state dict: {fitted}', logger='current')


def rename_on_load(backbone: nn.Module, state: dict[str, Tensor], prefix: str,
                   *args: Any) -> None:
    """:func:`rename_for` as a hook of ``register_load_state_dict_pre_hook``."""
    rename_for(backbone, state, prefix)


def for_model(content: dict[str, Any], model: nn.Module, source: str) -> tuple[State, str]:
    """A checkpoint's weights under the names of a whole ``model``.

    Files of a backbone alone, in any naming, get the backbone's place in the model; in whole
    models the backbone is renamed. A model without our ConvNeXt gets the weights as they are.

    Returns:
        The weights, and a line for the log if anything was done.

    Raises:
        UserError: The backbone's part does not fit.
    """
    state = {name.removeprefix('module.'): value for name, value in weights(content).items()}
    place = backbone_place(model)
    if place is None:
        return state, ''
    backbone = model.get_submodule(place)
    fitted = fit(state, backbone, source)
    prefix = place + '.' if place else ''
    if fitted.family == naming.Found('official', prefix) and not fitted.adapted:
        return state, ''
    whole = fitted.family.prefix == prefix
    heads = {name: value for name, value in state.items()
             if whole and not name.startswith(prefix)}
    if whole:
        fitted.dropped = [name for name in fitted.dropped if name not in heads]
    return {**{prefix + name: value for name, value in fitted.state.items()}, **heads}, (
        f'ConvNeXt: loaded from {source}: {fitted}')


def backbone_place(model: nn.Module) -> str | None:
    """The name of the first ConvNeXt of ours in a model; None: there is none."""
    return next((name for name, module in model.named_modules()
                 if isinstance(getattr(module, 'arch', None), Arch)), None)


def load_model(model: nn.Module, source: str) -> None:
    """Load a checkpoint into a whole model, all of it or nothing.

    Raises:
        UserError: Lists what is missing or differs.
    """
    state = check_complete(model, source)
    model.load_state_dict({name: state[name] for name in model.state_dict()})


def check_complete(model: nn.Module, source: str) -> State:
    """See that a checkpoint has every parameter of a whole model, in its shape.

    Without this, a checkpoint of another task or size leaves parts of the model random.

    Returns:
        Its weights, under the model's names.

    Raises:
        UserError: Lists what is missing or differs.
    """
    state = for_model(read(source), model, source)[0]
    _complete(model, state, source)
    return state


def _complete(model: nn.Module, state: State, source: str) -> None:
    own = model.state_dict()
    problems = differences(own, state)
    if problems:
        raise UserError(f'{source} does not fit the model of this config ({len(problems)} of '
                        f'{len(own)} parameters):\n  {shown(problems)}\nGive the checkpoint that '
                        'was trained with this config, or the config it was trained with.')


class FitCheckpointHook(Hook):
    """Fits what ``load_from`` and ``resume`` read to the model, before mmengine loads it.

    mmengine takes what has the right name and shape and passes over the rest; a file in another
    naming would load nothing, and the run start from noise.
    """

    priority = 'VERY_HIGH'  # EMAHook copies what is read

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Put the weights that fit under 'state_dict'.

        Raises:
            UserError: They do not fit the backbone, or, on resuming, the whole model.
        """
        model = unwrap_model(runner.model)
        source = str(runner._load_from or f'The latest checkpoint in {runner.work_dir}')
        state, line = for_model(checkpoint, model, source)
        if runner._resume:
            _complete(model, state, source)
        elif line:
            print_log(line, logger='current')
        checkpoint['state_dict'] = state


def differences(own: State, state: State) -> list[str]:
    """What of ``own`` is missing from ``state`` or has another shape there."""
    return [f'missing {name}' for name in own if name not in state] + [
        f'{name} is {list(state[name].shape)}, the model has {list(value.shape)}'
        for name, value in own.items() if name in state and state[name].shape != value.shape]


def shown(problems: list[str], count: int = 12) -> str:
    """The first of the problems, a line each."""
    more = [f'… and {len(problems) - count} more'] * (len(problems) > count)
    return '\n  '.join(problems[:count] + more)


def _is_unused(name: str, backbone: nn.Module) -> bool:
    """Whether a parameter is none of the backbone's on purpose: a classifier, an unused stage."""
    if name.startswith(('norm.', 'head.')):
        return True
    stage = re.match(r'(?:downsample_layers\.|stages\.|norm)(\d+)\.', name)
    if not stage or int(stage[1]) >= len(backbone.arch.depths):
        return False
    return name.startswith('norm') or int(stage[1]) >= len(backbone.stages)


def grouped(names: list[str]) -> str:
    """'head (2), norm0 (2)': the first parts of the names, with how many there are of each."""
    counts = Counter(name.split('.')[0] for name in names)
    return ', '.join(f'{name} ({count})' for name, count in counts.items()) or 'none'
