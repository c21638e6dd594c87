"""The two operators of detectors that PyTorch's exporters have no name for.

In PyTorch they call mmcv's; in ONNX they are the standard RoiAlign and NonMaxSuppression.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op('convnext_mm::roi_align', mutates_args=())
def roi_align(x: Tensor, boxes: Tensor, batch: Tensor, scale: float, size: int, sampling: int,
              aligned: bool) -> Tensor:
    """RoIAlign (He et al., "Mask R-CNN", 2017) of a map (N, C, H, W), averaging.

    Args:
        x: The map.
        boxes: (K, 4), in pixels of the image.
        batch: (K,): the image of each box.
        scale: Pixels of the map per pixel of the image.
        size: Bins in both directions.
        sampling: Samples per bin in both directions; 0: one per pixel of the map.
        aligned: Whether pixels have their centers at .5.

    Returns:
        (K, C, size, size).
    """
    from mmcv.ops import roi_align as operator
    rois = torch.cat([batch[:, None].to(boxes), boxes], 1)
    return operator(x.contiguous(), rois, (size, size), scale, sampling, 'avg', aligned)


@roi_align.register_fake
def _(x: Tensor, boxes: Tensor, batch: Tensor, scale: float, size: int, sampling: int,
      aligned: bool) -> Tensor:
    return x.new_empty(boxes.shape[0], x.shape[1], size, size)


@torch.library.custom_op('convnext_mm::nms_mask', mutates_args=())
def nms_mask(boxes: Tensor, scores: Tensor, limit: int, iou: float, threshold: float) -> Tensor:
    """Non-maximum suppression in each image and class, with a result of known shape.

    Args:
        boxes: (B, N, 4).
        scores: (B, C, N).
        limit: Boxes to keep at most in each image and class.
        iou: Of two boxes that overlap more than this, the one with the lower score is dropped.
        threshold: Boxes with this score or less are dropped.

    Returns:
        (B, C, N): 1 where a box is kept, else 0.
    """
    from mmcv.ops import nms
    keep = torch.zeros_like(scores)
    for image, by_class in enumerate(scores):
        for label, one in enumerate(by_class):
            above = (one > threshold).nonzero()[:, 0]
            if len(above):
                _, kept = nms(boxes[image][above].contiguous(), one[above].contiguous(), iou)
                keep[image, label, above[kept[:limit]]] = 1
    return keep


@nms_mask.register_fake
def _(boxes: Tensor, scores: Tensor, limit: int, iou: float, threshold: float) -> Tensor:
    return torch.empty_like(scores)


def onnx_translations() -> dict[Any, Callable[..., Any]]:
    """From an operator to what it is in ONNX, for ``torch.onnx.export``."""
    from onnxscript import opset18  # type: ignore[import-not-found,unused-ignore]
    op: Any = opset18  # a constant's declared type is not known to be the one that is expected

    def onnx_roi_align(x: Any, boxes: Any, batch: Any, scale: float, size: int, sampling: int,
                       aligned: bool) -> Any:
        mode = 'half_pixel' if aligned else 'output_half_pixel'
        return op.RoiAlign(x, boxes, batch, coordinate_transformation_mode=mode, mode='avg',
                           output_height=size, output_width=size, sampling_ratio=sampling,
                           spatial_scale=scale)

    def onnx_nms_mask(boxes: Any, scores: Any, limit: int, iou: float, threshold: float) -> Any:
        kept = op.NonMaxSuppression(
            boxes, scores, op.Constant(value_ints=[limit]), op.Constant(value_floats=[iou]),
            op.Constant(value_floats=[threshold]), center_point_box=0)
        ones = op.Expand(op.Constant(value_float=1.0),
                         op.Gather(op.Shape(kept), op.Constant(value_ints=[0])))
        return op.ScatterND(op.Mul(scores, op.Constant(value_float=0.0)), kept, ones)

    return {torch.ops.convnext_mm.roi_align.default: onnx_roi_align,
            torch.ops.convnext_mm.nms_mask.default: onnx_nms_mask}
