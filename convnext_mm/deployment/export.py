"""``tools/export.py``: writes a file for another runtime, and keeps it only if it is equal."""
from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from rich.progress import track

from .. import checkpoints
from ..choices import FORMATS
from ..engine import checks
from ..errors import UserError
from ..inputs import find_recipe
from ..prediction import Predictor
from ..utils import processor_has, writable_folder
from .arguments import packages_for
from .checking import (
    Comparison,
    Difference,
    Metric,
    RuntimeFailed,
    mask_threshold,
    metric_problem,
)
from .formats import files_of, size_of, write_aoti, write_openvino, write_torch_export
from .images import ImageSource
from .onnx_file import write_onnx
from .optional import check_installed
from .pipelines import Pipeline, build_pipeline
from .quantizing import feeds_of, quantize
from .report import Report, draw_pair
from .rewriting import exportable, form_of
from .runtimes import Exported, load_exported
from .testing import TASKS, evaluate

WRITERS: dict[str, Callable[[Pipeline, torch.Tensor, Path, dict[str, Any]], None]] = {
    'onnx': write_onnx, 'openvino': write_openvino, 'torch-export': write_torch_export,
    'aoti': write_aoti}
"""Write a file of each of :data:`FORMATS` from a pipeline, an example (2, H, W, C), a path and the
metadata."""


def main(args: argparse.Namespace) -> Path:
    """Export a model and compare the file with PyTorch; without a difference, it is kept.

    Args:
        args: ``config``, ``checkpoint``, ``to`` (a key of :data:`FORMATS`), ``out``, ``images``,
            ``pictures``, ``int8``, ``bf16``, ``size``, ``max_drop``, ``calibration`` and
            ``cfg_options``.

    Returns:
        The exported file.

    Raises:
        UserError: The config, the weights or the data are unusable, packages are missing, or the
            results of the file differ. Then it is deleted, and an older file of this name stays.
    """
    options = {**(args.cfg_options or {}), 'inference_dtype': 'fp32'}  # of what it is compared with
    cfg = checks.read_config(find_recipe(args.config), options)
    if args.to == 'aoti' and cfg.default_scope == 'mmdet':
        raise UserError('AOTInductor does not compile detectors: use --to torch-export')
    check_installed(*packages_for(args), extra='openvino' if args.to == 'openvino' else 'export')
    numbers = '_int8' * args.int8 + '_bf16' * args.bf16
    out = Path(args.out or f'{Path(args.config).stem}{numbers}{FORMATS[args.to]}')
    for folder in out.parent, args.pictures:
        if folder is not None:
            writable_folder(folder)
    check_not_overwritten(out, args.checkpoint)
    source = ImageSource(cfg, 'test', args.images)
    if not len(source):
        raise UserError('there are no test images to compare the file on')
    training = ImageSource(cfg, 'train', args.calibration) if args.int8 else None
    predictor = Predictor(cfg, args.checkpoint, 'cpu')
    meta = metadata(cfg, predictor, args)
    fixed = args.size[::-1] if args.size else None
    meta['fixed'] = fixed
    first = source[0].fixed(*fixed) if fixed else source[0]
    pixels = torch.from_numpy(first.pixels)[None]
    print(f'Exporting to {out} (this takes a minute or two) ...', flush=True)
    model = exportable(predictor.model, form_of(args.to, args.int8))
    pipeline = build_pipeline(model, fixed, channels_last=args.to == 'onnx')
    example = pipeline.example(pixels)
    if args.bf16:
        meta['precision'] = 'bf16'
    with staged(out) as path:
        if training is None:
            WRITERS[args.to](pipeline, example, path, meta)
            keep_if_equal(path, out, cfg, predictor, source, args,
                          args.max_drop if args.bf16 else None)
            return out
        if processor_has('amx_bf16', 'avx512_bf16') and not args.bf16:
            print('This processor has bf16, which needs no calibration and may be faster still: '
                  'compare --to openvino --bf16, alone and with --int8')
        plain = path.with_name(f'{path.stem}_fp32.onnx')
        write_onnx(pipeline, example, plain, meta)
        in_fp32 = quantize(plain, path, meta, feeds_of(training),
                           lambda file: evaluate(load_exported(file), cfg, source), args.max_drop)
        keep_if_equal(path, out, cfg, predictor, source, args, args.max_drop, load_exported(plain),
                      [f'Layers in fp32: {", ".join(in_fp32)}.'] if in_fp32 else [])
        return out


def check_not_overwritten(out: Path, checkpoint: str) -> None:
    """Check that the weights beside an .xml file replace no file of another kind.

    Raises:
        UserError: They do.
    """
    for file in files_of(out)[1:]:
        if file.exists() and (not out.exists() or Path(checkpoint).absolute() == file.absolute()):
            raise UserError(f'{file} would be overwritten: OpenVINO writes its weights there. Name '
                            'another file with --out')


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A path to write to, in a folder beside ``out``.

    Its files replace those of ``out`` at the end; after an error, or Ctrl-C, they are deleted.
    """
    with tempfile.TemporaryDirectory(dir=out.parent, prefix='.export_') as folder:
        path = Path(folder, out.name)
        yield path
        for file in reversed(files_of(path)):  # the weights first
            os.replace(file, out.with_name(file.name))


def metadata(cfg: Config, predictor: Predictor, args: argparse.Namespace) -> dict[str, Any]:
    """What a program needs in order to use the file, and where it is from, without paths."""
    weights = hashlib.sha256(checkpoints.locate_checkpoint(args.checkpoint).read_bytes())
    palette = predictor.meta.get('palette')
    return dict(
        task=TASKS[cfg.default_scope],
        classes=list(predictor.meta.get('classes') or ()),
        palette=[list(map(int, color)) for color in palette]
        if isinstance(palette, (list, tuple)) else None,
        channels=predictor.channels, resize=resize_rule(predictor.steps),
        first_value=predictor.first_value, mask_threshold=mask_threshold(cfg),
        config=Path(args.config).stem,
        weights=f'sha256:{weights.hexdigest()}', version=package_version())


def package_version() -> str:
    """The version of this package, or of a checkout that is not installed, ''."""
    try:
        return version('convnext-mm')
    except PackageNotFoundError:
        return ''


def resize_rule(steps: list[dict]) -> dict[str, Any] | None:
    """How a pipeline resizes images: ``scale`` (width, height) and ``keep_ratio``; {}: not at all.

    None: it does something else as well, or does not read three colors of 8 bits.
    """
    known = {'LoadImageFromFile', 'Resize', 'PackSegInputs', 'PackDetInputs'}
    resize = [step for step in steps if step['type'] == 'Resize']
    read = next((step for step in steps if step['type'] == 'LoadImageFromFile'), {})
    if (not known.issuperset(step['type'] for step in steps) or len(resize) > 1
            or read.get('color_type', 'color') != 'color' or read.get('to_float32')):
        return None
    if not resize:
        return {}
    settings = {key: value for key, value in resize[0].items() if key != 'type'}
    if not {'scale', 'keep_ratio'}.issuperset(settings) or not settings.get('scale'):
        return None
    scale = settings['scale']
    return dict(scale=[scale, scale] if isinstance(scale, int) else list(scale),
                keep_ratio=bool(settings.get('keep_ratio')))


def keep_if_equal(path: Path, out: Path, cfg: Config, predictor: Predictor, source: ImageSource,
                  args: argparse.Namespace, max_drop: float | None, plain: Exported | None = None,
                  notes: Sequence[str] = ()) -> None:
    """Compare a file with PyTorch, and write the report.

    Args:
        path: The file.
        out: Where it will be. The report is written beside it, with .refused in its name if the
            file is not kept and an older one stays.
        cfg: A completed config.
        predictor: Its model in PyTorch.
        source: The images.
        args: See :func:`main`.
        max_drop: How much lower the metric may be, in percent, as for a quantized model, whose
            other results differ. None: all results must be equal.
        plain: The fp32 file of a quantized one, to compare the latency with.
        notes: For the report.

    Raises:
        UserError: It differs.
    """
    exported = load_exported(path)
    comparison = Comparison(predictor.model, exported, cfg)
    report = Report(out.name, exported.name, exported.meta,
                    size_of(path) / 1e6, notes=[*notes])
    whole = len(source) == len(source.dataset)
    metrics = {name: Metric(cfg, source.dataset, whole) for name in ('PyTorch', exported.name)}
    try:
        compare(comparison, source, metrics, report, args.pictures, plain)
    except RuntimeFailed as error:
        report.problem = str(error)
    else:
        if max_drop is None:
            report.problem = next((case.problem for case in report.cases if case.problem), '')
        if report.metrics and not report.problem:
            report.problem = metric_problem(report.metrics['PyTorch'],
                                            report.metrics[exported.name], max_drop)
    name = f'{out}.refused' if report.problem and out.exists() else f'{out}'
    report.write(name)
    print(f'{report}\n\nReport: {name}.md, {name}.json')
    if report.problem:
        older = f'; the older {out} stays' if out.exists() else ''
        raise UserError(f'{out.name} is not equal to PyTorch and was deleted: {report.problem}'
                        f'{older}')
    print(f'Written: {out}')


def compare(comparison: Comparison, source: ImageSource, metrics: dict[str, Metric],
            report: Report, pictures: str | None, plain: Exported | None) -> None:
    """Fill a report.

    Args:
        comparison: The model and the file.
        source: The images.
        metrics: Of both.
        report: Gets the results.
        pictures: Folder for an image of each result, or None.
        plain: See :func:`keep_if_equal`.
    """
    folder = Path(pictures) if pictures else None
    images = Difference('test images')
    report.cases.append(images)
    fixed = report.meta.get('fixed')
    for i, image in enumerate(track(source, 'Comparing', total=len(source))):
        image = image.fixed(*fixed) if fixed else image
        ours, theirs = (found[0] for found in comparison.pair([image]))
        images.add(ours, theirs, comparison.least, comparison.most)
        for metric, sample in zip(() if fixed else metrics.values(), (ours, theirs), strict=False):
            metric.add([sample])
        if folder is not None:
            draw_pair(image, {'PyTorch': ours, comparison.exported.name: theirs}, report.meta,
                      folder / f'{i:04d}.png')
    first, second = source[0], source[len(source) // 2]
    if fixed:
        first = first.fixed(*fixed)
        report.cases += comparison.nothing_found(first)
        report.notes.append('The test images were resized to the fixed size: there is no metric.')
    else:
        report.cases += comparison.special_cases(first, second)
        report.metrics = {name: metric.values() for name, metric in metrics.items()}
    height, width = first.pixels.shape[:2]
    report.latency = dict(input=f'one image of {width}×{height}',
                          times=comparison.latency(first, plain))
