"""Configs of mmseg 1.x and mmdet 3.x whose ConvNeXt is that of mmpretrain (earlier mmcls)."""
from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from typing import Any, NamedTuple

from mmengine.config import Config

from ..archs import ARCHS
from ..backbone import ConvNeXt
from ..errors import UserError
from ..utils import plain
from .edits import Edits

PACKAGES = ('mmpretrain', 'mmcls')
OWN_ARGUMENTS = frozenset(inspect.signature(ConvNeXt).parameters)

SAME_HERE: dict[str, tuple[Any, ...]] = dict(
    stem_patch_size=(4,), act_cfg=(dict(type='GELU'),), gap_before_final_norm=(False,),
    norm_cfg=tuple(dict(type=kind, eps=1e-6, **more) for kind in ('LN2d', 'LN')
                   for more in ({}, dict(requires_grad=True), dict(data_format='channels_first'))),
    linear_pw_conv=(True, False), kernel_size=(7,), num_stages=(4,))
"""Arguments that ours does not have, and their values that compute the same.

Pointwise convolutions and linear layers have the same numbers; checkpoints of both load.
"""
RANDOM_INIT = [dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=.02, bias=0.),
               dict(type='Constant', layer=['LayerNorm'], val=1., bias=0.)]
"""Their default ``init_cfg``; ours initializes so without being told (Liu et al., Section 3)."""


class Use(NamedTuple):
    """A part of a config that names a class of mmpretrain.

    Args:
        path: Where it stands.
        node: Its config.
        package: 'mmpretrain' or 'mmcls'.
        kind: The name of the class, without the package.
    """

    path: str
    node: dict[str, Any]
    package: str
    kind: str


class Mapped(NamedTuple):
    """A backbone of this package for one of mmpretrain's.

    Args:
        values: Its config.
        renamed: What has another name: (theirs, ours).
        dropped: What ours does not need.
    """

    values: dict[str, Any]
    renamed: list[tuple[str, str]]
    dropped: list[str]

    def __str__(self) -> str:
        parts = [f'{theirs} → {ours}' for theirs, ours in self.renamed]
        if self.dropped:
            parts.append(f'{", ".join(self.dropped)} dropped: the same here')
        return f' ({"; ".join(parts)})' if parts else ''


def mmpretrain_and_backbone(edits: Edits) -> None:
    """mmpretrain's ConvNeXt is ours, and mmpretrain is imported only for its other classes.

    Also where mmpretrain is installed: a config then means one model on every machine, with one
    set of parameter names in its checkpoints, and it has both kinds of layer decay; mmpretrain's
    has no ``stage_wise``. Checkpoints of either load.

    Raises:
        UserError: An argument that ours cannot follow, or another class of mmpretrain, which is
            not installed.
    """
    mapped = map_config(edits.cfg)
    edits.for_mmpretrain = bool(mapped)
    for state in edits.history:  # so that what was not edited is not seen as edited
        with suppress(UserError):  # of a value that the user has replaced since
            map_config(state)
    for line in mapped:
        edits.note(line)


def map_config(cfg: Config | dict[str, Any]) -> list[str]:
    """Map all ConvNeXts of mmpretrain in a config, and its ``custom_imports``, in place.

    Returns:
        What was mapped, a line each.

    Raises:
        UserError: See :func:`mmpretrain_and_backbone`.
    """
    lines = []
    for use in list(uses(cfg)):
        if use.kind != 'ConvNeXt':
            if not find_spec(use.package):
                raise UserError(
                    f'{use.path}.type={use.node["type"]!r} needs {use.package}, which is not '
                    'installed: install it, or use another type' + (
                        ", such as this package's 'ConvNeXt'" * use.path.endswith('backbone')))
            continue
        theirs, mapped = use.node['type'], map_backbone(use.node, use.path)
        use.node.clear()
        use.node.update(mapped.values)
        lines.append(f"{use.path}: this package's ConvNeXt instead of {theirs}{mapped}")
    given, kept = imports_of(cfg), needed_imports(cfg, mapped=bool(lines))
    if lines and 'convnext_mm' not in kept:
        kept = ['convnext_mm', *kept]
    if kept != given:
        if kept:
            cfg['custom_imports'] = dict(cfg.get('custom_imports') or {}, imports=kept)
        else:
            cfg.pop('custom_imports')
        gone = ', '.join(name for name in given if name not in kept)
        if lines:
            lines[-1] += f'; {gone} not imported' if gone else ''
        else:
            lines = [f'custom_imports: {gone} is not installed, and nothing uses it']
    return lines


def needed_imports(cfg: Config | dict[str, Any], mapped: bool = False) -> list[str]:
    """The ``custom_imports`` of a config, without mmpretrain where it is missing or not needed.

    Args:
        cfg: A config.
        mapped: Whether its ConvNeXts of mmpretrain have been mapped.
    """
    kinds = {use.kind for use in uses(cfg)}
    only_convnext = (mapped or bool(kinds)) and not kinds - {'ConvNeXt'}
    return [name for name in imports_of(cfg)
            if (package := name.partition('.')[0]) not in PACKAGES or (
                not only_convnext and find_spec(package))]


def imports_of(cfg: Config | dict[str, Any]) -> list[str]:
    """The modules in ``custom_imports``."""
    imports = (cfg.get('custom_imports') or {}).get('imports') or ()
    return [imports] if isinstance(imports, str) else list(imports)


def uses(node: Any, path: str = '') -> Iterator[Use]:
    """Every part of a config whose type or scope is one of mmpretrain's."""
    if isinstance(node, dict) and isinstance(node.get('type'), str):
        scope, _, kind = node['type'].rpartition('.')
        package = scope or node.get('_scope_')
        if package in PACKAGES:
            yield Use(path, node, package, kind)
    for key, value in (node.items() if isinstance(node, (dict, Config)) else
                       enumerate(node) if isinstance(node, (list, tuple)) else ()):
        yield from uses(value, f'{path}.{key}' if path else str(key))


def map_backbone(theirs: dict[str, Any], path: str, complete: bool = True) -> Mapped:
    """The config of our ConvNeXt that computes the same as mmpretrain's.

    Args:
        theirs: Config of mmpretrain's ConvNeXt; arguments of ours are kept.
        path: Where it stands, for messages.
        complete: Whether what is not given has mmpretrain's defaults; otherwise it is inherited.

    Raises:
        UserError: An argument, or a value of one, that ours cannot follow.
    """
    new = {key: value for key, value in theirs.items() if key not in SAME_HERE}
    new['type'] = 'ConvNeXt'
    if new.get('_scope_') in PACKAGES:
        del new['_scope_']
    renamed: list[tuple[str, str]] = []
    dropped = [key for key in SAME_HERE if key in theirs]
    for key in dropped:
        if plain(theirs[key]) not in SAME_HERE[key]:
            raise UserError(
                f'{path}.{key}={theirs[key]!r} is not supported: ConvNeXt of this package follows '
                f"the authors' code. Remove it, or set {key}={SAME_HERE[key][0]!r}")
    if 'in_channels' in new:
        new['in_chans'] = new.pop('in_channels')
        renamed.append(('in_channels', 'in_chans'))
    _map_arch(new, path, renamed)
    if complete:
        _complete(new, path, dropped)
    if isinstance(new.get('out_indices'), int):
        new['out_indices'] = [new['out_indices']]
    if 'init_cfg' in new:
        _map_init_cfg(new, path, dropped)
    unknown = [key for key in new if key not in OWN_ARGUMENTS | {'type', '_scope_', '_delete_'}]
    if unknown:
        raise UserError(f'{path}.{unknown[0]}: neither ConvNeXt of this package nor that of '
                        f'mmpretrain has an argument {unknown[0]!r}. Remove it; or, if another '
                        "class is meant, register it under another name, such as 'MyConvNeXt', "
                        'and write that as type')
    return Mapped(new, renamed, dropped)


def _complete(new: dict[str, Any], path: str, dropped: list[str]) -> None:
    """Values that mean something else in ours, or if they are not given."""
    if new.setdefault('layer_scale_init_value', 1e-6) and (
            new.get('use_grn') or str(new.get('arch')).startswith('v2_')):
        raise UserError(f'{path}: use_grn=True with layer_scale_init_value='
                        f'{new["layer_scale_init_value"]} (by default 1e-06 in mmpretrain) is not '
                        'supported: V2 has no layer scale. Set layer_scale_init_value=0.0')
    new.setdefault('out_indices', [-1])  # ours returns all
    if new.get('frozen_stages', 1) <= 0:  # freezes nothing there, but 0 the stem in ours
        dropped.append(f'frozen_stages={new.pop("frozen_stages")}')


def _map_arch(new: dict[str, Any], path: str, renamed: list[tuple[str, str]]) -> None:
    """Their names of sizes are of V1 and V2 alike, and a size of one's own is a dict."""
    arch = new.get('arch', 'tiny')
    if isinstance(arch, dict):
        if not {'depths', 'channels'} <= arch.keys():
            raise UserError(f'{path}.arch={dict(arch)}: expected dict(depths=[...], '
                            'channels=[...])')
        del new['arch']
        for ours, key in (('depths', 'depths'), ('dims', 'channels')):
            new.setdefault(ours, list(arch[key]))
        renamed.append(('arch', 'depths, dims'))
    elif f'v2_{arch}' in ARCHS and new.get('use_grn'):
        new['arch'] = f'v2_{arch}'
        renamed.append((f'arch={arch!r}', repr(new['arch'])))
    elif f'v2_{arch}' in ARCHS and arch not in ARCHS:  # V1 in a size that only V2 was published in
        del new['arch']
        for ours, values in zip(('depths', 'dims'), ARCHS[f'v2_{arch}'][:2], strict=True):
            new.setdefault(ours, list(values))
        renamed.append((f'arch={arch!r}', 'depths, dims'))


def _map_init_cfg(new: dict[str, Any], path: str, dropped: list[str]) -> None:
    given = new['init_cfg']
    items = given if isinstance(given, (list, tuple)) else [given] if given else []
    own = [item for item in items if plain(item) not in RANDOM_INIT]
    if len(own) > 1 or (own and own[0].get('type') != 'Pretrained'):
        raise UserError(f'{path}.init_cfg={plain(given)!r} is not supported: expected '
                        "dict(type='Pretrained', checkpoint='PATH or URL')")
    if own:
        new['init_cfg'] = own[0]
    else:
        del new['init_cfg']
        dropped.append('init_cfg')
