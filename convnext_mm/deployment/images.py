"""The user's images as a config's test pipeline prepares them, and PyTorch's results on them."""
from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.structures import BaseDataElement

from ..datasets import dataset_registry, datasets_of_split
from ..engine import checks
from ..errors import UserError


class Image(NamedTuple):
    """An image that is ready for the model.

    Args:
        pixels: (H, W, C), loaded and resized.
        sample: Its data sample, with ``ori_shape``, ``scale_factor`` and annotations.
    """

    pixels: np.ndarray
    sample: BaseDataElement

    @property
    def size(self) -> np.ndarray:
        """(2,) int64: height and width before it was resized."""
        return np.array(self.sample.ori_shape[:2], np.int64)

    def resized(self, height: int, width: int) -> Image:
        """The same image at another size of the input."""
        pixels = cv2.resize(self.pixels, (width, height), interpolation=cv2.INTER_LINEAR)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        return self.of(pixels)

    def fixed(self, height: int, width: int) -> Image:
        """The image resized as if it had always been of this size."""
        image = self.resized(height, width)
        image.sample.set_metainfo(dict(ori_shape=(height, width), scale_factor=(1.0, 1.0)))
        return image

    def of(self, pixels: np.ndarray) -> Image:
        """Another input with the data sample of this one."""
        height, width = pixels.shape[:2]
        before = self.sample.ori_shape
        sample = copy.deepcopy(self.sample)
        sample.set_metainfo(dict(img_shape=(height, width),
                                 scale_factor=(width / before[1], height / before[0])))
        return Image(np.ascontiguousarray(pixels), sample)


class ImageSource:
    """Images of a split of a config's data.

    Args:
        cfg: A completed config.
        split: 'test', or 'train' for the training images as the test pipeline prepares them.
        limit: Use that many, evenly spaced; None: all.

    Raises:
        UserError: The data is not there.
    """

    def __init__(self, cfg: Config, split: str, limit: int | None) -> None:
        for name in {split, 'test'}:
            if not datasets_of_split(cfg, name):
                raise UserError(f'{name}_dataloader is None: expected a data set, whose images are '
                                'needed')
        checks.check_data_exists(cfg, (split,))
        init_default_scope(cfg.default_scope)
        settings = copy.deepcopy(cfg[f'{split}_dataloader'].dataset)
        if split == 'train':
            tested = datasets_of_split(cfg, 'test')[0]['pipeline']
            _replace_pipeline(settings, [step for step in tested
                                         if step['type'] != 'LoadAnnotations'])
        self.dataset: Any = dataset_registry(cfg.default_scope).build(settings)
        count = len(self.dataset)
        chosen = count if limit is None else min(limit, count)
        self.indices = np.linspace(0, count - 1, chosen).round().astype(int).tolist()

    def __iter__(self) -> Iterator[Image]:
        return (self[i] for i in range(len(self)))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Image:
        """An image, as float32 unless it has 8 bits."""
        packed = self.dataset[self.indices[index]]
        pixels = packed['inputs'].permute(1, 2, 0).numpy()
        if pixels.dtype != np.uint8:
            pixels = pixels.astype(np.float32)
        return Image(np.ascontiguousarray(pixels), packed['data_samples'])


def _replace_pipeline(dataset: dict, steps: list[dict]) -> None:
    """Set the pipeline of the data sets that a data set consists of, in place.

    That of a wrapper, which mixes images for training, becomes empty.
    """
    inner = [one for one in (dataset.get('dataset'), *(dataset.get('datasets') or ())) if one]
    if 'pipeline' in dataset:
        dataset['pipeline'] = [] if inner else copy.deepcopy(steps)
    for one in inner:
        _replace_pipeline(one, steps)


@torch.no_grad()
def predict_in_pytorch(model: Any, images: Sequence[Image]) -> list[BaseDataElement]:
    """The data samples of images, with the model's results."""
    return model.test_step(dict(
        inputs=[torch.from_numpy(image.pixels).permute(2, 0, 1).contiguous() for image in images],
        data_samples=[copy.deepcopy(image.sample) for image in images]))
