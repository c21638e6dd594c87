"""Load weights with any published naming into a ConvNeXt backbone or a whole model."""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ..archs import Arch
from ..errors import UserError
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
                         prefix: str | None = None, place: str = '') -> FittedWeights:
    """Select the weights in ``state`` that belong to ``backbone``, and give them its names.

    Classifiers, heads of whole models, and stages and norms excluded by ``out_indices`` are
    ignored. Norms of feature maps, and modules that a subclass adds beside the stem and stages, may
    be missing and are then randomly initialized.

    Args:
        state: Weights with a published naming.
        backbone: The backbone to fill; it is not changed.
        source: Their origin, for messages.
        prefix, place: Of the backbone's names, see :func:`naming.find_convnext`.

    Raises:
        UserError: A parameter is missing, unexpected or has another shape, or the weights are of
            a variant that is not built.
    """
    own = backbone.state_dict()
    state = naming.sparse_to_dense(naming.without_wrappers(state, own))
    convnext = naming.find_convnext(state, source, prefix, place)
    ours, beside, outside = naming.to_official(state, convnext)
    arch = naming.infer_arch(ours)
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
    variant = naming.describe_variant(ours) if problems else ''
    if variant:
        raise UserError(f'{source} ({convnext}) is a variant of ConvNeXt that is not built here: '
                        f'{variant}.\nUse weights of one of the sizes in docs/recipes.md.')
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
    content, prefix = read_checkpoint(source), init_cfg.get('prefix')
    # The prefix may begin with the key of one of several models, such as a teacher's.
    key, _, rest = (prefix or '').rstrip('.').partition('.')
    if isinstance(content.get(key), dict) and extract_weights(content[key]):
        content, prefix = content[key], rest or None
    fitted = fit_backbone_weights(extract_weights(content), backbone, source, prefix)
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

    Whole stages or norms under their own names, or nothing for the backbone, are left to the
    loader: PyTorch returns what is missing, or raises an error if it is strict.

    Raises:
        UserError: Parameters of a stage are missing, or the weights do not fit.
    """
    # Without a prefix this may be a whole file in which mmengine did not find the weights.
    part = extract_weights(state) if not prefix else {
        name.removeprefix(prefix): value for name, value in state.items()
        if name.startswith(prefix)}
    own = backbone.state_dict()
    # Whole stages and norms may be missing; parameters of those that are there may not.
    given = {_piece(name) for name in part}
    expected = {name: value for name, value in own.items() if _piece(name) in given}
    if not find_mismatches(expected, part) and len(part) == len(expected):
        return
    fitted = fit_backbone_weights(part, backbone, 'The state dict')
    for name in [name for name in state if name.startswith(prefix)]:
        del state[name]
    state.update({prefix + name: value for name, value in fitted.state.items()})
    if fitted.convnext != naming.DetectedConvNeXt('official', ''):
        print_log(f'ConvNeXt: loaded from a state dict: {fitted}', logger='current')


def _piece(name: str) -> str:
    """The stage, downsampling or norm that a parameter is of: 'stages.2' or 'norm3'."""
    first, _, rest = name.partition('.')
    return first if first.startswith('norm') else f'{first}.{rest.partition(".")[0]}'


def fit_model_weights(content: dict[str, Any], model: nn.Module, source: str
                      ) -> tuple[StateDict, str]:
    """Return a checkpoint's weights under the names of a whole ``model``.

    Backbone weights with any naming get the prefix of the model's backbone. Neck and heads get the
    model's names whatever stands before them in the file, and if they are of transformers' UperNet.
    For a model without our ConvNeXt the weights are unchanged.

    Returns:
        The weights, and a line for the log ('' if nothing was changed).

    Raises:
        UserError: The backbone's weights do not fit.
    """
    own = model.state_dict()
    state = naming.without_wrappers(extract_weights(content), own)
    located = _find_backbone(model)
    if located is None:
        return state, ''
    place, backbone = located
    fitted = fit_backbone_weights(state, backbone, source, place=place)
    prefix = fitted.convnext.prefix
    if fitted.convnext == naming.DetectedConvNeXt('official', place) and not fitted.stem:
        return state, ''
    rename = naming.to_mmseg if fitted.convnext.scheme == 'transformers' else str
    renamed = {name: rename(name) for name in state if prefix and not name.startswith(prefix)}
    wrapper = _find_wrapper([*renamed.values()], [name for name in own
                                                  if not name.startswith(place)])
    renamed = {name: new.removeprefix(wrapper) for name, new in renamed.items()
               if new.startswith(wrapper)}
    if own.keys().isdisjoint(renamed.values()):  # such as a classifier
        renamed = {}
    fitted.ignored = [name for name in fitted.ignored if name not in renamed]
    others = {new: state[name] for name, new in renamed.items()}
    return {**{place + name: value for name, value in fitted.state.items()}, **others}, (
        f'ConvNeXt: loaded from {source}: {fitted}')


def _find_wrapper(names: Sequence[str], own: Sequence[str]) -> str:
    """What stands before the most of the names ``own`` in a checkpoint."""
    counts = Counter({'': 0})
    for ending in own:
        counts.update(name.removesuffix(ending) for name in names
                      if name == ending or name.endswith('.' + ending))
    return counts.most_common(1)[0][0]


def describe_parts(own: StateDict, state: StateDict) -> list[str]:
    """Say for each part of a model what it gets from weights, for the log.

    Args:
        own: The state dict of the model.
        state: Weights under the model's names.

    Returns:
        A line for each part of the model: loaded, fresh (it keeps its random initialization), or
        both and why; and one for the weights that are not used.
    """
    lines = []
    for part, names in _by_part(own).items():
        loaded = [name for name in names if name in state and state[name].shape == own[name].shape]
        fresh = {name: 'not in the file' if name not in state else
                 f'{list(state[name].shape)} in the file, {list(own[name].shape)} in the model'
                 for name in names if name not in loaded}
        if not fresh:
            lines.append(f'{part}: loaded')
        elif not loaded and set(fresh.values()) == {'not in the file'}:
            lines.append(f'{part}: fresh, not in the file')
        else:
            reasons = [f'{name.removeprefix(part + ".")} ({reason})'
                       for name, reason in fresh.items()]
            lines.append(f'{part}: {len(loaded)} of {len(names)} tensors loaded, fresh: '
                         f'{", ".join(reasons[:4])}{", …" if len(reasons) > 4 else ""}')
    unused = _by_part([name for name in state if name not in own])
    if unused:
        lines.append('dropped, the model has no place for it: ' + ', '.join(
            f'{part} ({len(names)})' for part, names in unused.items()))
    return lines


def _by_part(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by the part of a model that they belong to, the heads of RoIs apart."""
    parts: dict[str, list[str]] = {}
    for name in names:
        path = name.split('.')
        parts.setdefault('.'.join(path[:2 if path[0] == 'roi_head' else 1]), []).append(name)
    return parts


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
    require_complete(model, state, source)
    return state


def require_complete(model: nn.Module, state: StateDict, source: str) -> None:
    """Check that weights have all parameters of a model, in their shapes.

    Raises:
        UserError: They have not.
    """
    own = model.state_dict()
    problems = find_mismatches(own, state)
    if problems:
        raise UserError(f'{source} does not fit the model of this config ({len(problems)} of '
                        f'{len(own)} parameters):\n  {format_problems(problems)}\nUse the '
                        'checkpoint that was trained with this config, or the config that it was '
                        'trained with.')


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
