"""Layer-wise learning-rate decay, by the rules of the authors' fine-tuning code.

From parameter name to depth: :func:`convnext_layer_id`, :func:`convnext_stage_id`,
:func:`vit_layer_id`. From depth to factor: :func:`lr_scale`. The class only groups
parameters by what these functions say.
"""
from __future__ import annotations

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from .errors import UserError

EMBEDDINGS = ('backbone.cls_token', 'backbone.mask_token', 'backbone.pos_embed')


def convnext_layer_id(name: str, num_layers: int) -> int:
    """Depth of a ConvNeXt parameter in ``layer_wise`` decay.

    The third stage is cut into layers of three blocks; the fourth (and any behind it) is one
    layer; output norms, neck and heads come after it.

    Args:
        name: Parameter name in the whole model, such as ``backbone.stages.2.4.gamma``.
        num_layers: 6 for depths 3-3-9-3, 12 for depths 3-3-27-3.

    Returns:
        0 (stem) to ``num_layers + 1`` (everything after the backbone's stages).
    """
    if name in EMBEDDINGS:
        return 0
    part = name.split('.')
    if name.startswith('backbone.downsample_layers'):
        return (0, 2, 3, num_layers)[min(int(part[2]), 3)]
    if name.startswith('backbone.stages'):
        stage, block = int(part[2]), int(part[3])
        return (1, 2, 3 + block // 3, num_layers)[min(stage, 3)]
    return num_layers + 1


def convnext_stage_id(name: str, num_layers: int) -> int:
    """Depth of a ConvNeXt parameter in ``stage_wise`` decay.

    Args:
        name: Parameter name in the whole model.
        num_layers: As in :func:`convnext_layer_id`.

    Returns:
        0 (stem and downsampling), 1 to 4 (the stages), ``num_layers + 1`` (the rest).
    """
    if name in EMBEDDINGS or name.startswith('backbone.downsample_layers'):
        return 0
    if name.startswith('backbone.stages'):
        return int(name.split('.')[2]) + 1
    return num_layers + 1


def vit_layer_id(name: str, num_layers: int) -> int:
    """Depth of a BEiT or MAE parameter: 0 (embeddings) to ``num_layers + 1`` (the rest)."""
    if name in EMBEDDINGS or name.startswith('backbone.patch_embed'):
        return 0
    if name.startswith('backbone.layers'):
        return int(name.split('.')[2]) + 1
    return num_layers + 1


def lr_scale(layer_id: int, num_layers: int, decay_rate: float) -> float:
    """The learning rate's factor at a depth: 1 at ``num_layers + 1``, less before it."""
    return decay_rate ** (num_layers + 1 - layer_id)


class UnknownBackbone(UserError, NotImplementedError):
    """A backbone without a rule of decay; mmseg raises NotImplementedError here."""


class LearningRateDecayOptimizerConstructor(DefaultOptimWrapperConstructor):
    """Gives each layer of the backbone a learning rate that shrinks towards the input.

    Biases and one-dimensional parameters get no weight decay; frozen parameters are left
    out. Registered under this name in the mmengine, mmseg and mmdet scopes.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper with its ``optimizer``.
        paramwise_cfg: ``decay_rate`` (factor a layer), ``num_layers`` and ``decay_type``:
            'layer_wise' (default) or 'stage_wise' for ConvNeXt, 'layer_wise' or
            'layer_wise_vit' for BEiT and MAE.

    Raises:
        UserError: ``paramwise_cfg`` lacks a value or names an unknown ``decay_type``.
        UnknownBackbone: There is no rule for the model's backbone.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        cfg = self.paramwise_cfg
        for key in ('decay_rate', 'num_layers'):
            if not isinstance(cfg.get(key), (int, float)):
                raise UserError(f'paramwise_cfg.{key} must be a number, got {cfg.get(key)!r}: '
                                 'write e.g. paramwise_cfg=dict(decay_rate=0.9, num_layers=6, '
                                 "decay_type='stage_wise')")
        self.decay_rate: float = cfg['decay_rate']
        self.num_layers: int = cfg['num_layers']
        self.decay_type: str = cfg.get('decay_type', 'layer_wise')
        if self.decay_type not in ('layer_wise', 'stage_wise', 'layer_wise_vit'):
            raise UserError(f'paramwise_cfg.decay_type={self.decay_type!r}: expected '
                             "'layer_wise', 'stage_wise' or 'layer_wise_vit'")

    def layer_id(self, name: str, backbone: nn.Module) -> int:
        """Depth of the parameter ``name`` by the rule that fits the backbone's class."""
        kind = type(backbone).__name__
        stage_wise = self.decay_type == 'stage_wise'
        if 'ConvNeXt' in kind:
            rule = convnext_stage_id if stage_wise else convnext_layer_id
        elif ('BEiT' in kind or 'MAE' in kind) and not stage_wise:
            rule = vit_layer_id
        else:
            raise UnknownBackbone(
                f'LearningRateDecayOptimizerConstructor has no {self.decay_type} rule for the '
                f'backbone {kind}: it knows ConvNeXt (layer_wise, stage_wise), BEiT and MAE '
                '(layer_wise)')
        return rule(name, self.num_layers)

    def add_params(self, params: list[dict], module: nn.Module, **kwargs) -> None:
        """Append ``module``'s parameter groups to ``params``, one per depth and decay."""
        groups: dict[str, dict] = {}
        for name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            # GRN's parameters have four axes; the authors of V2 leave them out by name.
            no_decay = (param.ndim == 1 or name.endswith(('.bias', '.grn.gamma', '.grn.beta'))
                        or name in ('pos_embed', 'cls_token'))
            layer_id = self.layer_id(name, module.backbone)
            group_name = f'layer_{layer_id}_{"no_decay" if no_decay else "decay"}'
            scale = lr_scale(layer_id, self.num_layers, self.decay_rate)
            # A weight decay that the config does not set is left to the optimizer's default.
            weight_decay = 0.0 if no_decay else self.base_wd
            group = groups.setdefault(group_name, dict(
                **({} if weight_decay is None else dict(weight_decay=weight_decay)),
                params=[], param_names=[],
                lr_scale=scale, group_name=group_name, lr=scale * self.base_lr))
            group['params'].append(param)
            group['param_names'].append(name)
        self.log_groups(groups)
        params.extend(groups.values())

    def log_groups(self, groups: dict[str, dict]) -> None:
        """One line a group, from the stem to the heads."""
        lines = [f'{self.decay_type} learning-rate decay {self.decay_rate}, '
                 f'{self.num_layers} layers: group, parameters, scale, lr, weight decay']
        for group in sorted(groups.values(), key=lambda g: (g['lr_scale'], g['group_name'])):
            count = sum(p.numel() for p in group['params'])
            lines.append(f'  {group["group_name"]:<18}{count:>12,}  {group["lr_scale"]:.6f}  '
                         f'{group["lr"]:.3e}  {group.get("weight_decay", "default")}')
        print_log('\n'.join(lines), logger='current')
