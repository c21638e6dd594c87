"""Configs in mmengine's style are converted whole, or refused with what to do."""
from importlib.util import find_spec
from pathlib import Path

import pytest
from mmengine.config import Config

from convnext_mm import UserError
from convnext_mm.bases import without_completion
from convnext_mm.engine.checks import read_config
from convnext_mm.migration.parsing import find_styles, old_keys
from convnext_mm.migration.writing import migrate
from convnext_mm.utils import plain
from tests.helpers import SEGMENTATION, call_tool

CONFIGS = {toolbox: Path(find_spec(toolbox).origin).parent / '.mim' / 'configs'
           for toolbox in ('mmseg', 'mmdet') if find_spec(toolbox)}
SHIPPED = sorted(path for folder in CONFIGS.values() for path in folder.rglob('*convnext*.py')
                 if path.parent.parent == folder)
TINY = CONFIGS['mmseg'] / 'convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'
OLD = "optimizer = dict(type='AdamW', lr=1e-4)\nlr_config = dict(policy='poly')\n"


def written(path: Path) -> dict:
    with without_completion():
        return Config.fromfile(path, import_custom_modules=False).to_dict()


@pytest.mark.parametrize('path', SHIPPED, ids=lambda path: path.stem)
def test_a_converted_config_resolves_to_the_same(path, tmp_path):
    new = tmp_path / 'new.py'
    report = migrate(path, new)
    assert report.count('mmpretrain.ConvNeXt') == 1
    assert report.endswith('\nNo warnings.')
    before, after = read_config(str(path)), read_config(str(new))
    assert plain(after.to_dict()) == plain(before.to_dict())
    assert plain(written(new)) == plain(before.to_dict()), 'it is complete as it is written'
    assert '_base_' not in written(new)
    assert 'mmpretrain.' not in new.read_text()


def test_what_a_user_has_changed_is_in_the_converted_config(tmp_path):
    mine, new = tmp_path / 'mine.py', tmp_path / 'new.py'
    mine.write_text(f"_base_ = '{TINY}'\nclasses = ('road', 'car', 'sky')\ndata_root = 'data/m'\n"
                    'reduce_zero_label = False\n'
                    'train_cfg = dict(max_iters=20000)\ntrain_dataloader = dict(batch_size=4)\n')
    migrate(mine, new)
    before, after = read_config(str(mine)), read_config(str(new))
    assert plain(after.to_dict()) == plain(before.to_dict())
    assert after.model.decode_head.num_classes == 3
    assert after.train_dataloader.dataset.data_root == 'data/m'
    assert after.train_dataloader.batch_size == 4
    assert after.param_scheduler[-1].end == after.train_cfg.max_iters == 20000
    assert after.optim_wrapper.optimizer.type == 'AdamW'
    assert after.optim_wrapper.paramwise_cfg == dict(
        decay_rate=0.9, decay_type='stage_wise', num_layers=6)


@pytest.mark.parametrize('text', [
    f"_base_ = '{SEGMENTATION}'\nmax_iters = 20000\n",
    "_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'\n",
    "optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))\n"
    "default_scope = 'mmseg'\n"])
def test_what_needs_no_conversion_is_refused(text, tmp_path):
    old = tmp_path / 'old.py'
    old.write_text(text.replace('configs/', f'{Path(SEGMENTATION).resolve().parent}/'))
    done = call_tool('tools/migrate_config.py', old)
    assert done.returncode == 2
    assert f'runs as it is, without conversion: python tools/train.py {old}' in done.stderr
    assert not (tmp_path / 'old_new.py').exists()


@pytest.mark.parametrize(('child', 'base'), [
    (OLD, "optim_wrapper = dict(type='OptimWrapper')\ntrain_dataloader = dict(batch_size=2)\n"),
    ("optim_wrapper = dict(type='OptimWrapper')\n", OLD),
    ('', OLD + "_base_ = 'mmseg::_base_/default_runtime.py'\n")])
def test_a_mix_of_styles_is_refused(child, base, tmp_path):
    (tmp_path / 'base.py').write_text(base)
    mine = tmp_path / 'mine.py'
    mine.write_text(f"_base_ = './base.py'\n{child}")
    for call in (lambda: migrate(mine, tmp_path / 'new.py'), lambda: read_config(str(mine))):
        with pytest.raises(UserError, match='mixes two styles, and no version reads both: .*it '
                                            'sets optimizer, lr_config.* for mmengine'):
            call()
    assert not (tmp_path / 'new.py').exists()
    assert call_tool('tools/train.py', mine, '--migrate').returncode == 2


def test_an_old_file_in_a_new_toolbox_is_refused(tmp_path):
    """Its bases have the old names, but mmengine's values."""
    for name in ('models/upernet_convnext.py', 'datasets/ade20k.py', 'default_runtime.py',
                 'schedules/schedule_160k.py'):
        copy = tmp_path / '_base_' / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text((CONFIGS['mmseg'] / '_base_' / name).read_text())
    old = tmp_path / 'convnext' / 'old.py'
    old.parent.mkdir()
    old.write_text("_base_ = ['../_base_/models/upernet_convnext.py', "
                   "'../_base_/datasets/ade20k.py', '../_base_/default_runtime.py', "
                   f"'../_base_/schedules/schedule_160k.py']\n{OLD}")
    with pytest.raises(UserError, match=r'old\.py is for mmcv .*ade20k\.py for mmengine'):
        migrate(old, tmp_path / 'new.py')


def test_a_file_on_old_bases_is_old(tmp_path):
    (tmp_path / 'base.py').write_text(OLD)
    (tmp_path / 'mine.py').write_text("_base_ = './base.py'\nmodel = dict(pretrained='a.pth')\n")
    assert old_keys(tmp_path / 'mine.py') == ['optimizer', 'lr_config']


@pytest.mark.parametrize('toolbox', CONFIGS)
def test_the_toolboxes_own_configs_are_in_mmengines_style(toolbox):
    paths = list(CONFIGS[toolbox].rglob('*.py'))
    assert len(paths) > 300
    mixed = {path.name for path in paths if find_styles(path).old}
    assert mixed <= {'ga-fast-rcnn_r50-caffe_fpn_1x_coco.py'}  # sets data and optimizer_config


@pytest.mark.parametrize('code', [
    'import os', "open('marker', 'w')", 'dict = eval\nb = dict("1")',
    'b = sorted(["1"], key=eval)', 'with a: pass', 'b = "".__class__', 'def f(): pass'])
def test_code_runs_only_if_it_is_trusted(code, tmp_path):
    old, new = tmp_path / 'old.py', tmp_path / 'new.py'
    old.write_text(f"_base_ = '{TINY}'\n{code}\n")
    with pytest.raises(UserError, match='this does more than assign values'):
        migrate(old, new)
    assert not new.exists()
    if code == 'import os':
        migrate(old, new, trust=True)
        assert written(new)['model']['backbone']['type'] == 'ConvNeXt'


@pytest.mark.parametrize(('text', 'message'), [
    ("model = dict(backbone=dict(act_cfg=dict(type='ReLU')))", 'act_cfg=.* is not supported'),
    ("model = dict(decode_head=dict(type='mmpretrain.LinearClsHead'))", 'needs mmpretrain'),
    ("default_scope = 'mmpose'", "default_scope='mmpose' is not supported")])
def test_what_cannot_be_converted_is_refused(text, message, tmp_path):
    old, new = tmp_path / 'old.py', tmp_path / 'new.py'
    old.write_text(f"_base_ = '{TINY}'\n{text}\n")
    with pytest.raises(UserError, match=message):
        migrate(old, new)
    assert not new.exists()
