"""What options of the command choose from, for modules with and without PyTorch."""
from __future__ import annotations

DTYPES = {'fp32': 'float32', 'bf16': 'bfloat16', 'fp16': 'float16'}
"""The values of ``inference_dtype``, and PyTorch's names for them."""
SAVED = ('masks', 'coco', 'csv')
"""What can be written beside the drawn pictures."""
FORMATS = {'onnx': '.onnx', 'openvino': '.xml', 'torch-export': '.pt2', 'aoti': '.aoti.pt2'}
"""What a model can be exported to, and the ending of the file; the longest that fits comes last."""
EXPORT_SCHEMES = ('official', 'mmpretrain', 'timm', 'transformers', 'torchvision')
"""The libraries whose names checkpoints can be converted to."""
WEB_RUNTIME = 'onnxruntime-web@1.30.0'
"""The npm package that runs ONNX files in browsers."""
