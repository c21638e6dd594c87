"""Compare exported files of a segmentor with PyTorch on one image.

    python benchmarks/deployment.py                         # UPerNet tiny, 512x512, 150 classes
    python benchmarks/deployment.py --head-channels 256     # also with a narrower head

All run in the same process with the same random weights, one after the other in every round; the
table has the least processor time of the rounds. Each runtime runs two files: of mmseg's head,
which convolves upsampled maps, and of ours; int8 files are calibrated on the image itself, since
their time does not depend on it. Results go to benchmarks/results.
"""
from __future__ import annotations

import argparse
import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import measuring
import numpy as np
import openvino
import torch
import whole_model
from mmcv.cnn import ConvModule
from mmengine.logging import MMLogger

from convnext_mm.deployment.formats import save_openvino
from convnext_mm.deployment.onnx_file import write_onnx
from convnext_mm.deployment.pipelines import build_pipeline
from convnext_mm.deployment.quantizing import Feed, quantize_onnx, quantize_openvino
from convnext_mm.deployment.rewriting import exportable, form_of
from convnext_mm.deployment.runtimes import Exported, load_exported
from convnext_mm.engine import speed
from convnext_mm.fused.conv_module import FusedConvModule
from convnext_mm.precision import set_inference_dtype

PACKED = 'PyTorch, packed'


def compare(args: argparse.Namespace) -> str:
    """Export and measure; return a table."""
    models = {PACKED: whole_model.build(args, whole_model.OURS)[0].eval()}
    plain = copy.deepcopy(models[PACKED])
    for module in plain.modules():
        if isinstance(module, FusedConvModule):
            module.__class__ = ConvModule  # then mmseg's head runs
    for channels in args.head_channels:
        models[f'{PACKED}, {channels} channels'] = whole_model.build(
            args, whole_model.OURS, {'model.decode_head.channels': channels})[0].eval()
    size, data = np.array(args.size[::-1]), whole_model.test_data(plain, args.size)
    image = data()['inputs'][0].permute(1, 2, 0)[None].contiguous()
    steps, meta = {}, dict(task='segmentation', version='')
    feed = dict(image=image.numpy(), size=size)
    with tempfile.TemporaryDirectory() as folder:
        for i, (label, model) in enumerate({"mmseg's head": plain, **models}.items()):
            model.test_cfg.mode = 'whole'
            for name, path in export(model, image, Path(folder, str(i)), meta, feed).items():
                name += f', {label.removeprefix(PACKED).strip(" ,") or "our head"}'
                steps[name] = functools.partial(run_file, load_exported(path), feed)
    for label, model in models.items():
        for dtype, kind in measuring.DTYPES.items():
            if dtype != 'fp16':
                one = copy.deepcopy(model)
                speed.enable_packed_inference(one)
                set_inference_dtype(one, dtype)
                steps[label.replace(PACKED, f'{PACKED}, {dtype}') if dtype != 'fp32' else label] = \
                    whole_model.make_test_step(one, kind, args.size)
    found = {label: step() for label, step in steps.items()}
    other = {label: f'{100 * (classes.to(found[PACKED]) != found[PACKED]).float().mean():.4f} %'
             if 'channels' not in label else '' for label, classes in found.items()}
    times = measuring.time_interleaved(steps, args.repeats, measuring.processor_time_once, min)
    lines = [f'| {label} | {1e3 * spent:.0f} | {times[PACKED] / spent:.2f} | {other[label]} |'
             for label, spent in times.items()]
    return '\n'.join(['| | ms | speed relative to packed PyTorch | pixels of another class |',
                      '|---|---|---|---|', *lines])


def run_file(file: Exported, feed: Feed) -> torch.Tensor:
    """The class map of an exported file."""
    return torch.from_numpy(file.run(**feed)['classes'])


def export(model: Any, image: torch.Tensor, path: Path, meta: dict, feed: Feed) -> dict[str, Path]:
    """Write the files of a model, as tools/export.py; return them by runtime and type."""
    names = {'ONNX Runtime': '.onnx', 'ONNX Runtime int8': '.int8.onnx', 'OpenVINO': '.xml',
             'OpenVINO bf16': '.bf16.xml', 'OpenVINO int8': '.int8.xml',
             'OpenVINO int8 + bf16': '.both.xml'}
    files = {name: path.with_suffix(suffix) for name, suffix in names.items()}

    def write(to: str, int8: bool, target: Path) -> Path:
        pipeline = build_pipeline(exportable(model, form_of(to, int8)), channels_last=to == 'onnx')
        write_onnx(pipeline, pipeline.example(image), target, meta)
        return target
    write('onnx', False, files['ONNX Runtime'])
    source = path.with_suffix('.source.onnx')
    quantize_onnx(write('onnx', True, source), files['ONNX Runtime int8'], meta, [feed])
    int8 = write('openvino', True, path.with_suffix('.int8source.onnx'))
    write('openvino', False, source)
    for precision, mark in ({}, ''), (dict(precision='bf16'), 'bf16'):
        save_openvino(openvino.convert_model(source), files[f'OpenVINO {mark}'.strip()],
                      meta | precision)
        quantize_openvino(int8, files['OpenVINO int8' + f' + {mark}' * bool(mark)],
                          meta | precision, [feed])
    return files


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', type=Path,
                        default=Path('configs/upernet_convnext_tiny_512_160k_ade20k.py'))
    parser.add_argument('--size', type=measuring.parse_size, default=(512, 512), metavar='WxH')
    parser.add_argument('--head-channels', type=int, nargs='*', default=[])
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--name', help='name of the result file in benchmarks/results')
    args = parser.parse_args()
    args.drop_path = 0.0
    torch.set_num_threads(args.threads)
    MMLogger.get_instance('mmengine', log_level='WARNING')
    table = compare(args)
    print(table)
    if args.name:
        title = f'{args.config.stem}, {args.size[0]}×{args.size[1]}: exported files'
        print(f'Results: {measuring.write_results(args.name, title, table)}')
