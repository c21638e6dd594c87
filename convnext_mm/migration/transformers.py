"""Transformers whose arguments have moved: DETR and Deformable DETR, and BEiT and MAE of timm."""
from __future__ import annotations

from copy import deepcopy
from importlib import import_module
from typing import Any, NoReturn

from ..errors import UserError
from .parsing import REGISTER_HINT

Rows = list[tuple[str, str, str]]
"""Rows for the report: old key, what became of it, and a warning or ''."""

ATTENTION, DEFORMABLE = 'MultiheadAttention', 'MultiScaleDeformableAttention'
DETR_TYPES: dict[str, dict[str, Any]] = dict(
    DETR=dict(transformer='Transformer', decoder='DetrTransformerDecoder',
              encoder_attention=[ATTENTION], decoder_attention=[ATTENTION, ATTENTION]),
    DeformableDETR=dict(
        transformer='DeformableDetrTransformer', decoder='DeformableDetrTransformerDecoder',
        encoder_attention=[DEFORMABLE], decoder_attention=[ATTENTION, DEFORMABLE]))
"""The parts of mmdet 2.x's detectors that mmdet 3.x builds without naming them."""

LAYER_TYPES = dict(encoder='BaseTransformerLayer', decoder='DetrTransformerDecoderLayer')
ORDERS = dict(encoder=['self_attn', 'norm', 'ffn', 'norm'],
              decoder=['self_attn', 'norm', 'cross_attn', 'norm', 'ffn', 'norm'])
FFN_NAMES = dict(feedforward_channels='feedforward_channels', ffn_dropout='ffn_drop',
                 ffn_num_fcs='num_fcs', act_cfg='act_cfg')
COSTS = dict(cls_cost=dict(type='ClassificationCost', weight=1.0),
             reg_cost=dict(type='BBoxL1Cost', weight=1.0),
             iou_cost=dict(type='IoUCost', iou_mode='giou', weight=1.0))
"""The costs of mmdet 2.x's HungarianAssigner, with its defaults."""

DETR_HINT = ("mmdet 3.x builds another transformer. Set it as in mmdet 2.x's own configs, or begin "
             "with _base_ = 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py' or "
             "'mmdet::detr/detr_r50_8xb2-150e_coco.py', in mmengine's style")

MASK_HINT = ('mmdet 3.x builds it from other arguments. Copy panoptic_head from '
             "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py or "
             'mmdet::maskformer/maskformer_r50_ms-16xb1-75e_coco.py')

TIMM_NAMES = dict(embed_dim='embed_dims', depth='num_layers', in_chans='in_channels',
                  qkv_bias='qv_bias')
TIMM_DEFAULTS: dict[str, Any] = dict(
    embed_dim=768, depth=12, qkv_bias=False, init_values=None, use_abs_pos_emb=True,
    use_rel_pos_bias=False, out_indices=[3, 5, 7, 11])
"""Defaults of the authors' backbones that differ from mmseg's, or decide on the conversion."""

TIMM_VALUES: dict[str, dict[str, Any]] = {
    kind: dict(use_abs_pos_emb=kind == 'MAE', use_rel_pos_bias=True, use_shared_rel_pos_bias=False,
               qk_scale=None, drop_rate=0.0, hybrid_backbone=None, norm_layer=None)
    for kind in ('BEiT', 'MAE')}
"""Arguments that mmseg's backbones do not have, and the values that compute the same there."""

VIT_VALUES: dict[str, Any] = dict(
    qkv_bias=True, init_values=0, frozen_stages=-1, out_with_norm=False, use_mean_pooling=False,
    masked_im_modeling=False, return_all_tokens=False, qk_scale=None, norm_layer=None)
"""The same for mmseg's VisionTransformer and that of iBOT, which has timm's names too."""


def convert_detr(model: dict[str, Any], path: str) -> Rows:
    """Move the arguments of mmdet 2.x's DETR or Deformable DETR to where mmdet 3.x has them.

    Args:
        model: The old model, changed in place; any other stays as it is.
        path: Where it stands, for messages.

    Raises:
        UserError: A part that mmdet 3.x does not build.
    """
    head, kind = model.get('bbox_head'), model.get('type')
    if 'transformerlayers' in str(model.get('panoptic_head')):
        _refuse(f'{path}.panoptic_head.transformer_decoder with transformerlayers', MASK_HINT)
    if kind not in DETR_TYPES or not isinstance(head, dict) or 'transformer' not in head:
        return []
    path, types, deformable = f'{path}.bbox_head', DETR_TYPES[kind], kind == 'DeformableDETR'
    transformer = head.pop('transformer')
    _check_type(transformer, types['transformer'], f'{path}.transformer')
    position = head.pop('positional_encoding', dict(num_feats=128, normalize=True))
    _check_type(position, 'SinePositionalEncoding', f'{path}.positional_encoding')
    for part, part_type in (('encoder', 'DetrTransformerEncoder'), ('decoder', types['decoder'])):
        where, stack = f'{path}.transformer.{part}', transformer.pop(part)
        _check_type(stack, part_type, where)
        layer = stack.pop('transformerlayers')
        model[part] = dict(stack, layer_cfg=_detr_layer(
            layer, part, types[f'{part}_attention'], f'{where}.transformerlayers'))
    model['encoder'].pop('post_norm_cfg', None)  # was for another order of layers
    model['decoder'].setdefault('return_intermediate', False)
    if deformable:
        model['decoder']['post_norm_cfg'] = None
        model.update(num_feature_levels=transformer.pop('num_feature_levels', 4),
                     with_box_refine=head.pop('with_box_refine', False),
                     as_two_stage=head.pop('as_two_stage', False))
    proposals = transformer.pop('two_stage_num_proposals', 300)
    queries = head.pop('num_query', 100)
    model.update(num_queries=proposals if model.get('as_two_stage') else queries,
                 positional_encoding=position)
    channels = head.pop('in_channels', None)
    width = head['embed_dims'] = model['encoder']['layer_cfg']['self_attn_cfg']['embed_dims']
    if not deformable:
        if model.get('neck'):
            _refuse(f'{path.rpartition(".")[0]}.neck of a DETR', DETR_HINT)
        model['neck'] = dict(type='ChannelMapper', in_channels=[channels], kernel_size=1,
                             out_channels=width, act_cfg=None, norm_cfg=None, num_outs=1)
    for key in transformer.keys() - {'as_two_stage', 'init_cfg'}:
        _refuse(f'{path}.transformer.{key}', DETR_HINT)
    return [('model.bbox_head.transformer', 'model.encoder, model.decoder', ''),
            ('model.bbox_head.num_query', f'model.num_queries={model["num_queries"]}', '')]


def _detr_layer(layer: dict[str, Any], part: str, attentions: list[str],
                path: str) -> dict[str, Any]:
    """A layer of an encoder or decoder, from the arguments of mmcv 1.x's BaseTransformerLayer."""
    _check_type(layer, LAYER_TYPES[part], path)
    order = list(layer.pop('operation_order', ORDERS[part]))
    if order != ORDERS[part]:
        _refuse(f'{path}.operation_order={tuple(order)}', DETR_HINT)
    given = layer.pop('attn_cfgs')
    listed = given if isinstance(given, list) else [deepcopy(given) for _ in attentions]
    new: dict[str, Any] = {}
    for name, attention, kind in zip(('self_attn_cfg', 'cross_attn_cfg'), listed, attentions,
                                     strict=False):
        _check_type(attention, kind, f'{path}.attn_cfgs')
        new[name] = {'embed_dims': 256, **attention, 'batch_first': True}
    ffn = dict(layer.pop('ffn_cfgs', {}))
    ffn.pop('type', None)
    ffn.update({ours: layer.pop(theirs) for theirs, ours in FFN_NAMES.items() if theirs in layer})
    new['ffn_cfg'] = {'embed_dims': new['self_attn_cfg']['embed_dims'], **ffn}
    if 'norm_cfg' in layer:
        new['norm_cfg'] = layer.pop('norm_cfg')
    for key in layer:
        _refuse(f'{path}.{key}', DETR_HINT)
    return new


def convert_assigners(node: Any) -> Rows:
    """List the costs of each HungarianAssigner as ``match_costs``, in place."""
    rows: Rows = []
    if isinstance(node, dict) and node.get('type') == 'HungarianAssigner' and (
            'match_costs' not in node):
        node['match_costs'] = [node.pop(key, dict(default)) for key, default in COSTS.items()]
        rows.append(('HungarianAssigner: cls_cost, reg_cost, iou_cost', 'match_costs', ''))
    for value in node.values() if isinstance(node, dict) else node if isinstance(
            node, (list, tuple)) else ():
        rows += convert_assigners(value)
    return rows


def convert_timm_backbone(model: dict[str, Any], path: str) -> Rows:
    """Give mmseg's BEiT or MAE the settings of the authors' backbone, which has timm's names.

    Theirs ends with a pyramid (Bao et al., BEiT, arXiv:2106.08254, semantic segmentation), which
    is mmseg's neck Feature2Pyramid.

    Args:
        model: The old model, changed in place; any other stays as it is.
        path: Where it stands, for messages.

    Raises:
        UserError: A setting that mmseg's backbone cannot follow.
    """
    old = model.get('backbone')
    kind = str(old.get('type')) if isinstance(old, dict) else ''
    known = {'embed_dim', 'depth'} if kind == 'VisionTransformer' else (
        TIMM_NAMES.keys() | TIMM_VALUES[kind].keys() if kind in TIMM_VALUES else set())
    if not isinstance(old, dict) or not known & old.keys():
        return []
    found = import_module('mmseg.registry').MODELS.get(kind)
    if found is None or not found.__module__.startswith('mmseg.'):
        return []  # the user's own
    path = f'{path}.backbone'
    if kind == 'VisionTransformer':
        return _convert_vit(model, old, path)
    new = {**TIMM_DEFAULTS, **old}
    for key, value in TIMM_VALUES[kind].items():
        if key in new and new[key] != value:
            _refuse(f'{path}.{key}={new[key]!r}', f'{kind} of mmseg computes with {key}={value!r}. '
                    'Set it if your weights are for it. ' + REGISTER_HINT)
        new.pop(key, None)
    if new['init_values'] is None or (kind == 'MAE' and not new['qkv_bias']):
        key = 'init_values' if new['init_values'] is None else 'qkv_bias'
        _refuse(f'{path}.{key}={new[key]!r}', f'{kind} of mmseg always has them. Set '
                f'{key}={1.0 if key == "init_values" else True}. ' + REGISTER_HINT)
    if model.get('neck') or new.get('patch_size', 16) not in (8, 16):
        key = 'model.neck' if model.get('neck') else f'patch_size={new["patch_size"]}'
        _refuse(f'{path} with {key}', f'{kind} of that code has a pyramid of its own, for patches '
                'of 8 or 16 pixels. Remove or change it. ' + REGISTER_HINT)
    new = {TIMM_NAMES.get(key, key): value for key, value in new.items()
           if key not in ('num_classes', 'use_checkpoint', 'fpn1_norm')}
    if kind == 'MAE':
        del new['qv_bias']  # q, k and v always have one
    for key in ('mlp_ratio', 'img_size'):
        if isinstance(new.get(key), float) and new[key].is_integer():
            new[key] = int(new[key])
        elif isinstance(new.get(key), list):
            new[key] = tuple(new[key])
    model['backbone'] = dict(new, norm_cfg=dict(type='LN', eps=1e-6), _delete_=True)
    norm = 'SyncBN' if old.get('fpn1_norm', 'SyncBN') == 'SyncBN' else 'BN'
    model['neck'] = _pyramid(new, dict(type=norm, requires_grad=True))
    rows: Rows = [
        (f'model.backbone.{key}', f'model.backbone.{TIMM_NAMES[key]}', '')
        for key in TIMM_NAMES if key in old and TIMM_NAMES[key] in new]
    return [*rows, ('model.backbone (its pyramid)', 'model.neck, Feature2Pyramid',
                    "weights with timm's names load after mmseg's "
                    'tools/model_converters/beit2mmseg.py has renamed them')]


def _convert_vit(model: dict[str, Any], old: dict[str, Any], path: str) -> Rows:
    """Give mmseg's VisionTransformer the settings of iBOT's (Zhou et al., arXiv:2111.07832).

    Raises:
        UserError: A setting that mmseg's cannot follow.
    """
    new: dict[str, Any] = dict(dict(embed_dim=768, depth=12, img_size=224, patch_size=16,
                                    qkv_bias=False, out_indices=[3, 5, 7, 11]), **old)
    for key, value in VIT_VALUES.items():
        if new.get(key, value) != value:
            _refuse(f'{path}.{key}={new[key]!r}', 'VisionTransformer of mmseg computes with '
                    f'{key}={value!r}. Set it if your weights are for it. ' + REGISTER_HINT)
        new.pop(key, None)
    pyramid = new.pop('with_fpn', True)
    if pyramid and (model.get('neck') or new['patch_size'] not in (8, 16)):
        _refuse(f'{path} with with_fpn=True and patch_size={new["patch_size"]}', 'its pyramid is '
                'for patches of 8 or 16 pixels, without a neck. Set with_fpn=False. '
                + REGISTER_HINT)
    names = dict(TIMM_NAMES, use_checkpoint='with_cp')
    del names['qkv_bias']
    new = {names.get(key, key): value for key, value in new.items() if key != 'num_classes'}
    if isinstance(new['img_size'], list):
        new['img_size'] = new['img_size'][0] if len(new['img_size']) == 1 else tuple(
            new['img_size'])
    if 'mlp_ratio' in new:
        new['mlp_ratio'] = int(new['mlp_ratio'])
    model['backbone'] = dict(new, qkv_bias=True, patch_bias=True, norm_cfg=dict(
        type='LN', eps=1e-6), _delete_=True)
    if pyramid:
        model['neck'] = _pyramid(new, dict(type='SyncBN', requires_grad=True))
    return [*((f'model.backbone.{key}', f'model.backbone.{name}', '')
              for key, name in names.items() if key in old),
            ('model.backbone (its pyramid)', 'model.neck, Feature2Pyramid' if pyramid else 'none',
             "weights with timm's names load after mmseg's "
             'tools/model_converters/vit2mmseg.py has renamed them')]


def _pyramid(backbone: dict[str, Any], norm_cfg: dict[str, Any]) -> dict[str, Any]:
    """The neck that makes four maps of those of a backbone with patches of 8 or 16 pixels."""
    rescales = [4, 2, 1, 0.5] if backbone.get('patch_size', 16) == 16 else [2, 1, 0.5, 0.25]
    return dict(type='Feature2Pyramid', embed_dim=backbone['embed_dims'], rescales=rescales,
                norm_cfg=norm_cfg, _delete_=True)


def _check_type(node: dict[str, Any], expected: str, path: str) -> None:
    """Remove a type that mmdet 3.x does not name.

    Raises:
        UserError: It is another.
    """
    kind = node.pop('type', expected)
    if kind != expected:
        _refuse(f'{path}.type={kind!r}', DETR_HINT)


def _refuse(what: str, hint: str) -> NoReturn:
    raise UserError(f'{what} is not supported: {hint}')
