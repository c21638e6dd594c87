"""Optimizer constructor for layer-wise learning-rate decay."""
from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from numbers import Real
from typing import Any, TypeGuard

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .errors import UserError
from .layer_decay import Rule, convnext_rule, lr_scale, vit_layer_id
from .layers import GRN
from .utils import suggest

WRAPPERS = ('module', '_orig_mod', '_fsdp_wrapped_module', '_checkpoint_wrapped_module')
"""What DistributedDataParallel, torch.compile, FSDP and checkpointing insert into names."""

NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, GRN)


def plain_name(name: str) -> str:
    """The name of a parameter or module without what wrappers insert."""
    return '.'.join(part for part in name.split('.') if part not in WRAPPERS)


class UnknownBackbone(UserError, NotImplementedError):
    """A backbone without a decay rule; mmseg raises NotImplementedError in this case."""


class LearningRateDecayOptimizerConstructor(DefaultOptimWrapperConstructor):
    """Gives each layer of the backbone a learning rate that decays towards the input.

    Biases, one-dimensional parameters and V2's GRN get no weight decay; frozen parameters are
    excluded. The backbone may be anywhere in the model, and the model or parts of it may be
    wrapped (DistributedDataParallel, FSDP, torch.compile). Registered under this name in the
    scopes mmengine, mmseg and mmdet.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper with its ``optimizer``.
        paramwise_cfg: Required:

            - ``decay_rate``: factor per layer, above 0; above 1, which makes the first layers learn
              fastest, with a warning.
            - ``num_layers``: 6 or 12 in the authors' recipes; 'auto': one layer per block (with
              'stage_wise': per stage).

            Optional:

            - ``decay_type``: 'layer_wise' (default) or 'stage_wise' for ConvNeXt, 'layer_wise'
              or 'layer_wise_vit' for BEiT, MAE and ViT. Other backbones need a method
              ``get_layer_depth(param_name, prefix)`` that returns a parameter's depth and the
              number of depths, as mmpretrain's have.
            - ``custom_keys``, ``norm_decay_mult``, ``bias_decay_mult``, ``flat_decay_mult``,
              ``dwconv_decay_mult``, ``bias_lr_mult``, ``dcn_offset_lr_mult``: as in mmengine's
              DefaultOptimWrapperConstructor. Factors of the learning rate multiply the layer's;
              factors of the weight decay override the rule above.
            - ``bypass_duplicate``: a parameter shared by two modules is added once, with a warning
              (True) or without (not given), or is an error (False).

    Raises:
        UserError: ``paramwise_cfg`` has a missing or wrong value or an unknown key; ``num_layers``
            is less than the backbone has; the optimizer has no ``lr``; or FSDP has flattened the
            parameters.
        UnknownBackbone: The model's backbone has no decay rule.
    """

    MULTIPLIERS = ('bias_lr_mult', 'bias_decay_mult', 'norm_decay_mult', 'dwconv_decay_mult',
                   'flat_decay_mult', 'dcn_offset_lr_mult')
    KEYS = ('decay_rate', 'num_layers', 'decay_type', 'custom_keys', 'bypass_duplicate',
            *MULTIPLIERS)
    DECAY_TYPES = ('layer_wise', 'stage_wise', 'layer_wise_vit')

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        self.decay_rate: float = self.paramwise_cfg['decay_rate']
        self.num_layers: int | str = self.paramwise_cfg['num_layers']
        self.decay_type: str = self.paramwise_cfg.get('decay_type', 'layer_wise')

    def __call__(self, model: nn.Module) -> OptimWrapper:
        if any(name.endswith('_flat_param') for name, _ in model.named_parameters()):
            raise UserError('FSDP has flattened the parameters of several layers into one, which '
                            'can have only one learning rate: set use_orig_params=True in '
                            'model_wrapper_cfg')
        with ExitStack() as stack:
            if any(_is_fsdp(module) for module in model.modules()):
                from torch.distributed.fsdp import FullyShardedDataParallel
                # Shards are one-dimensional, but whether a parameter decays depends on its shape.
                stack.enter_context(
                    FullyShardedDataParallel.summon_full_params(model, writeback=False))
            return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: Any) -> None:
        """Append ``module``'s parameter groups to ``params``, one per depth and weight decay."""
        if not _is_number(self.base_lr):
            raise UserError(f'optim_wrapper.optimizer.lr must be a number, got {self.base_lr!r}: '
                            'learning rates of layers are fractions of it')
        rules = self.find_rules(module)
        outside = Rule(lambda name: 0, -1)  # gives a factor of 1
        last = max((rule.num_layers for rule in rules.values()), default=0) + 1
        groups: dict[str, dict] = {}
        seen: set[int] = set()
        bypass = self.paramwise_cfg.get('bypass_duplicate')
        unmatched = set(self.paramwise_cfg.get('custom_keys', ()))
        for name, param, owner, parent in _named_parameters(module):
            if not param.requires_grad:
                continue
            if id(param) in seen:
                if bypass is False:
                    raise UserError(f'{name} shares its parameter with another name, and '
                                    'paramwise_cfg.bypass_duplicate is False: set it to True')
                if bypass:
                    print_log(f'{name} is a duplicate, skipped (bypass_duplicate=True)',
                              logger='current', level=logging.WARNING)
                continue
            seen.add(id(param))
            prefix = next((p for p in rules if name.startswith(p)), None)
            rule = outside if prefix is None else rules[prefix]
            depth = rule.depth(name[len(prefix or ''):])
            scale = lr_scale(depth, rule.num_layers, self.decay_rate)
            lr_mult, decay_mult, custom = self.find_multipliers(name, param, owner, parent)
            unmatched.discard(custom)
            # Without a weight decay in the config, the optimizer's default applies.
            settings: dict[str, Any] = dict(lr_scale=scale * lr_mult,
                                            lr=scale * lr_mult * self.base_lr)
            if decay_mult == 0:
                settings['weight_decay'] = 0.0
            elif self.base_wd is not None:
                settings['weight_decay'] = self.base_wd * decay_mult
            settings.update(self.paramwise_cfg.get('custom_keys', {}).get(custom, {}))
            settings['group_name'] = (
                f'layer_{last if prefix is None else depth}_'
                f'{"decay" if settings.get("weight_decay", 1) else "no_decay"}'
                + (f'_lr×{lr_mult:g}' if lr_mult != 1 else '')
                + (f'_wd×{decay_mult:g}' if decay_mult not in (0, 1) else '')
                + (f' ({custom})' if custom else ''))
            # Two backbones may have different factors at the same depth.
            key = f'{settings["group_name"]} {scale}'
            group = groups.setdefault(key, dict(settings, params=[], param_names=[]))
            group['params'].append(param)
            group['param_names'].append(name)
        for key in sorted(unmatched):
            print_log(f'paramwise_cfg.custom_keys: {key!r} is in no name of a trainable parameter '
                      '(or a longer key matches all of them)', logger='current',
                      level=logging.WARNING)
        self.log_groups(groups)
        params.extend(groups.values())

    def find_rules(self, model: nn.Module) -> dict[str, Rule]:
        """{prefix of its parameters' names: decay rule} of every backbone in ``model``.

        Raises:
            UnknownBackbone: No module has a decay rule.
        """
        rules: dict[str, Rule] = {}
        unknown = [type(model).__name__]
        for path, module in model.named_modules():
            path = plain_name(path)
            prefix = path + '.' if path else ''
            if any(prefix.startswith(known) for known in rules):
                continue
            rule = self.find_rule(module, prefix)
            if rule is not None:
                rules[prefix] = rule
            elif path.endswith('backbone'):
                unknown.append(type(module).__name__)
        if not rules:
            raise UnknownBackbone(
                f'LearningRateDecayOptimizerConstructor has no {self.decay_type} rule for the '
                f'backbone {unknown[-1]}. Supported are ConvNeXt (layer_wise, stage_wise), BEiT, '
                'MAE and VisionTransformer (layer_wise), and backbones with a method '
                'get_layer_depth(param_name, prefix) that returns depth and number of depths')
        return rules

    def find_rule(self, module: Any, prefix: str) -> Rule | None:
        """The decay rule of ``module``; None if it is not a supported backbone.

        Args:
            module: Any module of the model.
            prefix: Prefix of its parameters' names, such as ``backbone.``.

        Raises:
            UserError: ``num_layers`` does not fit it.
        """
        children = {plain_name(name) for name, _ in module.named_children()}
        names = [plain_name(name) for name, _ in module.named_parameters()]
        stage_wise, auto = self.decay_type == 'stage_wise', self.num_layers == 'auto'
        num_layers: Any = self.num_layers
        # Looked up on the class, since wrappers forward attributes to the wrapped module.
        get_depth = getattr(type(module), 'get_layer_depth', None)
        is_convnext = {'stages', 'downsample_layers'} <= children
        parameters = inspect.signature(get_depth).parameters if get_depth else {}
        if get_depth and 'decay_type' in parameters:
            def depth_of(name: str) -> tuple[int, int]:
                return module.get_layer_depth(prefix + name, prefix, self.decay_type, num_layers)
            rule = Rule(lambda name: depth_of(name)[0], depth_of(names[0])[1] - 2)
        elif is_convnext and (stage_wise or not get_depth):  # another implementation of ConvNeXt
            rule = convnext_rule(_count_blocks(names), self.decay_type, num_layers)
        elif get_depth:
            return self._mmpretrain_rule(module, prefix, names)
        elif (re.search('BEiT|MAE|VisionTransformer',
                        ' '.join(kind.__name__ for kind in type(module).__mro__))
              and 'layers' in children and not stage_wise):
            num_layers = len({n.split('.')[1] for n in names if n.startswith('layers.')}
                             ) if auto else num_layers
            rule = Rule(lambda name: vit_layer_id(name, num_layers), num_layers)
        else:
            return None
        # Layers beyond num_layers would learn faster than the heads.
        deepest = max((rule.depth(name) for name in names
                       if name.startswith(('stages.', 'downsample_layers.', 'layers.'))), default=0)
        if deepest > rule.num_layers:
            raise UserError(
                f'paramwise_cfg.num_layers={num_layers} is too small: the backbone '
                f'{type(module).__name__} has a layer {deepest} in {self.decay_type} decay. Write '
                f'num_layers={deepest + (len(_count_blocks(names)) > 3 and not stage_wise)}, or '
                f"'auto' for one layer per {'stage' if stage_wise else 'block'}")
        return rule

    def _mmpretrain_rule(self, module: Any, prefix: str, names: Sequence[str]) -> Rule:
        """The rule of a backbone with mmpretrain's ``get_layer_depth(param_name, prefix)``.

        That of a whole model takes the name alone, and also knows the neck and the head.
        """
        kind, whole = type(module).__name__, len(
            inspect.signature(module.get_layer_depth).parameters) == 1

        def depth_of(name: str) -> tuple[int, int]:
            if whole:
                return module.get_layer_depth(name)
            return module.get_layer_depth(prefix + name, prefix)
        if self.decay_type == 'stage_wise':
            raise UserError(f"paramwise_cfg.decay_type='stage_wise', but the backbone {kind} has "
                            "layers only (get_layer_depth): write decay_type='layer_wise'")
        defined = max(depth_of(name)[1] for name in names) - 2
        if self.num_layers not in ('auto', defined):
            raise UserError(f'paramwise_cfg.num_layers={self.num_layers}, but the backbone {kind} '
                            f'has {defined} layers (get_layer_depth): write '
                            f"num_layers='auto' or {defined}")
        return Rule(lambda name: depth_of(name)[0], defined)

    def find_multipliers(self, name: str, param: nn.Parameter, owner: nn.Module,
                         parent: nn.Module | None) -> tuple[float, float, str | None]:
        """The factors of a parameter in ``paramwise_cfg``, with mmengine's precedence.

        Args:
            name: Its name in the model, without wrappers.
            param: The parameter.
            owner: The module that owns it.
            parent: The parent module of ``owner``.

        Returns:
            Factors of learning rate and weight decay, and the custom key that matched.
        """
        cfg = self.paramwise_cfg
        short = name.rsplit('.', 1)[-1]
        is_norm, is_bias = isinstance(owner, NORMS), short == 'bias'
        # GRN's parameters have four axes; the authors of V2 exclude them by name.
        decay_mult = 0.0 if (param.ndim == 1 or is_bias or isinstance(owner, GRN)
                             or name in ('pos_embed', 'cls_token')) else 1.0
        keys = cfg.get('custom_keys', {})
        for key in sorted(sorted(keys), key=len, reverse=True):
            if key in name:
                return (keys[key].get('lr_mult', 1.0),
                        keys[key].get('decay_mult', decay_mult), key)
        in_dcn = parent is not None and any(
            kind.__name__ in ('DeformConv2d', 'ModulatedDeformConv2d')
            for kind in type(parent).__mro__)
        lr_mult = 1.0
        if is_bias and not is_norm and not in_dcn:
            lr_mult = cfg.get('bias_lr_mult', 1.0)
        elif in_dcn and 'conv_offset' in name and isinstance(owner, nn.Conv2d):
            lr_mult = cfg.get('dcn_offset_lr_mult', 1.0)
        for applies, mult in (
                (is_norm, 'norm_decay_mult'), (is_bias and not in_dcn, 'bias_decay_mult'),
                (isinstance(owner, nn.Conv2d) and owner.in_channels == owner.groups,
                 'dwconv_decay_mult'), (param.ndim == 1 and not in_dcn, 'flat_decay_mult')):
            if applies and cfg.get(mult) is not None:
                return lr_mult, cfg[mult], None
        return lr_mult, decay_mult, None

    def log_groups(self, groups: dict[str, dict]) -> None:
        """Log one line per group, from the stem to the heads."""
        width = max((len(group['group_name']) for group in groups.values()), default=0) + 2
        lines = [f'{self.decay_type} learning-rate decay {self.decay_rate}, '
                 f'{self.num_layers} layers',
                 f'  {"group":<{width}}{"parameters":>12}  {"scale":<8}  {"lr":<9}  weight decay']
        for group in sorted(groups.values(), key=lambda g: (g['lr_scale'], g['group_name'])):
            count = sum(p.numel() for p in group['params'])
            lines.append(f'  {group["group_name"]:<{width}}{count:>12,}  '
                         f'{group["lr_scale"]:.6f}  {group["lr"]:.3e}  '
                         f'{group.get("weight_decay", "default")}')
        print_log('\n'.join(lines), logger='current')

    def _validate_cfg(self) -> None:
        """Check ``paramwise_cfg`` against the optimizer's config.

        Raises:
            UserError: A missing or wrong value, or an unknown key.
        """
        cfg = self.paramwise_cfg
        example = ('write e.g. paramwise_cfg=dict(decay_rate=0.9, num_layers=6, '
                   "decay_type='stage_wise')")
        if not isinstance(cfg, dict):
            raise UserError(f'paramwise_cfg={cfg!r} must be a dict: {example}')
        _check_keys('paramwise_cfg', cfg, self.KEYS)
        rate, layers = cfg.get('decay_rate'), cfg.get('num_layers')
        if not _is_number(rate) or rate <= 0:
            raise UserError('paramwise_cfg.decay_rate must be a number above 0, got '
                            f'{rate!r}: {example}')
        if rate > 1:
            print_log(f'paramwise_cfg.decay_rate={rate} is above 1: the first layers learn fastest',
                      logger='current', level=logging.WARNING)
        if layers != 'auto' and (not isinstance(layers, int) or isinstance(layers, bool)
                                 or layers < 1):
            raise UserError("paramwise_cfg.num_layers must be a whole number of at least 1, or "
                            f"'auto', got {layers!r}: {example}")
        decay_type = cfg.get('decay_type', 'layer_wise')
        if decay_type not in self.DECAY_TYPES:
            raise UserError(f'paramwise_cfg.decay_type={decay_type!r}: expected one of '
                            f'{", ".join(map(repr, self.DECAY_TYPES))}')
        bypass = cfg.get('bypass_duplicate')
        if not isinstance(bypass, (bool, type(None))):
            raise UserError(f'paramwise_cfg.bypass_duplicate={bypass!r} must be True or False')
        custom = cfg.get('custom_keys', {})
        if not isinstance(custom, dict) or not all(isinstance(v, dict) for v in custom.values()):
            raise UserError(f'paramwise_cfg.custom_keys={custom!r} must map parts of parameter '
                            'names to dicts of factors: write e.g. '
                            'custom_keys=dict(decode_head=dict(lr_mult=10.0))')
        factors = {key: cfg[key] for key in self.MULTIPLIERS if cfg.get(key) is not None}
        for name, entry in custom.items():
            # Other keys are settings of the optimizer, such as betas.
            _check_keys(f'paramwise_cfg.custom_keys.{name}', entry, ('lr_mult', 'decay_mult'),
                        only_typos=True)
            factors.update({f'custom_keys.{name}.{key}': value for key, value in entry.items()
                            if key in ('lr_mult', 'decay_mult')})
        for key, value in factors.items():
            if not _is_number(value) or value < 0:
                raise UserError(f'paramwise_cfg.{key}={value!r} must be a number of at least 0')
            if key.endswith('decay_mult') and value and self.base_wd is None:
                raise UserError(f'paramwise_cfg.{key}={value!r} multiplies the weight decay: set '
                                'optim_wrapper.optimizer.weight_decay as well')


def _named_parameters(model: nn.Module
                      ) -> Iterator[tuple[str, nn.Parameter, nn.Module, nn.Module | None]]:
    """(plain name, parameter, its module, that module's parent); shared ones appear repeatedly."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        parent = modules[path.rpartition('.')[0]] if path else None
        for name, param in module.named_parameters(recurse=False):
            yield plain_name(f'{path}.{name}' if path else name), param, module, parent


def _is_fsdp(module: nn.Module) -> bool:
    return any(cls.__name__ == 'FullyShardedDataParallel' for cls in type(module).__mro__)


def _count_blocks(names: Sequence[str]) -> list[int]:
    """Blocks per stage, from names ``stages.STAGE.BLOCK.…``."""
    blocks = {tuple(map(int, match.groups())) for name in names
              if (match := re.match(r'stages\.(\d+)\.(\d+)\.', name))}
    num_stages = max((stage for stage, _ in blocks), default=-1) + 1
    return [sum(stage == i for stage, _ in blocks) for i in range(num_stages)]


def _check_keys(where: str, cfg: dict, known: Sequence[str], only_typos: bool = False) -> None:
    """Reject unknown keys; with ``only_typos`` only those that resemble a known one."""
    for key in cfg:
        hint = suggest(key, known)
        if key not in known and (hint or not only_typos):
            raise UserError(f'{where} has no key {key!r}.'
                            + (hint or f' Its keys: {", ".join(known)}'))


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool)
