"""The names that each library gives to ConvNeXt's parameters, and the ways between them."""
from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from ..archs import Arch
from ..errors import UserError

State = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """How a library names the parts of a ConvNeXt.

    In the names {i} is the stage, {j} the block in it, {k} the place in a pair (0 or 1); {2i},
    {2i+1} and {i+1} are computed from the stage. None: there is no such part.

    Args:
        title: Who writes such files, for messages.
        stem: Convolution and norm of the stem.
        downsample: The pair of norm and convolution before another stage.
        block: A block; ``dwconv`` to ``grn`` are its parts below that name. The layer scale
            ``gamma`` and GRN's ``grn`` (scale, shift) are parameters, the others modules.
        output_norm: The norm of a feature map, in backbones for dense prediction.
        final_norm: The norm before the classifier.
        head: The classifier; its name takes no prefix.
        prefix: What stands before the backbone's names in the library's own files, of V1 and V2.
        wrapped: The key under which the library's files keep the weights, if there is one.
        scale_ndim, grn_ndim: Axes of the layer scale and of GRN's parameters.
    """

    title: str
    stem: tuple[str, str] = ('downsample_layers.0.0', 'downsample_layers.0.1')
    downsample: str = 'downsample_layers.{i}.{k}'
    block: str = 'stages.{i}.{j}'
    dwconv: str = 'dwconv'
    norm: str = 'norm'
    pwconv1: str = 'pwconv1'
    pwconv2: str = 'pwconv2'
    gamma: str = 'gamma'
    grn: tuple[str, str] | None = ('grn.gamma', 'grn.beta')
    output_norm: str | None = 'norm{i}'
    final_norm: str | None = 'norm'
    head: str = 'head'
    prefix: tuple[str, str] = ('', '')
    wrapped: str | None = None
    scale_ndim: int = 1
    grn_ndim: int = 4

    def names(self, stages: int, blocks: int) -> Iterator[tuple[str, str]]:
        """Pairs (our name, its name) of up to so many stages and blocks a stage."""
        def both(ours: str, theirs: str | None) -> Iterator[tuple[str, str]]:
            if theirs is not None:
                yield from ((f'{ours}.{leaf}', f'{theirs}.{leaf}') for leaf in ('weight', 'bias'))

        yield from both('head', self.head)
        yield from both('norm', self.final_norm)
        for i in range(stages):
            index: dict[str, int] = {'i': i, 'i+1': i + 1, '2i': 2 * i, '2i+1': 2 * i + 1}
            for k in (0, 1):
                yield from both(f'downsample_layers.{i}.{k}', self.stem[k] if i == 0 else
                                self.downsample.format_map({**index, 'k': k}))
            if self.output_norm:
                yield from both(f'norm{i}', self.output_norm.format_map(index))
            for j in range(blocks):
                ours, theirs = f'stages.{i}.{j}', self.block.format_map({**index, 'j': j})
                for part in ('dwconv', 'norm', 'pwconv1', 'pwconv2'):
                    yield from both(f'{ours}.{part}', f'{theirs}.{getattr(self, part)}')
                yield f'{ours}.gamma', f'{theirs}.{self.gamma}'
                for part, name in zip(('gamma', 'beta'), self.grn or (), strict=False):
                    yield f'{ours}.grn.{part}', f'{theirs}.{name}'


_TIMM = dict(
    block='stages.{i}.blocks.{j}', dwconv='conv_dw', pwconv1='mlp.fc1', pwconv2='mlp.fc2',
    grn=('mlp.grn.weight', 'mlp.grn.bias'), output_norm=None, final_norm='head.norm',
    head='head.fc', grn_ndim=1)

FAMILIES = {
    'official': Family('the authors', wrapped='model'),
    'mmpretrain': Family(
        'mmpretrain', dwconv='depthwise_conv', pwconv1='pointwise_conv1',
        pwconv2='pointwise_conv2', final_norm=None, head='head.fc',
        prefix=('backbone.', 'backbone.'), wrapped='state_dict', grn_ndim=1),
    'timm': Family(
        'timm', stem=('stem.0', 'stem.1'), downsample='stages.{i}.downsample.{k}', **_TIMM),
    'timm_features': Family(
        'timm (features_only)', stem=('stem_0', 'stem_1'), downsample='stages_{i}.downsample.{k}',
        **{**_TIMM, 'block': 'stages_{i}.blocks.{j}'}),
    'transformers': Family(
        'transformers', stem=('embeddings.patch_embeddings', 'embeddings.layernorm'),
        downsample='encoder.stages.{i}.downsampling_layer.{k}',
        block='encoder.stages.{i}.layers.{j}', norm='layernorm', gamma='layer_scale_parameter',
        grn=('grn.weight', 'grn.bias'), output_norm='hidden_states_norms.stage{i+1}',
        final_norm='layernorm', head='classifier', prefix=('convnext.', 'convnextv2.')),
    'transformers_dinov3': Family(
        'transformers (DINOv3)', stem=('stages.0.downsample_layers.0',
                                      'stages.0.downsample_layers.1'),
        downsample='stages.{i}.downsample_layers.{k}', block='stages.{i}.layers.{j}',
        dwconv='depthwise_conv', norm='layer_norm', pwconv1='pointwise_conv1',
        pwconv2='pointwise_conv2', grn=None, output_norm=None, final_norm='layer_norm'),
    'torchvision': Family(
        'torchvision', stem=('features.0.0', 'features.0.1'), downsample='features.{2i}.{k}',
        block='features.{2i+1}.{j}', dwconv='block.0', norm='block.2', pwconv1='block.3',
        pwconv2='block.5', gamma='layer_scale', grn=None, output_norm=None,
        final_norm='classifier.0', head='classifier.2', scale_ndim=3),
}
TARGETS = ('official', 'mmpretrain', 'timm', 'transformers', 'torchvision')
"""What checkpoints can be converted to."""

LEFT_ASIDE = ('mask_token', 'proj', 'decoder', 'pred', 'norms', 'norm_pre', 'head')
"""First parts of names beside the backbone that are no mistake: FCMAE's decoder (ConvNeXt V2,
Section 3), DINOv3's copies of norms, the heads of timm's variants."""


@dataclass(frozen=True)
class Found:
    """A ConvNeXt among the names of a checkpoint: its family, and what stands before its names."""

    family: str
    prefix: str

    def __str__(self) -> str:
        return FAMILIES[self.family].title


def recognise(names: Iterable[str]) -> list[Found]:
    """Every ConvNeXt whose first block is among the ``names``."""
    first = {name: next(theirs for ours, theirs in family.names(1, 1)
                        if ours == 'stages.0.0.dwconv.weight')
             for name, family in FAMILIES.items()}
    return [Found(family, name.removesuffix(block)) for name in names
            for family, block in first.items() if name == block or name.endswith('.' + block)]


def find(state: State, source: str, prefix: str | None = None) -> Found:
    """The one ConvNeXt of a checkpoint.

    Args:
        state: Its weights.
        source: Where they come from, for messages.
        prefix: What stands before the backbone's names. Not given: found out, with nothing
            and 'backbone.' preferred.

    Raises:
        UserError: There is none, or several and no prefix to choose by.
    """
    found = recognise(state)
    if not found:
        roots = list(dict.fromkeys('.'.join(name.split('.')[:2]) for name in state))
        raise UserError(
            f'{source} holds no ConvNeXt: its names begin with {", ".join(roots[:6])}' +
            (', …' if len(roots) > 6 else '') + '.\nExpected weights of ConvNeXt or ConvNeXt V2 as '
            + ', '.join(family.title for family in FAMILIES.values()) + ' name them.')
    prefixes = ', '.join(repr(one.prefix) for one in found)
    if prefix:
        prefix = prefix.rstrip('.') + '.'
        chosen = [one for one in found if one.prefix.startswith(prefix)]
        if not chosen:
            raise UserError(f'{source} holds no ConvNeXt with the prefix {prefix!r}; what is there '
                            f'has the prefix {prefixes}. Name that, or leave the prefix out')
    else:
        chosen = next(([one for one in found if one.prefix == usual]
                       for usual in ('', 'backbone.')
                       if any(one.prefix == usual for one in found)), found)
    if len(chosen) > 1:
        raise UserError(f'{source} holds {len(chosen)} ConvNeXts, with the prefixes {prefixes}: '
                        "choose with init_cfg=dict(type='Pretrained', checkpoint=..., prefix=...)")
    return chosen[0]


def to_official(state: State, found: Found) -> tuple[State, State, State]:
    """Rename and reshape what belongs to the ConvNeXt ``found``.

    Returns:
        Its weights by the authors' names (with ``norm`` and ``head``, if it is a classifier);
        what stands beside them with the same prefix, under its name without that; and what
        does not begin with the prefix.
    """
    family = FAMILIES[found.family]
    table = {theirs: ours for ours, theirs in family.names(*_bounds(state, family))}
    ours, beside, outside = {}, {}, {}
    for name, value in state.items():
        inner = name.removeprefix(found.prefix)
        if name.startswith(found.prefix) and inner in table:
            ours[table[inner]] = _reshaped(table[inner], value, 1, 4)
        elif table.get(name, '').startswith('head.'):
            ours[table[name]] = value
        elif name.startswith(found.prefix):
            beside[inner] = value
        else:
            outside[name] = value
    return ours, beside, outside


def from_official(state: State, to: str, prefix: str) -> tuple[State, list[str]]:
    """The inverse of :func:`to_official`, and the names that the family ``to`` does not have."""
    family = FAMILIES[to]
    table = dict(family.names(*_bounds(state, FAMILIES['official'])))
    return {(table[name] if name.startswith('head.') else prefix + table[name]):
            _reshaped(name, value, family.scale_ndim, family.grn_ndim)
            for name, value in state.items() if name in table}, [
                name for name in state if name not in table]


def architecture(state: State) -> Arch:
    """The size of a ConvNeXt with the authors' names."""
    depths: dict[int, int] = {}
    dims: dict[int, int] = {}
    for name, value in state.items():
        match = re.fullmatch(r'stages\.(\d+)\.(\d+)\.dwconv\.weight', name)
        if match:
            stage, block = map(int, match.groups())
            depths[stage] = max(depths.get(stage, 0), block + 1)
            dims[stage] = len(value)
    return Arch(tuple(depths[i] for i in sorted(depths)), tuple(dims[i] for i in sorted(dims)),
                any('.grn.' in name for name in state))


def dense(state: State) -> State:
    """FCMAE's encoder of sparse convolutions (ConvNeXt V2's ``models/utils.py``) as a dense one.

    A kernel there is (kernel², C) or (kernel², in, out), a bias (1, C), GRN (1, C); norms and
    linear layers stand under 'ln' and 'linear'. Other weights come back as they are.
    """
    if not any(name.endswith('.kernel') for name in state):
        return state
    out = {}
    for name, value in state.items():
        name = re.sub(r'\.(ln|linear)\.(weight|bias)$', r'.\2', name)
        if name.endswith('.kernel') and value.ndim in (2, 3):
            name, size = name.removesuffix('.kernel') + '.weight', math.isqrt(len(value))
            value = value.unsqueeze(1) if value.ndim == 2 else value  # depthwise: one input each
            if size**2 == len(value):  # else it is reported as misshapen
                # Sparse kernels count their places column by column.
                value = value.reshape(size, size, *value.shape[1:]).permute(3, 2, 1, 0)
        elif name.endswith('.bias') and value.ndim > 1:
            value = value.reshape(-1)
        out[name] = value
    return out


def _reshaped(name: str, value: Tensor, scale_ndim: int, grn_ndim: int) -> Tensor:
    """The parameter of this official name with so many axes where families differ."""
    if '.grn.' in name:
        return value.reshape((1,) * (grn_ndim - 1) + (-1,))
    if name.startswith('stages.') and name.endswith('.gamma'):
        return value.reshape((-1,) + (1,) * (scale_ndim - 1))
    if '.pwconv' in name and value.ndim == 4 and value.shape[2:] == (1, 1):
        return value.flatten(1)  # timm and mmpretrain have variants with 1x1 convolutions
    return value


def _bounds(names: Iterable[str], family: Family) -> tuple[int, int]:
    """More stages and blocks than the names can mean."""
    numbers = [int(number) for name in names if f'.{family.dwconv}.' in name
               for number in re.findall(r'\d+', name)]
    bound = max(numbers, default=0) + 2
    return bound, bound
