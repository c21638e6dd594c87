"""Measure the memory of a process that segments one large picture in slide mode.

    python benchmarks/large_picture.py                             # UPerNet tiny, 4096x4096, fp32

The peak is that of the whole process: Python, PyTorch, the model, the picture and its class map.
Results go to benchmarks/results.
"""
from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import measuring
import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmseg.structures import SegDataSample

from convnext_mm.engine import speed
from convnext_mm.engine.checks import read_config
from convnext_mm.precision import set_inference_dtype


def peak_bytes() -> int:
    """The most memory that the process has had so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', type=Path,
                        default=Path('configs/upernet_convnext_tiny_512_160k_ade20k.py'))
    parser.add_argument('--size', type=measuring.parse_size, default=(4096, 4096), metavar='WxH')
    parser.add_argument('--dtype', choices=measuring.DTYPES, default='fp32')
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--name', help='name of the result file in benchmarks/results')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    MMLogger.get_instance('mmengine', log_level='WARNING')
    cfg = read_config(str(args.config), {'model.backbone.init_cfg': None,
                                         'model.test_cfg.mode': 'slide'})
    init_default_scope('mmseg')
    model = MODELS.build(cfg.model).eval()
    speed.enable_packed_inference(model)
    set_inference_dtype(model, args.dtype)
    width, height = args.size
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    sample = SegDataSample(metainfo=dict(
        img_shape=(height, width), ori_shape=(height, width), pad_shape=(height, width),
        scale_factor=(1.0, 1.0)))
    before, begin = peak_bytes(), time.process_time()
    with torch.no_grad():
        classes = model.test_step(dict(inputs=[image], data_samples=[sample]))[0].pred_sem_seg.data
    assert classes.shape == (1, height, width)
    text = (f'{args.config.stem}, {args.dtype}, {model.out_channels} classes, {width}×{height}: '
            f'the process needs at most {peak_bytes() / 1e9:.2f} GB, {before / 1e9:.2f} GB of them '
            f'before the first window; {time.process_time() - begin:.0f} s of processor time.')
    print(text)
    if args.name:
        path = measuring.write_results(args.name, 'Memory of a large picture', text)
        print(f'Results: {path}')
