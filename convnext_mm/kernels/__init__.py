"""The block's operations fused: less kept for the backward pass, fewer passes over memory."""
from __future__ import annotations

import functools
import sys
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
    if allowed and dilation == 1 and x.is_cuda and triton_runs():
        from . import nvidia
        return nvidia
    return eager


@functools.cache  # not every block of every step need look
def triton_runs() -> bool:
    """Whether Triton is there, and a GPU that its kernels can run on."""
    if not find_spec('triton'):
        return False
    from . import nvidia
    return nvidia.available()


# A compiler takes the answer as it is. What torch.compiler.assume_constant_result does, without
# importing the compiler, and Triton, wherever this package is imported.
triton_runs._dynamo_marked_constant = True


def compiler_freezes() -> bool:
    """Whether the compiler takes weights for constants (``torch._inductor.config.freezing``)."""
    config = sys.modules.get('torch._inductor.config')
    return bool(config and config.freezing)


compiler_freezes._dynamo_marked_constant = True
