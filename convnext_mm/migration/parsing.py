"""Reads old configs as data: the values that the files assign, without executing them."""
from __future__ import annotations

import ast
import builtins
import operator
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..errors import UserError
from ..inputs import config_folder

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
if not CONFIGS.is_dir():  # installed from a wheel
    CONFIGS = Path(__file__).resolve().parents[1] / '.mim' / 'configs'

OLD_KEYS = ('optimizer', 'optimizer_config', 'lr_config', 'momentum_config', 'runner', 'data',
            'evaluation', 'checkpoint_config', 'log_config', 'total_epochs', 'total_iters',
            'workflow', 'dist_params', 'resume_from', 'fp16', 'paramwise_cfg')
"""Top-level keys that have other names in mmengine."""

NEW_KEYS = ('optim_wrapper', 'param_scheduler', 'train_dataloader', 'val_dataloader',
            'test_dataloader', 'val_evaluator', 'test_evaluator', 'default_hooks', 'env_cfg',
            'default_scope', 'visualizer', 'log_processor')
"""Top-level keys that only mmengine reads."""

BASE_ALIASES = {
    'ade20k_640x640.py': 'ade20k_640.py',
    **{f'schedule_{name}.py': 'schedule_3x.py' for name in ('1x', '2x', '20e')},
    **{f'schedule_{name}.py': 'schedule_160k.py' for name in ('20k', '40k', '80k', '320k')}}
"""Old base files that ours replace under another name. The length of a schedule is kept."""

REGISTER_HINT = ('Replace or remove it, or give the module that registers it, in the style of '
                 'mmengine: --trust --import MODULE of tools/migrate_config.py.')
"""What to do about a type that is not registered; ends an error message."""

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
    """An old config, merged with its bases.

    Args:
        path: The config file.
        values: The merged values. ``_delete_`` stays in dicts that must replace those of our bases.
        own_bases: Bases that are not there: name in the config, the file that replaces it, which is
            one of ours, or of the installed toolbox.
    """

    path: Path
    values: dict[str, Any]
    own_bases: list[tuple[str, Path]]


class Styles(NamedTuple):
    """Which files of an inheritance chain are in which style, with the keys that show it.

    Args:
        old: Files for mmcv 0.x or 1.x.
        new: Files for mmengine; a base such as ``mmseg::…`` always is.
        inherits_ours: Whether a base is one of this package's files.
    """

    old: dict[str, list[str]]
    new: dict[str, list[str]]
    inherits_ours: bool

    @property
    def is_current(self) -> bool:
        """Whether mmengine reads the config as it is."""
        return not self.old and (bool(self.new) or self.inherits_ours)


def find_styles(path: str | Path) -> Styles:
    """The styles of a config file and of the bases that exist; none of what cannot be parsed."""
    old: dict[str, list[str]] = {}
    new: dict[str, list[str]] = {}
    inherits_ours = False
    for file, tree in _chain(str(path)):
        if tree is None:
            inherits_ours |= '::' not in file
            new.update({file: []} if '::' in file else {})
            continue
        names = [target.id for node in tree.body if isinstance(node, ast.Assign)
                 for target in node.targets if isinstance(target, ast.Name)]
        # In mmengine's style, the names of old keys are variables.
        found, keys = (new, NEW_KEYS) if set(NEW_KEYS) & set(names) else (old, OLD_KEYS)
        shown = [name for name in names if name in keys]
        found.update({file: shown} if shown else {})
    return Styles(old, new, inherits_ours)


def old_keys(path: str | Path) -> list[str]:
    """The old-style keys that a config or its bases assign; empty if it is no old config.

    Raises:
        UserError: Some files of its inheritance chain are old, others are not.
    """
    styles = find_styles(path)
    if styles.old and styles.new:
        (old, old_names), (new, new_names) = (
            next(iter(found.items())) for found in (styles.old, styles.new))
        sets = f' (it sets {", ".join(new_names[:3])})' if new_names else ''
        raise UserError(
            f'{path} mixes two styles, and no version reads both: {old} is for mmcv 0.x or 1.x '
            f"(it sets {', '.join(old_names[:3])}), {new} for mmengine{sets}. Write the old "
            "settings as mmengine's (optimizer → optim_wrapper.optimizer, data → "
            'train_dataloader, lr_config → param_scheduler), or inherit old files only')
    return next(iter(styles.old.values()), [])


def check_is_data(path: str | Path) -> None:
    """Check that a config in mmengine's style, which mmengine executes, only assigns values.

    Raises:
        UserError: It or a base does more, named with its line.
    """
    for file, tree in _chain(str(path)):
        nodes = list(ast.walk(tree)) if tree else []
        stored = {node.id for node in nodes if isinstance(node, ast.Name)
                  and isinstance(node.ctx, ast.Store)} - set(dir(builtins))
        known = {*stored, *FUNCTIONS, '_base_'}
        for node in nodes:
            match node:
                case ast.Assign() | ast.AnnAssign() | ast.AugAssign() | ast.Expr():
                    plain = True
                case ast.Call():
                    plain = isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS
                case ast.Name(ctx=ast.Store()):  # no other meaning for dict
                    plain = node.id in stored or node.id == '_base_'
                case ast.Name():
                    plain = node.id in known
                case ast.Attribute():
                    plain = not node.attr.startswith('__')
                case _:
                    plain = not isinstance(node, ast.stmt)
            if not plain:
                _refuse(Path(file), node)


def _chain(path: str, seen: tuple[str, ...] = ()) -> Iterator[tuple[str, ast.Module | None]]:
    """A config file and its bases with their code; None for ours and those of other packages."""
    if '::' in path:
        yield path, None
        return
    file = Path(path).resolve()
    if str(file) in seen:
        return
    if seen and file.is_file() and file.is_relative_to(CONFIGS):
        yield str(file), None
        return
    try:
        tree = ast.parse(_expand_templates(file.read_text(encoding='utf-8')))
        names = _base_names(tree, file)
    except (OSError, SyntaxError, ValueError, UserError):
        return
    yield str(file), tree
    for name in names:
        yield from _chain(name if '::' in name else str(file.parent / name), (*seen, str(file)))


def parse_config(path: str | Path, trust: bool = False, chain: tuple[Path, ...] = ()) -> OldConfig:
    """Read an old config and its bases.

    Args:
        path: The config file.
        trust: Execute the files instead of reading them as data.
        chain: The files that inherit this one, outermost first.

    Raises:
        UserError: The file or a base is missing, has a syntax error, inherits itself, or contains
            code where only values are allowed.
    """
    path = Path(path).resolve()
    if path in chain:
        raise UserError('Circular _base_: ' + ' → '.join(
            str(p) for p in (*chain[chain.index(path):], path)))
    if not path.is_file():
        raise UserError(f'Config not found: {path}')
    try:
        text = _expand_templates(path.read_text(encoding='utf-8'), path)
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, 'lineno', None)
        raise UserError(f'{path}{f", line {line}" if line else ""}: {error}') from error
    own_bases: list[tuple[str, Path]] = []
    inherited: dict[str, Any] = {}
    for name in _base_names(tree, path):
        file = (path.parent / name).resolve()
        if file.is_file() and not file.is_relative_to(CONFIGS):
            base = parse_config(file, trust, (*chain, path))
            own_bases += base.own_bases
            duplicates = inherited.keys() & base.values.keys()
            if duplicates:
                raise UserError(f'{path}: more than one file in _base_ sets '
                                f'{", ".join(sorted(duplicates))}')
            inherited.update(base.values)
        else:
            own_bases.append((name, _find_own_base(name, path)))
    if trust:
        values = _execute(text, path, inherited)
    else:
        values = ConfigEvaluator(path, inherited).evaluate(tree)
    return OldConfig(path, merge(inherited, values, keep_delete=True), own_bases)


def merge(base: dict, new: dict, keep_delete: bool = False) -> dict:
    """Merge ``new`` into a copy of ``base`` as mmengine does: dicts by key, all else replaced.

    Args:
        base: Stays unchanged.
        new: A dict in it with ``_delete_=True`` replaces the dict of ``base``.
        keep_delete: Keep ``_delete_`` in the result, for a later merge into another base.
    """
    merged = dict(base)
    for key, value in new.items():
        if isinstance(value, dict):
            replace = value.get('_delete_', False)
            inherited = merged.get(key)
            value = {k: v for k, v in value.items() if k != '_delete_'}
            value = merge(inherited if isinstance(inherited, dict) and not replace else {}, value,
                          keep_delete)
            if replace and keep_delete:
                value['_delete_'] = True
        merged[key] = deepcopy(value)
    return merged


def _base_names(tree: ast.Module, path: Path) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
                isinstance(t, ast.Name) and t.id == '_base_' for t in node.targets):
            try:
                names = ast.literal_eval(node.value)
                return [names] if isinstance(names, str) else list(names)
            except (TypeError, ValueError) as error:
                raise UserError(f'{path}, line {node.lineno}: _base_ must be a string or a list of '
                                'strings') from error
    return []


def _find_own_base(name: str, path: Path) -> Path:
    """The file that replaces a base which is missing or ours: ours, or the toolbox's own."""
    filename = name.replace('\\', '/').rsplit('/', 1)[-1]
    filename = BASE_ALIASES.get(filename, filename)
    matches = [match for pattern in ('_base_/*/', '_base_/', '')
               for match in sorted(CONFIGS.glob(pattern + filename))]
    if not matches:  # a base of mmseg or mmdet, whose current version is installed
        matches = [match for folder in map(config_folder, ('mmseg', 'mmdet')) if folder
                   for match in sorted(folder.glob(f'_base_/*/{filename}'))]
    if not matches:
        known = sorted(p.name for p in CONFIGS.glob('_base_/*/*.py'))
        raise UserError(f'{path}: base {name} not found at {(path.parent / name).resolve()}. Put '
                        'it there, or use one that this package provides: '
                        f'{", ".join(known)}, or a recipe in configs/')
    return matches[0]


def _expand_templates(text: str, path: Path | None = None) -> str:
    """Replace ``{{_base_.x}}`` by Python, and ``{{ fileBasename }}`` and the like by values."""
    text = re.sub(r'''(['"]?)\{\{\s*(_base_(?:\.\w+)+)\s*\}\}\1''', r'\2', text)
    known = dict(fileDirname=str(path.parent), fileBasename=path.name,
                 fileBasenameNoExtension=path.stem, fileExtname=path.suffix) if path else {}
    return re.sub(r'\{\{\s*(\w+)\s*\}\}', lambda m: known.get(m[1], m[0]), text)


def _execute(text: str, path: Path, inherited: dict[str, Any]) -> dict[str, Any]:
    """Execute a trusted file and return the values it assigns."""
    namespace: dict[str, Any] = {'_base_': _BaseValues(inherited), '__file__': str(path)}
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


class _BaseValues(dict):
    """Inherited values with attribute access: ``_base_.model.backbone``."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(f'_base_ has no {name!r}') from None
        return _BaseValues(value) if isinstance(value, dict) else value


class ConfigEvaluator:
    """Evaluates assignments of plain values, and refuses everything else.

    Args:
        path: File name for error messages.
        inherited: The values behind ``_base_``.
    """

    def __init__(self, path: Path, inherited: dict[str, Any]) -> None:
        self.path = path
        self.names: dict[str, Any] = {'_base_': _BaseValues(inherited)}

    def evaluate(self, tree: ast.Module) -> dict[str, Any]:
        """Return the variables of a file.

        Raises:
            UserError: A statement that does more than assign values, named with its line.
        """
        for node in tree.body:
            self._evaluate_statement(node)
        return {key: value for key, value in self.names.items() if not key.startswith('_')}

    def _evaluate_statement(self, node: ast.stmt) -> None:
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
            for element, part in zip(target.elts, value, strict=True):
                self._assign(element, part)
        elif isinstance(target, ast.Subscript):
            self._value(target.value)[self._value(target.slice)] = value
        else:
            self._refuse(target)

    def _value(self, node: ast.expr) -> Any:
        """The value of an expression; any exception becomes a UserError with its line."""
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
                    self._refuse(node, f'{node.id} is used before it is assigned')
                return self.names[node.id]
            case ast.List() | ast.Tuple() | ast.Set():
                kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
                return kind(self._unpack(node.elts))
            case ast.Dict():
                result: dict = {}
                for key, item in zip(node.keys, node.values, strict=True):
                    result.update(value(item) if key is None else {value(key): value(item)})
                return result
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
            case ast.Attribute() if isinstance(value(node.value), _BaseValues):
                return deepcopy(getattr(value(node.value), node.attr))
            case ast.JoinedStr():
                return ''.join(map(value, node.values))
            case ast.FormattedValue(conversion=-1, format_spec=None):
                return str(value(node.value))
            case ast.Call(func=ast.Name(id=name)) if name in FUNCTIONS and name not in self.names:
                kwargs: dict = {}
                for keyword in node.keywords:
                    kwargs.update(value(keyword.value) if keyword.arg is None
                                  else {keyword.arg: value(keyword.value)})
                return FUNCTIONS[name](*self._unpack(node.args), **kwargs)
            case ast.ListComp() | ast.GeneratorExp():
                return [value(node.elt) for _ in self._loop(node.generators)]
            case ast.DictComp():
                return {value(node.key): value(node.value) for _ in self._loop(node.generators)}
        self._refuse(node)

    def _unpack(self, nodes: list[ast.expr]) -> list[Any]:
        """The values of a list, tuple, set or argument list, in which ``*items`` may occur."""
        return [item for node in nodes for item in (
            self._value(node.value) if isinstance(node, ast.Starred) else [self._value(node)])]

    def _loop(self, generators: list[ast.comprehension]) -> Iterator[None]:
        """Assign each combination of the variables of a comprehension in turn."""
        if not generators:
            yield
            return
        first, *rest = generators
        outer_names = dict(self.names)
        for item in self._value(first.iter):
            self._assign(first.target, item)
            if all(self._value(test) for test in first.ifs):
                yield from self._loop(rest)
        self.names = outer_names

    def _apply(self, node: ast.BinOp | ast.AugAssign, left: Any, right: Any) -> Any:
        size = max((len(v) for v in (left, right) if hasattr(v, '__len__')), default=0)
        if (isinstance(node.op, ast.Mult) and size > 10_000) or (
                isinstance(node.op, ast.Pow) and abs(right) > 64):
            self._refuse(node, 'The result would be too large')
        return OPERATORS[type(node.op)](left, right)

    def _refuse(self, node: ast.AST, reason: str | None = None) -> NoReturn:
        _refuse(self.path, node, reason)


def _refuse(path: Path, node: ast.AST, reason: str | None = None) -> NoReturn:
    line = getattr(node, 'lineno', '?')
    code = ast.unparse(node).splitlines()[0][:80]
    raise UserError(f'{path}, line {line}: {code}\n' + (
        reason or 'Configs are read as data, and this does more than assign values. To execute '
        'a file that you trust, use --trust of tools/migrate_config.py'))
