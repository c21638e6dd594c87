"""3x3 convolutions on a CPU with a quarter of the multiplications, computed in fp32.

Winograd's minimal filtering F(4x4, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural
Networks", 2016): tiles of 6x6 inputs and the kernel are transformed, multiplied at 36 points, and
transformed back to 4x4 outputs. The rounding error depends on the points (Barabasz et al., "Error
Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural Networks", 2020). With
0, ±3/4, ±3/2 and ∞, which are exact in binary, it is about 2e-6 of the output. Maps are
(N, H, W, C).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import eager

P, Q = 0.75, 1.5
"""The points are 0, ±P, ±Q and ∞."""

TILE = 4
POINTS = TILE + 2

BAND_TILES = 512
"""Tiles that are computed together, so that they stay in the cache."""

MIN_CHANNELS, MIN_TILES = 192, 128
"""The smallest convolution that is about as fast so, with one thread and with two."""

MIN_CHANNELS_AMX = 256
"""The same on processors with AMX: it does not compute in fp32, but tells the processors on which
the direct sum was measured to be faster in fp32 as well, 100 multiply-adds a nanosecond."""

MIN_USED = 0.9
"""The share of the tiles' outputs that lie on the map, for which it is faster in bf16, and in fp32
on processors with AMX: of the 7x7 features of boxes it is 0.77."""


def _kernel_matrix() -> Tensor:
    """(6, 3): a kernel's values at the points, over the Lagrange denominators."""
    rows = [[1 / (P * P * Q * Q), 0.0, 0.0]]
    for point, other in ((P, Q), (Q, P)):
        scale = 2 * point**2 * (point**2 - other**2)
        rows += [[1 / scale, sign * point / scale, point**2 / scale] for sign in (1, -1)]
    return torch.tensor([*rows, [0.0, 0.0, 1.0]], dtype=torch.float64, device='cpu')


KERNEL = torch.kron(_kernel_matrix(), _kernel_matrix()).float()
"""(36, 9): the transform of a kernel, both directions at once."""


def suits(x: Tensor, channels: int) -> bool:
    """Whether a convolution of an (N, C, H, W) map to ``channels`` channels is faster so."""
    n, c, h, w = x.shape
    count = n * _tiles(h) * _tiles(w)
    has_amx, fills = eager.has_amx(), n * h * w >= MIN_USED * count * TILE**2
    if x.dtype == torch.float32:
        pays = fills or not has_amx
    else:  # AMX multiplies sixteen times as fast in bf16
        pays = x.dtype == torch.bfloat16 and fills and not has_amx
    return (pays and x.is_cpu and count >= MIN_TILES and eager.uses_onednn(x)
            and min(c, channels) >= (MIN_CHANNELS_AMX if has_amx else MIN_CHANNELS))


def transform_weight(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) → (36, O, C), in fp32."""
    o, c = weight.shape[:2]
    return (KERNEL @ weight.float().permute(2, 3, 0, 1).reshape(9, o * c)).view(-1, o, c)


def convolution(x: Tensor, weights: Tensor | Sequence[Tensor]) -> Tensor:
    """The convolution with stride and padding 1 of a (N, H, W, C) map.

    Args:
        x: The map.
        weights: (O, C) of each point, as :func:`transform_weight` returns, or in oneDNN's layout.
    """
    n, h, w, _ = x.shape
    channels = weights[0].shape[0]
    out = x.new_empty(n, h, w, channels)
    for images, rows, tiles in _bands(x, 1):
        points = _transform(tiles, _input_transform)
        products = [eager.linear(p, weight, None) for p, weight in zip(points, weights,
                                                                       strict=True)]
        half = tiles.new_empty(POINTS, TILE, *products[0].shape)
        for i in range(POINTS):
            _output_transform(products[POINTS * i:POINTS * (i + 1)], half[i])
        count, height, width = half.shape[2:5]
        band = tiles.new_empty(count, height, TILE, width, TILE, channels)
        for i in range(TILE):
            _output_transform(list(half[:, i]), [band[:, :, j, :, i] for j in range(TILE)])
        target = out[images, TILE * rows.start:TILE * rows.stop]
        target.copy_(band.view(count, TILE * height, TILE * width, channels)[
            :, :target.shape[1], :w])
    return out


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """The gradient of the weight, (O, C, 3, 3), from those of the output, (N, H, W, O)."""
    total = g.new_zeros(POINTS * POINTS, g.shape[-1], x.shape[-1], dtype=torch.float32)
    for (_, _, tiles), (_, _, gradients) in zip(_bands(x, 1), _bands(g, 0), strict=True):
        inputs = _transform(tiles, _input_transform)
        outputs = _transform(gradients, _output_transform_transposed)
        for sums, a, b in zip(total, outputs, inputs, strict=True):
            sums.addmm_(a.flatten(0, 2).t(), b.flatten(0, 2))
    kernel = KERNEL.t() @ total.flatten(1)
    return kernel.view(3, 3, *total.shape[1:]).permute(2, 3, 0, 1)


def gradients(g: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
              ) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the map (N, C, H, W) and the weight, where they are needed."""
    g, dx, dw = _nhwc(g), None, None
    if needs[0]:
        dx = convolution(g, transform_weight(weight.flip(2, 3).transpose(0, 1)))
    if needs[1]:
        dw = weight_gradient(g, _nhwc(x))
    return dx if dx is None else dx.permute(0, 3, 1, 2), dw


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def _tiles(size: int) -> int:
    return -(-size // TILE)


def _bands(x: Tensor, border: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Images, rows of tiles and their inputs, (n, 4·rows + 2·border, 4·columns + 2·border, C).

    ``border`` is that of the tiles; beyond the map there are zeros. The inputs are in fp32.
    """
    n, h, w, _ = x.shape
    rows, columns = _tiles(h), _tiles(w)
    if rows * columns <= BAND_TILES:
        step, height = max(1, BAND_TILES // (rows * columns)), rows
    else:
        step, height = 1, max(1, BAND_TILES // columns)
    for image in range(0, n, step):
        for row in range(0, rows, height):
            end = min(row + height, rows)
            first, last = TILE * row - border, TILE * end + border
            tiles = x[image:image + step, max(first, 0):last].float()
            yield slice(image, image + step), slice(row, end), F.pad(
                tiles, (0, 0, border, border + TILE * columns - w,
                        max(-first, 0), max(last - h, 0)))


def _transform(tiles: Tensor, transform: Callable[[Sequence[Tensor], Tensor], None]
               ) -> Iterator[Tensor]:
    """The 36 points of tiles, (n, rows, columns, C) each."""
    size = POINTS if transform is _input_transform else TILE
    n, height, width, c = tiles.shape
    rows, columns = (height - size) // TILE + 1, (width - size) // TILE + 1
    half = tiles.new_empty(POINTS, n, rows, width, c)
    transform([tiles[:, i:i + TILE * (rows - 1) + 1:TILE] for i in range(size)], half)
    for one in half:
        points = tiles.new_empty(POINTS, n, rows, columns, c)
        transform([one[:, :, i:i + TILE * (columns - 1) + 1:TILE] for i in range(size)], points)
        yield from points


def _input_transform(d: Sequence[Tensor], out: Tensor) -> None:
    """Six values of each tile in one direction → six points."""
    even, odd = d[4].sub(d[2], alpha=Q * Q), d[3].sub(d[1], alpha=Q * Q)
    torch.add(even, odd, alpha=P, out=out[1])
    torch.sub(even, odd, alpha=P, out=out[2])
    torch.add(even.sub_(d[2], alpha=P * P), d[0], alpha=P * P * Q * Q, out=out[0])
    even, odd = torch.sub(d[4], d[2], alpha=P * P, out=even), torch.sub(
        d[3], d[1], alpha=P * P, out=odd)
    torch.add(even, odd, alpha=Q, out=out[3])
    torch.sub(even, odd, alpha=Q, out=out[4])
    torch.sub(d[5], d[3], alpha=P * P + Q * Q, out=even)
    torch.add(even, d[1], alpha=P * P * Q * Q, out=out[5])


def _output_transform(m: Sequence[Tensor], out: Tensor | Sequence[Tensor]) -> None:
    """Six points in one direction → four outputs of each tile."""
    p_sum, p_difference = m[1] + m[2], m[1] - m[2]
    q_sum, q_difference = m[3] + m[4], m[3] - m[4]
    ratio = Q / P
    torch.add(p_sum, q_sum, out=out[0]).add_(m[0])
    torch.add(m[5], p_difference, alpha=P**3, out=out[3]).add_(q_difference, alpha=Q**3)
    torch.mul(p_sum.add_(q_sum, alpha=ratio**2), P**2, out=out[2])
    torch.mul(p_difference.add_(q_difference, alpha=ratio), P, out=out[1])


def _output_transform_transposed(g: Sequence[Tensor], out: Tensor) -> None:
    """Four gradients of each tile in one direction → six points."""
    out[0].copy_(g[0])
    out[5].copy_(g[3])
    for i, point in ((1, P), (3, Q)):
        even = g[0].add(g[2], alpha=point**2)
        odd = g[1].add(g[3], alpha=point**2)
        torch.add(even, odd, alpha=point, out=out[i])
        torch.sub(even, odd, alpha=point, out=out[i + 1])
