"""The fused block and downsampling layer, which replace those of :mod:`convnext_mm.layers`."""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import GRN, Block, Downsample, DropPath, LayerNorm2d
from . import eager, functions
from .operations import compiler_freezes, select_operations
from .packed import Packable, PackedBlock, PackedDownsample, PackedLinear

# PyTorch 2.6 has no is_exporting; its exporter compiles.
is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)



class FusedDownsample(Downsample, Packable):
    """A :class:`convnext_mm.layers.Downsample` that saves only its input for the backward pass.

    Args:
        args: As for :class:`convnext_mm.layers.Downsample`.
        memory: One of :data:`convnext_mm.options.MEMORY`.
        packed: Whether inference on a CPU also stores the weight in oneDNN's layout.
    """

    def __init__(self, *args: Any, memory: str = 'lean', packed: bool = False) -> None:
        super().__init__(*args)
        self.memory, self.packed = memory, packed

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H / 2, W / 2)."""
        norm, conv = self
        if (self.memory == 'plain' or torch.compiler.is_compiling()
                or not (x.is_cpu or torch.is_grad_enabled())  # it saves memory, not launches
                or not (isinstance(norm, LayerNorm2d) and isinstance(conv, nn.Conv2d))
                or conv.kernel_size != (2, 2) or not is_standard(conv, stride=2)
                or not fusible(x, norm, conv)):
            return super().forward(x)
        weights = *parameters(norm), *parameters(conv)
        y = x.to(functions.compute_dtype(x))
        if self.uses_packed(y, conv.weight):
            with functions.without_autocast(y):
                return self.current_packed(weights, PackedDownsample, y.dtype, norm.eps)(y)
        return functions.downsample(x, *weights, norm.eps)


class FusedBlock(Block, Packable):
    """A :class:`convnext_mm.layers.Block` computed by :func:`functions.block`.

    Where one function cannot replace the layers (hooks, tracing, other layers), they run one by
    one.

    Args:
        args: As for :class:`convnext_mm.layers.Block`.
        memory: One of :data:`convnext_mm.options.MEMORY`.
        triton: Whether to use Triton kernels on a GPU that supports them.
        packed: Whether inference on a CPU also stores the weights in oneDNN's layout.
        kwargs: As for :class:`convnext_mm.layers.Block`.
    """

    def __init__(self, *args: Any, memory: str = 'lean', triton: bool = False,
                 packed: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory, self.triton, self.packed = memory, triton, packed

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        if self.memory != 'plain' and self._fusible(x):
            return self._fused(x)
        inference = not (torch.is_grad_enabled() or self.training)
        if (inference and torch.compiler.is_compiling() and x.is_cpu and compiler_freezes()
                and fusible(x, self.pwconv1, self.pwconv2)):
            return self._convolutional(x)
        return super().forward(x)

    def _fusible(self, x: Tensor) -> bool:
        """Whether the layers are those of the paper, so that one function may replace them."""
        if select_operations(x, self.triton) is eager and (
                torch.compiler.is_compiling()  # the compiler fuses these operations itself
                or not (x.is_cpu or torch.is_grad_enabled())):  # they save memory, not launches
            return False
        if (x.is_cpu and torch.is_autocast_enabled('cpu') and not torch.is_grad_enabled()
                and not self.packed and eager.has_amx()):
            # Matmuls take so little time there that casting the weights in every call does not
            # pay; autocast caches cast weights.
            return False
        return (type(self.act) is nn.GELU and self.act.approximate == 'none'
                and type(self.drop_path) is DropPath and type(self.grn) in (GRN, nn.Identity)
                and self.dwconv.kernel_size == (7, 7) and is_standard(
                    self.dwconv, padding=3 * self.dwconv.dilation[0],
                    dilation=self.dwconv.dilation[0], groups=self.dwconv.out_channels)
                and not any(map(has_hooks, (self.act, self.drop_path, self.grn)))
                and fusible(x, self.dwconv, self.norm, self.pwconv1, self.pwconv2))

    def _fused(self, x: Tensor) -> Tensor:
        gamma, beta = (self.grn.gamma, self.grn.beta) if isinstance(self.grn, GRN) else (None, None)
        weights = functions.Weights(
            *parameters(self.dwconv), *parameters(self.norm), *parameters(self.pwconv1),
            gamma, beta, *parameters(self.pwconv2), self.gamma)
        dilation = self.dwconv.dilation[0]
        y = x.to(functions.compute_dtype(x))
        if self.uses_packed(y, weights.pwconv1_weight):
            with functions.without_autocast(y):
                return self.current_packed(weights, PackedBlock, y.dtype, self.norm.eps,
                                           dilation)(y)
        return functions.block(x, weights, functions.Settings(
            self.norm.eps, functions.compute_dtype(x), self.memory == 'lean',
            select_operations(x, self.triton), dilation), self.drop_path.factors(x))

    def _convolutional(self, x: Tensor) -> Tensor:
        """The block with 1x1 convolutions, for a compiler that treats weights as constants.

        It fuses GELU and sum into oneDNN's convolutions. Linear layers in fp32 would go to MKL,
        which is slower on AMD CPUs.
        """
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.act(F.conv2d(y, self.pwconv1.weight[:, :, None, None], self.pwconv1.bias))
        y = self.grn(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weight, bias = eager.fold_scale(self.pwconv2.weight, self.pwconv2.bias, self.gamma)
        return x + F.conv2d(y, weight[:, :, None, None], bias)


class FusedLinear(nn.Linear, Packable):
    """A linear layer that keeps its weight in oneDNN's layout for inference on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) → (N, C')."""
        if x.dim() != 2 or torch.compiler.is_compiling() or not fusible(x, self):
            return super().forward(x)
        y = x.to(functions.compute_dtype(x))
        if not self.uses_packed(y, self.weight):
            return super().forward(x)
        with functions.without_autocast(y):
            return self.current_packed((self.weight, self.bias), PackedLinear, y.dtype)(y)


FUSIBLE = {nn.Conv2d, nn.Linear, FusedLinear, nn.LayerNorm, LayerNorm2d}


def fusible(x: Tensor, *layers: nn.Module) -> bool:
    """Whether one function may replace ``layers``, called one after another on ``x``.

    Not where others need to see the layers (tracers, hooks), where the layers have custom types or
    another dtype than ``x``, or where ``x`` has no values.
    """
    if (x.is_meta or is_exporting() or torch.jit.is_tracing()
            or not x.is_floating_point()):
        return False
    mixed = torch.is_autocast_enabled(x.device.type)
    return all(type(layer) in FUSIBLE and layer.weight is not None and layer.bias is not None
               and (mixed or layer.weight.dtype == x.dtype) and not has_hooks(layer)
               for layer in layers)


def has_hooks(layer: nn.Module) -> bool:
    """Whether hooks run with the layer."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
                or layer._backward_pre_hooks)


def is_standard(conv: nn.Conv2d, stride: int = 1, padding: int = 0, dilation: int = 1,
                groups: int = 1) -> bool:
    """Whether a convolution has these settings in both directions, and pads with zeros."""
    return (conv.stride == (stride, stride) and conv.padding == (padding, padding)
            and conv.dilation == (dilation, dilation) and conv.groups == groups
            and conv.padding_mode == 'zeros')


def parameters(layer: nn.Conv2d | nn.Linear | nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that is :func:`fusible`."""
    assert layer.bias is not None
    return layer.weight, layer.bias
