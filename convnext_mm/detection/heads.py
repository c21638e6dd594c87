"""mmdet's neck and heads on the fast path: fused convolutions, and maps in channels_last."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models import dense_heads, necks
from mmdet.models.roi_heads import bbox_heads, mask_heads
from torch import Tensor, nn

from ..fused.conv_module import FusedConv2d, fuse_conv_modules
from ..fused.layers import FusedLinear
from ..registry import MODELS


@MODELS.register_module()
class FPN(necks.FPN):
    """mmdet's FPN (Lin et al., "Feature Pyramid Networks", 2017).

    Args:
        channels_last: Whether the maps are in channels_last inside, and returned so. mmcv's
            compiled operators, such as its RoIAlign, would return wrong results for them.
        args: As for mmdet's FPN.
        kwargs: As for mmdet's FPN.
    """

    def __init__(self, *args: Any, channels_last: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.channels_last = channels_last
        fuse_conv_modules(self)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps of the backbone → ``num_outs`` maps (N, out_channels, H_i, W_i)."""
        if self.channels_last:
            inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        return super().forward(tuple(inputs))


@MODELS.register_module()
class RPNHead(dense_heads.RPNHead):
    """mmdet's RPNHead (Ren et al., "Faster R-CNN", 2015)."""

    def _init_layers(self) -> None:
        super()._init_layers()
        if type(self.rpn_conv) is nn.Conv2d:
            self.rpn_conv.__class__ = FusedConv2d
        fuse_conv_modules(self)


class FusedBBoxHead(bbox_heads.ConvFCBBoxHead):
    """A box head whose convolutions and linear layers are fused.

    Args:
        args: As for mmdet's head.
        kwargs: As for mmdet's head.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fuse_conv_modules(self)
        for layer in (*self.shared_fcs, *self.cls_fcs, *self.reg_fcs):
            if type(layer) is nn.Linear:
                layer.__class__ = FusedLinear


@MODELS.register_module()
class ConvFCBBoxHead(FusedBBoxHead):
    """mmdet's ConvFCBBoxHead."""


@MODELS.register_module()
class Shared2FCBBoxHead(FusedBBoxHead, bbox_heads.Shared2FCBBoxHead):
    """mmdet's Shared2FCBBoxHead."""


@MODELS.register_module()
class FCNMaskHead(mask_heads.FCNMaskHead):
    """mmdet's FCNMaskHead (He et al., "Mask R-CNN", 2017).

    Args:
        args: As for mmdet's head.
        kwargs: As for mmdet's head.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fuse_conv_modules(self)
