"""A config beside the recipe it edits: what a user has changed, and what follows from it."""
from __future__ import annotations

import ast
import functools
import os
import re
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config

from ..bases import PACKAGES, inherited_configs, without_completion
from ..datasets.completion import wrapped_datasets_of_split
from ..errors import UserError
from ..inputs import config_folder
from ..utils import plain

MISSING: Any = object()
HERE = Path(__file__).resolve().parent.parent
RECIPE_FOLDERS = [
    folder.resolve() for folder in (HERE.parent / 'configs', HERE / '.mim' / 'configs')
    if folder.is_dir()]


class State(NamedTuple):
    """One of the files, or the options, that make a config.

    Args:
        values: The config, with all that it inherits.
        stated: The dotted paths that the file itself sets.
        shipped: Whether a package ships the file.
    """

    values: dict[str, Any]
    stated: frozenset[str] = frozenset()
    shipped: bool = False


class Edits:
    """A config, what it was before the user's edits, and the notes of what followed.

    Args:
        cfg: The user's config, with all that it inherits; rules change it in place.
        history: See :func:`history_of`; the last state is the recipe.

    Attributes:
        for_mmpretrain: Whether the config was written for mmpretrain's ConvNeXt.
    """

    for_mmpretrain = False

    def __init__(self, cfg: Config, history: list[State]) -> None:
        self.cfg = cfg
        self.history = [state.values for state in history]
        self.recipe = self.history[-1]
        self._stated = [state.stated for state in history]
        self._shipped = history[-1].shipped
        self._notes: dict[str, list[str]] = {}

    def get(self, path: str, default: Any = None) -> Any:
        """The value at a dotted path, such as 'model.backbone.dims.0'."""
        return lookup(self.cfg, path, default)

    def inherited(self, path: str, default: Any = None) -> Any:
        """The recipe's value at a path."""
        return lookup(self.recipe, path, default)

    def is_set(self, path: str) -> bool:
        """Whether the user has set a value that differs from the recipe's."""
        value = self.get(path, MISSING)
        return value is not MISSING and not same(value, self.inherited(path, MISSING))

    def was_set(self, path: str) -> bool:
        """As :meth:`is_set`, before any rule has changed the config."""
        value = lookup(self.history[0], path, MISSING)
        return value is not MISSING and not same(value, self.inherited(path, MISSING))

    def states(self, path: str) -> bool:
        """Whether the user has set a value, even to the recipe's."""
        return self.was_set(path) or any(path in stated for stated in self._stated[:-1])

    def as_shipped(self, path: str) -> bool:
        """Whether a package ships a config with this value, so that it is no mistake."""
        return self._shipped and not self.was_set(path) and (
            self.inherited(path, MISSING) is not MISSING)

    def set_in(self, path: str) -> int:
        """The state in which the value of a path was set: 0 is the newest."""
        state = 0
        while state + 1 < len(self.history) and same(
                lookup(self.history[state + 1], path, MISSING),
                lookup(self.history[0], path, MISSING)):
            if path in self._stated[state]:
                break
            state += 1
        return state

    def pipelines(self, *splits: str) -> list[str]:
        """Paths of the pipelines of 'train', 'val' and 'test', also inside wrapped datasets."""
        return list(dict.fromkeys(
            f'{path}.pipeline' for split in splits
            for chain in wrapped_datasets_of_split(self.cfg, split)
            for path, dataset in chain.items() if dataset.get('pipeline')))

    def recipes_pipeline(self, path: str) -> list[dict[str, Any]]:
        """The recipe's pipeline at a path, also where the user has wrapped its dataset since."""
        split = path.partition('.')[0]
        return self.inherited(path) or (
            self.inherited(f'{split}.dataset.pipeline') if '.' in path else None) or []

    def put(self, path: str, value: Any) -> None:
        """Set a value that follows from another."""
        parent, _, key = path.rpartition('.')
        node = self.get(parent) if parent else self.cfg
        if isinstance(node, list):
            node[int(key)] = value
        else:
            node[key] = value

    def follow(self, path: str, wanted: Any, source: str, has: str) -> None:
        """Let a value of the recipe follow from another setting.

        Args:
            path: Where the value stands.
            wanted: What it must be.
            source: The setting that it follows from.
            has: What that setting has, for the message: 'classes', 'channels', ….

        Raises:
            UserError: The user has set another value.
        """
        value = self.get(path)
        if same(value, wanted):
            return
        if self.was_set(path):
            raise UserError(f'{path}={plain(value)}, but {source} has {plain(wanted)} {has}: '
                            f'remove {path.rpartition(".")[2]}, it follows')
        self.put(path, wanted)
        self.note(f'={wanted} follows {source}', path)

    def note(self, text: str, at: str = '') -> None:
        """Keep a line for the user; one line for all places, ``at``, of which it is true."""
        places = self._notes.setdefault(text, [])
        if at and at not in places:
            places.append(at)

    @property
    def notes(self) -> list[str]:
        """What followed from the user's changes, a line each."""
        return [', '.join(places) + text for text, places in self._notes.items()]


def is_path_variable(edits: Edits, name: str) -> bool:
    """Whether a name at the top is a variable of the user's for a folder, such as ``val = 'c/d'``.
    """
    value = edits.get(name)
    return isinstance(value, str) and ('/' in value or any(
        value in node.values() for key in edits.cfg for _, node in nodes(edits.cfg[key], key)))


def nodes(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, config) of every dict in a config node."""
    if isinstance(node, dict):
        yield path, node
    for key, value in (list(node.items()) if isinstance(node, dict) else
                       enumerate(node) if isinstance(node, (list, tuple)) else ()):
        yield from nodes(value, f'{path}.{key}')


def lookup(node: Any, path: str, default: Any = None) -> Any:
    """The value at a dotted path in nested dicts and lists."""
    for part in path.split('.') if path else ():
        if isinstance(node, (list, tuple)):
            if not part.lstrip('-').isdigit() or not -len(node) <= int(part) < len(node):
                return default
            node = node[int(part)]
        elif isinstance(node, (dict, Config)) and part in node:
            node = node[part]
        else:
            return default
    return node


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal; tuples and lists are, as a config's text may change them.

    So are objects of the same type with and without ``_scope_``, which mmengine adds to bases of
    other packages.
    """
    return _without_scope(plain(a)) == _without_scope(plain(b))


def _without_scope(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_scope(item) for key, item in value.items() if key != '_scope_'}
    return [_without_scope(item) for item in value] if isinstance(value, list) else value


def history_of(cfg: Config) -> list[State]:
    """The states that ``cfg`` has been through, newest first.

    ``cfg`` itself, its file as read (without the options of the command line), the user's files
    that it inherits, and last the recipe: a config as a package ships it, otherwise the farthest
    that is inherited, or the fragments of one (in ``_base_`` folders) merged; {} without any.
    """
    states = [State(plain_copy(cfg))]
    if not cfg.filename or not os.path.isfile(cfg.filename):
        return [*states, State({})]
    with without_completion():
        states.append(_state(Config.fromfile(cfg.filename, import_custom_modules=False)))
    if is_shipped(Path(cfg.filename)):
        return states
    own: list[State] = []
    fragments: dict[str, Any] = {}
    for inherited in inherited_configs(cfg.filename):
        file = Path(inherited.filename).resolve()
        if '_base_' in file.parts:
            for key, value in plain_copy(inherited).items():
                fragments.setdefault(key, value)
            continue
        own.append(_state(inherited))
        if is_shipped(file):
            return [*states, *own]
    return [*states, *own] if own else [*states, State(fragments)]


def _state(cfg: Config) -> State:
    return State(plain_copy(cfg), stated_paths(cfg.filename), is_shipped(Path(cfg.filename)))


def stated_paths(path: str) -> frozenset[str]:
    """The dotted paths that the text of a config file sets, even to the value they have anyway."""
    paths: set[str] = set()

    def state(node: ast.expr, at: str) -> None:
        paths.add(at)
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    state(value, f'{at}.{key.value}')
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and (
                node.func.id == 'dict'):
            for keyword in node.keywords:
                if keyword.arg:
                    state(keyword.value, f'{at}.{keyword.arg}')
        elif isinstance(node, (ast.List, ast.Tuple)):
            for i, item in enumerate(node.elts):
                state(item, f'{at}.{i}')
    if path.endswith('.py'):
        for line in ast.parse(Path(path).read_text(encoding='utf-8')).body:
            if isinstance(line, ast.Assign):
                for target in line.targets:
                    if isinstance(target, ast.Name):
                        state(line.value, target.id)
    return frozenset(paths)


def is_shipped(file: Path) -> bool:
    """Whether a package ships this config; users' may stand beside those of ours."""
    file = file.resolve()
    if any(folder.resolve() in file.parents for package in PACKAGES
           if package != 'convnext_mm' and (folder := config_folder(package))):
        return True
    folder = next((one for one in RECIPE_FOLDERS if one in file.parents), None)
    if folder is None:
        return False
    inside = file.relative_to(folder).parts
    return inside[0] == '_base_' or (
        len(inside) == 1 and re.sub('_(ss|ms)$', '', file.stem) in recipe_names(folder))


@functools.cache
def recipe_names(folder: Path) -> frozenset[str]:
    """The recipes that the metafiles of a folder list."""
    return frozenset(name for file in folder.glob('metafile*.yml') for name in re.findall(
        r'^ +Config: configs/(\S+)\.py', file.read_text(encoding='utf-8'), re.M))


def plain_copy(cfg: Config) -> dict[str, Any]:
    return deepcopy(cfg._cfg_dict.to_dict())


def pair(name: str, value: Any) -> tuple[int, int]:
    """Two sizes; a number is both.

    Raises:
        UserError: It is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = value, value
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(
            isinstance(one, int) and one > 0 for one in value):
        raise UserError(f'{name}={value!r} must be two whole numbers, such as {name}=(512, 512)')
    return tuple(value)
