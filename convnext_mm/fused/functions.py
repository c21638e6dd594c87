"""The block and the downsampling layer as functions with their own backward pass.

PyTorch's autograd saves about fifteen maps of C channels per block, most of which are cheap to
recompute. ``memory='lean'`` saves five: the block's input, and the 4C channels before the GELU.
'minimal' saves the input alone and recomputes the first matmul. The gradient of the layer scale γ
follows from the weight gradient of the second matmul: with M = gᵀ a (g: gradient after the layer
scale, a: output of the GELU), dγ = Σ_k M ∘ W₂ + b₂ · Σ g.
"""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, autocast
from torch.autograd.function import once_differentiable

from . import eager
from .operations import Operations


class Weights(NamedTuple):
    """A block's parameters; None for those that it does not have."""

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

    def detach(self) -> Weights:
        """The same parameters without gradients."""
        return Weights._make(w if w is None else w.detach() for w in self)

    def grn(self) -> tuple[Tensor, Tensor] | None:
        """GRN's gamma and beta, (4C,) each, or None."""
        if self.grn_gamma is None or self.grn_beta is None:
            return None
        return self.grn_gamma.flatten(), self.grn_beta.flatten()

    def cast(self, dtype: torch.dtype) -> Weights:
        """The parameters with convolution and linear layers in ``dtype``."""
        if self.dwconv_weight.dtype == self.pwconv1_weight.dtype == dtype:
            return self
        return self._replace(**{name: getattr(self, name).to(dtype) for name in (
            'dwconv_weight', 'dwconv_bias', 'pwconv1_weight', 'pwconv1_bias', 'pwconv2_weight',
            'pwconv2_bias')})


class Settings(NamedTuple):
    """How a block computes.

    Args:
        eps: Epsilon of the norm.
        dtype: Dtype of the convolution and the matmuls.
        save_hidden: Whether the 4C channels before the GELU are saved, not recomputed.
        ops: Implementation of the operations.
        dilation: Dilation of the depthwise convolution.
    """

    eps: float
    dtype: torch.dtype
    save_hidden: bool
    ops: Operations
    dilation: int


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of matmuls: autocast's if it is enabled, or that of ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Disables autocast if it is enabled; the switch costs as much as a small kernel."""
    device = x.device.type
    return autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def block(x: Tensor, weights: Weights, settings: Settings, drop: Tensor | None) -> Tensor:
    """A block, (N, C, H, W) → (N, C, H, W).

    Args:
        x: The map.
        weights: The block's parameters.
        settings: How the block computes.
        drop: Drop path's factor of each sample, (N,), or None.
    """
    if torch.is_grad_enabled() and (x.requires_grad or any(
            w is not None and w.requires_grad for w in weights)):
        return BlockFunction.apply(x, drop, settings, *weights)
    return _forward(x, drop, settings, weights)[0]


class BlockFunction(torch.autograd.Function):
    """:func:`block` with its backward pass, differentiable once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, drop: Tensor | None, settings: Settings,
                *weights: Tensor | None) -> Tensor:
        out, saved = _forward(x, drop, settings, Weights._make(weights), save=True)
        ctx.settings, ctx.factor, ctx.dtype = settings, saved.factor, x.dtype
        ctx.save_for_backward(saved.samples, saved.drop, saved.x, saved.h, saved.norms, *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        samples, drop, x, h, norms, *parameters = ctx.saved_tensors
        needs_grad = ctx.needs_input_grad[3:]
        if x is None:  # drop path has dropped every sample
            zeros = (torch.zeros_like(parameter) if needed else None
                     for parameter, needed in zip(parameters, needs_grad, strict=True))
            return g.to(ctx.dtype), None, None, *zeros
        with without_autocast(g):
            g = _nhwc(g)
            part = g if samples is None else g[samples]
            dx, grads = _backward(part, x, Saved(samples, drop, ctx.factor, x, h, norms),
                                  ctx.settings, Weights._make(parameters), needs_grad)
            if samples is not None:
                dx = g.index_copy(0, samples, dx)
        return dx.permute(0, 3, 1, 2).to(ctx.dtype), None, None, *grads


class Saved(NamedTuple):
    """Activations that a block's backward pass needs besides its parameters.

    Args:
        samples: Indices of the samples that drop path has not dropped; None: all.
        drop: Factor of each sample's branch, (N,), or None.
        factor: Factor of the whole branch.
        x: The input of these samples; None: drop path has dropped all.
        h: The 4C channels before the GELU; None: recomputed.
        norms: Norms of GRN's input, (N, 4C).
    """

    samples: Tensor | None
    drop: Tensor | None
    factor: float
    x: Tensor | None
    h: Tensor | None
    norms: Tensor | None


def _forward(x: Tensor, drop: Tensor | None, settings: Settings, weights: Weights,
             save: bool = False) -> tuple[Tensor, Saved]:
    """The block's output and, with ``save``, the activations that the backward pass needs."""
    ops = settings.ops
    samples, factor = None, 1.0
    # In mixed precision, a layer scale in fp32 promotes the residual sum to fp32.
    residual_dtype = x.dtype if weights.gamma is None else torch.promote_types(
        x.dtype, weights.gamma.dtype)
    with without_autocast(x):
        if drop is not None and ops is eager and x.is_cpu and not torch.compiler.is_compiling():
            # Skips dropped samples. On a GPU, finding out which ones would synchronize.
            samples, factor = _remaining_samples(drop)
            drop = None
            if not factor:
                return x.to(residual_dtype, copy=True), Saved(samples, None, 0.0, None, None, None)
        whole = _nhwc(x)
        part = whole if samples is None else whole[samples]
        w = weights.cast(settings.dtype)
        inputs = part.to(settings.dtype)
        n, *_ = ops.dwconv_norm(inputs, w.dwconv_weight, w.dwconv_bias, w.norm_weight,
                                w.norm_bias, settings.eps, False, settings.dilation)
        scale = _scale(w.gamma, factor, part)
        residual, grn, norms = part.to(residual_dtype), w.grn(), None
        save_hidden = save and settings.save_hidden
        if grn is None:
            out, h = ops.mlp(n, w.pwconv1_weight, w.pwconv1_bias, w.pwconv2_weight, w.pwconv2_bias,
                             scale, drop, residual, save_hidden)
        else:
            gamma, beta = grn
            a, h, squares = ops.linear_gelu_squares(n, w.pwconv1_weight, w.pwconv1_bias,
                                                    save_hidden)
            norms = squares.sqrt()
            out = ops.grn_linear_residual(a, eager.grn_scale(norms, gamma), beta, w.pwconv2_weight,
                                          w.pwconv2_bias, scale, drop, residual)
        if samples is not None:
            out = whole.to(residual_dtype).index_copy(0, samples, out)
    return out.permute(0, 3, 1, 2), Saved(
        samples, drop, factor, inputs, h if save_hidden else None, norms)


def _backward(g: Tensor, x: Tensor, saved: Saved, settings: Settings, weights: Weights,
              needs_grad: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of a block's input, (N, H, W, C), and of its parameters in the order of Weights."""
    ops, needs = settings.ops, dict(zip(Weights._fields, needs_grad, strict=True))
    gz = g if saved.drop is None else g * saved.drop[:, None, None, None].to(g.dtype)
    scale, unit = _scale(weights.gamma, saved.factor, g), None
    if settings.dtype == torch.float16 and scale is not None:
        # Where a small layer scale makes gradients small, those before it may overflow in fp16.
        unit = scale.abs().clamp_min(1e-4)
        gz, scale = gz * unit, scale / unit
    gz = gz.to(settings.dtype)
    w = weights if scale is None else weights._replace(
        pwconv2_weight=(weights.pwconv2_weight * scale[:, None]).to(settings.dtype))
    w = w.cast(settings.dtype)

    n, y, mean, rstd = ops.dwconv_norm(x, w.dwconv_weight, w.dwconv_bias, w.norm_weight,
                                       w.norm_bias, settings.eps, True, settings.dilation)
    h = saved.h if saved.h is not None else eager.linear(n, w.pwconv1_weight, w.pwconv1_bias)
    dgamma = None
    if (grn := w.grn()) is None:
        dh, u = ops.linear_gelu_backward(gz, w.pwconv2_weight, h)
    else:
        assert saved.norms is not None
        dh, u, dgamma = ops.grn_linear_gelu_backward(gz, w.pwconv2_weight, h, saved.norms, *grn)
    dw2 = db2 = dscale = dw1 = db1 = dbeta = None
    if needs['pwconv2_weight'] or needs['pwconv2_bias'] or needs['gamma'] or needs['grn_beta']:
        dw2, db2 = eager.weight_gradient(gz, u)
        if grn is not None:
            dbeta = db2 @ w.pwconv2_weight.to(db2.dtype)
        dw2 = dw2.to(weights.pwconv2_weight.dtype)
        if w.gamma is not None:
            dscale = saved.factor * (eager.row_dots(dw2, weights.pwconv2_weight)
                                    + db2 * weights.pwconv2_bias)
            dscale = dscale if unit is None else dscale / unit
        if scale is not None:
            dw2, db2 = dw2.mul_(scale[:, None]), db2 * scale
    del u, gz
    if needs['pwconv1_weight'] or needs['pwconv1_bias']:
        dw1, db1 = eager.weight_gradient(dh, n)
    dn = eager.matmul(dh, w.pwconv1_weight)
    del dh, n
    dy, dnw, dnb = ops.norm_backward(dn, y, mean, rstd, w.norm_weight)
    ddw = ddb = None
    if needs['dwconv_weight'] or needs['dwconv_bias']:
        ddw, ddb = ops.dwconv_backward_weight(dy, x, settings.dilation)
    dx = ops.dwconv_backward_input(dy, w.dwconv_weight, g, settings.dilation)
    grads = (ddw, ddb, dnw, dnb, dw1, db1, dgamma, dbeta, dw2, db2, dscale)
    return dx, [_like(grad, weight) if needed else None
                for grad, weight, needed in zip(grads, weights, needs_grad, strict=True)]


def _like(grad: Tensor | None, weight: Tensor | None) -> Tensor:
    assert grad is not None
    assert weight is not None
    return grad.to(weight.dtype).view_as(weight)


def _remaining_samples(drop: Tensor) -> tuple[Tensor | None, float]:
    """Indices of the samples that are not dropped (None: all), and the factor of their branches."""
    samples = drop.nonzero().flatten()
    factor = float(drop.max()) if drop.numel() else 1.0
    return (None if samples.numel() == drop.numel() else samples), factor


def _scale(gamma: Tensor | None, factor: float, like: Tensor) -> Tensor | None:
    """The layer scale times a factor, (C,); None where both are 1."""
    if gamma is None:
        return None if factor == 1 else like.new_full((like.shape[-1],), factor)
    return gamma if factor == 1 else gamma * factor


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def downsample(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor,
               eps: float) -> Tensor:
    """LayerNorm over channels, then a convolution with stride = kernel size.

    Args:
        x: (N, C, H, W).
        norm_weight: (C,).
        norm_bias: (C,).
        weight: (C', C, k, k).
        bias: (C',).
        eps: Epsilon of the LayerNorm.
    """
    return DownsampleFunction.apply(x, norm_weight, norm_bias, weight, bias, eps)


class DownsampleFunction(torch.autograd.Function):
    """:func:`downsample`; only its input is saved."""

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
            y = _nhwc(x)
            n, mean, rstd = eager.layer_norm(y, norm_weight, norm_bias, ctx.eps)
            dn, dw, db = torch.ops.aten.convolution_backward(
                g.to(ctx.dtype), n.to(ctx.dtype).permute(0, 3, 1, 2), weight.to(ctx.dtype),
                list(bias.shape), list(weight.shape[2:]), [0, 0], [1, 1], False, [0, 0], 1,
                [True, True, True])
            dx, dnw, dnb = eager.norm_backward(_nhwc(dn), y, mean, rstd, norm_weight)
        grads = (dx.permute(0, 3, 1, 2), dnw, dnb, dw, db)
        return *(grad.to(t.dtype) for grad, t in zip(
            grads, (x, norm_weight, norm_bias, weight, bias), strict=True)), None
