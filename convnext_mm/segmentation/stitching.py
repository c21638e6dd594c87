"""From the logits of windows to a class map, block by block.

mmseg upsamples the logits of each window, pads them to the image's size, adds and divides them,
crops the padding, flips and upsamples again: several maps of all classes. All of it is linear and
separable, so it is one matrix for the rows and one for the columns, with few nonzeros. A block of
pixels is computed from the few logits that it depends on and reduced to classes at once.
"""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..fused.resampling import neighbors

CPU_BLOCK, GPU_BLOCK = (32, 64), (128, 512)
"""Height and width of the blocks, in pixels."""


Windows = tuple[tuple[int, int], ...]
"""First and last + 1 pixel of each window, in one direction."""


class Axis(NamedTuple):
    """How one direction of the class map follows from that of the windows' logits.

    Args:
        windows: First and last + 1 pixel of each window in the padded image.
        length: Logits of each window.
        align_corners: As for F.interpolate.
        crop: First and last + 1 pixel of the padded image that belongs to the image.
        flipped: Whether the image was flipped in this direction.
        out: Pixels of the class map.
    """

    windows: Windows
    length: int
    align_corners: bool
    crop: tuple[int, int]
    flipped: bool
    out: int

    def block(self, start: int, stop: int) -> tuple[slice, np.ndarray]:
        """The logits, counted over all windows, that pixels of the class map are computed from.

        Returns:
            The range of the logits, and their weights, (stop - start, logits), in fp32.
        """
        first, last = self.crop
        low, high, weight = neighbors(last - first, self.out, self.align_corners,
                                      slice(start, stop))
        begin, end = int(low.min()), int(high.max()) + 1
        cropped = np.arange(begin, end)
        padded = last - 1 - cropped if self.flipped else first + cropped
        used = [i for i, (a, b) in enumerate(self.windows)
                if a <= padded.max() and padded.min() < b]
        offset = used[0] * self.length
        merge = np.zeros((end - begin, (used[-1] + 1 - used[0]) * self.length))
        count = np.zeros(end - begin)
        for i in used:
            a, b = self.windows[i]
            left, right, share = neighbors(self.length, b - a, self.align_corners)
            inside = np.flatnonzero((a <= padded) & (padded < b))
            local, column = padded[inside] - a, i * self.length - offset
            count[inside] += 1
            merge[inside, column + left[local]] += 1 - share[local]
            merge[inside, column + right[local]] += share[local]
        merge /= count[:, None]
        weights = (1 - weight)[:, None] * merge[low - begin] + weight[:, None] * merge[high - begin]
        nonzero = np.flatnonzero(weights.any(0))
        first, last = int(nonzero[0]), int(nonzero[-1]) + 1
        return (slice(offset + first, offset + last),
                weights[:, first:last].astype(np.float32))


def class_rows(logits_of: Callable[[int], Tensor], first: dict[int, Tensor], rows: Axis,
               columns: Axis, classify: Callable[[Tensor], Tensor]
               ) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of a class map, from the top.

    Args:
        logits_of: The logits of a row of windows, (H, W of all windows side by side, classes).
            Called in order, once for each; of the rows before, only what overlaps is kept.
        first: Those that are known already; changed.
        rows: The vertical direction.
        columns: The horizontal direction.
        classify: Logits (..., classes) → classes (...).

    Yields:
        The rows, and their classes (rows, W).
    """
    device = next(iter(first.values())).device
    kept = first  # a copy would keep the first row for as long as the caller's
    tops = dict.fromkeys(kept, 0)  # how much of each row is gone
    height, width = CPU_BLOCK if device.type == 'cpu' else GPU_BLOCK
    blocks = axis_blocks(columns, width, device)
    for lines, used, matrix in axis_blocks(rows, height, device):
        needed = range(used.start // rows.length, (used.stop - 1) // rows.length + 1)
        for i in list(kept):
            if i not in needed:
                del kept[i]
        for i in needed:
            if i in kept:
                continue
            for above in () if rows.flipped else kept:
                top = max(used.start - above * rows.length, 0)
                kept[above] = kept[above][top - tops[above]:].clone()
                tops[above] = top
            kept[i], tops[i] = logits_of(i), 0
        source = torch.cat([
            kept[i][max(used.start - i * rows.length, 0) - tops[i]:
                    used.stop - i * rows.length - tops[i]]
            for i in needed]).float()
        out = None
        with torch.autocast(device.type, enabled=False):  # interpolation and averages in fp32
            for block, logits, values in blocks:
                part = torch.matmul(values, source[:, logits])  # (logits' rows, block, classes)
                pixels = (matrix @ part.flatten(1)).view(-1, *part.shape[1:])
                classes = classify(pixels)
                if out is None:
                    out = classes.new_empty(len(classes), columns.out)
                out[:, block] = classes
        assert out is not None
        yield lines, out


def axis_blocks(axis: Axis, size: int, device: torch.device
                ) -> list[tuple[slice, slice, Tensor]]:
    """Blocks of an axis: pixels, the logits that they are computed from, and the weights."""
    return [(pixels, used, torch.from_numpy(weights).to(device))
            for pixels, used, weights in _blocks(axis, size)]


@functools.lru_cache(maxsize=16)  # images of one size share them
def _blocks(axis: Axis, size: int) -> list[tuple[slice, slice, np.ndarray]]:
    ranges = [(start, min(start + size, axis.out)) for start in range(0, axis.out, size)]
    return [(slice(start, stop), *axis.block(start, stop)) for start, stop in ranges]


def window_starts(length: int, crop: int, stride: int) -> Windows:
    """First and last + 1 pixel of each window, as mmseg's slide mode places them."""
    count = max(length - crop + stride - 1, 0) // stride + 1
    ends = [min(i * stride + crop, length) for i in range(count)]
    return tuple((max(end - crop, 0), end) for end in ends)
