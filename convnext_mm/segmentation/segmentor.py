"""mmseg's EncoderDecoder without maps of all classes at the size of the image."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.structures import PixelData
from mmseg.models import SegDataPreProcessor, segmentors
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.structures import SegDataSample
from mmseg.utils import stack_batch
from torch import Tensor

from ..precision import has_other_hooks, inference_autocast
from ..registry import MODELS
from ..utils import LARGE_PICTURE
from .stitching import Axis, Windows, class_rows, window_starts

Rows = tuple[slice, Tensor]
"""Rows of a class map: which, and their classes (rows, W)."""
ReadWindow = Callable[[int, int, int, int], Tensor]
"""From top, bottom, left and right, in pixels, to that window of an image."""
REPLACED = ('forward', 'predict', 'inference', 'slide_inference', 'whole_inference',
            'encode_decode', 'postprocess_result')
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

    Attributes:
        progress: Shows how far the class map of a large picture is: from the iterator of its rows
            and their number to the same iterator. None: nothing is shown.
    """

    progress: Callable[[Iterable[Rows], int], Iterable[Rows]] | None = None

    def test_step(self, data: Any) -> list[SegDataSample]:
        """As mmengine's; of large pictures in slide mode, windows are normalized one by one."""
        return self._predict_large(data) or super().test_step(data)

    def val_step(self, data: Any) -> list[SegDataSample]:
        """As :meth:`test_step`."""
        return self._predict_large(data) or super().val_step(data)

    @torch.no_grad()
    def class_rows(self, read: ReadWindow, height: int, width: int) -> Iterator[Rows]:
        """The class map of a picture in slide mode, from the top, reading window by window.

        Args:
            read: Windows (C, h, w) as the pipeline loads them, before normalization; called in
                rows from the top.
            height: Of the picture, in pixels.
            width: Of the picture, in pixels.
        """
        windows, size, padding = self._normalized(read, (height, width))
        yield from self._slide(windows, size, dict(padding, ori_shape=(height, width)))

    def reads_windows(self) -> bool:
        """Whether :meth:`class_rows` predicts what :meth:`predict` does."""
        with torch.no_grad():
            return (self.test_cfg.get('mode', 'whole') == 'slide'
                    and type(self.data_preprocessor) is SegDataPreProcessor
                    and not has_other_hooks(self)
                    and self._predicts_in_blocks())

    def _predict_large(self, data: Any) -> list[SegDataSample] | None:
        """Data samples with predictions, or None if the images are not large pictures."""
        inputs = data.get('inputs') if isinstance(data, dict) else None
        if (torch.is_grad_enabled() or not isinstance(inputs, list) or not data.get('data_samples')
                or not all(image.shape[1:].numel() > LARGE_PICTURE for image in inputs)
                or not self.reads_windows()):
            return None
        data = self.data_preprocessor.cast_data(data)
        for image, sample in zip(data['inputs'], data['data_samples'], strict=True):
            windows, size, padding = self._normalized(_windows_of(image), tuple(image.shape[1:]))
            sample.set_metainfo(padding)
            rows = self._slide(windows, size, sample.metainfo)
            if self.progress is not None:
                rows = iter(self.progress(rows, sample.ori_shape[0]))
            _set_classes(sample, _collect(rows, sample.ori_shape[:2], self.out_channels <= 256))
        return data['data_samples']

    def _normalized(self, read: ReadWindow, size: tuple[int, ...]
                    ) -> tuple[ReadWindow, tuple[int, ...], dict[str, Any]]:
        """Windows (1, C, h, w) of the normalized and padded image, its size, and its padding."""
        preprocessor = copy.copy(self.data_preprocessor)
        padding = preprocessor.test_cfg or {}
        preprocessor.test_cfg = None  # of a window, nothing is padded
        padded, info = size, {}
        if padding:
            # The sizes follow from an image without channels.
            _, (info,) = stack_batch([torch.empty(0, *size)], size=padding.get('size'),
                                     size_divisor=padding.get('size_divisor'))
            padded = tuple(info['pad_shape'])

        def window(top: int, bottom: int, left: int, right: int) -> Tensor:
            inside = read(top, min(bottom, size[0]), left, min(right, size[1]))
            image = preprocessor(dict(inputs=[inside], data_samples=None))['inputs']
            missing = (0, right - left - image.shape[3], 0, bottom - top - image.shape[2])
            return F.pad(image, missing, value=preprocessor.pad_val) if any(missing) else image
        return window, padded, info

    def predict(self, inputs: Tensor, data_samples: list[SegDataSample] | None = None
                ) -> list[SegDataSample]:
        """Images (N, C, H, W) → data samples with ``pred_sem_seg``, (1, H, W)."""
        if inputs.is_meta or not self._predicts_in_blocks():
            return super().predict(inputs, data_samples)
        if data_samples is None:
            samples, metas = [SegDataSample() for _ in inputs], None
        else:
            samples, metas = data_samples, [sample.metainfo for sample in data_samples]
        if self.test_cfg.get('mode', 'whole') == 'slide':
            size = tuple(inputs.shape[2:])
            maps = []
            for i in range(len(inputs)):
                meta = None if metas is None else metas[i]
                maps.append(_collect(self._slide(_windows_of(inputs[i:i + 1]), size, meta),
                                     size if meta is None else meta['ori_shape'][:2]))
        else:
            maps = self._whole(inputs, metas)
        for sample, classes in zip(samples, maps, strict=True):
            _set_classes(sample, classes)
        return samples

    def _predicts_in_blocks(self) -> bool:
        head = self.decode_head
        return not (
            self.test_cfg.get('seg_logits') or torch.is_grad_enabled()
            or torch.compiler.is_compiling() or torch.jit.is_tracing()
            or any(getattr(type(self), name) is not getattr(
                EncoderDecoder if name == 'predict' else segmentors.EncoderDecoder, name)
                for name in REPLACED)
            or not isinstance(head, BaseDecodeHead)
            or type(head).predict is not BaseDecodeHead.predict
            or type(head).predict_by_feat is not BaseDecodeHead.predict_by_feat
            or self.test_cfg.get('mode', 'whole') not in ('slide', 'whole'))

    def _logits(self, inputs: Tensor) -> Tensor:
        """(N, C, H, W) → (N, H / 4, W / 4, classes)."""
        with inference_autocast(self):  # windows of a large picture are not computed by forward
            logits = self.decode_head.forward(self.extract_feat(inputs))
        return logits.permute(0, 2, 3, 1).contiguous()

    def _whole(self, inputs: Tensor, metas: list[dict[str, Any]] | None) -> list[Tensor]:
        size = tuple(inputs.shape[2:])
        if metas is not None:
            first = metas[0]  # as BaseDecodeHead.predict_by_feat
            size = tuple((first['img_shape'] if isinstance(first['img_shape'], torch.Size) else
                          first.get('pad_shape', first['img_shape']))[:2])
        logits = self._logits(inputs)
        maps = []
        for i, one in enumerate(logits):
            meta = None if metas is None else metas[i]
            maps.append(_collect(
                self._classes([one].__getitem__, ((0, size[0]),), ((0, size[1]),), size, meta),
                size if meta is None else meta['ori_shape'][:2]))
        return maps

    def _slide(self, window: ReadWindow, size: tuple[int, ...], meta: dict[str, Any] | None
               ) -> Iterator[Rows]:
        """The class map of a padded image of a size, from its windows (1, C, h, w)."""
        cfg = self.test_cfg
        rows, columns = (window_starts(length, crop, stride) for length, crop, stride in zip(
            size, cfg.crop_size, cfg.stride, strict=True))
        on_cpu = self.decode_head.conv_seg.weight.is_cpu
        batch = cfg.get('window_batch') or (1 if on_cpu else 4)

        def logits_of(row: int) -> Tensor:
            (top, bottom), out = rows[row], None
            for i in range(0, len(columns), batch):
                logits = self._logits(torch.cat([window(top, bottom, left, right)
                                                 for left, right in columns[i:i + batch]]))
                count, height, width, classes = logits.shape
                if out is None:
                    out = logits.new_empty(height, len(columns), width, classes)
                out[:, i:i + count] = logits.transpose(0, 1)
            assert out is not None
            return out.flatten(1, 2)
        return self._classes(logits_of, rows, columns, size, meta)

    def _classes(self, logits_of: Callable[[int], Tensor], rows: Windows, columns: Windows,
                 size: tuple[int, ...], meta: dict[str, Any] | None) -> Iterator[Rows]:
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
        return class_rows(logits_of, {start: first}, vertical, horizontal, self._classify)

    def _classify(self, logits: Tensor) -> Tensor:
        if self.out_channels > 1:
            return logits.argmax(-1)
        return (logits[..., 0].sigmoid() > self.decode_head.threshold).to(logits)


def _flipped(meta: dict[str, Any] | None, direction: str) -> bool:
    return bool(meta and meta.get('flip') and meta.get('flip_direction') == direction)


def _windows_of(image: Tensor) -> ReadWindow:
    def window(top: int, bottom: int, left: int, right: int) -> Tensor:
        return image[..., top:bottom, left:right]
    return window


def _collect(rows: Iterable[Rows], size: tuple[int, ...], small: bool = False) -> Tensor:
    """A class map of a size from its rows; until it is complete, in 8 bits if ``small``."""
    result = dtype = None
    for block, classes in rows:
        if result is None:
            dtype = classes.dtype
            result = classes.new_empty(size, dtype=torch.uint8 if small else dtype)
        result[block] = classes
    assert result is not None
    return result.to(dtype)


def _set_classes(sample: SegDataSample, classes: Tensor) -> None:
    sample.set_data(dict(pred_sem_seg=PixelData(data=classes[None])))
