"""The parameter names of ConvNeXt in each library, and conversion between them."""
from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..archs import Arch
from ..errors import UserError

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class NamingScheme:
    """How a library names the parts of a ConvNeXt.

    In the names, {i} is the stage, {j} the block in the stage, and {k} the position in a pair (0 or
    1); {2i}, {2i+1} and {i+1} are computed from the stage. None: the library has no such part.

    Args:
        title: The library, for messages.
        stem: Convolution and norm of the stem.
        downsample: Pair of norm and convolution before every other stage.
        block: A block; ``dwconv`` to ``grn`` are names inside it. The layer scale ``gamma`` and
            ``grn`` (scale, shift) are parameters, the others are modules.
        output_norm: Norm of a feature map, in backbones for dense prediction.
        final_norm: Norm before the classifier.
        head: Classifier; its name takes no prefix.
        prefix: Prefix of the backbone's names in the library's own files, for V1 and V2.
        wrapper_key: Key under which the library's files store the weights, if any.
        scale_ndim, grn_ndim: Number of dimensions of the layer scale and of GRN's parameters.
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
    wrapper_key: str | None = None
    scale_ndim: int = 1
    grn_ndim: int = 4

    def name_pairs(self, stages: int, blocks: int) -> Iterator[tuple[str, str]]:
        """Yield (our name, this scheme's name) for ``stages`` stages of ``blocks`` blocks."""
        def weight_and_bias(ours: str, theirs: str | None) -> Iterator[tuple[str, str]]:
            if theirs is not None:
                yield from ((f'{ours}.{leaf}', f'{theirs}.{leaf}') for leaf in ('weight', 'bias'))

        yield from weight_and_bias('head', self.head)
        yield from weight_and_bias('norm', self.final_norm)
        for i in range(stages):
            index: dict[str, int] = {'i': i, 'i+1': i + 1, '2i': 2 * i, '2i+1': 2 * i + 1}
            for k in (0, 1):
                yield from weight_and_bias(
                    f'downsample_layers.{i}.{k}',
                    self.stem[k] if i == 0 else self.downsample.format_map({**index, 'k': k}))
            if self.output_norm:
                yield from weight_and_bias(f'norm{i}', self.output_norm.format_map(index))
            for j in range(blocks):
                ours, theirs = f'stages.{i}.{j}', self.block.format_map({**index, 'j': j})
                for part in ('dwconv', 'norm', 'pwconv1', 'pwconv2'):
                    yield from weight_and_bias(f'{ours}.{part}', f'{theirs}.{getattr(self, part)}')
                yield f'{ours}.gamma', f'{theirs}.{self.gamma}'
                for part, name in zip(('gamma', 'beta'), self.grn or (), strict=False):
                    yield f'{ours}.grn.{part}', f'{theirs}.{name}'


_TIMM: dict[str, Any] = dict(
    block='stages.{i}.blocks.{j}', dwconv='conv_dw', pwconv1='mlp.fc1', pwconv2='mlp.fc2',
    grn=('mlp.grn.weight', 'mlp.grn.bias'), output_norm=None, final_norm='head.norm',
    head='head.fc', grn_ndim=1)

SCHEMES = {
    'official': NamingScheme('the authors', wrapper_key='model'),
    'mmpretrain': NamingScheme(
        'mmpretrain', dwconv='depthwise_conv', pwconv1='pointwise_conv1',
        pwconv2='pointwise_conv2', final_norm=None, head='head.fc',
        prefix=('backbone.', 'backbone.'), wrapper_key='state_dict', grn_ndim=1),
    'timm': NamingScheme(
        'timm', stem=('stem.0', 'stem.1'), downsample='stages.{i}.downsample.{k}', **_TIMM),
    'timm_features': NamingScheme(
        'timm (features_only)', stem=('stem_0', 'stem_1'), downsample='stages_{i}.downsample.{k}',
        **{**_TIMM, 'block': 'stages_{i}.blocks.{j}'}),
    'transformers': NamingScheme(
        'transformers', stem=('embeddings.patch_embeddings', 'embeddings.layernorm'),
        downsample='encoder.stages.{i}.downsampling_layer.{k}',
        block='encoder.stages.{i}.layers.{j}', norm='layernorm', gamma='layer_scale_parameter',
        grn=('grn.weight', 'grn.bias'), output_norm='hidden_states_norms.stage{i+1}',
        final_norm='layernorm', head='classifier', prefix=('convnext.', 'convnextv2.')),
    'transformers_dinov3': NamingScheme(
        'transformers (DINOv3)', stem=('stages.0.downsample_layers.0',
                                      'stages.0.downsample_layers.1'),
        downsample='stages.{i}.downsample_layers.{k}', block='stages.{i}.layers.{j}',
        dwconv='depthwise_conv', norm='layer_norm', pwconv1='pointwise_conv1',
        pwconv2='pointwise_conv2', grn=None, output_norm=None, final_norm='layer_norm'),
    'torchvision': NamingScheme(
        'torchvision', stem=('features.0.0', 'features.0.1'), downsample='features.{2i}.{k}',
        block='features.{2i+1}.{j}', dwconv='block.0', norm='block.2', pwconv1='block.3',
        pwconv2='block.5', gamma='layer_scale', grn=None, output_norm=None,
        final_norm='classifier.0', head='classifier.2', scale_ndim=3),
}

WRAPPERS = ('module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module')
"""Names of modules that wrap others: DistributedDataParallel and averages of weights,
torch.compile, FSDP, and activation checkpointing."""

AVERAGED = re.compile(r'(?:^|[._])(?:ema|swa|averaged?|shadow)(?=[._]|$)')
"""In a prefix: a copy of a model with averaged weights."""

KNOWN_EXTRAS = ('mask_token', 'proj', 'decoder', 'pred', 'norms', 'norm_pre', 'head')
"""Modules in backbone checkpoints that are ignored: FCMAE's decoder (ConvNeXt V2, Section 3),
DINOv3's copies of norms, the heads of timm's variants."""


@dataclass(frozen=True)
class DetectedConvNeXt:
    """A ConvNeXt in a checkpoint: its naming scheme and the prefix of its names."""

    scheme: str
    prefix: str

    def __str__(self) -> str:
        return SCHEMES[self.scheme].title


def without_wrappers(state: StateDict, own: Iterable[str] = ()) -> StateDict:
    """The weights under their names without :data:`WRAPPERS`, at any place.

    Args:
        state: Weights.
        own: Names of the model; wrappers in them are kept.
    """
    wrappers = set(WRAPPERS).difference(*(name.split('.') for name in own))
    short = {'.'.join(part for part in name.split('.') if part not in wrappers): value
             for name, value in state.items()}
    return short if len(short) == len(state) else state  # both a module and its wrapped copy


def detect_convnexts(names: Iterable[str]) -> list[DetectedConvNeXt]:
    """Return every ConvNeXt whose first block is among the ``names``."""
    first_blocks = {key: next(theirs for ours, theirs in scheme.name_pairs(1, 1)
                              if ours == 'stages.0.0.dwconv.weight')
                    for key, scheme in SCHEMES.items()}
    return [DetectedConvNeXt(key, name.removesuffix(block)) for name in names
            for key, block in first_blocks.items() if name == block or name.endswith('.' + block)]


def find_convnext(state: StateDict, source: str, prefix: str | None = None,
                  place: str = '') -> DetectedConvNeXt:
    """Return the only ConvNeXt of a checkpoint, or the one with ``prefix``.

    A model takes precedence over its copy with averaged weights.

    Args:
        state: The checkpoint's weights.
        source: Their origin, for messages.
        prefix: Prefix of the backbone's names. Default: detected; ``place``, with or without a
            prefix of its own, no prefix and 'backbone.' take precedence over others.
        place: Prefix of the backbone in the model that is filled.

    Raises:
        UserError: There is none, or there are several and ``prefix`` does not choose one.
    """
    detected = detect_convnexts(state)
    if not detected:
        roots = list(dict.fromkeys('.'.join(name.split('.')[:2]) for name in state))
        raise UserError(
            f'{source} contains no ConvNeXt: its names begin with {", ".join(roots[:6])}' +
            (', …' if len(roots) > 6 else '') + '.\nExpected weights of ConvNeXt or ConvNeXt V2 '
            'with the names of ' + ', '.join(scheme.title for scheme in SCHEMES.values()) + '.')
    prefixes = ', '.join(repr(convnext.prefix) for convnext in detected)

    def with_prefix(prefix: str) -> list[DetectedConvNeXt]:
        return [convnext for convnext in detected if convnext.prefix == prefix]

    if prefix:
        prefix = prefix.rstrip('.') + '.'
        chosen = with_prefix(prefix) or [
            convnext for convnext in detected if convnext.prefix.startswith(prefix)]
        if not chosen:
            raise UserError(f'{source} contains no ConvNeXt with the prefix {prefix!r}, but with '
                            f'{prefixes}. Use that, or no prefix.')
    else:
        chosen = (with_prefix(place)
                  or [convnext for convnext in detected if convnext.prefix.endswith('.' + place)
                      and place]
                  or with_prefix('') or with_prefix('backbone.') or detected)
        chosen = [convnext for convnext in chosen
                  if not AVERAGED.search(convnext.prefix)] or chosen
    if len(chosen) > 1:
        raise UserError(f'{source} contains {len(chosen)} ConvNeXts, with the prefixes {prefixes}: '
                        "choose with init_cfg=dict(type='Pretrained', checkpoint=..., prefix=...)")
    return chosen[0]


def to_official(state: StateDict, convnext: DetectedConvNeXt
                ) -> tuple[StateDict, StateDict, StateDict]:
    """Convert the names and shapes of one ConvNeXt to the authors'.

    Returns:
        The ConvNeXt's weights (with ``norm`` and ``head`` if it is a classifier); other weights
        under the same prefix, without that prefix; and weights outside the prefix, unchanged.
    """
    scheme = SCHEMES[convnext.scheme]
    to_ours = {theirs: ours for ours, theirs in scheme.name_pairs(*_index_bounds(state, scheme))}
    ours, beside, outside = {}, {}, {}
    for name, value in state.items():
        inner = name.removeprefix(convnext.prefix)
        if name.startswith(convnext.prefix) and inner in to_ours:
            ours[to_ours[inner]] = _reshape_parameter(to_ours[inner], value, 1, 4)
        elif to_ours.get(name, '').startswith('head.'):
            ours[to_ours[name]] = value
        elif name.startswith(convnext.prefix):
            beside[inner] = value
        else:
            outside[name] = value
    return ours, beside, outside


def from_official(state: StateDict, to: str, prefix: str) -> tuple[StateDict, list[str]]:
    """The inverse of :func:`to_official`.

    Returns:
        The converted weights, and the names that the scheme ``to`` does not have.
    """
    scheme = SCHEMES[to]
    to_theirs = dict(scheme.name_pairs(*_index_bounds(state, SCHEMES['official'])))
    converted = {(to_theirs[name] if name.startswith('head.') else prefix + to_theirs[name]):
                 _reshape_parameter(name, value, scheme.scale_ndim, scheme.grn_ndim)
                 for name, value in state.items() if name in to_theirs}
    return converted, [name for name in state if name not in to_theirs]


def infer_arch(state: StateDict) -> Arch:
    """Return the size of a ConvNeXt with the authors' names."""
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


def describe_variant(state: StateDict) -> str:
    """What distinguishes a variant of timm's from ConvNeXt; '' if nothing is known to.

    Args:
        state: Weights with the authors' names.
    """
    stem = state.get('downsample_layers.0.0.weight')
    differences = []
    if infer_arch(state)[:2] == ((2, 2, 4, 2), (32, 64, 128, 256)):
        differences.append('the size zepto')
    if stem is not None and stem.ndim == 4 and stem.shape[2:] == (3, 3):
        differences.append('a stem of overlapping 3x3 convolutions (_ols)')
    norms = [name for name in state if re.fullmatch(r'stages\.\d+\.\d+\.norm\.\w+', name)]
    if norms and not any(name.endswith('.bias') for name in norms):
        differences.append('norms without mean and bias (_rms)')
    return ', '.join(differences)


def to_mmseg(name: str) -> str:
    """The name in mmseg of a parameter of the heads in transformers' UperNet."""
    return re.sub(r'head\.classifier\.', 'head.conv_seg.', name.replace('.batch_norm.', '.bn.'))


def sparse_to_dense(state: StateDict) -> StateDict:
    """Convert FCMAE's encoder of sparse convolutions (ConvNeXt V2's ``models/utils.py``) to dense.

    It stores kernels as (kernel², C) or (kernel², in, out), biases and GRN as (1, C), and norms and
    linear layers under 'ln' and 'linear'. Other weights are returned unchanged.
    """
    if not any(name.endswith('.kernel') for name in state):
        return state
    dense = {}
    for name, value in state.items():
        name = re.sub(r'\.(ln|linear)\.(weight|bias)$', r'.\2', name)
        if name.endswith('.kernel') and value.ndim in (2, 3):
            name, size = name.removesuffix('.kernel') + '.weight', math.isqrt(len(value))
            value = value.unsqueeze(1) if value.ndim == 2 else value  # depthwise: 1 input channel
            if size**2 == len(value):  # otherwise reported as misshapen
                # Sparse kernels number their positions column by column.
                value = value.reshape(size, size, *value.shape[1:]).permute(3, 2, 1, 0)
        elif name.endswith('.bias') and value.ndim > 1:
            value = value.reshape(-1)
        dense[name] = value
    return dense


def _reshape_parameter(name: str, value: Tensor, scale_ndim: int, grn_ndim: int) -> Tensor:
    """Reshape the parameter with this official name to a scheme's number of dimensions."""
    if '.grn.' in name:
        return value.reshape((1,) * (grn_ndim - 1) + (-1,))
    if name.startswith('stages.') and name.endswith('.gamma'):
        return value.reshape((-1,) + (1,) * (scale_ndim - 1))
    if '.pwconv' in name and value.ndim == 4 and value.shape[2:] == (1, 1):
        return value.flatten(1)  # timm and mmpretrain have variants with 1x1 convolutions
    return value


def _index_bounds(names: Iterable[str], scheme: NamingScheme) -> tuple[int, int]:
    """Upper bounds of the numbers of stages and of blocks per stage that the names can refer to."""
    numbers = [int(number) for name in names if f'.{scheme.dwconv}.' in name
               for number in re.findall(r'\d+', name)]
    bound = max(numbers, default=0) + 2
    return bound, bound
