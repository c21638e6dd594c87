"""The files that a command names, found and checked before PyTorch is imported."""
from __future__ import annotations

import ast
import glob
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlparse

from .choices import FORMATS
from .errors import UserError
from .utils import suggest

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
CHECKPOINT_SUFFIXES = ('.pth', '.pt', '.bin', '.safetensors')
INDEX_SUFFIX = '.index.json'
"""Ending of a file that says in which of several files each parameter is."""


def find_config(config: str | Path) -> Path:
    """The file of a config, or of a recipe that is given by its name.

    Raises:
        UserError: It does not exist.
    """
    file = Path(find_recipe(config))
    if file.is_file():
        return file
    known = [str(p) for folder in (file.parent, Path('configs'), Path('configs/demo'))
             if folder.is_dir() for p in folder.glob('*.py')]
    names = [Path(recipe).stem for recipe in recipe_files()]
    hint = suggest(file, known, count=3).strip() or suggest(file.stem, names, count=3).strip() \
        or ('The recipes are in configs/, such as '
            'configs/upernet_convnext_tiny_512_160k_ade20k.py. A name alone, such as '
            'upernet_convnext_tiny_512_160k_ade20k, is found everywhere.')
    raise UserError(f'Config not found: {file.absolute()}\n{hint}')


def check_syntax(file: Path) -> None:
    """Check that a config file in Python can be parsed.

    Raises:
        UserError: It cannot.
    """
    if file.suffix != '.py':
        return
    try:
        ast.parse(file.read_bytes(), str(file))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise unreadable_config(file, error) from error


def unreadable_config(file: str | Path, error: Exception) -> UserError:
    """The error for a config file whose reading raised ``error``."""
    return UserError(f'Config {file} cannot be read: {type(error).__name__}: {error}')


def find_recipe(config: str | Path) -> str:
    """The file of a recipe of this package that is given by its name; other paths stay."""
    name = str(config).removeprefix('convnext_mm::').removesuffix('.py')
    folder = config_folder('convnext_mm')
    if not Path(config).is_file() and folder and (folder / f'{name}.py').is_file():
        return str(folder / f'{name}.py')
    return str(config)


def recipe_files() -> list[str]:
    """All recipes of this package, without their variants for testing."""
    folder = config_folder('convnext_mm')
    return sorted(str(path) for path in (folder.glob('*.py') if folder else ())
                  if not path.stem.endswith(('_ss', '_ms')))


def config_folder(package: str) -> Path | None:
    """Where the configs of an installed package are."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    root = Path(spec.origin).parent
    folders = (root / '.mim' / 'configs', root.parent / 'configs')
    return next((folder for folder in folders if folder.is_dir()), None)


def shipped_file(name: str) -> Path:
    """A file of this package's repository, in a checkout or as installed.

    Args:
        name: Such as docs/tables/segmentation.json.

    Raises:
        UserError: It is missing.
    """
    package = Path(__file__).parent
    for file in (package.parent / name, package / '.mim' / name):
        if file.is_file():
            return file
    raise UserError(f'{package.parent / name} is missing: install the package again, or restore '
                    'the file')


def find_images(paths: Sequence[str]) -> list[str]:
    """Expand files, folders (recursively) and glob patterns to unique image paths.

    Raises:
        UserError: One of ``paths`` matches no image.
    """
    files: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            matches = [os.path.join(root, name) for root, _, names in os.walk(path)
                       for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        elif os.path.isfile(path):
            matches = [path]
        else:
            matches = [match for match in glob.glob(path, recursive=True)
                       if match.lower().endswith(IMAGE_SUFFIXES)]
        if not matches:
            raise UserError(f'No image found: {os.path.abspath(path)}. Expected an image, a '
                            f'folder of images ({" ".join(IMAGE_SUFFIXES)}), or a pattern such as '
                            "'photos/*.jpg'")
        files += sorted(matches)
    return list(dict.fromkeys(files))


def is_url(source: str) -> bool:
    """Whether a checkpoint is to be downloaded."""
    return urlparse(source).scheme in ('http', 'https')


def find_local_checkpoint(source: str) -> Path:
    """The file of a checkpoint that is given by its path.

    Raises:
        UserError: It does not exist.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir()
                       if file.name.endswith((*CHECKPOINT_SUFFIXES, INDEX_SUFFIX)))
        raise UserError(f'Checkpoint is a folder: {path.absolute()}\nGive a file instead. '
                        f'Checkpoints in this folder: {", ".join(files[:8]) or "none"}')
    if not path.is_file():
        raise UserError(f'Checkpoint not found: {path.absolute()}\n'
                        'Expected a .pth, .pt, .bin or .safetensors file, or the .index.json '
                        'of several (training writes '
                        '.pth files to work_dirs/CONFIG/).')
    return path


def is_exported(path: str) -> bool:
    """Whether a path is that of an exported file, not of a checkpoint."""
    return path.endswith(tuple(FORMATS.values()))
