"""The published sizes of ConvNeXt."""
from __future__ import annotations

from typing import NamedTuple


class Arch(NamedTuple):
    """Blocks and channels of each stage, and whether the blocks have GRN, as in V2."""

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    use_grn: bool = False

    def __str__(self) -> str:
        name = next((repr(name) for name, arch in ARCHS.items() if arch == self), None)
        size = f'depths={list(self.depths)}, dims={list(self.dims)}'
        return (f'arch={name} ({size})' if name else size) + (', V2 (GRN)' * self.use_grn)


CLIP_XXLARGE = (3, 4, 30, 3), (384, 768, 1536, 3072)
"""Depths and dims of the image tower of OpenCLIP's largest ConvNeXt."""

ARCHS = {
    # V1: Liu et al., "A ConvNet for the 2020s", 2022, Section 3
    'tiny': Arch((3, 3, 9, 3), (96, 192, 384, 768)),
    'small': Arch((3, 3, 27, 3), (96, 192, 384, 768)),
    'base': Arch((3, 3, 27, 3), (128, 256, 512, 1024)),
    'large': Arch((3, 3, 27, 3), (192, 384, 768, 1536)),
    'xlarge': Arch((3, 3, 27, 3), (256, 512, 1024, 2048)),
    # V2: Woo et al., "ConvNeXt V2", 2023, Appendix
    'v2_atto': Arch((2, 2, 6, 2), (40, 80, 160, 320), use_grn=True),
    'v2_femto': Arch((2, 2, 6, 2), (48, 96, 192, 384), use_grn=True),
    'v2_pico': Arch((2, 2, 6, 2), (64, 128, 256, 512), use_grn=True),
    'v2_nano': Arch((2, 2, 8, 2), (80, 160, 320, 640), use_grn=True),
    'v2_tiny': Arch((3, 3, 9, 3), (96, 192, 384, 768), use_grn=True),
    'v2_base': Arch((3, 3, 27, 3), (128, 256, 512, 1024), use_grn=True),
    'v2_large': Arch((3, 3, 27, 3), (192, 384, 768, 1536), use_grn=True),
    'v2_huge': Arch((3, 3, 27, 3), (352, 704, 1408, 2816), use_grn=True),
}
