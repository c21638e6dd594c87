"""mmseg's EncoderDecoder without maps of all classes at the size of the image."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from mmengine.structures import PixelData
from mmseg.models import segmentors
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.structures import SegDataSample
from torch import Tensor

from ..registry import MODELS
from .stitching import Axis, class_rows, window_starts

REPLACED = ('predict', 'inference', 'slide_inference', 'whole_inference', 'encode_decode',
            'postprocess_result')
"""Methods of mmseg's segmentor that :meth:`EncoderDecoder.predict` replaces as a whole."""


@MODELS.register_module()
class EncoderDecoder(segmentors.EncoderDecoder):
    """mmseg's EncoderDecoder with another way from logits to classes.

    Predictions are the same up to rounding. Their ``seg_logits`` are computed only with
    ``test_cfg=dict(seg_logits=True)``, which test-time augmentation sets; then, and where a
    subclass or the head has its own way to predict, mmseg's code runs.

    Args:
        args: As for mmseg's EncoderDecoder. ``test_cfg`` has two more keys: ``seg_logits``, and
            ``window_batch``, the windows that the slide mode computes at once (default: 1 on a
            CPU, 4 otherwise).
        kwargs: As for mmseg's EncoderDecoder.
    """

    def predict(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None
                ) -> list[SegDataSample]:
        """Images (N, C, H, W) → data samples with ``pred_sem_seg``, (1, H, W)."""
        if not self._predicts_in_blocks(inputs):
            return super().predict(inputs, data_samples)
        if data_samples is None:
            samples, metas = [SegDataSample() for _ in inputs], None
        else:
            samples, metas = data_samples, [sample.metainfo for sample in data_samples]
        if self.test_cfg.get('mode', 'whole') == 'slide':
            maps = [self._slide(inputs[i:i + 1], None if metas is None else metas[i])
                    for i in range(len(inputs))]
        else:
            maps = self._whole(inputs, metas)
        for sample, classes in zip(samples, maps, strict=True):
            sample.set_data(dict(pred_sem_seg=PixelData(data=classes[None])))
        return samples

    def _predicts_in_blocks(self, inputs: Tensor) -> bool:
        head = self.decode_head
        return not (
            self.test_cfg.get('seg_logits') or torch.is_grad_enabled()
            or inputs.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing()
            or any(getattr(type(self), name) is not getattr(
                EncoderDecoder if name == 'predict' else segmentors.EncoderDecoder, name)
                for name in REPLACED)
            or not isinstance(head, BaseDecodeHead)
            or type(head).predict is not BaseDecodeHead.predict
            or type(head).predict_by_feat is not BaseDecodeHead.predict_by_feat
            or self.test_cfg.get('mode', 'whole') not in ('slide', 'whole'))

    def _logits(self, inputs: Tensor) -> Tensor:
        """(N, C, H, W) → (N, H / 4, W / 4, classes)."""
        return self.decode_head.forward(self.extract_feat(inputs)).permute(0, 2, 3, 1).contiguous()

    def _whole(self, inputs: Tensor, metas: list[dict[str, Any]] | None) -> list[Tensor]:
        size = tuple(inputs.shape[2:])
        if metas is not None:
            first = metas[0]  # as BaseDecodeHead.predict_by_feat
            size = tuple((first['img_shape'] if isinstance(first['img_shape'], torch.Size) else
                          first.get('pad_shape', first['img_shape']))[:2])
        logits = self._logits(inputs)
        return [self._classes([one].__getitem__, [(0, size[0])], [(0, size[1])], size,
                              None if metas is None else metas[i])
                for i, one in enumerate(logits)]

    def _slide(self, image: Tensor, meta: dict[str, Any] | None) -> Tensor:
        size, cfg = tuple(image.shape[2:]), self.test_cfg
        rows, columns = (window_starts(length, crop, stride) for length, crop, stride in zip(
            size, cfg.crop_size, cfg.stride, strict=True))
        batch = cfg.get('window_batch') or (1 if image.is_cpu else 4)

        def logits_of(row: int) -> Tensor:
            (top, bottom), out = rows[row], None
            for i in range(0, len(columns), batch):
                logits = self._logits(torch.cat([image[:, :, top:bottom, left:right]
                                                 for left, right in columns[i:i + batch]]))
                count, height, width, classes = logits.shape
                if out is None:
                    out = logits.new_empty(height, len(columns), width, classes)
                out[:, i:i + count] = logits.transpose(0, 1)
            assert out is not None
            return out.flatten(1, 2)
        return self._classes(logits_of, rows, columns, size, meta)

    def _classes(self, logits_of: Callable[[int], Tensor], rows: list[tuple[int, int]],
                 columns: list[tuple[int, int]], size: tuple[int, ...],
                 meta: dict[str, Any] | None) -> Tensor:
        """The class map of an image of a padded size, whose windows are in rows and columns."""
        if meta is None:
            padding, out = (0, 0, 0, 0), size
        else:
            padding = meta.get('img_padding_size', meta.get('padding_size', (0, 0, 0, 0)))
            out = meta['ori_shape'][:2]
        left, right, top, bottom = padding
        upside_down = _flipped(meta, 'vertical')
        start = len(rows) - 1 if upside_down else 0
        first = logits_of(start)
        vertical = Axis(rows, first.shape[0], self.align_corners, (top, size[0] - bottom),
                        upside_down, out[0])
        horizontal = Axis(columns, first.shape[1] // len(columns), self.align_corners,
                          (left, size[1] - right), _flipped(meta, 'horizontal'), out[1])
        result = None
        for block, classes in class_rows(logits_of, {start: first}, vertical, horizontal,
                                         self._classify):
            if result is None:
                result = classes.new_empty(out)
            result[block] = classes
        assert result is not None
        return result

    def _classify(self, logits: Tensor) -> Tensor:
        if self.out_channels > 1:
            return logits.argmax(-1)
        return (logits[..., 0].sigmoid() > self.decode_head.threshold).to(logits)


def _flipped(meta: dict[str, Any] | None, direction: str) -> bool:
    return bool(meta and meta.get('flip') and meta.get('flip_direction') == direction)
