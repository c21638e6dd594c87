"""``tools/browser_demo.py``: exported models as one page that runs them without a server."""
from __future__ import annotations

import argparse
import base64
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2

from ..choices import WEB_RUNTIME
from ..errors import UserError
from ..inputs import find_images, shipped_file
from ..utils import atomic_path, writable_folder
from .runtimes import load_exported

FILES = dict(script='ort.wasm.min.js', loader='ort-wasm-simd-threaded.mjs',
             wasm='ort-wasm-simd-threaded.wasm')
"""Those of :data:`WEB_RUNTIME`'s ``dist`` that the page contains."""
LONGEST_SIDE = 1024
"""Pixels of a sample; larger images are made smaller."""


def main(args: argparse.Namespace) -> Path:
    """Write the page.

    Args:
        args: ``models`` (files of ``tools/export.py``), ``images``, ``out`` and ``runtime`` (a
            folder with :data:`FILES`; None: npm brings them).

    Returns:
        The page.

    Raises:
        UserError: A model or an image cannot be used, or the runtime is not there.
    """
    models = [dict(meta=read_model(Path(path)), data=encode(Path(path).read_bytes()))
              for path in args.models]
    samples = [read_sample(path) for path in find_images(args.images)] if args.images else []
    out = Path(args.out)
    writable_folder(out.parent)
    with tempfile.TemporaryDirectory() as folder:
        runtime = read_runtime(Path(args.runtime) if args.runtime else fetch_runtime(Path(folder)))
    page = fill(shipped_file('docs/demo/index.html').read_text(encoding='utf-8'),
                dict(models=models, samples=samples, loader=encode(runtime['loader']),
                     wasm=encode(runtime['wasm'])), runtime['script'].decode())
    with atomic_path(out) as part:
        part.write_text(page, encoding='utf-8')
    print(f'{out}: {out.stat().st_size / 1e6:.0f} MB, for any browser, without a network')
    return out


def read_model(path: Path) -> dict[str, Any]:
    """The metadata of a file that the page can run.

    Raises:
        UserError: It cannot.
    """
    if path.suffix != '.onnx':
        raise UserError(f'{path}: expected an ONNX file of tools/export.py --to onnx')
    meta = load_exported(path).meta
    if meta['resize'] is None or meta['channels'] != 'bgr':
        raise UserError(f'{path}: its config prepares images in a way that the page does not know. '
                        'Expected color images, resized by one Resize')
    return meta


def read_sample(path: str | Path) -> str:
    """An image as a PNG, which every browser decodes to the same pixels, in base64.

    Raises:
        UserError: It is not readable.
    """
    image = cv2.imread(str(path))
    if image is None:
        raise UserError(f'{path}: not a readable image')
    factor = LONGEST_SIDE / max(image.shape[:2])
    if factor < 1:
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
    return encode(cv2.imencode('.png', image)[1].tobytes())


def encode(data: bytes) -> str:
    """Base64."""
    return base64.b64encode(data).decode()


def fetch_runtime(folder: Path) -> Path:
    """Let npm download :data:`WEB_RUNTIME`, which it checks against its registry's hash.

    Returns:
        The folder that contains :data:`FILES`.

    Raises:
        UserError: npm is missing, or has no access to its registry.
    """
    hint = '--runtime DIR takes the folder dist of this package from elsewhere'
    npm = shutil.which('npm')
    if npm is None:
        raise UserError(f'npm, of Node.js, downloads {WEB_RUNTIME} but is not installed. {hint}')
    print(f'Downloading {WEB_RUNTIME} ...', flush=True)
    done = subprocess.run([npm, 'pack', '--silent', WEB_RUNTIME], cwd=folder, capture_output=True,
                          text=True)
    if done.returncode:
        lines: Sequence[str] = (done.stderr or done.stdout).strip().splitlines() or ['no message']
        raise UserError(f'npm cannot download {WEB_RUNTIME}: {lines[-1]}. {hint}')
    with tarfile.open(next(folder.glob('*.tgz'))) as archive:
        for name in FILES.values():
            content = archive.extractfile(f'package/dist/{name}')
            assert content is not None
            (folder / name).write_bytes(content.read())
    return folder


def read_runtime(folder: Path) -> dict[str, bytes]:
    """The contents of :data:`FILES`.

    Raises:
        UserError: Some are missing.
    """
    missing = [name for name in FILES.values() if not (folder / name).is_file()]
    if missing:
        raise UserError(f'--runtime {folder}: {", ".join(missing)} missing. Expected the folder '
                        f'dist of {WEB_RUNTIME}')
    return {key: (folder / name).read_bytes() for key, name in FILES.items()}


def fill(page: str, data: dict[str, Any], script: str) -> str:
    """Put data and runtime into the elements of the page that are for them."""
    for element, text in (('data', json.dumps(data, ensure_ascii=False)), ('runtime', script)):
        start = re.search(rf'<script[^>]* id="{element}">', page)
        assert start is not None, element
        end = page.index('</script>', start.end())
        text = re.sub('</(?=script)', r'<\\/', text, flags=re.I)
        page = page[:start.end()] + text + page[end:]
    return page
