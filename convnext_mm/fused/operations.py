"""The operations that make up a block, and the choice of their implementation."""
from __future__ import annotations

import functools
import sys
from importlib.util import find_spec
from typing import Protocol

from torch import Tensor

from . import eager


class Operations(Protocol):
    """The functions that a module for one kind of chip must have.

    Maps are contiguous, (N, H, W, C) or (N, H, W, 4C), in fp32, bf16 or fp16. ``*_backward``
    functions take the gradient of the output first. With ``save=False``, outputs that only the
    backward pass needs are empty tensors. Sums over positions are in fp32 at least. No output
    shares memory with an input, except where stated.
    """

    def dwconv_norm(self, x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor,
                    norm_bias: Tensor, eps: float, save: bool, dilation: int = 1
                    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Depthwise 7x7 convolution, then LayerNorm over channels.

        ``weight`` is (C, 1, 7, 7), the other parameters are (C,). Returns the normalized map; with
        ``save``, the convolution's output; mean and 1 / std of each position in fp32, in the shape
        that :meth:`norm_backward` of the same implementation expects.
        """

    def norm_backward(self, dn: Tensor, y: Tensor, mean: Tensor, rstd: Tensor,
                      norm_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the LayerNorm's input, in y's dtype, and of its weight and bias, (C,)."""

    def dwconv_backward_input(self, dy: Tensor, weight: Tensor, g: Tensor, dilation: int = 1
                              ) -> Tensor:
        """Gradient of the convolution's input plus that of the residual, ``g``, in g's dtype."""

    def dwconv_backward_weight(self, dy: Tensor, x: Tensor, dilation: int = 1
                               ) -> tuple[Tensor, Tensor]:
        """Gradients of the convolution's weight, (C, 1, 7, 7), and bias, (C,)."""

    def mlp(self, n: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor,
            gamma: Tensor | None, drop: Tensor | None, x: Tensor, save: bool
            ) -> tuple[Tensor, Tensor]:
        """x + drop · gamma · (GELU(n weight1ᵀ + bias1) weight2ᵀ + bias2).

        ``weight1`` is (4C, C), ``weight2`` (C, 4C), ``gamma`` (C,), ``drop`` (N,). Returns the
        output in x's dtype and, with ``save``, the input of the GELU, (N, H, W, 4C).
        """

    def linear_gelu_backward(self, g: Tensor, weight: Tensor, h: Tensor
                             ) -> tuple[Tensor, Tensor]:
        """(g weight) · GELU'(h), and GELU(h): the factors of both weight gradients."""

    def linear_gelu_squares(self, n: Tensor, weight: Tensor, bias: Tensor, save: bool
                            ) -> tuple[Tensor, Tensor, Tensor]:
        """a = GELU(h) with h = n weightᵀ + bias; with ``save``, h; Σ a² of each map, (N, 4C)."""

    def grn_linear_residual(self, a: Tensor, scale: Tensor, beta: Tensor, weight: Tensor,
                            bias: Tensor, gamma: Tensor | None, drop: Tensor | None, x: Tensor
                            ) -> Tensor:
        """x + drop · gamma · ((a · scale + beta) weightᵀ + bias), in x's dtype.

        ``scale`` is (N, 4C), ``beta`` (4C,). May overwrite ``a``.
        """

    def grn_linear_gelu_backward(self, g: Tensor, weight: Tensor, h: Tensor, norms: Tensor,
                                 gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`linear_gelu_backward` with a GRN after the GELU.

        ``norms`` are the norms of the GELU's maps, (N, 4C); ``gamma`` and ``beta`` are (4C,).
        Returns the gradient of h, the GRN's output, and the gradient of its gamma, (4C,).
        """


def select_operations(x: Tensor, triton: bool) -> Operations:
    """The implementation for a block on ``x``: Triton's on a GPU that supports it, or PyTorch's.

    Args:
        x: The block's input.
        triton: Whether Triton may be used.
    """
    if triton and x.is_cuda and triton_runs():
        from . import nvidia
        return nvidia
    return eager


@functools.cache  # every block asks in every step
def triton_runs() -> bool:
    """Whether Triton is installed, with a GPU that can run its kernels."""
    if not find_spec('triton'):
        return False
    from . import nvidia
    return nvidia.available()


def compiler_freezes() -> bool:
    """Whether the compiler treats weights as constants (``torch._inductor.config.freezing``)."""
    config = sys.modules.get('torch._inductor.config')
    return bool(config and config.freezing)


for _function in (triton_runs, compiler_freezes):
    # Makes the result a constant for the compiler, like torch.compiler.assume_constant_result, but
    # without importing the compiler (and Triton) together with this package.
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]
