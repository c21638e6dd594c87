"""Arguments of the Triton operators, for tests in this process and in a subprocess."""
from __future__ import annotations

import torch
from torch import Tensor

from convnext_mm.fused import nvidia

DEVICE = 'cuda' if torch.cuda.is_available() and not nvidia.INTERPRETED else 'cpu'


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normally distributed values on the tests' device."""
    return torch.randn(shape, device=DEVICE).to(dtype)


def operator_calls(wide: int = 520) -> dict[str, list[tuple]]:
    """{operator: arguments of its calls}, with and without optional ones.

    Args:
        wide: Channels of a map for which convolution and norm are separate kernels.
    """
    x, k, w, c = rand(1, 2, 3, 8), rand(1, 2, 3, 32), rand(8, 1, 7, 7), rand(8)
    separate = rand(1, 1, 2, wide), rand(wide, 1, 7, 7), *[rand(wide)] * 3, 1e-6, True
    m, up, down, s, b = rand(6), rand(32, 8), rand(8, 32), rand(1, 32), rand(32)
    return dict(
        dwconv_norm=[(x, w, c, c, c, 1e-6, True), (x.half(), w, c, c, c, 1e-6, False), separate],
        norm_backward=[(x, x, m, m, c)],
        dwconv_backward_input=[(x.half(), w, x), (x, w, None)],
        dwconv_backward_weight=[(x.half(), x.half())],
        linear_gelu=[(x, up, b, True), (x.half(), up, b, False)],
        linear_residual=[(k, down, c, c, rand(1), x),
                         (k.half(), down, c, None, None, x)],
        linear_gelu_backward=[(x, down, k), (x.half(), down, k.half())],
        mlp=[(x, up, b, down, c, c, rand(1), x, True),
             (x.half(), up, b, down, c, None, None, x, False)],
        gelu=[(k,)], gelu_backward=[(k, k)],
        linear_gelu_squares=[(x, up, b, True), (x.half(), up, b, False)],
        grn_linear_residual=[(k, s, b, down, c, c, rand(1), x),
                             (k.half(), s, b, down, c, None, None, x)],
        grn_linear_backward=[(x, down, k), (x.half(), down, k.half())],
        grn_gelu_backward=[(k.half(), k.half(), s, b, s)])
