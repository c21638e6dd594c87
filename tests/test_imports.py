"""Imports inside the package point one way."""
import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.helpers import ROOT

PACKAGE = 'convnext_mm'


def modules() -> dict[str, str]:
    """{dotted name: source} of every module of the package."""
    found = {}
    for path in (ROOT / PACKAGE).rglob('*.py'):
        if '.mim' not in path.parts:
            name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
            found[name.removesuffix('.__init__')] = path.read_text(encoding='utf-8')
    return found


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """{module: modules of the package that it imports}, imports inside functions included."""
    packages = {name.rpartition('.')[0] for name in sources}
    graph: dict[str, set[str]] = {name: set() for name in sources}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in sources}
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ''
                if node.level:
                    # A package's own name counts as one level.
                    parts = name.split('.') + [''] * (name in packages)
                    base = '.'.join([*parts[:-node.level], *filter(None, [node.module])])
                    assert base in sources, f'{name} imports {base}, which does not exist'
                for alias in node.names:
                    full = f'{base}.{alias.name}'
                    graph[name] |= {full if full in sources else base} & sources.keys()
    return {name: found - {name} for name, found in graph.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def by_room(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph of top-level modules and packages, without the package's own ``__init__``."""
    def room(name: str) -> str:
        return '.'.join(name.split('.')[:2])
    rooms: dict[str, set[str]] = {}
    for name, found in graph.items():
        if name != PACKAGE:
            rooms.setdefault(room(name), set()).update(
                room(other) for other in found if room(other) != room(name))
    return rooms


def test_no_circle_of_modules():
    # A package's __init__ re-exports its modules, which do not import it back.
    graph = import_graph(modules())
    assert len(graph) > 30
    assert graph[f'{PACKAGE}.backbone'] >= {f'{PACKAGE}.layers', f'{PACKAGE}.fused'}
    assert circle(graph) == []


def test_no_circle_of_rooms():
    assert circle(by_room(import_graph(modules()))) == []


def test_nobody_imports_the_top_level():
    assert [name for name, found in import_graph(modules()).items() if PACKAGE in found] == []


def test_the_plain_network_imports_nothing_of_the_fast_one():
    graph = import_graph(modules())
    for name in ('archs', 'layer_decay', 'layers', 'options'):
        assert not [other for other in graph[f'{PACKAGE}.{name}'] if 'fused' in other], name


@pytest.mark.parametrize('statement', [
    'from .b import f', 'from . import b', 'def f():\n    from .b import g', 'import p.b'])
def test_circles_are_found(statement):
    graph = import_graph({'p': '', 'p.a': statement, 'p.b': 'from p.a import x'})
    assert graph['p.a'] == {'p.b'}
    assert set(circle(graph)) == {'p.a', 'p.b'}


def test_no_test_module_imports_another():
    for path in (ROOT / 'tests').rglob('test_*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or '', *(alias.name for alias in node.names)]
                assert not [n for n in names if n.rpartition('.')[2].startswith('test_')
                            and (node.module or '').startswith('tests')], path
