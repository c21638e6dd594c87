"""mmseg's and mmdet's own ConvNeXt configs run as they are, without mmpretrain."""
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from convnext_mm import ConvNeXt, UserError
from convnext_mm.archs import ARCHS
from convnext_mm.bases import without_completion
from convnext_mm.complexity import build_on_meta
from convnext_mm.engine.checks import read_config
from convnext_mm.resolution import resolve
from convnext_mm.resolution.mmpretrain import map_backbone, needed_imports
from tests.helpers import SEGMENTATION, call_tool, run_tool

CONFIGS = {toolbox: Path(find_spec(toolbox).origin).parent / '.mim' / 'configs'
           for toolbox in ('mmseg', 'mmdet') if find_spec(toolbox)}
SHIPPED = sorted(path for folder in CONFIGS.values() for path in folder.rglob('*convnext*.py')
                 if path.parent.parent == folder)
FOREIGN = sorted(path for folder in CONFIGS.values() for path in (
    *folder.glob('timm_example/*.py'), *folder.glob('reid/*.py')))

SMALL = '''_base_ = ['{root}/_base_/models/upernet_convnext.py', '{root}/_base_/datasets/ade20k.py',
          '{root}/_base_/default_runtime.py', '{root}/_base_/schedules/schedule_20k.py']
crop_size = (64, 64)
data_preprocessor = dict(size=crop_size)
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        _delete_=True, type='mmpretrain.ConvNeXt',
        arch=dict(depths=[1, 1, 1, 1], channels=[8, 16, 24, 32]),
        out_indices=[0, 1, 2, 3], drop_path_rate=0.1, layer_scale_init_value=1.0,
        gap_before_final_norm=False, frozen_stages=0, init_cfg=None),
    decode_head=dict(in_channels=[8, 16, 24, 32], channels=16, num_classes=150),
    auxiliary_head=dict(in_channels=24, channels=16, num_classes=150))
optim_wrapper = dict(
    _delete_=True, type='AmpOptimWrapper', loss_scale='dynamic',
    optimizer=dict(type='AdamW', lr=0.0001, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(decay_rate=0.9, decay_type='stage_wise', num_layers=6),
    constructor='LearningRateDecayOptimizerConstructor')
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=2),
    dict(type='PolyLR', power=1.0, begin=2, end=4, eta_min=0.0, by_epoch=False)]
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='RandomCrop', crop_size=crop_size), dict(type='PackSegInputs')]
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False,
                        dataset=dict(data_root='{data}', pipeline=train_pipeline))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root='{data}'))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=2)
'''


def small(folder: Path, data: object = 'data') -> Path:
    path = folder / 'small.py'
    path.write_text(SMALL.format(root=CONFIGS['mmseg'], data=data))
    return path


def as_written(path: Path) -> dict:
    with without_completion():
        return Config.fromfile(path, import_custom_modules=False).to_dict()


def test_there_are_shipped_configs():
    assert {path.parent.name for path in SHIPPED} == {'convnext', 'rtmdet'}
    assert len(SHIPPED) >= 10


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_have_the_values_that_they_state(path, capsys):
    written = as_written(path)
    cfg = read_config(str(path))
    out = capsys.readouterr().out.partition('Adjusted to your changes:\n')[2]
    lines = [line for line in out.splitlines() if line.startswith('  ')]
    assert [line for line in lines if 'mmpretrain.ConvNeXt' in line] == lines[:1]
    ours = cfg.to_dict()

    theirs, backbone = written['model'].pop('backbone'), ours['model'].pop('backbone')
    assert theirs.pop('gap_before_final_norm') is False
    assert backbone == dict(theirs, type='ConvNeXt')
    assert ours.pop('custom_imports') == dict(imports=['convnext_mm'], allow_failed_imports=False)
    written.pop('custom_imports')
    for split in ('train', 'val', 'test') if cfg.default_scope == 'mmseg' else ():
        # ADE20KDataset's own default, which resolving states.
        assert ours[f'{split}_dataloader']['dataset'].pop('reduce_zero_label', True) is True
    for step in ours['tta_pipeline'][-1]['transforms'] if cfg.default_scope == 'mmseg' else ():
        if step[0]['type'] == 'LoadAnnotations':
            assert step[0].pop('reduce_zero_label', True) is True
    if path.parent.name == 'rtmdet':
        cosine = ours['param_scheduler'][1]
        assert cosine.pop('eta_min_ratio') == pytest.approx(0.05)
        cosine['eta_min'] = 0.05 * 0.001
        assert len(lines) == 2
        assert 'eta_min_ratio=0.05 instead of eta_min=5e-05' in lines[1]
    else:
        assert len(lines) == 1
    assert ours == written

    once = cfg.to_dict()
    assert not [line for line in resolve(cfg) if 'mmpretrain' in line]
    assert cfg.to_dict() == once, 'resolving again changes nothing'


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs_build(path):
    cfg = read_config(str(path))
    wrapper = cfg.optim_wrapper.to_dict()
    model = build_on_meta(cfg)
    assert type(model.backbone) is ConvNeXt
    size = ARCHS[as_written(path)['model']['backbone']['arch']]
    assert model.backbone.arch == size
    assert max(block.drop_path.drop_prob for block in model.backbone.stages[-1]) == (
        pytest.approx(cfg.model.backbone.drop_path_rate))
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decay, rate = wrapper['paramwise_cfg'], wrapper['optimizer']['lr']
    depths = 1 + decay['num_layers']
    by_name = {group['group_name']: group['lr'] for group in groups}
    assert max(by_name.values()) == pytest.approx(rate)
    assert min(by_name.values()) == pytest.approx(rate * decay['decay_rate'] ** depths)
    scales = {depths - power for power in (range(1, 5) if decay['decay_type'] == 'stage_wise'
                                           else range(1, depths))} | {0, depths}
    assert sorted(set(by_name.values())) == pytest.approx(
        sorted(rate * decay['decay_rate'] ** scale for scale in scales))


@pytest.mark.skipif(find_spec('mmpretrain') is not None, reason='mmpretrain is installed')
@pytest.mark.parametrize('path', FOREIGN, ids=lambda path: path.stem)
def test_other_models_of_mmpretrain_need_it(path):
    with pytest.raises(UserError, match=r"type='mmpretrain\.\w+' needs mmpretrain, which is not"):
        read_config(str(path))


@pytest.mark.parametrize('form', [
    "_base_ = 'mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'",
    f"_base_ = '{CONFIGS['mmseg']}/convnext/"
    "convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'"])
def test_a_config_on_top_of_a_shipped_one(form, tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(f"{form}\nmodel = dict(backbone=dict(drop_path_rate=0.2))\n"
                    "train_dataloader = dict(batch_size=4)\n")
    cfg = read_config(str(path), {'model.backbone.with_cp': True, 'work_dir': 'elsewhere'})
    backbone = cfg.model.backbone
    assert backbone.type == 'ConvNeXt'
    assert (backbone.arch, backbone.drop_path_rate, backbone.with_cp) == ('tiny', 0.2, True)
    assert cfg.train_dataloader.batch_size == 4
    assert type(build_on_meta(cfg).backbone) is ConvNeXt


def test_the_imports_that_stay(tmp_path):
    imports = "custom_imports = dict(imports=['json', 'mmcls.models'], allow_failed_imports=False)"
    path = small(tmp_path)
    path.write_text(path.read_text().replace('mmpretrain.', 'mmcls.') + imports)
    cfg = read_config(str(path))
    assert cfg.custom_imports.imports == ['convnext_mm', 'json']
    assert cfg.model.backbone.type == 'ConvNeXt'
    # A recipe of this package that names mmpretrain's backbone.
    path.write_text(f"_base_ = '{Path(SEGMENTATION).resolve()}'\n"
                    "model = dict(backbone=dict(type='mmpretrain.ConvNeXt', "
                    'gap_before_final_norm=False))\n')
    cfg = read_config(str(path))
    assert cfg.to_dict() == read_config(SEGMENTATION).to_dict()


def test_mmpretrain_is_imported_only_for_its_other_classes(monkeypatch):
    from convnext_mm.resolution import mmpretrain
    convnext, other = dict(type='mmpretrain.ConvNeXt'), dict(type='mmpretrain.ResNet')

    def imports(*parts):
        return needed_imports(dict(custom_imports=dict(imports='mmpretrain.models'), model=parts))
    assert imports(convnext) == imports() == imports(other) == []
    monkeypatch.setattr(mmpretrain, 'find_spec', lambda name: name == 'mmpretrain')
    assert imports(convnext) == []  # also where it is installed
    assert imports(other) == imports(convnext, other) == imports() == ['mmpretrain.models']


@pytest.mark.parametrize(('given', 'ours'), [
    (dict(arch='base', in_channels=6, out_indices=(1, 2)),
     dict(arch='base', in_chans=6, out_indices=(1, 2), layer_scale_init_value=1e-6)),
    (dict(out_indices=3, frozen_stages=2, with_cp=True, drop_path_rate=0.3),
     dict(out_indices=[3], frozen_stages=2, with_cp=True, drop_path_rate=0.3,
          layer_scale_init_value=1e-6)),
    (dict(arch='nano', use_grn=True, layer_scale_init_value=0.), dict(
        arch='v2_nano', use_grn=True, layer_scale_init_value=0., out_indices=[-1])),
    (dict(arch='small', use_grn=True, layer_scale_init_value=0.), dict(
        arch='small', use_grn=True, layer_scale_init_value=0., out_indices=[-1])),
    (dict(arch='atto'), dict(depths=[2, 2, 6, 2], dims=[40, 80, 160, 320], out_indices=[-1],
                             layer_scale_init_value=1e-6)),
    (dict(norm_cfg=dict(type='LN2d', eps=1e-6), act_cfg=dict(type='GELU'), stem_patch_size=4,
          linear_pw_conv=False, frozen_stages=0, init_cfg=[
              dict(type='TruncNormal', layer=['Conv2d', 'Linear'], std=.02, bias=0.),
              dict(type='Pretrained', checkpoint='a.pth', prefix='backbone.')]),
     dict(out_indices=[-1], layer_scale_init_value=1e-6, init_cfg=dict(
         type='Pretrained', checkpoint='a.pth', prefix='backbone.')))])
def test_arguments(given, ours):
    mapped = map_backbone(dict(given, type='mmpretrain.ConvNeXt'), 'model.backbone')
    assert mapped.values == dict(ours, type='ConvNeXt')
    ConvNeXt(**{key: value for key, value in ours.items() if key not in (
        'depths', 'dims')}, depths=[1, 1, 1, 1], dims=[4, 4, 4, 4])
    told = str(mapped)
    for key in given.keys() - ours.keys():
        assert re.search(rf'\b{key}\b', told), key


@pytest.mark.parametrize(('given', 'message'), [
    (dict(act_cfg=dict(type='ReLU')), r"model.backbone.act_cfg=\{'type': 'ReLU'\} is not supp"),
    (dict(norm_cfg=dict(type='LN2d')), 'norm_cfg=.* is not supported'),  # with eps=1e-5
    (dict(norm_cfg=dict(type='BN')), "norm_cfg=.*set norm_cfg={'type': 'LN2d', 'eps': 1e-06}"),
    (dict(stem_patch_size=2), 'stem_patch_size=2 is not supported.*set stem_patch_size=4'),
    (dict(gap_before_final_norm=True), 'set gap_before_final_norm=False'),
    (dict(use_grn=True), 'V2 has no layer scale. Set layer_scale_init_value=0.0'),
    (dict(arch=dict(depths=[1])), r'expected dict\(depths=\[...\], channels=\[...\]\)'),
    (dict(init_cfg=dict(type='Kaiming')), "init_cfg={'type': 'Kaiming'} is not supported"),
    (dict(mlp_ratio=2), "neither ConvNeXt of this package nor that of mmpretrain has .*mlp_ratio")])
def test_arguments_that_ours_cannot_follow(given, message):
    with pytest.raises(UserError, match=message):
        map_backbone(dict(given, type='mmpretrain.ConvNeXt'), 'model.backbone')


def test_what_a_file_replaces_is_not_refused(tmp_path):
    path = small(tmp_path)
    path.write_text(path.read_text().replace('drop_path_rate=0.1', "act_cfg=dict(type='ReLU')"))
    with pytest.raises(UserError, match='act_cfg'):
        read_config(str(path))
    mine = tmp_path / 'mine.py'
    mine.write_text("_base_ = './small.py'\nmodel = dict(backbone=dict(_delete_=True, "
                    "type='ConvNeXt', depths=[1, 1, 1, 1], dims=[8, 16, 24, 32]))\n")
    cfg = read_config(str(mine))
    assert cfg.model.backbone == dict(type='ConvNeXt', depths=[1] * 4, dims=[8, 16, 24, 32])


def test_weights_of_mmpretrain_load(tmp_path):
    """The whole model, as mmseg saved it with mmpretrain's names."""
    import torch
    from mmengine.registry import MODELS, init_default_scope

    from convnext_mm import checkpoints
    from convnext_mm.checkpoints.naming import from_official
    cfg = read_config(str(small(tmp_path)))
    init_default_scope('mmseg')
    cfg.model.decode_head.norm_cfg = cfg.model.auxiliary_head.norm_cfg = dict(type='BN')
    model = MODELS.build(cfg.model)
    state = model.state_dict()
    backbone, _ = from_official({name.removeprefix('backbone.'): value for name, value in
                                 state.items() if name.startswith('backbone.')},
                                'mmpretrain', 'backbone.')
    assert 'backbone.stages.0.0.depthwise_conv.weight' in backbone
    changed = {name: value + 1 for name, value in backbone.items()}
    torch.save(dict(state_dict={**{name: value for name, value in state.items()
                                   if not name.startswith('backbone.')}, **changed}),
               tmp_path / 'theirs.pth')
    checkpoints.load_model(model, str(tmp_path / 'theirs.pth'))
    assert torch.equal(model.backbone.stages[0][0].dwconv.weight,
                       changed['backbone.stages.0.0.depthwise_conv.weight'])


@pytest.mark.slow
def test_the_tools_run_such_a_config_and_the_one_that_a_run_writes(demo_data, tmp_path):
    path = small(tmp_path, f'{demo_data}/ADEChallengeData2016')
    done = run_tool('tools/train.py', path, '--work-dir', tmp_path / 'run')
    assert done.stdout.count('mmpretrain.ConvNeXt') == 1
    weights = tmp_path / 'run' / 'iter_4.pth'
    assert weights.is_file()
    dumped = tmp_path / 'run' / 'small.py'
    assert 'mmpretrain' not in dumped.read_text()
    scores = [re.findall(r'mIoU: +([\d.]+)', run_tool(
        'tools/test.py', config, weights, '--work-dir', tmp_path / 'test').stdout)[-1]
        for config in (path, dumped)]
    assert scores[0] == scores[1]
    image = next((demo_data / 'ADEChallengeData2016/images/validation').iterdir())
    for config in (path, dumped):
        drawn = call_tool('tools/image_demo.py', image, config, weights, '--out', tmp_path / 'out')
        assert drawn.returncode == 0, drawn.stdout + drawn.stderr
        checked = call_tool('tools/check_dataset.py', config, '--work-dir', tmp_path / 'check')
        assert checked.returncode == 0, checked.stdout + checked.stderr
