"""Each refusal's advice is tried: what was refused converts, and is built, once it is followed."""
from __future__ import annotations

import ast
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIMIZERS
from mmseg.registry import DATASETS, MODELS, TRANSFORMS

import convnext_mm
from convnext_mm import UserError
from convnext_mm.engine import conversion
from convnext_mm.engine.building import build_parts
from convnext_mm.engine.checks import read_config
from convnext_mm.migration.writing import migrate
from tests.helpers import ROOT

BASES = '''_base_ = ['../_base_/models/upernet_convnext.py', '../_base_/datasets/ade20k.py',
          '../_base_/default_runtime.py', '../_base_/schedules/schedule_160k.py']
'''
SMALL = '''model = dict(
    backbone=dict(type='ConvNeXt', depths=[1, 1, 1, 1], dims=[8, 16, 24, 32]),
    decode_head=dict(in_channels=[8, 16, 24, 32], channels=8),
    auxiliary_head=dict(in_channels=24, channels=8))
'''
MMPRETRAIN = BASES + '''model = dict(
    backbone=dict(_delete_=True, type='mmcls.ConvNeXt', out_indices=[0, 1, 2, 3], {}))
'''
NEW = """_base_ = '{root}/configs/upernet_convnext_tiny_512_160k_ade20k.py'
model = dict(backbone=dict(type='mmpretrain.ConvNeXt', depths=[1, 1, 1, 1], dims=[8, 16, 24, 32]),
             decode_head=dict(in_channels=[8, 16, 24, 32], channels=8),
             auxiliary_head=dict(in_channels=24, channels=8))
""".replace('{root}', str(ROOT))
OWN_HEAD = '''from mmseg.models import FCNHead
from mmseg.registry import MODELS
MODELS.register_module(module=FCNHead, name='AdvisedHead', force=True)
'''
OWN_BACKBONE = '''from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import nn

@MODELS.register_module(force=True)
class AdvisedNeXt(BaseModule):
    def __init__(self, variant):
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 8, 4)])
        self.downsample_layers = nn.ModuleList()
'''
OWN_STEP = '''from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS

@TRANSFORMS.register_module(force=True)
class AdvisedStep(BaseTransform):
    def transform(self, results):
        return results
'''
OWN_SET = '''from mmseg.datasets import ADE20KDataset
from mmseg.registry import DATASETS
DATASETS.register_module(module=ADE20KDataset, name='AdvisedSet', force=True)
'''
OWN_OPTIMIZER = '''import torch
from mmengine.registry import OPTIMIZERS
OPTIMIZERS.register_module(module=torch.optim.AdamW, name='AdvisedOptimizer', force=True)
'''
OWN_CONSTRUCTOR = '''from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
OPTIM_WRAPPER_CONSTRUCTORS.register_module(
    module=DefaultOptimWrapperConstructor, name='AdvisedConstructor', force=True)
'''
OF_MMCV_1 = '''from mmcv.runner import BaseModule
from mmseg.models.builder import BACKBONES

@BACKBONES.register_module(force=True)
class Ported(BaseModule):
    pass
'''
PORTED = '''from mmengine.model import BaseModule
from mmseg.registry import MODELS

@MODELS.register_module(force=True)
class Ported(BaseModule):
    pass
'''


class Case(NamedTuple):
    """A refusal, and its advice.

    Args:
        message: What the refusal says.
        before: The refused config; or files, of which ``old.py`` is refused.
        after: The same when the advice is followed.
        trust, imports: Options of the conversion, with the advice.
        refused_with: Options of the refused conversion: trust and imports.
    """

    message: str
    before: str | dict[str, str]
    after: str | dict[str, str]
    trust: bool = False
    imports: Sequence[str] = ()
    refused_with: tuple[bool, Sequence[str]] = (False, ())


def seg(text: str) -> str:
    return f'{BASES}{SMALL}{text}\n'


def one(message: str, before: str, after: str) -> Case:
    """A setting, and what the message puts in its place."""
    return Case(message, seg(before), seg(after))


def own(message: str, text: str, module: str) -> Case:
    """A type of one's own, and the module that registers it."""
    return Case(message + '.* give the module .* --trust --import MODULE', seg(text),
                {'old.py': seg(text), 'my_parts.py': module}, True, ['my_parts.py'])


OTHER = "model['backbone'] = dict(_delete_=True, type='{}', variant='1d')"
DRIVE = ("data = dict(train=dict(type='DRIVEDataset', data_root='a', img_dir='b', ann_dir='c', "
         "pipeline=[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]))\n"
         "data['val'] = data['test'] = data['train']\n"
         "model['decode_head']['num_classes'] = model['auxiliary_head']['num_classes'] = 150")
STEPS = "data = dict(train=dict(pipeline=[dict(type='LoadImageFromFile'), {}]))"
TEST = ("data = dict(test=dict(pipeline=[dict(type='LoadImageFromFile'), dict("
        "type='MultiScaleFlipAug', {} transforms=[dict(type='Resize')])]))")
A, B = 'runner = dict(max_iters=2000)\n', 'runner = dict(max_iters=3000)\n'

CASES = [
    # What may stand in a file
    Case('Circular _base_', {'old.py': "_base_ = './b.py'\n", 'b.py': "_base_ = './old.py'\n"},
         {'old.py': "_base_ = './b.py'\n", 'b.py': seg('')}),
    Case('line 1: .*never closed', 'a = (\n', seg('')),
    Case('more than one file in _base_ sets runner',
         {'old.py': "_base_ = ['./a.py', './b.py']\n", 'a.py': A, 'b.py': B},
         {'old.py': "_base_ = ['./a.py']\n", 'a.py': seg(A)}),
    Case('_base_ must be a string or a list', '_base_ = 5\n', seg('')),
    Case('base ../_base_/models/mine.py not found .* or use one that this package provides: '
         '.*upernet_convnext.py', BASES.replace('upernet_convnext', 'mine') + SMALL, seg('')),
    Case('Put it there', BASES.replace('models/upernet_convnext', 'mine') + 'fp16 = None\n',
         {'../_base_/mine.py': SMALL, 'old.py': BASES.replace('models/upernet_convnext', 'mine')
          + "model = dict(type='EncoderDecoder', decode_head=dict(_delete_=True, type='FCNHead', "
          'in_channels=32, in_index=3, channels=8, num_classes=150), auxiliary_head=None)\n'}),
    Case("line 8: a\\['b'\\]: TypeError", seg("a = 1\nb = a['b']"),
         seg("a = dict(b=1)\nb = a['b']")),
    Case('To execute a file that you trust, use --trust', seg('import math'), seg('import math'),
         trust=True),
    Case('ZeroDivisionError', seg('a = 1 / 0'), seg('a = 1 / 2'), True, (), (True, ())),
    Case('mixes two styles.* or inherit old files only',
         {'old.py': "_base_ = './a.py'\noptimizer = dict(lr=1)\n",
          'a.py': "default_scope = 'mmseg'\n"},
         {'old.py': "_base_ = './a.py'\noptimizer = dict(lr=1)\n", 'a.py': seg('')}),
    Case('a value is of another kind than its key takes', seg('optimizer = 5'),
         seg('optimizer = dict(lr=0.1)')),
    Case('neither decode_head nor roi_head. Add _base_', 'optimizer = dict(lr=0.1)\n',
         seg('optimizer = dict(lr=0.1)')),
    # Configs in mmengine's style
    Case("default_scope='mmpose' is not supported: expected 'mmseg'",
         NEW + "default_scope = 'mmpose'\n", NEW + "default_scope = 'mmseg'\n"),
    Case('cannot be read: ZeroDivisionError', NEW + 'a = 1 / 0\n', NEW + 'a = 1 / 2\n'),
    # Own parts
    own("decode_head.type='AdvisedHead' is not registered",
        "model['decode_head'] = dict(_delete_=True, type='AdvisedHead', in_channels=32, "
        'in_index=3, channels=8, num_classes=150)', OWN_HEAD),
    own("step 'AdvisedStep' is not registered", STEPS.format("dict(type='AdvisedStep')"),
        OWN_STEP),
    own("data.train.type='AdvisedSet' is not registered",
        "data = dict(train=dict(type='AdvisedSet', data_root='x', img_dir='a', ann_dir='b', "
        "pipeline=[dict(type='LoadImageFromFile')]))", OWN_SET),
    own("optimizer.type='AdvisedOptimizer' is not registered",
        "optimizer = dict(_delete_=True, type='AdvisedOptimizer', lr=0.1)", OWN_OPTIMIZER),
    own("optimizer.constructor='AdvisedConstructor' is not registered",
        "optimizer = dict(_delete_=True, type='SGD', lr=1, constructor='AdvisedConstructor')",
        OWN_CONSTRUCTOR),
    Case('executes that module: add --trust', {'old.py': seg(''), 'my_parts.py': PORTED},
         {'old.py': seg(''), 'my_parts.py': PORTED}, True, ['my_parts.py'],
         (False, ['my_parts.py'])),
    Case('there is no such file', seg(''), {'old.py': seg(''), 'my_parts.py': PORTED}, True,
         ['my_parts.py'], (True, ['my_parts.py'])),
    Case('from mmcv.runner import BaseModule → from mmengine.model import BaseModule',
         {'old.py': seg(''), 'my_old_parts.py': OF_MMCV_1},
         {'old.py': seg(''), 'my_old_parts.py': PORTED}, True, ['my_old_parts.py'],
         (True, ['my_old_parts.py'])),
    # Length and schedule
    one('total_epochs=12 contradicts runner=.*: remove one of them',
        'total_epochs = 12\nrunner = dict(max_epochs=36)', 'total_epochs = 12'),
    one("unknown runner.type='MyRunner'; expected IterBasedRunner",
        "runner = dict(type='MyRunner')", "runner = dict(type='IterBasedRunner')"),
    one('runner has no max_epochs: set it', "runner = dict(type='EpochBasedRunner')",
        "runner = dict(type='EpochBasedRunner', max_epochs=3)"),
    one("policy='cyclic'; expected one of fixed, step", "lr_config = dict(policy='cyclic')",
        "lr_config = dict(policy='fixed')"),
    one("warmup='cosine'; expected linear", "lr_config = dict(warmup='cosine', warmup_iters=5)",
        "lr_config = dict(warmup='linear', warmup_iters=5)"),
    one("powr; policy 'poly' has the settings .*power", 'lr_config = dict(powr=0.9)',
        'lr_config = dict(power=0.9)'),
    one('the runner counts iterations: set by_epoch=False',
        "lr_config = dict(_delete_=True, policy='poly')",
        "lr_config = dict(_delete_=True, policy='poly', by_epoch=False)"),
    one("policy='exp' needs gamma: set it", "lr_config = dict(policy='exp', by_epoch=False)",
        "lr_config = dict(policy='exp', gamma=0.9, by_epoch=False)"),
    one('must be lists of the same length', "lr_config = dict(policy='CosineRestart', "
        'periods=[160000], restart_weights=[1, 1])', "lr_config = dict(policy='CosineRestart', "
        'periods=[160000], restart_weights=[1])'),
    one('end after 5 of 160000 .*: add a period',
        "lr_config = dict(policy='CosineRestart', periods=[5], by_epoch=False)",
        "lr_config = dict(policy='CosineRestart', periods=[5, 159995], restart_weights=[1, 1], "
        'by_epoch=False)'),
    one("optimizer_config.type='MyHook'; expected OptimizerHook",
        "optimizer_config = dict(type='MyHook')", "optimizer_config = dict(type='OptimizerHook')"),
    one('optimizer has no type: set it', 'optimizer = dict(_delete_=True, lr=0.1)',
        "optimizer = dict(_delete_=True, type='AdamW', lr=0.1)"),
    # Data
    one('unknown key data.sample_per_gpu; expected one of samples_per_gpu',
        'data = dict(sample_per_gpu=2)', 'data = dict(samples_per_gpu=2)'),
    one('5 is not a dict with a type', STEPS.format('5'),
        STEPS.format("dict(type='RandomFlip', prob=0.5)")),
    one("multiscale_mode='range' .* use ratio_range", STEPS.format(
        "dict(type='Resize', img_scale=[(64, 32), (128, 64)])"), STEPS.format(
        "dict(type='Resize', img_scale=(64, 32), ratio_range=(1.0, 2.0))")),
    one('MultiScaleFlipAug has no img_scale: set it', TEST.format(''),
        TEST.format('img_scale=(64, 32),')),
    one('setr_multi_scale is known in MultiScaleFlipAug only: remove it here', STEPS.format(
        "dict(type='SETR_Resize', img_scale=(64, 32), crop_size=(32, 32), setr_multi_scale=True)"),
        STEPS.format("dict(type='SETR_Resize', img_scale=(64, 32))")),
    # mmpretrain's ConvNeXt
    Case("kernel_size=5 is not supported: .*Remove it, or set kernel_size=7",
         MMPRETRAIN.format('kernel_size=5'), MMPRETRAIN.format('kernel_size=7')),
    Case("expected dict\\(depths=\\[...\\], channels", MMPRETRAIN.format('arch=dict(depths=[1])'),
         MMPRETRAIN.format('arch=dict(depths=[3, 3, 9, 3], channels=[96, 192, 384, 768])')),
    Case('Set layer_scale_init_value=0.0', MMPRETRAIN.format('use_grn=True'),
         MMPRETRAIN.format('use_grn=True, layer_scale_init_value=0.0')),
    Case("expected dict\\(type='Pretrained'", MMPRETRAIN.format("init_cfg=dict(type='Xavier')"),
         MMPRETRAIN.format("init_cfg=dict(type='Pretrained', checkpoint='a.pth')")),
    Case("has an argument 'depth'. Remove it", MMPRETRAIN.format('depth=3'),
         MMPRETRAIN.format("arch='tiny'")),
    Case("another class is meant, register it under another name, such as 'MyConvNeXt', and write "
         'that as type, with --trust --import MODULE',
         seg(OTHER.format('ConvNeXt')),
         {'old.py': seg(OTHER.format('AdvisedNeXt')), 'my_next.py': OWN_BACKBONE}, True,
         ['my_next.py']),
    # What is built
    Case('model.decode_head has no type, in this file and its bases: set it', {
        'old.py': seg("_base_ = ['./a.py']").replace(BASES, ''),
        'a.py': "model = dict(type='EncoderDecoder')\nrunner = dict(max_iters=9)\n"},
         {'old.py': seg(''), 'a.py': ''}),
    Case('decode_head.num_classes=150, but the dataset has 2 classes. Write 2 there',
         seg(DRIVE), seg(DRIVE.replace('150', '2'))),
    one('num_classes=3, but the dataset has 150 .* If these are not the classes of your data, name '
        'yours there', "model['decode_head']['num_classes'] = 3",
        "model['decode_head']['num_classes'] = 3\nclasses = ('a', 'b', 'c')\n"
        "model['auxiliary_head']['num_classes'] = 3\nreduce_zero_label = False"),
    one('pool_scale: .* Did you mean pool_scales', "model['decode_head']['pool_scale'] = (1, 2)",
        "model['decode_head']['pool_scales'] = (1, 2)"),
    one('set classes=.* once, at the top', "data = dict(train=dict(classes=('a', 'b')))",
        "classes = ('a', 'b')\nreduce_zero_label = False"),
    one('Write one of these lines at the top of the config', "classes = ('a', 'b')",
        "classes = ('a', 'b')\nreduce_zero_label = True"),
    Case('mmdet 3.x builds another transformer', """
_base_ = '../_base_/datasets/coco_detection.py'
model = dict(type='DETR', backbone=dict(type='ConvNeXt', arch='tiny', out_indices=[3]),
             bbox_head=dict(type='DETRHead', num_classes=80, transformer=dict(type='Mine')))
total_epochs = 12
""", """
_base_ = '../_base_/datasets/coco_detection.py'
layers = dict(attn_cfgs=dict(type='MultiheadAttention', embed_dims=64, num_heads=8),
              feedforward_channels=8)
model = dict(
    type='DETR', backbone=dict(type='ConvNeXt', arch='tiny', out_indices=[3]), bbox_head=dict(
        type='DETRHead', num_classes=80, in_channels=768, transformer=dict(
            type='Transformer', encoder=dict(num_layers=1, transformerlayers=layers),
            decoder=dict(num_layers=1, transformerlayers=layers, return_intermediate=True)),
        positional_encoding=dict(type='SinePositionalEncoding', num_feats=32, normalize=True)))
total_epochs = 12
""")]


@pytest.fixture(autouse=True)
def forget_own_parts():
    """What a test has imported and registered is not known to the next."""
    yield
    for name in [name for name in sys.modules if name.startswith('my_')]:
        del sys.modules[name]
    for known in (MODELS, DATASETS, TRANSFORMS, OPTIMIZERS, OPTIM_WRAPPER_CONSTRUCTORS):
        for name in [name for name in known.module_dict if name.startswith(('Advised', 'Ported'))]:
            del known.module_dict[name]


def write(files: str | dict[str, str], folder: Path) -> Path:
    """Write a case's files below ``folder``; return the config to convert."""
    for name, text in ({'old.py': files} if isinstance(files, str) else files).items():
        path = folder / 'configs/mine' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / 'configs/mine/old.py'


def refusal(case: Case, folder: Path, convert=conversion.migrate) -> UserError:
    """The error of the refused conversion."""
    old = write(case.before, folder)
    trust, imports = case.refused_with
    with pytest.raises(UserError, match=f'(?s){case.message}') as error:
        convert(old, old.with_name('new.py'), trust,
                [str(old.parent / name) for name in imports])
    assert not old.with_name('new.py').exists()
    return error.value


@pytest.mark.parametrize('case', CASES, ids=lambda case: case.message[:40])
def test_the_advice_works(case, tmp_path):
    refusal(case, tmp_path / 'before')
    old = write(case.after, tmp_path / 'after')
    conversion.migrate(old, old.with_name('new.py'), case.trust,
                       [str(old.parent / name) for name in case.imports])
    assert old.with_name('new.py').is_file()


ALONE = {
    'writing.py': ['would be overwritten', 'runs as it is'],
    'parsing.py': ['Config not found'],
    'conversion.py': ['has no config for mmcv', 'Please report this']}
"""Refusals without a config to repair; the tests below try them."""


def test_every_refusal_is_a_case(tmp_path):
    """Each ``raise UserError`` of the conversion is reached by a case, or stands in ALONE."""
    package = Path(convnext_mm.__file__).parent
    files = [*sorted((package / 'migration').glob('*.py')), package / 'engine/conversion.py']
    sites = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Raise) and 'UserError' in ast.unparse(node)[:20]:
                text = ast.unparse(node)
                if not any(known in text for known in ALONE.get(file.name, ())):
                    sites[f'{file.name}:{node.lineno}'] = text
    reached = set()
    for i, case in enumerate(CASES):
        error: BaseException | None = refusal(case, tmp_path / str(i))
        while error is not None:
            reached |= {f'{Path(frame.filename).name}:{frame.lineno}'
                        for frame in traceback.extract_tb(error.__traceback__)}
            error = error.__cause__
    missing = {site: text for site, text in sites.items() if site not in reached}
    assert not missing


def test_another_name_for_the_new_config(tmp_path):
    old = write(seg(''), tmp_path)
    with pytest.raises(UserError, match='would be overwritten: choose another name'):
        migrate(old, old)
    migrate(old, old.with_name('another.py'))


def test_a_config_that_runs_as_it_is_does(tmp_path):
    old = write(NEW.replace('mmpretrain.', ''), tmp_path)
    with pytest.raises(UserError, match=f'without conversion: python tools/train.py {old}'):
        migrate(old, old.with_name('new.py'))
    assert build_parts(read_config(str(old), notes=[])).optim_wrapper is not None


def test_a_path_or_folder_that_holds_a_config(tmp_path):
    old = write(seg('fp16 = None'), tmp_path)
    with pytest.raises(UserError, match='Config not found: .*absent.py'):
        migrate(old.with_name('absent.py'), tmp_path / 'new.py')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='has no config for mmcv'):
        conversion.migrate_folder(tmp_path / 'empty', tmp_path / 'new')
    assert '1 converted and built' in conversion.migrate_folder(tmp_path / 'configs',
                                                                tmp_path / 'new')
