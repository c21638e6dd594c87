"""The source distribution and the wheel: complete, equal from either source, and installable."""
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import convnext_mm
from setup import STARTUP
from tests.helpers import DEMO_SEGMENTATION, ROOT, SMALL_SEGMENTATION

NOT_IN_A_CHECKOUT = shutil.ignore_patterns(
    '.git', '.venv', '.mim', '.*_cache', '__pycache__', '*.egg-info', 'build', 'data', 'dist',
    'work_dirs')


def run(*command: object, cwd: Path = ROOT, **env: str) -> str:
    """Run Python with the arguments; its output, of a command that must succeed."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env={**os.environ, **env},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def build(source: Path, target: Path, *options: str) -> list[Path]:
    """Build distributions of a source tree without network access; the files made."""
    run('-m', 'build', '--no-isolation', *options, '--outdir', target, source)
    return sorted(target.iterdir())


@pytest.fixture(scope='module')
def distributions(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the sdist of a copy of the repository."""
    folder = tmp_path_factory.mktemp('package')
    shutil.copytree(ROOT, folder / 'checkout', ignore=NOT_IN_A_CHECKOUT)
    wheel, sdist = build(folder / 'checkout', folder / 'dist', '--sdist', '--wheel')
    return wheel, sdist


@pytest.fixture(scope='module')
def unpacked(distributions, tmp_path_factory) -> Path:
    """The folder that the sdist unpacks to."""
    _, sdist = distributions
    folder = tmp_path_factory.mktemp('sdist')
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    return folder / sdist.name.removesuffix('.tar.gz')


def contents(wheel: Path) -> dict[str, tuple[int, int]]:
    """The mode and checksum of each file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {info.filename: (info.external_attr >> 16, info.CRC) for info in archive.infolist()}


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob('*')
            if path.is_file() and '__pycache__' not in path.parts}


@pytest.mark.slow
def test_sdist_builds_the_same_wheel(distributions, unpacked, tmp_path):
    wheel, _ = distributions
    again, = build(unpacked, tmp_path, '--wheel')
    assert again.name == wheel.name
    assert contents(again) == contents(wheel)


@pytest.mark.slow
def test_wheel_has_the_package_the_recipes_and_the_tools(distributions):
    wheel = contents(distributions[0])
    package = {f'convnext_mm/{name}' for name in files(ROOT / 'convnext_mm')
               if not name.startswith('.mim/')}
    folders = 'configs', 'tools', 'docs/tables', 'docs/demo'
    mim = {f'convnext_mm/.mim/{folder}/{name}' for folder in folders
           for name in files(ROOT / folder)} | {'convnext_mm/.mim/model-index.yml'}
    assert {name for name in wheel if '.dist-info/' not in name} == package | mim | {
        STARTUP.name, 'convnext_mm_command.py'}
    assert wheel['convnext_mm/.mim/tools/dist_train.sh'][0] & 0o111, 'executable'


@pytest.mark.slow
def test_sdist_has_the_documents_and_what_they_link_to(unpacked):
    for name in ('README.md', 'README_zh-CN.md', 'CHANGELOG.md', 'CITATION.cff', 'LICENSE'):
        assert (unpacked / name).is_file()
    for page in [*unpacked.glob('*.md'), *unpacked.glob('docs/*.md')]:
        links = re.findall(r'\]\(([^)#]+)', page.read_text(encoding='utf-8'))
        assert [link for link in links
                if '://' not in link and not (page.parent / link).exists()] == [], page.name


@pytest.mark.slow
def test_metadata_of_the_package_page(distributions):
    with zipfile.ZipFile(distributions[0]) as archive:
        name, = (name for name in archive.namelist() if name.endswith('.dist-info/METADATA'))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata['Version'] == convnext_mm.__version__
    assert metadata['License-Expression'] == 'Apache-2.0'
    assert metadata['Author'] == 'The convnext-mm authors'
    description = metadata.get_payload(decode=True).decode()
    assert description.strip() == (ROOT / 'README.md').read_text(encoding='utf-8').strip()
    assert {'forks', 'forks-seg', 'openmmlab', 'openmmlab-seg', 'test'} <= {
        *metadata.get_all('Provides-Extra')}


def test_every_file_names_the_same_version():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    changelog = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    version, date = re.findall(r'^## \[(\d\S*)\] - (\S+)$', changelog, re.M)[0]
    assert version == citation['version'] == convnext_mm.__version__
    assert date == str(citation['date-released'])


@pytest.fixture(scope='module')
def site(distributions, tmp_path_factory) -> Path:
    """A folder in which the wheel is installed."""
    folder = tmp_path_factory.mktemp('site')
    run('-m', 'pip', 'install', '--quiet', '--no-deps', '--no-index', '--no-compile', '--target',
        folder, distributions[0])
    return folder


@pytest.mark.slow
def test_the_command_of_the_wheel_finds_recipes_by_name(site, demo_data, tmp_path):
    def command(*args: object) -> str:
        return run(site / 'bin' / 'convnext-mm', *args, cwd=tmp_path, PYTHONPATH=str(site))
    data = f'data_root={demo_data}/ADEChallengeData2016'
    shown = command('table', 'upernet_convnext_tiny_512_160k_ade20k')
    assert '60.24' in shown
    command('train', 'demo/upernet_convnext_demo', '--cfg-options', *SMALL_SEGMENTATION, data,
            'train_cfg.max_iters=2')
    folder = tmp_path / 'work_dirs' / 'upernet_convnext_demo'
    config, checkpoint = folder / 'upernet_convnext_demo.py', folder / 'iter_2.pth'
    shown = command('test', config, checkpoint, '--work-dir', tmp_path / 'test')
    assert 'mIoU' in shown
    image = next((demo_data / 'ADEChallengeData2016/images/validation').glob('*.jpg'))
    command('predict', image, config, checkpoint, '--out', tmp_path / 'seen')
    assert (tmp_path / 'seen' / f'{image.stem}.png').is_file()


@pytest.mark.slow
def test_installed_wheel_trains_in_an_empty_folder(site, demo_data, tmp_path):
    folder = tmp_path / 'empty'
    folder.mkdir()
    mim = site / 'convnext_mm' / '.mim'
    script = ('import runpy, sys, convnext_mm; print("package:", convnext_mm.__file__); '
              'del sys.argv[0]; runpy.run_path(sys.argv[0], run_name="__main__")')
    output = run('-c', script, mim / 'tools' / 'train.py', mim / DEMO_SEGMENTATION,
                 '--work-dir', 'run', '--cfg-options', *SMALL_SEGMENTATION,
                 f'data_root={demo_data}/ADEChallengeData2016', 'train_cfg.max_iters=1',
                 cwd=folder, PYTHONPATH=str(site))
    assert f'package: {site}' in output
    assert re.search(r'Iter\(train\) +\[1/1\].* loss: \d', output)
    assert (folder / 'run' / 'iter_1.pth').is_file()
