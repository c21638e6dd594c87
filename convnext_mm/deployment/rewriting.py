"""Replaces layers that exporters, runtimes and quantizers do not handle, in a copy of a model."""
from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import GRN, Block
from ..precision import reset_inference_dtype


def exportable(model: nn.Module) -> nn.Module:
    """A copy of a model in eval mode, on the CPU and in fp32, whose numbers are the same.

    - ``nn.AdaptiveAvgPool2d`` would keep the size of the example image.
    - The weights of linear layers reach ONNX transposed; quantizers look for constants and leave
      the blocks, most of the network, in fp32 without a word. So they become 1x1 convolutions.
    - The layer scale is multiplied into the weights.
    """
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    reset_inference_dtype(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.AdaptiveAvgPool2d):
                setattr(parent, name, AdaptivePool(child.output_size))
            elif isinstance(child, Block):
                setattr(parent, name, ConvolutionalBlock(child))
    return model


class AdaptivePool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` as products with two averaging matrices, for images of any size.

    Args:
        size: Height and width of the output, as for PyTorch's.
    """

    def __init__(self, size: int | tuple[int | None, ...] | None) -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) or size is None else size

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, *size)."""
        rows, columns = (_averages(x.shape[axis], size, x)
                         for axis, size in zip((2, 3), self.size, strict=True))
        return rows @ x @ columns.t()


def _averages(length: int, size: int | None, like: Tensor) -> Tensor:
    """(size, length): the means over the parts of an axis, which may overlap."""
    size = length if size is None else size
    part = torch.arange(size, device=like.device)[:, None]
    at = torch.arange(length, device=like.device)[None]
    first = torch.div(part * length, size, rounding_mode='floor')
    last = torch.div((part + 1) * length + size - 1, size, rounding_mode='floor')
    # A product, since coremltools cannot convert & of conditions.
    inside = (at >= first).to(like) * (at < last).to(like)
    return inside / inside.sum(1, keepdim=True)


class ConvolutionalBlock(nn.Module):
    """A :class:`convnext_mm.layers.Block` with 1x1 convolutions and without layer scale.

    Args:
        block: The block whose weights to take.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.dwconv, self.norm, self.act = block.dwconv, block.norm, block.act
        scale = 1.0 if block.gamma is None else block.gamma.detach()
        self.pwconv1, self.pwconv2 = _convolution(block.pwconv1), _convolution(block.pwconv2, scale)
        self.grn = block.grn

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.act(self.pwconv1(y))
        if isinstance(self.grn, GRN):  # in the layout of convolutions
            norm = y.square().sum((2, 3), keepdim=True).sqrt()
            response = norm / (norm.mean(1, keepdim=True) + 1e-6)
            gamma, beta = (w.reshape(1, -1, 1, 1) for w in (self.grn.gamma, self.grn.beta))
            y = y * (1 + gamma * response) + beta
        else:
            y = self.grn(y)
        return x + self.pwconv2(y)


def _convolution(linear: nn.Linear, scale: Tensor | float = 1.0) -> nn.Conv2d:
    """A linear layer over channels, its outputs multiplied by ``scale``, as a convolution."""
    out, channels = linear.weight.shape
    conv = nn.Conv2d(channels, out, 1, bias=linear.bias is not None)
    scale = torch.as_tensor(scale, dtype=linear.weight.dtype)
    conv.weight = nn.Parameter((linear.weight * scale.reshape(-1, 1))[:, :, None, None],
                               requires_grad=False)
    if linear.bias is not None:
        conv.bias = nn.Parameter(linear.bias * scale, requires_grad=False)
    return conv


def interpolation(length: int, out: int, align_corners: bool, like: Tensor) -> Tensor:
    """(out, length): bilinear interpolation of one axis, as ``F.interpolate`` computes it.

    Args:
        length: Pixels of the axis.
        out: Pixels to compute.
        align_corners: As for ``F.interpolate``.
        like: A tensor with the dtype and device of the result.
    """
    return hats(torch.arange(out, device=like.device), length, out, align_corners).to(like)


def hats(pixels: Tensor, length: int, out: int, align_corners: bool) -> Tensor:
    """(..., length): the weights of an axis in each of ``pixels`` of the ``out`` that it becomes.

    A weight is 1 where a pixel lies at a point of the axis, and falls to 0 at the next points.
    """
    pixels = pixels.to(torch.float32)
    if align_corners:
        at = pixels * ((length - 1) / max(out - 1, 1))
    else:
        at = (pixels + 0.5) * (length / out) - 0.5
    at = at.clamp(min=0)
    at = torch.minimum(at, torch.full_like(at, 0.0) + (length - 1))
    points = torch.arange(length, device=pixels.device, dtype=torch.float32)
    return F.relu(1 - (at[..., None] - points).abs())
