"""The small layers that ConvNeXt is made of."""
from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .kernels import functions
from .kernels.packed import PackedBlock, PackedDownsample


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a (N, C, H, W) map.

    Normalising the (N, H, W, C) view lets PyTorch's fused kernel do the work; on a
    channels_last map both permutations are free.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias,
                            self.eps).permute(0, 3, 1, 2)


class Packs(nn.Module):
    """A layer that inference on a CPU may keep packed (see :mod:`convnext_mm.kernels.packed`)."""

    packed = False
    _packed: tuple[list, Callable[[Tensor], Tensor], list] | None = None

    def _packs(self, x: Tensor, weight: Tensor) -> bool:
        """Whether it is to be packed on ``x``."""
        return (self.packed and not (self.training or torch.is_grad_enabled())
                and x.dtype == weight.dtype and kernels.eager.onednn(x)
                and not torch.is_autocast_enabled('cpu'))

    def _current(self, weights: Iterable[Tensor | None], pack: Callable[..., Callable],
                 *settings: float) -> Callable[[Tensor], Tensor]:
        """``pack`` of weights and settings; anew where a weight has been replaced or written to.

        What is written through ``.data`` is not seen.
        """
        state = [None if w is None else (w.data_ptr(), 0 if w.is_inference() else w._version)
                 for w in weights]
        if self._packed is None or self._packed[0] != state:
            # Held, so that no other weight comes to lie at an address of theirs.
            held = [None if w is None else w.detach() for w in weights]
            self._packed = state, pack(weights, *settings), held
        return self._packed[1]

    def __getstate__(self) -> dict:
        """For copies and pickles, which oneDNN's layout does not go into."""
        return {**self.__dict__, '_packed': None}


class Downsample(nn.Sequential, Packs):
    """LayerNorm over channels, and the convolution between stages.

    Args:
        norm: A :class:`LayerNorm2d`.
        conv: The convolution.
        memory: One of :data:`convnext_mm.kernels.MEMORY`.
        packed: Whether inference on a CPU keeps the weight in oneDNN's layout as well.
    """

    def __init__(self, norm: nn.Module, conv: nn.Module, memory: str = 'lean',
                 packed: bool = False) -> None:
        super().__init__(norm, conv)
        self.memory, self.packed = memory, packed

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H / 2, W / 2)."""
        norm, conv = self
        if self.memory == 'plain' or torch.compiler.is_compiling() or not fusible(x, norm, conv):
            return super().forward(x)
        weights = norm.weight, norm.bias, conv.weight, conv.bias
        if self._packs(x, conv.weight):
            return self._current(weights, PackedDownsample, norm.eps)(x)
        return functions.downsample(x, *weights, norm.eps)


class DilatedDownsample(nn.Conv2d):
    """The 2x2 convolution between stages without its stride: the size of the map is kept.

    Every ``dilation``-th output equals the strided convolution's (à trous), because what
    it lacks at the borders is added on the right and at the bottom only.
    """

    def __init__(self, in_channels: int, out_channels: int, dilation: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:
        dilation = self.dilation[0]
        return super().forward(F.pad(x, (0, dilation, 0, dilation)))


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch per sample (Huang et al., 2016).

    Args:
        drop_prob: Probability that a sample's branch is zeroed in training. What
            survives is divided by ``1 - drop_prob``, so that the mean is kept.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        self.drop_prob = float(drop_prob)

    def forward(self, x: Tensor) -> Tensor:
        factors = self.factors(x)
        return x if factors is None else x * factors.view(-1, *[1] * (x.ndim - 1))

    def factors(self, x: Tensor) -> Tensor | None:
        """What each of the N samples of ``x`` is multiplied with, (N,); None: all with 1."""
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep_prob = 1.0 - self.drop_prob
        mask = x.new_empty(x.shape[0]).bernoulli_(keep_prob)
        return mask.div_(keep_prob) if keep_prob > 0.0 else mask

    def extra_repr(self) -> str:
        return f'drop_prob={self.drop_prob:.3f}'


class GRN(nn.Module):
    """Global response normalisation (Woo et al., "ConvNeXt V2", 2023, Section 3, Algorithm 1).

    Args:
        dim: Channels of the (N, H, W, dim) input.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        # The sum of squares over a map overflows half precision.
        response = torch.linalg.vector_norm(
            x, dim=(1, 2), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        response = response / (response.mean(dim=-1, keepdim=True) + 1e-6)
        # gamma · (x · response) + beta + x, with one pass over x instead of four.
        scale = 1 + self.gamma * response
        return torch.addcmul(self.beta.to(x.dtype), x, scale.to(x.dtype))


class Block(Packs):
    """A ConvNeXt block (Liu et al., 2022, Section 2 and Figure 4), or one of V2 with GRN.

    Depthwise 7x7 → LayerNorm → 1x1 (C to 4C) → GELU → [GRN] → 1x1 (4C to C) → [layer scale]
    → drop path → residual. The 1x1 convolutions are linear layers over the last axis.

    Args:
        dim: Number of channels C.
        drop_path: Drop path rate of this block.
        layer_scale_init_value: Initial value of ``gamma``; 0 or less: no layer scale.
        use_grn: Whether there is a GRN, as in V2.
        dilation: Dilation of the depthwise convolution.
        memory: One of :data:`convnext_mm.kernels.MEMORY`.
        triton: Whether Triton's kernels are used on a GPU that can.
        packed: Whether inference on a CPU keeps the weights in oneDNN's layout as well.
    """

    def __init__(self, dim: int, drop_path: float = 0.0, layer_scale_init_value: float = 1e-6,
                 use_grn: bool = False, dilation: int = 1, memory: str = 'lean',
                 triton: bool = True, packed: bool = False) -> None:
        super().__init__()
        self.memory, self.triton, self.packed = memory, triton, packed
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3 * dilation,
                                dilation=dilation, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GRN(4 * dim) if use_grn else nn.Identity()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.gamma = (nn.Parameter(torch.full((dim,), float(layer_scale_init_value)))
                      if layer_scale_init_value > 0 else None)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C, H, W)."""
        if self.memory != 'plain' and self._fusible(x):
            return self._fused(x)
        inferring = torch.compiler.is_compiling() and not (
            torch.is_grad_enabled() or self.training)
        if inferring and x.is_cpu and kernels.compiler_freezes() and fusible(
                x, self.pwconv1, self.pwconv2):
            return self._convolved(x)
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.grn(self.act(self.pwconv1(self.norm(y))))
        y = self.pwconv2(y)
        if self.gamma is not None:
            y = y * self.gamma
        return x + self.drop_path(y.permute(0, 3, 1, 2))

    def _convolved(self, x: Tensor) -> Tensor:
        """The same with 1x1 convolutions, for a compiler that takes the weights for constants.

        It lets oneDNN compute GELU and sum with the convolutions; linear layers in fp32 it would
        leave to MKL, which is slower on AMD's CPUs.
        """
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.act(F.conv2d(y, self.pwconv1.weight[:, :, None, None], self.pwconv1.bias))
        y = self.grn(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weight, bias = kernels.eager.scaled(self.pwconv2.weight, self.pwconv2.bias, self.gamma)
        return x + F.conv2d(y, weight[:, :, None, None], bias)

    def _fusible(self, x: Tensor) -> bool:
        """Whether the layers are those of the authors, so that one function can stand for all."""
        if torch.compiler.is_compiling() and kernels.operations(
                x, self.dwconv.dilation[0], self.triton) is kernels.eager:
            return False  # the compiler fuses these operations by itself
        return (type(self.act) is nn.GELU and self.act.approximate == 'none'
                and type(self.drop_path) is DropPath and type(self.grn) in (GRN, nn.Identity)
                and fusible(x, self.dwconv, self.norm, self.pwconv1, self.pwconv2))

    def _fused(self, x: Tensor) -> Tensor:
        """The same as layer after layer, by :func:`convnext_mm.kernels.functions.block`."""
        grn = self.grn if isinstance(self.grn, GRN) else None
        dilation = self.dwconv.dilation[0]
        weights = functions.Weights(
            self.dwconv.weight, self.dwconv.bias, self.norm.weight, self.norm.bias,
            self.pwconv1.weight, self.pwconv1.bias, grn and grn.gamma, grn and grn.beta,
            self.pwconv2.weight, self.pwconv2.bias, self.gamma)
        if self._packs(x, weights.pwconv1_weight):
            return self._current(weights, PackedBlock, self.norm.eps, dilation)(x)
        return functions.block(x, weights, functions.Settings(
            self.norm.eps, functions.compute_dtype(x), self.memory == 'lean',
            kernels.operations(x, dilation, self.triton),
            {} if dilation == 1 else dict(dilation=dilation)), self.drop_path.factors(x))


FUSIBLE = {nn.Conv2d, nn.Linear, nn.LayerNorm, LayerNorm2d}


def fusible(x: Tensor, *layers: nn.Module) -> bool:
    """Whether a fused function may stand for ``layers``, called one after another on ``x``.

    Not where somebody else is to see them, a tracer or the user's hooks; not where they are no
    longer the authors', or of another dtype than ``x``; not where there are no values.
    """
    if (x.is_meta or torch.compiler.is_exporting() or torch.jit.is_tracing()
            or not x.is_floating_point()):
        return False
    mixed = torch.is_autocast_enabled(x.device.type)
    return all(type(layer) in FUSIBLE and (mixed or layer.weight.dtype == x.dtype)
               and layer.bias is not None and not (
                   layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
                   or layer._backward_pre_hooks) for layer in layers)
