"""The tables of ``docs/tables``: what each recipe needs, and its published accuracy.

Parameters and FLOPs are counted, memory is estimated, the latency is measured.
"""
from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import track

from . import complexity
from .choosing import RUNTIMES, TASKS, Row, Table, anchors, latency_of, predict
from .deployment.optional import check_installed
from .engine import checks
from .engine.memory import estimate_inference_memory, estimate_training_memory
from .errors import UserError
from .inputs import config_folder, find_recipe
from .latency import measure_latency
from .utils import atomic_path, processor_name

METRICS = {'seg': 'mIoU', 'det': 'box AP'}
MARGINS = {'seg': 1.35, 'det': 1.9}
MARGIN = ("Measured by OpenMMLab, training takes up to this many times what is estimated for its "
          'operations (UPerNet xlarge: twice)')
METHOD = dict(
    parameters='counted',
    flops='multiply-adds of one image of flops_size, counted',
    training_memory_gb="estimated: 2 images in the recipe's own precision, as autograd saves "
                       'tensors; without workspaces and fragmentation',
    inference_memory_gb='estimated: weights and feature maps of one image of size in fp32; without '
                        'workspaces',
    latency_ms='measured: processor time for one image of size, one thread, random weights, the '
               'least of the repeats; of detectors, 1000 proposals, 100 detections and their '
               'masks. pytorch: test_step in fp32, onnx: ONNX Runtime in fp32, int8: ONNX Runtime '
               'with all convolutions and linear layers in int8',
    accuracy='published by the authors for their weights, see accuracy_source. null: not trained')


def write_tables(folder: str | Path, configs: Iterable[str], repeats: int = 2) -> list[Path]:
    """Measure recipes, and write a table as JSON for each task among them.

    Rows of other recipes in a table of the same machine are kept.

    Args:
        folder: Where the tables are written.
        configs: Recipes that are listed in a metafile of ``configs/``.
        repeats: How often a model runs after its first run.

    Raises:
        UserError: A config is not listed, or cannot be read, packages are missing, or a table in
            the folder has other recipes of another machine.
    """
    published, paths = read_metafiles(), []
    tables: dict[str, list[str]] = {task: [] for task in TASKS}
    for path in configs:
        if Path(path).stem not in published:
            raise UserError(f'{path}: expected a recipe that is listed in configs/metafile_*.yml')
        in_detection = checks.read_config(path).get('default_scope') == 'mmdet'
        tables['det' if in_detection else 'seg'].append(path)
    check_installed('onnx', 'onnxscript', 'onnxruntime', extra='export')
    for task, name in TASKS.items():
        if not tables[task]:
            continue
        paths.append(Path(folder) / f'{name}.json')
        head = dict(
            task=task, metric=METRICS[task], memory_margin=MARGINS[task],
            memory_margin_source=MARGIN,
            date=datetime.date.today().isoformat(), command='python tools/model_table.py --measure',
            machine=describe_processor(), threads=1, repeats=repeats, versions=installed_versions(),
            method=METHOD)
        rows = _kept_rows(paths[-1], head, {Path(path).stem for path in tables[task]})
        for path in track(tables[task], f'Measuring for {name}', transient=True):
            row = describe_recipe(task, path, published[Path(path).stem])
            latency = measure_latency(path, row['size'], repeats, runtimes=RUNTIMES)
            rows.append(dict(row, latency_ms={name: round(ms, 1) for name, ms in latency.items()}))
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(paths[-1]) as part:  # after each, since all of them take an hour
                part.write_text(format_table(dict(head, recipes=sorted(rows, key=latency_of))),
                                encoding='utf-8')
    return paths


def _kept_rows(path: Path, head: Table, names: set[str]) -> list[Row]:
    """The rows of a written table that are not measured again.

    Raises:
        UserError: They are of another machine, or of other versions.
    """
    table = json.loads(path.read_text(encoding='utf-8')) if path.exists() else dict(recipes=[])
    rows = [row for row in table['recipes'] if row['name'] not in names]
    for key in ('machine', 'versions', 'threads', 'repeats', 'method') if rows else ():
        if table[key] != head[key]:
            raise UserError(f'{path} has {key}={table[key]}, here it is {head[key]}: measure all '
                            'recipes again, or write to another folder, with --measure DIR')
    return rows


def measure_here(table: Table, repeats: int = 4, threads: int = 1, runtime: str = 'pytorch'
                 ) -> Table:
    """Measure three recipes on this machine, and predict the others.

    Args:
        table: A table of ``docs/tables``.
        repeats: See :func:`convnext_mm.latency.measure_latency`.
        threads: See there.
        runtime: A key of :data:`convnext_mm.choosing.RUNTIMES`.
    """
    rows = track(anchors(table, runtime), 'Measuring', transient=True)
    return predict(table, {row['name']: measure_latency(
        find_recipe(row['name']), row['size'], repeats, threads, [runtime])[runtime]
        for row in rows}, runtime)


def format_table(table: Table) -> str:
    """A table as JSON with one line for each recipe."""
    rows = ',\n'.join(f'  {json.dumps(row, ensure_ascii=False)}' for row in table['recipes'])
    head = json.dumps(dict(table, recipes=[]), indent=1, ensure_ascii=False)
    return head.replace('"recipes": []', f'"recipes": [\n{rows}\n ]') + '\n'


def read_metafiles() -> dict[str, dict[str, Any]]:
    """The models of ``configs/metafile_*.yml`` by name, each with where its figures are from."""
    folder, models, papers = config_folder('convnext_mm'), {}, {}
    for file in sorted(folder.glob('metafile_*.yml') if folder else ()):
        content = yaml.safe_load(file.read_text(encoding='utf-8'))
        papers.update({c['Name']: c['Paper']['URL'] for c in content.get('Collections', ())})
        for model in content['Models']:
            models[model['Name']] = dict(
                model, Source=f'configs/{file.name}: {papers[model["In Collection"]]}')
    return models


def describe_recipe(task: str, path: str, published: dict[str, Any]) -> dict[str, Any]:
    """A recipe's row of the table of a task, without the latency."""
    counted = complexity.compute_complexity(checks.read_config(path))
    cfg = checks.read_config(path)
    crop = cfg.model.data_preprocessor.get('size')
    size = tuple(crop)[::-1] if task == 'seg' else counted.size
    rois = dict(bbox=complexity.PROPOSALS, mask=complexity.MASKS)
    inference = estimate_inference_memory(checks.read_config(path), size, rois)
    training = estimate_training_memory(cfg, mixed_precision='Amp' in cfg.optim_wrapper.type)
    metrics = {key: value for result in published.get('Results', ())
               for key, value in result['Metrics'].items()}
    backbone, framework = published['Metadata']['Architecture']
    return dict(
        name=Path(path).stem, config=published['Config'],
        title=f'{framework}, {backbone}, {published["Metadata"]["Pretrained On"]}'
              + f', {size[0]}×{size[1]}' * (task == 'seg'),
        size=size, parameters=counted.parameters, flops=counted.flops,
        backbone_flops=counted.backbone_flops, flops_size=counted.size,
        training_memory_gb=round(training.total / 1e9, 2),
        inference_memory_gb=round(inference / 1e9, 2),
        accuracy=metrics.get(METRICS[task]), accuracies=metrics,
        accuracy_source=published['Source'] if metrics else None)


def describe_processor() -> str:
    """The name of the GPU that models run on, or of the processor, and what PyTorch uses of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f'{processor_name()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}'


def installed_versions() -> dict[str, str]:
    """The versions of Python and of the packages that the figures depend on."""
    packages = {name: import_module(name).__version__
                for name in ('mmcv', 'mmengine', 'mmseg', 'mmdet') if find_spec(name)}
    return dict(python=platform.python_version(), torch=version('torch'),
                onnxruntime=version('onnxruntime'), **packages)
