"""Inputs of mmcv's operators and what its compiled operators return, for machines without them.

    python -m tests.ops.golden       # writes tests/data/operators.pt; needs compiled operators
"""
from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch

from tests.helpers import DATA
from tests.ops.extensions import COMPILED, operators, random_boxes, random_rois

FILE = DATA / 'operators.pt'


def inputs() -> dict[str, tuple]:
    """{case: arguments}; the part of a name before the first space is an operator of mmcv."""
    torch.manual_seed(0)
    cases: dict[str, tuple] = {}
    features = torch.randn(2, 3, 20, 17)
    for seed, (bins, ratio, aligned, mode) in enumerate([
            (7, 0, True, 'avg'), ((3, 5), 2, True, 'avg'), (7, 0, False, 'avg'),
            (14, 3, False, 'avg'), ((2, 4), 2, True, 'max')]):
        rois = random_rois(seed, 24, 2)
        if mode == 'max':  # where mmcv's maximum of no samples is -10000
            rois = rois[(rois[:, 3:] > rois[:, 1:3]).all(1)]
        cases[f'roi_align {bins} {ratio} {aligned} {mode}'] = (
            features, rois, bins, 0.125, ratio, mode, aligned)
    for kind in ('spread', 'clusters', 'classes', 'ties'):
        boxes, scores = random_boxes(0, 300, kind)
        # All different: PyTorch sorts equal ones in another order on another processor.
        scores += torch.arange(300) * 1e-5
        cases[f'nms {kind}'] = boxes, scores, 0.5
        cases[f'nms {kind} offset'] = boxes, scores, 0.4, 1, 0.2, 50
        cases[f'nms_match {kind}'] = torch.cat([boxes, scores[:, None]], 1), 0.5
        cases[f'bbox_overlaps {kind}'] = boxes[:20], boxes[20:50]
        boxes, scores = boxes[:120], scores[:120]
        for method in ('naive', 'linear', 'gaussian'):
            if method == 'gaussian':  # where mmcv's new score is NaN if two boxes are empty
                full = (boxes[:, 2:] > boxes[:, :2]).all(1)
                boxes, scores = boxes[full], scores[full]
            cases[f'soft_nms {kind} {method}'] = boxes, scores, 0.3, 0.5, 0.05, method, 0
    x, weight = torch.randn(2, 4, 9, 8), torch.randn(6, 2, 3, 3)
    offset, mask = 3 * torch.randn(2, 36, 5, 4), torch.rand(2, 18, 5, 4)
    cases['deform_conv2d'] = x, offset, weight, 2, 1, 1, 2, 2
    cases['modulated_deform_conv2d'] = x, offset, mask, weight, torch.randn(6), 2, 1, 1, 2, 2
    for kind in (0, 1):
        cases[f'psa_mask {kind}'] = torch.randn(1, 15, 4, 6), kind, (3, 5)
    return cases


def run(extension: ModuleType, name: str, arguments: tuple) -> list[Any]:
    """The results of an operator, and the gradients of its floating-point tensors."""
    leaves = [x.clone().requires_grad_() if torch.is_tensor(x) and differentiable(name, i) else x
              for i, x in enumerate(arguments)]
    with operators(extension) as mmcv_ops:
        function = getattr(mmcv_ops, name.split()[0])
        # Not every function is exported, but every module is called as its function.
        function = getattr(function, name.split()[0], function)
        found = function(*leaves)
        found = list(found) if isinstance(found, (tuple, list)) else [found]
        inputs_ = [x for x in leaves if torch.is_tensor(x) and x.requires_grad]
        if inputs_:
            weights = torch.linspace(-1, 1, found[0].numel()).view_as(found[0])
            found += torch.autograd.grad((found[0] * weights).sum(), inputs_)
    return [x.detach() for x in found]


def differentiable(name: str, position: int) -> bool:
    """Whether an operator has a gradient by the argument at a position."""
    return (position == 0 and name.startswith(('roi', 'psa'))) or 'deform' in name


if __name__ == '__main__':
    if COMPILED is None:
        sys.exit('mmcv has no compiled operators: make OPS=compiled test')
    torch.save({name: dict(arguments=arguments, results=run(COMPILED, name, arguments))
                for name, arguments in inputs().items()}, FILE)
