"""The implementations that the backbone is compared with.

Those defined here use the parameters of a given ConvNeXt; transformers and timm bring their own.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from convnext_mm import ConvNeXt
from convnext_mm.engine import fallbacks
from convnext_mm.fused import eager
from convnext_mm.fused.packed import PackedConvolution, pack_linear
from convnext_mm.layers import LayerNorm2d


class OpenMMLab(nn.Module):
    """The baseline: OpenMMLab's sequence of operations.

    Feature maps are (N, C, H, W), and permuted before and after the norm and the linear layers of a
    block. Norms over channels return contiguous maps.

    Args:
        model: Provides the parameters.
    """

    def __init__(self, model: ConvNeXt) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) → the feature maps."""
        outs = []
        for i, (down, stage) in enumerate(
                zip(self.model.downsample_layers, self.model.stages, strict=True)):
            for layer in down:
                x = self.norm(layer, x) if isinstance(layer, LayerNorm2d) else layer(x)
            for b in stage:
                x = x + b.drop_path(self.branch(b, x))
            outs.append(self.norm(getattr(self.model, f'norm{i}'), x))
        return outs

    def branch(self, b: nn.Module, x: Tensor) -> Tensor:
        """The residual branch of a block."""
        y = b.act(b.pwconv1(b.norm(b.dwconv(x).permute(0, 2, 3, 1))))
        y = b.pwconv2(self.grn(b.grn, y)).permute(0, 3, 1, 2)
        return y if b.gamma is None else y.mul(b.gamma.view(1, -1, 1, 1))

    def grn(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Global response normalization of a (N, H, W, C) map in V2; identity in V1."""
        if isinstance(layer, nn.Identity):
            return x
        response = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        response = response / (response.mean(dim=-1, keepdim=True) + 1e-6)
        return layer.gamma * (x * response) + layer.beta + x

    def norm(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        """LayerNorm over channels."""
        x = F.layer_norm(x.permute(0, 2, 3, 1), layer.normalized_shape, layer.weight, layer.bias,
                         layer.eps)
        return x.permute(0, 3, 1, 2).contiguous()


class Authors(OpenMMLab):
    """The authors' sequence of operations: the norm over channels is written out."""

    def branch(self, b: nn.Module, x: Tensor) -> Tensor:
        y = b.act(b.pwconv1(b.norm(b.dwconv(x).permute(0, 2, 3, 1))))
        y = b.pwconv2(self.grn(b.grn, y))
        return (y if b.gamma is None else b.gamma * y).permute(0, 3, 1, 2)

    def norm(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        variance = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(variance + layer.eps)
        return layer.weight[:, None, None] * x + layer.bias[:, None, None]


class MatmulsAlone(nn.Module):
    """A reference: the matmuls of the blocks, on inputs that are allocated beforehand."""

    def __init__(self, model: ConvNeXt) -> None:
        super().__init__()
        self.model = model
        self.inputs: dict[tuple, tuple[Tensor, Tensor]] = {}

    def forward(self, x: Tensor) -> list[Tensor]:
        """Run all matmuls; return their outputs, through which gradients flow."""
        outs = []
        kind = x.device.type
        dtype = (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype)
        for i, stage in enumerate(self.model.stages):
            rows = x.shape[0] * -(-x.shape[2] // 2 ** (i + 2)) * -(-x.shape[3] // 2 ** (i + 2))
            dim = self.model.arch.dims[i]
            key = (rows, dim, dtype, torch.is_grad_enabled())
            if key not in self.inputs:
                self.inputs[key] = tuple(
                    torch.randn(rows, width, device=x.device, dtype=dtype,
                                requires_grad=torch.is_grad_enabled()) for width in (dim, 4 * dim))
            narrow, wide = self.inputs[key]
            for b in stage:
                outs += [F.linear(narrow, b.pwconv1.weight), F.linear(wide, b.pwconv2.weight)]
        return outs


class MatmulsAndConvolutionsAlone(nn.Module):
    """A reference for inference on a CPU: all matmuls and convolutions in oneDNN's layout, without
    the operations between them."""

    def __init__(self, model: ConvNeXt) -> None:
        super().__init__()
        self.model = model
        self.stages: list[tuple] = []

    def forward(self, x: Tensor) -> list[Tensor]:
        """Run all operations on (N, 3, H, W); returns an empty list."""
        if not self.stages:
            self.stages = [(self._downsampling(*down), [self._block(b) for b in stage])
                           for down, stage in zip(self.model.downsample_layers, self.model.stages,
                                                  strict=True)]
        x = x.contiguous(memory_format=torch.channels_last)
        for downsampling, blocks in self.stages:
            x = downsampling(x)
            for convolution, linear1, linear2 in blocks:
                n = convolution(x).permute(0, 2, 3, 1).reshape(1, 1, -1, x.shape[1])
                for part in n.split(eager.PIECE_BYTES // (4 * x.shape[1] * x.element_size()), 2):
                    eager.linear(eager.linear(part, *linear1), *linear2)
        return []

    @staticmethod
    def _downsampling(*layers: nn.Module) -> PackedConvolution:
        conv, = (layer for layer in layers if isinstance(layer, nn.Conv2d))
        return PackedConvolution(conv.weight, conv.bias, stride=conv.stride[0])

    @staticmethod
    def _block(b: nn.Module) -> tuple:
        return (PackedConvolution(b.dwconv.weight, b.dwconv.bias, padding=3,
                                  groups=b.dwconv.groups),
                *((pack_linear(linear.weight.detach()), linear.bias.detach())
                  for linear in (b.pwconv1, b.pwconv2)))


def use_stock_classes(node: Any) -> None:
    """Replace this package's variants of a toolbox's classes in a config by the toolbox's own."""
    if isinstance(node, dict) and isinstance(node.get('type'), str):
        node['type'] = node['type'].removeprefix('convnext_mm.')
        if node['type'] == 'FPN':
            node.pop('channels_last', None)  # an argument of ours
    for value in (node.values() if isinstance(node, dict) else
                  node if isinstance(node, (list, tuple)) else ()):
        use_stock_classes(value)


def build_recipe(cfg: Config, stock: bool) -> nn.Module:
    """Build a recipe's model with random weights, for one process.

    Args:
        cfg: A recipe's config; it becomes one without mixed precision, for the device at hand.
        stock: Whether with the toolbox's own classes and :class:`OpenMMLab`'s backbone.
    """
    if stock:
        use_stock_classes(cfg.model)
    fallbacks.adapt_to_device(cfg)
    cfg.optim_wrapper.type = 'OptimWrapper'
    cfg.optim_wrapper.pop('loss_scale', None)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model = revert_sync_batchnorm(model)
    if stock:
        model.backbone = OpenMMLab(model.backbone)
    return model


class ConvolutionsAndMatmulsOf(nn.Module):
    """A reference: the convolutions and linear layers that a step of a model calls, alone.

    Each runs on an input that was allocated beforehand, in the layout in which the model calls it.

    Args:
        model: The model; its own modules are run.
        step: Calls the model once.
    """

    def __init__(self, model: nn.Module, step: Callable[[], object]) -> None:
        super().__init__()
        self.calls: list[tuple[nn.Module, Tensor]] = []

        def record(layer: nn.Module, args: tuple[Tensor]) -> None:
            self.calls.append((layer, torch.randn_like(args[0]).requires_grad_(
                args[0].requires_grad)))
        hooks = [layer.register_forward_pre_hook(record) for layer in model.modules()
                 if isinstance(layer, (nn.Conv2d, nn.Linear))]
        step()
        for hook in hooks:
            hook.remove()

    def forward(self) -> None:
        """Run them, with their backward passes if gradients are enabled."""
        for layer, x in self.calls:
            y = layer(x)
            if y.requires_grad:
                y.backward(torch.ones_like(y))


def transformers_backbone(model: ConvNeXt) -> nn.Module:
    """Build transformers' backbone of the same size, with its own weights."""
    import transformers
    version = 'V2' if model.arch.use_grn else ''
    config = getattr(transformers, f'ConvNext{version}Config')(
        depths=list(model.arch.depths), hidden_sizes=list(model.arch.dims),
        layer_scale_init_value=1.0,
        out_features=[f'stage{i + 1}' for i in range(len(model.arch.depths))])
    return Wrapped(getattr(transformers, f'ConvNext{version}Backbone')(config),
                   lambda out: out.feature_maps)


def timm_backbone(arch: str) -> nn.Module:
    """Build timm's features_only ConvNeXt of a size, with its own weights."""
    import timm
    name = f'convnextv2_{arch[3:]}' if arch.startswith('v2_') else f'convnext_{arch}'
    return Wrapped(timm.create_model(name, features_only=True), lambda out: out)


class Wrapped(nn.Module):
    """A model of another library, with a function that takes the feature maps from its output."""

    def __init__(self, model: nn.Module, feature_maps: Callable) -> None:
        super().__init__()
        self.model, self.feature_maps = model, feature_maps

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) → the feature maps."""
        return list(self.feature_maps(self.model(x)))
