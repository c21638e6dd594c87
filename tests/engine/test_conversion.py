"""A conversion is reported when all that it describes is built, and as the old config says."""
import pytest
from mmengine.config import Config

from convnext_mm import UserError
from convnext_mm.bases import without_completion
from convnext_mm.cli import main
from convnext_mm.engine import conversion
from convnext_mm.engine.building import build_all
from convnext_mm.engine.checks import read_config

SEG = '''_base_ = ['../_base_/models/upernet_convnext.py', '../_base_/datasets/ade20k.py',
          '../_base_/default_runtime.py', '../_base_/schedules/schedule_160k.py']
'''
BACKBONE = '''from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import nn

@MODELS.register_module()
class {name}(BaseModule):
    def __init__(self, width, init_cfg=None):
        super().__init__(init_cfg)
        self.layers = nn.ModuleList(nn.Conv2d(3, width, 1) for _ in range(4))

    def forward(self, x):
        return tuple(layer(x) for layer in self.layers)

    def get_layer_depth(self, name, prefix=''):
        return int(name.removeprefix(prefix).split('.')[1]) + 1, 6
'''
OWN = SEG + '''model = dict(
    backbone=dict(_delete_=True, type='{name}', width=8),
    decode_head=dict(in_channels=[8, 8, 8, 8]), auxiliary_head=dict(in_channels=8))
optimizer = dict(type='AdamW', lr=1e-4, constructor='{constructor}',
                 paramwise_cfg=dict(_delete_=True, num_layers=4, {paramwise}))
'''
DECAY = 'LearningRateDecayOptimizerConstructor'


@pytest.mark.parametrize(('text', 'message'), [
    ("model = dict(decode_head=dict(pool_scale=(1, 2)))", 'model.decode_head.pool_scale'),
    ("model = dict(backbone=dict(depths=[3, 3], dims=[96, 192]))", 'model.decode_head.in_index'),
    ("data = dict(train=dict(pipeline=[dict(type='LoadImageFromFile', colour='x')]))",
     'train_dataloader.dataset.pipeline.0'),
    ("evaluation = dict(metric='mAP')", 'val_evaluator'),
    ("optimizer = dict(type='AdamW', learning_rate=0.1)", 'learning_rate')])
def test_what_cannot_be_built_is_an_error_that_names_the_key(text, message, tmp_path):
    (tmp_path / 'old.py').write_text(SEG + text)
    with pytest.raises(UserError, match=message) as error:
        conversion.migrate(tmp_path / 'old.py', tmp_path / 'new.py')
    assert str(tmp_path / 'old.py') in str(error.value)
    assert not (tmp_path / 'new.py').exists()


OLD = dict(
    model=dict(decode_head=dict(num_classes=150, channels=16),
               test_cfg=dict(mode='slide', crop_size=(512, 512))),
    optimizer=dict(lr=1e-4, betas=(0.9, 0.999),
                   paramwise_cfg=dict(decay_rate=0.9, num_layers=6)),
    runner=dict(max_iters=160000), data=dict(samples_per_gpu=2))


def found(**change) -> list[str]:
    """What differs from OLD in what a recipe builds, with a change."""
    options = {'model.backbone.init_cfg': None, 'model.backbone.depths': [1, 1, 1, 1],
               'model.backbone.dims': [8, 16, 24, 32], 'model.decode_head.channels': 16,
               'model.decode_head.in_channels': [8, 16, 24, 32],
               'model.auxiliary_head.in_channels': 24, **change}
    cfg = read_config('upernet_convnext_tiny_512_160k_ade20k', options, notes=[])
    return [one[0].split(',')[0] for one in conversion.differences(OLD, cfg, build_all(cfg))]


def test_what_is_as_in_the_old_config_is_no_difference():
    assert found() == []


@pytest.mark.parametrize(('key', 'value', 'where'), [
    ('model.decode_head.channels', 64, 'model.decode_head.channels'),
    ('model.test_cfg.mode', 'whole', 'model.test_cfg.mode'),
    ('optim_wrapper.optimizer.lr', 0.5, 'optimizer.lr'),
    ('optim_wrapper.paramwise_cfg.decay_rate', 0.5, 'the learning rate of the stem'),
    ('train_cfg.max_iters', 1600, 'runner.max_iters'),
    ('train_dataloader.batch_size', 7, 'data.samples_per_gpu')])
def test_the_result_is_compared_with_the_old_config(key, value, where):
    """Not with itself: a converter that loses one value of a recipe is found out."""
    assert where in found(**{key: value})


def test_a_folder(tmp_path, capsys):
    old = tmp_path / 'old'
    (old / 'seg').mkdir(parents=True)
    (old / '_base_').mkdir()
    (old / '_base_/runtime.py').write_text('log_config = dict(interval=5)\n')
    (old / 'seg/good.py').write_text(SEG + 'data = dict(samples_per_gpu=4)\n')
    (old / 'seg/bad.py').write_text(SEG + "lr_config = dict(policy='cyclic')\n")
    (old / 'seg/code.py').write_text('def build():\n    return 1\n')
    main('migrate', [str(old), str(tmp_path / 'new')])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == '2 configs: 1 converted and built, 1 refused'
    bad, good = (line.split() for line in lines[-4:-2])
    assert bad[:2] == ['seg/bad.py', 'refused']
    assert "policy='cyclic';" in ' '.join(bad)
    assert good[:4] == ['seg/good.py', 'converted', 'and', 'built']
    assert sorted(file.name for file in (tmp_path / 'new/seg').iterdir()) == [
        'good.py', 'good.txt']
    with pytest.raises(UserError, match='has no config for mmcv'):
        conversion.migrate_folder(tmp_path / 'new', tmp_path / 'newer')


@pytest.mark.parametrize('how', ['--import', 'custom_imports'])
def test_own_parts(how, tmp_path, monkeypatch):
    """What the message for a type that is not registered advises."""
    module, name = f'my_{how.strip("-")}', f'Mine{how.strip("-").title().replace("_", "")}'
    (tmp_path / f'{module}.py').write_text(BACKBONE.format(name=name))
    text = OWN.format(name=name, constructor=DECAY, paramwise='decay_rate=0.5')
    args: list[str] = []
    if how == 'custom_imports':
        text += f"custom_imports = dict(imports=['{module}'], allow_failed_imports=False)\n"
    else:
        args = [str(tmp_path / f'{module}.py')]
    (tmp_path / 'old.py').write_text(text)
    old, new = tmp_path / 'old.py', tmp_path / 'new.py'
    with pytest.raises(UserError, match='is not registered in mmseg.* --trust --import MODULE'):
        conversion.migrate(old, new)
    conversion.migrate(old, new, trust=True, imports=args)
    with without_completion():
        cfg = Config.fromfile(new, import_custom_modules=False)
    assert cfg.model.backbone == dict(type=name, width=8)
    assert cfg.custom_imports['imports'] == ['convnext_mm', module]
    monkeypatch.syspath_prepend(tmp_path)
    parts = build_all(read_config(str(new), notes=[]))
    assert type(parts.model.backbone).__name__ == name
    groups = parts.optim_wrapper.optimizer.param_groups
    assert min(group['lr_scale'] for group in groups) == 0.5 ** 4


def test_own_optimizer_constructors_keep_their_keys(tmp_path):
    (tmp_path / 'my_constructor.py').write_text('''
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS

@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class MyConstructor(DefaultOptimWrapperConstructor):
    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        assert paramwise_cfg.pop('layer_sep') == '.'
        super().__init__(optim_wrapper_cfg, dict(norm_decay_mult=0.0))
''')
    (tmp_path / 'old.py').write_text(SEG + '''optimizer = dict(
    _delete_=True, type='AdamW', lr=1e-4, weight_decay=0.1, constructor='MyConstructor',
    paramwise_cfg=dict(num_layers=4, layer_sep='.'))
''')
    conversion.migrate(tmp_path / 'old.py', tmp_path / 'new.py', trust=True,
                       imports=[str(tmp_path / 'my_constructor.py')])
    with without_completion():
        cfg = Config.fromfile(tmp_path / 'new.py', import_custom_modules=False)
    assert cfg.optim_wrapper.paramwise_cfg == dict(num_layers=4, layer_sep='.')


def test_modules_that_cannot_be_imported(tmp_path):
    (tmp_path / 'old.py').write_text(SEG)
    (tmp_path / 'of_mmcv_1.py').write_text('from mmcv.runner import BaseModule\n')
    for trust, name, message in (
            (False, 'of_mmcv_1', 'executes that module: add --trust'),
            (True, str(tmp_path / 'missing.py'), 'there is no such file'),
            (True, 'of_mmcv_1', '(?s)cannot be imported .*from mmengine.model import BaseModule')):
        with pytest.raises(UserError, match=message):
            conversion.migrate(tmp_path / 'old.py', tmp_path / 'new.py', trust, [name])
    assert not (tmp_path / 'new.py').exists()


def test_styles_are_not_mixed(tmp_path):
    """Old style on new-style bases, and new-style files, are refused whole."""
    (tmp_path / 'new_style.py').write_text("default_scope = 'mmseg'\ntrain_dataloader = dict()\n")
    (tmp_path / 'old.py').write_text("_base_ = './new_style.py'\noptimizer = dict(lr=1)\n")
    for name, message in (('old', 'mixes two styles'), ('new_style', 'runs as it is')):
        with pytest.raises(UserError, match=message):
            conversion.migrate(tmp_path / f'{name}.py', tmp_path / 'out.py')
