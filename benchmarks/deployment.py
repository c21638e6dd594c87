"""Compare exported files of a segmentor with PyTorch on one image.

    python benchmarks/deployment.py                         # UPerNet tiny, 512x512, 150 classes
    python benchmarks/deployment.py --head-channels 256     # also with a narrower head

All run in the same process with the same random weights, one after the other in every round; the
table has the least processor time of the rounds. Each runtime runs two files: of mmseg's head,
which convolves upsampled maps, and of ours. Results go to benchmarks/results.
"""
from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

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
from convnext_mm.deployment.rewriting import exportable
from convnext_mm.deployment.runtimes import load_exported
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
    with tempfile.TemporaryDirectory() as folder:
        for i, (label, model) in enumerate({"mmseg's head": plain, **models}.items()):
            model.test_cfg.mode = 'whole'
            file, other = Path(folder, f'{i}.onnx'), Path(folder, f'{i}.xml')
            pipeline = build_pipeline(exportable(model))
            write_onnx(pipeline, pipeline.example(image), file, meta)
            save_openvino(openvino.convert_model(file), other, meta)
            for path in (file, other):
                exported = load_exported(path)
                name = f'{exported.name}, {label.removeprefix(PACKED).strip(" ,") or "our head"}'
                steps[name] = lambda run=exported.run: torch.from_numpy(
                    run(image.numpy(), size)['classes'])
    for label, model in models.items():
        speed.enable_packed_inference(model)
        set_inference_dtype(model, 'fp32')
        steps[label] = whole_model.make_test_step(model, torch.float32, args.size)
    found = {label: step() for label, step in steps.items()}
    other = {label: int((classes.to(found[PACKED]) != found[PACKED]).sum())
             if 'channels' not in label else '' for label, classes in found.items()}
    times = measuring.time_interleaved(steps, args.repeats, measuring.processor_time_once, min)
    lines = [f'| {label} | {1e3 * spent:.0f} | {times[PACKED] / spent:.2f} | {other[label]} |'
             for label, spent in times.items()]
    return '\n'.join(['| | ms | speed relative to packed PyTorch | pixels of another class |',
                      '|---|---|---|---|', *lines])


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
