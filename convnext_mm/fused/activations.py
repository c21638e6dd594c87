"""ReLU with what follows it, which saves less for the backward pass."""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def relu_add(x: Tensor, other: Tensor) -> Tensor:
    """ReLU(x) + other, (N, C, H, W); saves one byte for each value."""
    if torch.is_grad_enabled() and x.requires_grad:
        return ReluAdd.apply(x, other)
    return F.relu(x).add_(other)


class ReluAdd(torch.autograd.Function):
    """:func:`relu_add` with its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        ctx.save_for_backward(x > 0)
        ctx.dtypes = x.dtype, other.dtype
        return F.relu(x) + other

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        positive, = ctx.saved_tensors
        dtype, other = ctx.dtypes
        return (g * positive).to(dtype), g.to(other)


def relu_dropout(x: Tensor, drop_prob: float) -> Tensor:
    """Dropout2d of ReLU(x) in training, with a probability below 1; saves only its output."""
    # The same random numbers as F.dropout2d.
    factor = x.new_empty(*x.shape[:2], 1, 1).bernoulli_(1 - drop_prob).div_(1 - drop_prob)
    return ReluScale.apply(x, factor)


class ReluScale(torch.autograd.Function):
    """ReLU(x) · factor, with a factor of at least 0 for each channel of each sample."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        out = F.relu(x).mul_(factor)
        ctx.save_for_backward(out, factor)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        out, factor = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(g, out, 0).mul_(factor), None
