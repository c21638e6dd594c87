"""Writes a pipeline as one ONNX file with standard operators and our metadata, and reads it."""
from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..utils import atomic_path
from .operations import onnx_translations
from .optional import require
from .pipelines import Pipeline

KEY = 'convnext_mm'
"""Name of the metadata in the file: JSON."""
LARGEST = 2**31 - 2**20
"""Bytes that a file of protobuf can have."""


@torch.no_grad()
def write_onnx(pipeline: Pipeline, image: Tensor, path: Path, meta: dict[str, Any]) -> None:
    """Export a pipeline; one of a fixed size, for one image.

    Args:
        pipeline: Of :func:`convnext_mm.deployment.rewriting.exportable`.
        image: (2, H, W, C), an example.
        path: The file to write.
        meta: What a program needs to use the file, and where it is from.

    Raises:
        UserError: Packages are missing, or the model is too large for a file.
    """
    onnx = require('onnx', 'onnxscript')
    height, width = image.shape[1:3]
    # Of another size, so that the exporter does not take the two for one.
    inputs: dict[str, Tensor] = dict(image=image, size=torch.tensor([height + 7, width + 3]))
    shapes: Any = {'image': {0: 'batch', 1: 'height', 2: 'width'}, 'size': {}}
    if pipeline.fixed is not None:
        inputs, shapes = dict(image=image[:1]), None
    with quiet():
        program: Any = torch.onnx.export(
            pipeline, tuple(inputs.values()), dynamo=True, verbose=False,
            input_names=list(inputs), output_names=list(pipeline.outputs), dynamic_shapes=shapes,
            custom_translation_table=onnx_translations())
    model = program.model_proto
    strip(model)
    if model.ByteSize() > LARGEST:
        raise UserError(f'an ONNX file can have 2 GB, but this model has {model.ByteSize()} bytes. '
                        'Choose a smaller size, or --to torch-export')
    write_meta(model, meta)
    onnx.checker.check_model(model)
    with atomic_path(path) as part:
        onnx.save(model, part)


def strip(model: Any) -> None:
    """Remove what the exporter notes of this machine: stack traces with local paths, in place."""
    graph = model.graph
    for entry in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info,
                  *graph.initializer):
        del entry.metadata_props[:]
        entry.doc_string = ''
    foreign = {node.domain for node in graph.node} - {''}
    if foreign or len(model.functions):
        raise RuntimeError(f'operators outside of the ONNX standard: {foreign or model.functions}')


def write_meta(model: Any, meta: dict[str, Any]) -> None:
    """Store metadata in a loaded file, in place of other metadata."""
    del model.metadata_props[:]
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, json.dumps(meta, ensure_ascii=False)
    model.producer_name, model.producer_version = 'convnext-mm', meta['version']


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the exporters' warnings about things that do not concern our graphs."""
    loggers = [logging.getLogger(name) for name in ('torch.onnx', 'onnxscript', 'torch.export',
                                                    'onnx_ir', 'torch.fx')]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
