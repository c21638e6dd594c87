"""mmcv's ConvModule on the fast path: as a convolution of upsampled maps, folded, or by Winograd.

Not imported with :mod:`convnext_mm.fused`, since importing mmcv takes long.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from . import pyramid, winograd
from .functions import compute_dtype, without_autocast
from .layers import has_hooks, is_exporting
from .packed import Packable

FOLDABLE: set[Any] = {nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward}
"""Of the norms, of which mmengine has subclasses."""


class FusedConv2d(nn.Conv2d, Packable):
    """A convolution alone, as :class:`FusedConvModule` computes it."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H, W); with a stride, as a plain convolution."""
        if not fusible(self, x):
            return super().forward(x)
        dtype = compute_dtype(x)
        if self.packed and not (self.training or torch.is_grad_enabled()):
            with without_autocast(x):
                y = self.current_packed([self.weight, self.bias], fold_and_pack, pyramid.PackedConv,
                                        dtype, None, self.dilation[0], False)(x.to(dtype))
        elif _suits_pyramid(x.to(dtype), self.out_channels):
            y = pyramid.convolution([x], self.weight, pyramid.Layout(
                tuple(x.shape[2:]), False, self.dilation[0]))
            if self.bias is not None:
                y = y + self.bias.to(y.dtype)[:, None, None]
        else:
            return super().forward(x)
        return y.contiguous() if x.is_contiguous() else y


class FusedConvModule(ConvModule, Packable):
    """A ConvModule that computes the same faster, with the same parameters.

    In inference with ``packed``, norms are folded into convolutions and ReLUs work in place.
    Otherwise 3x3 convolutions in fp32 on a CPU use :mod:`convnext_mm.fused.winograd`. Where others
    need to see the layers (hooks, tracing), or they have another type, it is a plain ConvModule.
    """

    conv: Any
    norm: Any
    activate: Any

    def forward(self, x: Tensor, activate: bool = True, norm: bool = True) -> Tensor:
        """(N, C, H, W) → (N, C', H, W); with a stride, as a plain ConvModule."""
        if not (norm and self.fusible(x)):
            return super().forward(x, activate, norm)
        if self._folds(x):
            y = x.to(compute_dtype(x))
            with without_autocast(y):
                y = self._current(y, activate, pyramid.PackedConv)(y)
        elif _suits_pyramid(x.to(compute_dtype(x)), self.conv.out_channels):
            y = self.of_pyramid([x], tuple(x.shape[2:]), False, activate)
        else:
            return super().forward(x, activate, norm)
        # In the input's layout, as PyTorch's convolution: mmcv's RoIAlign ignores strides.
        return y.contiguous() if x.is_contiguous() else y

    def accepts_pyramid(self, x: Tensor) -> bool:
        """Whether :meth:`of_pyramid` may replace the module, called on one map like ``x``."""
        return not has_hooks(self) and self.fusible(x)

    def of_pyramid(self, maps: Sequence[Tensor], size: tuple[int, ...], align_corners: bool,
                   activate: bool = True) -> Tensor:
        """The module on ``maps``, upsampled to ``size`` bilinearly and concatenated.

        Call it only where :meth:`accepts_pyramid` is true.
        """
        if self._folds(maps[0]):
            maps = [x.to(compute_dtype(x), memory_format=torch.channels_last) for x in maps]
            with without_autocast(maps[0]):
                channels = tuple(x.shape[1] for x in maps)
                return self._current(maps[0], activate, pyramid.PackedPyramid, channels,
                                     align_corners)(maps, size)
        layout = pyramid.Layout(size, align_corners, self.conv.dilation[0])
        y = pyramid.convolution(maps, self.conv.weight, layout)
        if self.conv.bias is not None:
            y = y + self.conv.bias.to(y.dtype)[:, None, None]
        if self.with_norm:
            y = self.norm(y)
        if not (activate and self.with_activation):
            return y
        if type(self.activate) is nn.ReLU and self.with_norm:  # a norm does not need its output
            return F.relu_(y)
        return self.activate(y)

    def fusible(self, x: Tensor) -> bool:
        """Whether one function may replace the layers, which keep the size of the map."""
        conv = self.conv
        return (type(conv) is nn.Conv2d and fusible(conv, x)
                and self.order == ('conv', 'norm', 'act')
                and not (self.with_explicit_padding or self.with_spectral_norm)
                and not any(has_hooks(layer) for layer in self.children()))

    def _folds(self, x: Tensor) -> bool:
        """Whether to compute with constant weights, into which the norm is folded."""
        return (self.packed and not (self.training or torch.is_grad_enabled())
                and self.foldable())

    def foldable(self) -> bool:
        """Whether it is a convolution, into which a norm can be folded, and at most a ReLU."""
        return ((not self.with_norm or (
            type(self.norm).forward in FOLDABLE and not self.norm.training
            and self.norm.running_mean is not None))
            and (not self.with_activation or type(self.activate) is nn.ReLU))

    def _current(self, x: Tensor, activate: bool, pack: type, *settings: Any
                 ) -> Callable[..., Tensor]:
        """The folded layers, renewed when a parameter or a statistic has changed."""
        norm = self.norm if self.with_norm else None
        tensors = [self.conv.weight, self.conv.bias, *(() if norm is None else (
            norm.weight, norm.bias, norm.running_mean, norm.running_var))]
        return self.current_packed(
            tensors, fold_and_pack, pack, x.dtype, None if norm is None else norm.eps,
            self.conv.dilation[0], self.with_activation and activate, *settings)


def _suits_pyramid(x: Tensor, channels: int) -> bool:
    """Whether :func:`pyramid.convolution` gains on one map (N, C, H, W), which is not upsampled.

    In training on a CPU it does not save the weight that autocast has cast.
    """
    return (x.is_cpu and torch.is_grad_enabled()) or winograd.suits(x, channels)


def fusible(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a function may replace a convolution, which keeps the size of the map ``x``."""
    size = conv.kernel_size[0]
    return (conv.stride == (1, 1) and conv.groups == 1 and conv.padding_mode == 'zeros'
            and size % 2 == 1 and conv.kernel_size == (size, size)
            and conv.dilation[0] == conv.dilation[1]
            and conv.padding == (conv.dilation[0] * (size // 2),) * 2
            and not (x.is_meta or torch.compiler.is_compiling() or is_exporting()
                     or torch.jit.is_tracing() or not x.is_floating_point())
            and (conv.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)))


def fold_and_pack(tensors: Sequence[Tensor | None], pack: Callable[..., Callable[..., Tensor]],
                  dtype: torch.dtype, eps: float | None, dilation: int, relu: bool,
                  *settings: Any) -> Callable[..., Tensor]:
    """A convolution, its norm and a ReLU for constant weights.

    Args:
        tensors: Weight and bias of the convolution; weight, bias, mean and variance of the norm.
        pack: The class of the result: :class:`pyramid.PackedConv` or
            :class:`pyramid.PackedPyramid`.
        dtype: Dtype of the computation.
        eps: Epsilon of the norm.
        dilation: Dilation of the convolution.
        relu: Whether a ReLU follows.
        settings: Further arguments of ``pack``.
    """
    weight, bias = (t.to(dtype) for t in folded(tensors, eps))
    return pack(weight, bias, dilation, relu, *settings)


def folded(tensors: Sequence[Tensor | None], eps: float | None) -> tuple[Tensor, Tensor]:
    """A convolution's weight and bias with a batch norm in eval mode multiplied into them.

    Args:
        tensors: As for :func:`fold_and_pack`; without a norm, only the first two.
        eps: Epsilon of the norm; None: there is none.
    """
    weight, bias, *norm = (None if t is None else t.detach() for t in tensors)
    assert weight is not None
    if bias is None:
        bias = weight.new_zeros(len(weight))
    if eps is None:
        return weight, bias
    scale_by, shift_by, mean, variance = norm
    assert mean is not None
    assert variance is not None
    scale = (variance + eps).rsqrt()
    if scale_by is not None:
        scale = scale * scale_by
    bias = (bias - mean) * scale
    return weight * scale[:, None, None, None], bias if shift_by is None else bias + shift_by


def accepts_pyramid(module: nn.Module, x: Tensor) -> TypeGuard[FusedConvModule]:
    """Whether a module, as :class:`FusedConvModule`, accepts several maps like ``x``."""
    accepts: Any = getattr(module, 'accepts_pyramid', None)
    return accepts is not None and accepts(x)


def fuse_conv_modules(model: nn.Module) -> None:
    """Let every plain ConvModule inside a model compute as :class:`FusedConvModule`.

    Parameters, hooks and attributes stay: only the class changes, as PyTorch's parametrizations do.
    """
    for module in model.modules():
        if type(module) is ConvModule:
            module.__class__ = FusedConvModule
