"""An old config read as data: what its files assign, without running them."""
from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
if not CONFIGS.is_dir():  # installed, not cloned
    CONFIGS = Path(__file__).resolve().parents[1] / '.mim' / 'configs'

OLD_KEYS = ('optimizer', 'optimizer_config', 'lr_config', 'momentum_config', 'runner', 'data',
            'evaluation', 'checkpoint_config', 'log_config', 'total_epochs', 'total_iters',
            'workflow', 'dist_params', 'resume_from', 'fp16', 'paramwise_cfg')
"""Keys at the top of a config that mmengine's style has under other names."""

ALIASES = {
    'ade20k_640x640.py': 'ade20k_640.py', 'coco_detection.py': 'coco_instance.py',
    **{f'schedule_{name}.py': 'schedule_3x.py' for name in ('1x', '2x', '20e')},
    **{f'schedule_{name}.py': 'schedule_160k.py' for name in ('20k', '40k', '80k', '320k')}}
"""Old fragments that ours stand for under another name; their length is kept."""

FUNCTIONS: dict[str, Callable] = {f.__name__: f for f in (
    dict, list, tuple, range, set, int, float, str, bool, len, round, min, max, sum, abs, zip,
    enumerate, sorted)}
OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow,
    ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b}


class OldConfig(NamedTuple):
    """An old config and its bases, merged.

    Args:
        path: Of the file.
        values: What the files say; ``_delete_`` is left where ours is still to be replaced.
        bases: Base files that are not there, whose fragments or recipes of ours are meant: the
            name in the config, and our file.
    """

    path: Path
    values: dict[str, Any]
    bases: list[tuple[str, Path]]


def old_keys(path: str | Path) -> list[str]:
    """The old-style keys that a config file assigns itself; none if it cannot be parsed."""
    try:
        tree = ast.parse(_without_templates(Path(path).read_text(encoding='utf-8')))
    except (OSError, SyntaxError, ValueError):
        return []
    names = [target.id for node in tree.body if isinstance(node, ast.Assign)
             for target in node.targets if isinstance(target, ast.Name)]
    if 'optim_wrapper' in names or 'train_dataloader' in names:
        return []  # mmengine's style, whatever helpers it names
    return [name for name in names if name in OLD_KEYS]


def read(path: str | Path, trust: bool = False, chain: tuple[Path, ...] = ()) -> OldConfig:
    """Read an old config with its bases.

    Args:
        path: The file.
        trust: Run files that do more than assign values.
        chain: Files that led here.

    Raises:
        UserError: No such file, a syntax error, a cycle, a base that is nowhere, or code where
            values are expected.
    """
    path = Path(path).resolve()
    if path in chain:
        raise UserError('_base_ leads in a circle: ' + ' → '.join(
            str(p) for p in (*chain[chain.index(path):], path)))
    if not path.is_file():
        raise UserError(f'Config not found: {path}')
    try:
        text = _without_templates(path.read_text(encoding='utf-8'), path)
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, 'lineno', None)
        raise UserError(f'{path}{f", line {line}" if line else ""}: {error}') from error
    found: list[tuple[str, Path]] = []
    inherited: dict[str, Any] = {}
    for name in _base_names(tree, path):
        file = (path.parent / name).resolve()
        if file.is_file() and not file.is_relative_to(CONFIGS):
            base = read(file, trust, (*chain, path))
            found += base.bases
            twice = inherited.keys() & base.values.keys()
            if twice:
                raise UserError(f'{path}: more than one of _base_ sets {", ".join(sorted(twice))}')
            inherited.update(base.values)
        else:
            found.append((name, _ours(name, path)))
    if trust:
        own = _run(text, path, inherited)
    else:
        own = Reader(path, inherited).values(tree)
    return OldConfig(path, merge(inherited, own, keep_delete=True), found)


def merge(base: dict, new: dict, keep_delete: bool = False) -> dict:
    """``new`` over ``base``, as configs are merged: dicts by their keys, all else replaced.

    Args:
        base: Is left as it is.
        new: A dict in it with ``_delete_=True`` replaces the whole of base's.
        keep_delete: Leave ``_delete_`` in dicts, so that a further base below is replaced too.
    """
    merged = dict(base)
    for key, value in new.items():
        if isinstance(value, dict):
            replaces = value.get('_delete_', False)
            below = merged.get(key)
            value = {k: v for k, v in value.items() if k != '_delete_'}
            value = merge(below if isinstance(below, dict) and not replaces else {}, value,
                          keep_delete)
            if replaces and keep_delete:
                value['_delete_'] = True
        merged[key] = deepcopy(value)
    return merged


def _base_names(tree: ast.Module, path: Path) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == '_base_' for t in node.targets):
            try:
                names = ast.literal_eval(node.value)
            except ValueError as error:
                raise UserError(f'{path}, line {node.lineno}: _base_ must be one or more paths in '
                                'quotes') from error
            return [names] if isinstance(names, str) else list(names)
    return []


def _ours(name: str, path: Path) -> Path:
    """Our file that a missing base means."""
    stem = name.replace('\\\\', '/').rsplit('/', 1)[-1]
    stem = ALIASES.get(stem, stem)
    found = [*sorted(CONFIGS.glob(f'_base_/*/{stem}')), *sorted(CONFIGS.glob(f'_base_/{stem}')),
             *sorted(CONFIGS.glob(stem))]
    if not found:
        known = sorted(p.name for p in CONFIGS.glob('_base_/*/*.py'))
        raise UserError(f'{path}: its base {name} is not there ({(path.parent / name).resolve()}), '
                        f'and none of ours has that name. Put it there; ours: {", ".join(known)}, '
                        'and the recipes')
    return found[0]


def _without_templates(text: str, path: Path | None = None) -> str:
    """``{{_base_.x}}`` as Python, ``{{ fileBasename }}`` and the like as their values."""
    text = re.sub(r'''(['"]?)\{\{\s*(_base_(?:\.\w+)+)\s*\}\}\1''', r'\2', text)
    known = dict(fileDirname=str(path.parent), fileBasename=path.name,
                 fileBasenameNoExtension=path.stem, fileExtname=path.suffix) if path else {}
    return re.sub(r'\{\{\s*(\w+)\s*\}\}', lambda m: known.get(m[1], m[0]), text)


def _run(text: str, path: Path, inherited: dict) -> dict[str, Any]:
    """What a trusted file assigns."""
    namespace: dict[str, Any] = {'_base_': _Base(inherited), '__file__': str(path)}
    code = re.sub(r'(?m)^_base_\s*=', '_bases_ =', text)
    try:
        exec(compile(code, str(path), 'exec'), namespace)
    except Exception as error:
        raise UserError(f'{path}: {type(error).__name__}: {error}') from error
    return {key: value for key, value in namespace.items()
            if not key.startswith('_') and _is_data(value)}


def _is_data(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_data, value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_data, value))
    return value is None or isinstance(value, (str, int, float, bool))


class _Base(dict):
    """``_base_.model.backbone`` as mmcv allows it."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(f'_base_ has no {name!r}') from None
        return _Base(value) if isinstance(value, dict) else value


class Reader:
    """Evaluates assignments of values, and refuses everything else with its line.

    Args:
        path: For messages.
        inherited: What ``_base_.x`` means.
    """

    def __init__(self, path: Path, inherited: dict[str, Any]) -> None:
        self.path = path
        self.names: dict[str, Any] = {'_base_': _Base(inherited)}

    def values(self, tree: ast.Module) -> dict[str, Any]:
        """The variables of a file."""
        for node in tree.body:
            self._statement(node)
        return {key: value for key, value in self.names.items() if not key.startswith('_')}

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        if isinstance(node, ast.Assign):
            if any(isinstance(t, ast.Name) and t.id == '_base_' for t in node.targets):
                return
            value = self._value(node.value)
            for target in node.targets:
                self._assign(target, value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self._assign(node.target, self._value(node.value))
        elif isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
            target = ast.copy_location(
                ast.parse(ast.unparse(node.target), mode='eval').body, node.target)
            self._assign(node.target, self._apply(node, self._value(target),
                                                  self._value(node.value)))
        else:
            self._refuse(node)

    def _assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = value
        elif isinstance(target, (ast.Tuple, ast.List)):
            for one, part in zip(target.elts, value, strict=True):
                self._assign(one, part)
        elif isinstance(target, ast.Subscript):
            self._value(target.value)[self._value(target.slice)] = value
        else:
            self._refuse(target)

    def _value(self, node: ast.expr) -> Any:
        """The value of an expression."""
        try:
            return self._evaluate(node)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f'{self.path}, line {node.lineno}: {ast.unparse(node)[:80]}: '
                            f'{type(error).__name__}: {error}') from error

    def _evaluate(self, node: ast.expr) -> Any:
        value = self._value
        match node:
            case ast.Constant():
                return node.value
            case ast.Name():
                if node.id not in self.names:
                    self._refuse(node, f'{node.id} is not assigned before')
                return self.names[node.id]
            case ast.List() | ast.Tuple() | ast.Set():
                kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
                return kind(one for part in node.elts for one in (
                    value(part.value) if isinstance(part, ast.Starred) else [value(part)]))
            case ast.Dict():
                made: dict = {}
                for key, one in zip(node.keys, node.values, strict=True):
                    made.update(value(one) if key is None else {value(key): value(one)})
                return made
            case ast.BinOp() if type(node.op) in OPERATORS:
                return self._apply(node, value(node.left), value(node.right))
            case ast.UnaryOp() if type(node.op) in OPERATORS:
                return OPERATORS[type(node.op)](value(node.operand))
            case ast.Compare(ops=[op]) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(node.left), value(node.comparators[0]))
            case ast.IfExp():
                return value(node.body if value(node.test) else node.orelse)
            case ast.Subscript():
                return value(node.value)[value(node.slice)]
            case ast.Slice():
                return slice(*(None if p is None else value(p)
                               for p in (node.lower, node.upper, node.step)))
            case ast.Attribute() if isinstance(value(node.value), _Base):
                return deepcopy(getattr(value(node.value), node.attr))
            case ast.JoinedStr():
                return ''.join(str(value(p.value)) if isinstance(p, ast.FormattedValue) else p.value
                               for p in node.values)
            case ast.Call(func=ast.Name(id=name)) if name in FUNCTIONS and name not in self.names:
                arguments = [one for part in node.args for one in (
                    value(part.value) if isinstance(part, ast.Starred) else [value(part)])]
                named: dict = {}
                for keyword in node.keywords:
                    named.update(value(keyword.value) if keyword.arg is None
                                 else {keyword.arg: value(keyword.value)})
                return FUNCTIONS[name](*arguments, **named)
            case ast.ListComp() | ast.GeneratorExp():
                return [value(node.elt) for _ in self._loop(node.generators)]
            case ast.DictComp():
                return {value(node.key): value(node.value) for _ in self._loop(node.generators)}
        self._refuse(node)
        return None

    def _loop(self, generators: list[ast.comprehension]):
        """Assign the variables of comprehensions, one combination after another."""
        if not generators:
            yield
            return
        first, *rest = generators
        before = dict(self.names)
        for one in self._value(first.iter):
            self._assign(first.target, one)
            if all(self._value(test) for test in first.ifs):
                yield from self._loop(rest)
        self.names = before

    def _apply(self, node: ast.BinOp | ast.AugAssign, left: Any, right: Any) -> Any:
        size = max((len(v) for v in (left, right) if hasattr(v, '__len__')), default=0)
        if (isinstance(node.op, ast.Mult) and size > 10_000) or (
                isinstance(node.op, ast.Pow) and abs(right) > 64):
            self._refuse(node, 'that is too large')
        return OPERATORS[type(node.op)](left, right)

    def _refuse(self, node: ast.AST, why: str | None = None) -> None:
        line = getattr(node, 'lineno', '?')
        code = ast.unparse(node).splitlines()[0][:80]
        raise UserError(f'{self.path}, line {line}: {code}\n' + (
            why or 'This does more than assign values, and a config is read here without running '
            'it. If you trust the file: --trust'))
