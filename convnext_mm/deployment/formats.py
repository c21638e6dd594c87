"""Files of OpenVINO, torch.export and AOTInductor."""
from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from ..errors import UserError
from ..utils import atomic_path
from .onnx_file import KEY, quiet, write_onnx
from .optional import require
from .pipelines import Pipeline

META_FILE = f'{KEY}.json'
"""The metadata inside of an archive of torch.export."""


def files_of(path: Path) -> list[Path]:
    """All files of an exported model: those of OpenVINO are two."""
    return [path, path.with_suffix('.bin')] if path.suffix == '.xml' else [path]


def size_of(path: Path) -> int:
    """The bytes of all files of an exported model."""
    return sum(file.stat().st_size for file in files_of(path))


def write_openvino(pipeline: Pipeline, image: Tensor, path: Path, meta: dict[str, Any]) -> None:
    """Export to OpenVINO's ``path``.xml and .bin, by way of ONNX.

    Args:
        pipeline: See :func:`convnext_mm.deployment.onnx_file.write_onnx`.
        image: See there.
        path: See there.
        meta: See there.

    Raises:
        UserError: Packages are missing.
    """
    openvino = require('openvino', extra='openvino')
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'model.onnx')
        write_onnx(pipeline, image, file, meta)
        save_openvino(openvino.convert_model(file), path, meta)


def save_openvino(model: Any, path: Path, meta: dict[str, Any]) -> None:
    """Write a model of OpenVINO with our metadata, in fp32."""
    model.set_rt_info(json.dumps(meta, ensure_ascii=False), [KEY])
    require('openvino', extra='openvino').save_model(model, path, compress_to_fp16=False)


def _program(pipeline: Pipeline, image: Tensor) -> Any:
    """The pipeline as torch.export's program, for any batch and size unless it has a fixed one."""
    if pipeline.fixed is not None:
        with torch.no_grad(), quiet():
            return torch.export.export(pipeline, (image[:1],))
    shapes = {'image': {0: Dim.DYNAMIC, 1: Dim.DYNAMIC, 2: Dim.DYNAMIC}, 'size': None}
    size = torch.tensor([image.shape[1] + 7, image.shape[2] + 3])
    with torch.no_grad(), quiet():
        return torch.export.export(pipeline, (image, size), dynamic_shapes=shapes)


def write_torch_export(pipeline: Pipeline, image: Tensor, path: Path, meta: dict[str, Any]
                       ) -> None:
    """Export to torch.export's archive; see :func:`write_openvino`."""
    program = _program(pipeline, image)
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, 'graph', None), 'nodes', ()):
            node.meta.pop('stack_trace', None)  # local paths
    with atomic_path(path) as part:
        torch.export.save(program, part, extra_files={META_FILE: json.dumps(meta)})


def write_aoti(pipeline: Pipeline, image: Tensor, path: Path, meta: dict[str, Any]) -> None:
    """Compile with AOTInductor for this machine's processor; see :func:`write_openvino`.

    Raises:
        UserError: It does not compile, for example without a C++ compiler.
    """
    program = _program(pipeline, image)
    # Without freezing, weights are reordered in each call, and eager is faster.
    options = {'freezing': True, 'aot_inductor.metadata': {KEY: json.dumps(meta)}}
    try:
        with torch.no_grad(), quiet():
            torch._inductor.aoti_compile_and_package(program, package_path=str(path),
                                                     inductor_configs=options)
    except Exception as error:  # the compiler raises errors of any type
        raise UserError(f'AOTInductor cannot compile the model: {str(error).strip()[:500]}'
                        ) from error
