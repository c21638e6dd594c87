"""Each patch of another package: what a user gets with it, and what happens without."""
import pickle

import pytest
import torch

from convnext_mm import UserError, patches
from tests.helpers import DEMO_DETECTION, DEMO_SEGMENTATION, ROOT, SEGMENTATION, run_tool


def run_python(tmp_path, script: str, chosen: str | None = None) -> str:
    """What a script prints in a process of its own, with CONVNEXT_MM_PATCHES=chosen."""
    (tmp_path / 'script.py').write_text(script)
    env = {} if chosen is None else {patches.SWITCH: chosen}
    done = run_tool(tmp_path / 'script.py', env={'PYTHONPATH': str(ROOT), **env})
    return done.stdout.splitlines()[-1]


COMPLETED = """
from mmengine.config import Config
import convnext_mm
print(Config.fromfile({path!r}).model.decode_head.num_classes)
"""


@pytest.fixture
def mine(tmp_path) -> str:
    """A recipe with two classes of a user."""
    path = tmp_path / 'mine.py'
    path.write_text(f"_base_ = '{ROOT}/{SEGMENTATION}'\ndata_root = 'mine'\n"
                    "classes = ('road', 'car')\n")
    return str(path)


@pytest.mark.parametrize(('chosen', 'classes'), [
    (None, '2'), ('config', '2'), ('checkpoints,constructors', '150'), ('none', '150')])
def test_config_files_are_completed_for_inferencers(chosen, classes, mine, tmp_path):
    assert run_python(tmp_path, COMPLETED.format(path=mine), chosen) == classes


TRAINED = """
from mmengine.config import Config
from mmengine.registry import RUNNERS
import convnext_mm
from convnext_mm.engine.fallbacks import adapt_to_device
cfg = Config.fromfile({path!r})
adapt_to_device(cfg)
cfg.work_dir = {work_dir!r}
cfg.model.backbone.update(depths=[1, 1, 1, 1], dims=[8, 8, 8, 8], init_cfg=None)
cfg.model.decode_head.update(in_channels=[8, 8, 8, 8], channels=8)
cfg.model.auxiliary_head.update(in_channels=8)
runner = RUNNERS.build(cfg)  # as mmseg's tools/train.py does where a config has a runner_type
print(runner.model.decode_head.num_classes)
"""


@pytest.mark.parametrize('chosen', [None, 'none'])
def test_training_completes_configs_without_a_patch(chosen, mine, tmp_path):
    script = TRAINED.format(path=mine, work_dir=str(tmp_path / 'run'))
    assert run_python(tmp_path, script, chosen) == '2'


class Code:
    """Writes a file when it is unpickled."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


LOADED = """
import convnext_mm
from mmengine.runner import CheckpointLoader
try:
    CheckpointLoader.load_checkpoint({path!r})
except Exception as error:
    print(type(error).__name__)
else:
    print('loaded')
"""


@pytest.mark.parametrize(('chosen', 'outcome'), [
    (None, 'UserError'), ('checkpoints', 'UserError'), ('config', 'loaded')])
def test_checkpoints_execute_nothing(chosen, outcome, tmp_path):
    path, proof = tmp_path / 'evil.pth', tmp_path / 'proof'
    torch.save(dict(state_dict=dict(a=torch.ones(1)), code=Code(proof)), path,
               pickle_module=pickle)
    # Without the patch the file is read as mmengine reads it: this PyTorch's default decides.
    env = {} if outcome == 'UserError' else {'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD': '1'}
    script = tmp_path / 'script.py'
    script.write_text(LOADED.format(path=str(path)))
    done = run_tool(script, env={'PYTHONPATH': str(ROOT), **env,
                                 **({} if chosen is None else {patches.SWITCH: chosen})})
    assert done.stdout.splitlines()[-1] == outcome
    assert proof.exists() == (outcome == 'loaded')


FOUND = """
import convnext_mm
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, init_default_scope
{before}
owners = []
for scope in ('mmseg', 'mmdet'):
    init_default_scope(scope)
    kind = OPTIM_WRAPPER_CONSTRUCTORS.get(f'{{scope}}.LearningRateDecayOptimizerConstructor')
    owners.append(kind.__module__.split('.')[0])
print(*owners)
"""


@pytest.mark.parametrize('before', ['', 'import mmseg.engine.optimizers, mmdet.engine.optimizers'])
@pytest.mark.parametrize(('chosen', 'owners'), [
    (None, 'convnext_mm convnext_mm'), ('constructors', 'convnext_mm convnext_mm'),
    ('none', 'mmseg mmdet')])
def test_whose_constructor_a_name_finds(chosen, owners, before, tmp_path):
    assert run_python(tmp_path, FOUND.format(before=before), chosen) == owners


def test_patching_twice_changes_nothing():
    from mmengine.config import Config
    from mmengine.runner import CheckpointLoader
    before = Config.__init__, dict(CheckpointLoader._schemes)
    patches.apply()
    assert (Config.__init__, dict(CheckpointLoader._schemes)) == before


def test_an_unknown_patch_is_named(monkeypatch):
    monkeypatch.setenv(patches.SWITCH, 'confg')
    with pytest.raises(UserError, match=r"unknown patch 'confg'. Did you mean config\?"):
        patches.apply()


@pytest.mark.parametrize('path', [DEMO_SEGMENTATION, DEMO_DETECTION])
def test_completing_twice_changes_nothing(path):
    from mmengine.config import Config

    from convnext_mm.datasets import complete
    from convnext_mm.engine.speed import apply_fast
    cfg = Config.fromfile(path)
    once = cfg.to_dict()
    complete(cfg)
    apply_fast(cfg)
    assert cfg.to_dict() == once


def test_no_module_is_patched_elsewhere():
    """Assignments to attributes of imported classes and modules stand in patches.py alone."""
    import ast
    found = {}
    for file in (ROOT / 'convnext_mm').rglob('*.py'):
        if '.mim' in file.parts or file.name == 'patches.py':
            continue
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
    assert found == {}


def test_all_patches_are_documented():
    assert [name for name in patches.PATCHES if f'``{name}``' not in patches.__doc__] == []
    assert all('Without the patch' in patch.__doc__ for patch in patches.PATCHES.values())
