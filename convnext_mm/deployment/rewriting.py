"""Replaces layers that exporters, runtimes and quantizers do not handle, in a copy of a model."""
from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fused.conv_module import FusedConvModule, folded
from ..layers import GRN, Block
from ..precision import reset_inference_dtype
from ..utils import processor_has


class Form(NamedTuple):
    """How a runtime computes UPerNet's convolutions of upsampled maps fastest.

    Args:
        full_size: How many of the maps, the first ones, are convolved at the output's size; the
            others are at their own.
        channels_last: Upsample maps (H, W, C).
    """

    full_size: int = 1
    channels_last: bool = False


def form_of(to: str, int8: bool) -> Form:
    """The form of a file for a runtime on this machine.

    ONNX Runtime's int8 convolutions write maps (H, W, C), and would transpose large maps; its fp32
    convolutions do not. With AMX, int8 convolutions are so fast in OpenVINO that the sums of
    interpolated maps, in floats, take longer where a map is half as large as the output.

    Args:
        to: A key of :data:`convnext_mm.choices.FORMATS`.
        int8: Whether the file is quantized.
    """
    fast_int8 = int8 and to == 'openvino' and processor_has('amx_int8')
    return Form(full_size=2 if fast_int8 else 1, channels_last=int8 and to == 'onnx')


PLAIN = Form()


def exportable(model: nn.Module, form: Form = PLAIN) -> nn.Module:
    """A copy of a model in eval mode, on the CPU and in fp32, whose numbers are the same.

    - ``nn.AdaptiveAvgPool2d`` would keep the size of the example image.
    - The weights of linear layers reach ONNX transposed; quantizers look for constants and leave
      the blocks, most of the network, in fp32 without a word. So they become 1x1 convolutions.
    - The layer scale is multiplied into the weights.
    - UPerNet's ``bottleneck`` and ``fpn_bottleneck`` are computed at the maps' own sizes, in a
      ``form`` that suits the runtime.
    """
    model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    reset_inference_dtype(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.AdaptiveAvgPool2d):
                setattr(parent, name, AdaptivePool(child.output_size))
            elif isinstance(child, Block):
                setattr(parent, name, ConvolutionalBlock(child))
            elif (isinstance(child, FusedConvModule) and child.foldable()
                  and sum(widths := _widths(parent, name)) == child.conv.in_channels):
                setattr(parent, name, PyramidConvolution(child, widths, form))
    return model


def _widths(head: Any, name: str) -> list[int]:
    """Channels of the maps that a convolution of UPerNet's head concatenates; else []."""
    if not hasattr(head, 'fpn_bottleneck') or name not in ('bottleneck', 'fpn_bottleneck'):
        return []
    if name == 'fpn_bottleneck':
        return [head.channels] * len(head.in_channels)
    return [head.in_channels[-1], *[head.channels] * len(head.psp_modules)]


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

    GRN's beta, a constant, is in the bias of the convolution after it: runtimes would add it in a
    pass of its own over the largest maps of the network.

    Args:
        block: The block whose weights to take.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.dwconv, self.norm, self.act = block.dwconv, block.norm, block.act
        scale = 1.0 if block.gamma is None else block.gamma.detach()
        self.pwconv1, self.pwconv2 = _convolution(block.pwconv1), _convolution(block.pwconv2, scale)
        self.grn = block.grn
        if isinstance(self.grn, GRN):
            shift = self.pwconv2.weight.flatten(1) @ self.grn.beta.detach().flatten()
            bias = shift if self.pwconv2.bias is None else self.pwconv2.bias + shift
            self.pwconv2.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.act(self.pwconv1(y))
        if isinstance(self.grn, GRN):  # in the layout of convolutions
            # Of the last axis, since ONNX Runtime reduces the two axes of int8's maps slowly.
            norm = torch.linalg.vector_norm(y.flatten(2), dim=2)[..., None, None]
            response = norm / (norm.mean(1, keepdim=True) + 1e-6)
            y = y * (1 + self.grn.gamma.reshape(1, -1, 1, 1) * response)
        else:
            y = self.grn(y)
        return x + self.pwconv2(y)


def _convolution(linear: nn.Linear, scale: Tensor | float = 1.0) -> nn.Conv2d:
    """A linear layer over channels, its outputs multiplied by ``scale``, as a convolution."""
    scale = torch.as_tensor(scale, dtype=linear.weight.dtype)
    return _pointwise(linear.weight * scale.reshape(-1, 1),
                      None if linear.bias is None else linear.bias * scale)


def _pointwise(weight: Tensor, bias: Tensor | None = None) -> nn.Conv2d:
    """The 1x1 convolution of a weight (O, C)."""
    out, channels = weight.shape
    conv = nn.Conv2d(channels, out, 1, bias=bias is not None)
    conv.weight = nn.Parameter(weight[:, :, None, None], requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv


class PyramidConvolution(nn.Module):
    """A ConvModule on upsampled and concatenated maps, with the multiplications at their own sizes.

    As :mod:`convnext_mm.fused.pyramid`, in operators of ONNX: of each coarse map, a 1x1 convolution
    computes what each of the k² taps adds; two matrices upsample, shift and sum it. The weights are
    those of convolutions, so that quantizers find them.

    Args:
        module: A ConvModule whose norm can be folded.
        widths: Channels of each map.
        form: See :class:`Form`.
    """

    def __init__(self, module: FusedConvModule, widths: Sequence[int], form: Form) -> None:
        super().__init__()
        norm = module.norm if module.with_norm else None
        weight, bias = folded([module.conv.weight, module.conv.bias, *(() if norm is None else (
            norm.weight, norm.bias, norm.running_mean, norm.running_var))],
            None if norm is None else norm.eps)
        self.widths, self.taps, self.form = list(widths), weight.shape[-1], form
        self.dilation, self.relu = module.conv.dilation[0], bool(module.with_activation)
        fine = form.full_size
        first, *others = weight.split([sum(widths[:fine]), *widths[fine:]], 1)
        self.first = nn.Conv2d(first.shape[1], first.shape[0], self.taps, dilation=self.dilation,
                               padding=self.dilation * (self.taps // 2))
        self.first.weight, self.first.bias = nn.Parameter(first), nn.Parameter(bias)
        # Channels in the order (dx, O, dy), so that the rows of all dy follow each other; or, for
        # channels_last, (dy, dx, O), so that the channels of a pixel do.
        order = (2, 3, 0, 1) if form.channels_last else (3, 0, 2, 1)
        self.others = nn.ModuleList(_pointwise(part.permute(order).flatten(0, 2))
                                    for part in others)
        self.requires_grad_(False)

    def accepts_pyramid(self, x: Tensor) -> bool:
        """Always."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H, W)."""
        return self.of_pyramid(x.split(self.widths, 1), tuple(x.shape[2:]), False)

    def of_pyramid(self, maps: Sequence[Tensor], size: tuple[int, ...], align_corners: bool,
                   activate: bool = True) -> Tensor:
        """As :meth:`FusedConvModule.of_pyramid`, where the first map has the output's size."""
        fine, coarse = maps[:self.form.full_size], maps[self.form.full_size:]
        out = self.first(torch.cat([fine[0], *(
            F.interpolate(x, size, mode='bilinear', align_corners=align_corners)
            for x in fine[1:])], 1))
        if coarse:
            upsampled = self._upsampled_last if self.form.channels_last else self._upsampled
            out = out + upsampled([conv(x) for x, conv in zip(coarse, self.others, strict=True)],
                                  size, align_corners)
        return F.relu(out) if activate and self.relu else out

    def _upsampled(self, maps: Sequence[Tensor], size: tuple[int, ...], align_corners: bool
                   ) -> Tensor:
        """The sum (N, O, H, W) of maps (N, dx · O · dy, h, w)."""
        rows: list[Tensor] = []
        columns: list[Tensor] = []
        for y in maps:
            n, channels, h, w = y.shape
            by_row, by_column = (torch.cat(self._shifted(length, to, align_corners, y), 1)
                                 for length, to in zip((h, w), size, strict=True))
            y = y.reshape(n, self.taps, channels // self.taps**2, self.taps * h, w)
            rows += (by_row @ y).unbind(1)
            columns.append(by_column)
        return torch.cat(rows, 3) @ torch.cat(columns, 1).t()

    def _upsampled_last(self, maps: Sequence[Tensor], size: tuple[int, ...], align_corners: bool
                        ) -> Tensor:
        """The sum (N, O, H, W) of maps (N, dy · dx · O, h, w), computed as (N, H, W, O)."""
        rows, columns = [], []
        for y in maps:
            n, channels, h, w = y.shape
            by_row, by_column = (self._shifted(length, to, align_corners, y)
                                 for length, to in zip((h, w), size, strict=True))
            y = y.permute(0, 2, 3, 1).reshape(n, h, w, self.taps, channels // self.taps)
            y = y.permute(0, 3, 1, 2, 4).reshape(n, self.taps * h, w * (channels // self.taps))
            y = torch.cat(by_row, 1) @ y
            rows.append(y.reshape(n, size[0], w * self.taps, channels // self.taps**2))
            columns.append(torch.stack(by_column, 2).flatten(1))
        return (torch.cat(columns, 1) @ torch.cat(rows, 2)).permute(0, 3, 1, 2)

    def _shifted(self, length: int, out: int, align_corners: bool, like: Tensor) -> list[Tensor]:
        """(out, length) for each tap: the interpolated pixels that it reads, zeros outside."""
        reach = self.dilation * (self.taps // 2)
        matrix = F.pad(interpolation(length, out, align_corners, like), (0, 0, reach, reach))
        return [matrix[start:start + out] for start in range(0, 2 * reach + 1, self.dilation)]


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
