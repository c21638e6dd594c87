"""The package has no import cycles."""
import ast
import functools
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


@functools.cache
def package_graph() -> dict[str, set[str]]:
    return import_graph(modules())


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return []


def top_level_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph of top-level modules and subpackages, without the package's own ``__init__``."""
    def top_level(name: str) -> str:
        return '.'.join(name.split('.')[:2])
    result: dict[str, set[str]] = {}
    for name, imported in graph.items():
        if name != PACKAGE:
            result.setdefault(top_level(name), set()).update(
                top_level(other) for other in imported if top_level(other) != top_level(name))
    return result


def test_no_cycle_of_modules():
    # A package's __init__ re-exports its modules, which do not import it back.
    graph = package_graph()
    assert len(graph) > 30
    assert graph[f'{PACKAGE}.backbone'] >= {f'{PACKAGE}.layers', f'{PACKAGE}.fused'}
    assert find_cycle(graph) == []


def test_no_cycle_of_subpackages():
    graph = top_level_graph(package_graph())
    assert graph[f'{PACKAGE}.backbone'] >= {f'{PACKAGE}.layers', f'{PACKAGE}.fused'}
    assert find_cycle(graph) == []


def test_no_module_imports_the_top_level():
    assert [name for name, found in package_graph().items() if PACKAGE in found] == []


def test_the_plain_network_does_not_import_the_fast_path():
    graph = package_graph()
    for name in ('archs', 'layer_decay', 'layers', 'options'):
        assert not [other for other in graph[f'{PACKAGE}.{name}'] if 'fused' in other], name


@pytest.mark.parametrize('statement', [
    'from .b import f', 'from . import b', 'def f():\n    from .b import g', 'import p.b'])
def test_cycles_are_found(statement):
    graph = import_graph({'p': '', 'p.a': statement, 'p.b': 'from p.a import x'})
    assert graph['p.a'] == {'p.b'}
    assert set(find_cycle(graph)) == {'p.a', 'p.b'}


def test_no_test_module_imports_another():
    imported = [(path.name, f'{node.module}.{alias.name}')
                for path in (ROOT / 'tests').rglob('test_*.py')
                for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
                if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('tests')
                for alias in node.names]
    assert ('test_imports.py', 'tests.helpers.ROOT') in imported
    assert [(path, name) for path, name in imported
            if any(part.startswith('test_') for part in name.split('.'))] == []
