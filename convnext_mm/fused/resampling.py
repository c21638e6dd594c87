"""Bilinear upsampling as products with narrow banded matrices, one per direction.

Interpolation is linear and separable: a map (H, W, C) is resampled by a matrix of its rows, (H',
H), and one of its columns. A block of output rows depends on few input rows, so the products skip
the zeros outside of the band. What follows linearly, such as the shift of a convolution's tap, the
mean over overlapping windows, a crop or a flip, is part of the matrices.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 32
"""Rows of a block on a CPU."""


class Block(NamedTuple):
    """A part of a matrix.

    Args:
        rows: Its rows.
        columns: The columns outside of which these rows are zero.
        values: (taps, rows, columns).
    """

    rows: slice
    columns: slice
    values: Tensor


class Banded:
    """Matrices (taps, out, in) with the nonzeros near the diagonal, cut into blocks of rows.

    Args:
        matrices: (taps, out, in), all with the same band.
        like: A tensor of the dtype and on the device of the products.
        block: Rows of a block.
    """

    def __init__(self, matrices: np.ndarray, like: Tensor, block: int = BLOCK) -> None:
        self.taps, self.size = matrices.shape[:2]
        self.blocks = []
        used = (matrices != 0).any(0)
        for start in range(0, self.size, block):
            rows = slice(start, min(start + block, self.size))
            columns = np.flatnonzero(used[rows].any(0))
            low, high = (columns[0], columns[-1] + 1) if len(columns) else (0, 1)
            values = np.ascontiguousarray(matrices[:, rows, low:high])
            self.blocks.append(Block(rows, slice(int(low), int(high)),
                                     torch.from_numpy(values).to(like)))

    def stacked(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and (rows, taps · columns) of each block."""
        for rows, columns, values in self.blocks:
            yield rows, columns, values.transpose(0, 1).flatten(1)

    def interleaved(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns and (rows, columns · taps) of each block."""
        for rows, columns, values in self.blocks:
            yield rows, columns, values.permute(1, 2, 0).flatten(1)


def neighbors(size: int, out: int, align_corners: bool, rows: slice = slice(None)
              ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What F.interpolate's linear mode reads for output rows: index, next index, its weight.

    Computed in fp32 as PyTorch does, so that the weights have the same rounding errors.
    """
    index = np.arange(*rows.indices(out), dtype=np.float32)
    one, half = np.float32(1), np.float32(0.5)
    if align_corners:
        scale = np.float32(size - 1) / np.float32(out - 1) if out > 1 else np.float32(0)
        source = scale * index
    else:
        scale = np.float32(size) / np.float32(out)
        source = np.maximum(scale * (index + half) - half, np.float32(0))
    low = np.minimum(source.astype(np.int64), size - 1)
    high = np.minimum(low + 1, size - 1)
    return low, high, np.clip(source - low.astype(np.float32), np.float32(0), one)


def interpolation(size: int, out: int, align_corners: bool) -> np.ndarray:
    """(out, size): the matrix of F.interpolate's linear mode, in fp32."""
    low, high, weight = neighbors(size, out, align_corners)
    matrix = np.zeros((out, size), np.float32)
    rows = np.arange(out)
    np.add.at(matrix, (rows, low), 1 - weight)
    np.add.at(matrix, (rows, high), weight)
    return matrix


def shifted(matrix: np.ndarray, taps: int, dilation: int = 1) -> np.ndarray:
    """(taps, out, in): the rows that a convolution's taps read, with zeros as its padding."""
    reach = dilation * (taps // 2)
    padded = np.pad(matrix, ((reach, reach), (0, 0)))
    return np.stack([padded[dilation * i:dilation * i + len(matrix)] for i in range(taps)])
