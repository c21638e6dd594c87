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


class WithFusedConvModules(nn.Module):
    """A base to put before a class of mmdet, whose ConvModules are then fused.

    Args:
        args: As for that class.
        kwargs: As for that class.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fuse_conv_modules(self)


@MODELS.register_module()
class FPN(WithFusedConvModules, necks.FPN):
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

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps of the backbone → ``num_outs`` maps (N, out_channels, H_i, W_i)."""
        if self.channels_last:
            inputs = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        return super().forward(tuple(inputs))


@MODELS.register_module()
class RPNHead(WithFusedConvModules, dense_heads.RPNHead):
    """mmdet's RPNHead (Ren et al., "Faster R-CNN", 2015)."""

    def _init_layers(self) -> None:
        super()._init_layers()
        if type(self.rpn_conv) is nn.Conv2d:
            self.rpn_conv.__class__ = FusedConv2d


@MODELS.register_module()
class ConvFCBBoxHead(WithFusedConvModules, bbox_heads.ConvFCBBoxHead):
    """mmdet's ConvFCBBoxHead, whose linear layers are fused as well.

    Args:
        args: As for mmdet's head.
        kwargs: As for mmdet's head.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        parts: list[Any] = [self.shared_fcs, self.cls_fcs, self.reg_fcs]
        for layers in parts:
            for layer in layers:
                if type(layer) is nn.Linear:
                    layer.__class__ = FusedLinear


@MODELS.register_module()
class Shared2FCBBoxHead(ConvFCBBoxHead, bbox_heads.Shared2FCBBoxHead):
    """mmdet's Shared2FCBBoxHead."""


@MODELS.register_module()
class FCNMaskHead(WithFusedConvModules, mask_heads.FCNMaskHead):
    """mmdet's FCNMaskHead (He et al., "Mask R-CNN", 2017)."""
