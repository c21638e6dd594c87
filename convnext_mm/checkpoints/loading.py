"""Load weights with any published naming into a ConvNeXt backbone or a whole model."""
from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from torch import Tensor, nn

from ..archs import Arch
from ..errors import UserError
from ..utils import unwrap_model
from . import naming
from .files import extract_weights, read_checkpoint
from .naming import StateDict


class Backbone(Protocol):
    """The parts of :class:`convnext_mm.ConvNeXt`, which imports this module, that are used here."""

    arch: Arch
    stages: nn.ModuleList

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], strict: bool) -> Any: ...


@dataclass
class FittedWeights:
    """Weights under a backbone's own names, and what happened to the others.

    Args:
        state: The weights to load.
        convnext: Where they were in the checkpoint.
        ignored: Names in the checkpoint that are not loaded.
        random: Names in the backbone that the checkpoint does not have; randomly initialized.
        stem: How the stem was adapted, for the log; '' if it was not.
    """

    state: StateDict
    convnext: naming.DetectedConvNeXt
    ignored: list[str]
    random: list[str]
    stem: str

    def __str__(self) -> str:
        return (f'{len(self.state)} tensors ({self.convnext}); '
                f'ignored: {count_by_module(self.ignored)}; '
                f'randomly initialized: {count_by_module(self.random)}{self.stem}')


def fit_backbone_weights(state: StateDict, backbone: Backbone, source: str,
                         prefix: str | None = None) -> FittedWeights:
    """Select the weights in ``state`` that belong to ``backbone``, and give them its names.

    Classifiers, heads of whole models, and stages and norms excluded by ``out_indices`` are
    ignored. Norms of feature maps, and modules that a subclass adds beside the stem and stages, may
    be missing and are then randomly initialized.

    Args:
        state: Weights with a published naming.
        backbone: The backbone to fill; it is not changed.
        source: Their origin, for messages.
        prefix: Prefix of the backbone's names, see :func:`naming.find_convnext`.

    Raises:
        UserError: A parameter is missing, unexpected or has another shape.
    """
    state = naming.sparse_to_dense(
        {name.removeprefix('module.'): value for name, value in state.items()})
    convnext = naming.find_convnext(state, source, prefix)
    ours, beside, outside = naming.to_official(state, convnext)
    arch = naming.infer_arch(ours)
    own = backbone.state_dict()
    # Modules that a subclass adds, and parameters that already have the backbone's own names.
    ours.update({name: beside.pop(name) for name in [*beside] if name in own})
    unused = [name for name in ours if name not in own and _is_unused(name, backbone)]
    extras = [name for name in beside if name.split('.')[0] in naming.KNOWN_EXTRAS]
    problems = [f'unexpected {name}' for name in [*ours, *beside]
                if name not in own and name not in unused and name not in extras]
    fitted = {name: value for name, value in ours.items() if name in own}
    random = [name for name in own if name not in fitted
              and not name.startswith(('downsample_layers.', 'stages.'))
              # Weight without bias, or the reverse, means that the file is damaged.
              and not any(other.startswith(name.rpartition('.')[0] + '.') for other in fitted)]
    stem = adapt_stem(fitted, own)
    problems += find_mismatches({name: own[name] for name in own if name not in random}, fitted)
    if problems:
        advice = (f'The weights are of {arch}, the backbone is of {backbone.arch}.\nUse the same '
                  'size for both.' if arch != backbone.arch else
                  'The sizes agree: the file is damaged, or of a network that differs from '
                  'ConvNeXt.')
        raise UserError(f'{source} ({convnext}) does not fit this ConvNeXt ({len(problems)} '
                        f'parameters):\n  {format_problems(problems)}\n{advice}')
    return FittedWeights(fitted, convnext, [*outside, *unused, *extras], random, stem)


def adapt_stem(state: StateDict, own: StateDict) -> str:
    """Adapt the stem's kernels for RGB images to another number of input channels, as in timm.

    For 1 channel they are summed, so that a gray image gives the same output as in RGB. For more
    than 3 they are repeated (RGBRG…) and scaled by 3 / channels, which preserves the magnitude of
    the output.

    Args:
        state: Weights with the authors' names; the stem's weight is replaced.
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


def load_backbone(backbone: Backbone, init_cfg: dict[str, Any]) -> None:
    """Load published or trained weights into a ConvNeXt backbone, completely or not at all.

    Args:
        backbone: The backbone to fill.
        init_cfg: ``dict(type='Pretrained', checkpoint=PATH_OR_URL, prefix=...)``; the prefix is
            needed only if a file contains several ConvNeXts.

    Raises:
        UserError: The file cannot be read (:func:`read_checkpoint`) or does not fit
            (:func:`fit_backbone_weights`).
    """
    source = init_cfg.get('checkpoint')
    if init_cfg.get('type') != 'Pretrained' or not source:
        raise UserError(f'ConvNeXt: init_cfg={init_cfg}: expected '
                        "dict(type='Pretrained', checkpoint='PATH or URL')")
    fitted = fit_backbone_weights(extract_weights(read_checkpoint(source)), backbone, source,
                                  init_cfg.get('prefix'))
    backbone.load_state_dict(fitted.state, strict=False)
    print_log(f'ConvNeXt: loaded from {source}: {fitted}', logger='current')


def rename_on_load(backbone: Backbone, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Give a state dict that is being loaded the names of ``backbone``, in place.

    A hook for ``register_load_state_dict_pre_hook``.

    Args:
        backbone: The module that loads.
        state: The whole state dict; the names that begin with ``prefix`` may have any naming.
        prefix: The backbone's prefix in the model, such as 'backbone.'.
        args: The hook's other arguments, not used.

    Raises:
        UserError: There are no weights for the backbone, or not all.
    """
    # Without a prefix this may be a whole file in which mmengine did not find the weights.
    part = extract_weights(state) if not prefix else {
        name.removeprefix(prefix): value for name, value in state.items()
        if name.startswith(prefix)}
    own = backbone.state_dict()
    if not find_mismatches(own, part) and len(part) == len(own):
        return
    if not part:
        raise UserError(f"The weights contain nothing for the ConvNeXt at {prefix.rstrip('.')!r} "
                        'of this model, which would stay randomly initialized. Load weights of a '
                        "backbone with its init_cfg=dict(type='Pretrained', checkpoint=...), or "
                        'with load_from.')
    fitted = fit_backbone_weights(part, backbone, 'The state dict')
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]
    state.update({prefix + name: value for name, value in fitted.state.items()})
    if fitted.convnext != naming.DetectedConvNeXt('official', ''):
        print_log(f'ConvNeXt: loaded from a state dict: {fitted}', logger='current')


def fit_model_weights(content: dict[str, Any], model: nn.Module, source: str
                      ) -> tuple[StateDict, str]:
    """Return a checkpoint's weights under the names of a whole ``model``.

    Backbone weights with any naming get the prefix of the model's backbone; in a checkpoint of a
    whole model the backbone is renamed. For a model without our ConvNeXt the weights are unchanged.

    Returns:
        The weights, and a line for the log ('' if nothing was changed).

    Raises:
        UserError: The backbone's weights do not fit.
    """
    state = {name.removeprefix('module.'): value
             for name, value in extract_weights(content).items()}
    located = _find_backbone(model)
    if located is None:
        return state, ''
    prefix, backbone = located
    # If the file has a ConvNeXt at this place, further ones belong to other parts of the model.
    same_place = any(found.prefix == prefix for found in naming.detect_convnexts(state))
    fitted = fit_backbone_weights(state, backbone, source, prefix if same_place else None)
    if fitted.convnext == naming.DetectedConvNeXt('official', prefix) and not fitted.stem:
        return state, ''
    others = {}
    if fitted.convnext.prefix == prefix:
        others = {name: value for name, value in state.items() if not name.startswith(prefix)}
        fitted.ignored = [name for name in fitted.ignored if name not in others]
    return {**{prefix + name: value for name, value in fitted.state.items()}, **others}, (
        f'ConvNeXt: loaded from {source}: {fitted}')


def _is_convnext(module: nn.Module) -> TypeGuard[Backbone]:
    return isinstance(getattr(module, 'arch', None), Arch)


def _find_backbone(model: nn.Module) -> tuple[str, Backbone] | None:
    """Return the prefix of the first of our ConvNeXts in a model, and the backbone."""
    return next(((f'{name}.' if name else '', module) for name, module in model.named_modules()
                 if _is_convnext(module)), None)


def load_model(model: nn.Module, source: str) -> None:
    """Load a checkpoint into a whole model, completely or not at all.

    Raises:
        UserError: Parameters are missing or have other shapes; the message lists them.
    """
    state = check_complete(model, source)
    model.load_state_dict({name: state[name] for name in model.state_dict()})


def check_complete(model: nn.Module, source: str) -> StateDict:
    """Check that a checkpoint has every parameter of a whole model, with the same shape.

    Otherwise a checkpoint of another task or size would leave parts of the model randomly
    initialized.

    Returns:
        Its weights, under the model's names.

    Raises:
        UserError: Parameters are missing or have other shapes; the message lists them.
    """
    state = fit_model_weights(read_checkpoint(source), model, source)[0]
    _require_complete(model, state, source)
    return state


def _require_complete(model: nn.Module, state: StateDict, source: str) -> None:
    own = model.state_dict()
    problems = find_mismatches(own, state)
    if problems:
        raise UserError(f'{source} does not fit the model of this config ({len(problems)} of '
                        f'{len(own)} parameters):\n  {format_problems(problems)}\nUse the '
                        'checkpoint that was trained with this config, or the config that it was '
                        'trained with.')


class FitCheckpointHook(Hook):
    """Fits the weights of ``load_from`` and ``resume`` to the model before mmengine loads them.

    mmengine loads parameters whose name and shape match and ignores the others: with another naming
    it would load nothing, and training would start from random weights.
    """

    priority = 'VERY_HIGH'  # before EMAHook, which copies the weights

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Replace the weights under 'state_dict'.

        Raises:
            UserError: They do not fit the backbone or, when resuming, the whole model.
        """
        model = unwrap_model(runner.model)
        source = str(runner._load_from or f'The latest checkpoint in {runner.work_dir}')
        state, line = fit_model_weights(checkpoint, model, source)
        if runner._resume:
            _require_complete(model, state, source)
        elif line:
            print_log(line, logger='current')
        checkpoint['state_dict'] = state


def find_mismatches(own: StateDict, state: StateDict) -> list[str]:
    """Describe the parameters of ``own`` that are missing in ``state`` or have another shape."""
    return [f'missing {name}' for name in own if name not in state] + [
        f'{name} is {list(state[name].shape)}, the model has {list(value.shape)}'
        for name, value in own.items() if name in state and state[name].shape != value.shape]


def format_problems(problems: list[str], count: int = 12) -> str:
    """Format the first ``count`` problems, one per line."""
    more = [f'… and {len(problems) - count} more'] * (len(problems) > count)
    return '\n  '.join(problems[:count] + more)


def _is_unused(name: str, backbone: Backbone) -> bool:
    """Whether the backbone omits a parameter on purpose: a classifier, an unused stage or norm."""
    if name.startswith(('norm.', 'head.')):
        return True
    stage = re.match(r'(?:downsample_layers\.|stages\.|norm)(\d+)\.', name)
    if not stage or int(stage[1]) >= len(backbone.arch.depths):
        return False
    return name.startswith('norm') or int(stage[1]) >= len(backbone.stages)


def count_by_module(names: list[str]) -> str:
    """Summarize names by their first part, such as 'head (2), norm0 (2)'."""
    counts = Counter(name.split('.')[0] for name in names)
    return ', '.join(f'{name} ({count})' for name, count in counts.items()) or 'none'
