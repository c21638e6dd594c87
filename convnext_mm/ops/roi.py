"""RoIAlign and RoIPool.

RoIAlign (He et al., Mask R-CNN, section 3) averages bilinear samples on a regular grid in each bin
of a box. The grid is a product of rows and columns, and so are the bilinear weights. With the
averaged weights of the rows Wy (bins × h) and of the columns Wx (bins × w), the output of a box is
Wy · crop · Wxᵀ, where crop (h × w) is the part of the map that its samples touch; the gradient is
Wyᵀ · grad · Wx. All channels have the same weights, so with channels last these are two dense
products a box.

The functions have the signatures of mmcv's extension, which write into tensors of the caller;
except :func:`roi_align_pyramid`, whose maps and output have channels last.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import torchvision

AVERAGE = 1
"""The ``pool_mode`` of mmcv's extension that averages; 0 takes the largest sample."""
CHUNK = 1024
"""Boxes whose weights are computed at once, which bounds the memory."""
MAX_SAMPLES = 2**22
"""Samples of one channel of a box that max pooling stores at most."""


class Weights(NamedTuple):
    """Weights of each box along the rows, or along the columns, of a map."""
    starts: list[int]
    """First index of the map that a sample touches."""
    sizes: list[int]
    """Number of indices from there; 0 if all samples are outside."""
    samples: list[int]
    """Samples a bin."""
    flat: Tensor
    """The matrices of all boxes, one after another."""
    offsets: list[int]
    """Where each of them starts."""
    rows: list[int]
    """Their rows: bins, for max pooling bins · samples."""

    def matrix(self, box: int) -> Tensor:
        """Return the weights (rows, size) of a box."""
        size = self.sizes[box]
        return self.flat.as_strided((self.rows[box], size), (size, 1), self.offsets[box])

    def part(self, boxes: slice) -> Weights:
        """Return those of some of the boxes."""
        return Weights(self.starts[boxes], self.sizes[boxes], self.samples[boxes], self.flat,
                       self.offsets[boxes], self.rows[boxes])


def roi_align_forward(input: Tensor, rois: Tensor, output: Tensor, argmax_y: Tensor,
                      argmax_x: Tensor, aligned_height: int, aligned_width: int,
                      spatial_scale: float, sampling_ratio: int, pool_mode: int,
                      aligned: bool) -> None:
    """RoIAlign; writes ``output``, and with max pooling ``argmax_y`` and ``argmax_x``.

    Args:
        input: Feature map (N, C, H, W) of any floating dtype and memory layout.
        rois: (K, 5) with image index, x1, y1, x2, y2.
        output: (K, C, aligned_height, aligned_width), contiguous.
        argmax_y: With max pooling, which row of a bin's samples has the largest, shaped as output.
        argmax_x: The same for its column.
        aligned_height: Rows of bins.
        aligned_width: Columns of bins.
        spatial_scale: Size of the map divided by the size of the image.
        sampling_ratio: Samples a bin along each axis; 0: ceil(size of the bin).
        pool_mode: 1 averages the samples of a bin, 0 takes the largest.
        aligned: Whether pixel centers lie at half coordinates, as they should.

    Raises:
        ValueError: A box is not finite, of an image that does not exist, aligned and of negative
            size, or with max pooling so large that its samples do not fit in memory.
    """
    compiled = _compiled(input, pool_mode)
    dtype = _working_dtype(input, bool(compiled))
    if compiled:
        output.copy_(compiled.roi_align(input.to(dtype), rois.to(dtype), spatial_scale,
                                        aligned_height, aligned_width, sampling_ratio, aligned))
        return
    if not len(rois):
        return
    bins, c = (aligned_height, aligned_width), input.shape[1]
    maps = _Maps(input, dtype)
    for first in range(0, len(rois), CHUNK):
        part = slice(first, first + CHUNK)
        images, rows, columns = _separate(rois[part].to(dtype), input.shape, bins, spatial_scale,
                                          sampling_ratio, aligned, pool_mode == AVERAGE)
        maps.rearrange(images, rows.sizes, columns.sizes)
        with _one_thread():
            for k, (image, h, w, target) in enumerate(zip(
                    images, rows.sizes, columns.sizes, output[part].flatten(2).unbind(),
                    strict=True)):
                if not h or not w:
                    target.zero_()
                    continue
                x = maps.crop(image, rows.starts[k], columns.starts[k], h, w)
                y = torch.mm(rows.matrix(k), x).view(-1, w, c)
                y = torch.bmm(columns.matrix(k).expand(len(y), -1, -1), y)
                if pool_mode == AVERAGE:
                    target.copy_(y.view(-1, c).t())
                    continue
                grid = rows.samples[k], columns.samples[k]
                y = y.view(bins[0], grid[0], bins[1], grid[1], c).permute(4, 0, 2, 1, 3)
                y, index = y.flatten(3).max(3)
                target.copy_(y.view(c, -1))
                argmax_y[first + k] = index // grid[1]
                argmax_x[first + k] = index % grid[1]


def roi_align_backward(grad_output: Tensor, rois: Tensor, argmax_y: Tensor, argmax_x: Tensor,
                       grad_input: Tensor, aligned_height: int, aligned_width: int,
                       spatial_scale: float, sampling_ratio: int, pool_mode: int,
                       aligned: bool) -> None:
    """Gradient of :func:`roi_align_forward`.

    Args:
        grad_output: (K, C, aligned_height, aligned_width).
        grad_input: (N, C, H, W), contiguous; zero before, the gradient after. The others are those
            of the forward pass.
    """
    n, c, height, width = grad_input.shape
    compiled = _compiled(grad_input, pool_mode)
    dtype = _working_dtype(grad_input, bool(compiled))
    if compiled:
        grad_input += compiled._roi_align_backward(
            grad_output.to(dtype), rois.to(dtype), spatial_scale, aligned_height, aligned_width,
            n, c, height, width, sampling_ratio, aligned)
        return
    if not len(rois):
        return
    bins = aligned_height, aligned_width
    gradients = _Gradients(grad_input, dtype)
    for first in range(0, len(rois), CHUNK):
        part = slice(first, first + CHUNK)
        images, rows, columns = _separate(rois[part].to(dtype), grad_input.shape, bins,
                                          spatial_scale, sampling_ratio, aligned,
                                          pool_mode == AVERAGE)
        gradients.rearrange(images, rows.sizes, columns.sizes)
        with _one_thread():
            for k, (image, h, w, g) in enumerate(zip(
                    images, rows.sizes, columns.sizes, grad_output[part].to(dtype).unbind(),
                    strict=True)):
                if not h or not w:
                    continue
                if pool_mode != AVERAGE:
                    g = _unpool(g, argmax_y[first + k], argmax_x[first + k], rows.samples[k],
                                columns.samples[k])
                y = torch.bmm(columns.matrix(k).t().expand(g.shape[1], -1, -1),
                              g.permute(1, 2, 0))
                gradients.add(image, rows.starts[k], columns.starts[k], rows.matrix(k).t(),
                              y.view(-1, w * c), w)
    gradients.write()


class Pooling(NamedTuple):
    """How boxes become features of one size."""
    bins: tuple[int, int]
    """Rows and columns."""
    sampling_ratio: int
    """Samples a bin along each axis; 0: ceil(size of the bin)."""
    aligned: bool
    """Whether pixel centers lie at half coordinates."""


def roi_align_pyramid(maps: Sequence[Tensor], rois: Tensor, levels: Tensor,
                      scales: Sequence[float], pooling: Pooling) -> Tensor:
    """RoIAlign of boxes that each belong to one of several maps, with averages, on a CPU.

    The boxes keep their dtype, and the products are in fp32, whatever the dtype of the maps.

    Args:
        maps: (N, C, H_i, W_i) of any floating dtype; fastest in channels_last.
        rois: (K, 5) with image index, x1, y1, x2, y2.
        levels: (K,), the index of each box's map.
        scales: Size of each map divided by the size of the image.
        pooling: Bins and samples.

    Returns:
        (K, C, bins), in channels_last and the dtype of the maps.

    Raises:
        ValueError: See :func:`roi_align_forward`.
    """
    indices = [torch.nonzero(levels == i)[:, 0].tolist() for i in range(len(maps))]
    return _PyramidFunction.apply(rois.detach(), indices, scales, pooling, *maps)


class _PyramidFunction(torch.autograd.Function):
    """:func:`roi_align_pyramid`, differentiable once with respect to the maps."""

    @staticmethod
    def forward(ctx: Any, rois: Tensor, indices: list[list[int]], scales: Sequence[float],
                pooling: Pooling, *maps: Tensor) -> Tensor:
        c, dtype = maps[0].shape[1], _working_dtype(maps[0])
        ctx.save_for_backward(rois)
        ctx.settings = indices, scales, pooling, [(x.shape, x.dtype) for x in maps]
        out = torch.empty(len(rois), *pooling.bins, c, dtype=maps[0].dtype)
        for x, inside, scale in zip(maps, indices, scales, strict=True):
            rearranged = _Maps(x, dtype)
            for k, image, row, column, (y0, x0, h, w) in _boxes(
                    rois, inside, x.shape, scale, pooling, rearranged):
                if row is None:
                    out[k].zero_()
                    continue
                crop = rearranged.crop(image, y0, x0, h, w)
                y = torch.mm(row, crop).view(-1, w, c)
                y = torch.bmm(column.expand(len(y), -1, -1), y)
                out[k] = y
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rois,), (indices, scales, pooling, maps) = ctx.saved_tensors, ctx.settings
        dtype = torch.promote_types(grad.dtype, torch.float32)
        grad = grad.permute(0, 2, 3, 1).to(dtype).contiguous()
        results: list[Tensor | None] = []
        for (shape, kind), inside, scale, needed in zip(
                maps, indices, scales, ctx.needs_input_grad[4:], strict=True):
            if not needed:
                results.append(None)
                continue
            n, c, height, width = shape
            total = grad.new_zeros(n, height, width, c)
            for k, image, row, column, (y0, x0, h, w) in _boxes(
                    rois, inside, shape, scale, pooling):
                if row is None:
                    continue
                y = torch.bmm(column.t().expand(len(row), -1, -1), grad[k])
                target = total[image].as_strided(
                    (h, w * c), (width * c, 1),
                    total.storage_offset() + ((image * height + y0) * width + x0) * c)
                target.addmm_(row.t(), y.view(-1, w * c))
            results.append(total.to(kind).permute(0, 3, 1, 2))
        return None, None, None, None, *results


def _boxes(rois: Tensor, inside: list[int], shape: Sequence[int], scale: float, pooling: Pooling,
           maps: _Maps | None = None) -> Iterator[tuple[
               int, int, Any, Any, tuple[int, int, int, int]]]:
    """Each box of one map: its index, image, weights of rows and columns, and crop (y, x, h, w).

    Weights are None where the box is outside. ``maps`` are rearranged as the boxes need them.
    """
    for first in range(0, len(inside), CHUNK):
        part = inside[first:first + CHUNK]
        images, rows, columns = _separate(
            rois[part].to(_working_dtype(rois)), tuple(shape), pooling.bins, scale,
            pooling.sampling_ratio, pooling.aligned, True)
        if maps is not None:
            maps.rearrange(images, rows.sizes, columns.sizes)
        with _one_thread():
            for i, k in enumerate(part):
                h, w = rows.sizes[i], columns.sizes[i]
                empty = not h or not w
                yield (k, images[i], None if empty else rows.matrix(i),
                       None if empty else columns.matrix(i),
                       (rows.starts[i], columns.starts[i], h, w))


def _compiled(features: Tensor, pool_mode: int) -> Any | None:
    """torchvision's operators where they are used: on GPUs, since ours are faster on CPUs."""
    return torchvision.operators() if features.is_cuda and pool_mode == AVERAGE else None


def _working_dtype(features: Tensor, compiled: bool = False) -> torch.dtype:
    """The dtype to compute in: boxes of half precision would be pixels off, and sums inexact.

    torchvision's kernels compute fp16 as it is, and have no bf16.
    """
    if features.dtype == torch.float64 or (compiled and features.dtype == torch.float16):
        return features.dtype
    return torch.float32


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread, since the products of a box are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Rearranged:
    """Maps (N, C, H, W), and those with channels last that many boxes use.

    Rearranging a map costs about as much as copying it, so it is done where the boxes' crops are
    larger than the map.

    Args:
        maps: The maps.
        dtype: The dtype of those with channels last.
    """

    def __init__(self, maps: Tensor, dtype: torch.dtype) -> None:
        self.maps, self.dtype = maps, dtype
        self.rearranged: dict[int, Tensor] = {}

    def rearrange(self, images: list[int], heights: list[int], widths: list[int]) -> None:
        """Rearrange the maps for which this pays, given the image and size of each crop."""
        areas: dict[int, int] = {}
        for image, h, w in zip(images, heights, widths, strict=True):
            areas[image] = areas.get(image, 0) + h * w
        c, height, width = self.maps.shape[1:]
        for image, area in areas.items():
            if image not in self.rearranged and area >= height * width:
                self.rearranged[image] = self.channels_last(image).view(height, width, c)

    def channels_last(self, image: int) -> Tensor:
        """Return the map (H · W, C) of an image."""
        # PyTorch transposes two dimensions much faster than three.
        return self.maps[image].flatten(1).t().to(self.dtype).contiguous()

    def view(self, map_: Tensor, y: int, x: int, h: int, w: int) -> Tensor:
        """Return the crop (h, w · C) of a map with channels last, without a copy."""
        width, c = map_.shape[1:]
        return map_.as_strided((h, w * c), (width * c, 1),
                               map_.storage_offset() + (y * width + x) * c)


class _Maps(_Rearranged):
    """Feature maps, from which crops are read."""

    def __init__(self, maps: Tensor, dtype: torch.dtype) -> None:
        super().__init__(maps, dtype)
        if maps.dtype == dtype and maps.is_contiguous(memory_format=torch.channels_last):
            self.rearranged = dict(enumerate(maps.permute(0, 2, 3, 1)))

    def crop(self, image: int, y: int, x: int, h: int, w: int) -> Tensor:
        """Return the crop (h, w · C) at row y and column x."""
        map_ = self.rearranged.get(image)
        if map_ is None:
            crop = self.maps[image, :, y:y + h, x:x + w].permute(1, 2, 0)
            return crop.to(self.dtype).reshape(h, -1)
        return self.view(map_, y, x, h, w)


class _Gradients(_Rearranged):
    """Gradients of maps, to which gradients of crops are added."""

    def channels_last(self, image: int) -> Tensor:
        return self.maps.new_zeros(self.maps[0].numel(), dtype=self.dtype)

    def add(self, image: int, y: int, x: int, left: Tensor, right: Tensor, w: int) -> None:
        """Add left · right (h, w · C) to the crop of width w at row y and column x."""
        map_ = self.rearranged.get(image)
        if map_ is None:
            product = torch.mm(left, right).view(len(left), w, -1).permute(2, 0, 1)
            self.maps[image, :, y:y + len(left), x:x + w] += product
        else:
            self.view(map_, y, x, len(left), w).addmm_(left, right)

    def write(self) -> None:
        """Write the gradients with channels last to the maps."""
        for image, map_ in self.rearranged.items():
            target = self.maps[image].flatten(1)
            target.copy_(map_.view(-1, map_.shape[2]).t())


def _check_rois(rois: np.ndarray, images: int) -> None:
    """Check what would read outside the memory or compute nonsense.

    Raises:
        ValueError: A box is not finite, or of an image that does not exist.
    """
    if not np.isfinite(rois).all():
        bad = np.nonzero(~np.isfinite(rois).all(1))[0][0]
        raise ValueError(f'RoI {bad} is not finite: {rois[bad].tolist()}')
    low, high = rois[:, 0].min(), rois[:, 0].max()
    if low < 0 or high >= images:
        raise ValueError(f'RoIs have image indices from {low:g} to {high:g}, but there are '
                         f'{images} images')


def _separate(rois: Tensor, shape: tuple[int, ...], bins: tuple[int, int], scale: float,
              sampling_ratio: int, aligned: bool, average: bool
              ) -> tuple[list[int], Weights, Weights]:
    """Return the image, the weights of the rows and the weights of the columns of each box.

    They are computed with NumPy, whose operations on small arrays take less time than PyTorch's,
    and on a GPU need one copy there and back.

    Raises:
        ValueError: See :func:`roi_align_forward`.
    """
    k, array = len(rois), rois.detach().cpu().numpy()
    _check_rois(array, shape[0])
    corners = array[:, 1:] * array.dtype.type(scale)
    if aligned:
        corners -= array.dtype.type(0.5)
    start, extent = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        extent = np.maximum(extent, 1)
    elif (extent < 0).any():
        bad = np.nonzero((extent < 0).any(1))[0][0]
        raise ValueError(f'RoI {bad} has a negative size: {array[bad].tolist()}')
    # Rows of all boxes first, then columns, so that both take the same few operations.
    both = _weights(start[:, ::-1].T.ravel(), extent[:, ::-1].T.ravel(), np.repeat(bins, k),
                    np.repeat(shape[2:], k), sampling_ratio, average, rois.device)
    rows, columns = both.part(slice(k)), both.part(slice(k, None))
    if not average:
        for a, b, h, w in zip(rows.samples, columns.samples, rows.sizes, columns.sizes,
                              strict=True):
            if h and w and a * b * bins[0] * bins[1] > MAX_SAMPLES:
                raise ValueError(f'A RoI has {a} × {b} samples a bin; clip it to the image')
    return array[:, 0].astype(int).tolist(), rows, columns


def _weights(start: np.ndarray, extent: np.ndarray, bins: np.ndarray, length: np.ndarray,
             sampling_ratio: int, average: bool, device: torch.device) -> Weights:
    """Bilinear weights of intervals along an axis, with the roundings of mmcv's operator.

    A sample further than 1 outside the map counts as 0; others are clamped to it.

    Args:
        start: (K,) first coordinate of each interval, in pixels of the map.
        extent: (K,) its length.
        bins: (K,) its number of bins.
        length: (K,) size of the map along the axis.
        sampling_ratio: Samples a bin; 0: ceil(extent / bins).
        average: Whether to average the samples of a bin, or to return each.
        device: Where the weights are needed.
    """
    dtype = start.dtype
    width = extent / bins.astype(dtype)
    samples = np.full_like(bins, sampling_ratio)
    if sampling_ratio <= 0:
        samples = np.ceil(np.minimum(width, 2**40)).astype(np.int64)
    # Of the samples j = bin · samples + sample, take those that can be inside: a huge box has far
    # more. Rounding moves a sample by a few units in the last place of the coordinates.
    total = bins * samples
    step = np.maximum(extent.astype(np.float64) / np.maximum(total, 1), 1e-30)
    slack = 4 * np.finfo(dtype).eps * (np.abs(start) + extent).astype(np.float64)
    edges = np.stack([(-1 - slack - start) / step - 1, (length + slack - start) / step + 1])
    first, last = np.minimum(np.maximum(edges, 0), total).astype(np.int64)
    counts = np.maximum(last - first, 0)

    box = np.repeat(np.arange(len(start)), counts)
    j = np.arange(len(box)) - (np.cumsum(counts) - counts - first)[box]
    grid = samples[box]
    bin_ = j // grid
    part = (j - bin_ * grid).astype(dtype) + dtype.type(0.5)
    size = width[box]
    position = start[box] + bin_.astype(dtype) * size + part * size / grid.astype(dtype)
    limit = length[box]
    inside = (position >= -1) & (position <= limit)
    if not inside.all():
        position, limit, box, j, grid, bin_ = (
            array[inside] for array in (position, limit, box, j, grid, bin_))
    limit = limit - 1
    position = np.minimum(np.maximum(position, 0), limit.astype(dtype))
    low = position.astype(np.int64)
    high = np.minimum(low + 1, limit)
    fraction = position - low.astype(dtype)

    begin, sizes = np.zeros_like(length), np.zeros_like(length)
    if len(box):
        heads = np.flatnonzero(np.concatenate([[True], box[1:] != box[:-1]]))
        present = box[heads]
        begin[present] = np.minimum.reduceat(low, heads)
        sizes[present] = np.maximum.reduceat(high, heads) + 1 - begin[present]
    entries = sizes * (bins if average else total)
    offsets = np.cumsum(entries) - entries
    entry = (offsets - begin)[box] + (bin_ if average else j) * sizes[box]
    share = 1 / grid if average else 1.0
    flat = np.bincount(np.concatenate([entry + low, entry + high]),
                       np.concatenate([(1 - fraction) * share, fraction * share]),
                       minlength=int(entries.sum())).astype(dtype)
    return Weights(begin.tolist(), sizes.tolist(), samples.tolist(),
                   torch.from_numpy(flat).to(device), offsets.tolist(),
                   (bins if average else total).tolist())


def _unpool(grad: Tensor, row: Tensor, column: Tensor, rows: int, columns: int) -> Tensor:
    """Put the gradient (C, bins, bins) of max pooling to the samples that were the largest.

    Args:
        grad: Gradient of the bins.
        row: Row in the grid of its bin of each largest sample, shaped as ``grad``.
        column: Its column.
        rows: Rows of samples a bin.
        columns: Columns of samples a bin.
    """
    c, height, width = grad.shape
    samples = grad.new_zeros(c, height, width, rows * columns)
    samples.scatter_(3, (row.long() * columns + column.long()).unsqueeze(3), grad.unsqueeze(3))
    samples = samples.view(c, height, width, rows, columns).permute(0, 1, 3, 2, 4)
    return samples.reshape(c, height * rows, width * columns)


def roi_pool_forward(input: Tensor, rois: Tensor, output: Tensor, argmax: Tensor,
                     pooled_height: int, pooled_width: int, spatial_scale: float) -> None:
    """RoIPool (Girshick, Fast R-CNN, section 2.1); writes ``output`` and ``argmax``.

    Args:
        input: Feature map (N, C, H, W).
        rois: (K, 5) with image index, x1, y1, x2, y2.
        output: (K, C, pooled_height, pooled_width): the largest value of each bin, 0 if it is
            empty.
        argmax: Its index in the flattened map, int32, -1 if the bin is empty.
        pooled_height: Rows of bins.
        pooled_width: Columns of bins.
        spatial_scale: Size of the map divided by the size of the image.

    Raises:
        ValueError: A box is not finite, or of an image that does not exist.
    """
    output.zero_()
    argmax.fill_(-1)
    if not len(rois):
        return
    array = rois.detach().to(_working_dtype(input)).cpu().numpy()
    _check_rois(array, len(input))
    height, width = input.shape[2:]
    scale = array.dtype.type(spatial_scale)
    start, end = array[:, 1:3] * scale, (array[:, 3:] + 1) * scale
    for k, image in enumerate(array[:, 0].astype(int)):
        if (end[k] <= start[k]).any():
            continue
        columns = _ranges(start[k, 0], end[k, 0], pooled_width, width)
        rows = _ranges(start[k, 1], end[k, 1], pooled_height, height)
        # The largest value of each row of a bin, then of the bin.
        for i, (left, right) in columns:
            values, at = input[image, :, :, left:right].max(2)
            for j, (top, bottom) in rows:
                largest, row = values[:, top:bottom].max(1)
                column = at[:, top:bottom].gather(1, row[:, None])[:, 0]
                output[k, :, j, i] = largest
                argmax[k, :, j, i] = (row + top) * width + column + left


def roi_pool_backward(grad_output: Tensor, rois: Tensor, argmax: Tensor, grad_input: Tensor,
                      pooled_height: int, pooled_width: int, spatial_scale: float) -> None:
    """Add the gradient of :func:`roi_pool_forward` to ``grad_input`` (N, C, H, W), contiguous.

    Args:
        grad_output: (K, C, pooled_height, pooled_width); the others as in the forward pass.
    """
    n, c = grad_input.shape[:2]
    total = grad_input.new_zeros(n * c, grad_input[0, 0].numel(), dtype=_working_dtype(grad_input))
    channel = rois[:, :1].long() * c + torch.arange(c, device=rois.device)
    valid = argmax >= 0
    index = (channel[:, :, None, None] * total.shape[1] + argmax)[valid]
    total.view(-1).index_add_(0, index, grad_output[valid].to(total.dtype))
    grad_input += total.view_as(grad_input)


def _ranges(start: np.floating, end: np.floating, bins: int, size: int
            ) -> list[tuple[int, tuple[int, int]]]:
    """Return (number, (first, last + 1)) of the equal bins of an interval that are not empty.

    Args:
        start: Coordinate where the interval starts.
        end: Coordinate where it ends.
        bins: How many bins it has.
        size: Size of the map, to which bins are clipped.
    """
    width = (end - start) / end.dtype.type(bins)
    edges = np.arange(bins + 1, dtype=end.dtype) * width + start
    first = np.clip(np.floor(edges[:-1]), 0, size).astype(int).tolist()
    last = np.clip(np.ceil(edges[1:]), 0, size).astype(int).tolist()
    return [(i, edge) for i, edge in enumerate(zip(first, last, strict=True)) if edge[0] < edge[1]]
