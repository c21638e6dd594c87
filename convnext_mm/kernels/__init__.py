"""The block's operations fused: less kept for the backward pass, fewer passes over memory."""
from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

from torch import Tensor

from . import eager

MEMORY = ('plain', 'lean', 'minimal')
"""What is kept for the backward pass: all that PyTorch keeps, five maps a block, or one."""


def operations(x: Tensor, dilation: int, allowed: bool) -> ModuleType:
    """The module whose operations a block on ``x`` uses: Triton's on a GPU that can, or PyTorch's.

    Args:
        x: The block's input.
        dilation: Of its convolution; Triton's kernels know 1.
        allowed: Whether Triton may be used.
    """
    if allowed and dilation == 1 and x.is_cuda and find_spec('triton'):
        from . import nvidia
        if nvidia.available():
            return nvidia
    return eager
