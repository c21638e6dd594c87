"""The effect of each patch of another package, with and without it."""
import ast
import json
import pickle
import sys

import pytest
import torch

from convnext_mm import UserError, patches
from tests.helpers import (
    DEMO_DETECTION,
    DEMO_SEGMENTATION,
    ROOT,
    SEGMENTATION,
    operators_are_compiled,
    run_tool,
)


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


OBSERVE = """
import json
import sys
folder, modules = sys.argv[1], sys.argv[2:]
for name in modules:
    __import__(name)
from mmengine.config import Config
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, RUNNERS, init_default_scope
from mmengine.runner import CheckpointLoader
from convnext_mm.engine.fallbacks import adapt_to_device

seen = {}
cfg = Config.fromfile(f'{folder}/custom.py')
seen['classes of a config file'] = cfg.model.decode_head.num_classes
try:
    CheckpointLoader.load_checkpoint(f'{folder}/evil.pth')
    seen['checkpoint with code'] = 'loaded'
except Exception as error:
    seen['checkpoint with code'] = type(error).__name__
adapt_to_device(cfg)
cfg.work_dir = f'{folder}/run'
cfg.model.backbone.update(depths=[1, 1, 1, 1], dims=[8, 8, 8, 8], init_cfg=None)
cfg.model.decode_head.update(in_channels=[8, 8, 8, 8], channels=8)
cfg.model.auxiliary_head.update(in_channels=8)
runner = RUNNERS.build(cfg)  # as mmseg's tools/train.py does with a runner_type
seen['classes in training'] = runner.model.decode_head.num_classes
for scope in ('mmseg', 'mmdet'):
    init_default_scope(scope)
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.get(f'{scope}.LearningRateDecayOptimizerConstructor')
    seen[f'constructor in {scope}'] = constructor.__module__.split('.')[0]
print(json.dumps(seen))
"""
TOOLBOX_FIRST = ('mmseg.engine.optimizers', 'convnext_mm')
TOOLBOX_LAST = ('convnext_mm', 'mmseg.engine.optimizers', 'mmdet.engine.optimizers')


@pytest.mark.slow
@pytest.mark.parametrize(('chosen', 'modules', 'classes', 'checkpoint', 'constructors'), [
    (None, TOOLBOX_FIRST, 2, 'UserError', 'ours'), (None, TOOLBOX_LAST, 2, 'UserError', 'ours'),
    ('none', TOOLBOX_LAST, 150, 'loaded', 'theirs'),
    ('config', ['convnext_mm'], 2, 'loaded', 'theirs'),
    ('checkpoints,constructors', ['convnext_mm'], 150, 'UserError', 'ours')])
def test_effect_of_patches(chosen, modules, classes, checkpoint, constructors, tmp_path):
    (tmp_path / 'custom.py').write_text(f"_base_ = '{ROOT}/{SEGMENTATION}'\ndata_root = 'mine'\n"
                                        "classes = ('road', 'car')\nreduce_zero_label = False\n")
    proof = tmp_path / 'proof'
    torch.save(dict(state_dict=dict(a=torch.ones(1)), code=Code(proof)), tmp_path / 'evil.pth',
               pickle_module=pickle)
    if chosen is not None and not operators_are_compiled():  # mmdet cannot be imported without
        chosen = f'{chosen},operators'
    env = {} if chosen is None else {patches.SWITCH: chosen}
    if checkpoint == 'loaded':  # without the patch, the default of this PyTorch decides
        env['TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'] = '1'
    done = run_tool(sys.executable, '-c', OBSERVE, tmp_path, *modules, env=env)
    assert json.loads(done.stdout.splitlines()[-1]) == {
        'classes of a config file': classes, 'checkpoint with code': checkpoint,
        'classes in training': 2,  # the Runner completes configs without a patch
        'constructor in mmseg': 'convnext_mm' if constructors == 'ours' else 'mmseg',
        'constructor in mmdet': 'convnext_mm' if constructors == 'ours' else 'mmdet'}
    assert proof.exists() == (checkpoint == 'loaded')


@pytest.mark.parametrize(('source', 'name'), [
    ('a.pth', 'load_from_local'), ('https://x/a.pth', 'load_from_http'),
    ('torchvision://resnet50', 'load_from_torchvision'), ('open-mmlab://a', 'load_from_openmmlab')])
def test_loaders_of_checkpoints_keep_the_names_that_mmengine_logs(source, name):
    from mmengine.runner import CheckpointLoader
    loader = CheckpointLoader._get_checkpoint_loader(source)
    assert (loader.__name__, loader.reads_only_weights) == (name, True)


def test_patching_twice_changes_nothing():
    from mmengine.config import Config
    from mmengine.runner import CheckpointLoader
    before = Config.__init__, dict(CheckpointLoader._schemes)
    patches.apply()
    assert (Config.__init__, dict(CheckpointLoader._schemes)) == before


def test_an_unknown_patch_is_an_error(monkeypatch):
    monkeypatch.setenv(patches.SWITCH, 'confg')
    with pytest.raises(UserError, match=r"unknown patch 'confg'. Did you mean config\?"):
        patches.apply()


@pytest.mark.parametrize('path', [DEMO_SEGMENTATION, DEMO_DETECTION])
def test_completing_twice_changes_nothing(path):
    from mmengine.config import Config

    from convnext_mm.datasets import complete_config
    from convnext_mm.engine.speed import apply_fast
    cfg = Config.fromfile(path)
    once = cfg.to_dict()
    complete_config(cfg)
    apply_fast(cfg)
    assert cfg.to_dict() == once


def test_no_module_is_patched_elsewhere():
    """Only patches.py assigns to attributes of imported classes and modules."""
    found, files = {}, 0
    for file in (ROOT / 'convnext_mm').rglob('*.py'):
        if '.mim' in file.parts or file.name == 'patches.py':
            continue
        files += 1
        tree = ast.parse(file.read_text(encoding='utf-8'))
        imported = {alias.asname or alias.name.split('.')[0] for node in ast.walk(tree)
                    if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else ()
            for target in targets:
                while isinstance(target, (ast.Attribute, ast.Subscript)):
                    inner = target.value
                    if (isinstance(inner, ast.Name) and inner.id in imported
                            and inner.id[0].isupper()):
                        found[f'{file.name}:{node.lineno}'] = ast.unparse(node)
                    target = inner
    assert files > 30
    assert found == {}


def test_all_patches_are_documented():
    assert [name for name in patches.PATCHES if f'``{name}``' not in patches.__doc__] == []
    assert all('Without the patch' in patch.__doc__ for patch in patches.PATCHES.values())
