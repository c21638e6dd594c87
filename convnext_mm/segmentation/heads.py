"""mmseg's heads that upsample and concatenate maps, with convolutions at the maps' own size.

Where others need to see the layers (hooks, tracing, a replaced module), mmseg's code runs.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmseg.models import decode_heads
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.decode_heads.psp_head import PPM
from mmseg.models.losses import CrossEntropyLoss
from mmseg.models.utils import Upsample, resize
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from ..fused.activations import relu_add, relu_dropout
from ..fused.conv_module import accepts_pyramid, fuse_conv_modules
from ..fused.layers import has_hooks
from ..fused.packed import Packable
from ..registry import MODELS
from .losses import Settings, upsampled_cross_entropy

EPS = torch.finfo(torch.float32).eps
"""What mmseg adds to the number of pixels, which may be 0."""


class FusedHead(BaseDecodeHead):
    """A head whose ConvModules are :class:`convnext_mm.fused.conv_module.FusedConvModule`.

    Args:
        packed: Whether inference keeps weights with folded norms, in the layout that is fastest.
        args: As for mmseg's head.
        kwargs: As for mmseg's head.
    """

    def __init__(self, *args: Any, packed: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        fuse_conv_modules(self)
        for module in self.modules():
            if isinstance(module, Packable):
                module.packed = packed

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list[SegDataSample]
                     ) -> dict[str, Tensor]:
        """Logits (N, classes, h, w) → losses and accuracy, as mmseg computes them."""
        loss = self.loss_decode
        if not (seg_logits.is_cpu and type(loss) is CrossEntropyLoss and not has_hooks(loss)
                and not loss.use_sigmoid and not loss.use_mask and loss.reduction == 'mean'
                and loss.class_weight is None and self.sampler is None
                and isinstance(self.ignore_index, int) and not torch.compiler.is_compiling()):
            return super().loss_by_feat(seg_logits, batch_data_samples)
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1)
        total, correct = upsampled_cross_entropy(
            seg_logits, labels, Settings(self.align_corners, self.ignore_index))
        valid = int((labels != self.ignore_index).sum())
        count = valid if loss.avg_non_ignore else labels.numel()
        return {loss.loss_name: loss.loss_weight * total / (count + EPS),
                'acc_seg': ((correct + EPS) * (100.0 / (valid + EPS))).reshape(1)}


@MODELS.register_module()
class UPerHead(FusedHead, decode_heads.UPerHead):
    """mmseg's UPerHead (Xiao et al., "Unified Perceptual Parsing", 2018).

    Two thirds of UPerNet's multiplications are those of ``fpn_bottleneck`` on three upsampled maps.
    """

    def psp_forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The last map with its averages over regions of several sizes."""
        x = inputs[-1]
        pools = self.psp_modules
        if type(pools) is not PPM or has_hooks(pools) or not accepts_pyramid(self.bottleneck, x):
            return super().psp_forward(inputs)
        return self.bottleneck.of_pyramid([x, *(pool(x) for pool in pools)], tuple(x.shape[2:]),
                                          pools.align_corners)

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The backbone's maps → logits (N, classes, H, W)."""
        maps = self._transform_inputs(inputs)
        drop = self.dropout
        if not (self.training and torch.is_grad_enabled() and type(drop) is nn.Dropout2d
                and drop.training and 0 < drop.p < 1 and not has_hooks(drop)
                and _ends_with_relu(self.fpn_bottleneck, maps[0])):
            return super().forward(inputs)
        return self.conv_seg(relu_dropout(self._features(maps, activate=False), drop.p))

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        maps = self._transform_inputs(inputs)
        if not accepts_pyramid(self.fpn_bottleneck, maps[0]):
            return super()._forward_feature(inputs)
        return self._features(maps)

    def _features(self, maps: Sequence[Tensor], activate: bool = True) -> Tensor:
        """The output of ``fpn_bottleneck``, with or without its activation."""
        maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
        above = self.psp_forward(maps)
        outs = [above]
        for lateral, conv, x in zip(*(list(reversed(part)) for part in (
                self.lateral_convs, self.fpn_convs, maps[:-1])), strict=True):
            above = resize(above, size=x.shape[2:], mode='bilinear',
                           align_corners=self.align_corners)
            if _ends_with_relu(lateral, x):
                above = relu_add(lateral(x, activate=False), above)
            else:
                above = lateral(x) + above
            outs.insert(0, conv(above))
        return self.fpn_bottleneck.of_pyramid(outs, tuple(outs[0].shape[2:]), self.align_corners,
                                              activate)


def _ends_with_relu(module: Any, x: Tensor) -> bool:
    """Whether a module's ReLU may be left to a function."""
    return (accepts_pyramid(module, x) and bool(module.with_activation)
            and type(module.activate) is nn.ReLU)


@MODELS.register_module()
class SegformerHead(FusedHead, decode_heads.SegformerHead):
    """mmseg's SegformerHead (Xie et al., "SegFormer", 2021)."""

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The backbone's maps → logits (N, classes, H, W)."""
        maps = self._transform_inputs(inputs)
        if self.interpolate_mode != 'bilinear' or not accepts_pyramid(self.fusion_conv, maps[0]):
            return super().forward(inputs)
        outs = [conv(x) for conv, x in zip(self.convs, maps, strict=True)]
        return self.cls_seg(self.fusion_conv.of_pyramid(
            outs, tuple(maps[0].shape[2:]), self.align_corners))


@MODELS.register_module()
class FPNHead(FusedHead, decode_heads.FPNHead):
    """mmseg's FPNHead (Kirillov et al., "Panoptic Feature Pyramid Networks", 2019)."""

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """The backbone's maps → logits (N, classes, H, W)."""
        maps = self._transform_inputs(inputs)
        if any(has_hooks(head) for head in self.scale_heads):
            return super().forward(inputs)
        output = self.scale_heads[0](maps[0])
        for head, x in zip(self.scale_heads[1:], maps[1:], strict=True):
            output = output + resize(_upsample_and_convolve(head, x), size=output.shape[2:],
                                     mode='bilinear', align_corners=self.align_corners)
        return self.cls_seg(output)


def _upsample_and_convolve(layers: nn.Sequential, x: Tensor) -> Tensor:
    """``layers(x)``, with each upsampling and the convolution after it as one function."""
    remaining: list[Any] = list(layers)
    while remaining:
        layer = remaining.pop(0)
        if (type(layer) is Upsample and layer.mode == 'bilinear' and not layer.size
                and not has_hooks(layer) and remaining and accepts_pyramid(remaining[0], x)):
            size = tuple(int(length * layer.scale_factor) for length in x.shape[2:])
            x = remaining.pop(0).of_pyramid([x], size, bool(layer.align_corners))
        else:
            x = layer(x)
    return x


@MODELS.register_module()
class FCNHead(FusedHead, decode_heads.FCNHead):
    """mmseg's FCNHead (Long et al., "Fully Convolutional Networks", 2015).

    With ``input_transform='resize_concat'``, the first convolution is computed at each map's size.
    """

    def _forward_feature(self, inputs: Sequence[Tensor]) -> Tensor:
        if (self.input_transform != 'resize_concat' or self.num_convs == 0
                or type(self.convs) is not nn.Sequential or has_hooks(self.convs)):
            return super()._forward_feature(inputs)
        maps = [inputs[i] for i in self.in_index]
        first, *others = list[Any](self.convs)
        ends = [first, self.conv_cat] if self.concat_input else [first]
        if not all(accepts_pyramid(conv, maps[0]) for conv in ends):
            return super()._forward_feature(inputs)
        size = tuple(maps[0].shape[2:])
        x = first.of_pyramid(maps, size, self.align_corners)
        for conv in others:
            x = conv(x)
        if self.concat_input:
            x = self.conv_cat.of_pyramid([*maps, x], size, self.align_corners)
        return x
