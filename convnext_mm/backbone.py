"""The ConvNeXt backbone, with the parameter names of the authors' code."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn

from . import checkpoint
from .errors import UserError
from .layers import Block, LayerNorm2d


class ConvNeXt(BaseModule):
    """ConvNeXt (Liu et al., "A ConvNet for the 2020s", 2022) for dense prediction.

    Feature map ``i`` is the output of stage ``i`` after a LayerNorm of its own,
    ``norm{i}``; it has ``dims[i]`` channels and stride ``4 * 2**i``.

    Args:
        in_chans: Channels of the input picture.
        depths: Blocks in each stage.
        dims: Channels of each stage.
        drop_path_rate: Drop path rate of the last block; the first has 0, those
            between rise linearly.
        layer_scale_init_value: Initial layer scale; 0 or less: no layer scale.
        out_indices: Stages whose feature maps are returned, in ascending order.
        init_cfg: ``dict(type='Pretrained', checkpoint=PATH_OR_URL)`` loads backbone
            weights (see :func:`convnext_mm.checkpoint.load_backbone`). Without it:
            truncated normal of std 0.02, zero biases (Section 3 of the paper).

    Raises:
        UserError: ``depths`` and ``dims`` differ in length, or ``out_indices`` names
            a stage that is not there.
    """

    def __init__(self,
                 in_chans: int = 3,
                 depths: Sequence[int] = (3, 3, 9, 3),
                 dims: Sequence[int] = (96, 192, 384, 768),
                 drop_path_rate: float = 0.0,
                 layer_scale_init_value: float = 1e-6,
                 out_indices: Sequence[int] = (0, 1, 2, 3),
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        if len(depths) != len(dims):
            raise UserError(f'ConvNeXt: depths={list(depths)} and dims={list(dims)} must name the '
                             'same number of stages')
        if not out_indices or not set(out_indices) <= set(range(len(dims))):
            raise UserError(f'ConvNeXt: out_indices={list(out_indices)} must be among the stages '
                             f'0 to {len(dims) - 1}')
        self.out_indices = tuple(sorted(set(out_indices)))

        self.downsample_layers = nn.ModuleList()
        for i, dim in enumerate(dims):
            self.downsample_layers.append(
                nn.Sequential(nn.Conv2d(in_chans, dim, kernel_size=4, stride=4),
                              LayerNorm2d(dim, eps=1e-6)) if i == 0 else
                nn.Sequential(LayerNorm2d(dims[i - 1], eps=1e-6),
                              nn.Conv2d(dims[i - 1], dim, kernel_size=2, stride=2)))

        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, next(rates), layer_scale_init_value)
                            for _ in range(depth)))
            for depth, dim in zip(depths, dims, strict=True))

        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm2d(dims[i], eps=1e-6))

    def init_weights(self) -> None:
        """Initialise, then load ``init_cfg``'s checkpoint where there is one."""
        if self.is_init:
            return
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.init_cfg:
            checkpoint.load_backbone(self, self.init_cfg)
        self.is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, in_chans, H, W) → one (N, dims[i], H / 4 / 2**i, W / 4 / 2**i) per out index.

        The maps are contiguous: mmcv's compiled ops (RoIAlign among them) read memory in that
        order whatever a tensor's strides say, and compute nonsense from channels_last maps.
        """
        # In this layout the permutations around norms and linear layers copy nothing.
        x = x.contiguous(memory_format=torch.channels_last)
        outs = []
        for i, (downsample, stage) in enumerate(
                zip(self.downsample_layers, self.stages, strict=True)):
            x = stage(downsample(x))
            if i in self.out_indices:
                outs.append(getattr(self, f'norm{i}')(x).contiguous())
        return tuple(outs)
