"""torchvision's operators, where torchvision can be imported."""
from __future__ import annotations

import functools
from typing import Any

import torch


@functools.cache
def operators() -> Any | None:
    """``torch.ops.torchvision``, or None if torchvision is missing or does not fit this PyTorch."""
    try:
        import torchvision
        torchvision.extension._assert_has_ops()
    except Exception:  # a torchvision for another PyTorch raises errors of many types
        return None
    return torch.ops.torchvision


def version() -> str | None:
    """torchvision's version, or None as above."""
    if not operators():
        return None
    import torchvision
    return str(torchvision.__version__)
