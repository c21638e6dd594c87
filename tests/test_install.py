"""The set-up script, without setting anything up."""
import importlib.util
import sys

import pytest

from tests.conftest import ROOT


@pytest.fixture
def install(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    spec = importlib.util.spec_from_file_location('install', ROOT / 'tools' / 'install.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_stacks_share_no_package(install):
    def names(stack):
        return {requirement.split('>')[0].split('<')[0] for requirement in stack.values()}
    assert not names(install.FORKS) & names(install.OPENMMLAB)
    assert {'mmcv', 'mmengine', 'mmseg', 'mmdet'} <= install.FORKS.keys() & install.OPENMMLAB.keys()


def test_every_requirement_has_an_upper_bound(install):
    from setup import EXTRAS
    for extra in ('forks', 'forks-seg', 'test', 'interpreter'):
        assert all('<' in requirement for requirement in EXTRAS[extra]), extra
    assert not any('mmdet' in requirement for requirement in EXTRAS['forks-seg'])


def test_no_compiler_is_said_before_anything_is_installed(install, monkeypatch):
    monkeypatch.setattr(install.shutil, 'which', lambda name: None)
    with pytest.raises(install.Failed, match=r'apt install g\+\+.*--segmentation-only'):
        install.check_machine(need_ops=True)
    install.check_machine(need_ops=False)


class Builds:
    """Stands for pip: the first ``failing`` builds fail."""

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


def test_ops_are_built_with_the_precompiled_header(install, monkeypatch):
    builds = Builds(install, monkeypatch, '-O2 -include types.h')
    install.build_ops('mmcv>=2', builds.progress)
    assert [env.get('CFLAGS') for env in builds.envs] == ['-O2 -include types.h']
    assert builds.envs[0]['MMCV_WITH_OPS'] == '1'


@pytest.mark.parametrize(('header', 'failing', 'cflags'), [
    (None, 0, [None]), ('-include types.h', 1, ['-include types.h', None])])
def test_a_header_that_fails_ends_in_the_plain_build(install, monkeypatch, header, failing, cflags):
    builds = Builds(install, monkeypatch, header, failing)
    install.build_ops('mmcv>=2', builds.progress)
    assert [env.get('CFLAGS') for env in builds.envs] == cflags


def test_a_plain_build_that_fails_is_an_error(install, monkeypatch):
    builds = Builds(install, monkeypatch, '-include types.h', failing=2)
    with pytest.raises(install.Failed, match='the build failed'):
        install.build_ops('mmcv>=2', builds.progress)


def test_a_header_that_does_not_compile_is_passed_over(install, monkeypatch, tmp_path):
    monkeypatch.setattr(install, 'LOG', tmp_path / 'log')
    monkeypatch.setattr(install, 'PYTHON', sys.executable)

    def output(command, env=None):
        raise install.Failed('no such header')
        yield
    monkeypatch.setattr(install, 'output', output)
    assert install.precompile(tmp_path) is None


def test_progress_says_how_long_it_still_takes(install, capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(install.time, 'time', lambda: clock[0])
    progress = install.Progress({'first': 30.0, 'second': 60.0})
    progress.start('first')
    clock[0] += 20
    progress.show('3/4 files', share=0.75)
    progress.done()
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert said == ['[1/2] first, about 1 min 30 s left',
                    '[1/2] first 3/4 files, about 1 min 7 s left', '[1/2] first: 20 s']


def test_a_failing_command_shows_its_last_words(install, monkeypatch, tmp_path):
    monkeypatch.setattr(install, 'LOG', tmp_path / 'log')
    with pytest.raises(install.Failed, match=r'(?s)no space left.*The whole log: .*log'):
        list(install.output([sys.executable, '-c', 'raise SystemExit("no space left")']))
