"""int8 files, calibrated on the user's images; layers stay in fp32 until the metric is kept."""
from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .checking import metric_problem
from .formats import save_openvino, size_of
from .onnx_file import quiet, write_meta
from .optional import require

LAYERS = ('Conv', 'Gemm')
"""The operators that are quantized."""
OPENVINO_LAYERS = ('Convolution', 'GroupConvolution', 'ConvolutionBackpropData', 'MatMul')
"""The same in OpenVINO."""
LARGEST_SHARE = 0.4
"""Of the fp32 file, that an int8 file may have: in a larger one, weights were left out."""
NOISE_IMAGES = 2
LAYERS_AT_ONCE = 8

Feed = dict[str, np.ndarray]
"""The inputs of an ONNX file."""


def quantize(source: Path, target: Path, meta: dict[str, Any], feeds: Sequence[Feed],
             measure: Callable[[Path], dict[str, float]], max_drop: float) -> list[str]:
    """Write an int8 file whose metric is at most ``max_drop`` below that of the fp32 file.

    If it is lower, the layers that 8 bits change most are left in fp32: one, two, four and so on.

    Args:
        source: The ONNX file in fp32.
        target: The file to write: .onnx, or .xml for OpenVINO.
        meta: Its metadata.
        feeds: Inputs from the training images.
        measure: From a file to its metrics in percent.
        max_drop: In percent.

    Returns:
        The layers left in fp32.

    Raises:
        UserError: Packages are missing, weights were not found, or the metric drops even so.
    """
    onnx = require('onnx', 'onnxruntime')
    model = onnx.load(source)
    expected = measure(source)
    order: list[str] = []
    kept, ranges = 0, None
    while True:
        chosen = order[:kept]
        written = dict(meta, int8=True, in_fp32=len(chosen))
        with quiet():
            if target.suffix == '.onnx':
                ranges = quantize_onnx(source, target, written, feeds, chosen, ranges)
            else:
                quantize_openvino(source, target, written, feeds, chosen)
        share = size_of(target) / source.stat().st_size
        if share > LARGEST_SHARE:
            raise UserError(
                f'the int8 file has {100 * share:.0f} % of the bytes of the fp32 file: '
                + (f'with {kept} layers left in fp32 the drop is still more than {max_drop}: '
                   'allow more with --max-drop, or more images with --calibration' if kept else
                   'weights were not quantized'))
        problem = metric_problem(expected, measure(target), max_drop)
        print(f'int8 with {kept} layers in fp32: {problem or "within the limit"}', flush=True)
        if not problem:
            return chosen
        if not order:
            order = layers_by_noise(model, feeds[:NOISE_IMAGES])
        if kept >= len(order):
            raise UserError(f'int8 is not within {max_drop} of fp32: {problem}')
        kept = max(1, 2 * kept)


@contextmanager
def _no_logging() -> Iterator[None]:
    """Hide what quantizers log; errors are raised."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@_no_logging()
def quantize_onnx(source: Path, target: Path, meta: dict[str, Any], feeds: Sequence[Feed],
                  in_fp32: Sequence[str] = (), ranges: Any = None) -> Any:
    """Write an int8 file for ONNX Runtime.

    Args:
        source: The ONNX file in fp32.
        target: The file to write.
        meta: Its metadata.
        feeds: Inputs to calibrate on.
        in_fp32: Names of layers that stay in fp32.
        ranges: What an earlier call returned; None: they are measured.

    Returns:
        The ranges of all tensors.
    """
    quantization = require('onnxruntime.quantization')
    if ranges is None:
        ranges = _ranges(source, feeds)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, 'ranges.json')
        quantization.save_tensors_data(ranges, cache)
        quantization.quantize_static(
            source, target, quant_format=quantization.QuantFormat.QDQ, per_channel=True,
            op_types_to_quantize=list(LAYERS), nodes_to_exclude=list(in_fp32),
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8, calibration_cache_path=cache)
    onnx = require('onnx')
    written = onnx.load(target)
    write_meta(written, meta)
    onnx.save(written, target)
    return ranges


def _ranges(source: Path, feeds: Sequence[Feed]) -> Any:
    """The least and the largest value of each tensor that layers read or write.

    Other methods than these need images of one size.
    """
    quantization, runtime = require('onnxruntime.quantization'), require('onnxruntime')

    class Calibrater(quantization.MinMaxCalibrater):  # type: ignore[name-defined]
        def create_inference_session(self) -> None:
            options = runtime.SessionOptions()
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
            # Reduces each map once it is computed; by default, all of them are kept to the end,
            # which are some GB of a detector.
            options.execution_order = runtime.ExecutionOrder.PRIORITY_BASED
            self.infer_session = runtime.InferenceSession(
                self.augmented_model_path, options, providers=['CPUExecutionProvider'])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.feeds = iter(feeds)

        def get_next(self) -> Feed | None:
            return next(self.feeds, None)

    with tempfile.TemporaryDirectory() as folder:
        calibrater = Calibrater(source, LAYERS, str(Path(folder, 'augmented.onnx')))
        calibrater.augment_graph()
        calibrater.create_inference_session()
        calibrater.collect_data(Reader())
        return calibrater.compute_data()


@_no_logging()
def quantize_openvino(source: Path, target: Path, meta: dict[str, Any], feeds: Sequence[Feed],
                      in_fp32: Sequence[str] = ()) -> None:
    """Write an int8 file for OpenVINO; see :func:`quantize_onnx`."""
    openvino = require('openvino', extra='openvino')
    nncf = require('nncf', extra='openvino')
    layers = openvino.Core().read_model(source)
    names, types = _not_quantized(layers, in_fp32)
    ignored = nncf.IgnoredScope(names=names, types=types, validate=False)
    found = nncf.quantize(layers, nncf.Dataset(list(feeds)), subset_size=len(feeds),
                          ignored_scope=ignored, preset=nncf.QuantizationPreset.MIXED)
    save_openvino(found, target, meta)


def _not_quantized(model: Any, in_fp32: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names and types of the operators of OpenVINO that stay in fp32.

    By default, NNCF quantizes the arithmetic of boxes as well: steps of a 256th of the image.
    """
    names, types = [], set()
    for node in model.get_ops():
        kind, name = node.get_type_name(), node.get_friendly_name()
        if kind not in OPENVINO_LAYERS:
            types.add(kind)
        elif name.partition('/')[0] in in_fp32 or (
                kind == 'MatMul' and node.input_value(1).get_node().get_type_name()
                not in ('Constant', 'Transpose', 'Convert')):
            names.append(name)
    return names, sorted(types - {'Constant', 'Parameter', 'Result'})


def layers_by_noise(model: Any, feeds: Sequence[Feed]) -> list[str]:
    """Names of the layers, those first that 8 bits change most, relative to what they compute with.

    The change of a layer is that of its inputs, with the step that their range gives, and of its
    weights, with a step for each output channel.

    Args:
        model: The loaded ONNX file in fp32.
        feeds: Inputs.
    """
    onnx = require('onnx')
    weights = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    layers = [node for node in model.graph.node
              if node.op_type in LAYERS and node.input[1] in weights]
    noise = {node.name: _weight_noise(weights[node.input[1]]) for node in layers}
    for start in range(0, len(layers), LAYERS_AT_ONCE):
        part = layers[start:start + LAYERS_AT_ONCE]
        names = list(dict.fromkeys(node.input[0] for node in part))
        for feed in feeds:
            values = dict(zip(names, _inner_values(model, names, feed), strict=True))
            for node in part:
                noise[node.name] += _input_noise(values[node.input[0]]) / len(feeds)
    return sorted(noise, key=lambda name: -noise[name])


def _inner_values(model: Any, names: list[str], feed: Feed) -> list[np.ndarray]:
    """Tensors inside of a model."""
    onnx, runtime = require('onnx'), require('onnxruntime')
    inner = onnx.ModelProto()
    inner.CopyFrom(model)
    del inner.graph.output[:]
    inner.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    session = runtime.InferenceSession(inner.SerializeToString(), options,
                                       providers=['CPUExecutionProvider'])
    return session.run(names, feed)


def _input_noise(x: np.ndarray) -> float:
    """Of (N, C, ...), with one step for all."""
    return _noise(x, (max(float(x.max()), 0.0) - min(float(x.min()), 0.0)) / 255 or 1.0)


def _weight_noise(weight: np.ndarray) -> float:
    """Of (out, C, ...), with a symmetric step for each output."""
    others = tuple(range(1, weight.ndim))
    return _noise(weight, np.maximum(np.abs(weight).max(others, keepdims=True) / 127, 1e-20))


def _noise(x: np.ndarray, step: np.ndarray | float) -> float:
    """The mean over the channels C of (N, C, ...) of how much of each is lost, from 0 to 1.

    Channels with outliers lose nothing, but take the steps from the others.
    """
    error = np.rint(x / step) * step - x
    others = tuple(axis for axis in range(x.ndim) if axis != 1)
    lost = (error**2).mean(others) / np.maximum((x**2).mean(others), 1e-20)
    return float(np.minimum(lost, 1).mean())


def feeds_of(images: Any) -> list[Feed]:
    """The inputs of images, each for itself."""
    return [dict(image=image.pixels[None], size=image.size) for image in images]

