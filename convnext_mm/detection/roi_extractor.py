"""mmdet's RoI extractor with boxes in fp32 and features in channels_last."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads import roi_extractors
from torch import Tensor

from ..fused.layers import has_hooks
from ..ops.roi import Pooling, roi_align_pyramid
from ..registry import MODELS


@MODELS.register_module()
class SingleRoIExtractor(roi_extractors.SingleRoIExtractor):
    """mmdet's SingleRoIExtractor, which gives boxes the dtype of the maps: bf16 is pixels off.

    On a CPU it pools all levels into one tensor in channels_last, from maps of any layout and
    dtype. Where others need to see the layers, and on a GPU, mmcv's layers run, in fp32.
    """

    takes_any_map = True
    """Of any dtype and layout."""

    def forward(self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
                ) -> Tensor:
        """Maps (N, C, H_i, W_i) and boxes (K, 5) → (K, C, bins, bins), in the maps' dtype."""
        feats = feats[:len(self.roi_layers)]
        pooling, *others = {self._pooling(layer, feats[0]) for layer in self.roi_layers}
        if pooling is None or others or not len(rois):
            dtype = feats[0].dtype
            if dtype in (torch.bfloat16, torch.float16):
                feats = [x.float() for x in feats]
            return super().forward([x.contiguous() for x in feats], rois, roi_scale_factor
                                   ).to(dtype)
        levels = self.map_roi_levels(rois, len(feats))
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        return roi_align_pyramid(feats, rois, levels,
                                 [layer.spatial_scale for layer in self.roi_layers], pooling)

    def _pooling(self, layer: Any, x: Tensor) -> Pooling | None:
        """The settings of a layer that :func:`roi_align_pyramid` may replace, or None."""
        if (not x.is_cpu or x.is_meta or type(layer) is not RoIAlign or layer.pool_mode != 'avg'
                or layer.use_torchvision or has_hooks(layer) or torch.jit.is_tracing()
                or torch.compiler.is_compiling()):
            return None
        return Pooling(tuple(layer.output_size), layer.sampling_ratio, layer.aligned)
