"""Focal losses (Lin et al., Focal Loss for Dense Object Detection, equation 5).

The functions have the signatures of mmcv's extension, which write into tensors of the caller.
"""
from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = torch.finfo(torch.float32).tiny
"""Probabilities are clamped to it before their logarithm is taken."""


def sigmoid_focal_loss_forward(input: Tensor, target: Tensor, weight: Tensor, output: Tensor,
                               gamma: float, alpha: float) -> None:
    """Focal loss of a classifier with one sigmoid a class; writes ``output``.

    Args:
        input: Logits (K, classes).
        target: (K,) class of each, int64; any other number is background.
        weight: (classes,) of the loss of a sample by its class, 1 for background; or empty.
        output: (K, classes).
        gamma: Exponent that focuses on hard examples.
        alpha: Weight of the positive class; the negative has 1 - alpha.
    """
    p, positive, scale = _sigmoid_parts(input, target, weight, alpha)
    q = 1 - p
    loss = torch.where(positive, q**gamma * _log(p), p**gamma * _log(q))
    output.copy_(-scale * loss)


def sigmoid_focal_loss_backward(input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor,
                                gamma: float, alpha: float) -> None:
    """Gradient of the sum of :func:`sigmoid_focal_loss_forward`; writes ``grad_input``."""
    p, positive, scale = _sigmoid_parts(input, target, weight, alpha)
    q = 1 - p
    gradient = torch.where(positive, q**gamma * (q - gamma * p * _log(p)),
                           p**gamma * (gamma * q * _log(q) - p))
    grad_input.copy_(-scale * gradient)


def softmax_focal_loss_forward(softmax: Tensor, target: Tensor, weight: Tensor, output: Tensor,
                               gamma: float, alpha: float) -> None:
    """Focal loss of a classifier with a softmax over the classes; writes ``output``.

    Args:
        softmax: Probabilities (K, classes).
        target: (K,) class of each, int64; samples with a negative one are ignored.
        weight: (classes,) of the loss of a sample by its class, or empty.
        output: (K,).
        gamma: Exponent that focuses on hard examples.
        alpha: Weight of the loss.

    Raises:
        ValueError: A target is not a class.
    """
    p, scale = _softmax_parts(softmax, target, weight, alpha)
    output.copy_(-scale * (1 - p)**gamma * _log(p))


def softmax_focal_loss_backward(softmax: Tensor, target: Tensor, weight: Tensor, buff: Tensor,
                                grad_input: Tensor, gamma: float, alpha: float) -> None:
    """Gradient of the sum of :func:`softmax_focal_loss_forward` by the logits.

    Args:
        buff: (K,); the derivative by the logarithm of the target's probability is written to it.
        grad_input: (K, classes); the gradient is written to it. The others are as in the forward
            pass.
    """
    p, scale = _softmax_parts(softmax, target, weight, alpha)
    q = 1 - p
    factor = scale * (gamma * q**(gamma - 1) * p * _log(p) - q**gamma)
    # With q = 0 and gamma < 1, the first term is 0 · ∞, whose limit is 0.
    factor = torch.where(q == 0, -scale if gamma == 0 else torch.zeros_like(scale), factor)
    buff.copy_(factor)
    gradient = -softmax.to(p.dtype) * factor[:, None]
    gradient.scatter_add_(1, target.clamp(min=0)[:, None], factor[:, None])
    grad_input.copy_(gradient)


def _log(p: Tensor) -> Tensor:
    return p.clamp(min=SMALLEST).log()


def _working_dtype(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


def _sigmoid_parts(input: Tensor, target: Tensor, weight: Tensor, alpha: float
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """Return the probabilities, which are of the positive class, and the weights of the loss."""
    p = input.to(_working_dtype(input)).sigmoid()
    classes = input.shape[1]
    positive = target[:, None] == torch.arange(classes, device=target.device)
    scale = torch.where(positive, alpha, 1 - alpha).to(p.dtype)
    if weight.numel():
        known = (target >= 0) & (target < classes)
        of_class = weight.to(p.dtype)[target.clamp(0, classes - 1)]
        scale = scale * torch.where(known, of_class, 1)[:, None]
    return p, positive, scale


def _softmax_parts(softmax: Tensor, target: Tensor, weight: Tensor, alpha: float
                   ) -> tuple[Tensor, Tensor]:
    """Return the probability of each target, and the weight of its loss, 0 if it is ignored."""
    if len(target) and target.max() >= softmax.shape[1]:
        raise ValueError(f'Target {target.max()}, but there are {softmax.shape[1]} classes')
    index = target.clamp(min=0)
    p = softmax.to(_working_dtype(softmax)).gather(1, index[:, None])[:, 0]
    scale = (target >= 0).to(p.dtype) * alpha
    if weight.numel():
        scale = scale * weight.to(p.dtype)[index]
    return p, scale
