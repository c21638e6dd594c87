"""The block and the downsampling with a backward pass of their own: less is kept, nothing is lost.

PyTorch's autograd keeps about fifteen maps of C channels a block. What a block computes between
its two products is had again cheaply from their inputs, so ``memory='lean'`` keeps five (the
block's input and the 4C maps before the GELU), and 'minimal' one, at the price of the first
product done again. The layer scale's gradient is read off the second product's weight gradient:
with M = gᵀ a (g behind the layer scale, a behind the GELU), dγ = Σ_k M ∘ W₂ + b₂ · Σ g.
"""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, autocast
from torch.autograd.function import once_differentiable

from . import eager


class Weights(NamedTuple):
    """A block's parameters; those that it has not are None."""

    dwconv_weight: Tensor
    dwconv_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    pwconv1_weight: Tensor
    pwconv1_bias: Tensor
    grn_gamma: Tensor | None
    grn_beta: Tensor | None
    pwconv2_weight: Tensor
    pwconv2_bias: Tensor
    gamma: Tensor | None

    def cast(self, dtype: torch.dtype) -> Weights:
        """What convolution and products take, in ``dtype``; norms and scales as they are."""
        if self.dwconv_weight.dtype == self.pwconv1_weight.dtype == dtype:
            return self
        return self._replace(**{name: getattr(self, name).to(dtype) for name in (
            'dwconv_weight', 'dwconv_bias', 'pwconv1_weight', 'pwconv1_bias', 'pwconv2_weight',
            'pwconv2_bias')})


class Settings(NamedTuple):
    """How a block computes.

    ``eps`` is the norm's; ``dtype`` is that of convolution and products; ``keep_hidden`` says
    whether the maps before the GELU are kept; ``ops`` has the operations; ``conv`` are further
    settings of its convolutions: their dilation, where it is not 1.
    """

    eps: float
    dtype: torch.dtype
    keep_hidden: bool
    ops: ModuleType
    conv: dict[str, int]


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products: autocast's where it is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast switched off, where it is on: the switch alone takes as long as a small kernel."""
    kind = x.device.type
    return autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def block(x: Tensor, weights: Weights, settings: Settings, drop: Tensor | None) -> Tensor:
    """A block, (N, C, H, W) → (N, C, H, W).

    Args:
        x: The map.
        weights: The block's parameters.
        settings: How it computes.
        drop: Drop path's factor of each picture, (N,), or None.
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(
            w is not None and w.requires_grad for w in weights)):
        return BlockFunction.apply(x, drop, settings, *weights)
    return _forward(x, drop, settings, weights)[0]


class BlockFunction(torch.autograd.Function):
    """:func:`block` with its backward pass. It cannot be differentiated twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, drop: Tensor | None, settings: Settings,
                *weights: Tensor | None) -> Tensor:
        out, kept = _forward(x, drop, settings, Weights(*weights), keep=True)
        ctx.settings, ctx.factor, ctx.dtype = settings, kept.factor, x.dtype
        ctx.save_for_backward(kept.pictures, kept.drop, kept.x, kept.h, kept.norms, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        pictures, drop, x, h, norms, *weights = ctx.saved_tensors
        weights = Weights(*weights)
        wanted = Weights(*ctx.needs_input_grad[3:])
        if x is None:  # drop path has dropped every picture
            zeros = (torch.zeros_like(w) if want else None
                     for w, want in zip(weights, wanted, strict=True))
            return g.to(ctx.dtype), None, None, *zeros
        with without_autocast(g):
            g = _nhwc(g)
            part = g if pictures is None else g[pictures]
            dx, grads = _backward(part, Kept(pictures, drop, ctx.factor, x, h, norms),
                                  ctx.settings, weights, wanted)
            if pictures is not None:
                dx = g.index_copy(0, pictures, dx)
        return dx.permute(0, 3, 1, 2).to(ctx.dtype), None, None, *grads


class Kept(NamedTuple):
    """What a block's backward pass needs besides its parameters.

    ``pictures`` (indices) are those that drop path has left, None: all; ``drop`` and ``factor``
    scale the branch by picture or as a whole; ``x`` (None: no picture is left) and ``h`` (None:
    not kept) are maps of them, ``norms`` those of GRN, (N, 4C).
    """

    pictures: Tensor | None
    drop: Tensor | None
    factor: float
    x: Tensor | None
    h: Tensor | None
    norms: Tensor | None


def _forward(x: Tensor, drop: Tensor | None, settings: Settings, weights: Weights,
             keep: bool = False) -> tuple[Tensor, Kept]:
    """The block's output, and with ``keep`` what its backward pass needs."""
    ops = settings.ops
    pictures, factor = None, 1.0
    # In mixed precision, a layer scale in fp32 makes the sum of branches one of fp32.
    stream = x.dtype if weights.gamma is None else torch.promote_types(
        x.dtype, weights.gamma.dtype)
    with without_autocast(x):
        if drop is not None and ops is eager and x.is_cpu and not torch.compiler.is_compiling():
            # What drop path drops is not computed; on a GPU, asking which would cost a wait.
            pictures, factor = _left(drop)
            drop = None
            if not factor:
                return x.to(stream, copy=True), Kept(pictures, None, 0.0, None, None, None)
        whole = _nhwc(x)
        part = whole if pictures is None else whole[pictures]
        w = weights.cast(settings.dtype)
        narrow = part.to(settings.dtype)
        n, *_ = ops.dwconv_norm(narrow, w.dwconv_weight, w.dwconv_bias, w.norm_weight,
                                w.norm_bias, settings.eps, keep=False, **settings.conv)
        scale = _scale(w.gamma, factor, part)
        stream_part, keeps, norms = part.to(stream), keep and settings.keep_hidden, None
        if w.grn_gamma is None:
            out, h = ops.mlp(n, w.pwconv1_weight, w.pwconv1_bias, w.pwconv2_weight, w.pwconv2_bias,
                             scale, drop, stream_part, keeps)
        else:
            a, h, squares = ops.linear_gelu_squares(n, w.pwconv1_weight, w.pwconv1_bias, keeps)
            norms = squares.sqrt()
            out = ops.grn_linear_residual(
                a, eager.grn_scale(norms, w.grn_gamma.flatten()), w.grn_beta.flatten(),
                w.pwconv2_weight, w.pwconv2_bias, scale, drop, stream_part)
        if pictures is not None:
            out = whole.to(stream).index_copy(0, pictures, out)
    return out.permute(0, 3, 1, 2), Kept(
        pictures, drop, factor, narrow, h if keeps else None, norms)


def _backward(g: Tensor, kept: Kept, settings: Settings, weights: Weights, wanted: Weights
              ) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of a block's input (N, H, W, C) and of its parameters, in their order."""
    ops = settings.ops
    gz = g if kept.drop is None else g * kept.drop[:, None, None, None].to(g.dtype)
    scale, unit = _scale(weights.gamma, kept.factor, g), None
    if settings.dtype == torch.float16 and scale is not None:
        # Behind a small layer scale gradients are small; before it they may leave fp16's range.
        unit = scale.abs().clamp_min(1e-4)
        gz, scale = gz * unit, scale / unit
    gz = gz.to(settings.dtype)
    w = weights if scale is None else weights._replace(
        pwconv2_weight=(weights.pwconv2_weight * scale[:, None]).to(settings.dtype))
    w = w.cast(settings.dtype)

    n, y, mean, rstd = ops.dwconv_norm(kept.x, w.dwconv_weight, w.dwconv_bias, w.norm_weight,
                                       w.norm_bias, settings.eps, keep=True, **settings.conv)
    h = kept.h if kept.h is not None else eager.linear(n, w.pwconv1_weight, w.pwconv1_bias)
    dgamma = None
    if w.grn_gamma is None:
        dh, u = ops.linear_gelu_backward(gz, w.pwconv2_weight, h)
    else:
        dh, u, dgamma = ops.grn_linear_gelu_backward(
            gz, w.pwconv2_weight, h, kept.norms, w.grn_gamma.flatten(), w.grn_beta.flatten())
    dw2 = db2 = dscale = dw1 = db1 = dbeta = None
    if wanted.pwconv2_weight or wanted.pwconv2_bias or wanted.gamma or wanted.grn_beta:
        dw2, db2 = eager.weight_gradient(gz, u)
        if w.grn_gamma is not None:
            dbeta = db2 @ w.pwconv2_weight.to(db2.dtype)
        dw2 = dw2.to(weights.pwconv2_weight.dtype)
        if w.gamma is not None:
            dscale = kept.factor * (eager.row_dots(dw2, weights.pwconv2_weight)
                                    + db2 * weights.pwconv2_bias)
            dscale = dscale if unit is None else dscale / unit
        if scale is not None:
            dw2, db2 = dw2.mul_(scale[:, None]), db2 * scale
    del u, gz
    if wanted.pwconv1_weight or wanted.pwconv1_bias:
        dw1, db1 = eager.weight_gradient(dh, n)
    dn = eager.matmul(dh, w.pwconv1_weight)
    del dh, n
    dy, dnw, dnb = ops.norm_backward(dn, y, mean, rstd, w.norm_weight)
    ddw = ddb = None
    if wanted.dwconv_weight or wanted.dwconv_bias:
        ddw, ddb = ops.dwconv_backward_weight(dy, kept.x, **settings.conv)
    dx = ops.dwconv_backward_input(dy, w.dwconv_weight, g, **settings.conv)
    grads = Weights(ddw, ddb, dnw, dnb, dw1, db1, dgamma, dbeta, dw2, db2, dscale)
    return dx, [grad.to(weight.dtype).view_as(weight) if want else None
                for grad, weight, want in zip(grads, weights, wanted, strict=True)]


def _left(drop: Tensor) -> tuple[Tensor | None, float]:
    """The pictures that drop path has left (None: all), and the factor of their branches."""
    left = drop.nonzero().flatten()
    factor = float(drop.max()) if drop.numel() else 1.0
    return (None if left.numel() == drop.numel() else left), factor


def _scale(gamma: Tensor | None, factor: float, like: Tensor) -> Tensor | None:
    """The layer scale times a factor, (C,); None where both are 1."""
    if gamma is None:
        return None if factor == 1 else like.new_full((like.shape[-1],), factor)
    return gamma if factor == 1 else gamma * factor


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def downsample(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor,
               eps: float) -> Tensor:
    """LayerNorm over channels, then a convolution whose stride is its kernel's size.

    Args:
        x: (N, C, H, W).
        norm_weight: (C,).
        norm_bias: (C,).
        weight: (C', C, k, k).
        bias: (C',).
        eps: Of the LayerNorm.
    """
    return DownsampleFunction.apply(x, norm_weight, norm_bias, weight, bias, eps)


class DownsampleFunction(torch.autograd.Function):
    """:func:`downsample`, of which only the input is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor,
                bias: Tensor, eps: float) -> Tensor:
        ctx.eps, ctx.dtype = eps, compute_dtype(x)
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias)
        with without_autocast(x):
            n, _, _ = eager.layer_norm(_nhwc(x), norm_weight, norm_bias, eps)
            return F.conv2d(n.to(ctx.dtype).permute(0, 3, 1, 2), weight.to(ctx.dtype),
                            bias.to(ctx.dtype), stride=weight.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight, bias = ctx.saved_tensors
        with without_autocast(x):
            rows = _nhwc(x)
            n, mean, rstd = eager.layer_norm(rows, norm_weight, norm_bias, ctx.eps)
            dn, dw, db = torch.ops.aten.convolution_backward(
                g.to(ctx.dtype), n.to(ctx.dtype).permute(0, 3, 1, 2), weight.to(ctx.dtype),
                list(bias.shape), list(weight.shape[2:]), [0, 0], [1, 1], False, [0, 0], 1,
                [True, True, True])
            dx, dnw, dnb = eager.norm_backward(_nhwc(dn), rows, mean, rstd, norm_weight)
        grads = (dx.permute(0, 3, 1, 2), dnw, dnb, dw, db)
        return *(grad.to(t.dtype) for grad, t in zip(
            grads, (x, norm_weight, norm_bias, weight, bias), strict=True)), None
