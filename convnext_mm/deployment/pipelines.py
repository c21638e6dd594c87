"""A trained segmentor or detector as a function of tensors: from images to results.

The same module predicts batches in PyTorch, is compiled, and is what all exporters see. It calls
the model's own layers; what is between them in mmseg and mmdet, lists of data of any length, is
tensors with a fixed number of entries here, so that batch and image size may vary.
"""
from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .operations import nms_mask, roi_align
from .rewriting import hats, interpolation

SEGMENTOR_OUTPUTS = ('classes',)
DETECTOR_OUTPUTS = ('boxes', 'scores', 'labels', 'masks')


def build_pipeline(model: nn.Module, fixed: tuple[int, int] | None = None,
                   channels_last: bool = False) -> Pipeline:
    """The pipeline of a model of mmseg or mmdet.

    Args:
        model: The model.
        fixed: Height and width of all images, for runtimes that need constant shapes: the results
            are of this size, :meth:`Pipeline.forward` takes no ``size``, and a detector returns
            ``max_per_img`` detections, filled up, instead of as many as the image with the most
            has.
        channels_last: Compare the classes of a pixel beside each other in memory, which takes ONNX
            Runtime half the time, but OpenVINO longer.

    Raises:
        UserError: There is none for models of this kind.
    """
    model_type: Any = model
    if hasattr(model, 'decode_head'):
        return Segmentor(model_type, fixed, channels_last)
    if hasattr(model, 'rpn_head') and hasattr(model, 'roi_head'):
        return Detector(model_type, fixed)
    raise UserError(f'{type(model).__name__} cannot be exported: it is neither an EncoderDecoder '
                    'of mmseg nor a Faster, Mask or Cascade (Mask) R-CNN of mmdet')


class Pipeline(nn.Module):
    """Normalization, and what both tasks share.

    Args:
        model: The model, in eval mode.
        fixed: See :func:`build_pipeline`.
    """

    outputs: tuple[str, ...]
    """Names of what :meth:`forward` returns."""
    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, fixed: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.model, self.fixed = model, fixed
        pre = model.data_preprocessor
        self.reverse = bool(getattr(pre, '_channel_conversion', False)
                            or getattr(pre, 'channel_conversion', False))
        for name, default in (('mean', 0.0), ('std', 1.0)):
            value = getattr(pre, name, None)
            value = torch.tensor([default]) if value is None else value
            self.register_buffer(name, value.detach().float().reshape(1, -1, 1, 1))

    def example(self, image: Tensor) -> Tensor:
        """Images (2, H, W, C) from which exporters generalize to any number and size.

        Args:
            image: (1, H, W, C), of the user's.
        """
        return image.expand(2, -1, -1, -1).contiguous()

    def normalized(self, image: Tensor) -> Tensor:
        """(B, H, W, C) as the config's pipeline loads and resizes it → (B, C, H, W) of floats."""
        x = image.permute(0, 3, 1, 2).to(self.mean.dtype)
        x = x.flip(1) if self.reverse else x
        return (x - self.mean) / self.std


class Segmentor(Pipeline):
    """Images (B, H, W, C) and a size (2,) → class maps (B, *size) of uint8, or int32.

    The size, height and width, is the image's own before it was resized. What mmseg does after the
    network (it upsamples the logits of each window, averages overlaps, crops and upsamples again)
    is linear and separable: one matrix for rows, one for columns.
    """

    outputs = SEGMENTOR_OUTPUTS

    def __init__(self, model: Any, fixed: tuple[int, int] | None = None,
                 channels_last: bool = False) -> None:
        super().__init__(model, fixed)
        self.channels_last = channels_last
        head, cfg = model.decode_head, model.test_cfg
        if isinstance(head, nn.ModuleList) or not hasattr(head, 'conv_seg'):
            raise UserError(f'{type(model).__name__} with {type(head).__name__} cannot be '
                            'exported: expected an EncoderDecoder with one decode_head')
        self.padding = dict(model.data_preprocessor.test_cfg or {})
        self.slides = cfg.get('mode', 'whole') == 'slide'
        self.crop = tuple(cfg.crop_size) if self.slides else ()
        self.stride = tuple(cfg.stride) if self.slides else ()
        self.align_corners = bool(model.align_corners)
        self.out_channels = model.out_channels

    def forward(self, image: Tensor, size: Tensor | None = None) -> Tensor:
        """See the class."""
        if size is None:
            assert self.fixed is not None
            height, width = self.fixed
        else:
            height, width = (cast(int, length.item()) for length in (size[0], size[1]))
            torch._check(height >= 2)
            torch._check(width >= 2)
        x = self.normalized(image)
        inside = x.shape[2:]
        x = self._padded(x)
        windows, (rows, columns) = self._windows(x)
        maps = self.model.extract_feat(windows)
        logits = self.model.decode_head.forward(maps)
        matrices = []
        for axis, starts, out in ((0, rows, height), (1, columns, width)):
            stitch = self._stitching(starts, windows.shape[axis + 2], logits.shape[axis + 2],
                                     x.shape[axis + 2])[:inside[axis]]
            matrices.append(interpolation(inside[axis], out, self.align_corners, x) @ stitch)
        ny, nx, (classes, h, w) = rows.shape[0], columns.shape[0], logits.shape[1:]
        batch = image.shape[0]
        logits = logits.reshape(batch, ny, nx, classes, h, w)
        if self.channels_last:
            logits = logits.permute(0, 1, 4, 2, 5, 3).reshape(batch, ny * h, nx * w * classes)
            logits = (matrices[0] @ logits).reshape(batch, height, nx * w, classes)
            return self._classify(matrices[1] @ logits, 3)
        logits = logits.permute(0, 3, 1, 4, 2, 5).reshape(batch, classes, ny * h, nx * w)
        return self._classify(matrices[0] @ logits @ matrices[1].t(), 1)

    def example(self, image: Tensor) -> Tensor:
        """See the base class; of several windows, which exporters would else take for one."""
        if self.slides and self.fixed is None:
            height, width = (max(length, crop + stride + 1) for length, crop, stride in zip(
                image.shape[1:3], self.crop, self.stride, strict=True))
            image = image.new_zeros(1, height, width, image.shape[3])
        return super().example(image)

    def _padded(self, x: Tensor) -> Tensor:
        """As mmseg's data preprocessor pads images of a test."""
        height, width = x.shape[2:]
        if divisor := self.padding.get('size_divisor'):
            missing = (-height) % divisor, (-width) % divisor
        elif size := self.padding.get('size'):
            missing = tuple(torch.sym_max(0, length - now)
                            for length, now in zip(size, (height, width), strict=True))
        else:
            return x
        return F.pad(x, (0, missing[1], 0, missing[0]),
                     value=self.model.data_preprocessor.pad_val)

    def _windows(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """All windows of all images, (B · rows · columns, C, h, w), and where they start."""
        if not self.slides:
            return x, [torch.zeros(1, dtype=torch.int64, device=x.device)] * 2
        starts, pixels = [], []
        for length, crop, stride in zip(x.shape[2:], self.crop, self.stride, strict=True):
            crop = torch.sym_min(length, crop)  # of a smaller image, mmseg shrinks the window
            count = (length - crop + stride - 1) // stride + 1
            first = torch.arange(count, device=x.device) * stride
            first = torch.minimum(first, torch.zeros_like(first) + (length - crop))
            starts.append(first)
            pixels.append(first[:, None] + torch.arange(crop, device=x.device))
        rows, columns = pixels
        x = x[:, :, rows][..., columns].permute(0, 2, 4, 1, 3, 5)
        return x.flatten(0, 2), starts

    def _stitching(self, starts: Tensor, window: int, logits: int, length: int) -> Tensor:
        """(length, windows · logits): pixels of an axis from the logits of all windows.

        Args:
            starts: The first pixel of each window.
            window: Pixels of a window.
            logits: Logits of a window.
            length: Pixels of the axis.
        """
        place = torch.arange(length, device=starts.device)[:, None] - starts
        inside = ((place >= 0).float() * (place < window).float())
        weights = hats(place, logits, window, self.align_corners) * inside[..., None]
        return (weights / inside.sum(1)[:, None, None]).flatten(1)

    def _classify(self, logits: Tensor, axis: int) -> Tensor:
        """Class maps (B, H, W) of logits with the classes along an axis."""
        if self.out_channels == 1:
            first = logits.select(axis, 0).sigmoid()
            return (first > self.model.decode_head.threshold).to(torch.uint8)
        return logits.argmax(axis).to(torch.uint8 if self.out_channels <= 256 else torch.int32)


class Detector(Pipeline):
    """Images (B, H, W, C) and a size (2,) → detections of each, the best first.

    The size, height and width, is the image's own before it was resized. Returns boxes (B, D, 4)
    in its pixels, scores (B, D), labels (B, D), and with a mask head, masks (B, D, m, m) of floats
    that fill the boxes. D is the number of detections of the image with the most, at least 1;
    behind the last detection of an image, scores are 0 and labels -1.
    """

    def __init__(self, model: Any, fixed: tuple[int, int] | None = None) -> None:
        super().__init__(model, fixed)
        roi_head, rcnn = model.roi_head, model.test_cfg.rcnn
        kinds = [type(roi_head).__name__, type(model.rpn_head).__name__,
                 *(type(part).__name__ for extractor, head in self._stages('bbox')
                   for part in (extractor, head.bbox_coder)),
                 *['shared_head'] * bool(roi_head.with_shared_head)]
        expected = {'StandardRoIHead', 'CascadeRoIHead', 'RPNHead', 'SingleRoIExtractor',
                    'DeltaXYWHBBoxCoder'}
        for kind in kinds:
            if kind not in expected:
                raise UserError(f'{type(model).__name__} with {kind} cannot be exported: expected '
                                f'{", ".join(sorted(expected))}')
        for name, nms in (('rpn', model.test_cfg.rpn.nms), ('rcnn', rcnn.nms)):
            if nms.get('type', 'nms') != 'nms' or nms.get('class_agnostic'):
                raise UserError(f'test_cfg.{name}.nms={dict(nms)} cannot be exported: expected '
                                "dict(type='nms', iou_threshold=...)")
        if any(getattr(head, 'custom_activation', False) for _, head in self._stages('bbox')):
            raise UserError('a bbox_head whose loss has its own activation cannot be exported')
        self.with_masks = bool(model.with_mask)
        self.outputs = DETECTOR_OUTPUTS if self.with_masks else DETECTOR_OUTPUTS[:3]

    def forward(self, image: Tensor, size: Tensor | None = None) -> tuple[Tensor, ...]:
        """See the class."""
        x = self.normalized(image)
        height, width = x.shape[2:]
        divisor = self.model.data_preprocessor.pad_size_divisor
        x = F.pad(x, (0, (-width) % divisor, 0, (-height) % divisor),
                  value=self.model.data_preprocessor.pad_value)
        maps = self.model.extract_feat(x)
        area = torch.stack([torch.zeros((), dtype=torch.int64, device=x.device) + length
                            for length in (width, height)])
        proposals, valid = self._propose(maps, area)
        boxes, scores, labels = self._classify(maps, proposals, valid, area)
        if self.fixed is None:
            most = (scores > 0).sum(1).amax(0).clamp(min=1).item()
            torch._check(most >= 1)
            torch._check(most <= boxes.shape[1])
            boxes, scores, labels = boxes[:, :most], scores[:, :most], labels[:, :most]
        if size is not None:
            factor = size.flip(0).to(boxes) / area.to(boxes)
            boxes, inside = boxes * torch.cat([factor, factor]), boxes
        else:
            inside = boxes
        found = boxes, scores, labels
        return (*found, self._masks(maps, inside, labels)) if self.with_masks else found

    def _propose(self, maps: tuple[Tensor, ...], area: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes (B, P, 4) of the region proposal network, and whether each exists (B, P)."""
        head, cfg = self.model.rpn_head, self.model.test_cfg.rpn
        priors = head.prior_generator.grid_priors([x.shape[2:] for x in maps],
                                                  device=maps[0].device)
        all_scores, all_boxes, levels = [], [], []
        for level, (x, anchors) in enumerate(zip(maps, priors, strict=True)):
            logits, deltas = head.forward_single(x)
            batch = logits.shape[0]
            logits = logits.permute(0, 2, 3, 1)
            if head.use_sigmoid_cls:
                scores = logits.reshape(batch, -1).sigmoid()
            else:
                scores = logits.reshape(batch, -1, 2).softmax(-1)[..., 0]
            deltas = deltas.permute(0, 2, 3, 1).reshape(batch, -1, 4)
            scores, index = best(scores, cfg.nms_pre)
            boxes = decode(pick(anchors[None].expand(batch, -1, -1), index), pick(deltas, index),
                           head.bbox_coder, area)
            if cfg.get('min_bbox_size', -1) >= 0:
                sides = boxes[..., 2:] - boxes[..., :2]
                scores = scores.where((sides > cfg.min_bbox_size).all(-1), -1.0)
            all_scores.append(scores)
            all_boxes.append(boxes)
            levels += [level] * cfg.nms_pre
        scores, boxes = torch.cat(all_scores, 1), torch.cat(all_boxes, 1)
        own = torch.tensor(levels, device=scores.device)[None] == torch.arange(
            len(maps), device=scores.device)[:, None]
        by_level = scores[:, None].where(own[None], -1.0)
        keep = nms_mask(boxes, by_level, cfg.max_per_img, cfg.nms.iou_threshold, -0.5).amax(1)
        scores, index = scores.where(keep > 0, -1.0).topk(min(cfg.max_per_img, scores.shape[1]))
        return pick(boxes, index), scores > -0.5

    def _stages(self, kind: str) -> list[tuple[Any, Any]]:
        """The RoI extractors and heads of a kind, 'bbox' or 'mask', one pair per stage."""
        extractor, head = (getattr(self.model.roi_head, f'{kind}_{part}')
                           for part in ('roi_extractor', 'head'))
        if isinstance(head, nn.ModuleList):
            return list(zip(extractor, head, strict=True))
        return [(extractor, head)]

    def _pool(self, extractor: Any, maps: tuple[Tensor, ...], boxes: Tensor) -> Tensor:
        """(B, N, 4) → (B · N, C, s, s), from the level of the pyramid that suits each box.

        Every box is pooled from every level; where it does not belong, it is empty, which takes no
        time. Runtimes differ in what they return for an empty box.
        """
        batch = torch.arange(boxes.shape[0], device=boxes.device)[:, None].expand(
            boxes.shape[:2]).reshape(-1)
        boxes = boxes.reshape(-1, 4)
        sides = boxes[:, 2:] - boxes[:, :2]
        size = (sides[:, 0] * sides[:, 1]).sqrt()
        level = torch.floor(torch.log2(size / extractor.finest_scale + 1e-6)).clamp(
            0, extractor.num_inputs - 1)
        out = None
        for i, layer in enumerate(extractor.roi_layers):
            here = level == i
            part = roi_align(maps[i], boxes.where(here[:, None], 0.0), batch,
                             float(layer.spatial_scale), layer.output_size[0],
                             layer.sampling_ratio, layer.aligned)
            part = part.where(here[:, None, None, None], 0.0)
            out = part if out is None else out + part
        assert out is not None
        return out

    def _classify(self, maps: tuple[Tensor, ...], boxes: Tensor, valid: Tensor, area: Tensor
                  ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, D, 4) in pixels of the resized image, scores and labels (B, D)."""
        cfg, stages, logits = self.model.test_cfg.rcnn, self._stages('bbox'), []
        batch, count = boxes.shape[:2]
        for i, (extractor, head) in enumerate(stages):
            score, delta = head(self._pool(extractor, maps, boxes))
            score, delta = score.reshape(batch, count, -1), delta.reshape(batch, count, -1, 4)
            logits.append(score)
            if i + 1 < len(stages):
                if not head.reg_class_agnostic:
                    label = score[..., :-1].argmax(-1)[..., None, None]
                    delta = delta.gather(2, label.expand(-1, -1, 1, 4))
                boxes = decode(boxes, delta[:, :, 0], head.bbox_coder, area)
        total = logits[0]
        for score in logits[1:]:
            total = total + score
        scores = (total / float(len(logits))).softmax(-1)[..., :-1]
        scores = (scores * valid[..., None].to(scores)).transpose(1, 2)  # (B, classes, N)
        boxes = decode(boxes[:, :, None], delta, head.bbox_coder, area)
        each = boxes.expand(-1, -1, scores.shape[1], -1).transpose(1, 2)  # (B, classes, N, 4)
        keep = nms_mask(each.reshape(-1, count, 4), scores.reshape(-1, 1, count), cfg.max_per_img,
                        cfg.nms.iou_threshold, cfg.score_thr).reshape(batch, -1)
        scores, index = best(scores.reshape(batch, -1).where(keep > 0, -1.0), cfg.max_per_img)
        found = scores > 0
        boxes = pick(each.reshape(batch, -1, 4), index).where(found[..., None], 0.0)
        labels = torch.div(index, count, rounding_mode='floor').where(found, -1)
        return boxes, scores.clamp(min=0), labels

    def _masks(self, maps: tuple[Tensor, ...], boxes: Tensor, labels: Tensor) -> Tensor:
        """(B, D, m, m): from 0 to 1, the mean of all stages."""
        stages, out = self._stages('mask'), None
        crops = self._pool(stages[0][0], maps, boxes)  # the same in each stage
        for _, head in stages:
            masks = head(crops)
            index = labels.clamp(min=0).reshape(-1)[:, None, None, None]
            index = torch.zeros_like(index) if head.class_agnostic else index
            masks = masks.gather(1, index.expand(-1, 1, *masks.shape[2:]))[:, 0].sigmoid()
            out = masks if out is None else out + masks
        assert out is not None
        return (out / len(stages)).reshape(*labels.shape, *out.shape[1:])


def decode(boxes: Tensor, deltas: Tensor, coder: Any, area: Tensor) -> Tensor:
    """mmdet's DeltaXYWHBBoxCoder.decode for boxes (..., 4).

    Args:
        boxes: Boxes to move and scale.
        deltas: By how much, relative to their size (Ren et al., "Faster R-CNN", 2015, Eq. 2).
        coder: The coder, with its means and stds.
        area: (2,): width and height of the image, outside of which no box reaches.
    """
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    limit = abs(math.log(16 / 1000))
    center, sides = (boxes[..., :2] + boxes[..., 2:]) * 0.5, boxes[..., 2:] - boxes[..., :2]
    shift = sides * deltas[..., :2]
    if coder.add_ctr_clamp:
        shift = shift.clamp(-coder.ctr_clamp, coder.ctr_clamp)
        scale = deltas[..., 2:].clamp(max=limit)
    else:
        scale = deltas[..., 2:].clamp(-limit, limit)
    center, sides = center + shift, sides * scale.exp()
    out = torch.cat([center - sides * 0.5, center + sides * 0.5], -1)
    if not coder.clip_border:
        return out
    return torch.minimum(out.clamp(min=0), torch.cat([area, area]).to(out))


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest ``count`` of (B, N), and where they are; where N is less, -1 follows."""
    return F.pad(scores, (0, count), value=-1.0).topk(count, dim=-1)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """x (B, N, D), index (B, K) → (B, K, D); the last for an index beyond N."""
    index = torch.minimum(index, torch.zeros_like(index) + (x.shape[1] - 1))
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
