"""Overlaps and non-maximum suppression of boxes (x1, y1, x2, y2).

The functions have the signatures of mmcv's extension, and its order of operations: the same boxes
are kept, in the same order, down to the rounding of an overlap that equals the threshold. They are
sequential, so they compute on the CPU, unless torchvision has a kernel for the GPU.
"""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import torchvision

FEW = 700
"""Boxes up to which torchvision's suppression is used on a CPU."""
BLOCK = 128
"""Boxes that are compared with each other before they are compared with all that follow."""
LATER = np.triu(np.ones((BLOCK, BLOCK), bool), 1)
"""Whether the column's box has a lower score than the row's, in a block."""
TILE = 2**16
"""Overlaps computed at once, few enough to stay in a processor's cache."""


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: (K, 4). A box with NaN is kept and removes none.
        scores: (K,).
        iou_threshold: A box that overlaps more with a kept box of higher score is removed.
        offset: Added to width and height: 1 if x2 and y2 are the last pixels of a box, else 0.

    Returns:
        Indices of the kept boxes by descending score, int64.

    Raises:
        ValueError: The tensors have the wrong shapes, or are on different devices.
    """
    _check(boxes, scores)
    threshold = float(np.float32(iou_threshold))
    order = scores.sort(0, descending=True)[1]
    boxes = boxes[order]
    # On a CPU, torchvision compares box after box as mmcv does, which is faster only for few.
    compiled = torchvision.operators() if not offset and (
        boxes.is_cuda or len(boxes) <= FEW) else None
    if compiled:
        # In our order: torchvision's sort orders equal scores in another way.
        ranks = torch.arange(len(boxes), 0, -1, device=boxes.device)
        boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
        return order[compiled.nms(boxes, ranks.to(boxes), threshold)]
    return order[torch.from_numpy(_keep(_array(boxes), threshold, offset)).to(order.device)]


def softnms(boxes: Tensor, scores: Tensor, dets: Tensor, iou_threshold: float, sigma: float,
            min_score: float, method: int, offset: int) -> Tensor:
    """Non-maximum suppression that lowers scores (Bodla et al., Soft-NMS, equations 2 and 3).

    Args:
        boxes: (K, 4).
        scores: (K,).
        dets: (K, 5); its first rows become the kept boxes and their new scores.
        iou_threshold: Overlap from which scores are lowered, except with method 2.
        sigma: Width of the Gaussian.
        min_score: Boxes whose score falls below it are removed.
        method: 0: scores become 0; 1: they are multiplied by 1 - overlap; 2: by
            exp(-overlap² / sigma).
        offset: As in :func:`nms`.

    Returns:
        Indices of the kept boxes by descending new score, int64.

    Raises:
        ValueError: See :func:`nms`.
    """
    _check(boxes, scores)
    array, score = _array(boxes).copy(), _array(scores).copy()
    threshold, width, lowest = (array.dtype.type(v) for v in (iou_threshold, sigma, min_score))
    index, n, i = np.arange(len(array)), len(array), 0
    areas = _areas(array.T, offset)
    columns = array, score, index, areas
    while i < n:
        best = i + int(np.argmax(score[i:n]))
        for column in columns:
            column[[i, best]] = column[[best, i]]
        rest = slice(i + 1, n)
        overlap = _overlaps(array[i, :, None], areas[i], array[rest].T, areas[rest], offset)
        overlap[np.isnan(overlap)] = 0  # both boxes are empty
        if method == 2:
            weight = np.exp(-(overlap * overlap) / width)
        else:
            lowered = 1 - overlap if method == 1 else np.zeros_like(overlap)
            weight = np.where(overlap >= threshold, lowered, np.ones_like(overlap))
        score[rest] *= weight
        # As in mmcv, the last boxes fill the places of removed ones, which decides among equals.
        alive = ~(score[rest] < lowest)
        n = i + 1 + int(alive.sum())
        holes = i + 1 + np.flatnonzero(~alive[:n - i - 1])
        fillers = i + 1 + np.flatnonzero(alive)[::-1][:len(holes)]
        for column in columns:
            column[holes] = column[fillers]
        i += 1
    dets[:n, :4] = torch.from_numpy(array[:n]).to(dets)
    dets[:n, 4] = torch.from_numpy(score[:n]).to(dets)
    return torch.from_numpy(index[:n]).to(boxes.device)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Group boxes by the kept box that removes them.

    Args:
        dets: (K, 5), boxes and scores.
        iou_threshold: A box that overlaps as much or more with a kept box joins its group.

    Returns:
        For each kept box by descending score: its index, then those of the boxes that it removes.

    Raises:
        ValueError: See :func:`nms`.
    """
    _check(dets[:, :4], dets[:, 4])
    threshold = np.float32(iou_threshold)
    left = dets[:, 4].sort(0, descending=True)[1].cpu().numpy()
    boxes = _array(dets)[left, :4].T
    groups = []
    while len(left):
        areas = _areas(boxes, 0)
        overlap = _overlaps(boxes[:, :1], areas[0], boxes[:, 1:], areas[1:], 0)
        joins = overlap >= threshold
        groups.append([int(left[0]), *left[1:][joins].tolist()])
        left, boxes = left[1:][~joins], boxes[:, 1:][:, ~joins]
    return groups


def bbox_overlaps(bboxes1: Tensor, bboxes2: Tensor, ious: Tensor, mode: int, aligned: bool,
                  offset: int) -> None:
    """Overlaps of boxes; writes ``ious``.

    Args:
        bboxes1: (M, 4).
        bboxes2: (K, 4); if ``aligned``, (M, 4).
        ious: (M, K); if ``aligned``, (M,).
        mode: 0 divides the intersection by the union, 1 by the area of the first box.
        aligned: Whether to compare boxes pairwise, instead of each with each.
        offset: As in :func:`nms`.
    """
    first = bboxes1 if aligned else bboxes1[:, None]
    low = torch.maximum(first[..., :2], bboxes2[..., :2])
    high = torch.minimum(first[..., 2:], bboxes2[..., 2:])
    intersection = (high - low + offset).clamp(min=0).prod(-1)
    area = (first[..., 2:] - first[..., :2] + offset).prod(-1)
    if mode == 0:
        area = area + (bboxes2[..., 2:] - bboxes2[..., :2] + offset).prod(-1) - intersection
    ious.copy_(intersection / area)


def _check(boxes: Tensor, scores: Tensor) -> None:
    """Check shapes and devices.

    Raises:
        ValueError: They do not fit together.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4 or scores.shape != boxes.shape[:1]:
        raise ValueError('Expected boxes of shape (K, 4) and scores of shape (K,), got '
                         f'{tuple(boxes.shape)} and {tuple(scores.shape)}')
    if boxes.device != scores.device:
        raise ValueError(f'Boxes are on {boxes.device}, but scores are on {scores.device}')


def _array(values: Tensor) -> np.ndarray:
    """Copy to NumPy if needed, half precision and integers as float32."""
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    return values.detach().to('cpu', dtype).numpy()


def _areas(boxes: np.ndarray, offset: int) -> np.ndarray:
    """Areas (K,) of boxes (4, K)."""
    shift = boxes.dtype.type(offset)
    return (boxes[2] - boxes[0] + shift) * (boxes[3] - boxes[1] + shift)


def _overlaps(boxes: np.ndarray, areas: np.ndarray, others: np.ndarray, other_areas: np.ndarray,
              offset: int) -> np.ndarray:
    """Intersection over union of boxes (4, ...) with others, broadcast; NaN if both are empty."""
    shift = boxes.dtype.type(offset)
    width = np.minimum(boxes[2], others[2])
    width -= np.maximum(boxes[0], others[0])
    height = np.minimum(boxes[3], others[3])
    height -= np.maximum(boxes[1], others[1])
    if offset:
        width += shift
        height += shift
    np.maximum(width, 0, out=width)
    np.maximum(height, 0, out=height)
    width *= height
    union = np.add(areas, other_areas, out=height)
    union -= width
    with np.errstate(divide='ignore', invalid='ignore'):
        return np.divide(width, union, out=width)


def _keep(boxes: np.ndarray, threshold: float, offset: int) -> np.ndarray:
    """Whether greedy suppression keeps each of the boxes (K, 4), sorted by descending score."""
    columns = np.ascontiguousarray(boxes.T)
    keep = np.ones(len(boxes), bool)
    for group in _separate_groups(columns, offset) if threshold >= 0 else [np.arange(len(boxes))]:
        _remove(columns[:, group], boxes.dtype.type(threshold), offset, group, keep)
    return keep


def _separate_groups(boxes: np.ndarray, offset: int) -> list[np.ndarray]:
    """Split boxes (4, K) into groups that do not overlap each other, as boxes shifted by class do.

    Returns:
        Ascending indices of each group. Small groups are put together.
    """
    count = boxes.shape[1]
    if count <= BLOCK:
        return [np.arange(count)]
    order = np.argsort(boxes[0], kind='stable')
    reach = np.maximum.accumulate(boxes[2, order])
    cuts = 1 + np.flatnonzero(reach[:-1] - boxes[0, order[1:]] + boxes.dtype.type(offset) <= 0)
    groups, first = [], 0
    while first < count:
        at = np.searchsorted(cuts, first + BLOCK)
        last = int(cuts[at]) if at < len(cuts) else count
        groups.append(np.sort(order[first:last]))
        first = last
    return groups


def _remove(boxes: np.ndarray, threshold: np.floating, offset: int, index: np.ndarray,
            keep: np.ndarray) -> None:
    """Set ``keep[index]`` to False for the boxes (4, K) that greedy suppression removes."""
    areas = _areas(boxes, offset)
    while len(index):
        block, area = boxes[:, :BLOCK, None], areas[:BLOCK, None]
        over = _overlaps(block, area, boxes[:, :BLOCK], areas[:BLOCK], offset) > threshold
        over &= LATER[:len(area), :len(area)]
        removed = _removed(over)
        keep[index[:BLOCK][removed]] = False
        block, area = block[:, ~removed], area[~removed]
        index, boxes, areas = index[BLOCK:], boxes[:, BLOCK:], areas[BLOCK:]
        step = max(TILE // len(area), 1)
        free = np.ones(len(index), bool)
        for first in range(0, len(index), step):
            part = slice(first, first + step)
            over = _overlaps(block, area, boxes[:, part], areas[part], offset) > threshold
            free[part] = ~over.any(0)
        keep[index[~free]] = False
        index, boxes, areas = index[free], boxes[:, free], areas[free]


def _removed(over: np.ndarray) -> np.ndarray:
    """Which boxes greedy suppression removes, given (K, K): whether row removes column if kept."""
    packed = np.packbits(over, axis=1, bitorder='little')
    removed = 0
    for i in np.flatnonzero(over.any(1)).tolist():
        if not removed >> i & 1:
            removed |= int.from_bytes(packed[i].tobytes(), 'little')
    data = np.frombuffer(removed.to_bytes(packed.shape[1], 'little'), np.uint8)
    return np.unpackbits(data, count=len(over), bitorder='little').astype(bool)
