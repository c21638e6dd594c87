"""How long an image takes in each runtime: recipes with random weights, on this machine."""
from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from .deployment.checking import mask_threshold
from .deployment.onnx_file import write_onnx
from .deployment.pipelines import build_pipeline
from .deployment.quantizing import quantize_onnx
from .deployment.rewriting import exportable, form_of
from .deployment.runtimes import load_exported, to_sample
from .deployment.testing import TASKS
from .engine import checks
from .engine.fallbacks import adapt_to_device
from .engine.speed import enable_packed_inference, least_milliseconds


def measure_latency(path: str, size: tuple[int, int], repeats: int, threads: int = 1,
                    runtimes: Iterable[str] = ('pytorch',)) -> dict[str, float]:
    """The least milliseconds for one image in each runtime, with random weights.

    They include all that ``test_step`` does, for detectors also the masks at the image's size.
    Files for ONNX Runtime run on the CPU.

    Args:
        path: The config.
        size: Width and height of the image.
        repeats: Runs after the first, which prepares the weights.
        threads: Of a CPU.
        runtimes: Keys of :data:`convnext_mm.choosing.RUNTIMES`.
    """
    MMLogger.get_current_instance().setLevel('WARNING')
    cfg = checks.read_config(path, {'model.backbone.init_cfg': None})
    adapt_to_device(cfg)
    init_default_scope(cfg.default_scope)
    model: Any = MODELS.build(cfg.model).eval()
    for name, module in model.named_modules():  # so that there are detections
        if name.endswith('.fc_cls'):
            nn.init.normal_(module.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return {runtime: least_milliseconds(
                _RUNNERS[runtime](model, cfg, size, Path(folder)), repeats) for runtime in runtimes}
    finally:
        torch.set_num_threads(before)


def _in_pytorch(model: Any, cfg: Any, size: tuple[int, int], folder: Path) -> Callable[[], object]:
    model.to('cuda' if torch.cuda.is_available() else 'cpu')
    enable_packed_inference(model)
    image, sample = _image(cfg, size), _sample(cfg, size)
    return lambda: model.test_step(dict(inputs=[image], data_samples=[sample()]))


def _in_onnx(model: Any, cfg: Any, size: tuple[int, int], folder: Path, int8: bool = False
             ) -> Callable[[], object]:
    image, sample = _image(cfg, size), _sample(cfg, size)
    pixels = image.permute(1, 2, 0)[None].contiguous()
    meta = dict(task=TASKS[cfg.default_scope], version='')
    other_form = int8 and cfg.default_scope == 'mmseg'  # of a detector, there is one
    path = folder / ('for_int8.onnx' if other_form else 'model.onnx')
    if not path.exists():  # by the runtime before
        pipeline = build_pipeline(exportable(model, form_of('onnx', other_form)),
                                  channels_last=True)
        write_onnx(pipeline, pipeline.example(pixels), path, meta)
    feed = dict(image=pixels.numpy(), size=np.array(size[::-1], np.int64))
    if int8:  # calibrated on noise: the time does not depend on the steps
        quantize_onnx(path, folder / 'int8.onnx', meta, [feed])
        path = folder / 'int8.onnx'
    exported, threshold = load_exported(path), mask_threshold(cfg)
    return lambda: to_sample(exported.run(feed['image'], feed['size']), 0, sample(), threshold)


_RUNNERS: dict[str, Callable[..., Callable[[], object]]] = dict(
    pytorch=_in_pytorch, onnx=_in_onnx, int8=partial(_in_onnx, int8=True))


def _image(cfg: Any, size: tuple[int, int]) -> torch.Tensor:
    """(C, H, W) of noise, uint8."""
    return torch.randint(0, 256, (cfg.model.backbone.get('in_chans', 3), *size[::-1]),
                         dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _sample(cfg: Any, size: tuple[int, int]) -> Callable[[], Any]:
    """A function that makes the image's data sample."""
    if cfg.default_scope == 'mmdet':
        from mmdet.structures import DetDataSample as Sample
    else:
        from mmseg.structures import SegDataSample as Sample
    shape = size[::-1]
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, batch_input_shape=shape,
                scale_factor=(1.0, 1.0))
    return lambda: Sample(metainfo=meta)
