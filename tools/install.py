"""Set up .venv with PyTorch, an OpenMMLab stack and this package.

Requires Python 3.10 or newer, and with --ops compiled a C++ compiler and Python's headers. Steps
that are already complete are skipped: an mmcv with compiled operators in .venv, or in the Python
that runs this script, is used, not compiled again.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / '.venv'
PYTHON = VENV / 'bin' / 'python'
LOG = VENV / 'setup.log'
TORCH_CPU_INDEX = 'https://download.pytorch.org/whl/cpu'
TORCH_TESTED = '2.13.0'

sys.path.insert(0, str(ROOT))
from setup import BUILD, COMPILED, FORKS, OPENMMLAB, STARTUP, TORCH  # noqa: E402


class Failed(Exception):
    """A step failed; the message says what to do."""


class Progress:
    """Prints the running step and an estimate of the total time left.

    Args:
        steps: Name of each step and the seconds it usually takes on 2 cores.
    """

    def __init__(self, steps: dict[str, float]) -> None:
        self.left = dict(steps)
        self.total = len(steps)
        self.shown = 0.0

    def start(self, name: str) -> None:
        self.name, self.begun, self.share, self.detail = name, time.time(), None, ''
        self.usual = self.left.pop(name)
        self.number = self.total - len(self.left)
        self.show(force=True)

    def show(self, detail: str = '', share: float | None = None, force: bool = False) -> None:
        """Print the state of the step, at most once a second on a terminal, else every 15 s.

        Args:
            detail: State within the step, such as '3/4 files'; '' keeps the previous one.
            share: Completed share of the step, 0 to 1; None keeps the previous one. Without any,
                the time left is estimated from the step's usual time.
            force: Print now.
        """
        now = time.time()
        self.share, self.detail = share or self.share, detail or self.detail
        if not force and now - self.shown < (1 if sys.stdout.isatty() else 15):
            return
        self.shown, spent = now, now - self.begun
        rest = spent / self.share - spent if self.share else max(self.usual - spent, 1)
        rest += sum(self.left.values())
        line = f'[{self.number}/{self.total}] {self.name} {self.detail}'.rstrip()
        end = '' if sys.stdout.isatty() else '\n'
        print(f'{chr(13) if not end else ""}{line}, about {duration(rest)} left'.ljust(78), end=end,
              flush=True)

    def done(self) -> None:
        clear = chr(13) if sys.stdout.isatty() else ''
        print(f'{clear}[{self.number}/{self.total}] {self.name}: '
              f'{duration(time.time() - self.begun)}'.ljust(78), flush=True)


def duration(seconds: float) -> str:
    """Format seconds as '45 s' or '2 min 5 s'."""
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes} min {seconds} s' if minutes else f'{seconds} s'


def output(command: list, env: dict[str, str] | None = None, cwd: Path = ROOT) -> Iterator[str]:
    """Run a command and log its output to LOG.

    Yields:
        Each line of its output, and '' twice a second while it prints nothing.

    Raises:
        Failed: The command's exit status was not 0.
    """
    with open(LOG, 'a') as log:
        log.write(f'\n$ {" ".join(map(str, command))}\n')
        log.flush()
        begin = log.tell()
        process = subprocess.Popen([*map(str, command)], stdout=log, stderr=subprocess.STDOUT,
                                   env={**os.environ, **(env or {})}, cwd=cwd)
        with open(LOG, errors='replace') as reader:
            reader.seek(begin)
            while process.poll() is None:
                yield from reader.read().splitlines() or ['']
                time.sleep(0.5)
            yield from reader.read().splitlines()
    if process.returncode:
        tail = '\n'.join('  ' + line for line in LOG.read_text(errors='replace').splitlines()[-15:])
        raise Failed(f'{" ".join(map(str, command[:6]))} … failed:\n{tail}\nFull log: {LOG}')


def pip(progress: Progress, *args: str, env: dict[str, str] | None = None) -> None:
    """Run pip in .venv and update the progress while it runs."""
    for _ in output([PYTHON, '-m', 'pip', '--disable-pip-version-check', *args], env):
        progress.show()


def works(python: str | Path, code: str) -> bool:
    """Whether ``python`` exists and runs ``code`` without an error."""
    return Path(python).exists() and subprocess.run(
        [str(python), '-c', code], capture_output=True, cwd=ROOT).returncode == 0


def installed(python: str | Path, distribution: str) -> bool:
    """Whether a Python has the distribution, in any version."""
    return works(python, f'import importlib.metadata as m; m.version({distribution!r})')


def stack_of(python: str | Path) -> str | None:
    """The stack whose mmcv a Python has: 'forks', 'openmmlab' or None."""
    return next((name for name, stack in (('forks', FORKS), ('openmmlab', OPENMMLAB))
                 for requirement in (stack['mmcv'], COMPILED[name])
                 if installed(python, distribution(requirement))), None)


def distribution(requirement: str) -> str:
    """The name in a requirement, such as 'mmcv' of 'mmcv>=2'."""
    return re.split('[<>=]', requirement)[0]


def distributions(stack: dict[str, str]) -> list[str]:
    """Distribution names of a stack's mmcv, mmengine, mmseg and mmdet."""
    return [distribution(stack[key]) for key in ('mmcv', 'mmengine', 'mmseg', 'mmdet')]


def torch_requirement(version: str) -> str:
    """The pip requirement of a PyTorch version, such as 'torch==2.6.0' of '2.6.0'.

    Raises:
        Failed: It is not a version, or outside of the range that convnext-mm supports.
    """
    def parts(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split('.')))
    lowest, highest = re.findall(r'[\d.]+', TORCH)
    if not re.fullmatch(r'\d+\.\d+\.\d+', version) or not (
            parts(lowest) <= parts(version) < parts(highest)):
        raise Failed(f'PyTorch {version} is not supported: expected a version such as '
                     f'{TORCH_TESTED}, at least {lowest} and below {highest}')
    return f'torch=={version}'


def check_machine(compiles: bool) -> None:
    """Check for everything that pip cannot install.

    Raises:
        Failed: Something is missing; the message names it.
    """
    if sys.version_info < (3, 10):  # noqa: UP036 - runs before pip can check it
        raise Failed(f'Python 3.10 or newer is required, this is {sys.version.split()[0]}. '
                     'Choose another one, such as: make PYTHON=python3.11 demo')
    if not works(sys.executable, 'import ensurepip, venv'):
        raise Failed("Python's venv is missing: apt install python3-venv (Debian, Ubuntu)")
    if not compiles:
        return
    if not shutil.which('g++'):
        raise Failed("mmcv's compiled operators need a C++ compiler: apt install g++ (Debian, "
                     'Ubuntu) or dnf install gcc-c++ (Fedora). The operators in PyTorch need none: '
                     'python3 tools/install.py')
    if not Path(sysconfig.get_paths()['include'], 'Python.h').is_file():
        raise Failed("mmcv's compiled operators need Python's headers: apt install python3-dev "
                     '(Debian, Ubuntu) or dnf install python3-devel (Fedora)')


def torch_source() -> list[str]:
    """pip's options for PyTorch: without an NVIDIA GPU, the index of CPU builds if reachable."""
    if shutil.which('nvidia-smi'):
        return []
    try:
        urllib.request.urlopen(TORCH_CPU_INDEX, timeout=5).close()
    except OSError:
        return []
    return ['--extra-index-url', TORCH_CPU_INDEX]


def precompile(folder: Path) -> str | None:
    """Precompile the header that every op includes, so that it is compiled once, not once per op.

    Returns:
        The CFLAGS that make the ops use it, or None if it does not compile.
    """
    header = folder / 'torch_types.h'
    header.write_text('#include <torch/types.h>\n')
    flags = '-O2 -DNDEBUG -g0 -Winvalid-pch'
    ask = ('import sysconfig; from torch.utils.cpp_extension import include_paths; '
           'print(*include_paths(), sysconfig.get_paths()["include"])')
    paths = subprocess.run([str(PYTHON), '-c', ask], capture_output=True, text=True).stdout.split()
    # The compiler ignores the header unless these flags are those that the ops are compiled with.
    same = ['-fPIC', '-std=c++17', '-DTORCH_API_INCLUDE_EXTENSION_H',
            '-DTORCH_EXTENSION_NAME=_ext']
    try:
        for _ in output(['g++', '-x', 'c++-header', *flags.split(), *same,
                         *(f'-I{path}' for path in paths), header, '-o', f'{header}.gch']):
            pass
    except (Failed, OSError):
        return None
    return f'{flags} -include {header}'


def uninstall_mmcv(progress: Progress) -> None:
    """Uninstall mmcv, under whichever name it is installed."""
    pip(progress, 'uninstall', '-y', *sorted({distribution(requirement) for requirement in (
        FORKS['mmcv'], OPENMMLAB['mmcv'], *COMPILED.values())}))


def build_ops(requirement: str, progress: Progress) -> None:
    """Build and install mmcv with its compiled ops.

    Raises:
        Failed: The build fails with and without the precompiled header.
    """
    env = dict(MMCV_WITH_OPS='1', MAX_JOBS=str(os.cpu_count() or 2))
    cuda = works(PYTHON, 'import torch; assert torch.cuda.is_available()')
    if cuda and not shutil.which('nvcc'):
        print("Found a GPU but no nvcc: mmcv's ops are built for the CPU only. To train detection "
              'on the GPU, install the CUDA toolkit, then: python3 tools/install.py --ops compiled '
              '--rebuild')
        env['CUDA_VISIBLE_DEVICES'] = ''
        cuda = False
    with tempfile.TemporaryDirectory() as folder:
        progress.show('precompiling the header', force=True)
        flags = None if cuda else precompile(Path(folder))
        uninstall_mmcv(progress)
        # No cache: pip's may have an mmcv that was built without ops or for another PyTorch.
        command = [PYTHON, '-m', 'pip', 'install', '-v', '--no-build-isolation', '--no-cache-dir',
                   requirement]
        for extra in ([dict(CFLAGS=flags)] if flags else []) + [{}]:
            try:
                for line in output(command, {**env, **extra}):
                    found = re.match(r'\s*\[(\d+)/(\d+)\]', line)
                    if found:
                        count, total = map(int, found.groups())
                        progress.show(f'{count}/{total} files', share=count / total)
                    elif not line:
                        progress.show()
                if works(PYTHON, 'import mmcv.ops'):
                    return
            except Failed:
                if not extra:
                    raise
            print('\nThe build with the precompiled header failed, building without it (slower).')
    raise Failed(f"mmcv's ops were built but cannot be imported. Full log: {LOG}")


def copy_startup_file() -> None:
    """Copy the file to site-packages that an editable install, unlike a wheel, lacks there."""
    code = 'import sysconfig; print(sysconfig.get_paths()["purelib"])'
    found = subprocess.run([str(PYTHON), '-c', code], capture_output=True, text=True, check=True)
    shutil.copy(ROOT / STARTUP, found.stdout.strip())


def install(args: argparse.Namespace) -> None:
    """Run all steps, skipping those that are complete.

    Raises:
        Failed: A step failed, or the machine or an option is not supported.
    """
    torch = torch_requirement(args.torch or TORCH_TESTED)
    outside = stack_of(sys.executable) if sys.prefix == sys.base_prefix else None
    name = args.stack if args.stack != 'auto' else stack_of(PYTHON) or outside or 'forks'
    stack = OPENMMLAB if name == 'openmmlab' else FORKS
    # A working stack of the Python that runs this script is shared with .venv, not built again.
    shared = (not args.torch and outside == name
              and works(sys.executable, 'import torch, mmcv.ops'))
    compiles = args.ops == 'compiled' and not shared
    check_machine(compiles)

    steps = {'Environment .venv': 5, 'PyTorch': 30, 'Packages': 35}
    if compiles:
        steps["mmcv's operators"] = 150
    steps['convnext-mm'] = 5
    progress = Progress(steps)

    progress.start('Environment .venv')
    if not works(PYTHON, 'import pip'):
        venv.create(VENV, with_pip=True, symlinks=True, system_site_packages=shared,
                    clear=VENV.exists())
    progress.done()

    progress.start('PyTorch')
    expected = f'import torch; assert torch.__version__.split("+")[0] == {args.torch!r}'
    if not works(PYTHON, expected if args.torch else 'import torch'):
        # Compiled operators only work with the PyTorch that they were compiled for.
        uninstall_mmcv(progress)
        pip(progress, 'install', '--no-compile', torch, *torch_source())
    progress.done()

    progress.start('Packages')
    other = OPENMMLAB if stack is FORKS else FORKS
    if any(installed(PYTHON, name) for name in distributions(other)):
        # Both stacks have the same import names, so files of one would shadow the other's.
        pip(progress, 'uninstall', '-y', *distributions(FORKS), *distributions(OPENMMLAB))
        uninstall_mmcv(progress)
    packages = [stack.get('setuptools', BUILD), *(
        v for k, v in stack.items() if k != 'mmcv' and not (
            k == 'mmdet' and args.segmentation_only))]
    if stack_of(PYTHON) != name:
        packages.append(stack['mmcv'])
    # Compiling each file takes longer than compiling those that are imported.
    pip(progress, 'install', '--no-compile', *packages, env=dict(MMCV_WITH_OPS='0'))
    if not works(PYTHON, 'import cv2'):
        # opencv-python needs graphics libraries that machines without a display may lack.
        pip(progress, 'uninstall', '-y', 'opencv-python')
        pip(progress, 'install', '--force-reinstall', '--no-deps', 'opencv-python-headless')
    progress.done()

    if compiles:
        progress.start("mmcv's operators")
        if args.rebuild or not works(PYTHON, 'import mmcv.ops'):
            pip(progress, 'install', 'ninja', 'wheel', 'psutil')
            build_ops(COMPILED[name], progress)
        progress.done()

    progress.start('convnext-mm')
    # The stack, whose mmcv may be another, is installed.
    pip(progress, 'install', '--no-build-isolation', '-e', '.[test]' if args.tests else '.')
    copy_startup_file()
    modules = 'mmseg.apis' if args.segmentation_only else 'mmseg.apis, mmdet.apis, mmcv.ops'
    if not works(PYTHON, f'import {modules}'):
        raise Failed('Everything is installed, but this command fails: '
                     f'{PYTHON} -c "import {modules}"')
    progress.done()
    print(f'Done. Activate the environment with: source {VENV.relative_to(ROOT)}/bin/activate')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--stack', choices=['auto', 'forks', 'openmmlab'], default='auto',
                        help="the maintained forks or OpenMMLab's own packages (auto: the stack "
                        'that is already installed, otherwise the forks)')
    parser.add_argument('--torch', metavar='VERSION',
                        help=f'PyTorch version to install (any installed one, else {TORCH_TESTED})')
    parser.add_argument('--segmentation-only', action='store_true',
                        help='skip mmdet')
    parser.add_argument('--ops', choices=['pytorch', 'compiled'], default='pytorch',
                        help="mmcv's operators: this package's in PyTorch (default), unless mmcv "
                        'has compiled ones already, or compile them, which needs a compiler')
    parser.add_argument('--rebuild', action='store_true',
                        help='with --ops compiled: compile them again')
    parser.add_argument('--tests', action='store_true', help='also what the tests need')
    begun = time.time()
    try:
        install(parser.parse_args())
    except Failed as error:
        sys.exit(f'\n{error}')
    except KeyboardInterrupt:
        sys.exit('\nInterrupted. Run the command again to continue.')
    print(f'Finished in {duration(time.time() - begun)}.')
