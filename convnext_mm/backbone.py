"""The ConvNeXt backbone, V1 and V2, with the authors' parameter names."""
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from . import checkpoints, fused, layer_decay
from .archs import CLIP_XXLARGE
from .layers import Block, Downsample, LayerNorm2d
from .options import check_hidden_dims, check_options


class ConvNeXt(BaseModule):
    """ConvNeXt for dense prediction.

    V1: Liu et al., "A ConvNet for the 2020s", 2022. V2 (``use_grn``): Woo et al., "ConvNeXt
    V2", 2023. Feature map ``i`` is the output of stage ``i`` after its own LayerNorm, ``norm{i}``;
    it has ``dims[i]`` channels and stride ``4 * 2**i``, at most ``output_stride``.

    Args:
        arch: A published size, a key of :data:`convnext_mm.archs.ARCHS`: 'tiny' to 'xlarge',
            'v2_atto' to 'v2_huge'. Sets depths, dims and use_grn where they are not given.
        in_chans: Channels of the input image. Published weights expect RGB; for other channels the
            stem is adapted (:func:`convnext_mm.checkpoints.loading.adapt_stem`).
        depths: Blocks per stage; any number of stages.
        dims: Channels per stage.
        hidden_dims: Channels inside of each block, a list per stage, as ``tools/prune.py`` writes
            them. Default: 4 times ``dims``.
        use_grn: Use blocks of V2, with GRN and without layer scale.
        drop_path_rate: Drop path rate of the last block; rises linearly from 0 in the first.
        layer_scale_init_value: Initial layer scale; 0: no layer scale. Default: 1e-6, or 0 with
            ``use_grn``.
        out_indices: Stages whose feature maps are returned, in ascending order, or one stage; -1
            is the last.
            Stages after the last of them are not built. Default: all.
        frozen_stages: -1: none, 0: the stem, n: the stem and n stages have no gradients and stay
            in eval mode.
        with_cp: Activation checkpointing (save only the inputs of blocks, recompute the rest): in
            all stages, in a list of stages ([2] or [-2]), or per stage ([False, False, True,
            False]).
        norm_eval: Keep norms in eval mode during training. LayerNorm and GRN compute the same in
            both modes: this is for custom norms with running statistics.
        output_stride: 8, 16 or 32: stages beyond it keep the size of the map and use dilated
            convolutions. Default: no limit.
        memory: Activations that a block saves for the backward pass: five maps of C channels
            ('lean', the fastest), one ('minimal', recomputes a sixth of the matmuls), or all
            ('plain', one layer after another). The numbers are the same.
        triton: Use the package's Triton kernels on GPUs that support them.
        packed: Whether inference on a CPU also holds the weights in oneDNN's layout: faster, at
            twice their memory. Changed parameters are noticed, except writes through ``.data``.
        norm_eps: Epsilon of all LayerNorms. Default: 1e-6, or 1e-5 in the size of CLIP's largest
            tower (timm's xxlarge), as it was trained.
        init_cfg: ``dict(type='Pretrained', checkpoint=PATH_OR_URL)`` loads backbone weights in any
            published naming (:func:`convnext_mm.checkpoints.load_backbone`). Without it:
            truncated normal with std 0.02, zero biases (Liu et al., Section 3).

    Raises:
        UserError: An unknown ``arch``, or values that contradict each other.
    """

    memory_format = torch.channels_last  # of the maps inside; a subclass may change it
    contiguous_outputs = True  # False: outputs in memory_format; see forward
    is_init: bool  # of BaseModule

    def __init__(self,
                 arch: str = 'tiny',
                 in_chans: int = 3,
                 depths: Sequence[int] | None = None,
                 dims: Sequence[int] | None = None,
                 hidden_dims: Sequence[Sequence[int]] | None = None,
                 use_grn: bool | None = None,
                 drop_path_rate: float = 0.0,
                 layer_scale_init_value: float | None = None,
                 out_indices: int | Sequence[int] | None = None,
                 frozen_stages: int = -1,
                 with_cp: bool | Sequence[int] | Sequence[bool] = False,
                 norm_eval: bool = False,
                 output_stride: int | None = None,
                 memory: str = 'lean',
                 triton: bool = False,
                 packed: bool = False,
                 norm_eps: float | None = None,
                 init_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        self.arch, layer_scale, self.out_indices, self.with_cp = check_options(
            arch, depths, dims, use_grn, drop_path_rate, layer_scale_init_value, out_indices,
            frozen_stages, with_cp, output_stride, memory)
        depths, dims, use_grn = self.arch
        hidden = check_hidden_dims(hidden_dims, self.arch)
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval

        # The only choice between the plain layers and the fast path.
        make_block, make_downsample = (Block, Downsample) if memory == 'plain' else (
            partial(fused.FusedBlock, memory=memory, triton=triton, packed=packed),
            partial(fused.FusedDownsample, memory=memory, packed=packed))

        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())
        dilation = 1
        for i in range(self.out_indices[-1] + 1):
            if i == 0:
                self.downsample_layers.append(nn.Sequential(
                    nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4),
                    LayerNorm2d(dims[0], eps=1e-6)))
            else:
                dilated = output_stride is not None and 4 * 2**i > output_stride
                self.downsample_layers.append(
                    make_downsample(dims[i - 1], dims[i], dilation if dilated else None))
                dilation *= 2 if dilated else 1
            self.stages.append(nn.Sequential(*(
                make_block(dims[i], next(rates), layer_scale, use_grn, dilation, hidden[i][j])
                for j in range(depths[i]))))
        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm2d(dims[i], eps=1e-6))

        eps = norm_eps or (1e-5 if self.arch[:2] == CLIP_XXLARGE else 1e-6)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps
        for module in self._frozen():
            module.requires_grad_(False)
        # Every loader (torch, mmengine, a toolbox) accepts every published naming.
        self.register_load_state_dict_pre_hook(checkpoints.rename_on_load)

    def init_weights(self) -> None:
        """Initialize randomly, then load the checkpoint of ``init_cfg`` if there is one."""
        if self.is_init:
            return
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.init_cfg:
            checkpoints.load_backbone(self, self.init_cfg)
        self.is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, in_chans, H, W) → one (N, dims[i], H / stride, W / stride) per out index.

        The outputs are contiguous: mmcv's compiled operators (such as RoIAlign) ignore strides and
        return wrong results for channels_last maps. Where no such operator follows,
        ``contiguous_outputs = False`` saves the copies.
        """
        # In channels_last, the permutations around norms and linear layers copy nothing.
        x = x.contiguous(memory_format=self.memory_format)
        outs = []
        for i, (downsample, stage) in enumerate(
                zip(self.downsample_layers, self.stages, strict=True)):
            x = downsample(x)
            for block in cast(nn.Sequential, stage):
                if i in self.with_cp and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            if i in self.out_indices:
                out = getattr(self, f'norm{i}')(x)
                outs.append(out.contiguous() if self.contiguous_outputs else out)
        return tuple(outs)

    def train(self, mode: bool = True) -> ConvNeXt:
        """Set the mode; frozen layers, and norms with ``norm_eval``, stay in eval mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, (nn.LayerNorm, _BatchNorm)):
                    module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = '', decay_type: str = 'layer_wise',
                        num_layers: int | str | None = None) -> tuple[int, int]:
        """The depth of a parameter for layer-wise learning-rate decay.

        Args:
            param_name: Name of the parameter in the model.
            prefix: The backbone's prefix in the model, such as 'backbone.'.
            decay_type: 'layer_wise' or 'stage_wise'.
            num_layers: Layers to count; 'auto': one per block (or stage). Default: the authors'.

        Returns:
            The depth, from 0 (stem) to ``num_layers + 1`` (output norms), and the number of
            depths, ``num_layers + 2``, as mmpretrain's backbones return them.
        """
        depths = [len(cast(nn.Sequential, stage)) for stage in self.stages]
        rule = layer_decay.convnext_rule(depths, decay_type, num_layers)
        return rule.depth(param_name.removeprefix(prefix)), rule.num_layers + 2

    def _frozen(self) -> list[nn.Module]:
        """The modules frozen by ``frozen_stages``: the stem and the first stages."""
        if self.frozen_stages < 0:
            return []
        return [*self.downsample_layers[:max(self.frozen_stages, 1)],
                *self.stages[:self.frozen_stages]]
