"""A convolution of concatenated maps of which some are upsampled, at the size of its inputs.

A k x k convolution is a sum of k² shifted 1x1 convolutions, and a 1x1 convolution commutes with
bilinear upsampling. So a coarse map is multiplied with the kernel at its own size, and the k²
results are upsampled, shifted and summed by two products with banded matrices
(:mod:`convnext_mm.fused.resampling`). Neither an upsampled map nor a concatenation is stored.

On a GPU the matrices are whole and all images are multiplied at once, since a launch takes as long
as many multiplications; small maps are upsampled and concatenated there.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager, winograd
from .functions import compute_dtype, without_autocast
from .packed import PackedConvolution, pack_linear
from .resampling import Banded, interpolation, shifted

GPU_MIN_SAVED = 3e11
"""Multiplications that must be saved on a GPU, where every product is a launch: about four images
of 512x512 in the head of UPerNet."""


class Layout(NamedTuple):
    """How the maps become one.

    Args:
        size: Height and width of the output.
        align_corners: As for F.interpolate.
        dilation: Dilation of the convolution.
    """

    size: tuple[int, ...]
    align_corners: bool
    dilation: int = 1


def convolution(maps: Sequence[Tensor], weight: Tensor, layout: Layout) -> Tensor:
    """The convolution of ``maps``, upsampled to ``layout.size`` and concatenated.

    Equal to ``F.conv2d(torch.cat([F.interpolate(...), ...], 1), weight, padding=...)`` up to
    rounding. Under autocast it computes in its dtype.

    Args:
        maps: (N, C_i, H_i, W_i) each.
        weight: (O, Σ C_i, k, k) with an odd k.
        layout: Size, alignment and dilation.

    Returns:
        (N, O, H, W), in channels_last.
    """
    dtype = compute_dtype(maps[0])
    maps = [x.to(dtype, memory_format=torch.channels_last) for x in maps]
    if not pays(maps, weight.shape, layout):
        return F.conv2d(concatenate(maps, layout), weight, padding=_padding(weight, layout),
                        dilation=layout.dilation)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (weight, *maps)):
        return PyramidFunction.apply(layout, weight, *maps)
    with without_autocast(maps[0]):
        return _forward(maps, weight.to(dtype), layout)


def pays(maps: Sequence[Tensor], weight: Sequence[int], layout: Layout) -> bool:
    """Whether a convolution at the maps' own sizes is faster than one of a concatenation.

    Args:
        maps: (N, C_i, H_i, W_i) each, in the dtype of the products.
        weight: The shape of the weight.
        layout: Size, alignment and dilation.
    """
    first = maps[0]
    if not first.is_cuda:
        return True
    if first.dtype == torch.float32 and (
            torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32):
        return False  # by default, PyTorch rounds to TF32 in convolutions, but not in matmuls
    height, width = layout.size
    channels, *kernel = weight[0], *weight[2:]
    saved = sum(x.shape[1] * (height * width - x.shape[2:].numel()) for x in maps)
    return len(first) * saved * channels * math.prod(kernel) >= GPU_MIN_SAVED


def batches(x: Tensor) -> bool:
    """Whether all images are multiplied at once, with whole matrices."""
    return x.is_cuda


def concatenate(maps: Sequence[Tensor], layout: Layout) -> Tensor:
    """The maps, upsampled bilinearly and concatenated: (N, Σ C_i, H, W)."""
    return torch.cat([x if x.shape[2:] == layout.size else F.interpolate(
        x, layout.size, mode='bilinear', align_corners=layout.align_corners) for x in maps], 1)


class PyramidFunction(torch.autograd.Function):
    """:func:`convolution`, which saves only its inputs; differentiable once.

    The weight is cast to the maps' dtype in both directions, so that no copy of it is saved.
    """

    @staticmethod
    def forward(ctx: Any, layout: Layout, weight: Tensor, *maps: Tensor) -> Tensor:
        ctx.layout = layout
        ctx.save_for_backward(weight, *maps)
        with without_autocast(maps[0]):
            return _forward(maps, weight.to(maps[0].dtype), layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        weight, *maps = ctx.saved_tensors
        _, needs_weight, *needs = ctx.needs_input_grad
        with without_autocast(g):
            dtype = maps[0].dtype
            g = g.to(dtype).contiguous(memory_format=torch.channels_last)
            parts = weight.to(dtype).split([x.shape[1] for x in maps], 1)
            backward = [(_same_size_backward if x.shape[2:] == ctx.layout.size
                         else _coarse_backward)(g, x, part, (needed, needs_weight), ctx.layout)
                        for x, part, needed in zip(maps, parts, needs, strict=True)]
            dweight = torch.cat([dw.to(weight.dtype) for _, dw in backward if dw is not None], 1
                                ) if needs_weight else None
        return None, dweight, *(dx for dx, _ in backward)


def _forward(maps: Sequence[Tensor], weight: Tensor, layout: Layout) -> Tensor:
    same, out = [], None
    channels = [x.shape[1] for x in maps]
    for x, w in zip(maps, weight.split(channels, 1), strict=True):
        if x.shape[2:] == layout.size:
            same.append(_same_size(x, w, layout))
        else:
            out = _coarse(x, _product_weights(w), layout, out)
    if out is None:
        return functools.reduce(torch.add, same)
    total = out.permute(0, 3, 1, 2)
    for part in same:
        total += part
    return total


def _same_size(x: Tensor, weight: Tensor, layout: Layout) -> Tensor:
    if _suits_winograd(x, weight, layout):
        return winograd.convolution(_nhwc(x), winograd.transform_weight(weight)
                                    ).permute(0, 3, 1, 2)
    return F.conv2d(x, weight, padding=_padding(weight, layout), dilation=layout.dilation)


def _same_size_backward(g: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool],
                        layout: Layout) -> tuple[Tensor | None, Tensor | None]:
    if _suits_winograd(x, weight, layout):
        return winograd.gradients(g, x, weight, needs)
    dx, dw, _ = torch.ops.aten.convolution_backward(
        g, x, weight, None, [1, 1], [_padding(weight, layout)] * 2, [layout.dilation] * 2, False,
        [0, 0], 1, [*needs, False])
    return dx, dw


def _suits_winograd(x: Tensor, weight: Tensor, layout: Layout) -> bool:
    return (weight.shape[2:] == (3, 3) and layout.dilation == 1
            and winograd.suits(x, weight.shape[0]))


def _padding(weight: Tensor, layout: Layout) -> int:
    return layout.dilation * (weight.shape[-1] // 2)


def _product_weights(weight: Tensor) -> list[Tensor]:
    """(O, C, k, k) → k matrices (k · O, C), one per row of the kernel."""
    return list(weight.permute(2, 3, 0, 1).contiguous().flatten(1, 2))


def _coarse(x: Tensor, weights: Sequence[Tensor], layout: Layout, out: Tensor | None) -> Tensor:
    """The part of one coarse map, added to ``out`` (N, H, W, O) if it is given."""
    if batches(x):
        return _coarse_batched(x, weights, layout, out)
    (n, _, h, w), (height, width), taps = x.shape, layout.size, len(weights)
    channels = weights[0].shape[0] // taps
    rows, columns = _matrices(x, layout, taps)
    nhwc = _nhwc(x)
    # (N, h, w · dx · O) for each row dy of the kernel
    products = [eager.linear(nhwc, weight, None).view(n, h, -1) for weight in weights]
    y = x.new_empty(n, height, w * taps, channels)
    for i in range(n):
        flat = y[i].view(height, -1)
        for block, used, values in rows.stacked():
            source = torch.cat([p[i, used] for p in products]) if taps > 1 else products[0][i, used]
            torch.mm(values, source, out=flat[block])
    del products
    if out is None:
        out = x.new_zeros(n, height, width, channels)
    y, target = y.flatten(0, 1), out.flatten(0, 1)
    for block, used, values in columns.interleaved():
        source = y[:, taps * used.start:taps * used.stop]
        target[:, block] += torch.matmul(values, source)
    return out


def _coarse_batched(x: Tensor, weights: Sequence[Tensor], layout: Layout, out: Tensor | None
                    ) -> Tensor:
    """:func:`_coarse` for a GPU."""
    (n, c, h, w), (height, width), taps = x.shape, layout.size, len(weights)
    channels = weights[0].shape[0] // taps
    rows, columns = _matrices(x, layout, taps, whole=True)
    (_, _, by_rows), = rows.stacked()
    (_, _, by_columns), = columns.interleaved()
    nhwc = _nhwc(x).view(n, h * w, c)
    z = x.new_empty(n, taps, h * w, taps * channels)
    for tap, weight in enumerate(weights):
        torch.bmm(nhwc, weight.t().expand(n, -1, -1), out=z[:, tap])
    y = torch.bmm(by_rows.expand(n, -1, -1), z.view(n, taps * h, -1))
    del z
    y, by_columns = y.view(n * height, w * taps, channels), by_columns.expand(n * height, -1, -1)
    if out is None:
        return torch.bmm(by_columns, y).view(n, height, width, channels)
    out.view(n * height, width, channels).baddbmm_(by_columns, y)
    return out


def _coarse_backward_batched(g: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool],
                             layout: Layout) -> tuple[Tensor | None, Tensor | None]:
    """:func:`_coarse_backward` for a GPU."""
    (n, c, h, w), (height, width), taps = x.shape, layout.size, weight.shape[-1]
    channels = weight.shape[0]
    rows, columns = _matrices(x, layout, taps, transposed=True, whole=True)
    (_, _, by_rows), (_, _, by_columns) = *rows.blocks, *columns.blocks
    by_columns = by_columns.transpose(0, 1).flatten(0, 1).expand(n * height, -1, -1)
    dy = torch.bmm(by_columns, _nhwc(g).view(n * height, width, channels)).view(n, height, -1)
    dz = x.new_empty(taps, n, h, w * taps * channels)
    for tap in range(taps):
        torch.bmm(by_rows[tap].expand(n, -1, -1), dy, out=dz[tap])
    del dy
    dz = dz.view(taps, n * h * w, taps * channels)
    dx = dw = None
    if needs[0]:
        dx = dz.new_zeros(n * h * w, c)
        for one, matrix in zip(dz, _product_weights(weight), strict=True):
            dx.addmm_(one, matrix)
        dx = dx.view(n, h, w, c).permute(0, 3, 1, 2)
    if needs[1]:
        dw = torch.bmm(dz.transpose(1, 2), _nhwc(x).view(1, n * h * w, c).expand(taps, -1, -1))
        dw = dw.view(taps, taps, channels, c).permute(2, 3, 0, 1)
    return dx, dw


def _coarse_backward(g: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool], layout: Layout
                     ) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a coarse map and of its part of the weight."""
    if batches(x):
        return _coarse_backward_batched(g, x, weight, needs, layout)
    (n, c, h, w), height, taps = x.shape, layout.size[0], weight.shape[-1]
    channels = weight.shape[0]
    rows, columns = _matrices(x, layout, taps, transposed=True)
    g = _nhwc(g).flatten(0, 1)
    dy = x.new_empty(n * height, w, taps, channels)
    for block, used, values in columns.blocks:
        products = torch.matmul(values.transpose(0, 1).flatten(0, 1), g[:, used])
        dy[:, block] = products.view(n * height, -1, taps, channels)
    dy = dy.view(n, height, -1)
    dz = x.new_empty(taps, n, h, w * taps * channels)
    for i in range(n):
        for block, used, values in rows.blocks:
            for tap in range(taps):
                torch.mm(values[tap], dy[i, used], out=dz[tap, i, block])
    del dy
    dz = dz.view(taps, n, h, w, taps * channels)
    dx = dw = None
    if needs[0]:
        dx = functools.reduce(torch.add, (eager.matmul(one, matrix) for one, matrix in zip(
            dz, _product_weights(weight), strict=True))).permute(0, 3, 1, 2)
    if needs[1]:
        flat = _nhwc(x).flatten(0, 2)
        dw = torch.stack([one.flatten(0, 2).t() @ flat for one in dz])
        dw = dw.view(taps, taps, channels, c).permute(2, 3, 0, 1)
    return dx, dw


_MATRICES: dict[tuple, tuple[Banded, Banded]] = {}
MAX_MATRICES = 64


def _matrices(x: Tensor, layout: Layout, taps: int, transposed: bool = False, whole: bool = False
              ) -> tuple[Banded, Banded]:
    """The matrices of the rows and columns for a coarse map, made once for each size.

    Args:
        x: The map, (N, C, h, w).
        layout: Size, alignment and dilation.
        taps: Rows of the kernel.
        transposed: Whether for the backward pass.
        whole: Whether each is one block.
    """
    key = tuple(x.shape[2:]), layout, taps, transposed, whole, x.dtype, x.device
    if key in _MATRICES:
        return _MATRICES[key]
    made = []
    for size, out in zip(x.shape[2:], layout.size, strict=True):
        matrices = shifted(interpolation(size, out, layout.align_corners), taps, layout.dilation)
        matrices = matrices.transpose(0, 2, 1) if transposed else matrices
        made.append(Banded(matrices, x, **(dict(block=matrices.shape[1]) if whole else {})))
    if type(made[0].blocks[0].values) is Tensor:  # not a tensor without values
        if len(_MATRICES) >= MAX_MATRICES:
            _MATRICES.clear()
        _MATRICES[key] = made[0], made[1]
    return made[0], made[1]


class PackedPyramid:
    """:func:`convolution` and a ReLU for constant weights, kept in the layout of the products.

    Args:
        weight: (O, Σ C_i, k, k).
        bias: (O,).
        dilation: Dilation of the convolution.
        relu: Whether a ReLU follows.
        channels: C_i of each map.
        align_corners: As for F.interpolate.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dilation: int, relu: bool,
                 channels: tuple[int, ...], align_corners: bool) -> None:
        self.weight, self.bias, self.parts = weight, bias, weight.split(list(channels), 1)
        self.whole = PackedConv(weight, bias, dilation, relu)
        self.align_corners, self.dilation, self.relu = align_corners, dilation, relu
        self.coarse: dict[int, list[Tensor]] = {}
        self.fine: dict[int, PackedConv] = {}

    def __call__(self, maps: Sequence[Tensor], size: tuple[int, ...]) -> Tensor:
        """(N, C_i, H_i, W_i) each → (N, O, H, W), in channels_last."""
        layout, out = Layout(size, self.align_corners, self.dilation), None
        if not pays(maps, self.weight.shape, layout):
            return self.whole(concatenate(maps, layout))
        for i, x in enumerate(maps):
            if x.shape[2:] != size:
                if i not in self.coarse:
                    packs = eager.uses_onednn(x) and not batches(x)
                    self.coarse[i] = [pack_linear(w) if packs else w
                                      for w in _product_weights(self.parts[i])]
                out = _coarse(x, self.coarse[i], layout, out)
        total = None if out is None else out.permute(0, 3, 1, 2)
        for i, x in enumerate(maps):
            if x.shape[2:] == size:
                if i not in self.fine:
                    self.fine[i] = PackedConv(self.parts[i], None, self.dilation, False)
                part = self.fine[i](x)
                total = part if total is None else total.add_(part)
        assert total is not None
        total += self.bias[:, None, None]
        return total.relu_() if self.relu else total


class PackedConv:
    """A convolution that keeps the size of its map, for constant weights.

    Args:
        weight: (O, C, k, k).
        bias: (O,) or None.
        dilation: Dilation.
        relu: Whether a ReLU follows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dilation: int, relu: bool) -> None:
        self.weight, self.bias, self.relu = weight, bias, relu
        self.layout = Layout((0, 0), False, dilation)
        self.transformed: list[Tensor] | None = None
        self.packed = PackedConvolution(weight, bias, padding=_padding(weight, self.layout),
                                        dilation=dilation, relu=relu)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, O, H, W)."""
        if _suits_winograd(x, self.weight, self.layout):
            if self.transformed is None:
                self.transformed = [pack_linear(w) for w in winograd.transform_weight(self.weight)]
            y = winograd.convolution(_nhwc(x), self.transformed).permute(0, 3, 1, 2)
            y = y if self.bias is None else y.add_(self.bias[:, None, None])
            return y.relu_() if self.relu else y
        x = x.contiguous(memory_format=torch.channels_last)
        if eager.uses_onednn(x):
            return self.packed(x)
        y = F.conv2d(x, self.weight, self.bias, padding=_padding(self.weight, self.layout),
                     dilation=self.layout.dilation)
        return y.relu_() if self.relu else y


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()
