"""The operations of a block in PyTorch, arranged for few passes over memory.

They implement :class:`convnext_mm.fused.operations.Operations`, which documents their shapes. Maps
are (N, H, W, C) and contiguous. Weights of convolutions and linear layers have the map's dtype.
"""
from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

GRN_EPS = 1e-6

PIECE_BYTES = 16 * 2**20
"""Size of the parts of the 4C map that :func:`mlp` computes one after another on a CPU."""

TILE_SIZE = 16
"""Side of the tiles of :func:`_tiled_weight_gradient`: twice as fast as 8, nearly as fast as 32."""


def dwconv_norm(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor,
                eps: float, save: bool, dilation: int = 1
                ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Depthwise 7x7 convolution, then LayerNorm over channels."""
    y = _depthwise(x, weight, bias, dilation)
    n, mean, rstd = layer_norm(y, norm_weight, norm_bias, eps)
    return n, y if save else x.new_empty(0), mean, rstd


def norm_backward(dn: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, norm_weight: Tensor
                  ) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the LayerNorm's input, in y's dtype, and of its weight and bias, (C,)."""
    wide, weight = _norm_inputs(y, norm_weight)
    dy, dw, db = torch.ops.aten.native_layer_norm_backward(
        dn.to(wide.dtype), wide, (y.shape[-1],), mean, rstd, weight, weight, [True] * 3)
    return dy.to(y.dtype), dw, db


def dwconv_backward_input(dy: Tensor, weight: Tensor, g: Tensor | None, dilation: int = 1
                          ) -> Tensor:
    """Gradient of the depthwise convolution's input, plus ``g`` if there is one, in g's dtype."""
    # The convolution with the flipped kernel is fast everywhere.
    dx = _depthwise(dy, weight.flip(2, 3), None, dilation)
    return dx if g is None else g + dx


def dwconv_backward_weight(dy: Tensor, x: Tensor, dilation: int = 1) -> tuple[Tensor, Tensor]:
    """Gradients of the depthwise convolution's weight, (C, 1, 7, 7), and bias, (C,)."""
    if dy.device.type == 'cpu' and dilation == 1:
        return _tiled_weight_gradient(dy, x), _sum_positions(dy)
    weight = x.new_empty(x.shape[-1], 1, 7, 7)
    _, dw, db = torch.ops.aten.convolution_backward(
        dy.permute(0, 3, 1, 2), x.permute(0, 3, 1, 2), weight, [x.shape[-1]], [1, 1],
        [3 * dilation] * 2, [dilation] * 2, False, [0, 0], x.shape[-1], [False, True, True])
    return dw, db


def linear_gelu(n: Tensor, weight: Tensor, bias: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """GELU of a linear layer and, with ``save``, the input of the GELU."""
    h = linear(n, weight, bias)
    if save:
        return F.gelu(h), h
    return torch.ops.aten.gelu_(h), n.new_empty(0)  # in place: a second map costs page faults


def linear_residual(a: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor | None,
                    drop: Tensor | None, x: Tensor) -> Tensor:
    """x + drop · gamma · (a weightᵀ + bias), in x's dtype.

    Args:
        a: (N, H, W, 4C).
        weight: (C, 4C), in a's dtype.
        bias: (C,), in a's dtype.
        gamma: Layer scale, (C,); None: 1.
        drop: Factor of each sample, (N,); None: 1.
        x: (N, H, W, C).
    """
    if drop is not None:
        factor = drop[:, None, None, None]
        factor = factor if gamma is None else factor * gamma
        return torch.addcmul(x, linear(a, weight, bias).to(x.dtype), factor.to(x.dtype))
    if gamma is not None and _count_positions(a) < weight.shape[1]:  # smaller than the weight
        return torch.addcmul(x, linear(a, weight, bias).to(x.dtype), gamma.to(x.dtype))
    return _linear_add(a, *fold_scale(weight, bias, gamma), x)


def mlp(n: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
        gamma: Tensor | None, drop: Tensor | None, x: Tensor, save: bool
        ) -> tuple[Tensor, Tensor]:
    """:func:`linear_gelu`, then :func:`linear_residual`: the output and, with ``save``, h.

    On a CPU, a large 4C map that is not saved is computed piece by piece: a piece is still in the
    cache when it is used, and the whole map is never stored.
    """
    rows = PIECE_BYTES // (weight1.shape[0] * n.element_size())
    if save or drop is not None or not n.is_cpu or _count_positions(n) <= rows:
        a, h = linear_gelu(n, weight1, bias1, save)
        return linear_residual(a, weight2, bias2, gamma, drop, x), h
    weight2, bias2 = fold_scale(weight2, bias2, gamma)
    out = torch.empty_like(x)
    for n_piece, x_piece, out_piece in zip(*(
            m.view(1, 1, -1, m.shape[-1]).split(rows, 2) for m in (n, x, out)), strict=True):
        a, _ = linear_gelu(n_piece, weight1, bias1, False)
        out_piece.copy_(_linear_add(a, weight2, bias2, x_piece))
    return out, n.new_empty(0)


def fold_scale(weight: Tensor, bias: Tensor, gamma: Tensor | None) -> tuple[Tensor, Tensor]:
    """A linear layer's weight and bias with the layer scale ``gamma`` multiplied into them."""
    if gamma is None:
        return weight, bias
    return (weight * gamma[:, None]).to(weight.dtype), (bias * gamma).to(bias.dtype)


def _linear_add(a: Tensor, weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    if uses_onednn(a) and x.dtype == a.dtype:
        return torch.ops.mkldnn._linear_pointwise.binary(
            a.flatten(0, 2), x.flatten(0, 2), weight, bias, 'add').view(x.shape)
    return x + linear(a, weight, bias)


def linear_gelu_backward(g: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """(g weight) · GELU'(h), and GELU(h): the factors of both weight gradients."""
    return _gelu_backward(matmul(g, weight), h), F.gelu(h)


def _gelu_backward(da: Tensor, h: Tensor) -> Tensor:
    """da · GELU'(h), in da's memory."""
    return torch.ops.aten.gelu_backward.grad_input(da, h, grad_input=da)


def matmul(g: Tensor, weight: Tensor) -> Tensor:
    """g (N, H, W, K) @ weight (K, L)."""
    if uses_onednn(g) and g.dtype == torch.float32 and _count_positions(g) >= max(weight.shape):
        return linear(g, weight.t().contiguous(), None)
    return g @ weight


def weight_gradient(g: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """gᵀ a over all positions, (K, L), and the sum of g over them, (K,)."""
    return g.flatten(0, 2).t() @ a.flatten(0, 2), _sum_positions(g)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Σ a · b over the last axis of matrices; on a CPU in pieces that fit the cache."""
    rows = 64 if a.is_cpu else max(len(a), 1)
    return torch.cat([(x * y).sum(1) for x, y in zip(a.split(rows), b.split(rows), strict=True)])


def linear_gelu_squares(n: Tensor, weight: Tensor, bias: Tensor, save: bool
                        ) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`linear_gelu`, and the sums of its squares over each map, (N, 4C), in fp32 at least."""
    a, h = linear_gelu(n, weight, bias, save)
    return a, h, _sum_maps(a, a)


def grn_linear_residual(a: Tensor, scale: Tensor, beta: Tensor, weight: Tensor, bias: Tensor,
                        gamma: Tensor | None, drop: Tensor | None, x: Tensor) -> Tensor:
    """:func:`linear_residual` of GRN's output, which overwrites ``a``."""
    return linear_residual(apply_grn(a, scale, beta, out=a), weight, bias, gamma, drop, x)


def grn_linear_gelu_backward(g: Tensor, weight: Tensor, h: Tensor, norms: Tensor, gamma: Tensor,
                             beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`linear_gelu_backward` with a GRN after the GELU: gradient of h, output, dgamma."""
    a, du = F.gelu(h), matmul(g, weight)
    extra, dgamma = grn_gradient(_sum_maps(a, du), norms, gamma)
    scale = grn_scale(norms, gamma)
    u = apply_grn(a, scale, beta)
    da = du.mul_(scale[:, None, None].to(du.dtype)).addcmul_(a, extra[:, None, None].to(du.dtype))
    return _gelu_backward(da, h), u, dgamma


def grn_scale(norms: Tensor, gamma: Tensor) -> Tensor:
    """The factor of GRN's input, (N, 4C): 1 + gamma · norm / mean norm."""
    return 1 + gamma * norms / (norms.mean(-1, keepdim=True) + GRN_EPS)


def grn_gradient(sums: Tensor, norms: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """GRN's backward pass from ``sums``, Σ du · a over each map, (N, 4C).

    GRN's scale is 1 + γ r / m, with r the norms and m their mean over channels. The gradient flows
    through r, and through m to the r of every channel.

    Returns:
        The factor of a in a's gradient (besides du · scale), (N, 4C), and gamma's gradient, (4C,).
    """
    mean = norms.mean(-1, keepdim=True) + GRN_EPS
    dratio = sums * gamma
    dnorms = dratio / mean - (dratio * norms).mean(-1, keepdim=True) / mean.square()
    return (dnorms / norms).where(norms > 0, 0), (sums * norms / mean).sum(0)


def apply_grn(a: Tensor, scale: Tensor, beta: Tensor, out: Tensor | None = None) -> Tensor:
    """GRN's output, a · scale + beta; scale (N, 4C), beta (4C,)."""
    return torch.addcmul(beta.to(a.dtype), a, scale[:, None, None].to(a.dtype), out=out)


def _sum_maps(a: Tensor, b: Tensor) -> Tensor:
    """Σ a · b over each map, (N, 4C), in fp32 at least.

    On a CPU in pieces that fit the cache: several times as fast as PyTorch's norm over a map.
    """
    wide = _sum_dtype(a)
    if not a.is_cpu:
        return (a.to(wide) * b).sum((1, 2))
    sums = a.new_zeros((a.shape[0], a.shape[-1]), dtype=wide)
    for total, *maps in zip(sums, a.flatten(1, 2), b.flatten(1, 2), strict=True):
        for x, y in zip(*(rows.split(1024) for rows in maps), strict=True):
            x = x.to(wide, copy=True)
            total += (x.square_() if a is b else x.mul_(y)).sum(0)
    return sums


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _count_positions(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _sum_positions(x: Tensor) -> Tensor:
    return x.sum((0, 1, 2), dtype=_sum_dtype(x))


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=3 * dilation, dilation=dilation,
                    groups=x.shape[-1]).permute(0, 2, 3, 1).contiguous()


def _norm_inputs(y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """y and a norm's weight in dtypes for which the kernel returns statistics in fp32."""
    wide = _sum_dtype(y)
    weight = weight if weight.dtype == wide else weight.to(wide)
    return (y, weight) if y.is_cpu or y.dtype == wide else (y.to(wide), weight)


def layer_norm(y: Tensor, weight: Tensor, bias: Tensor, eps: float
               ) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm over the last axis: the map, and the mean and 1 / std of each position."""
    wide, weight = _norm_inputs(y, weight)
    n, mean, rstd = torch.native_layer_norm(wide, (y.shape[-1],), weight, bias.to(weight.dtype),
                                            eps)
    return n.to(y.dtype), mean, rstd


def uses_onednn(x: Tensor) -> bool:
    """Whether to use oneDNN's linear layer on ``x``.

    In fp32 it is faster than the BLAS behind F.linear; in bf16 it needs no copy of the bias.
    """
    return (x.is_cpu and not torch.compiler.is_compiling() and x.dtype in _onednn_dtypes()
            and bool(torch.backends.mkldnn.enabled) and x.numel() > 0)


@functools.cache
def _onednn_dtypes() -> tuple[torch.dtype, ...]:
    if not torch.backends.mkldnn.is_available():
        return ()
    return (torch.float32, *([torch.bfloat16] * torch.ops.mkldnn._is_mkldnn_bf16_supported()))


@functools.cache
def has_amx() -> bool:
    """Whether the CPU has Intel's matrix unit, AMX."""
    return bool(getattr(torch.cpu, '_is_amx_tile_supported', bool)())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, H, W, K) @ weightᵀ (K, L) + bias (L,)."""
    if uses_onednn(x):
        return torch.ops.mkldnn._linear_pointwise.default(
            x.flatten(0, 2), weight, bias, 'none', [], '').view(*x.shape[:3], -1)
    return F.linear(x, weight, bias)


def _tiled_weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """The depthwise convolution's weight gradient, (C, 1, 7, 7), in fp32 at least.

    PyTorch's own takes many times as long on a CPU in channels_last. Here ``dy`` is split into
    tiles. Each is the kernel of a depthwise convolution over its receptive field in ``x``, whose
    7x7 output is the tile's contribution. All tiles are channels of one convolution.
    """
    n, height, width, c = x.shape
    rows, columns = -(-height // TILE_SIZE), -(-width // TILE_SIZE)
    th, tw = -(-height // rows), -(-width // columns)  # the smallest size with so many
    down, right = rows * th - height, columns * tw - width
    x = F.pad(x, (0, 0, 3, 3 + right, 3, 3 + down))
    if down or right:
        dy = F.pad(dy, (0, 0, 0, right, 0, down))
    s = x.stride()
    fields = x.as_strided((th + 6, tw + 6, n, rows, columns, c),
                          (s[1], s[2], s[0], s[1] * th, s[2] * tw, s[3]))
    fields = fields.reshape(1, th + 6, tw + 6, -1).permute(0, 3, 1, 2)
    kernels = dy.reshape(n, rows, th, columns, tw, c).permute(0, 1, 3, 5, 2, 4)
    kernels = kernels.reshape(-1, 1, th, tw)
    gradients = F.conv2d(fields, kernels, groups=kernels.shape[0]).permute(0, 2, 3, 1)
    gradient = gradients.reshape(7, 7, -1, c).sum(2, dtype=_sum_dtype(x))
    return gradient.permute(2, 0, 1)[:, None]
