"""tools/install.py and the Makefile, without installing anything."""
import importlib.util
import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT


@pytest.fixture
def install(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    spec = importlib.util.spec_from_file_location('install', ROOT / 'tools' / 'install.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_stacks_share_no_distribution(install):
    def names(stack):
        return {requirement.split('>')[0].split('<')[0] for requirement in stack.values()}
    assert not names(install.FORKS) & names(install.OPENMMLAB)
    assert {'mmcv', 'mmengine', 'mmseg', 'mmdet'} <= install.FORKS.keys() & install.OPENMMLAB.keys()


def test_every_requirement_has_an_upper_bound(install):
    from setup import EXTRAS
    for extra, requirements in EXTRAS.items():
        assert all('<' in requirement for requirement in [install.TORCH, *requirements]), extra


def test_segmentation_extras_are_the_stacks_without_mmdet(install):
    from setup import EXTRAS
    for extra, stack in (('forks', install.FORKS), ('openmmlab', install.OPENMMLAB)):
        assert {*EXTRAS[extra]} - {*EXTRAS[f'{extra}-seg']} == {stack['mmdet']}


@pytest.mark.parametrize(('distribution', 'stack'), [
    ('onedl-mmcv', 'forks'), ('mmcv-lite', 'openmmlab'),
    ('mmcv', 'openmmlab'), ('torch', None)])
def test_stack_of_an_environment(install, monkeypatch, distribution, stack):
    monkeypatch.setattr(install, 'installed', lambda python, name: name == distribution)
    assert install.stack_of('python') == stack


def test_default_torch_version_is_supported(install):
    assert install.torch_requirement(install.TORCH_TESTED) == f'torch=={install.TORCH_TESTED}'


@pytest.mark.parametrize('end', [0, 1])
def test_torch_version_outside_of_the_range_is_an_error(install, end):
    major, minor = re.findall(r'(\d+)\.(\d+)', install.TORCH)[end]
    unsupported = f'{major}.{int(minor) - 1}.0' if end == 0 else f'{major}.{minor}.0'
    with pytest.raises(install.Failed, match=rf'PyTorch {unsupported} is not supported'):
        install.torch_requirement(unsupported)


@pytest.mark.parametrize('text', ['2.6', 'nightly', '2.6.0+cpu'])
def test_torch_version_of_another_form_is_an_error(install, text):
    with pytest.raises(install.Failed, match=r'expected a version such as 2\.'):
        install.torch_requirement(text)


@pytest.mark.skipif(not shutil.which('make'), reason='needs make')
@pytest.mark.parametrize(('variables', 'options'), [
    ([], '--stack auto'),
    (['STACK=openmmlab', 'TORCH=2.6.0'], '--stack openmmlab --torch 2.6.0'),
    (['OPS=compiled'], '--stack auto --ops compiled'),
    (['SEGMENTATION_ONLY=1'], '--stack auto --segmentation-only')])
def test_make_passes_its_variables_on(variables, options, tmp_path):
    # Variables of the make that runs the tests must not reach this one.
    printed = subprocess.run(['make', '--dry-run', 'lint', f'VENV={tmp_path}', *variables],
                             env={'PATH': os.environ['PATH']}, cwd=ROOT, capture_output=True,
                             text=True, check=True).stdout
    command = printed.replace('\\\n', ' ').splitlines()[0].split()
    assert command == ['python3', 'tools/install.py', *options.split(), '--tests']


def test_missing_compiler_is_reported_before_anything_is_installed(install, monkeypatch):
    monkeypatch.setattr(install.shutil, 'which', lambda name: None)
    with pytest.raises(install.Failed, match=r'apt install g\+\+.*The operators in PyTorch need'):
        install.check_machine(compiles=True)
    install.check_machine(compiles=False)


class Builds:
    """Replaces pip: the first ``failing`` builds fail."""

    def __init__(self, install, monkeypatch, header, failing=0):
        self.envs, self.failing = [], failing
        monkeypatch.setattr(install, 'precompile', lambda folder: header)
        monkeypatch.setattr(install, 'pip', lambda *args, **kwargs: None)
        monkeypatch.setattr(install, 'works', lambda python, code: 'cuda' not in code)

        def output(command, env=None):
            self.envs.append(env)
            yield '  [1/2] g++ a.cpp'
            if len(self.envs) <= self.failing:
                raise install.Failed('the build failed')
            yield '  [2/2] g++ b.cpp'
        monkeypatch.setattr(install, 'output', output)
        self.progress = install.Progress({'ops': 100.0})
        self.progress.start('ops')


def test_ops_build_uses_the_precompiled_header(install, monkeypatch):
    builds = Builds(install, monkeypatch, '-O2 -include types.h')
    install.build_ops('mmcv>=2', builds.progress)
    assert [env.get('CFLAGS') for env in builds.envs] == ['-O2 -include types.h']
    assert builds.envs[0]['MMCV_WITH_OPS'] == '1'


@pytest.mark.parametrize(('header', 'failing', 'cflags'), [
    (None, 0, [None]), ('-include types.h', 1, ['-include types.h', None])])
def test_ops_build_without_a_working_header(install, monkeypatch, header, failing, cflags):
    builds = Builds(install, monkeypatch, header, failing)
    install.build_ops('mmcv>=2', builds.progress)
    assert [env.get('CFLAGS') for env in builds.envs] == cflags


def test_failing_plain_build_is_an_error(install, monkeypatch):
    builds = Builds(install, monkeypatch, '-include types.h', failing=2)
    with pytest.raises(install.Failed, match='the build failed'):
        install.build_ops('mmcv>=2', builds.progress)


def test_header_that_does_not_compile_is_ignored(install, monkeypatch, tmp_path):
    monkeypatch.setattr(install, 'LOG', tmp_path / 'log')
    monkeypatch.setattr(install, 'PYTHON', sys.executable)

    def output(command, env=None):
        raise install.Failed('no such header')
        yield
    monkeypatch.setattr(install, 'output', output)
    assert install.precompile(tmp_path) is None


def test_progress_estimates_the_time_left(install, capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(install.time, 'time', lambda: clock[0])
    progress = install.Progress({'first': 30.0, 'second': 60.0})
    progress.start('first')
    clock[0] += 20
    progress.show('3/4 files', share=0.75)
    progress.done()
    printed = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert printed == ['[1/2] first, about 1 min 30 s left',
                       '[1/2] first 3/4 files, about 1 min 7 s left', '[1/2] first: 20 s']


def test_failing_command_shows_the_end_of_its_output(install, monkeypatch, tmp_path):
    monkeypatch.setattr(install, 'LOG', tmp_path / 'log')
    with pytest.raises(install.Failed, match=r'(?s)no space left.*Full log: .*log'):
        list(install.output([sys.executable, '-c', 'raise SystemExit("no space left")']))
