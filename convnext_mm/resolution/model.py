"""The backbone, and the parts of a model that follow it."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from ..options import check_arch
from .edits import Edits, same


def backbone_channels(backbone: dict[str, Any] | None) -> list[int] | None:
    """Channels of the feature maps that a ConvNeXt returns; None: it is another backbone."""
    if not backbone or backbone.get('type') != 'ConvNeXt':
        return None
    size = check_arch(backbone.get('arch', 'tiny'), backbone.get('depths'), backbone.get('dims'),
                      backbone.get('use_grn'))
    stages = len(size.dims)
    indices = backbone.get('out_indices')
    indices = range(stages) if indices is None else sorted({i % stages for i in indices
                                                            if -stages <= i < stages})
    return [size.dims[i] for i in indices]


def backbone_and_in_channels(edits: Edits) -> None:
    """Neck and heads have the channels of the backbone's maps.

    What the recipe has set follows the backbone; what the user has set must agree with it.

    Raises:
        UserError: The user's channels differ from the backbone's, or a head reads a map that is not
            there.
    """
    channels = backbone_channels(edits.get('model.backbone'))
    if channels is None:
        return
    neck = edits.get('model.neck')
    if neck:
        path = 'model.neck.0' if isinstance(neck, (list, tuple)) else 'model.neck'
        _follow(edits, f'{path}.in_channels', channels, 'the maps of model.backbone')
        return
    for path in _heads(edits):
        head = edits.get(path)
        index, own = head.get('in_index', -1), head.get('in_channels')
        if isinstance(own, (list, tuple)):
            indices = index if isinstance(index, (list, tuple)) else range(len(own))
            wanted: Any = _at(channels, indices, f'{path}.in_index')
        elif isinstance(own, int) and isinstance(index, int):
            wanted = _at(channels, [index], f'{path}.in_index')[0]
        else:
            continue
        _follow(edits, f'{path}.in_channels', wanted, f'map {index} of model.backbone')


def backbone_maps_and_heads(edits: Edits) -> None:
    """Every map that the backbone computes is used.

    Unused ones are parameters without gradients, at which DistributedDataParallel stops. The
    backbone returns only those that are used, if the user has not chosen them.

    Raises:
        UserError: The user's ``out_indices`` name a map that no head uses.
    """
    backbone = edits.get('model.backbone') or {}
    channels = backbone_channels(backbone)
    if channels is None or edits.get('model.neck') or edits.get('default_scope') != 'mmseg':
        return
    used: set[int] = set()
    for path in _heads(edits):
        index, own = edits.get(f'{path}.in_index', -1), edits.get(f'{path}.in_channels')
        if isinstance(index, (list, tuple)):
            used |= {i % len(channels) for i in index}
        elif isinstance(own, (list, tuple)):
            used |= set(range(len(own)))
        else:
            used.add(index % len(channels))
    unused = sorted(set(range(len(channels))) - used)
    if not used or not unused:
        return
    if edits.is_set('model.backbone.out_indices'):
        raise UserError(
            f'model.backbone.out_indices={list(backbone["out_indices"])}, but no head uses map '
            f'{", ".join(map(str, unused))} of them (in_index), whose parameters would get no '
            'gradients: remove them from out_indices')
    given = list(backbone.get('out_indices') or range(len(channels)))
    kept = sorted(used)
    edits.put('model.backbone.out_indices', [given[i] for i in kept])
    for path in _heads(edits):
        index = edits.get(f'{path}.in_index', -1)
        if isinstance(index, (list, tuple)):
            edits.put(f'{path}.in_index', [kept.index(i % len(channels)) for i in index])
        elif not isinstance(edits.get(f'{path}.in_channels'), (list, tuple)):
            edits.put(f'{path}.in_index', kept.index(index % len(channels)))
    edits.note(f'model.backbone.out_indices={[given[i] for i in kept]}: no head uses the others')


def in_chans_and_data_preprocessor(edits: Edits) -> None:
    """Images of other than three bands have one mean and std for all, and no RGB order.

    Raises:
        UserError: ``mean`` or ``std`` has a number of values that does not fit the bands.
    """
    bands = edits.get('model.backbone.in_chans', 3)
    path = 'model.data_preprocessor'
    preprocessor = edits.get(path)
    if not preprocessor or edits.get('model.backbone.type') != 'ConvNeXt':
        return
    for key in ('mean', 'std'):
        values = preprocessor.get(key)
        if not isinstance(values, (list, tuple)) or len(values) == 1:
            continue
        if len(values) != bands:
            raise UserError(
                f'{path}.{key} has {len(values)} values, but model.backbone.in_chans={bands}: set '
                + (f'{key} with 3 values' if bands == 3 else f'{key} with one value for all bands'))
        if bands != 3:  # mmengine asserts 1 or 3
            raise UserError(
                f'{path}.{key} has {len(values)} values, but OpenMMLab takes 1 or 3: set {key} '
                'with one value for all bands, and bring them to one range in the pipeline')
    if bands == 3:
        return
    for key in ('bgr_to_rgb', 'rgb_to_bgr'):
        if preprocessor.get(key) and edits.is_set(f'{path}.{key}'):
            raise UserError(f'{path}.{key}=True swaps the bands of RGB images, but '
                            f'model.backbone.in_chans={bands}: set it to False')
        if preprocessor.get(key):
            edits.put(f'{path}.{key}', False)
            edits.note(f'{path}.{key}=False: images have {bands} bands')


def num_classes_and_out_channels(edits: Edits) -> None:
    """A head with one output channel is binary: its loss is a sigmoid's.

    Raises:
        UserError: One channel with a softmax, which has nothing to learn.
    """
    for path in _heads(edits):
        head = edits.get(path)
        if head.get('out_channels') != 1:
            continue
        losses = head.get('loss_decode')
        for loss in losses if isinstance(losses, (list, tuple)) else [losses or {}]:
            if loss.get('type') == 'CrossEntropyLoss' and not loss.get('use_sigmoid'):
                raise UserError(
                    f'{path}.out_channels=1, but loss_decode is a softmax, whose only class is '
                    'always certain: set loss_decode=dict(use_sigmoid=True) and threshold=0.5, or '
                    'remove out_channels')


def num_classes_and_class_weight(edits: Edits) -> None:
    """A loss has a weight for each class.

    Raises:
        UserError: It has more or fewer.
    """
    for path in _heads(edits):
        head = edits.get(path)
        losses = head.get('loss_decode')
        for loss in losses if isinstance(losses, (list, tuple)) else [losses or {}]:
            weights, count = loss.get('class_weight'), head.get('num_classes')
            if isinstance(weights, (list, tuple)) and count and len(weights) != count:
                raise UserError(f'{path}.loss_decode.class_weight has {len(weights)} weights, but '
                                f'there are {count} classes: give one weight per class')


def _heads(edits: Edits) -> Iterator[str]:
    """Paths of the segmentation heads that read the backbone's maps."""
    for key in ('decode_head', 'auxiliary_head'):
        head = edits.get(f'model.{key}')
        if isinstance(head, (list, tuple)):
            yield from (f'model.{key}.{i}' for i in range(len(head)))
        elif isinstance(head, dict) and head:
            yield f'model.{key}'


def _at(channels: list[int], indices: Any, path: str) -> list[int]:
    missing = [i for i in indices if not -len(channels) <= i < len(channels)]
    if missing:
        raise UserError(f'{path} names map {missing[0]}, but model.backbone returns '
                        f'{len(channels)} maps (0 to {len(channels) - 1}): set in_index or '
                        'out_indices')
    return [channels[i] for i in indices]


def _follow(edits: Edits, path: str, wanted: Any, source: str) -> None:
    """Let a value of the recipe follow; a value of the user must agree."""
    value = edits.get(path)
    if value is None or same(value, wanted):
        return
    if edits.is_set(path):
        raise UserError(f'{path}={value}, but {source} have {wanted} channels: remove '
                        f'{path.rpartition(".")[2]}, it follows')
    edits.put(path, wanted)
    edits.note(f'{path}={wanted} follows model.backbone')
