"""Commands import what they need, after what they can tell without it."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from convnext_mm import cli
from tests.helpers import DEMO_SEGMENTATION, ROOT, SMALL_SEGMENTATION

SLOW = {'torch', 'mmcv', 'mmengine', 'mmseg', 'mmdet', 'matplotlib', 'pycocotools', 'numpy', 'cv2'}
RECIPE = 'upernet_convnext_tiny_512_160k_ade20k'
SCRIPT = """
import json, runpy, sys
path, script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
try:
    if script.endswith('.py'):
        runpy.run_path(script, run_name='__main__')
    else:
        import convnext_mm_command
        convnext_mm_command.main()
finally:
    with open(path, 'w') as file:
        json.dump(list(sys.modules), file)
"""


class Run(NamedTuple):
    """A process that has ended.

    Args:
        status: Its exit status.
        text: What it printed.
        modules: What it had imported.
    """

    status: int
    text: str
    modules: set[str]

    def imported(self, *names: str) -> list[str]:
        """Those of some modules that were imported, or a module below them."""
        return [name for name in names
                if any(f'{one}.'.startswith(f'{name}.') for one in self.modules)]


def run(folder: Path, *args: object, cwd: Path = ROOT) -> Run:
    """Run a script of tools/, or convnext-mm, in a process of its own."""
    modules = folder / 'modules.json'
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, modules, *map(str, args)], cwd=cwd, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, 'PYTHONPATH': f'{ROOT}:{folder}', 'COLUMNS': '200'})
    return Run(done.returncode, done.stdout, set(json.loads(modules.read_text())))


@pytest.mark.parametrize('command', cli.COMMANDS)
def test_help_needs_nothing_slow(command, tmp_path):
    done = run(tmp_path, 'convnext-mm', command, '--help')
    assert done.status == 0
    assert done.text.startswith(f'usage: convnext-mm {command}')
    assert done.imported(*SLOW) == []


def test_the_list_of_commands_needs_nothing_slow(tmp_path):
    done = run(tmp_path, 'convnext-mm', '--help')
    assert done.status == 0
    assert done.imported(*SLOW) == []


@pytest.mark.parametrize('script', sorted(
    path.name for path in (ROOT / 'tools').glob('*.py')
    # They take no arguments, or need the packages that they show.
    if path.name not in ('demo.py', '_torchrun.py', 'onnx_demo.py')))
def test_help_of_scripts_needs_nothing_slow(script, tmp_path):
    done = run(tmp_path, f'tools/{script}', '--help')
    assert done.status == 0
    assert done.text.startswith(f'usage: {script}')
    assert done.imported(*SLOW) == []


@pytest.mark.parametrize(('arguments', 'message'), [
    (['train', RECIPE, '--rezume'], 'unrecognized arguments: --rezume'),
    (['train', RECIPE, '--cfg-options', 'a'], "expected KEY=VALUE, got 'a'"),
    *((command, f'Config not found: {ROOT}/{RECIPE[:-1]}\n'
       f'Did you mean configs/{RECIPE}.py') for command in (
        ['train', RECIPE[:-1]], ['check', RECIPE[:-1]], ['test', RECIPE[:-1], 'a.pth'],
        ['predict', 'docs', RECIPE[:-1], 'a.pth'], ['export', RECIPE[:-1], 'a.pth'],
        ['prune', RECIPE[:-1], 'a.pth', '--flops', '0.5'], ['migrate', RECIPE[:-1]],
        ['table', RECIPE[:-1]],
        ['convert-data', 'a', 'b', '--colors', RECIPE[:-1]])),
    (['web-demo', RECIPE, 'absent.pth'], f'Checkpoint not found: {ROOT}/absent.pth'
     if find_spec('gradio') else "pip install 'convnext-mm[web]'"),
    (['prune', RECIPE, 'a.pth'], 'nothing to prune'),
    (['export', RECIPE, 'a.pth', '--to', 'aoti'], 'add --size WxH'),
    (['test', RECIPE, 'absent.pth'], f'Checkpoint not found: {ROOT}/absent.pth'),
    (['predict', 'docs', RECIPE, 'docs'], f'Checkpoint is a folder: {ROOT}/docs'),
    (['convert', 'absent.pth', 'b.pth'], f'Checkpoint not found: {ROOT}/absent.pth'),
    (['predict', 'absent.jpg', RECIPE, 'a.pth'], f'No image found: {ROOT}/absent.jpg'),
    (['browser-demo', 'a.onnx', '--images', 'absent.jpg'], f'No image found: {ROOT}/absent.jpg')])
def test_mistakes_are_told_before_anything_slow_is_imported(arguments, message, tmp_path):
    done = run(tmp_path, 'convnext-mm', *arguments)
    assert done.status == 2
    assert message in done.text
    assert done.imported(*SLOW) == []


def test_a_syntax_error_is_told_before_anything_slow_is_imported(tmp_path):
    config = tmp_path / 'broken.py'
    config.write_text('model = dict(\n')
    done = run(tmp_path, 'tools/train.py', config)
    assert done.status == 2
    assert f"Config {config} cannot be read: SyntaxError: '(' was never closed" in done.text
    assert done.imported(*SLOW) == []


def test_choosing_needs_nothing_slow(tmp_path):
    done = run(tmp_path, 'convnext-mm', 'choose', '--task', 'seg')
    assert done.status == 0
    assert 'upernet_convnext' in done.text
    assert done.imported(*SLOW) == []


def test_splitting_needs_no_pytorch(tmp_path):
    (tmp_path / 'images').mkdir()
    for i in range(4):
        Image.new('RGB', (8, 8), (60 * i, 0, 0)).save(tmp_path / 'images' / f'{i}.png')
    done = run(tmp_path, 'convnext-mm', 'split-data', tmp_path / 'images', tmp_path / 'lists')
    assert done.status == 0
    assert (tmp_path / 'lists' / 'train.txt').is_file()
    assert done.imported('torch', 'mmcv', 'mmseg', 'mmdet') == []


def test_converting_a_checkpoint_needs_no_toolbox(tmp_path):
    torch.save(dict(weight=torch.ones(2)), tmp_path / 'a.pth')
    done = run(tmp_path, 'convnext-mm', 'convert', tmp_path / 'a.pth', tmp_path / 'b.safetensors')
    assert done.status == 0
    assert (tmp_path / 'b.safetensors').is_file()
    assert done.imported('mmcv', 'mmseg', 'mmdet', 'mmengine.runner', 'convnext_mm.backbone') == []


def test_training_registers_the_package_and_imports_no_deployment(demo_data, tmp_path):
    # A module of the user's own that finds the package as it is elsewhere.
    (tmp_path / 'own_module.py').write_text(
        'from mmengine.registry import MODELS\n'
        'from convnext_mm import ConvNeXt, __version__\n'
        'from convnext_mm.backbone import ConvNeXt as same\n'
        "assert ConvNeXt is same is MODELS.get('ConvNeXt')\n"
        "print('own module of', __version__)\n")
    config = tmp_path / 'mine.py'
    config.write_text(f'_base_ = {str(ROOT / DEMO_SEGMENTATION)!r}\n'
                      "custom_imports = dict(imports=['convnext_mm', 'own_module'])\n")
    done = run(tmp_path, ROOT / 'tools/train.py', config, '--dry-run', '--cfg-options',
               *SMALL_SEGMENTATION, f'data_root={demo_data}/ADEChallengeData2016', cwd=tmp_path)
    assert done.status == 0, done.text
    assert 'own module of' in done.text
    assert done.imported('convnext_mm.registration', 'convnext_mm.patches') == [
        'convnext_mm.registration', 'convnext_mm.patches']
    package = 'convnext_mm.deployment.'
    assert {one for one in done.modules if one.startswith(package)} == {
        f'{package}arguments', f'{package}optional'}
    assert done.imported(
        'convnext_mm.web_demo', 'convnext_mm.prediction',
        'convnext_mm.engine.conversion', 'convnext_mm.migration.writing',
        'convnext_mm.checkpoints.export', 'convnext_mm.model_tables', 'gradio', 'onnx',
        'onnxruntime', 'openvino') == []
