"""The backbone, and the parts of a model that follow it."""
from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from mmengine.config import Config

from ..archs import Arch
from ..datasets import dataset_metainfo, datasets_of_split
from ..datasets.completion import find_transforms
from ..errors import UserError
from ..options import check_arch
from .data import default_argument
from .edits import Edits, is_path_variable, lookup, nodes, pair, same
from .signatures import find_class


class Maps(NamedTuple):
    """The feature maps that a ConvNeXt returns, finest first.

    Args:
        stages: Stage of each map, from 0.
        channels: Channels of each map.
        strides: Pixels of the image per pixel of the map.
    """

    stages: list[int]
    channels: list[int]
    strides: list[int]


def backbone_maps(backbone: dict[str, Any] | None) -> Maps | None:
    """The maps of a backbone's config; None: it is no ConvNeXt."""
    if not backbone or backbone.get('type') != 'ConvNeXt':
        return None
    dims = backbone_size(backbone).dims
    indices = backbone.get('out_indices')
    stages = sorted({i % len(dims) for i in (range(len(dims)) if indices is None else indices)
                     if -len(dims) <= i < len(dims)})
    coarsest = backbone.get('output_stride') or 4 * 2 ** (len(dims) - 1)
    return Maps(stages, [dims[i] for i in stages], [min(4 * 2 ** i, coarsest) for i in stages])


def backbone_size(backbone: dict[str, Any]) -> Arch:
    """Depths, dims and GRN of a ConvNeXt's config."""
    return check_arch(backbone.get('arch', 'tiny'), backbone.get('depths'), backbone.get('dims'),
                      backbone.get('use_grn'))


def arch_and_layer_scale(edits: Edits) -> None:
    """A V2 size that replaces a V1 size takes away the recipe's layer scale."""
    path = 'model.backbone.layer_scale_init_value'
    backbone = edits.get('model.backbone') or {}
    if backbone.get('type') != 'ConvNeXt' or edits.was_set(path) or not edits.recipe:
        return
    if backbone_size(backbone).use_grn and (backbone.get('layer_scale_init_value') or 0) > 0:
        edits.put(path, 0.0)
        edits.note('=0.0: ConvNeXt V2 has no layer scale', path)


def head_type_and_in_channels(edits: Edits) -> None:
    """A head of one map that replaces a head of several reads the last of them."""
    for path in _heads(edits.cfg):
        head, before = edits.get(path), edits.inherited(path) or {}
        if head.get('type') == before.get('type') or head.get('input_transform') or edits.states(
                f'{path}.in_channels') or edits.states(f'{path}.in_index'):
            continue
        kind = find_class('mmseg', 'MODELS', head.get('type'))
        if kind is None or not isinstance(head.get('in_channels'), (list, tuple)) or (
                reads_several_maps(kind)):
            continue
        index = head.get('in_index') or range(len(head['in_channels']))
        head.update(in_channels=head['in_channels'][-1], in_index=list(index)[-1])
        edits.note(f' reads map {head["in_index"]}: {head["type"]} takes one', path)


def reads_several_maps(kind: type) -> bool:
    """Whether a segmentation head asks for several maps when it is built (``input_transform``).

    Heads of other bases than mmseg's, such as Mask2Former's, read all.
    """
    if not any(base.__name__ == 'BaseDecodeHead' for base in kind.__mro__):
        return True
    sources = [inspect.getsource(vars(base)['__init__']) for base in kind.__mro__
               if inspect.isfunction(vars(base).get('__init__'))
               and base.__name__ != 'BaseDecodeHead']
    return any(re.search(r'input_transform\s*=\s*["\']', source) for source in sources)


def out_indices_and_in_index(edits: Edits) -> None:
    """Heads of the recipe read the maps that are left: all of them, or that of the same stage."""
    maps = backbone_maps(edits.get('model.backbone'))
    if maps is None or edits.get('model.neck') or not edits.was_set('model.backbone.out_indices'):
        return
    before = backbone_maps(edits.inherited('model.backbone'))
    for path in _heads(edits.cfg):
        index = edits.get(f'{path}.in_index')
        if edits.was_set(f'{path}.in_index') or edits.was_set(f'{path}.in_channels'):
            continue
        if isinstance(index, (list, tuple)) and any(i >= len(maps.stages) for i in index):
            edits.put(f'{path}.in_index', list(range(len(maps.stages))))
            edits.put(f'{path}.in_channels', maps.channels)
        elif isinstance(index, int) and before and 0 <= index < len(before.stages) and (
                maps.stages != before.stages):
            stage = before.stages[index]
            edits.put(f'{path}.in_index', maps.stages.index(stage) if stage in maps.stages
                      else len(maps.stages) - 1)


def backbone_maps_and_neck(edits: Edits) -> None:
    """The backbone returns the maps that the neck uses; see :func:`backbone_maps_and_heads`."""
    maps, path = backbone_maps(edits.get('model.backbone')), _first_neck(edits)
    neck = edits.get(path)
    if maps is None or not isinstance(neck, dict):
        return
    used = _used_by_neck(neck, len(maps.stages))
    if not used or len(used) == len(maps.stages):
        return
    stages = [maps.stages[i] for i in used]
    edits.put('model.backbone.out_indices', stages)
    if isinstance(neck.get('in_channels'), (list, tuple)):
        edits.put(f'{path}.in_channels', [maps.channels[i] for i in used])
    for key, value in (('start_level', 0), ('end_level', -1)):
        if key in neck:
            edits.put(f'{path}.{key}', value)
    edits.note(f'model.backbone.out_indices={stages}: {path} uses no others')


def _used_by_neck(neck: dict[str, Any], count: int) -> range:
    """Which of the backbone's maps a neck uses: those of an FPN's levels, or the last, or all."""
    if isinstance(neck.get('in_channels'), int):
        return range(count - 1, count)
    if not _is_fpn(neck):
        return range(count)
    return range(neck.get('start_level', 0), neck.get('end_level', -1) % count + 1)


def _is_fpn(neck: dict[str, Any]) -> bool:
    return str(neck.get('type')).rpartition('.')[2] in ('FPN', 'PAFPN')


def _first_neck(edits: Edits) -> str:
    """Path of the neck that reads the backbone's maps."""
    return 'model.neck.0' if isinstance(edits.get('model.neck'), (list, tuple)) else 'model.neck'


def backbone_strides_and_anchors(edits: Edits) -> None:
    """Anchors, points and RoI extractors have the strides of the neck's maps (FPN).

    Raises:
        UserError: The user has set others.
    """
    maps, neck = backbone_maps(edits.get('model.backbone')), edits.get('model.neck')
    if maps is None or not isinstance(neck, dict) or not _is_fpn(neck) or not isinstance(
            neck.get('num_outs'), int):
        return
    strides = list(maps.strides)
    while strides and len(strides) < neck['num_outs']:
        strides.append(2 * strides[-1])
    for path, node in nodes(edits.get('model'), 'model'):
        levels = node.get('featmap_strides')
        if path.endswith('roi_extractor') and isinstance(levels, (list, tuple)):
            edits.follow(f'{path}.featmap_strides', strides[:len(levels)], 'model.neck',
                         'strides')
        elif path.endswith(('anchor_generator', 'prior_generator')) and isinstance(
                node.get('strides'), (list, tuple)):
            edits.follow(f'{path}.strides', strides, 'model.neck', 'strides')
        elif path.endswith(('bbox_head', 'rpn_head')):  # of points, such as FCOS's
            kind = find_class('mmdet', 'MODELS', node.get('type'))
            key = next((key for key in ('point_strides', 'strides')
                        if isinstance(default_argument(kind, key), (list, tuple))), '')
            if key and not same(node.get(key, default_argument(kind, key)), strides):
                edits.follow(f'{path}.{key}', strides, 'model.neck', 'strides')


def backbone_and_in_channels(edits: Edits) -> None:
    """Neck and heads have the channels of the backbone's maps.

    What the recipe has set follows the backbone; what the user has set must agree with it.

    Raises:
        UserError: The user's channels differ from the backbone's, or a head reads a map that is not
            there.
    """
    maps = backbone_maps(edits.get('model.backbone'))
    if maps is None:
        return
    neck = edits.get('model.neck')
    if neck:
        path = _first_neck(edits)
        own = edits.get(f'{path}.in_channels')
        if own is not None:
            edits.follow(f'{path}.in_channels', maps.channels[-1] if isinstance(own, int)
                         else maps.channels, 'model.backbone', 'channels')
        return
    for path in _heads(edits.cfg):
        head = edits.get(path)
        if head.get(FINEST):
            edits.follow(f'{path}.{FINEST}', maps.channels[0], 'model.backbone',
                         'channels in map 0')
        index, own = head.get('in_index', -1), head.get('in_channels')
        if isinstance(own, (list, tuple)):
            indices = index if isinstance(index, (list, tuple)) else range(len(own))
            wanted: Any = _at(maps.channels, indices, f'{path}.in_index')
        elif isinstance(own, int) and isinstance(index, int):
            wanted = _at(maps.channels, [index], f'{path}.in_index')[0]
        else:
            continue
        edits.follow(f'{path}.in_channels', wanted, 'model.backbone',
                     f'channels in map {index}')


FINEST = 'c1_in_channels'
"""Channels of the first map, which DeepLabV3+'s head reads beside that of ``in_index``."""


READ_THE_NECK = r'(rpn_head|bbox_head|mask_head|decode_head|auxiliary_head)(\.\d+)?$'


def neck_and_in_channels(edits: Edits) -> None:
    """Heads and RoI extractors have the channels of the neck's maps.

    Raises:
        UserError: The user has set others.
    """
    neck = edits.get('model.neck')
    last = neck[-1] if isinstance(neck, (list, tuple)) and neck else neck
    channels = last.get('out_channels') if isinstance(last, dict) else None
    if not isinstance(channels, int):
        return
    for path, node in nodes(edits.get('model'), 'model'):
        key = 'out_channels' if path.endswith('_roi_extractor') else 'in_channels'
        if key not in node or not (path.endswith('_roi_extractor')
                                   or re.search(READ_THE_NECK, path)):
            continue
        several = isinstance(node[key], (list, tuple))
        edits.follow(f'{path}.{key}', [channels] * len(node[key]) if several else channels,
                     'model.neck', 'channels')


def backbone_maps_and_heads(edits: Edits) -> None:
    """Every map that the backbone computes is used.

    Unused ones are parameters without gradients, at which DistributedDataParallel stops. The
    backbone returns only those that are used, if the user has not chosen them.

    Raises:
        UserError: The user's ``out_indices`` name a map that no head uses.
    """
    backbone = edits.get('model.backbone') or {}
    maps = backbone_maps(backbone)
    if maps is None or edits.get('model.neck') or edits.get('default_scope') != 'mmseg':
        return
    count = len(maps.stages)
    used: set[int] = set()
    for path in _heads(edits.cfg):
        index, own = edits.get(f'{path}.in_index', -1), edits.get(f'{path}.in_channels')
        if isinstance(index, (list, tuple)):
            used |= {i % count for i in index}
        elif isinstance(own, (list, tuple)):
            used |= set(range(len(own)))
        else:
            used.add(index % count)
        if edits.get(f'{path}.{FINEST}'):
            used.add(0)
    unused = sorted(set(range(count)) - used)
    if not used or not unused:
        return
    if edits.is_set('model.backbone.out_indices'):
        raise UserError(
            f'model.backbone.out_indices={list(backbone["out_indices"])}, but no head uses map '
            f'{", ".join(map(str, unused))} of them (in_index), whose parameters would get no '
            'gradients: remove them from out_indices')
    given = list(backbone.get('out_indices') or range(count))
    kept = sorted(used)
    edits.put('model.backbone.out_indices', [given[i] for i in kept])
    for path in _heads(edits.cfg):
        index = edits.get(f'{path}.in_index', -1)
        if isinstance(index, (list, tuple)):
            edits.put(f'{path}.in_index', [kept.index(i % count) for i in index])
        elif not isinstance(edits.get(f'{path}.in_channels'), (list, tuple)):
            edits.put(f'{path}.in_index', kept.index(index % count))
    edits.note(f'model.backbone.out_indices={[given[i] for i in kept]}: no head uses the others')


def heads_and_neck_layout(edits: Edits) -> None:
    """The neck's maps are in channels_last only where all parts after it are known to take them.

    mmcv's compiled operators read them as contiguous, so that results would be silently wrong.
    """
    if not edits.get('model.neck.channels_last'):
        return
    kinds = {str(node.get('type')) for _, node in nodes(edits.get('model'), 'model')
             if 'featmap_strides' in node} | {str(edits.get('model.rpn_head.type'))}
    if not kinds <= {'convnext_mm.SingleRoIExtractor', 'convnext_mm.RPNHead'}:
        edits.put('model.neck.channels_last', False)


def in_chans_and_data_preprocessor(edits: Edits) -> None:
    """Mean and std have a value for each band of the images, or one for all.

    Raises:
        UserError: They have another number of values, or bands would be swapped.
    """
    bands = edits.get('model.backbone.in_chans', 3)
    path = 'model.data_preprocessor'
    preprocessor = edits.get(path)
    if not preprocessor or edits.get('model.backbone.type') != 'ConvNeXt':
        return
    for key in ('mean', 'std'):
        values = preprocessor.get(key)
        if not isinstance(values, (list, tuple)) or len(values) in (1, bands):
            continue
        if bands == 1 and not edits.is_set(f'{path}.{key}'):
            preprocessor[key] = [round(sum(values) / len(values), 3)]
            edits.note(f'={preprocessor[key]}: the mean of the recipe\'s, for one band',
                       f'{path}.{key}')
            continue
        raise UserError(
            f'{path}.{key} has {len(values)} values, but model.backbone.in_chans={bands}: give '
            f'{key} {bands} values, in the units of the images, or one for all bands')
    if bands == 3:
        return
    for key in ('bgr_to_rgb', 'rgb_to_bgr'):
        if preprocessor.get(key) and edits.is_set(f'{path}.{key}'):
            raise UserError(f'{path}.{key}=True swaps the bands of RGB images, but '
                            f'model.backbone.in_chans={bands}: set it to False')
        if preprocessor.get(key):
            edits.put(f'{path}.{key}', False)
            edits.note(f'{path}.{key}=False: images have {bands} bands')
    sizes = {len(preprocessor[key]) for key in ('mean', 'std') if preprocessor.get(key)}
    if sizes - {1} and preprocessor.get('type') != 'MultiBandPreprocessor':
        preprocessor.update(base=preprocessor['type'], type='MultiBandPreprocessor')


def num_classes_and_out_channels(edits: Edits) -> None:
    """A head with one output channel is binary: its loss is a sigmoid's.

    Raises:
        UserError: One channel with a softmax, which has nothing to learn.
    """
    for path in _heads(edits.cfg):
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


def classes_and_num_things_classes(edits: Edits) -> None:
    """Heads for panoptic and instance masks count the classes of the data.

    Without ``thing_classes`` in the data's metainfo, all classes are things.

    Raises:
        UserError: The user has set other counts.
    """
    if edits.get('default_scope') != 'mmdet':
        return
    dataset = next(iter(datasets_of_split(edits.cfg, 'train')), None)
    meta = dataset_metainfo(dataset, 'mmdet') if dataset else {}
    if not meta.get('classes'):
        return
    things = meta.get('thing_classes')
    counts = dict(
        num_things_classes=len(meta['classes'] if things is None else things),
        num_stuff_classes=0 if things is None else len(meta.get('stuff_classes') or ()))
    for path, node in nodes(edits.get('model'), 'model'):
        if 'num_things_classes' not in node or (
                things is None and 'Mask' not in str(node.get('type'))):
            continue
        for key, count in counts.items():
            if key in node:
                edits.follow(f'{path}.{key}', count, 'the training data', 'of them')


def num_classes_and_losses(edits: Edits) -> None:
    """Losses count the classes of their head, and have a weight for each of them.

    A softmax over boxes or masks has one class more: background, or no object.

    Raises:
        UserError: The user's ``class_weight`` or ``num_classes`` of a loss does not fit.
    """
    for path, head in nodes(edits.get('model'), 'model'):
        count = head.get('num_classes')
        if count is None and 'num_things_classes' in head:
            count = head['num_things_classes'] + head.get('num_stuff_classes', 0)
        if not isinstance(count, int):
            continue
        for key, losses in head.items():
            if not key.startswith('loss'):
                continue
            for own, loss in nodes(losses, f'{path}.{key}'):
                if 'num_classes' in loss:
                    edits.follow(f'{own}.num_classes', count, path, 'classes')
                weights = loss.get('class_weight')
                extra = int(key == 'loss_cls' and not loss.get('use_sigmoid'))
                if not isinstance(weights, (list, tuple)) or len(weights) == count + extra:
                    continue
                if not edits.was_set(f'{own}.class_weight') and len(set(weights[:-1])) == 1:
                    loss['class_weight'] = [weights[0]] * (count + extra - 1) + [weights[-1]]
                    edits.note(f' has {count + extra} weights, as there are classes',
                               f'{own}.class_weight')
                    continue
                raise UserError(
                    f'{own}.class_weight has {len(weights)} weights, but there are {count} classes'
                    + (', and one of background or no object' if extra else '')
                    + ': give one weight per class')


OF_BOXES = {f'{name}Loss' for name in ('IoU', 'BoundedIoU', 'GIoU', 'DIoU', 'CIoU', 'EIoU', 'SIoU')}
OF_DELTAS = {'L1Loss', 'SmoothL1Loss', 'BalancedL1Loss'}


def loss_bbox_and_reg_decoded_bbox(edits: Edits) -> None:
    """Losses of the IoU compare boxes, which a head must decode; L1 losses compare their deltas.

    Raises:
        UserError: The user has set ``reg_decoded_bbox`` otherwise.
    """
    for path, head in nodes(edits.get('model'), 'model'):
        loss = str(edits.get(f'{path}.loss_bbox.type')).rpartition('.')[2]
        kind = find_class('mmdet', 'MODELS', head.get('type'))
        if loss not in OF_BOXES | OF_DELTAS or kind is None or not _regresses_deltas(kind):
            continue
        key, wanted = 'reg_decoded_bbox', loss in OF_BOXES
        if head.get(key, default_argument(kind, key)) == wanted:
            continue
        if edits.states(f'{path}.{key}'):
            raise UserError(f'{path}.{key}={head[key]}, but {path}.loss_bbox ({loss}) compares '
                            f'{"boxes" if wanted else "the deltas of boxes"}: remove {key}, it '
                            'follows')
        edits.put(f'{path}.{key}', wanted)
        edits.note(f'={wanted} follows loss_bbox ({loss})', f'{path}.{key}')


def _regresses_deltas(kind: Any) -> bool:
    """Whether a head has the loss of mmdet's BBoxHead or AnchorHead; others decode by themselves.
    """
    from mmdet.models.dense_heads import AnchorHead, RPNHead
    from mmdet.models.roi_heads.bbox_heads import BBoxHead

    if issubclass(kind, BBoxHead):
        return (kind.loss, kind.loss_and_target) == (BBoxHead.loss, BBoxHead.loss_and_target)
    return issubclass(kind, AnchorHead) and kind.loss_by_feat_single is (
        AnchorHead.loss_by_feat_single) and kind.loss_by_feat in (
        AnchorHead.loss_by_feat, RPNHead.loss_by_feat)


def masks_and_mask_head(edits: Edits) -> None:
    """``masks=False`` makes a detector of boxes of a recipe with masks.

    Raises:
        UserError: It is neither True nor False, or the model has masks that are no part of its
            RoI head.
    """
    masks = edits.get('masks')
    if masks is None or is_path_variable(edits, 'masks'):
        return
    if not isinstance(masks, bool) or edits.get('default_scope') != 'mmdet':
        raise UserError(f'masks={masks!r} must be False (a detector of boxes alone) or True'
                        if not isinstance(masks, bool) else
                        f'masks={masks} is a setting of detectors, but this config is of '
                        f'{edits.get("default_scope")}: remove it')
    roi_head = edits.get('model.roi_head')
    if masks:
        return
    if not isinstance(roi_head, dict):
        if makes_masks(edits.get('model')):
            raise UserError(f'masks=False, but {edits.get("model.type")} is made for masks: start '
                            'from a recipe of Mask R-CNN, Cascade R-CNN or Faster R-CNN')
        return
    if roi_head.get('mask_head'):
        edits.note('no mask head, masks or metric of masks: masks=False')
    for key in ('mask_head', 'mask_roi_extractor'):
        if key in roi_head:
            roi_head[key] = None
    if edits.get('model.data_preprocessor.pad_mask'):
        edits.put('model.data_preprocessor.pad_mask', False)
    for path in (*edits.pipelines('train', 'val', 'test'), 'tta_pipeline'):
        for loader in find_transforms(edits.get(path), 'LoadAnnotations'):
            if loader.get('with_mask'):
                loader['with_mask'] = False


def mask_head_and_metric(edits: Edits) -> None:
    """Without a mask head, masks are neither loaded nor evaluated.

    Raises:
        UserError: The user's metric or pipeline asks for masks.
    """
    if edits.get('default_scope') != 'mmdet' or makes_masks(edits.get('model')):
        return
    for path in _metrics(edits):
        metric = edits.get(f'{path}.metric')
        kinds = [metric] if isinstance(metric, str) else list(metric or ())
        if 'segm' not in kinds:
            continue
        if edits.was_set(f'{path}.metric') and edits.get('masks') is not False:
            raise UserError(f'{path}.metric={metric!r}, but the model has no mask head: set '
                            f"{path}.metric='bbox'")
        edits.put(f'{path}.metric', [kind for kind in kinds if kind != 'segm'])
        edits.note(f'={edits.get(f"{path}.metric")}: the model has no mask head', f'{path}.metric')
    for split in ('train', 'val', 'test'):
        path = f'{split}_dataloader.dataset.pipeline'
        for dataset in datasets_of_split(edits.cfg, split):
            for loader in find_transforms(dataset.get('pipeline'), 'LoadAnnotations'):
                if loader.get('with_mask') and not edits.was_set(path):
                    loader['with_mask'] = False
                    edits.note(' loads no masks: the model has no mask head', path)


def makes_masks(model: Any) -> bool:
    """Whether a detector predicts masks, by the names of its parts."""
    if isinstance(model, dict) and isinstance(model.get('roi_head'), dict):
        return bool(model['roi_head'].get('mask_head')) or 'panoptic_fusion_head' in model
    return any(value and (
        'mask_head' in path or 'segm_head' in path or 'panoptic' in path
        or any(word in str(value.get('type')) for word in ('Mask', 'Ins', 'SOLO')))
        for path, value in nodes(model, 'model')
        if 'train_cfg' not in path and 'test_cfg' not in path and 'mask_roi_extractor' not in path)


def batch_size_and_norm(edits: Edits) -> None:
    """Batch norm has more than one value per channel.

    Heads that pool the whole image to one pixel, as UPerNet's and PSPNet's do, have one value per
    image there.

    Raises:
        UserError: The batch of a training step is one image.
    """
    if edits.get('default_scope') != 'mmseg' or edits.get('train_dataloader.batch_size') != 1:
        return
    for reason, norm in norms_of_one_value(edits.cfg):
        raise UserError(
            f'train_dataloader.batch_size=1, but {reason}: set batch_size=2 or more, or '
            "norm_cfg=dict(type='GN', num_groups=32)" + (
                ', or train with several GPUs' if 'Sync' in norm else ''))


def processes() -> int:
    """How many processes train, as their launcher says."""
    return max(int(os.environ.get(name, 1)) for name in (
        'WORLD_SIZE', 'SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'))


def norms_of_one_value(cfg: Config) -> Iterator[tuple[str, str]]:
    """Heads whose batch norm cannot train on one image: what they do, and the norm."""
    for path in _heads(cfg):
        head = lookup(cfg, path)
        norm = (head.get('norm_cfg') or {}).get('type', '')
        pools = 1 in (head.get('pool_scales') or (1,)) and (
            'pool_scales' in head or any(name in head['type'] for name in ('PSP', 'UPer', 'ASPP')))
        if pools and norm in ('BN', 'BN2d', 'SyncBN', 'MMSyncBN') and not (
                'Sync' in norm and processes() > 1 and torch.cuda.is_available()):
            yield (f'{path} ({head["type"]}) pools an image to one pixel, of which {norm} has '
                   'nothing to normalize', norm)


def test_cfg_and_mode(edits: Edits) -> None:
    """A segmentor is tested on whole images, or in windows of a size that cover them.

    Raises:
        UserError: Another mode, or windows without size and stride, or with a gap between them.
    """
    test_cfg = edits.get('model.test_cfg')
    if edits.get('default_scope') != 'mmseg' or not isinstance(test_cfg, dict):
        return
    mode = test_cfg.get('mode', 'whole')
    if mode not in ('whole', 'slide') and not edits.as_shipped('model.test_cfg.mode'):
        raise UserError(f"model.test_cfg.mode={mode!r} must be 'whole' or 'slide'")
    missing = [key for key in ('crop_size', 'stride') if not test_cfg.get(key)]
    if mode == 'slide' and missing:
        raise UserError(f"model.test_cfg.mode='slide' needs {' and '.join(missing)} of its "
                        'windows, such as crop_size=(512, 512), stride=(341, 341)')
    size, stride = (pair(f'model.test_cfg.{key}', test_cfg[key])
                    for key in ('crop_size', 'stride')) if mode == 'slide' else ((1, 1), (1, 1))
    if any(step > side for step, side in zip(stride, size, strict=True)):
        raise UserError(f'model.test_cfg.stride={stride}, but windows have crop_size={size}: no '
                        'window covers the pixels between them. Set a stride of at most crop_size')


def _heads(cfg: Config) -> Iterator[str]:
    """Paths of the segmentation heads that read the backbone's maps.

    In a head of K-Net, the one that makes its first kernels does (Zhang et al., arXiv:2106.14855).
    """
    for key in ('decode_head', 'auxiliary_head'):
        heads = lookup(cfg, f'model.{key}')
        listed = isinstance(heads, (list, tuple))
        for i, head in enumerate(heads if listed else [heads]):
            if isinstance(head, dict) and head:
                inner = '.kernel_generate_head' * ('kernel_generate_head' in head)
                yield f'model.{key}' + f'.{i}' * listed + inner


def _metrics(edits: Edits) -> Iterator[str]:
    """Paths of the metrics of both evaluators, which may be lists."""
    for path in ('val_evaluator', 'test_evaluator'):
        evaluator = edits.get(path)
        if isinstance(evaluator, (list, tuple)):
            yield from (f'{path}.{i}' for i in range(len(evaluator)))
        else:
            yield path


def _at(channels: list[int], indices: Any, path: str) -> list[int]:
    missing = [i for i in indices if not -len(channels) <= i < len(channels)]
    if missing:
        raise UserError(f'{path} names map {missing[0]}, but model.backbone returns '
                        f'{len(channels)} maps (0 to {len(channels) - 1}): set in_index or '
                        'out_indices')
    return [channels[i] for i in indices]
