"""The size of the images in a batch of training, and of the windows of a test."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.config import Config

from ..datasets.completion import wrapped_datasets_of_split
from ..errors import UserError
from .edits import Edits, nodes, pair, same

DIVISOR = 32
"""What sides are padded to a multiple of, where images have no one size: a coarsest map's pixel."""


def steps_of_split(cfg: Config, split: str) -> list[tuple[dict, list[dict[str, Any]]]]:
    """Each dataset config of a split, and all steps of its pipeline and of those around it."""
    return [(next(iter(chain.values())),
             [step for dataset in chain.values() for step in dataset.get('pipeline') or ()])
            for chain in wrapped_datasets_of_split(cfg, split)]


def resizing(steps: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The steps of a pipeline that change the size of an image, or have one inside that does."""
    for step in steps:
        if any(word in str(one.get('type')) for _, one in nodes(step, '')
               for word in ('Resize', 'Crop', 'Mosaic')):
            yield step


def image_size(steps: Sequence[dict[str, Any]]) -> tuple[int, int] | None:
    """The (height, width) that images have after a pipeline, at the most; None: no one size.

    A square that keeps the ratio of the sides is one: the shorter side is padded to it.
    """
    last = (list(resizing(steps)) or [{}])[-1]
    if last.get('type') == 'RandomCrop':
        return pair('RandomCrop: crop_size', last.get('crop_size'))
    if last.get('type') == 'Resize' and last.get('scale'):
        width, height = pair('Resize: scale', last['scale'])
        if not last.get('keep_ratio') or width == height:
            return height, width
    return None


def size_and_size_divisor(edits: Edits) -> None:
    """Images are padded to a size or to a multiple of a number: what is set last counts.

    Raises:
        UserError: Both are set in one place.
    """
    for path in ('model.data_preprocessor', 'model.data_preprocessor.test_cfg'):
        node = edits.get(path) or {}
        if edits.get('default_scope') != 'mmseg' or any(
                node.get(key) is None for key in ('size', 'size_divisor')):
            continue
        (new, kept), (old, dropped) = sorted(
            (edits.set_in(f'{path}.{key}'), key) for key in ('size', 'size_divisor'))
        if new == old:
            raise UserError(f'{path} has size={node["size"]} and size_divisor='
                            f'{node["size_divisor"]}, but images are padded to one of them: '
                            'remove the other')
        del node[dropped]
        edits.note(f': none, as {kept} is set', f'{path}.{dropped}')


def images_and_padding(edits: Edits) -> None:
    """Padding and sliding window have the size of the training's images.

    Images that have no one size are padded to the largest of their batch.

    Raises:
        UserError: The user pads crops to another size.
    """
    if edits.get('default_scope') != 'mmseg' or not edits.recipe:
        return
    chosen = edits.is_set('crop_size')
    pipelines = [steps for _, steps in steps_of_split(edits.cfg, 'train')]
    sizes = {image_size(steps) for steps in pipelines}
    size = sizes.pop() if len(sizes) == 1 else None
    if size is None and chosen:
        size = pair('crop_size', edits.get('crop_size'))
    if size is None:
        preprocessor = edits.get('model.data_preprocessor') or {}
        if preprocessor.get('size') and not edits.is_set('model.data_preprocessor.size') and any(
                not same(edits.get(path), edits.recipes_pipeline(path))
                for path in edits.pipelines('train')):
            del preprocessor['size']
            preprocessor['size_divisor'] = DIVISOR
            edits.note(f'={DIVISOR} instead of size: the images of training have no one size',
                       'model.data_preprocessor.size_divisor')
        return
    cropped = chosen or any(step.get('type') == 'RandomCrop' for steps in pipelines
                            for step in steps)
    for path in ('model.data_preprocessor.size', 'model.test_cfg.crop_size'):
        value = edits.get(path)
        if value is None or same(value, size) or (
                path.startswith('model.test_cfg') and edits.get('model.test_cfg.mode') != 'slide'):
            continue
        if not edits.is_set(path) or (chosen and edits.set_in('crop_size') < edits.set_in(path)):
            edits.put(path, size)
            edits.note(f'={size} follows the images of training', path)
        elif path.endswith('.size') and cropped:
            raise UserError(f'{path}={tuple(value)}, but images are cropped to {size} '
                            f'(RandomCrop): set {path}={size}, or crop to {tuple(value)}')


def window_and_stride(edits: Edits) -> None:
    """The stride of the sliding window keeps its share of the window."""
    size, stride = 'model.test_cfg.crop_size', 'model.test_cfg.stride'
    new, old, steps = edits.get(size), edits.inherited(size), edits.get(stride)
    if edits.get('default_scope') != 'mmseg' or edits.get('model.test_cfg.mode') != 'slide' or (
            not (new and old and steps) or same(new, old) or edits.is_set(stride)):
        return
    scaled = tuple(max(1, one * n // o) for one, n, o in zip(
        pair(stride, steps), pair(size, new), pair(size, old), strict=True))
    edits.put(stride, scaled)
    edits.note(f'={scaled} follows the window, crop_size', stride)
