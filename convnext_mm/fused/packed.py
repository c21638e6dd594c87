"""Inference on a CPU with weights stored in oneDNN's layout instead of reordered in every call.

Packed layers are snapshots of weights; :class:`Packable` renews outdated ones. Maps are
(N, C, H, W) in channels_last.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import eager

if TYPE_CHECKING:
    from .functions import Weights


class Packable(nn.Module):
    """A layer that packs its weights for inference on a CPU (``packed=True``)."""

    packed = False
    _packed: tuple[list[Any], Callable[..., Tensor], list[Any]] | None = None

    def uses_packed(self, x: Tensor, weight: Tensor) -> bool:
        """Whether to compute with packed weights on ``x``, which has the dtype of the products."""
        return (self.packed and not (self.training or torch.is_grad_enabled())
                and (x.dtype == weight.dtype or torch.is_autocast_enabled('cpu'))
                and eager.uses_onednn(x))

    def current_packed(self, weights: Iterable[Tensor | None], pack: Callable[..., Callable],
                       *settings: Any) -> Callable[..., Tensor]:
        """``pack(weights, *settings)``, renewed when a weight was replaced or written to.

        Writes through ``.data`` are not noticed.
        """
        state = [pack, settings, *(
            None if w is None else (w.data_ptr(), 0 if w.is_inference() else w._version)
            for w in weights)]
        if self._packed is None or self._packed[0] != state:
            # A reference, so that no other weight is allocated at one of these addresses.
            alive = [None if w is None else w.detach() for w in weights]
            self._packed = state, pack(weights, *settings), alive
        return self._packed[1]

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles, which cannot contain oneDNN's layout."""
        return {**self.__dict__, '_packed': None}


class PackedConvolution:
    """A convolution. oneDNN's layout depends on the map's size, so a new size packs again.

    Args:
        weight: (C', C / groups, k, k).
        bias: (C',) or None.
        stride: Stride.
        padding: Padding on each side.
        dilation: Dilation.
        groups: Groups of channels.
        relu: Whether a ReLU follows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, stride: int = 1, padding: int = 0,
                 dilation: int = 1, groups: int = 1, relu: bool = False) -> None:
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach()
        self.activation = 'relu' if relu else 'none'
        self.settings = [padding] * 2, [stride] * 2, [dilation] * 2, groups
        self.size: torch.Size | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape != self.size:
            self.packed = torch.ops.aten.mkldnn_reorder_conv2d_weight(
                self.weight.to_mkldnn(), *self.settings, x.shape)
            self.size = x.shape
        return torch.ops.mkldnn._convolution_pointwise.default(
            x, self.packed, self.bias, *self.settings, self.activation, [], '')


class PackedDownsample:
    """:func:`convnext_mm.fused.functions.downsample` for constant weights."""

    def __init__(self, weights: tuple[Tensor, ...], dtype: torch.dtype, eps: float) -> None:
        norm_weight, norm_bias, *convolution = weights
        weight, bias = (w.detach().to(dtype) for w in convolution)
        self.norm = norm_weight.detach().float(), norm_bias.detach().float(), eps
        self.convolution = PackedConvolution(weight, bias, stride=weight.shape[-1])

    def __call__(self, x: Tensor) -> Tensor:
        n, _, _ = eager.layer_norm(x.permute(0, 2, 3, 1).contiguous(), *self.norm)
        return self.convolution(n.permute(0, 3, 1, 2))


class PackedBlock:
    """:func:`convnext_mm.fused.functions.block` for constant weights, without drop path.

    The layer scale is folded into ``pwconv2``.

    Args:
        weights: The block's parameters.
        dtype: Dtype of its map.
        eps: Epsilon of the norm.
        dilation: Dilation of the depthwise convolution.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype, eps: float, dilation: int) -> None:
        w = weights.detach()
        weight2, bias2 = eager.fold_scale(w.pwconv2_weight, w.pwconv2_bias, w.gamma)
        w = w._replace(pwconv2_weight=weight2, pwconv2_bias=bias2).cast(dtype)
        self.convolution = PackedConvolution(
            w.dwconv_weight, w.dwconv_bias, padding=3 * dilation, dilation=dilation,
            groups=len(w.dwconv_weight))
        self.norm = w.norm_weight.float(), w.norm_bias.float(), eps
        self.linear1 = pack_linear(w.pwconv1_weight), w.pwconv1_bias
        self.linear2 = pack_linear(w.pwconv2_weight), w.pwconv2_bias
        self.grn = w.grn()

    def __call__(self, x: Tensor) -> Tensor:
        n, _, _ = eager.layer_norm(self.convolution(x).permute(0, 2, 3, 1).contiguous(),
                                   *self.norm)
        x = x.permute(0, 2, 3, 1).contiguous()
        if self.grn is None:
            out, _ = eager.mlp(n, *self.linear1, *self.linear2, None, None, x, save=False)
        else:
            gamma, beta = self.grn
            a, _, squares = eager.linear_gelu_squares(n, *self.linear1, save=False)
            out = eager.grn_linear_residual(a, eager.grn_scale(squares.sqrt(), gamma), beta,
                                            *self.linear2, None, None, x)
        return out.permute(0, 3, 1, 2)


class PackedLinear:
    """A linear layer for constant weights."""

    def __init__(self, weights: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
        weight, self.bias = (w.detach().to(dtype) for w in weights)
        self.weight = pack_linear(weight)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.default(
            x, self.weight, self.bias, 'none', [], '')


def pack_linear(weight: Tensor) -> Tensor:
    """A linear layer's weight in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)
