"""Which operators mmcv gets: its compiled ones, ours, or an error that says how to get one."""
import os
import shutil
import subprocess
import sys

import pytest
import torch

from convnext_mm import UserError
from convnext_mm.ops import extension
from tests.helpers import ROOT
from tests.ops.extensions import COMPILED, OURS, needs_compiled

SCRIPT = """
import sys
from convnext_mm.ops import extension
{}
assert 'mmcv._ext' not in sys.modules and 'mmcv.ops' not in sys.modules
import mmdet.apis, mmseg.apis, mmcv.ops
print(mmcv.ops.get_compiler_version())
"""
HIDE = """
import types
extension.PathFinder = types.SimpleNamespace(find_spec=lambda name, path: None)
"""
BREAK = """
import importlib.machinery, os, tempfile
file = os.path.join(tempfile.mkdtemp(), '_ext.so')
open(file, 'w').close()
loader = importlib.machinery.ExtensionFileLoader('mmcv._ext', file)
spec = importlib.machinery.ModuleSpec('mmcv._ext', loader, origin=file)
import types
extension.PathFinder = types.SimpleNamespace(find_spec=lambda name, path: spec)
"""
LATE = """
import importlib.machinery, site, sys
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *args: None if name == 'mmcv._ext' else find(name, *args))
site.addsitedir(sys.argv[1])  # as Python does with site-packages when it starts
assert not {'convnext_mm', 'torch'} & sys.modules.keys()
import mmdet.apis, mmcv.ops
print(mmcv.ops.get_compiler_version())
"""


def run(change='', patches=None):
    env = {} if patches is None else dict(CONVNEXT_MM_PATCHES=patches)
    return subprocess.run([sys.executable, '-W', 'ignore', '-c', SCRIPT.format(change)], cwd=ROOT,
                          env={**os.environ, **env}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(('change', 'message'), [
    (HIDE, "mmcv has no compiled operators: convnext_mm's in PyTorch are used"),
    (BREAK, r'_ext.so: file too short): ')])
def test_toolboxes_are_imported_without_compiled_operators(change, message):
    done = run(change)
    assert done.returncode == 0, done.stderr
    log = done.stdout + done.stderr
    assert log.count("convnext_mm's in PyTorch are used") == 1
    assert message in log
    assert 'not compiled' in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(('patches', 'found'), [('operators', True), ('none', False)])
def test_a_script_that_does_not_import_this_package(tmp_path, patches, found):
    from setup import STARTUP
    shutil.copy(ROOT / STARTUP, tmp_path)
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', LATE, tmp_path], cwd=ROOT,
                          env={**os.environ, 'CONVNEXT_MM_PATCHES': patches}, capture_output=True,
                          text=True)
    assert (done.returncode == 0) == found, done.stderr
    assert 'not compiled' in done.stdout if found else "'mmcv._ext'" in done.stderr


@pytest.mark.slow
@needs_compiled
def test_compiled_operators_are_preferred():
    done = run()
    assert "mmcv's compiled operators are used" in done.stdout + done.stderr
    assert 'not compiled' not in done.stdout


@pytest.mark.slow
def test_the_patch_can_be_switched_off():
    done = run(HIDE, patches='checkpoints')
    assert ('mmcv._ext' in done.stderr) == (COMPILED is None)


def test_a_missing_operator_is_named_when_it_is_called():
    assert hasattr(OURS, 'nms_rotated')  # mmcv asks on import
    with pytest.raises(UserError, match=r'operator nms_rotated exists only compiled.*--ops comp'):
        OURS.nms_rotated(torch.zeros(1, 5))
    with pytest.raises(AttributeError):
        OURS.__wrapped__  # noqa: B018


def test_helpers_are_not_operators():
    with pytest.raises(UserError, match='operator separate exists only compiled'):
        OURS.separate()
    assert 'Tensor' not in vars(OURS)


def test_signatures_are_those_that_mmcv_calls():
    """mmcv passes keywords, so the names of the arguments are part of the interface."""
    import ast
    import inspect
    from pathlib import Path

    import mmcv.ops
    checked = set()
    for file in Path(mmcv.ops.__file__).parent.glob('*.py'):
        for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                    and isinstance(node.func.value, ast.Name)
                    and node.func.value.id == 'ext_module' and node.func.attr in vars(OURS)):
                continue
            if any(k.arg is None for k in node.keywords) or any(
                    isinstance(a, ast.Starred) for a in node.args):
                continue
            operator = getattr(OURS, node.func.attr)
            inspect.signature(operator).bind(*node.args, **{k.arg: 0 for k in node.keywords})
            checked.add(node.func.attr)
    assert checked >= {'nms', 'roi_align_forward', 'roi_align_backward', 'roi_pool_forward',
                       'deform_conv_forward', 'ms_deform_attn_backward', 'carafe_backward',
                       'sigmoid_focal_loss_backward', 'psamask_forward', 'masked_im2col_forward'}


def test_other_modules_are_found_elsewhere():
    assert extension.ExtensionFinder().find_spec('mmcv.ops', None) is None
    assert extension.ExtensionFinder().find_spec('mmcv._extra', None) is None
