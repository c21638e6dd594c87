"""The layers of ConvNeXt, as the papers describe them."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a (N, C, H, W) map."""

    def forward(self, x: Tensor) -> Tensor:
        # PyTorch's fused kernel wants channels last; on a channels_last map nothing is copied.
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias,
                            self.eps).permute(0, 3, 1, 2)


class Downsample(nn.Sequential):
    """LayerNorm over channels, then a 2x2 convolution with stride 2 (Liu et al., 2022, Sec. 2.6).

    With ``dilation``, the convolution has no stride; see :class:`DilatedConv`.
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int | None = None) -> None:
        super().__init__(
            LayerNorm2d(in_channels, eps=1e-6),
            nn.Conv2d(in_channels, out_channels, kernel_size=2, stride=2) if dilation is None else
            DilatedConv(in_channels, out_channels, kernel_size=2, dilation=dilation))


class DilatedConv(nn.Conv2d):
    """The 2x2 convolution of :class:`Downsample` without stride: the size of the map stays.

    Padding is at the right and bottom only, so that every ``dilation``-th output equals that of
    the strided convolution.
    """

    def forward(self, x: Tensor) -> Tensor:
        vertical, horizontal = self.dilation
        return super().forward(F.pad(x, (0, horizontal, 0, vertical)))


class DropPath(nn.Module):
    """Stochastic depth: zeroes a residual branch of a sample in training (Huang et al., 2016).

    It does so with probability ``drop_prob``. The other branches are divided by
    ``1 - drop_prob``, which preserves the mean.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = float(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        factors = self.factors(x)
        return x if factors is None else x * factors.view(-1, *[1] * (x.ndim - 1))

    def factors(self, x: Tensor) -> Tensor | None:
        """The factor of each of the N samples of ``x``, (N,); None: all are 1."""
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep_prob = 1.0 - self.drop_prob
        mask = x.new_empty(x.shape[0]).bernoulli_(keep_prob)
        return mask.div_(keep_prob) if keep_prob > 0.0 else mask

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:.3f}'


class GRN(nn.Module):
    """Global response normalization (Woo et al., 2023, Algorithm 1) of a (N, H, W, dim) map."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        # In half precision, the sum of squares over a map would overflow.
        norm = torch.linalg.vector_norm(
            x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        response = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        # gamma · (x · response) + beta + x, in one pass over x instead of four.
        scale = 1 + self.gamma * response
        return torch.addcmul(self.beta.to(x.dtype), x, scale.to(x.dtype))


class Block(nn.Module):
    """A ConvNeXt block (Liu et al., 2022, Section 2 and Figure 4); with GRN, a block of V2.

    Depthwise 7x7 → LayerNorm → 1x1 (C to 4C) → GELU → [GRN] → 1x1 (4C to C) → [layer scale]
    → drop path → residual. The 1x1 convolutions are linear layers over the last axis.

    Args:
        dim: Channels C.
        drop_path: Drop path rate of this block.
        layer_scale_init_value: Initial value of ``gamma``; 0: no layer scale.
        use_grn: Whether the block has GRN, as in V2.
        dilation: Dilation of the depthwise convolution.
        hidden: Channels between the 1x1 convolutions, by default 4C.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale_init_value: float = 1e-6,
                 use_grn: bool = False, dilation: int = 1, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3 * dilation, dilation=dilation,
                                groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.grn = GRN(hidden) if use_grn else nn.Identity()
        self.pwconv2 = nn.Linear(hidden, dim)
        self.gamma = (nn.Parameter(torch.full((dim,), float(layer_scale_init_value)))
                      if layer_scale_init_value > 0 else None)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        y: Tensor = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.pwconv2(self.grn(self.act(self.pwconv1(y))))
        if self.gamma is not None:
            y = y * self.gamma
        y = self.drop_path(y.permute(0, 3, 1, 2))
        return x + y
