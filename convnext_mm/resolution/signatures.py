"""Every registered object of a config against the signature of the class that it builds."""
from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

from mmengine import registry as mmengine_registry
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from ..errors import UserError
from ..utils import suggest
from .edits import MISSING, Edits, nodes, same

PLACES = (
    ('optim_wrapper.optimizer', ('OPTIMIZERS',)), ('optim_wrapper', ('OPTIM_WRAPPERS',)),
    ('param_scheduler', ('PARAM_SCHEDULERS',)), ('train_cfg', ('LOOPS',)), ('val_cfg', ('LOOPS',)),
    ('test_cfg', ('LOOPS',)), ('default_hooks', ('HOOKS',)), ('custom_hooks', ('HOOKS',)),
    ('visualizer.vis_backends', ('VISBACKENDS',)), ('visualizer', ('VISUALIZERS',)),
    ('log_processor', ('LOG_PROCESSORS',)), ('model', ('MODELS', 'TASK_UTILS')),
    *((f'{split}_{part}', kinds) for split in ('train', 'val', 'test') for part, kinds in (
        ('dataloader.sampler', ('DATA_SAMPLERS',)),
        ('dataloader.batch_sampler', ('DATA_SAMPLERS',)),
        ('dataloader.dataset', ('DATASETS', 'TRANSFORMS')), ('evaluator', ('METRICS',)))))
"""Where in a config objects of which registries are built."""

ALWAYS = {'type', '_scope_', '_delete_', 'priority'}
BESIDE = {'optim_wrapper': {'optimizer', 'constructor', 'paramwise_cfg'},
          'train_cfg': {'by_epoch', 'type'}, 'log_processor': set()}
"""Keys of a place that are read by something else than the class."""

DEFAULT_TYPES = {
    'optim_wrapper': 'OptimWrapper', 'val_cfg': 'ValLoop', 'test_cfg': 'TestLoop',
    'default_hooks.logger': 'LoggerHook', 'default_hooks.checkpoint': 'CheckpointHook',
    'default_hooks.timer': 'IterTimerHook', 'default_hooks.param_scheduler': 'ParamSchedulerHook',
    'default_hooks.sampler_seed': 'DistSamplerSeedHook'}


NOT_BUILT = {'metainfo', 'meta_keys', 'init_cfg', 'norm_cfg', 'conv_cfg', 'act_cfg', 'upsample_cfg'}
"""Keys whose dicts have a type, but are no arguments of that class alone."""


OTHER_LIBRARIES = ('Albu',)
"""Transforms whose dicts are types of another library, which no registry knows."""


class Registered(NamedTuple):
    """An object of a config.

    Args:
        path: Where it stands.
        node: Its config.
        kind: The class that it builds.
        accepted: The arguments that the class takes; None: any.
    """

    path: str
    node: dict[str, Any]
    kind: type
    accepted: set[str] | None


def registered(edits: Edits) -> Iterator[Registered]:
    """Every object of the config whose class is known."""
    scope = edits.get('default_scope', 'mmengine')
    for path, one, registries in _places(edits):
        kind = _class_of(one, path, scope, registries)
        if kind is not None:
            yield Registered(path, one, kind, accepted_arguments(kind))


def _places(edits: Edits) -> Iterator[tuple[str, dict[str, Any], tuple[str, ...]]]:
    """(path, config, registries) of every object of the config."""
    done: set[str] = set()
    for place, registries in PLACES:
        for path, one in _objects(edits.get(place), place):
            if path not in done:
                done.add(path)
                yield path, one, registries


def arguments_at(cfg: Config, path: str, node: Any) -> set[str]:
    """The arguments that the object at a path takes, as far as they are known."""
    scope = cfg.get('default_scope', 'mmengine')
    for place, registries in PLACES:
        if isinstance(node, dict) and f'{path}.'.startswith(f'{place}.'):
            kind = _class_of(node, path, scope, registries)
            return set() if kind is None else (accepted_arguments(kind) or set()) | beside(path)
    return set()


LOADER_KEYS = {'dataset', 'num_batch_per_epoch', 'collate_fn', 'sampler', 'batch_sampler'}
"""Keys of a data loader's config that mmengine reads itself."""


MODEL_PARTS = r'(backbone|neck|_head|loss\w*|data_preprocessor|norm_cfg)(\.\d+)?$'


def dataloaders_and_signature(edits: Edits) -> None:
    """Every setting of a data loader is an argument of PyTorch's.

    Raises:
        UserError: Names the closest that there is.
    """
    known = LOADER_KEYS | set(inspect.signature(DataLoader).parameters)
    for split in ('train', 'val', 'test'):
        loader = edits.get(f'{split}_dataloader')
        for key in loader if isinstance(loader, dict) else ():
            if key not in known | ALWAYS:
                raise UserError(f'{split}_dataloader.{key}: DataLoader has no argument {key!r}.'
                                + (suggest(key, known) or f' It has {", ".join(sorted(known))}'))


def types_and_registries(edits: Edits) -> None:
    """A type names a class that is registered.

    In models: backbones, necks, heads, losses and norms. Others may have types that no registry
    knows, such as the operations of RoI extractors.

    Raises:
        UserError: Names the object and the closest types.
    """
    scope = edits.get('default_scope', 'mmengine')
    norms = ((path, node, ('MODELS',)) for path, node in nodes(edits.get('model'), 'model')
             if path.endswith('norm_cfg') and 'type' in node)
    for path, one, registries in (*_places(edits), *norms):
        name = one.get('type', DEFAULT_TYPES.get(path))
        inner = path.startswith('model.') and not re.search(MODEL_PARTS, path)
        if inner or not isinstance(name, str) or _class_of(
                one, path, scope, registries) is not None:
            continue
        # Hooks and metrics may hold pipelines, models and their helpers.
        inside = ('TRANSFORMS', 'MODELS', 'TASK_UTILS')
        own, other = (set().union(*(registered_names(scope, registry) or ()
                                    for registry in some)) for some in (registries, inside))
        if own and name.rpartition('.')[2] not in own | other:
            raise UserError(
                f'{path}.type={name!r} is no registered class.'
                + (suggest(name, own) or suggest(name, other) or
                   ' If it is your own, register it, and add its module to '
                   'custom_imports=dict(imports=[...])'))


def registered_names(scope: str, registry: str) -> set[str] | None:
    """The names in a toolbox's registry and in mmengine's; None: the toolbox cannot be imported."""
    names: set[str] = set()
    for module in (f'{scope}.registry', 'mmengine.registry'):
        try:
            found = getattr(import_module(module), registry, None)
            if isinstance(found, Registry):
                found.import_from_location()
                names |= set(found.module_dict)
        except Exception:  # such as a toolbox's assertion on the version of mmcv
            return None
    return names


def _class_of(node: dict[str, Any], path: str, scope: str, registries: tuple[str, ...]
              ) -> type | None:
    name = node.get('type', DEFAULT_TYPES.get(path))
    return name if inspect.isclass(name) else next(filter(None, (
        find_class(scope, registry, name) for registry in registries)), None)


def _objects(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, config) of every object inside ``node``."""
    if isinstance(node, dict):
        if 'type' in node or path in DEFAULT_TYPES:
            yield path, node
        children = list(node.items()) if node.get('type') not in OTHER_LIBRARIES else []
    elif isinstance(node, (list, tuple)):
        children = list(enumerate(node))
    else:
        return
    for key, value in children:
        if key not in NOT_BUILT:
            yield from _objects(value, f'{path}.{key}')


def find_class(scope: str, registry: str, name: Any) -> type | None:
    """The class under a name in a toolbox's registry, or in mmengine's; None: there is none."""
    if not isinstance(name, str):
        return None
    try:
        found = getattr(import_module(f'{scope}.registry'), registry, None)
    except ImportError:
        found = None
    if found is None:  # a registry that has not imported its modules yet is empty, and false
        found = getattr(mmengine_registry, registry, None)
    if not isinstance(found, Registry):
        return None
    try:
        kind = found.get(name)
    except Exception:  # such as a toolbox's assertion on the version of mmcv
        return None
    return kind if inspect.isclass(kind) else None


def accepted_arguments(kind: type) -> set[str] | None:
    """The arguments of a class, with those that ``**kwargs`` hand on to its bases; None: any."""
    accepted: set[str] = set()
    hands_on = False
    for base in kind.__mro__:
        if base is object:
            break
        init = base.__dict__.get('__init__')
        if init is None:
            continue
        try:
            parameters = list(inspect.signature(init).parameters.values())
        except (TypeError, ValueError):
            return None
        accepted |= {p.name for p in parameters[1:] if p.kind in (
            inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)}
        if base is CheckpointHook:  # hands them on to the Runner, at the first save
            return accepted | set(inspect.signature(Runner.save_checkpoint).parameters)
        hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        if not hands_on:
            return accepted
    return None if hands_on else accepted  # what else takes them is not to be seen


def type_and_inherited_keys(edits: Edits) -> None:
    """A type that the user has changed gets no arguments of the recipe's that it does not take.

    mmengine merges a config into what it inherits, so that the arguments of the old type stay.

    Raises:
        UserError: The user has set such an argument.
    """
    for one in registered(edits):
        before = edits.inherited(one.path, {})
        if not isinstance(before, dict) or same(before.get('type'), one.node.get('type')):
            continue
        inherited = [key for key in one.node if key in before and same(before[key], one.node[key])
                     and key not in ALWAYS | beside(one.path)]
        dropped = [key for key in inherited
                   if one.accepted is not None and key not in one.accepted]
        for key in dropped:
            del one.node[key]
        for key in inherited:
            if key in one.node and _refuses(one, key) and not edits.states(f'{one.path}.{key}'):
                dropped.append(f'{key}={one.node.pop(key)}')
        if dropped:
            edits.note(f'{one.path}: {one.kind.__name__} takes no {", ".join(dropped)}, dropped '
                       f'(of {before.get("type")} in the recipe)')
        # mmengine loads a checkpoint of another network without an error, and none of its weights.
        names = {str(node.get('type')).rpartition('.')[2] for node in (before, one.node)}
        if one.path == 'model.backbone' and len(names) > 1 and one.node.get('init_cfg') and (
                'init_cfg' in inherited) and not edits.states('model.backbone.init_cfg'):
            del one.node['init_cfg']
            edits.note(f'model.backbone.init_cfg: the recipe\'s weights are of '
                       f'{before.get("type")}, {one.kind.__name__} starts from random ones')


def _refuses(one: Registered, key: str) -> bool:
    """Whether a loss can be built without an argument, but not with it."""
    if not re.search(r'loss\w*(\.\d+)?$', one.path):
        return False

    def fails(left_out: set[str]) -> bool:
        try:
            one.kind(**{k: v for k, v in one.node.items() if k not in left_out})
        except Exception:  # mostly an assertion
            return True
        return False
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return fails(ALWAYS) and not fails(ALWAYS | {key})


def keys_and_signatures(edits: Edits) -> None:
    """Every argument of a registered object is one that its class takes.

    Raises:
        UserError: Names the object, the argument, and the closest that there is.
    """
    for one in registered(edits):
        if one.accepted is None:
            continue
        for key in one.node:
            if key in one.accepted | ALWAYS | beside(one.path) or (
                    edits.as_shipped(f'{one.path}.type') and edits.as_shipped(f'{one.path}.{key}')):
                continue  # some classes take any argument, and ignore it
            before = edits.inherited(one.path, {})
            if isinstance(before, dict) and before.get('type') != one.node.get('type') and (
                    before.get(key, MISSING) is not MISSING):
                advice = (f' It is inherited from {before.get("type")}, with your changes: write '
                          '_delete_=True beside type to start from nothing')
            else:
                advice = suggest(key, one.accepted) or (
                    f' Its arguments: {", ".join(sorted(one.accepted))}')
            raise UserError(f'{one.path}.{key}: {one.kind.__name__} has no argument {key!r}.'
                            f'{advice}')


def beside(path: str) -> set[str]:
    """Keys of an object that are read by something else than its class."""
    keys = set(BESIDE.get(path, ()))
    if path.endswith('bbox_head.loss_cls'):  # of DETR, whose head takes it out of its loss
        keys |= {'bg_cls_weight'}
    # Read by the Runner when it builds a loop, a scheduler or a hook.
    if path.startswith('param_scheduler'):
        keys |= {'convert_to_iter_based'}
    return keys


