"""Where the names that a module for mmcv 1.x imports are now, as lines to replace in it."""
from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

TOOLBOXES = ('mmseg', 'mmdet')
OLD_PACKAGES = ('mmcv', *TOOLBOXES, 'mmcls', 'mmcv_custom')

REGISTRIES = {
    **dict.fromkeys(('BACKBONES', 'NECKS', 'HEADS', 'LOSSES', 'SEGMENTORS', 'DETECTORS',
                     'ROI_EXTRACTORS', 'SHARED_HEADS', 'TRANSFORMER', 'LINEAR_LAYERS'), 'MODELS'),
    **dict.fromkeys(('BBOX_ASSIGNERS', 'BBOX_SAMPLERS', 'BBOX_CODERS', 'IOU_CALCULATORS',
                     'MATCH_COST', 'ANCHOR_GENERATORS', 'PRIOR_GENERATORS', 'PIXEL_SAMPLERS'),
                    'TASK_UTILS'),
    'PIPELINES': 'TRANSFORMS', 'DATASETS': 'DATASETS', 'SAMPLERS': 'DATA_SAMPLERS'}
"""Registries of the old toolboxes, and those of ``mmseg.registry`` and ``mmdet.registry``."""

BUILDERS = {
    **{f'build_{part}': 'MODELS.build' for part in (
        'backbone', 'neck', 'head', 'loss', 'segmentor', 'detector', 'roi_extractor',
        'shared_head', 'transformer', 'positional_encoding')},
    **{f'build_{part}': 'TASK_UTILS.build' for part in (
        'assigner', 'sampler', 'bbox_coder', 'iou_calculator', 'match_cost', 'anchor_generator',
        'prior_generator')},
    'build_dataset': 'DATASETS.build'}
"""Functions that built a part, and what builds it now."""

RENAMED = {
    **dict.fromkeys((
        'ATTENTION', 'FEEDFORWARD_NETWORK', 'POSITIONAL_ENCODING', 'TRANSFORMER_LAYER',
        'TRANSFORMER_LAYER_SEQUENCE', 'ACTIVATION_LAYERS', 'CONV_LAYERS', 'NORM_LAYERS',
        'PLUGIN_LAYERS', 'UPSAMPLE_LAYERS'), ('mmengine.registry', 'MODELS')),
    'OPTIMIZER_BUILDERS': ('mmengine.registry', 'OPTIM_WRAPPER_CONSTRUCTORS'),
    'DefaultOptimizerConstructor': ('mmengine.optim', 'DefaultOptimWrapperConstructor'),
    'get_root_logger': ('mmengine.logging', 'MMLogger.get_current_instance'),
    'get_logger': ('mmengine.logging', 'MMLogger.get_current_instance')}
"""Names that are in another module under another name, whatever the toolbox."""

DATASET_NAMES = dict(mmseg='BaseSegDataset', mmdet='BaseDetDataset')
"""What CustomDataset of each toolbox is now."""

GONE = dict.fromkeys(('auto_fp16', 'force_fp32'), 'AmpOptimWrapper chooses the precision')
"""Decorators without a successor, and why they are not needed."""

PLACES = (
    'mmengine.model', 'mmengine.runner', 'mmengine.dist', 'mmengine.registry', 'mmengine.config',
    'mmengine.utils', 'mmengine.utils.dl_utils', 'mmengine.fileio', 'mmengine.logging',
    'mmengine.hooks', 'mmengine.optim', 'mmengine.structures', 'mmengine.runner.checkpoint',
    'mmengine.model.weight_init', 'mmcv', 'mmcv.cnn', 'mmcv.cnn.bricks',
    'mmcv.cnn.bricks.transformer', 'mmcv.ops', 'mmcv.transforms', 'mmcv.image')
TOOLBOX_PLACES = dict(
    mmseg=('registry', 'models', 'models.utils', 'models.losses', 'models.backbones',
           'models.decode_heads', 'models.decode_heads.decode_head', 'datasets',
           'datasets.transforms', 'structures', 'utils'),
    mmdet=('registry', 'models', 'models.utils', 'models.layers', 'models.losses',
           'models.backbones', 'models.necks', 'models.dense_heads', 'models.roi_heads',
           'models.detectors', 'models.task_modules', 'models.task_modules.prior_generators',
           'models.task_modules.assigners', 'models.task_modules.samplers', 'structures',
           'structures.bbox', 'structures.mask', 'datasets', 'datasets.transforms', 'utils'))
"""Modules in which a name that has moved is looked for, in this order."""


class Moved(NamedTuple):
    """Where a name is now.

    Args:
        module: The module to import it from; '' if it is gone.
        name: What to write for it there, such as ``MODELS.build``; its first part is imported.
        note: What else has changed.
    """

    module: str
    name: str
    note: str = ''


class Change(NamedTuple):
    """Lines of a file, and what to write instead; '' if they are to be removed."""

    first: int
    last: int
    old: str
    new: str
    note: str = ''

    def __str__(self) -> str:
        lines = f'line {self.first}' if self.first == self.last else (
            f'lines {self.first}-{self.last}')
        note = f'  ({self.note})' if self.note else ''
        return f'  {lines}: {self.old} → {self.new or "remove it"}{note}'


def find_changes(path: Path, scope: str) -> list[Change]:
    """The lines of a Python file that import or use what is elsewhere now.

    Args:
        path: The file; one that cannot be parsed has no changes.
        scope: 'mmseg' or 'mmdet': whose registries are meant where the file does not say it.
    """
    try:
        text = path.read_text(encoding='utf-8')
        tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return []
    moved: dict[str, Moved] = {}
    changes: list[Change] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            changes += _change_of_import(node, scope, moved)
    modules = _change_attributes(tree, scope, moved)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and modules:
            kept = [name for name in node.names if _exists(name.name)]
            if any(name.name.partition('.')[0] in OLD_PACKAGES for name in node.names):
                lines = [f'import {", ".join(map(ast.unparse, kept))}'] if kept else []
                lines += [f'import {name}' for name in modules]
                changes.append(_change(node, '; '.join(lines)))
                modules = []
    changes += _changes_of_use(tree, text.splitlines(), moved)
    return sorted(changes)


def _change_of_import(node: ast.ImportFrom, scope: str, moved: dict[str, Moved]) -> list[Change]:
    """The change of an import, if a name of it has moved; its names are added to ``moved``."""
    module, root = node.module or '', (node.module or '').partition('.')[0]
    if not node.level and root not in OLD_PACKAGES:
        return []
    scope = root if root in TOOLBOXES else scope
    lines: dict[str, list[str]] = {}
    notes: list[str] = []
    changed = False
    for alias in node.names:
        kept = root in ('mmcv', *TOOLBOXES) and not node.level and _exists(module, alias.name)
        place = Moved(module, alias.name) if kept else find_name(alias.name, scope)
        if place is None:
            if root != 'mmcv_custom':  # there, it is the user's own
                notes.append(f'{alias.name} is not found any more: replace it')
            place = Moved(f'{"." * node.level}{module}', alias.name)
        elif not kept:
            changed = True
            imported = place.name.partition('.')[0]
            if imported != alias.name or not place.module:
                moved[alias.asname or alias.name] = place
            if place.note and place.note not in notes:
                notes.append(place.note)
        if place.module:
            name = place.name.partition('.')[0]
            if alias.asname and name == place.name:
                name += f' as {alias.asname}'
                moved.pop(alias.asname, None)
            names = lines.setdefault(place.module, [])
            names += [name] if name not in names else []
    if root == 'mmcv_custom' and any(alias.name == 'load_checkpoint' for alias in node.names):
        notes.append('it does not resize position embeddings')
    if not changed and (node.level or not notes):
        return []
    return [_change(node, '; '.join(f'from {place} import {", ".join(names)}'
                                    for place, names in lines.items()), ', '.join(notes))]


def find_name(name: str, scope: str) -> Moved | None:
    """Where a name of mmcv 1.x or of an old toolbox is now; None: nowhere that is known."""
    if name in GONE:
        return Moved('', name, GONE[name])
    if name in REGISTRIES:
        return Moved(f'{scope}.registry', REGISTRIES[name])
    if name in BUILDERS:
        return Moved(f'{scope}.registry', BUILDERS[name])
    if name in RENAMED:
        return Moved(*RENAMED[name])
    if name == 'CustomDataset':
        return Moved(f'{scope}.datasets', DATASET_NAMES[scope],
                     'CLASSES and PALETTE become METAINFO = dict(classes=..., palette=...)')
    places = (*PLACES, *(f'{scope}.{place}' for place in TOOLBOX_PLACES[scope]))
    return next((Moved(place, name) for place in places if _offers(place, name)), None)


def _exists(module: str, name: str = '') -> bool:
    """Whether an installed module exists, and has a name or a submodule of that name."""
    try:
        found = import_module(module)
        if name and not hasattr(found, name):
            import_module(f'{module}.{name}')
    except Exception:  # such as a toolbox's assertion on the version of mmcv
        return False
    return True


def _offers(module: str, name: str) -> bool:
    """Whether a module is the one to import a name from, not one that only uses it."""
    if not _exists(module, name):
        return False
    found = import_module(module)
    return name in getattr(found, '__all__', ()) or (
        getattr(getattr(found, name, None), '__module__', '') == module)


def _change_attributes(tree: ast.Module, scope: str, moved: dict[str, Moved]) -> list[str]:
    """Add dotted names such as ``mmcv.runner.BaseModule`` to ``moved``; returns their modules."""
    modules: list[str] = []
    imported = {alias.name.partition('.')[0] for node in ast.walk(tree)
                if isinstance(node, ast.Import) for alias in node.names if not alias.asname}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        dotted = ast.unparse(node)
        module, _, name = dotted.rpartition('.')
        if module.partition('.')[0] not in imported & set(OLD_PACKAGES) or not all(
                part.isidentifier() for part in dotted.split('.')) or _exists(module, name):
            continue
        place = find_name(name, scope)
        if place is not None and place.module:
            moved[dotted] = place._replace(name=f'{place.module}.{place.name}')
            modules += [place.module] if place.module not in modules else []
    return modules


def _changes_of_use(tree: ast.Module, lines: Sequence[str],
                    moved: Mapping[str, Moved]) -> Iterator[Change]:
    """The changes of lines that use a moved name, or are decorated by one that is gone."""
    edits: dict[int, list[tuple[int, int, str]]] = {}
    removed: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            for decorator in node.decorator_list:
                called = decorator.func if isinstance(decorator, ast.Call) else decorator
                place = moved.get(ast.unparse(called))
                if place is not None and not place.module:
                    removed.add(decorator.lineno)
                    yield Change(decorator.lineno, decorator.end_lineno or decorator.lineno,
                                 '@' + ast.unparse(decorator), '', place.note)
        logger = isinstance(node, ast.Call) and 'get_current_instance' in str(
            moved.get(ast.unparse(node.func)))
        target = node.func if logger and isinstance(node, ast.Call) else node
        if not isinstance(target, (ast.Name, ast.Attribute)):
            continue
        place = moved.get(ast.unparse(target))
        whole = node if logger and isinstance(node, ast.Call) else target
        if place is None or not place.module or whole.end_lineno != target.lineno:
            continue
        edits.setdefault(target.lineno, []).append((
            target.col_offset, whole.end_col_offset or 0, place.name + '()' * logger))
    for number, parts in edits.items():
        text = new = lines[number - 1].encode()  # offsets of ast count bytes
        # The outermost of parts at one place comes last: calls of loggers have no arguments now.
        for start, end, name in sorted(set(parts), reverse=True):
            if not any(s <= start and end < e for s, e, _ in parts):
                new = new[:start] + name.encode() + new[end:]
        if number not in removed:
            yield Change(number, number, text.decode().strip(), new.decode().strip())


def _change(node: ast.stmt, new: str, note: str = '') -> Change:
    return Change(node.lineno, node.end_lineno or node.lineno, ast.unparse(node), new, note)
