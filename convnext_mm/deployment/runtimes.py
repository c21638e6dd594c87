"""Exported files behind one face: from an image to what a pipeline returns, as arrays."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from ..errors import UserError
from .formats import META_FILE
from .onnx_file import KEY
from .optional import require
from .pipelines import DETECTOR_OUTPUTS, SEGMENTOR_OUTPUTS

Arrays = dict[str, np.ndarray]
"""Names of a pipeline's outputs, and their values."""


class Exported(NamedTuple):
    """An exported file that has been loaded.

    Args:
        name: Of the runtime.
        meta: The metadata in the file.
        run: From images (B, H, W, C) and a size (2,) of int64 to the outputs. A file of a fixed
            size takes one image of it, and its results are of this size.
    """

    name: str
    meta: dict[str, Any]
    run: Callable[[np.ndarray, np.ndarray], Arrays]


def load_exported(path: str | Path) -> Exported:
    """Load an exported file, by its suffix.

    Raises:
        UserError: There is no such file, it is not one of ours, or the runtime is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'exported file not found: {path.absolute()}')
    try:
        return LOADERS[path.suffix](path)
    except UserError:
        raise
    except Exception as error:  # runtimes raise errors of any type
        first = str(error).strip().partition('\n')[0]
        raise UserError(f'{path} cannot be loaded: {first}. Export it again with tools/export.py'
                        ) from error


def _load_onnx(path: Path) -> Exported:
    runtime = require('onnxruntime')
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = runtime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
    text = session.get_modelmeta().custom_metadata_map.get(KEY)
    inputs, names = ([one.name for one in some] for some in (session.get_inputs(),
                                                             session.get_outputs()))

    def run(image: np.ndarray, size: np.ndarray) -> Arrays:
        given = {'image': image, 'size': size}
        return dict(zip(names, session.run(None, {key: given[key] for key in inputs}),
                        strict=True))
    return Exported('ONNX Runtime', _parsed(text, path), run)


def _parsed(text: str | None, path: Path) -> dict[str, Any]:
    if not text:
        raise UserError(f'{path} was not written by tools/export.py: it has no metadata named '
                        f'{KEY!r}')
    return json.loads(text)


def _load_openvino(path: Path) -> Exported:
    openvino = require('openvino', extra='openvino')
    core = openvino.Core()
    model = core.read_model(path)
    text = model.get_rt_info([KEY]).value if model.has_rt_info([KEY]) else None
    meta = _parsed(text, path)
    # By default, processors with bf16 compute in it.
    request = core.compile_model(model, 'CPU', {
        'INFERENCE_PRECISION_HINT': meta.get('precision', 'f32'),
        'INFERENCE_NUM_THREADS': torch.get_num_threads(), 'NUM_STREAMS': 1}).create_infer_request()

    def run(image: np.ndarray, size: np.ndarray) -> Arrays:
        found = request.infer({'image': image, 'size': size})
        return {next(iter(output.names)): values for output, values in found.to_dict().items()}
    return Exported('OpenVINO', meta, run)


def _load_torch(path: Path) -> Exported:
    from . import operations  # noqa: F401  registers the operators in the file
    if path.suffixes[-2:-1] == ['.aoti']:
        package = torch._inductor.aoti_load_package(str(path))
        return _in_pytorch('AOTInductor', _parsed(package.get_metadata().get(KEY), path), package)
    files = {META_FILE: ''}
    program = torch.export.load(path, extra_files=files)
    return _in_pytorch('torch.export', _parsed(files[META_FILE], path), program.module())


def _in_pytorch(name: str, meta: dict[str, Any], call: Callable[..., Any]) -> Exported:
    @torch.no_grad()
    def run(image: np.ndarray, size: np.ndarray) -> Arrays:
        inputs = [image] if meta.get('fixed') else [image, size]
        found = call(*map(torch.from_numpy, inputs))
        found = found if isinstance(found, (tuple, list)) else [found]
        names = SEGMENTOR_OUTPUTS if meta['task'] == 'segmentation' else DETECTOR_OUTPUTS
        return {key: value.numpy() for key, value in zip(names, found, strict=False)}
    return Exported(name, meta, run)


LOADERS: dict[str, Callable[[Path], Exported]] = {
    '.onnx': _load_onnx, '.xml': _load_openvino, '.pt2': _load_torch}
"""From a suffix to what loads a file of it."""


def to_sample(outputs: Arrays, index: int, sample: BaseDataElement, mask_threshold: float
              ) -> BaseDataElement:
    """Put the results of one image into its data sample, as the model's own are.

    Args:
        outputs: Of :class:`Exported`.
        index: Of the image in the batch.
        sample: A SegDataSample or DetDataSample, with the image's ``ori_shape``.
        mask_threshold: What a mask's values are compared with.
    """
    if 'classes' in outputs:
        classes = torch.from_numpy(outputs['classes'][index].astype(np.int64))
        sample.pred_sem_seg = PixelData(data=classes[None])
        return sample
    count = int((outputs['scores'][index] > 0).sum())
    boxes, scores, labels = (torch.from_numpy(np.array(outputs[key][index, :count]))
                             for key in ('boxes', 'scores', 'labels'))
    found = InstanceData(bboxes=boxes, scores=scores, labels=labels.long())
    if 'masks' in outputs:
        masks = torch.from_numpy(np.array(outputs['masks'][index, :count]))
        found.masks = paste(masks, boxes, sample.ori_shape[:2], mask_threshold)
    sample.pred_instances = found
    return sample


def paste(masks: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], threshold: float
          ) -> torch.Tensor:
    """Masks (n, m, m) that fill their boxes (n, 4) → (n, *size) of bool, as mmdet does."""
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask
    out = torch.zeros(len(masks), *size, dtype=torch.bool)
    for mask, box, whole in zip(masks, boxes, out, strict=True):
        part, where = _do_paste_mask(mask[None, None], box[None], *size, skip_empty=True)
        whole[where] = part[0] >= threshold
    return out
