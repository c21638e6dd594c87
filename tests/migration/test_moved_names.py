"""A module for mmcv 1.x is ported by the lines that the message gives."""
import re
import sys
from pathlib import Path

import pytest
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from mmseg.registry import DATASETS, MODELS, TRANSFORMS

from convnext_mm import UserError
from convnext_mm.engine.conversion import migrate
from convnext_mm.migration.moved_names import (
    BUILDERS,
    GONE,
    PLACES,
    REGISTRIES,
    RENAMED,
    TOOLBOX_PLACES,
    _exists,
    find_changes,
    find_name,
)

CONFIG = '''_base_ = ['../_base_/models/upernet_convnext.py', '../_base_/datasets/ade20k.py',
          '../_base_/default_runtime.py', '../_base_/schedules/schedule_160k.py']
model = dict(backbone=dict(_delete_=True, type='MovedBackbone', width=8),
             decode_head=dict(in_channels=[8, 8, 8, 8], channels=8),
             auxiliary_head=dict(in_channels=8, channels=8))
optimizer = dict(_delete_=True, type='AdamW', lr=1e-4, constructor='MovedConstructor')
'''
BACKBONE = '''"""A backbone as it was written for mmcv 1.x."""
import mmcv
import torch.nn as nn
from mmcv.cnn import ConvModule, build_norm_layer
from mmcv.runner import (BaseModule, auto_fp16,
                         force_fp32)
from mmcv_custom import load_checkpoint
from ..builder import BACKBONES, build_loss
from mmseg.ops import resize as resized
from mmseg.utils import get_root_logger


@BACKBONES.register_module()
class MovedBackbone(BaseModule):
    def __init__(self, width, init_cfg=None):
        super().__init__(init_cfg)
        self.conv, naïve = ConvModule(3, width, 4, 4), get_root_logger(log_level='INFO')
        self.loss = build_loss(dict(type='CrossEntropyLoss'))
        self.norm = build_norm_layer(dict(type='BN'), width)[1]
        self.cfg = mmcv.Config(dict(a=1))

    def init_weights(self, pretrained=None):
        logger = get_root_logger()
        if pretrained:
            load_checkpoint(self, pretrained, strict=False, logger=logger)

    @force_fp32(apply_to=('x', ))
    @auto_fp16()
    def forward(self, x):
        x = self.norm(self.conv(x))
        return tuple(resized(x, scale_factor=1 / 2**i) for i in range(4))
'''
CONSTRUCTOR = '''from mmcv.runner import OPTIMIZER_BUILDERS, DefaultOptimizerConstructor
from mmcv.runner import get_dist_info


@OPTIMIZER_BUILDERS.register_module()
class MovedConstructor(DefaultOptimizerConstructor):
    def add_params(self, params, module, prefix='', is_dcn_module=None):
        assert get_dist_info()[1] == 1
        params += [dict(params=[one]) for one in module.parameters()]
'''
LINE = re.compile(r'  lines? (\d+)(?:-(\d+))?: .*? → (.*?)(?:  \(.*\))?')


@pytest.fixture(autouse=True)
def forget_own_parts():
    yield
    for name in [name for name in sys.modules if name.startswith('moved_of_')]:
        del sys.modules[name]
    for known in (MODELS, DATASETS, TRANSFORMS, OPTIM_WRAPPER_CONSTRUCTORS):
        for name in [name for name in known.module_dict if name.startswith('Moved')]:
            del known.module_dict[name]


def follow(message: str) -> list[Path]:
    """Replace the lines that a message names, as a user would; returns the files."""
    files: dict[Path, list[tuple[int, int, str]]] = {}
    path = Path()
    for line in message.splitlines():
        if line.startswith('/') and line.endswith('.py:'):
            path = Path(line[:-1])
        elif match := LINE.fullmatch(line):
            files.setdefault(path, []).append((int(match[1]), int(match[2] or match[1]), match[3]))
    for path, changes in files.items():
        lines = path.read_text().splitlines()
        for first, last, new in sorted(changes, reverse=True):
            indent = lines[first - 1][:len(lines[first - 1]) - len(lines[first - 1].lstrip())]
            lines[first - 1:last] = [] if new == 'remove it' else [indent + new]
        path.write_text('\n'.join(lines) + '\n')
    return list(files)


def write(folder: Path, **files: str) -> list[str]:
    for name, text in files.items():
        (folder / f'{name}.py').write_text(text)
    return [str(folder / f'{name}.py') for name in files]


def test_a_repository_of_mmcv_1_is_converted_by_following_the_messages(tmp_path):
    config, *modules = write(tmp_path, old=CONFIG, moved_of_backbone=BACKBONE,
                             moved_of_constructor=CONSTRUCTOR)
    for module in modules:
        with pytest.raises(UserError, match='It is for mmcv 1.x. Change these lines') as error:
            migrate(config, tmp_path / 'new.py', True, modules)
        assert follow(str(error.value)) == [Path(module)]
    migrate(config, tmp_path / 'new.py', True, modules)  # builds the model and its groups
    text = Path(modules[0]).read_text()
    for line in ('from mmengine.model import BaseModule\n', '@MODELS.register_module()\n',
                 '        self.cfg = mmengine.config.Config(dict(a=1))\n',
                 'naïve = ConvModule(3, width, 4, 4), MMLogger.get_current_instance()\n',
                 'from mmseg.models.utils import resize as resized\n',
                 "        self.loss = MODELS.build(dict(type='CrossEntropyLoss'))\n"):
        assert line in text
    assert not re.search('fp16|fp32', text)


def test_a_module_of_a_fork_is_imported_alone(tmp_path):
    config, module = write(tmp_path, old=CONFIG, moved_of_fork=(
        'from ..builder import DATASETS, HEADS, NOWHERE\nfrom .custom import CustomDataset\n'))
    with pytest.raises(UserError, match='from mmseg.registry import DATASETS, MODELS; '
                       'from ..builder import NOWHERE  \\(NOWHERE is not found any more: replace it'
                       '\\)\n.*import BaseSegDataset  \\(CLASSES and PALETTE become METAINFO'):
        migrate(config, tmp_path / 'new.py', True, [module])


def test_the_files_of_a_package_of_ones_own(tmp_path, monkeypatch):
    """Of ``mmcv_custom``, only what is still imported has to be ported."""
    custom = tmp_path / 'mmcv_custom'
    custom.mkdir()
    write(custom, __init__='from mmcv.runner import get_dist_info\nfrom .own import own\n',
          own='own = 1\n')
    config, one, other = write(
        tmp_path, old=CONFIG, moved_of_one='from mmcv_custom import load_checkpoint\n',
        moved_of_other='from mmcv_custom import own\n')
    monkeypatch.chdir(tmp_path)
    for module, file in ((one, Path(one)), (other, custom / '__init__.py')):
        with pytest.raises(UserError) as error:
            migrate(config, tmp_path / 'new.py', True, [module])
        assert [line[:-1] for line in str(error.value).splitlines() if line.endswith('.py:')] == [
            str(file)]


@pytest.mark.parametrize(('text', 'message'), [
    ('import no_such_package.part\n', 'Install no_such_package, or start the command in the fold'),
    ("from mmseg.registry import MODELS\nMODELS.register_module(module=dict, name='UPerHead')\n",
     'Write register_module\\(force=True\\) there if yours is meant, or give it another name'),
    ('1 / 0\n', 'ZeroDivisionError.*BaseModule is in mmengine.model')])
def test_other_errors_of_a_module(text, message, tmp_path):
    config, module = write(tmp_path, old=CONFIG, moved_of_error=text)
    with pytest.raises(UserError, match=message):
        migrate(config, tmp_path / 'new.py', True, [module])


def test_what_is_still_there_is_not_changed(tmp_path):
    file = tmp_path / 'a.py'
    file.write_text('import mmcv\nimport mmcv.ops\nimport mmseg.models.utils\n'
                    'from mmcv.cnn import ConvModule\nfrom mmcv.ops import nms as suppress\n'
                    'from mmseg.registry import MODELS\nfrom .own import thing\nimport torch\n'
                    'mmcv.imread("a.png")\nmmseg.models.utils.resize\nmmcv.unknown.thing\n')
    assert find_changes(file, 'mmseg') == []
    file.write_text('def broken(\n')
    assert find_changes(file, 'mmseg') == []


@pytest.mark.parametrize('scope', TOOLBOX_PLACES)
def test_every_advised_name_is_there(scope):
    for place in (*PLACES, *(f'{scope}.{place}' for place in TOOLBOX_PLACES[scope])):
        assert _exists(place), place
    for name in (*REGISTRIES, *BUILDERS, *RENAMED, 'CustomDataset', 'BaseModule', 'accuracy'):
        place = find_name(name, scope)
        assert place is not None, name
        assert _exists(place.module, place.name.partition('.')[0]), name
    for name in GONE:
        assert find_name(name, scope).module == ''
    assert find_name('ATTENTION', scope).module == ROOT_MODELS.scope + '.registry'


def test_mmdets_names():
    for name, module in (('bbox2roi', 'structures.bbox'), ('BitmapMasks', 'structures.mask'),
                         ('multiclass_nms', 'models.layers'), ('reduce_mean', 'utils'),
                         ('HEADS', 'registry')):
        assert find_name(name, 'mmdet').module == f'mmdet.{module}'
    assert find_name('InstanceData', 'mmdet').module == 'mmengine.structures'
