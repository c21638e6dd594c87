"""The cross-entropy of upsampled logits, block by block.

mmseg stores the logits of all classes at the size of the labels, their softmax and both gradients,
and sorts them for the accuracy. Here a block of pixels is computed, and its gradient is brought
back to the size of the logits, while it is in the cache. Nothing else is saved.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .stitching import Axis, axis_blocks

BLOCK = 32, 64
"""Height and width of the blocks, in pixels."""


class Settings(NamedTuple):
    """How the loss is computed.

    Args:
        align_corners: As for F.interpolate.
        ignore_index: The label of pixels without a loss.
    """

    align_corners: bool
    ignore_index: int


def upsampled_cross_entropy(logits: Tensor, labels: Tensor, settings: Settings
                            ) -> tuple[Tensor, Tensor]:
    """The sum of the cross-entropy of logits that are upsampled bilinearly, in fp32.

    Args:
        logits: (N, classes, h, w).
        labels: (N, H, W).
        settings: Alignment, and the label to ignore.

    Returns:
        The sum of the losses, and the number of pixels whose label has the highest logit.
    """
    loss, correct = UpsampledCrossEntropy.apply(logits, labels, settings)
    return loss, correct


class UpsampledCrossEntropy(torch.autograd.Function):
    """:func:`upsampled_cross_entropy`, which saves the gradient of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, settings: Settings
                ) -> tuple[Tensor, Tensor]:
        maps = logits.permute(0, 2, 3, 1).float().contiguous()
        gradient = torch.zeros_like(maps) if logits.requires_grad else None
        axes = [axis_blocks(Axis(((0, size),), length, settings.align_corners, (0, size), False,
                                 size), step, logits.device)
                for length, size, step in zip(maps.shape[1:3], labels.shape[1:], BLOCK,
                                              strict=True)]
        loss, correct = maps.new_zeros((), dtype=torch.float64), labels.new_zeros(())
        for i in range(len(maps)):
            for rows, used_rows, row_weights in axes[0]:
                for columns, used, weights in axes[1]:
                    part = torch.matmul(weights, maps[i, used_rows, used])
                    one, hits, dpart = _block(row_weights, part, labels[i, rows, columns],
                                              settings.ignore_index, gradient is not None)
                    loss += one
                    correct += hits
                    if gradient is not None:
                        gradient[i, used_rows, used] += torch.matmul(weights.t(), dpart)
        ctx.dtype = logits.dtype
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(correct)
        return loss.to(maps.dtype), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        gradient, = ctx.saved_tensors
        return (gradient * g).permute(0, 3, 1, 2).to(ctx.dtype), None, None


def _block(row_weights: Tensor, part: Tensor, labels: Tensor, ignore_index: int, backward: bool
           ) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and hits of a block, and the gradient of ``part``, (rows, block's width, classes)."""
    logits = (row_weights @ part.flatten(1)).view(-1, part.shape[-1])
    labels = labels.reshape(-1)
    valid = labels != ignore_index
    index = labels.where(valid, 0)[:, None]
    own = logits.gather(1, index)
    highest = logits.amax(1, keepdim=True)
    hits = ((own == highest)[:, 0] & valid).sum()
    exponentials = logits.sub_(highest).exp_()
    total = exponentials.sum(1, keepdim=True)
    loss = ((total.log() + highest - own)[:, 0] * valid).sum(dtype=torch.float64)
    if not backward:
        return loss, hits, part
    gradient = exponentials.div_(total)
    gradient.scatter_add_(1, index, gradient.new_full((1, 1), -1.0).expand_as(index))
    if not valid.all():
        gradient *= valid[:, None]
    return loss, hits, (row_weights.t() @ gradient.view(len(row_weights), -1)).view_as(part)
