"""Checks of the backbone's options, before anything is built."""
from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

from .archs import ARCHS, Arch
from .errors import UserError
from .utils import suggest

MEMORY = ('plain', 'lean', 'minimal')
"""How much a block saves for the backward pass: all activations, five maps, or one map."""


class Options(NamedTuple):
    """The backbone's options, checked and normalized.

    Args:
        arch: Depths, dims and ``use_grn``.
        layer_scale_init_value: 0: no layer scale.
        out_indices: Ascending, from 0.
        with_cp: Stages with activation checkpointing.
    """

    arch: Arch
    layer_scale_init_value: float
    out_indices: tuple[int, ...]
    with_cp: tuple[int, ...]


def check_options(arch: str, depths: Sequence[int] | None, dims: Sequence[int] | None,
                  use_grn: bool | None, drop_path_rate: float,
                  layer_scale_init_value: float | None, out_indices: int | Sequence[int] | None,
                  frozen_stages: int, with_cp: bool | Sequence[int] | Sequence[bool],
                  output_stride: int | None, memory: str) -> Options:
    """Check the arguments of :class:`convnext_mm.ConvNeXt`, which documents them.

    Raises:
        UserError: An unknown value, or values that contradict each other.
    """
    size = check_arch(arch, depths, dims, use_grn)
    stages = len(size.depths)
    if layer_scale_init_value is None:
        layer_scale_init_value = 0.0 if size.use_grn else 1e-6
    if size.use_grn and layer_scale_init_value > 0:
        raise UserError(f'ConvNeXt: layer_scale_init_value={layer_scale_init_value} contradicts '
                        'use_grn=True: V2 has no layer scale. Remove it or set it to 0')
    if not isinstance(drop_path_rate, Real) or not 0 <= drop_path_rate <= 1:
        raise UserError(f'ConvNeXt: drop_path_rate={drop_path_rate!r} must be a number '
                        'from 0 to 1')
    if output_stride not in (None, 8, 16, 32):
        raise UserError(f'ConvNeXt: output_stride={output_stride} must be 8, 16 or 32')
    if memory not in MEMORY:
        raise UserError(f'ConvNeXt: memory={memory!r} must be one of {", ".join(MEMORY)}')
    if not -1 <= frozen_stages <= stages:
        raise UserError(f'ConvNeXt: frozen_stages={frozen_stages} must be from -1 (none) to '
                        f'{stages} (the stem and {stages} stages)')
    if isinstance(out_indices, int) and not isinstance(out_indices, bool):
        out_indices = [out_indices]
    indices = _stage_indices('out_indices', range(stages) if out_indices is None else out_indices,
                             stages)
    if not indices:
        raise UserError('ConvNeXt: out_indices must name at least one stage')
    return Options(size, max(layer_scale_init_value, 0.0), indices,
                   _checkpointed_stages(with_cp, stages))


def check_arch(arch: str, depths: Sequence[int] | None = None,
               dims: Sequence[int] | None = None, use_grn: bool | None = None) -> Arch:
    """The size of ``arch``, overridden by explicit values.

    Raises:
        UserError: An unknown ``arch``, or values that contradict each other.
    """
    if arch not in ARCHS:
        containing = [name for name in ARCHS if str(arch) in name]
        hint = suggest(arch, ARCHS, count=2) or (
            f' Did you mean {" or ".join(containing)}?' if containing else '')
        raise UserError(f'ConvNeXt: arch={arch!r} is unknown; the sizes are {", ".join(ARCHS)}.'
                        f'{hint}')
    published = ARCHS[arch]
    if published.use_grn and use_grn is False:
        raise UserError(f'ConvNeXt: arch={arch!r} contradicts use_grn=False: every block of V2 '
                        'has GRN. Remove one of them')
    depths = published.depths if depths is None else tuple(depths)
    dims = published.dims if dims is None else tuple(dims)
    if len(depths) != len(dims):
        raise UserError(f'ConvNeXt: depths={list(depths)} and dims={list(dims)} must have the same '
                        f'number of stages (the default of each is that of arch={arch!r})')
    if not depths or any(not isinstance(n, int) or n < 1 for n in (*depths, *dims)):
        raise UserError(f'ConvNeXt: depths={list(depths)} and dims={list(dims)} must be whole '
                        'numbers of at least 1')
    return Arch(depths, dims, published.use_grn if use_grn is None else bool(use_grn))


def check_hidden_dims(hidden_dims: Sequence[Sequence[int]] | None, size: Arch
                      ) -> Sequence[Sequence[int]]:
    """The channels inside of each block, a list per stage.

    Raises:
        UserError: They do not fit the depths.
    """
    if hidden_dims is None:
        return [[4 * dim] * depth for dim, depth in zip(size.dims, size.depths, strict=True)]
    if (not isinstance(hidden_dims, (list, tuple))
            or not all(isinstance(stage, (list, tuple)) for stage in hidden_dims)
            or tuple(map(len, hidden_dims)) != tuple(size.depths)
            or any(not isinstance(n, int) or n < 1 for stage in hidden_dims for n in stage)):
        raise UserError(f'ConvNeXt: hidden_dims={hidden_dims} must be a list of whole numbers for '
                        f'each stage, as many as it has blocks: depths={list(size.depths)}')
    return hidden_dims


def _stage_indices(key: str, indices: Sequence[int], stages: int) -> tuple[int, ...]:
    """Ascending stage indices without duplicates; -1 is the last stage."""
    if any(not isinstance(i, int) or not -stages <= i < stages for i in indices):
        raise UserError(f'ConvNeXt: {key}={list(indices)} must be among the stages '
                        f'0 to {stages - 1}, or -{stages} to -1')
    return tuple(sorted({i % stages for i in indices}))


def _checkpointed_stages(with_cp: bool | Sequence[int] | Sequence[bool],
                         stages: int) -> tuple[int, ...]:
    """The stages that ``with_cp`` selects."""
    if isinstance(with_cp, bool):
        return tuple(range(stages)) if with_cp else ()
    if any(isinstance(flag, bool) for flag in with_cp):
        if len(with_cp) != stages or not all(isinstance(flag, bool) for flag in with_cp):
            raise UserError(f'ConvNeXt: with_cp={list(with_cp)} must have one True or False for '
                            f'each of the {stages} stages, or be a list of stages')
        return tuple(i for i, flag in enumerate(with_cp) if flag)
    return _stage_indices('with_cp', with_cp, stages)
