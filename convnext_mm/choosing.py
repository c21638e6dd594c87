"""Which recipe to take: one rule on the tables of ``docs/tables``.

``docs/choose/index.html`` follows the same rule; ``tests/data/choices.json`` has cases for both.
"""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any, NamedTuple

from .errors import UserError
from .inputs import shipped_file

TASKS = {'seg': 'segmentation', 'det': 'detection'}
"""Names of the tables."""
PREFERENCES = {'accuracy': 'the most accurate', 'balance': 'the fastest within 1 point of the most '
               'accurate', 'speed': 'the fastest'}
RUNTIMES = {'pytorch': 'PyTorch', 'onnx': 'ONNX Runtime', 'int8': 'ONNX Runtime in int8'}
"""Of the latencies."""
POINT = 1.0 + 1e-9  # of accuracy; published figures have one decimal

Row = dict[str, Any]
Table = dict[str, Any]


class Choice(NamedTuple):
    """What :func:`choose` found.

    Args:
        best: The recipe to take; None: none fits.
        runner_up: The next best that fits, if there is one.
        nearest: If none fits, the one that exceeds a limit by the smallest factor.
        fitting: How many of the recipes with published results fit.
        untrained: Those without that fit.
    """

    best: Row | None
    runner_up: Row | None
    nearest: Row | None
    fitting: int
    untrained: list[Row]


def choose(table: Table, prefer: str = 'accuracy', gpu_memory: float | None = None,
           latency: float | None = None, runtime: str = 'pytorch') -> Choice:
    """Choose a recipe with published results.

    Args:
        table: A table of ``docs/tables``.
        prefer: A key of :data:`PREFERENCES`.
        gpu_memory: The most that training may need, in GB; None: no limit.
        latency: The most milliseconds that an image may take; None: no limit.
        runtime: A key of :data:`RUNTIMES`, for the latency.
    """
    def excess(row: Row) -> float:
        """The largest factor by which a limit is exceeded; at most 1: the recipe fits."""
        return max(needed_memory(table, row) / (gpu_memory or math.inf),
                   latency_of(row, runtime) / (latency or math.inf))
    trained = [row for row in table['recipes'] if row['accuracy'] is not None]
    fitting = [row for row in trained if excess(row) <= 1]
    untrained = [row for row in table['recipes'] if row['accuracy'] is None and excess(row) <= 1]
    if not fitting:
        nearest = min(trained, key=lambda row: (excess(row), -row['accuracy']))
        return Choice(None, None, nearest, 0, untrained)
    most = max(row['accuracy'] for row in fitting)

    def rank(row: Row) -> tuple[float, ...]:
        by_accuracy = -row['accuracy'], latency_of(row, runtime)
        if prefer == 'accuracy' or (prefer == 'balance' and most - row['accuracy'] > POINT):
            return 1, *by_accuracy
        return 0, latency_of(row, runtime), -row['accuracy']
    best, *others = sorted(fitting, key=rank)
    return Choice(best, others[0] if others else None, None, len(fitting), untrained)


def needed_memory(table: Table, row: Row) -> float:
    """GB of GPU memory that training needs: what is estimated, with the table's margin."""
    return table['memory_margin'] * row['training_memory_gb']


def latency_of(row: Row, runtime: str = 'pytorch') -> float:
    """Milliseconds for an image."""
    return row['latency_ms'][runtime]


def anchors(table: Table, runtime: str = 'pytorch') -> list[Row]:
    """The recipes to measure on another machine.

    Those with ConvNeXt V1 whose backbone has the smallest and the largest share of the FLOPs, since
    between them the others are interpolated, and the middle one with V2.
    """
    rows = sorted(table['recipes'], key=lambda row: latency_of(row, runtime))
    second = [row for row in rows if _is_v2(row)]
    first = sorted((row for row in rows if not _is_v2(row)),
                   key=lambda row: row['backbone_flops'] / row['flops'])
    chosen = [*first[:1], *second[len(second) // 2:][:1], *first[1:][-1:]]
    return sorted(chosen, key=lambda row: latency_of(row, runtime))


def _is_v2(row: Row) -> bool:
    return 'convnextv2' in row['name']


def predict(table: Table, measured: Mapping[str, float], runtime: str = 'pytorch') -> Table:
    """The table for another machine, from the latencies of some recipes there.

    The others take the table's, times the ratio of what both machines need for the FLOPs of the
    backbone and for those of neck and heads, per FLOP, which the recipes with V1 that were measured
    tell. V2's global response normalization depends on the machine in another way than products do,
    so that recipes with V2 are multiplied by what those that were measured deviate.

    Args:
        table: A table of ``docs/tables``.
        measured: Milliseconds by name.
        runtime: Of these.

    Returns:
        A new table, of this runtime alone. ``latency_from`` of each row is 'measured here' or
        'predicted'.
    """
    here = [row for row in table['recipes'] if row['name'] in measured]
    known = [row for row in here if not _is_v2(row)] or here
    old = _rates(known, [latency_of(row, runtime) for row in known])
    new = _rates(known, [measured[row['name']] for row in known])
    if not old or not new:
        ratio = fmean(measured[row['name']] / latency_of(row, runtime) for row in known)
        old, new = (1.0, 1.0), (ratio, ratio)

    def scaled(row: Row) -> float:
        return latency_of(row, runtime) * _time(row, new) / _time(row, old)
    factors = [measured[row['name']] / scaled(row) for row in here if _is_v2(row)] or [1.0]
    rows = []
    for row in table['recipes']:
        value = scaled(row) * (fmean(factors) if _is_v2(row) else 1.0)
        source = 'predicted'
        if row['name'] in measured:
            value, source = measured[row['name']], 'measured here'
        rows.append(dict(row, latency_ms={runtime: value}, latency_from=source))
    return dict(table, recipes=rows)


def _parts(row: Row) -> tuple[float, float]:
    """FLOPs of the backbone, and of neck and heads."""
    return row['backbone_flops'], row['flops'] - row['backbone_flops']


def _time(row: Row, rates: tuple[float, float]) -> float:
    """Milliseconds, at so many per FLOP of each part."""
    return sum(flops * rate for flops, rate in zip(_parts(row), rates, strict=True))


def _rates(rows: list[Row], times: list[float]) -> tuple[float, float] | None:
    """Milliseconds per FLOP of each part, from two recipes; None: they do not tell."""
    if len(rows) != 2:
        return None
    (a, b), (c, d) = map(_parts, rows)
    determinant = a * d - b * c
    if not determinant:
        return None
    found = ((d * times[0] - b * times[1]) / determinant,
             (a * times[1] - c * times[0]) / determinant)
    return found if min(found) > 0 else None


def explain(table: Table, prefer: str = 'accuracy', gpu_memory: float | None = None,
            latency: float | None = None, runtime: str = 'pytorch') -> str:
    """The choice in words: the recipe, why, and the runner-up.

    Args:
        table: See :func:`choose`.
        prefer: See :func:`choose`.
        gpu_memory: See :func:`choose`.
        latency: See :func:`choose`.
        runtime: See :func:`choose`.

    Raises:
        UserError: None fits; names what comes nearest.
    """
    found = choose(table, prefer, gpu_memory, latency, runtime)
    limits = ' and '.join(f'{limit:g} {unit}' for limit, unit in (
        (gpu_memory, 'GB for training'), (latency, 'ms an image')) if limit is not None)
    notes = ''.join(f'\n  {row["name"]}: {_needs(table, row, runtime)}' for row in found.untrained)
    notes = notes and f'\nAlso within the limits, but not trained yet:{notes}'
    if 'latency_from' not in table['recipes'][0]:
        notes += (f'\nThe latency is that of one thread of {table["machine"]}, in '
                  f'{RUNTIMES[runtime]}; --measure-here predicts that of this machine')
    if runtime == 'int8':
        notes += (f'\nThe {table["metric"]} is that of the fp32 model: tools/export.py --int8 '
                  'measures how much is lost on your images')
    if found.best is None:
        assert found.nearest is not None
        raise UserError(
            f'No recipe with published results fits {limits}. The nearest is '
            f'{found.nearest["name"]}: {_needs(table, found.nearest, runtime)}. Allow more, or '
            'make it smaller: model.backbone.memory=minimal in training, tools/prune.py'
            + ' and tools/export.py --int8' * (runtime != 'int8') + f' for inference{notes}')
    lines = [found.best['name'], f'  {_figures(table, found.best, runtime)}',
             f'  why: {PREFERENCES[prefer]} of the {found.fitting} recipes with published results'
             + (f' that fit {limits}' if limits else '')]
    if found.runner_up:
        lines += [f'runner-up: {found.runner_up["name"]}',
                  f'  {_figures(table, found.runner_up, runtime)}']
    return '\n'.join(lines) + notes


def _figures(table: Table, row: Row, runtime: str) -> str:
    return (f'{row["title"]}: {table["metric"]} {row["accuracy"]}, '
            f'{_needs(table, row, runtime)}')


def _needs(table: Table, row: Row, runtime: str) -> str:
    """The latency with where it is from, unless it is the table's, memory and parameters."""
    source = f' ({row["latency_from"]})' if 'latency_from' in row else ''
    return (f'{latency_of(row, runtime):.0f} ms an image{source}, about '
            f'{needed_memory(table, row):.1f} GB for training (estimated), '
            f'{row["parameters"] / 1e6:.0f}M parameters')


def read_table(task: str, runtime: str = 'pytorch') -> Table:
    """Read a table of ``docs/tables``.

    Args:
        task: A key of :data:`TASKS`.
        runtime: A key of :data:`RUNTIMES`.

    Raises:
        UserError: It is missing, or has no latencies in the runtime.
    """
    name = f'docs/tables/{TASKS[task]}.json'
    table = json.loads(shipped_file(name).read_text(encoding='utf-8'))
    if any(runtime not in row['latency_ms'] for row in table['recipes']):
        raise UserError(f'{name} has no latencies in {RUNTIMES[runtime]}. Leave out --runtime, or '
                        'measure them: tools/model_table.py --measure')
    return table
