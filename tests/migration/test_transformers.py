"""Transformers whose arguments have moved become those of the current toolboxes."""
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from convnext_mm import UserError
from convnext_mm.bases import without_completion
from convnext_mm.engine.building import build_on_meta, build_parts
from convnext_mm.engine.checks import read_config
from convnext_mm.engine.conversion import migrate

SHIPPED = {toolbox: Path(find_spec(toolbox).origin).parent / '.mim'
           for toolbox in ('mmseg', 'mmdet')}
NORMALIZE = "dict(type='Normalize', mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])"
COCO = f'''_base_ = ['../_base_/datasets/coco_detection.py', '../_base_/default_runtime.py']
data = dict(train=dict(pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', img_scale=(1333, 800)), {NORMALIZE}, dict(type='Pad', size_divisor=1)]))
optimizer = dict(type='AdamW', lr=2e-4, paramwise_cfg=dict(custom_keys={{
    'backbone': dict(lr_mult=0.1), 'sampling_offsets': dict(lr_mult=0.1),
    'reference_points': dict(lr_mult=0.1)}}))
runner = dict(type='EpochBasedRunner', max_epochs=50)
lr_config = dict(policy='step', step=[40])
'''


def detr(out_indices: tuple[int, ...], **head) -> dict:
    """A detector in the style of mmdet 2.x, with the sizes of the papers."""
    backbone = dict(
        type='ResNet', depth=50, num_stages=4, out_indices=out_indices, frozen_stages=1,
        norm_cfg=dict(type='BN', requires_grad=False), norm_eval=True, style='pytorch',
        init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50'))
    costs = dict(reg_cost=dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                 iou_cost=dict(type='IoUCost', iou_mode='giou', weight=2.0))
    deformable = 'num_query' in head
    if deformable:
        costs['cls_cost'] = dict(type='FocalLossCost', weight=2.0)
    return dict(
        type='DeformableDETR' if deformable else 'DETR', backbone=backbone, bbox_head=dict(
            num_classes=80, in_channels=2048, loss_bbox=dict(type='L1Loss', loss_weight=5.0),
            loss_iou=dict(type='GIoULoss', loss_weight=2.0), **head),
        train_cfg=dict(assigner=dict(type='HungarianAssigner', **costs)),
        test_cfg=dict(max_per_img=100))


def layers(*attentions: str, cross: bool, width: int, **layer) -> dict:
    attention = [dict(type=kind, embed_dims=256, **(
        dict(num_heads=8, dropout=0.1) if kind == 'MultiheadAttention' else {}))
        for kind in attentions]
    order = ('self_attn', 'norm', *(('cross_attn', 'norm') if cross else ()), 'ffn', 'norm')
    return {'type': 'DetrTransformerDecoderLayer' if cross else 'BaseTransformerLayer',
            'attn_cfgs': attention if len(attention) > 1 else attention[0],
            'feedforward_channels': width, 'ffn_dropout': 0.1, 'operation_order': order, **layer}


def plain_detr() -> dict:
    return detr(
        (3,), type='DETRHead', transformer=dict(
            type='Transformer',
            encoder=dict(type='DetrTransformerEncoder', num_layers=6, transformerlayers=layers(
                'MultiheadAttention', cross=False, width=2048)),
            decoder=dict(type='DetrTransformerDecoder', num_layers=6, return_intermediate=True,
                         transformerlayers=layers('MultiheadAttention', cross=True, width=2048))),
        positional_encoding=dict(type='SinePositionalEncoding', num_feats=128, normalize=True),
        loss_cls=dict(type='CrossEntropyLoss', bg_cls_weight=0.1, use_sigmoid=False,
                      loss_weight=1.0, class_weight=1.0))


def deformable_detr(**head) -> dict:
    model = detr(
        (1, 2, 3), type='DeformableDETRHead', num_query=300, sync_cls_avg_factor=True,
        transformer=dict(
            type='DeformableDetrTransformer',
            encoder=dict(type='DetrTransformerEncoder', num_layers=6, transformerlayers=layers(
                'MultiScaleDeformableAttention', cross=False, width=1024)),
            decoder=dict(type='DeformableDetrTransformerDecoder', num_layers=6,
                         return_intermediate=True, transformerlayers=layers(
                             'MultiheadAttention', 'MultiScaleDeformableAttention', cross=True,
                             width=1024))),
        positional_encoding=dict(type='SinePositionalEncoding', num_feats=128, normalize=True,
                                 offset=-0.5),
        loss_cls=dict(type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0),
        **head)
    model['neck'] = dict(type='ChannelMapper', in_channels=[512, 1024, 2048], kernel_size=1,
                         out_channels=256, act_cfg=None, num_outs=4,
                         norm_cfg=dict(type='GN', num_groups=32))
    return model


def converted(text: str, folder: Path) -> tuple[Config, str]:
    (folder / 'old.py').write_text(text)
    report = migrate(folder / 'old.py', folder / 'new.py')
    with without_completion():
        return Config.fromfile(folder / 'new.py', import_custom_modules=False), report


def shape(model: nn.Module) -> tuple[list[str], dict]:
    """What a module computes, as far as its parts, their settings and sizes tell."""
    text = str(model).replace('FusedConvModule', 'ConvModule')  # ours, with the same result
    lines = [line for line in text.splitlines() if 'init_cfg=' not in line]
    return lines, {key: value.shape for key, value in model.state_dict().items()}


def assert_same_model(cfg: Config, shipped: str) -> None:
    toolbox, _, name = shipped.partition('::')
    with without_completion():
        theirs = Config.fromfile(SHIPPED[toolbox] / 'configs' / name)
    if toolbox == 'mmseg':  # the default, written out: BN stands for it on the CPU
        theirs.model.neck.norm_cfg = dict(type='SyncBN', requires_grad=True)
    assert shape(build_on_meta(cfg)) == shape(build_on_meta(theirs))


@pytest.mark.parametrize(('model', 'shipped'), [
    (plain_detr(), 'detr/detr_r50_8xb2-150e_coco.py'),
    (deformable_detr(as_two_stage=False),
     'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'),
    (deformable_detr(with_box_refine=True),
     'deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco.py'),
    (deformable_detr(with_box_refine=True, as_two_stage=True),
     'deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco.py')],
    ids=['detr', 'deformable', 'refine', 'two-stage'])
def test_detr_becomes_that_of_mmdet_3(model, shipped, tmp_path):
    cfg, report = converted(f'{COCO}model = {model!r}\n', tmp_path)
    with without_completion():
        theirs = Config.fromfile(SHIPPED['mmdet'] / 'configs' / shipped)
    for key in ('num_queries', 'train_cfg', 'test_cfg'):
        assert cfg.model[key] == theirs.model[key], key
    assert cfg.model.bbox_head.loss_cls == theirs.model.bbox_head.loss_cls
    assert cfg.model.data_preprocessor.mean == theirs.model.data_preprocessor.mean
    assert cfg.model.data_preprocessor.pad_size_divisor == 1
    assert 'model.bbox_head.num_query' in report
    assert_same_model(cfg, f'mmdet::{shipped}')  # last: a head changes its config


def test_layer_rates_of_a_deformable_detr(tmp_path):
    cfg, _ = converted(f'{COCO}model = {deformable_detr()!r}\n', tmp_path)
    parts = build_parts(cfg)
    names = {id(param): name for name, param in parts.model.named_parameters()}
    slow = {names[id(param)] for group in parts.optim_wrapper.param_groups
            for param in group['params'] if group['lr'] < 1e-4}
    parts_of = {name.split('.')[-2] for name in slow if not name.startswith('backbone.')}
    assert parts_of == {'sampling_offsets', 'reference_points_fc'}
    assert sum(name.startswith('backbone.') for name in slow) > 40


def change(model: dict, path: str, value) -> dict:
    *parts, last = path.split('.')
    node = model
    for part in parts:
        node = node[part]
    node[last] = value
    return model


LAYERS = 'bbox_head.transformer.decoder.transformerlayers'


@pytest.mark.parametrize(('path', 'value', 'message'), [
    ('bbox_head.transformer.type', 'MyTransformer', "transformer.type='MyTransformer'"),
    ('bbox_head.positional_encoding', dict(type='LearnedPositionalEncoding', num_feats=128),
     "positional_encoding.type='LearnedPositionalEncoding'"),
    (f'{LAYERS}.operation_order', ('norm', 'self_attn'), 'transformerlayers.operation_order'),
    (f'{LAYERS}.attn_cfgs', dict(type='MyAttention'), "attn_cfgs.type='MyAttention'"),
    (f'{LAYERS}.pre', True, 'decoder.transformerlayers.pre'),
    ('bbox_head.transformer.mixed_selection', True, 'transformer.mixed_selection'),
    ('neck', dict(type='FPN'), 'model.neck of a DETR')])
def test_other_transformers_are_refused(path, value, message, tmp_path):
    model = change(plain_detr() if path == 'neck' else deformable_detr(), path, value)
    with pytest.raises(UserError, match=f'{message}.* is not supported: mmdet 3.x .*mmdet::'):
        converted(f'{COCO}model = {model!r}\n', tmp_path)


@pytest.mark.parametrize('name', ['deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
                                  'detr/detr_r50_8xb2-150e_coco.py'])
def test_the_advice_for_other_transformers_works(name, tmp_path):
    """The bases that the refusal names, with a backbone and data of one's own."""
    outputs = '[1, 2, 3]' if 'deformable' in name else '[3]'
    channels = '[192, 384, 768]' if 'deformable' in name else '[768]'
    (tmp_path / 'mine.py').write_text(f"""_base_ = 'mmdet::{name}'
model = dict(backbone=dict(_delete_=True, type='ConvNeXt', out_indices={outputs}),
             neck=dict(in_channels={channels}))
classes = ('one', 'two')
""")
    cfg = read_config(str(tmp_path / 'mine.py'), notes=[])
    assert build_parts(cfg).model.bbox_head.num_classes == 2


SEG = '''_base_ = ['../../_base_/models/{base}', '../../_base_/datasets/ade20k_640x640.py',
          '../../_base_/default_runtime.py', '../../_base_/schedules/schedule_160k.py']
model = dict(
    backbone={backbone},
    decode_head=dict(in_channels=[768] * 4, num_classes=150, channels=768),
    auxiliary_head=dict(in_channels=768, num_classes=150),
    test_cfg=dict(mode='slide', crop_size=(640, 640), stride=(426, 426)))
optimizer = dict(_delete_=True, type='AdamW', lr=7e-4, betas=(0.9, 0.999), weight_decay=0.05,
                 constructor='LayerDecayOptimizerConstructor',
                 paramwise_cfg=dict(num_layers=12, layer_decay_rate=0.65))
runner = dict(type='IterBasedRunnerAmp', max_iters=160000)
'''
XCIT = '''norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder', pretrained=None,
    backbone=dict(type='XCiT', patch_size=16, embed_dim=384, depth=12, num_heads=8, mlp_ratio=4,
                  qkv_bias=True, use_abs_pos_emb=True, use_rel_pos_bias=False),
    decode_head=dict(
        type='UPerHead', in_channels=[384] * 4, in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6),
        channels=512, dropout_ratio=0.1, num_classes=19, norm_cfg=norm_cfg, align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0)),
    auxiliary_head=dict(
        type='FCNHead', in_channels=384, in_index=2, channels=256, num_convs=1,
        concat_input=False, dropout_ratio=0.1, num_classes=19, norm_cfg=norm_cfg,
        align_corners=False, loss_decode=dict(
            type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4)),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
'''


def timm(kind: str, **changes) -> dict:
    """The authors' backbone, with timm's names."""
    return {**dict(
        type=kind, img_size=640, patch_size=16, embed_dim=768, depth=12, num_heads=12,
        mlp_ratio=4.0, qkv_bias=True, use_abs_pos_emb=kind == 'MAE', use_rel_pos_bias=True,
        init_values=0.1 if kind == 'BEiT' else 1.0, drop_path_rate=0.1,
        out_indices=[3, 5, 7, 11]), **changes}


@pytest.fixture(params=['with bases', 'without'])
def clone(request, tmp_path):
    """A folder of the authors' repository, with the base of the model or without."""
    folder = tmp_path / 'configs/beit/upernet'
    folder.mkdir(parents=True)
    if request.param == 'with bases':
        (tmp_path / 'configs/_base_/models').mkdir(parents=True)
        (tmp_path / 'configs/_base_/models/upernet_beit.py').write_text(XCIT)
        (tmp_path / 'configs/_base_/models/upernet_mae.py').write_text(XCIT)
    return folder


@pytest.mark.parametrize(('kind', 'shipped'), [
    ('BEiT', 'beit/beit-base_upernet_8xb2-160k_ade20k-640x640.py'),
    ('MAE', 'mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py')])
def test_backbones_with_timms_names(kind, shipped, clone):
    backbone = timm(kind, img_size=512 if kind == 'MAE' else 640)
    cfg, report = converted(SEG.format(base=f'upernet_{kind.lower()}.py', backbone=backbone), clone)
    assert_same_model(cfg, f'mmseg::{shipped}')
    assert cfg.model.backbone.norm_cfg.eps == 1e-6
    assert cfg.model.data_preprocessor.size == (640, 640)
    assert 'model.backbone.embed_dim ' in report
    assert 'beit2mmseg.py has renamed them' in report
    parts = build_parts(cfg)
    names = {id(param): name for name, param in parts.model.named_parameters()}
    scales = {names[id(param)]: group['lr_scale'] for group in parts.optim_wrapper.param_groups
              if 'lr_scale' in group for param in group['params']}
    for name, layer in {'backbone.cls_token': 0, 'backbone.patch_embed.projection.weight': 0,
                        'backbone.layers.0.ln1.weight': 1, 'backbone.layers.11.gamma_1': 12,
                        'neck.upsample_4x.0.weight': 13, 'decode_head.conv_seg.bias': 13}.items():
        assert scales[name] == pytest.approx(0.65 ** (13 - layer)), name
    if kind == 'MAE':
        assert scales['backbone.pos_embed'] == pytest.approx(0.65 ** 13)


@pytest.mark.parametrize(('backbone', 'message', 'advised'), [
    (timm('BEiT', use_abs_pos_emb=True), 'use_abs_pos_emb=True', dict(use_abs_pos_emb=False)),
    (timm('BEiT', use_rel_pos_bias=False), 'use_rel_pos_bias=False', dict(use_rel_pos_bias=True)),
    (timm('BEiT', init_values=None), 'init_values=None', dict(init_values=1.0)),
    (timm('BEiT', drop_rate=0.1), 'drop_rate=0.1', dict(drop_rate=0.0)),
    (timm('MAE', qkv_bias=False), 'qkv_bias=False', dict(qkv_bias=True)),
    (timm('MAE', use_abs_pos_emb=False), 'use_abs_pos_emb=False', dict(use_abs_pos_emb=True)),
    (timm('MAE', patch_size=32), 'patch_size=32', dict(patch_size=8))])
def test_what_mmsegs_backbone_cannot_follow_is_refused(backbone, message, advised, tmp_path):
    """And what the message advises converts."""
    small = dict(depth=4, out_indices=[0, 1, 2, 3], img_size=64)
    text = SEG.replace('[768] * 4', '[32] * 4').replace('in_channels=768', 'in_channels=32')
    backbone = {**backbone, **small, 'embed_dim': 32, 'num_heads': 2}
    (tmp_path / 'upernet_beit.py').write_text(XCIT)
    text = text.replace('../../_base_/models/{base}', 'upernet_beit.py')
    with pytest.raises(UserError, match=f'{message} is not supported: .*--trust --import MODULE'):
        converted(text.format(backbone=backbone), tmp_path)
    cfg, _ = converted(text.format(backbone={**backbone, **advised}), tmp_path)
    neck = build_on_meta(cfg).neck
    assert neck.rescales == ([2, 1, 0.5, 0.25] if 'patch_size' in advised else [4, 2, 1, 0.5])


def test_weights_with_timms_names_load_as_the_report_advises(tmp_path, monkeypatch):
    (tmp_path / 'upernet_beit.py').write_text(XCIT)
    text = SEG.replace('../../_base_/models/{base}', 'upernet_beit.py').replace(
        '[768] * 4', '[8] * 4').replace('in_channels=768', 'in_channels=8')
    cfg, _ = converted(text.format(backbone=timm(
        'BEiT', depth=4, out_indices=[0, 1, 2, 3], img_size=64, embed_dim=8, num_heads=2)),
        tmp_path)
    backbone = build_on_meta(cfg).backbone
    theirs = {}
    for name, value in backbone.state_dict().items():
        for old, new in (('layers.0.0', 'mlp.fc1'), ('ffn.layers.1', 'mlp.fc2'), ('ffn.mlp', 'mlp'),
                         ('projection', 'proj'), ('.ln', '.norm')):
            name = name.replace(old, new)
        theirs[name.replace('layers.', 'blocks.', 1)] = torch.ones(value.shape)
    torch.save(dict(model=theirs), tmp_path / 'theirs.pth')
    script = SHIPPED['mmseg'] / 'tools/model_converters/beit2mmseg.py'
    monkeypatch.setattr(sys, 'argv', [str(script), str(tmp_path / 'theirs.pth'),
                                      str(tmp_path / 'renamed.pth')])
    runpy.run_path(str(script), run_name='__main__')
    renamed = torch.load(tmp_path / 'renamed.pth', weights_only=True)
    missing = set(backbone.state_dict()) - set(renamed)
    assert not missing
    assert set(backbone.state_dict()) - set(theirs), 'with the old names it would not load'


def test_a_backbone_of_ones_own_of_that_name_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / 'my_beit.py').write_text('''from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import nn

class BEiT(BaseModule):
    def __init__(self, embed_dim, depth, use_abs_pos_emb):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(3, embed_dim, 1) for _ in range(depth))

    def forward(self, x):
        return tuple(block(x) for block in self.blocks)
''')
    from mmseg.registry import MODELS
    monkeypatch.setattr(MODELS, '_module_dict', dict(MODELS.module_dict))
    monkeypatch.syspath_prepend(tmp_path)
    import my_beit
    MODELS.register_module(module=my_beit.BEiT, force=True)
    (tmp_path / 'upernet_beit.py').write_text(XCIT.replace('type=\'XCiT\', patch_size=16, '
        'embed_dim=384, depth=12, num_heads=8, mlp_ratio=4,\n                  qkv_bias=True, '
        'use_abs_pos_emb=True, use_rel_pos_bias=False', "type='BEiT', embed_dim=8, depth=4, "
        'use_abs_pos_emb=True'))
    text = SEG.replace('../../_base_/models/{base}', 'upernet_beit.py').replace(
        '[768] * 4', '[8] * 4').replace('in_channels=768', 'in_channels=8').replace(
        'backbone={backbone},', '').replace("constructor='LayerDecayOptimizerConstructor',\n"
        '                 paramwise_cfg=dict(num_layers=12, layer_decay_rate=0.65)', '')
    cfg, _ = converted(text, tmp_path)
    assert cfg.model.backbone == dict(type='BEiT', embed_dim=8, depth=4, use_abs_pos_emb=True)


VIT = dict(type='VisionTransformer', img_size=[64], patch_size=16, embed_dim=32, depth=4,
           num_heads=2, mlp_ratio=4, qkv_bias=True, drop_path_rate=0.1, out_indices=[0, 1, 2, 3])
OF_IBOT = """_base_ = ['../_base_/datasets/ade20k.py',
          '../_base_/default_runtime.py', '../_base_/schedules/schedule_160k.py']
model = dict(
    type='EncoderDecoder', backbone={backbone}, decode_head=dict(
        type='UPerHead', in_channels=[32] * 4, in_index=[0, 1, 2, 3], channels=8, num_classes=150),
    auxiliary_head=dict(type='FCNHead', in_channels=32, in_index=2, channels=8, num_classes=150),
    test_cfg=dict(mode='whole'))
optimizer = dict(_delete_=True, type='AdamW', lr=3e-5, betas=(0.9, 0.999), weight_decay=0.05,
                 constructor='LayerDecayOptimizerConstructor',
                 paramwise_cfg=dict(num_layers=4, layer_decay_rate=0.9))
"""


@torch.no_grad()
def test_the_vit_of_ibot(tmp_path):
    """It computes what iBOT's does, with the rates of its layers."""
    cfg, _ = converted(OF_IBOT.format(backbone=VIT), tmp_path)
    assert cfg.model.neck.rescales == [4, 2, 1, 0.5]
    assert converted(OF_IBOT.format(backbone=dict(VIT, with_fpn=False)), tmp_path)[0].model.get(
        'neck') is None
    groups = build_parts(cfg).optim_wrapper.param_groups
    scales = {group['group_name']: group['lr_scale'] for group in groups if 'lr_scale' in group}
    assert scales['layer_0_decay'] == pytest.approx(0.9**5)
    assert scales['layer_4_no_decay'] == pytest.approx(0.9)
    init_default_scope('mmseg')
    vit = MODELS.build(cfg.model.backbone)
    vit.eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    image, weights = torch.randn(1, 3, 64, 64), vit.state_dict()
    x = nn.functional.conv2d(image, weights['patch_embed.projection.weight'],
                             weights['patch_embed.projection.bias'], stride=16)
    x = torch.cat([weights['cls_token'], x.flatten(2).transpose(1, 2)], 1) + weights['pos_embed']
    for i, features in enumerate(vit(image)):
        own = {name.removeprefix(f'layers.{i}.'): value for name, value in weights.items()}

        def linear(x, name, own=own):
            return nn.functional.linear(x, own[name + 'weight'], own[name + 'bias'])

        def norm(x, name, own=own):
            scale, shift = own[name + 'weight'], own[name + 'bias']
            return nn.functional.layer_norm(x, (32,), scale, shift, 1e-6)
        q, k, v = linear(norm(x, 'ln1.'), 'attn.attn.in_proj_').reshape(1, 17, 3, 2, 16).permute(
            2, 0, 3, 1, 4)
        attention = ((q @ k.transpose(-2, -1)) / 4).softmax(-1) @ v
        x = x + linear(attention.transpose(1, 2).reshape(1, 17, 32), 'attn.attn.out_proj.')
        hidden = nn.functional.gelu(linear(norm(x, 'ln2.'), 'ffn.layers.0.0.'))
        x = x + linear(hidden, 'ffn.layers.1.')
        torch.testing.assert_close(features, x[:, 1:].transpose(1, 2).reshape(1, 32, 4, 4),
                                   rtol=1e-4, atol=1e-4)


def test_a_detectors_backbone_is_none_of_mmsegs(tmp_path):
    with pytest.raises(UserError, match="'VisionTransformer' is not registered in mmdet"):
        converted(f"{COCO}model = dict(type='RetinaNet', backbone={VIT}, neck=dict(type='FPN'))\n",
                  tmp_path)


@pytest.mark.parametrize(('key', 'value', 'advised'), [
    ('qkv_bias', False, True), ('init_values', 0.1, 0), ('frozen_stages', 12, -1),
    ('patch_size', 32, 16)])
def test_what_mmsegs_vit_cannot_follow_is_refused(key, value, advised, tmp_path):
    with pytest.raises(UserError, match=f'{key}={value}.* Set '):
        converted(OF_IBOT.format(backbone=dict(VIT, **{key: value})), tmp_path)
    converted(OF_IBOT.format(backbone=dict(VIT, **{key: advised})), tmp_path)
