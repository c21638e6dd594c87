"""The ConvNeXt backbone, V1 and V2, with the parameter names of the authors' code."""
from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from . import checkpoints
from .archs import ARCHS, Arch
from .errors import UserError
from .kernels import MEMORY
from .layers import Block, DilatedDownsample, Downsample, LayerNorm2d


class ConvNeXt(BaseModule):
    """ConvNeXt for dense prediction.

    V1: Liu et al., "A ConvNet for the 2020s", 2022. V2 (``use_grn``): Woo et al., "ConvNeXt
    V2", 2023. Feature map ``i`` is the output of stage ``i`` after a LayerNorm of its own,
    ``norm{i}``; it has ``dims[i]`` channels and stride ``4 * 2**i``, at most
    ``output_stride``.

    Args:
        arch: A published size, a key of :data:`convnext_mm.archs.ARCHS`: 'tiny' to
            'xlarge', 'v2_atto' to 'v2_huge'. It says depths, dims and use_grn where they are not
            given.
        in_chans: Channels of the input picture. The published weights know pictures in RGB
            order; with other channels the stem is adapted
            (:func:`convnext_mm.checkpoints.fitting.adapt_stem`).
        depths: Blocks in each stage; any number of stages.
        dims: Channels of each stage.
        use_grn: Blocks of V2, with GRN and without layer scale.
        drop_path_rate: Drop path rate of the last block; the first has 0, those
            between rise linearly.
        layer_scale_init_value: Initial layer scale; 0 or less: no layer scale. Not given:
            1e-6, or none with ``use_grn``.
        out_indices: Stages whose feature maps are returned, in ascending order; -1 is the
            last. Stages behind the last of them are not built. Not given: all.
        frozen_stages: -1: none is frozen, 0: the stem, n: the stem and n stages. What is
            frozen has no gradients and stays in eval mode.
        with_cp: Keep only the inputs of blocks for the backward pass and compute the rest
            again (activation checkpointing): everywhere, in the listed stages ([2] or [-2]),
            or where a list has True ([False, False, True, False]). Less memory, more time.
        norm_eval: Leave norms in eval mode in training. LayerNorm and GRN compute the same in
            both: this is for norms with running statistics that a user puts in.
        output_stride: 8, 16 or 32: stages that would go beyond it keep the size of the map,
            and their convolutions are dilated. Not given: no limit.
        memory: What is kept for the backward pass, of five maps a block ('lean': as fast as
            any), one ('minimal': a sixth of the products is done again), or all that PyTorch
            keeps ('plain': layer after layer). The numbers are the same.
        triton: Whether the package's Triton kernels are used on a GPU that can.
        packed: Whether inference on a CPU keeps most weights in oneDNN's layout as well: faster
            for twice their memory. What is written to parameters is seen, but not through
            ``.data``.
        init_cfg: ``dict(type='Pretrained', checkpoint=PATH_OR_URL)`` loads backbone weights of
            every published naming (see :func:`convnext_mm.checkpoints.load_backbone`).
            Without it: truncated normal of std 0.02, zero biases (Section 3 of the paper).

    Raises:
        UserError: An unknown ``arch``, or values that contradict each other.
    """

    memory_format = torch.channels_last  # of the maps inside; a subclass may change it
    contiguous_outputs = True  # else in memory_format; see forward

    def __init__(self,
                 arch: str = 'tiny',
                 in_chans: int = 3,
                 depths: Sequence[int] | None = None,
                 dims: Sequence[int] | None = None,
                 use_grn: bool | None = None,
                 drop_path_rate: float = 0.0,
                 layer_scale_init_value: float | None = None,
                 out_indices: Sequence[int] | None = None,
                 frozen_stages: int = -1,
                 with_cp: bool | Sequence[int] | Sequence[bool] = False,
                 norm_eval: bool = False,
                 output_stride: int | None = None,
                 memory: str = 'lean',
                 triton: bool = True,
                 packed: bool = False,
                 init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        depths, dims, use_grn = self.arch = _architecture(arch, depths, dims, use_grn)
        if layer_scale_init_value is None:
            layer_scale_init_value = 0.0 if use_grn else 1e-6
        if use_grn and layer_scale_init_value > 0:
            raise UserError(f'ConvNeXt: layer_scale_init_value={layer_scale_init_value} '
                            'contradicts use_grn=True: V2 has no layer scale. Leave it out or set '
                            'it to 0')
        if not 0 <= drop_path_rate <= 1:
            raise UserError(f'ConvNeXt: drop_path_rate={drop_path_rate} must be from 0 to 1')
        if output_stride not in (None, 8, 16, 32):
            raise UserError(f'ConvNeXt: output_stride={output_stride} must be 8, 16 or 32')
        if memory not in MEMORY:
            raise UserError(f'ConvNeXt: memory={memory!r} must be one of {", ".join(MEMORY)}')
        if not -1 <= frozen_stages <= len(depths):
            raise UserError(f'ConvNeXt: frozen_stages={frozen_stages} must be from -1 (none) to '
                            f'{len(depths)} (the stem and {len(depths)} stages)')
        self.out_indices = _stage_indices(
            'out_indices', range(len(depths)) if out_indices is None else out_indices, len(depths))
        if not self.out_indices:
            raise UserError('ConvNeXt: out_indices must name at least one stage')
        self.with_cp = _checkpointed_stages(with_cp, len(depths))
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())
        dilation = 1
        for i in range(self.out_indices[-1] + 1):
            if i == 0:
                downsample = [nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4),
                              LayerNorm2d(dims[0], eps=1e-6)]
            else:
                dilated = output_stride is not None and 4 * 2**i > output_stride
                downsample = [LayerNorm2d(dims[i - 1], eps=1e-6),
                              DilatedDownsample(dims[i - 1], dims[i], dilation) if dilated else
                              nn.Conv2d(dims[i - 1], dims[i], kernel_size=2, stride=2)]
                dilation *= 2 if dilated else 1
            self.downsample_layers.append(Downsample(*downsample, memory, packed) if i else
                                          nn.Sequential(*downsample))
            self.stages.append(nn.Sequential(*(
                Block(dims[i], next(rates), layer_scale_init_value, use_grn, dilation, memory,
                      triton, packed) for _ in range(depths[i]))))
        for i in self.out_indices:
            self.add_module(f'norm{i}', LayerNorm2d(dims[i], eps=1e-6))

        for module in self._frozen():
            module.requires_grad_(False)

    def init_weights(self) -> None:
        """Initialise, then load ``init_cfg``'s checkpoint where there is one."""
        if self.is_init:
            return
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        if self.init_cfg:
            checkpoints.load_backbone(self, self.init_cfg)
        self.is_init = True

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, in_chans, H, W) → one (N, dims[i], H / stride, W / stride) per out index.

        The maps are contiguous: mmcv's compiled ops (RoIAlign among them) read memory in that
        order whatever a tensor's strides say, and compute nonsense from channels_last maps.
        Where nothing of that kind follows, ``contiguous_outputs = False`` saves the copies.
        """
        # In this layout the permutations around norms and linear layers copy nothing.
        x = x.contiguous(memory_format=self.memory_format)
        outs = []
        for i, (downsample, stage) in enumerate(
                zip(self.downsample_layers, self.stages, strict=True)):
            x = downsample(x)
            for block in stage:
                if i in self.with_cp and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            if i in self.out_indices:
                out = getattr(self, f'norm{i}')(x)
                outs.append(out.contiguous() if self.contiguous_outputs else out)
        return tuple(outs)

    def train(self, mode: bool = True) -> ConvNeXt:
        """Set the mode; what is frozen, and norms with ``norm_eval``, stay in eval mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, (nn.LayerNorm, _BatchNorm)):
                    module.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        """The stem and the stages that ``frozen_stages`` says."""
        if self.frozen_stages < 0:
            return []
        return [*self.downsample_layers[:max(self.frozen_stages, 1)],
                *self.stages[:self.frozen_stages]]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str,
                              *args: Any, **kwargs: Any) -> None:
        """Whoever loads (torch, mmengine, a toolbox): every published naming is understood."""
        checkpoints.rename_for(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _architecture(arch: str, depths: Sequence[int] | None, dims: Sequence[int] | None,
                  use_grn: bool | None) -> Arch:
    """The size that ``arch`` names, with what is given explicitly in its place."""
    if arch not in ARCHS:
        close = difflib.get_close_matches(str(arch), ARCHS, n=2) or [
            name for name in ARCHS if str(arch) in name]
        raise UserError(f'ConvNeXt: arch={arch!r} is not known; the sizes are {", ".join(ARCHS)}' +
                        (f'. Did you mean {" or ".join(close)}?' if close else ''))
    published = ARCHS[arch]
    if published.use_grn and use_grn is False:
        raise UserError(f'ConvNeXt: arch={arch!r} contradicts use_grn=False: V2 has GRN in every '
                        'block. Leave one of them out')
    depths = published.depths if depths is None else tuple(depths)
    dims = published.dims if dims is None else tuple(dims)
    if len(depths) != len(dims):
        raise UserError(f'ConvNeXt: depths={list(depths)} and dims={list(dims)} must name the same '
                        f'number of stages (what is not given is that of arch={arch!r})')
    if not depths or any(not isinstance(n, int) or n < 1 for n in depths + dims):
        raise UserError(f'ConvNeXt: depths={list(depths)} and dims={list(dims)} must be whole '
                        'numbers from 1 up')
    return Arch(depths, dims, published.use_grn if use_grn is None else bool(use_grn))


def _stage_indices(key: str, indices: Sequence[int], stages: int) -> tuple[int, ...]:
    """Ascending indices of stages, each once; -1 is the last."""
    wrong = [i for i in indices if not isinstance(i, int) or not -stages <= i < stages]
    if wrong:
        raise UserError(f'ConvNeXt: {key}={list(indices)} must be among the stages '
                        f'0 to {stages - 1}, or -{stages} to -1')
    return tuple(sorted({i % stages for i in indices}))


def _checkpointed_stages(with_cp: bool | Sequence[int] | Sequence[bool],
                         stages: int) -> tuple[int, ...]:
    """The stages that ``with_cp`` means."""
    if isinstance(with_cp, bool):
        return tuple(range(stages)) if with_cp else ()
    if any(isinstance(flag, bool) for flag in with_cp):
        if len(with_cp) != stages or not all(isinstance(flag, bool) for flag in with_cp):
            raise UserError(f'ConvNeXt: with_cp={list(with_cp)} must have one True or False for '
                            f'each of the {stages} stages, or be a list of stages')
        return tuple(i for i, flag in enumerate(with_cp) if flag)
    return _stage_indices('with_cp', with_cp, stages)
