"""Checks of what the user gave, before any model is built."""
from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config

from .. import checkpoints, datasets, migration
from ..backbone import ConvNeXt
from ..datasets import inspection
from ..datasets.findings import WHOLE_CHECK
from ..errors import UserError
from ..utils import is_first_process, suggest
from . import speed

GET_DATA = {
    'mmseg': ('ADE20K: download ADEChallengeData2016.zip from '
              'http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip and unpack '
              'it in data/ade/, so that data/ade/ADEChallengeData2016/images/training/ is there'),
    'mmdet': ('COCO: download train2017.zip, val2017.zip and annotations_trainval2017.zip from '
              'https://cocodataset.org/#download and unpack them in data/coco/, so that '
              'data/coco/annotations/instances_train2017.json and data/coco/train2017/ are there'),
}
ELSEWHERE = 'Data in another place: --cfg-options data_root=/path/to/data'
TRY_DEMO = 'To try the package without any data: make demo'

UNSET_KEYS = {
    '': ('work_dir', 'resume', 'load_from', 'launcher', 'randomness', 'auto_scale_lr',
         'find_unused_parameters', 'model_wrapper_cfg', 'sync_bn', 'compile',
         'experiment_name', 'custom_hooks', 'val_cfg', 'test_cfg', 'test_time_augmentation',
         'check_data', 'fast', *datasets.KEYS),
    'fast': tuple(speed.DEFAULTS),
    'optim_wrapper': ('dtype', 'loss_scale', 'accumulative_counts', 'clip_grad')}
"""Keys of groups ('': the top) that mean something even where the config does not set them."""


def read_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """A config file with ``--cfg-options`` in it, completed for the user's data.

    Raises:
        UserError: As :func:`load_config`, :func:`apply_options`, :func:`check_toolbox`,
            :func:`check_backbones`, :func:`convnext_mm.datasets.complete` and
            :func:`convnext_mm.engine.speed.apply_fast`.
    """
    cfg = load_config(path)
    apply_options(cfg, options)
    check_toolbox(cfg)
    check_backbones(cfg.get('model'))
    datasets.complete(cfg)
    speed.apply_fast(cfg)
    return cfg


def load_config(path: str) -> Config:
    """Read a config file, as it is written.

    Raises:
        UserError: No such file, or one that cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        known = [str(p) for folder in (file.parent, Path('configs'), Path('configs/demo'))
                 if folder.is_dir() for p in folder.glob('*.py')]
        hint = suggest(file, known, count=3).strip() or (
            'The recipes are in configs/, such as '
            'configs/upernet_convnext_tiny_512_160k_ade20k.py.')
        raise UserError(f'Config not found: {file.absolute()}\n{hint}')
    old = migration.old_keys(file)
    if old:
        new = file.with_name(f'{file.stem}_new.py')
        raise UserError(
            f'{file} is a config for mmcv 0.x or 1.x (it sets {", ".join(old[:4])}), which the '
            f'OpenMMLab of today does not know. Convert it:\n'
            f'  python tools/migrate_config.py {file} {new}\n'
            'or train with --migrate, which keeps the new file in the work dir')
    try:
        with datasets.as_written():
            return Config.fromfile(file)
    except UserError:
        raise
    except Exception as error:  # a config is Python: anything can go wrong in it
        raise UserError(f'Config {file} cannot be read: {type(error).__name__}: {error}') from error


def apply_options(cfg: Config, options: dict[str, Any] | None) -> None:
    """Merge ``--cfg-options`` into ``cfg``.

    Raises:
        UserError: A key that looks like a misspelt one, or a value where keys belong.
    """
    for key, value in (options or {}).items():
        node: Any = cfg
        parts = key.split('.')
        for depth, part in enumerate(parts):
            here = '.'.join(parts[:depth]) or 'the config'
            if isinstance(node, (list, tuple)):
                if not part.isdigit() or int(part) >= len(node):
                    raise UserError(f'--cfg-options {key}: {here} is a list of {len(node)}, '
                                    f'expected an index below that, got {part!r}')
                node = node[int(part)]
                continue
            if not isinstance(node, dict) and not isinstance(node, Config):
                if node is None:
                    break
                raise UserError(f'--cfg-options {key}: {here} is {node!r} and has no {part!r}')
            if part not in node:
                names = [*node.keys(), *UNSET_KEYS.get('.'.join(parts[:depth]), ())]
                hint = suggest(part, names, count=3, cutoff=0.5 if depth == 0 else 0.75)
                if part not in names and (depth == 0 or hint):
                    known = ', '.join(sorted(n for n in names if not n.startswith('_')))
                    raise UserError(f'--cfg-options {key}: {here} has no key {part!r}.'
                                    + (hint or f' Its keys: {known}'))
                break
            node = node[part]
        else:
            if isinstance(node, dict) and value is not None and not isinstance(value, dict):
                raise UserError(f'--cfg-options {key}={value!r}: {key} is a group of keys '
                                f'({", ".join(node)}); set one of them, as {key}.KEY=VALUE')
    if options and options.get('data_root') and cfg.get('data_root'):
        datasets.move_data(cfg, cfg.data_root, options['data_root'])
    cfg.merge_from_dict(options or {})


def check_toolbox(cfg: Config) -> None:
    """See that what the config is built with is installed.

    Raises:
        UserError: mmseg or mmdet is missing, or mmcv's compiled ops, which mmdet needs.
    """
    toolbox = cfg.get('default_scope', 'mmengine')
    if not find_spec(toolbox):
        raise UserError(f'This config needs {toolbox}, which is not installed here: '
                        'python3 tools/install.py')
    if toolbox == 'mmdet' and not find_spec('mmcv._ext'):
        raise UserError("This config needs mmcv's compiled ops, which this mmcv was built "
                        'without: python3 tools/install.py')


def check_backbones(model: Any) -> None:
    """Check that every ConvNeXt in ``model`` has only known arguments.

    Raises:
        UserError: Names the unknown one, and the closest known.
    """
    known = [*inspect.signature(ConvNeXt).parameters]
    for path, backbone in speed.find_backbones(model):
        for key in backbone:
            if key not in known and key != 'type':
                raise UserError(f'{path} has {key!r}, which is no argument of ConvNeXt.' + (
                    suggest(key, known) or f' Its arguments: {", ".join(known)}'))


def check_data_exists(cfg: Config, splits: tuple[str, ...]) -> None:
    """See that every folder and annotation file of the ``splits`` ('train', …) is there.

    Raises:
        UserError: Names all that is missing, how to get the data, how to try the demo.
    """
    missing: dict[str, str] = {}
    for split in splits:
        for dataset in datasets.of_split(cfg, split):
            for path, what in _paths(dataset):
                if not os.path.exists(path):
                    missing.setdefault(path, f'{what} ({split})')
                elif os.path.isdir(path) and not any(os.scandir(path)):
                    missing.setdefault(path, f'{what} ({split}), empty')
        for metric in datasets.evaluators(cfg, split):
            path = metric.get('ann_file')
            if path and not os.path.exists(path):
                missing.setdefault(path, f"evaluator's annotation file ({split})")
    if missing:
        listed = '\n'.join(f'  {os.path.abspath(path)}  {what}' for path, what in missing.items())
        advice = '' if cfg.get('classes') else GET_DATA.get(cfg.get('default_scope'), '') + '\n'
        raise UserError(f'Data not found, expected at:\n{listed}\n{advice}{ELSEWHERE}\n'
                        f'{TRY_DEMO}')


def check_data_sample(cfg: Config, splits: tuple[str, ...], sample: int = 16) -> None:
    """Look at some pictures of each split before it is used, and print what is found.

    ``check_data=False`` in the config leaves it out.

    Raises:
        UserError: What would stop training, or have it learn something else.
    """
    if not is_first_process() or not cfg.get('check_data', True):
        return
    try:
        found = inspection.inspect(cfg, sample, splits)
    except Exception as error:  # a data set of the user's own class may be like no other
        print(f'Data: not looked at ({type(error).__name__}: {error})')
        return
    whole = f'All of it, with a picture: {WHOLE_CHECK} {cfg.filename}'
    problems = [problem for one in found for problem in one.problems]
    if any(problem.level == 'error' for problem in problems):
        raise UserError(f'the data has errors (✗)\n{inspection.report(found, frequencies=False)}\n'
                        f'{whole}\nTo go on all the same: --cfg-options check_data=False')
    if problems:
        print(f'{inspection.report(found, frequencies=False)}\n{whole}')
    else:
        counts = ', '.join(f'{one.split} {one.total} pictures' for one in found)
        print(f'Data: {counts}; {sample} of each looked at, no problem. {whole}')


def check_weights(cfg: Config, training: bool) -> None:
    """See that checkpoints are there and readable; URLs are downloaded now, once a node.

    Args:
        cfg: With ``load_from`` and the backbone's ``init_cfg``.
        training: Whether the backbone's ``init_cfg`` is going to be used.

    Raises:
        UserError: As :func:`convnext_mm.checkpoints.read`.
    """
    if os.environ.get('LOCAL_RANK', '0') != '0':
        return  # the node's first process does it for all, before they meet
    load_from = cfg.get('load_from')
    if load_from and 'optimizer' not in checkpoints.read(load_from) and cfg.get('resume'):
        raise UserError(f'--resume {load_from}: it holds weights, but no state of the '
                        'optimizer to go on from. To start a new run from its weights: '
                        f'--cfg-options load_from={load_from}')
    backbone = cfg.get('model', {}).get('backbone', {})
    init_cfg = backbone.get('init_cfg')
    if training and backbone.get('type') == 'ConvNeXt' and init_cfg and init_cfg.get('checkpoint'):
        checkpoints.locate(init_cfg['checkpoint'])


def _paths(dataset: dict) -> Iterator[tuple[str, str]]:
    """The (path, what it is) pairs that a data set's config names."""
    root = dataset.get('data_root') or ''
    for key, value in dataset.get('data_prefix', {}).items():
        if isinstance(value, str) and value and '://' not in value:
            yield os.path.join(root, value), 'masks' if 'seg' in key else 'pictures'
    if dataset.get('ann_file'):
        yield os.path.join(root, dataset['ann_file']), 'annotation file'
