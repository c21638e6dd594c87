"""The operations of a block in Triton, for NVIDIA GPUs, as operators of ``torch.ops.convnext_mm``.

Maps are (N, H, W, C), in fp16, bf16 or fp32; maps that are not contiguous are copied first.
Parameters may have any of these dtypes, independently of the maps. Sums, means and matmuls are
accumulated in fp32. The operators are not differentiable and use no atomics, so results are
reproducible bit for bit. No output shares memory with an input.

This module needs Triton: check ``importlib.util.find_spec('triton')`` before importing it. With
``TRITON_INTERPRET=1`` the operators run on the CPU, for tests.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import eager

P = ParamSpec('P')
R = TypeVar('R')

INTERPRETED = triton.knobs.runtime.interpret
LIBRARY = torch.library.Library('convnext_mm', 'FRAGMENT')
# Most channels for which one kernel does convolution and norm: more do not fit in a program's
# registers beside the convolution's rows, and a second kernel normalizes the written map.
FUSED_NORM_CHANNELS = 512
FUSED_MLP_CHANNELS = 128  # Most channels for one kernel of both matmuls; 256 spill registers.
MAX_PARTIALS = 256  # Most programs that each write a partial sum over all rows or strips.
CHUNK = 256  # Positions of a map that one program of a GRN kernel processes.
GROUP = tl.constexpr(32)  # Rows of a matmul with one sum in memory; no tile has fewer rows.


def available() -> bool:
    """Whether the kernels can run: on a GPU since Turing, or in Triton's interpreter."""
    return INTERPRETED or (torch.version.cuda is not None and torch.cuda.is_available()
                           and torch.cuda.get_device_capability() >= (7, 5))


def op(fake: Callable[..., object]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function an operator; ``fake`` returns empty outputs of its shapes and dtypes."""
    def register(function: Callable[P, R]) -> Callable[P, R]:
        name, run = function.__name__, cast(Callable[..., R], function)

        def implementation(*args: Any) -> R:
            contiguous = [arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args]
            with torch.cuda.device_of(args[0]):
                return run(*contiguous)

        LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()),
                       tags=(torch.Tag.pt2_compliant_tag,))
        for key in ('CUDA', 'CPU'):
            LIBRARY.impl(name, implementation, key)
        torch.library.register_fake(f'convnext_mm::{name}', fake, lib=LIBRARY)
        overload = getattr(torch.ops.convnext_mm, name).default

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if type(args[0]) is Tensor and not torch.compiler.is_compiling() and not kwargs:
                return implementation(*args)  # PyTorch's dispatcher takes as long as a kernel
            return overload(*args, **kwargs)
        return call
    return register


def _empty(x: Tensor, channels: int | None = None) -> Tensor:
    """An empty map like x, or with another number of channels."""
    return x.new_empty(x.shape if channels is None else (*x.shape[:-1], channels))


def _empty_fp32(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _pow2(n: int, low: int = 1, high: int = 1 << 30) -> int:
    """The next power of two from n up, clamped."""
    return max(low, min(high, triton.next_power_of_2(n)))


# ------------------------------------------------------------ depthwise 7x7, LayerNorm


@triton.jit
def _program_rows(height, width, BLOCK_W: tl.constexpr):
    """Image, first of four rows, and columns (a strip) of this program."""
    pid = tl.program_id(0)
    strips = tl.cdiv(width, BLOCK_W)
    fours = tl.cdiv(height, 4)
    cols = pid % strips * BLOCK_W + tl.arange(0, BLOCK_W)
    pid = pid // strips
    return pid // fours, pid % fours * 4, cols


@triton.jit
def _load_row(x, image, line, cols, channels, height, width, C):
    """x at one row and some columns, zero outside of the map: (BLOCK_W, BLOCK_C), fp32."""
    mask = ((cols >= 0) & (cols < width))[:, None] & (channels < C)[None, :]
    start = (image.to(tl.int64) * height + line) * width * C
    return tl.load(x + start + cols[:, None] * C + channels[None, :],
                   mask=mask & (line >= 0) & (line < height), other=0.0).to(tl.float32)


@triton.jit
def _load_tap(weight, i, j, channels, C, BLOCK_W: tl.constexpr):
    """The tap of row i and column j of a (49, C) weight, in fp32.

    It is repeated to (BLOCK_W, BLOCK_C): loaded in x's layout, it needs no shared memory.
    """
    at = tl.zeros((BLOCK_W, 1), tl.int32) + channels[None, :]
    return tl.load(weight + (i * 7 + j) * C + at, mask=at < C, other=0.0).to(tl.float32)


@triton.jit
def _load_vector(parameter, channels, C):
    """Some channels of a parameter, zero beyond C: (1, BLOCK_C), fp32."""
    return tl.load(parameter + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _conv_rows(x, weight, image, row, cols, channels, height, width, C,
               BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Four rows of a depthwise 7x7 convolution, each (BLOCK_W, BLOCK_C) in fp32.

    Four at once, since each row of x and each tap of the (49, C) weight then serve up to four.
    """
    row0 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    row1 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    row2 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    row3 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for j in range(7):
        for i in tl.static_range(10):
            value = _load_row(x, image, row + (i - 3), cols + (j - 3), channels, height, width, C)
            # The compiler loads each tap once, since nothing is stored in between.
            if i < 7:
                row0 += value * _load_tap(weight, i, j, channels, C, BLOCK_W)
            if i >= 1 and i < 8:
                row1 += value * _load_tap(weight, i - 1, j, channels, C, BLOCK_W)
            if i >= 2 and i < 9:
                row2 += value * _load_tap(weight, i - 2, j, channels, C, BLOCK_W)
            if i >= 3:
                row3 += value * _load_tap(weight, i - 3, j, channels, C, BLOCK_W)
    return row0, row1, row2, row3


@triton.jit
def _conv(x, weight, bias, g, out, height, width, C,
          BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """out = depthwise 7x7 convolution of x, plus bias and g if not None."""
    image, row, cols = _program_rows(height, width, BLOCK_W)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = _conv_rows(x, weight, image, row, cols, channels, height, width, C, BLOCK_W, BLOCK_C)
    mask = (cols < width)[:, None] & (channels < C)[None, :]
    for i in tl.static_range(4):
        value = rows[i]
        start = (image.to(tl.int64) * height + row + i) * width * C
        offsets = start + cols[:, None] * C + channels[None, :]
        if bias is not None:
            value += _load_vector(bias, channels, C)
        if g is not None:
            value += tl.load(g + offsets, mask=mask & (row + i < height), other=0.0).to(tl.float32)
        tl.store(out + offsets, value, mask=mask & (row + i < height))


@triton.jit
def _moments(y, inside, C, eps):
    """Mean and 1 / std of each row of y, which is zero beyond C channels."""
    mean = tl.sum(y, 1) / C
    centered = tl.where(inside, y - mean[:, None], 0.0)
    return mean, tl.rsqrt(tl.sum(centered * centered, 1) / C + eps)


@triton.jit
def _conv_norm(x, weight, bias, norm_weight, norm_bias, n, y, mean, rstd, height, width, C, eps,
               BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """Depthwise 7x7 convolution and LayerNorm; y is None if it is not saved."""
    image, row, cols = _program_rows(height, width, BLOCK_W)
    channels = tl.arange(0, BLOCK_C)
    inside = (channels < C)[None, :]
    rows = _conv_rows(x, weight, image, row, cols, channels, height, width, C, BLOCK_W, BLOCK_C)
    plus = _load_vector(bias, channels, C)
    w = _load_vector(norm_weight, channels, C)
    b = _load_vector(norm_bias, channels, C)
    for i in tl.static_range(4):
        valid = (cols < width) & (row + i < height)
        mask = valid[:, None] & inside
        place = (image.to(tl.int64) * height + row + i) * width + cols
        offsets = place[:, None] * C + channels[None, :]
        # The statistics are those of y as it is saved.
        rounded = (rows[i] + plus).to(n.dtype.element_ty)
        value = rounded.to(tl.float32)
        mu, r = _moments(value, inside, C, eps)
        if y is not None:
            tl.store(y + offsets, rounded, mask=mask)
        tl.store(mean + place, mu, mask=valid)
        tl.store(rstd + place, r, mask=valid)
        tl.store(n + offsets, (value - mu[:, None]) * r[:, None] * w + b, mask=mask)


@triton.jit
def _norm(y, mean, rstd, norm_weight, norm_bias, n, M, C, eps,
          BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """LayerNorm of rows, and its statistics."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_C)
    inside = (channels < C)[None, :]
    mask = (rows < M)[:, None] & inside
    offsets = rows.to(tl.int64)[:, None] * C + channels[None, :]
    value = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
    mu, r = _moments(value, inside, C, eps)
    tl.store(mean + rows, mu, mask=rows < M)
    tl.store(rstd + rows, r, mask=rows < M)
    value = (value - mu[:, None]) * r[:, None] * _load_vector(norm_weight, channels, C)
    tl.store(n + offsets, value + _load_vector(norm_bias, channels, C), mask=mask)


@triton.jit
def _norm_backward(dn, y, mean, rstd, norm_weight, dy, partial, M, C,
                   BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """partial (2, programs, C): each program's sums for the gradients of weight and bias."""
    pid = tl.program_id(0)
    channels = tl.arange(0, BLOCK_C)
    inside = channels < C
    w = _load_vector(norm_weight, channels, C)
    d_weight = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    d_bias = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(pid * BLOCK_M, M, tl.num_programs(0) * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & inside[None, :]
        offsets = rows.to(tl.int64)[:, None] * C + channels[None, :]
        mu = tl.load(mean + rows, mask=rows < M, other=0.0)
        r = tl.load(rstd + rows, mask=rows < M, other=0.0)
        up = tl.load(dn + offsets, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(y + offsets, mask=mask, other=0.0).to(tl.float32)
        # Outside of the map this is arbitrary, but up is zero.
        normal = (value - mu[:, None]) * r[:, None]
        d_weight += up * normal
        d_bias += up
        up *= w
        across = tl.sum(up * normal, 1) / C
        value = r[:, None] * (up - (tl.sum(up, 1) / C)[:, None] - normal * across[:, None])
        tl.store(dy + offsets, value, mask=mask)
    partial += pid * C
    tl.store(partial + channels, tl.sum(d_weight, 0), mask=inside)
    tl.store(partial + tl.num_programs(0) * C + channels, tl.sum(d_bias, 0), mask=inside)


@triton.jit
def _conv_weight(dy, x, partial, N, height, width, C, ROWS: tl.constexpr,
                 BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr):
    """partial (programs, 50, C): each program's sums for one column of taps, and for the bias.

    A unit of work is ROWS rows of a strip. The seven rows of x that belong to a row of dy stay in
    registers as a sliding window, so that each is loaded once, not seven times. The inner loop is
    unrolled seven times, which makes the shifts of the window free.
    """
    j = tl.program_id(1)
    channels = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    strips = tl.cdiv(width, BLOCK_W)
    chunks = tl.cdiv(height, ROWS)
    acc0 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    acc1 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    acc2 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    acc3 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    acc4 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    acc5 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    acc6 = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    for unit in range(tl.program_id(0), N * chunks * strips, tl.num_programs(0)):
        cols = unit % strips * BLOCK_W + tl.arange(0, BLOCK_W)
        first = unit // strips % chunks * ROWS
        image = unit // strips // chunks
        at = cols + (j - 3)
        x1 = _load_row(x, image, first - 3, at, channels, height, width, C)
        x2 = _load_row(x, image, first - 2, at, channels, height, width, C)
        x3 = _load_row(x, image, first - 1, at, channels, height, width, C)
        x4 = _load_row(x, image, first, at, channels, height, width, C)
        x5 = _load_row(x, image, first + 1, at, channels, height, width, C)
        x6 = _load_row(x, image, first + 2, at, channels, height, width, C)
        for row in range(first, tl.minimum(first + ROWS, height), 7):
            for i in tl.static_range(7):
                x0, x1, x2, x3, x4, x5 = x1, x2, x3, x4, x5, x6
                x6 = _load_row(x, image, row + i + 3, at, channels, height, width, C)
                up = _load_row(dy, image, row + i, cols, channels, height, width, C)
                acc0 += up * x0
                acc1 += up * x1
                acc2 += up * x2
                acc3 += up * x3
                acc4 += up * x4
                acc5 += up * x5
                acc6 += up * x6
                total += up
    partial += tl.program_id(0) * 50 * C + channels
    mask = channels < C
    tl.store(partial + j * C, tl.sum(acc0, 0), mask=mask)
    tl.store(partial + (j + 7) * C, tl.sum(acc1, 0), mask=mask)
    tl.store(partial + (j + 14) * C, tl.sum(acc2, 0), mask=mask)
    tl.store(partial + (j + 21) * C, tl.sum(acc3, 0), mask=mask)
    tl.store(partial + (j + 28) * C, tl.sum(acc4, 0), mask=mask)
    tl.store(partial + (j + 35) * C, tl.sum(acc5, 0), mask=mask)
    tl.store(partial + (j + 42) * C, tl.sum(acc6, 0), mask=mask)
    if j == 0:
        tl.store(partial + 49 * C, tl.sum(total, 0), mask=mask)


def _conv_grid(x: Tensor, block_w: int, block_c: int) -> tuple[int, int]:
    images, height, width, channels = x.shape
    return (images * triton.cdiv(height, 4) * triton.cdiv(width, block_w),
            triton.cdiv(channels, block_c))


def _run_conv(x: Tensor, taps: Tensor, bias: Tensor | None, g: Tensor | None) -> Tensor:
    _, height, width, channels = x.shape
    out = _empty(x if g is None else g)
    block_c = _pow2(channels, 16, 64)
    block_w = _pow2(width, 1, 1024 // block_c)
    _conv[_conv_grid(x, block_w, block_c)](x, taps, bias, g, out, height, width, channels,
                                           BLOCK_W=block_w, BLOCK_C=block_c, num_warps=4)
    return out


def _norm_blocks(channels: int) -> dict[str, int]:
    block_c = _pow2(channels, 16)
    return dict(BLOCK_M=max(1, 2048 // block_c), BLOCK_C=block_c,
                num_warps=8 if block_c > 1024 else 4)


def _taps(weight: Tensor) -> Tensor:
    """(C, 1, 7, 7) → (49, C), for loads of adjacent channels."""
    return weight.reshape(-1, 49).t().contiguous()


@op(lambda x, weight, bias, norm_weight, norm_bias, eps, save, dilation=1: (
    _empty(x), _empty(x) if save else x.new_empty(0),
    _empty_fp32(x, x.shape[:-1].numel()), _empty_fp32(x, x.shape[:-1].numel())))
def dwconv_norm(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor,
                eps: float, save: bool, dilation: int = 1
                ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Depthwise 7x7 convolution, then LayerNorm over channels; mean and 1 / std are (N · H · W,).

    The kernels support dilation 1 only; with another, PyTorch's operations run.
    """
    if dilation != 1:
        n, y, mean, rstd = eager.dwconv_norm(
            x, weight.to(x.dtype), bias.to(x.dtype), norm_weight, norm_bias, eps, save, dilation)
        return n, y, mean.flatten(), rstd.flatten()
    _, height, width, channels = x.shape
    positions = x.shape[:-1].numel()
    mean, rstd = _empty_fp32(x, positions), _empty_fp32(x, positions)
    if channels > FUSED_NORM_CHANNELS:
        y, n = _run_conv(x, _taps(weight), bias, None), _empty(x)
        blocks = _norm_blocks(channels)
        _norm[(triton.cdiv(positions, blocks['BLOCK_M']),)](
            y, mean, rstd, norm_weight, norm_bias, n, positions, channels, eps, **blocks)
        return n, y if save else x.new_empty(0), mean, rstd
    n, saved = _empty(x), _empty(x) if save else None
    block_c = _pow2(channels, 16)
    # At least 4 columns, since 3 more are loaded on either side.
    block_w = _pow2(width, 1, max(4, 1024 // block_c))
    _conv_norm[_conv_grid(x, block_w, block_c)](
        x, _taps(weight), bias, norm_weight, norm_bias, n, saved, mean, rstd, height, width,
        channels, eps, BLOCK_W=block_w, BLOCK_C=block_c,
        num_warps=8 if block_w * block_c > 1024 else 4)
    return n, x.new_empty(0) if saved is None else saved, mean, rstd


@op(lambda dn, y, mean, rstd, norm_weight: (
    _empty(y), _empty_fp32(y, y.shape[-1]), _empty_fp32(y, y.shape[-1])))
def norm_backward(dn: Tensor, y: Tensor, mean: Tensor, rstd: Tensor,
                  norm_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the LayerNorm's input, in y's dtype, and of its weight and bias, in fp32."""
    dy, channels = _empty(y), y.shape[-1]
    blocks = _norm_blocks(channels)
    programs = min(MAX_PARTIALS, triton.cdiv(mean.numel(), blocks['BLOCK_M']))
    partial = _empty_fp32(y, 2, programs, channels)
    _norm_backward[(programs,)](dn, y, mean, rstd, norm_weight, dy, partial, mean.numel(),
                                channels, **blocks)
    return dy, partial[0].sum(0), partial[1].sum(0)


@op(lambda dy, weight, g, dilation=1: _empty(dy if g is None else g))
def dwconv_backward_input(dy: Tensor, weight: Tensor, g: Tensor | None, dilation: int = 1
                          ) -> Tensor:
    """Gradient of the convolution's input, in dy's dtype; or that plus g, in g's dtype."""
    if dilation != 1:
        dx = eager.dwconv_backward_input(dy, weight.to(dy.dtype), None, dilation)
        return dx if g is None else g + dx.to(g.dtype)
    # The transposed convolution is the convolution with the taps in reverse.
    return _run_conv(dy, _taps(weight).flip(0), None, g)


@op(lambda dy, x, dilation=1: (
    _empty_fp32(x, x.shape[-1], 1, 7, 7), _empty_fp32(x, x.shape[-1])))
def dwconv_backward_weight(dy: Tensor, x: Tensor, dilation: int = 1) -> tuple[Tensor, Tensor]:
    """Gradients of the convolution's weight, (C, 1, 7, 7), and bias, (C,), in fp32."""
    if dilation != 1:
        dweight, dbias = eager.dwconv_backward_weight(dy, x, dilation)
        return dweight.float(), dbias.float()
    images, height, width, channels = x.shape
    block_c = _pow2(channels, 16, 64)
    block_w = _pow2(width, 1, 1024 // block_c)
    rows = min(28, triton.cdiv(height, 7) * 7)
    units = images * triton.cdiv(height, rows) * triton.cdiv(width, block_w)
    partial = _empty_fp32(x, min(MAX_PARTIALS, units), 50, channels)
    _conv_weight[(partial.shape[0], 7, triton.cdiv(channels, block_c))](
        dy, x, partial, images, height, width, channels, ROWS=rows, BLOCK_W=block_w,
        BLOCK_C=block_c, num_warps=4)
    dweight = partial[:, :49].sum(0).t().contiguous().view(channels, 1, 7, 7)
    return dweight, partial[:, 49].sum(0)


# ------------------------------------------------------------------ linear layers, GELU


TILES = [(64, 64, 32, 4, 4)]  # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages
if not INTERPRETED:
    TILES += [(128, 128, 64, 8, 3), (128, 128, 32, 8, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4),
              (32, 64, 64, 4, 4)]
TILE_CONFIGS = [triton.Config(dict(BLOCK_M=m, BLOCK_N=n, BLOCK_K=k), num_warps=warps,
                              num_stages=stages) for m, n, k, warps, stages in TILES]


def _select_configs(configs: list[triton.Config], tensors: dict, PRECISION: str,
                    **_: object) -> list[triton.Config]:
    """Only the small tiles for exact fp32, which has no tensor cores: others spill registers."""
    if tensors['weight'].dtype != torch.float32 or PRECISION != 'ieee':
        return configs
    return [c for c in configs if c.kwargs['BLOCK_M'] * c.kwargs['BLOCK_N'] <= 64 * 64]


# Triton skips configs that are too large for a GPU's shared memory, and adds dtypes to the key.
tune_tiles = triton.autotune(TILE_CONFIGS, key=['bucket', 'N', 'K', 'PRECISION'],
                             prune_configs_by=dict(early_config_prune=_select_configs))


ROWS = [(64, 32, 4, 2)]  # BLOCK_M, BLOCK_K, warps, stages
if not INTERPRETED:
    ROWS += [(128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3)]
ROW_CONFIGS = [triton.Config(dict(BLOCK_M=m, BLOCK_K=k), num_warps=warps, num_stages=stages)
               for m, k, warps, stages in ROWS]
tune_rows = triton.autotune(ROW_CONFIGS, key=['bucket', 'C', 'PRECISION'])


@triton.jit
def _tile_corner(M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """First row and column of this program's tile; eight rows of tiles at a time share L2."""
    pid = tl.program_id(0)
    tile_rows, tile_cols = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (8 * tile_cols) * 8
    size = tl.minimum(tile_rows - first, 8)
    pid = pid % (8 * tile_cols)
    return (first + pid % size) * BLOCK_M, pid // size * BLOCK_N


@triton.jit
def _matmul_tile(a, b, scale, row, col, M, N, K, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of (a · scale) @ b in fp32: a (M, K), scale (K,) or None, b (K, N).

    With TRANSPOSED, b is (N, K).
    """
    rows = tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # Only the tile's start needs 64 bits.
    a += row.to(tl.int64) * K + rows[:, None] * K + ks[None, :]
    if TRANSPOSED:
        b += cols[None, :] * K + ks[:, None]
    else:
        b += cols[None, :] + ks[:, None] * N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = ks < K - start
        left = tl.load(a, mask=(rows < M - row)[:, None] & inside[None, :], other=0.0)
        if scale is not None:
            left = (left.to(tl.float32) * _load_vector(scale, start + ks, K)).to(left.dtype)
        right = tl.load(b, mask=(cols < N)[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
        a += BLOCK_K
        b += BLOCK_K if TRANSPOSED else BLOCK_K * N
    return acc


@triton.jit
def _tile_offsets(row, col, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets of a tile in (M, N), the mask of those inside, and the tile's columns."""
    rows = tl.arange(0, BLOCK_M)
    cols = col + tl.arange(0, BLOCK_N)
    mask = (rows < M - row)[:, None] & (cols < N)[None, :]
    return row.to(tl.int64) * N + rows[:, None] * N + cols[None, :], mask, cols


@triton.jit
def _image_start(matrix, M, N):
    """Start of this program's image in (images · M, N)."""
    return matrix + tl.program_id(1).to(tl.int64) * M * N


@triton.jit
def _store_sums(values, sums, row, cols, M, N, BLOCK_M: tl.constexpr):
    """Store sums over a tile's rows in sums (images, groups of rows, N).

    They go to the first of the tile's groups; the others get zeros, so that all of ``sums`` is
    written, whatever the tile's size.
    """
    first = tl.arange(0, BLOCK_M // GROUP)
    groups = row // GROUP + first
    sums = _image_start(sums, tl.cdiv(M, GROUP), N)
    tl.store(sums + groups[:, None] * N + cols[None, :],
             tl.where((first == 0)[:, None], tl.sum(values, 0)[None, :], 0.0),
             mask=(groups < tl.cdiv(M, GROUP))[:, None] & (cols < N)[None, :])


@triton.jit
def _halves(acc, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and right half of a tile.

    The compiler would compute the erf of a whole tile twice, in two layouts, and spill registers.
    """
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _cdf(h):
    """Φ(h), the normal distribution function of exact GELU."""
    return 0.5 * (1 + tl.math.erf(h * 0.7071067811865476))


@triton.jit
def _gelu_slope(h, cdf):
    """Derivative of GELU, h · Φ(h), from cdf = Φ(h)."""
    return cdf + h * tl.exp(-0.5 * h * h) * 0.3989422804014327


@tune_tiles
@triton.jit(do_not_specialize=['bucket'])
def _linear_gelu(n, weight, bias, a, h, squares, M, N, K, bucket, PRECISION: tl.constexpr,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """h is None if it is not saved, squares if there is no GRN."""
    row, col = _tile_corner(M, N, BLOCK_M, BLOCK_N)
    acc = _matmul_tile(_image_start(n, M, K), weight, None, row, col, M, N, K, True, PRECISION,
                       BLOCK_M, BLOCK_N, BLOCK_K)
    halves = _halves(acc, BLOCK_M, BLOCK_N)
    for i in tl.static_range(2):
        offsets, mask, cols = _tile_offsets(row, col + i * (BLOCK_N // 2), M, N, BLOCK_M,
                                            BLOCK_N // 2)
        # GELU of h as it is saved, so that the backward pass differentiates the same function.
        rounded = (halves[i] + _load_vector(bias, cols, N)).to(a.dtype.element_ty)
        if h is not None:
            tl.store(_image_start(h, M, N) + offsets, rounded, mask=mask)
        value = rounded.to(tl.float32)
        out = (value * _cdf(value)).to(a.dtype.element_ty)
        tl.store(_image_start(a, M, N) + offsets, out, mask=mask)
        if squares is not None:
            value = tl.where(mask, out.to(tl.float32), 0.0)
            _store_sums(value * value, squares, row, cols, M, N, BLOCK_M)


@triton.jit
def _add_residual(acc, bias, gamma, drop, x, out, row, col, M, N, area,
                  BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """out = x + drop · gamma · (acc + bias) for a tile; x and out start at this image."""
    offsets, mask, cols = _tile_offsets(row, col, M, N, BLOCK_M, BLOCK_N)
    acc += _load_vector(bias, cols, N)
    if gamma is not None:
        acc *= _load_vector(gamma, cols, N)
    if drop is not None:
        rows = row + tl.arange(0, BLOCK_M)
        acc *= tl.load(drop + rows // area, mask=rows < M, other=0.0)[:, None]
    acc += tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offsets, acc, mask=mask)


@tune_tiles
@triton.jit(do_not_specialize=['bucket'])
def _linear_residual(a, scale, weight, bias, gamma, drop, x, out, M, N, K, area, bucket,
                     PRECISION: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """scale, (images, K), is that of GRN, or None."""
    row, col = _tile_corner(M, N, BLOCK_M, BLOCK_N)
    if scale is not None:
        scale = _image_start(scale, 1, K)
    if drop is not None:
        drop = _image_start(drop, 1, 1)
    acc = _matmul_tile(_image_start(a, M, K), weight, scale, row, col, M, N, K, True, PRECISION,
                       BLOCK_M, BLOCK_N, BLOCK_K)
    _add_residual(acc, bias, gamma, drop, _image_start(x, M, N), _image_start(out, M, N), row, col,
                  M, N, area, BLOCK_M, BLOCK_N)


@tune_tiles
@triton.jit(do_not_specialize=['bucket'])
def _linear_gelu_backward(g, weight, h, dh, a, M, N, K, bucket, PRECISION: tl.constexpr,
                          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    row, col = _tile_corner(M, N, BLOCK_M, BLOCK_N)
    acc = _matmul_tile(g, weight, None, row, col, M, N, K, False, PRECISION,
                       BLOCK_M, BLOCK_N, BLOCK_K)
    halves = _halves(acc, BLOCK_M, BLOCK_N)
    for i in tl.static_range(2):
        offsets, mask, _ = _tile_offsets(row, col + i * (BLOCK_N // 2), M, N, BLOCK_M, BLOCK_N // 2)
        value = tl.load(h + offsets, mask=mask, other=0.0).to(tl.float32)
        cdf = _cdf(value)
        tl.store(dh + offsets, halves[i] * _gelu_slope(value, cdf), mask=mask)
        tl.store(a + offsets, value * cdf, mask=mask)


@tune_tiles
@triton.jit(do_not_specialize=['bucket'])
def _grn_linear_backward(g, weight, h, du, sums, M, N, K, bucket, PRECISION: tl.constexpr,
                         BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    row, col = _tile_corner(M, N, BLOCK_M, BLOCK_N)
    acc = _matmul_tile(_image_start(g, M, K), weight, None, row, col, M, N, K, False, PRECISION,
                   BLOCK_M, BLOCK_N, BLOCK_K)
    offsets, mask, cols = _tile_offsets(row, col, M, N, BLOCK_M, BLOCK_N)
    rounded = acc.to(du.dtype.element_ty)
    tl.store(_image_start(du, M, N) + offsets, rounded, mask=mask)
    value = tl.load(_image_start(h, M, N) + offsets, mask=mask, other=0.0).to(tl.float32)
    # Outside of the map these are zeros.
    _store_sums(rounded.to(tl.float32) * value * _cdf(value), sums, row, cols, M, N, BLOCK_M)


@tune_rows
@triton.jit(do_not_specialize=['bucket'])
def _mlp(n, weight1, bias1, weight2, bias2, gamma, drop, x, out, h, M, C, K, area, bucket,
         PRECISION: tl.constexpr, BLOCK_C: tl.constexpr,
         BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Both matmuls for some rows and all channels, without writing the 4C map between them."""
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, BLOCK_C)
    inside = channels < C
    start = rows.to(tl.int64)[:, None]
    left = tl.load(n + start * C + channels[None, :],
                   mask=(rows < M)[:, None] & inside[None, :], other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        mask = (ks < K)[None, :]
        right = tl.load(weight1 + ks[None, :] * C + channels[:, None],
                        mask=inside[:, None] & mask, other=0.0)
        value = tl.dot(left, right, input_precision=PRECISION) + _load_vector(bias1, ks, K)
        rounded = value.to(n.dtype.element_ty)
        if h is not None:
            tl.store(h + start * K + ks[None, :], rounded, mask=(rows < M)[:, None] & mask)
        value = rounded.to(tl.float32)
        value *= _cdf(value)
        right = tl.load(weight2 + channels[None, :] * K + ks[:, None],
                        mask=(ks < K)[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(value.to(n.dtype.element_ty), right, acc, input_precision=PRECISION)
    _add_residual(acc, bias2, gamma, drop, x, out, row, 0, M, C, area, BLOCK_M, BLOCK_C)


@triton.jit
def _gelu(h, da, dh, a, count, BLOCK: tl.constexpr):
    """a = GELU(h), and dh = da · GELU'(h) if da is not None."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    value = tl.load(h + offsets, mask=mask, other=0.0).to(tl.float32)
    cdf = _cdf(value)
    tl.store(a + offsets, value * cdf, mask=mask)
    if da is not None:
        up = tl.load(da + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(dh + offsets, up * _gelu_slope(value, cdf), mask=mask)


TRITON_IS_FASTER: dict[tuple, bool] = {}
"""Whether our kernel beats cuBLAS, for each kind and size of matmul so far."""


def _run_faster(kind: str, a: Tensor, weight: Tensor, run_triton: Callable[[], R],
                run_cublas: Callable[[], R]) -> R:
    """The result of ``run_triton`` or ``run_cublas`` (cuBLAS, then a pass over its output).

    The first call for a kind and size (rows to a power of two) times both. Nothing can be timed
    while a CUDA graph is captured.
    """
    if INTERPRETED:
        return run_triton()
    key = (kind, a.shape[:-1].numel().bit_length(), *weight.shape, a.dtype, a.device)
    if key not in TRITON_IS_FASTER:
        if torch.cuda.is_current_stream_capturing():
            return run_triton()
        ours, cublas = (triton.testing.do_bench(run, warmup=5, rep=20)
                        for run in (run_triton, run_cublas))
        TRITON_IS_FASTER[key] = ours <= cublas
    return run_triton() if TRITON_IS_FASTER[key] else run_cublas()


def _precision() -> str:
    return 'tf32' if torch.backends.cuda.matmul.allow_tf32 else 'ieee'


def _launch_matmul(kernel: Any, tensors: tuple[Tensor | None, ...], M: int, N: int, K: int,
                   images: int = 1, **settings: int) -> None:
    """Run a kernel of a tiled matmul, tuned once for each power of two of rows.

    With several ``images`` of M rows each, no tile has rows of two of them.
    """
    def grid(meta: dict) -> tuple[int, int]:
        return triton.cdiv(M, meta['BLOCK_M']) * triton.cdiv(N, meta['BLOCK_N']), images

    kernel[grid](*tensors, M, N, K, bucket=(M * images).bit_length(), PRECISION=_precision(),
                 **settings)


def _empty_group_sums(x: Tensor, channels: int) -> Tensor:
    """Memory for a matmul's sums, (N, groups of positions, channels)."""
    return _empty_fp32(x, x.shape[0], triton.cdiv(x.shape[1] * x.shape[2], GROUP.value), channels)


@op(lambda n, weight, bias, save: (
    _empty(n, weight.shape[0]), _empty(n, weight.shape[0]) if save else n.new_empty(0)))
def linear_gelu(n: Tensor, weight: Tensor, bias: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """GELU of h = n weightᵀ + bias, rounded to n's dtype; with ``save``, h.

    Args:
        n: (N, H, W, C).
        weight: (K, C), cast to n's dtype.
        bias: (K,).
        save: Whether h is returned, or an empty tensor in its place.
    """
    channels, inner = weight.shape
    weight = weight.to(n.dtype)

    def run_triton() -> tuple[Tensor, Tensor]:
        a, h = _empty(n, channels), _empty(n, channels) if save else None
        _launch_matmul(_linear_gelu, (n, weight, bias, a, h, None), n.shape[:-1].numel(), channels,
                        inner)
        return a, n.new_empty(0) if h is None else h

    def run_cublas() -> tuple[Tensor, Tensor]:
        h = eager.linear(n, weight, bias.to(n.dtype))
        return gelu(h), h if save else n.new_empty(0)
    return _run_faster('linear_gelu', n, weight, run_triton, run_cublas)


@op(lambda a, weight, bias, gamma, drop, x: _empty(x))
def linear_residual(a: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None,
                    drop: Tensor | None, x: Tensor) -> Tensor:
    """x + drop · gamma · (a weightᵀ + bias), in x's dtype, which need not be that of a.

    Args:
        a: (N, H, W, K).
        weight: (C, K), cast to a's dtype.
        bias: (C,).
        gamma: Layer scale, (C,), or None.
        drop: Factor of each sample, (N,), fp32, or None.
        x: (N, H, W, C).
    """
    channels, inner = weight.shape
    weight = weight.to(a.dtype)

    def run_triton() -> Tensor:
        out = _empty(x)
        _launch_matmul(_linear_residual, (a, None, weight, bias, gamma, drop, x, out),
                        x.shape[:-1].numel(), channels, inner, area=x.shape[1] * x.shape[2])
        return out
    return _run_faster('linear_residual', a, weight, run_triton, lambda: eager.linear_residual(
        a, weight, bias.to(a.dtype), gamma, drop, x))


@op(lambda g, weight, h: (_empty(h), _empty(h)))
def linear_gelu_backward(g: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """dh = (g weight) · GELU'(h), and a = GELU(h), both in h's dtype.

    Args:
        g: (N, H, W, C), gradient of the second linear layer's output.
        weight: (C, K) of that layer, cast to g's dtype.
        h: (N, H, W, K), saved by :func:`linear_gelu`.
    """
    inner, channels = weight.shape
    weight = weight.to(g.dtype)

    def run_triton() -> tuple[Tensor, Tensor]:
        dh, a = _empty(h), _empty(h)
        _launch_matmul(_linear_gelu_backward, (g, weight, h, dh, a), h.shape[:-1].numel(),
                        channels, inner)
        return dh, a
    return _run_faster('linear_gelu_backward', g, weight, run_triton,
                   lambda: gelu_backward(g @ weight, h))


@op(lambda n, weight1, bias1, weight2, bias2, gamma, drop, x, save: (
    _empty(x), _empty(n, weight1.shape[0]) if save else n.new_empty(0)))
def mlp(n: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
        gamma: Tensor | None, drop: Tensor | None, x: Tensor, save: bool
        ) -> tuple[Tensor, Tensor]:
    """:func:`linear_gelu`, then :func:`linear_residual`; one kernel up to FUSED_MLP_CHANNELS."""
    def run_cublas() -> tuple[Tensor, Tensor]:
        a, h = linear_gelu(n, weight1, bias1, save)
        return linear_residual(a, weight2, bias2, gamma, drop, x), h
    inner, channels = weight1.shape
    if channels > FUSED_MLP_CHANNELS:
        return run_cublas()

    def run_triton() -> tuple[Tensor, Tensor]:
        out, h, rows = _empty(x), _empty(n, inner) if save else None, n.shape[:-1].numel()
        _mlp[lambda meta: (triton.cdiv(rows, meta['BLOCK_M']),)](
            n, weight1.to(n.dtype), bias1, weight2.to(n.dtype), bias2, gamma, drop, x, out, h,
            rows, channels, inner, area=x.shape[1] * x.shape[2], bucket=rows.bit_length(),
            PRECISION=_precision(), BLOCK_C=_pow2(channels, 16))
        return out, n.new_empty(0) if h is None else h
    return _run_faster(f'mlp, save={save}', n, weight1, run_triton, run_cublas)


@op(lambda h: _empty(h))
def gelu(h: Tensor) -> Tensor:
    """Exact (erf) GELU."""
    a = _empty(h)
    _gelu[(triton.cdiv(h.numel(), 1024),)](h, None, None, a, h.numel(), BLOCK=1024)
    return a


@op(lambda da, h: (_empty(h), _empty(h)))
def gelu_backward(da: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """da · GELU'(h), and GELU(h)."""
    dh, a = _empty(h), _empty(h)
    _gelu[(triton.cdiv(h.numel(), 1024),)](h, da, dh, a, h.numel(), BLOCK=1024)
    return dh, a


# ------------------------------------------------------- global response normalization


@triton.jit
def _program_chunk(area, K, chunks, CHUNK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sample, first element and number of this program's positions, and its channels."""
    sample = tl.program_id(0) // chunks
    first = tl.program_id(0) % chunks * CHUNK
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    return sample, (sample.to(tl.int64) * area + first) * K, tl.minimum(area - first, CHUNK), ks


@triton.jit
def _map_sums(h, du, a, sums, area, K, chunks, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
              BLOCK_K: tl.constexpr):
    """sums (N, chunks, K) over chunks of each map: of du · GELU(h), or of a² with a = GELU(h)."""
    _, start, count, ks = _program_chunk(area, K, chunks, CHUNK, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for position in range(0, count, BLOCK_M):
        rows = position + tl.arange(0, BLOCK_M)
        mask = (rows < count)[:, None] & (ks < K)[None, :]
        offsets = start + rows[:, None] * K + ks[None, :]
        value = tl.load(h + offsets, mask=mask, other=0.0).to(tl.float32)
        value *= _cdf(value)
        if du is None:
            rounded = value.to(a.dtype.element_ty)
            tl.store(a + offsets, rounded, mask=mask)
            value = rounded.to(tl.float32)
            total += value * value
        else:
            total += tl.load(du + offsets, mask=mask, other=0.0).to(tl.float32) * value
    tl.store(sums + tl.program_id(0).to(tl.int64) * K + ks, tl.sum(total, 0), mask=ks < K)


@triton.jit
def _grn_gelu_backward(du, h, scale, beta, extra, dh, u, area, K, chunks, CHUNK: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """With a = GELU(h): dh = (du · scale + a · extra) · GELU'(h), and u = a · scale + beta."""
    sample, start, count, ks = _program_chunk(area, K, chunks, CHUNK, BLOCK_K)
    scales = _load_vector(scale + sample * K, ks, K)
    extras = _load_vector(extra + sample * K, ks, K)
    betas = _load_vector(beta, ks, K)
    for position in range(0, count, BLOCK_M):
        rows = position + tl.arange(0, BLOCK_M)
        mask = (rows < count)[:, None] & (ks < K)[None, :]
        offsets = start + rows[:, None] * K + ks[None, :]
        value = tl.load(h + offsets, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(du + offsets, mask=mask, other=0.0).to(tl.float32)
        cdf = _cdf(value)
        a = value * cdf
        tl.store(dh + offsets, (up * scales + a * extras) * _gelu_slope(value, cdf), mask=mask)
        tl.store(u + offsets, a * scales + betas, mask=mask)


def _map_blocks(x: Tensor) -> tuple[int, tuple[int, int], dict[str, int]]:
    """Chunks per map, the grid over chunks and channels, and block sizes of GRN kernels."""
    images, height, width, channels = x.shape
    block_k = _pow2(channels, 16, 128)
    chunks = triton.cdiv(height * width, CHUNK)
    return (chunks, (images * chunks, triton.cdiv(channels, block_k)),
            dict(CHUNK=CHUNK, BLOCK_M=2048 // block_k, BLOCK_K=block_k, num_warps=4))


def _run_map_sums(h: Tensor, du: Tensor | None, a: Tensor | None) -> Tensor:
    chunks, grid, blocks = _map_blocks(h)
    sums = _empty_fp32(h, h.shape[0], chunks, h.shape[-1])
    _map_sums[grid](h, du, a, sums, h.shape[1] * h.shape[2], h.shape[-1], chunks, **blocks)
    return sums.sum(1)


@op(lambda n, weight, bias, save: (
    _empty(n, weight.shape[0]), _empty(n, weight.shape[0]) if save else n.new_empty(0),
    _empty_fp32(n, n.shape[0], weight.shape[0])))
def linear_gelu_squares(n: Tensor, weight: Tensor, bias: Tensor, save: bool
                        ) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`linear_gelu`, and the sums of its squares over each map, (N, K), in fp32."""
    channels, inner = weight.shape
    weight = weight.to(n.dtype)

    def run_triton() -> tuple[Tensor, Tensor, Tensor]:
        a, h = _empty(n, channels), _empty(n, channels) if save else None
        sums = _empty_group_sums(n, channels)
        _launch_matmul(_linear_gelu, (n, weight, bias, a, h, sums), n.shape[1] * n.shape[2],
                        channels, inner, images=n.shape[0])
        return a, n.new_empty(0) if h is None else h, sums.sum(1)

    def run_cublas() -> tuple[Tensor, Tensor, Tensor]:
        h = eager.linear(n, weight, bias.to(n.dtype))
        a = _empty(h)
        return a, h if save else n.new_empty(0), _run_map_sums(h, None, a)
    return _run_faster('linear_gelu_squares', n, weight, run_triton, run_cublas)


@op(lambda a, scale, beta, weight, bias, gamma, drop, x: _empty(x))
def grn_linear_residual(a: Tensor, scale: Tensor, beta: Tensor, weight: Tensor, bias: Tensor,
                        gamma: Tensor | None, drop: Tensor | None, x: Tensor) -> Tensor:
    """:func:`linear_residual` of GRN's output, a · scale + beta: scale (N, K), beta (K,)."""
    channels, inner = weight.shape
    weight = weight.to(a.dtype)

    def run_triton() -> Tensor:
        out, area = _empty(x), x.shape[1] * x.shape[2]
        shifted = bias.float() + weight.float() @ beta.float()  # beta's share of the output
        _launch_matmul(_linear_residual, (a, scale, weight, shifted, gamma, drop, x, out), area,
                        channels, inner, images=x.shape[0], area=area)
        return out
    return _run_faster('grn_linear_residual', a, weight, run_triton, lambda: eager.linear_residual(
        eager.apply_grn(a, scale, beta), weight, bias.to(a.dtype), gamma, drop, x))


@op(lambda g, weight, h: (_empty(h), _empty_fp32(h, h.shape[0], h.shape[-1])))
def grn_linear_backward(g: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """du = g weight, in h's dtype, and the sums of du · GELU(h) over each map, (N, K), in fp32.

    Args:
        g: (N, H, W, C), gradient of the second linear layer's output.
        weight: (C, K) of that layer, cast to g's dtype.
        h: (N, H, W, K).
    """
    inner, channels = weight.shape
    weight = weight.to(g.dtype)

    def run_triton() -> tuple[Tensor, Tensor]:
        du, sums = _empty(h), _empty_group_sums(h, channels)
        _launch_matmul(_grn_linear_backward, (g, weight, h, du, sums), h.shape[1] * h.shape[2],
                        channels, inner, images=h.shape[0])
        return du, sums.sum(1)

    def run_cublas() -> tuple[Tensor, Tensor]:
        du = g @ weight
        return du, _run_map_sums(h, du, None)
    return _run_faster('grn_linear_backward', g, weight, run_triton, run_cublas)


@op(lambda du, h, scale, beta, extra: (_empty(h), _empty(h)))
def grn_gelu_backward(du: Tensor, h: Tensor, scale: Tensor, beta: Tensor, extra: Tensor
                      ) -> tuple[Tensor, Tensor]:
    """With a = GELU(h): (du · scale + a · extra) · GELU'(h), and a · scale + beta, in one pass.

    Args:
        du: (N, H, W, K), gradient of the GRN's output.
        h: (N, H, W, K).
        scale: (N, K).
        beta: (K,).
        extra: (N, K).
    """
    dh, u = _empty(h), _empty(h)
    chunks, grid, blocks = _map_blocks(h)
    _grn_gelu_backward[grid](du, h, scale, beta, extra, dh, u, h.shape[1] * h.shape[2],
                             h.shape[-1], chunks, **blocks)
    return dh, u


def grn_linear_gelu_backward(g: Tensor, weight: Tensor, h: Tensor, norms: Tensor, gamma: Tensor,
                             beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`linear_gelu_backward` with a GRN after the GELU: gradient of h, output, dgamma."""
    du, sums = grn_linear_backward(g, weight, h)
    extra, dgamma = eager.grn_gradient(sums, norms, gamma)
    return *grn_gelu_backward(du, h, eager.grn_scale(norms, gamma), beta, extra), dgamma
