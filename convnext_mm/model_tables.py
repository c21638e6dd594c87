"""The tables of ``docs/tables``: what each recipe needs, and its published accuracy.

Parameters and FLOPs are counted, memory is estimated, the latency is measured.
"""
from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import yaml
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from rich.progress import track
from torch import nn

from . import complexity
from .bases import config_folder, find_recipe
from .choosing import TASKS, Table, anchors, latency_of, predict
from .engine import checks
from .engine.fallbacks import adapt_to_device
from .engine.memory import estimate_inference_memory, estimate_training_memory
from .engine.speed import enable_packed_inference, least_milliseconds
from .errors import UserError
from .utils import atomic_path

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
    latency_ms='measured: processor time of test_step on one image of size, fp32, one thread, '
               'random weights, the least of the repeats; of detectors, 1000 proposals and 100 '
               'detections',
    accuracy='published by the authors for their weights, see accuracy_source. null: not trained')


def write_tables(folder: str | Path, configs: Iterable[str], repeats: int = 2) -> list[Path]:
    """Measure recipes, and write a table as JSON for each task among them.

    Args:
        folder: Where the tables are written.
        configs: Recipes that are listed in a metafile of ``configs/``.
        repeats: How often a model runs after its first run.

    Raises:
        UserError: A config is not listed, or cannot be read.
    """
    published, paths = read_metafiles(), []
    tables: dict[str, list[str]] = {task: [] for task in TASKS}
    for path in configs:
        if Path(path).stem not in published:
            raise UserError(f'{path}: expected a recipe that is listed in configs/metafile_*.yml')
        in_detection = checks.read_config(path).get('default_scope') == 'mmdet'
        tables['det' if in_detection else 'seg'].append(path)
    for task, name in TASKS.items():
        rows = []
        for path in track(tables[task], f'Measuring for {name}', transient=True):
            row = describe_recipe(task, path, published[Path(path).stem])
            latency = round(measure_latency(path, row['size'], repeats), 1)
            rows.append(dict(row, latency_ms=dict(pytorch=latency)))
        if not rows:
            continue
        table = dict(
            task=task, metric=METRICS[task], memory_margin=MARGINS[task],
            memory_margin_source=MARGIN,
            date=datetime.date.today().isoformat(), command='python tools/model_table.py --measure',
            machine=describe_processor(), threads=1, repeats=repeats, versions=installed_versions(),
            method=METHOD, recipes=sorted(rows, key=latency_of))
        paths.append(Path(folder) / f'{name}.json')
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(paths[-1]) as part:
            part.write_text(format_table(table), encoding='utf-8')
    return paths


def measure_here(table: Table, repeats: int = 2, threads: int = 1) -> Table:
    """Measure three recipes on this machine, and predict the others.

    Args:
        table: A table of ``docs/tables``.
        repeats: See :func:`measure_latency`.
        threads: See :func:`measure_latency`.
    """
    rows = track(anchors(table), 'Measuring', transient=True)
    return predict(table, {row['name']: measure_latency(
        find_recipe(row['name']), row['size'], repeats, threads) for row in rows})


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
        size=size, parameters=counted.parameters, flops=counted.flops, flops_size=counted.size,
        training_memory_gb=round(training.total / 1e9, 2),
        inference_memory_gb=round(inference / 1e9, 2),
        accuracy=metrics.get(METRICS[task]), accuracies=metrics,
        accuracy_source=published['Source'] if metrics else None)


def measure_latency(path: str, size: tuple[int, int], repeats: int, threads: int = 1) -> float:
    """The least milliseconds of ``test_step`` on one image, with random weights.

    Args:
        path: The config.
        size: Width and height of the image.
        repeats: Runs after the first, which prepares the weights.
        threads: Of a CPU.
    """
    MMLogger.get_instance('mmengine', log_level='WARNING')
    cfg = checks.read_config(path, {'model.backbone.init_cfg': None})
    adapt_to_device(cfg)
    init_default_scope(cfg.default_scope)
    model: Any = MODELS.build(cfg.model).eval()
    for name, module in model.named_modules():  # so that there are detections
        if name.endswith('.fc_cls'):
            nn.init.normal_(module.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    on_gpu, before = torch.cuda.is_available(), torch.get_num_threads()
    model.to('cuda' if on_gpu else 'cpu')
    enable_packed_inference(model)
    data = _make_data(cfg, size)
    torch.set_num_threads(threads)
    try:
        return least_milliseconds(lambda: model.test_step(data()), repeats)
    finally:
        torch.set_num_threads(before)


def _make_data(cfg: Any, size: tuple[int, int]) -> Callable[[], dict[str, Any]]:
    """A function that makes the data of a ``test_step`` on an image of noise."""
    if cfg.default_scope == 'mmdet':
        from mmdet.structures import DetDataSample as Sample
    else:
        from mmseg.structures import SegDataSample as Sample
    shape = size[::-1]
    channels = cfg.model.backbone.get('in_chans', 3)
    image = torch.randint(0, 256, (channels, *shape), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape,
                scale_factor=(1.0, 1.0))
    return lambda: dict(inputs=[image], data_samples=[Sample(metainfo=meta)])


def describe_processor() -> str:
    """The name of the GPU that models run on, or of the processor, and what PyTorch uses of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    listed = Path('/proc/cpuinfo')
    found = re.findall(r'model name\s*: (.*)', listed.read_text()) if listed.exists() else []
    name = found[0] if found else platform.processor() or platform.machine()
    return f'{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}'


def installed_versions() -> dict[str, str]:
    """The versions of Python and of the packages that the figures depend on."""
    packages = {name: import_module(name).__version__
                for name in ('mmcv', 'mmengine', 'mmseg', 'mmdet') if find_spec(name)}
    return dict(python=platform.python_version(), torch=version('torch'), **packages)
