"""Checks of the user's config, options, data and weights before a model is built."""
from __future__ import annotations

import os
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mmcv.image import rescale_size
from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

from .. import checkpoints, datasets
from ..bases import without_completion
from ..checkpoints.files import peek_checkpoint
from ..datasets import inspection
from ..datasets.completion import find_transforms
from ..datasets.findings import CHECK_COMMAND
from ..errors import UserError
from ..inputs import find_config, unreadable_config
from ..migration.parsing import old_keys
from ..resolution import batches, resolve
from ..resolution.mmpretrain import needed_imports
from ..resolution.model import norms_of_one_value, processes
from ..resolution.schedule import run_length
from ..runs import resuming
from ..utils import describe, is_first_process, suggest
from . import speed
from .cfg_options import apply_options

GET_DATA = {
    'mmseg': ('ADE20K: download ADEChallengeData2016.zip from '
              'http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip and unpack '
              'it in data/ade/, so that data/ade/ADEChallengeData2016/images/training/ exists'),
    'mmdet': ('COCO: download train2017.zip, val2017.zip and annotations_trainval2017.zip from '
              'https://cocodataset.org/#download and unpack them in data/coco/, so that '
              'data/coco/annotations/instances_train2017.json and data/coco/train2017/ exist'),
}
OTHER_FOLDER = 'If the data is in another folder: --cfg-options data_root=/path/to/data'
TRY_DEMO = 'To try the package without any data: make demo'

def read_config(path: str, options: dict[str, Any] | None = None,
                notes: list[str] | None = None) -> Config:
    """Load a config file, merge ``--cfg-options`` into it and complete it for the user's data.

    Args:
        path: A config file.
        options: {dotted key: value}.
        notes: What followed from the user's changes is added here; None: it is printed.

    Raises:
        UserError: A value is of a kind that its key does not take; see also
            :func:`load_config`, :func:`apply_options`, :func:`check_toolbox`,
            :func:`convnext_mm.resolution.resolve` and :func:`convnext_mm.engine.speed.apply_fast`.
    """
    cfg = load_config(path)
    try:
        apply_options(cfg, options)
        check_toolbox(cfg)
        followed = resolve(cfg)
    except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError,
            RecursionError) as error:
        if isinstance(error, UserError):
            raise
        given = ', '.join(f'{key}={value!r}' for key, value in (options or {}).items())
        raise UserError(f'{path}{f" with {given}" if given else ""}: a value is of another kind '
                        f'than its key takes ({describe(error)})') from error
    if notes is not None:
        notes += followed
    elif followed and is_first_process():
        print('\n  '.join(['Adjusted to your changes:', *followed]))
    speed.apply_fast(cfg)
    return cfg


def load_config(path: str) -> Config:
    """Load a config file without completing it.

    Raises:
        UserError: The file does not exist, is for mmcv 0.x or 1.x, or cannot be read.
    """
    file = find_config(path)
    old = old_keys(file)
    if old:
        new = file.with_name(f'{file.stem}_new.py')
        raise UserError(
            f'{file} is a config for mmcv 0.x or 1.x (it sets {", ".join(old[:4])}), which '
            f'current OpenMMLab versions cannot read. Convert it:\n'
            f'  python tools/migrate_config.py {file} {new}\n'
            'or train with --migrate, which writes the new file to the work dir')
    try:
        with without_completion():
            cfg = Config.fromfile(file, import_custom_modules=False)
        # mmpretrain is not imported for its ConvNeXt, which resolve() replaces by ours.
        import_modules_from_strings(needed_imports(cfg), (cfg.get('custom_imports') or {}).get(
            'allow_failed_imports', False))
        return cfg
    except UserError:
        raise
    except Exception as error:  # a config is Python code and can raise anything
        raise unreadable_config(file, error) from error


def check_toolbox(cfg: Config) -> None:
    """Check that the toolbox of the config is installed.

    Raises:
        UserError: mmseg or mmdet is missing or for another mmcv, or mmcv has no operators and the
            patch that gives it ours is switched off.
    """
    toolbox = cfg.get('default_scope', 'mmengine')
    found = find_spec(toolbox)
    if not found:
        raise UserError(f'This config needs {toolbox}, which is not installed. Install it: '
                        'python3 tools/install.py')
    try:
        import_module(toolbox)
    except Exception as error:  # such as an assertion on the version of mmcv
        raise UserError(f'This config needs {toolbox}, but {found.origin} cannot be imported '
                        f'({describe(error)}). Versions for mmcv 1.x do not work here: take it '
                        'from PYTHONPATH or uninstall it, then run python3 tools/install.py'
                        ) from error
    if toolbox == 'mmdet' and not find_spec('mmcv._ext'):
        raise UserError("This config needs mmcv's operators, which the installed mmcv was built "
                        'without, and CONVNEXT_MM_PATCHES switches off ours (operators). '
                        'Unset it, or compile them: python3 tools/install.py --ops compiled')


def check_input(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check the files of a run before it starts.

    Raises:
        UserError: See :func:`check_data_exists`, :func:`check_data_sample`,
            :func:`check_batches` and :func:`check_weights`.
    """
    check_data_exists(cfg, splits)
    check_data_sample(cfg, splits)
    check_batches(cfg, splits)
    check_weights(cfg, training='train' in splits)


def check_data_exists(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check that all folders and annotation files of ``splits`` ('train', 'val', 'test') exist.

    Raises:
        UserError: Lists everything that is missing and says how to get the data.
    """
    missing: dict[str, str] = {}
    for split in splits:
        for dataset in datasets.datasets_of_split(cfg, split):
            for path, kind in _dataset_paths(dataset):
                if not os.path.exists(path):
                    missing.setdefault(path, f'{kind} ({split})')
                elif os.path.isdir(path) and not any(os.scandir(path)):
                    missing.setdefault(path, f'{kind} ({split}), empty')
        for metric in datasets.metrics_of_split(cfg, split):
            ann_file = metric.get('ann_file')
            if ann_file and not os.path.exists(ann_file):
                missing.setdefault(ann_file, f"evaluator's annotation file ({split})")
    if missing:
        listed = '\n'.join(f'  {os.path.abspath(path)}  {kind}{_similar_name(path)}'
                           for path, kind in missing.items())
        advice = '' if cfg.get('classes') else GET_DATA.get(cfg.get('default_scope'), '') + '\n'
        raise UserError(f'Data not found, expected at:\n{listed}\n{advice}{OTHER_FOLDER}\n'
                        f'{TRY_DEMO}')


def _similar_name(path: str) -> str:
    """A question whether another file or folder beside a missing one was meant, or ''."""
    folder, name = os.path.split(os.path.abspath(path))
    hint = '' if os.path.exists(path) or not os.path.isdir(folder) else suggest(
        name, os.listdir(folder))
    return f'. {hint.strip()}' if hint else ''


def check_data_sample(cfg: Config, splits: tuple[str, ...], sample: int = 16) -> None:
    """Inspect ``sample`` images of each split and print the problems found.

    ``check_data=False`` in the config disables it.

    Raises:
        UserError: The data has errors, which would stop training or corrupt its results.
    """
    if not is_first_process() or not cfg.get('check_data', True):
        return
    try:
        found = inspection.inspect_splits(cfg, sample, splits)
    except UserError:
        raise
    except Exception as error:  # custom data set classes may have any structure
        print(f'Data: not checked ({type(error).__name__}: {error})')
        return
    full_check = f'To check and draw all images: {CHECK_COMMAND} {cfg.filename}'
    report = inspection.format_report(found, frequencies=False)
    problems = [problem for one in found for problem in one.problems]
    if any(problem.level == 'error' for problem in problems):
        raise UserError(f'the data has errors (✗)\n{report}\n{full_check}\n'
                        'To train anyway: --cfg-options check_data=False')
    if problems:
        print(f'{report}\n{full_check}')
    else:
        counts = ', '.join(f'{one.split} {one.total} images' for one in found)
        print(f'Data: {counts}; no problems in a sample of {sample} each. {full_check}')


def check_batches(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check that images which share a batch have one size, and that no batch is too small (mmseg).

    Images of training are padded, to one size only if they are not larger.

    Raises:
        UserError: They do not, and names two of them; see also :func:`check_last_batch`.
    """
    for split in splits if cfg.get('default_scope') == 'mmseg' else ():
        batch = (cfg.get(f'{split}_dataloader') or {}).get('batch_size', 1)
        least: Any = (0, 0)
        if split == 'train':
            check_last_batch(cfg)
            least = (cfg.model.get('data_preprocessor') or {}).get('size')
        if batch == 1 or least is None:
            continue
        sizes: dict[tuple[int, int], str] = {}
        for dataset, steps in batches.steps_of_split(cfg, split):
            changes = list(batches.resizing(steps))
            scale = changes[0].get('scale') if changes else None
            if changes and (len(changes) > 1 or changes[0]['type'] != 'Resize' or not (
                    scale and changes[0].get('keep_ratio'))):
                continue  # to one size, or a random one
            for path, size in inspection.image_sizes(dataset):
                width, height = rescale_size(size, tuple(scale)) if scale else size
                sizes.setdefault((max(width, least[1]), max(height, least[0])), path)
        if len(sizes) > 1:
            named = ', '.join(f'{path} ({w}×{h})' for (w, h), path in list(sizes.items())[:2])
            raise UserError(
                f'{split}_dataloader.batch_size={batch}, but images have different sizes: {named}. '
                + (f'Set {split}_dataloader.batch_size=1' if split != 'train' else
                   'Set model.data_preprocessor.size_divisor=32 instead of size, which pads them '
                   'to the largest of a batch, or crop them (RandomCrop)'))


def check_last_batch(cfg: Config) -> None:
    """Leave out the last batch of an epoch if it is one image, on which a head cannot train.

    Raises:
        UserError: ``drop_last=False`` keeps it, or there is no other batch.
    """
    loader = cfg.get('train_dataloader') or {}
    batch = loader.get('batch_size', 1)
    reason = next((reason for reason, _ in norms_of_one_value(cfg)), None)
    if reason is None or batch == 1 or loader.get('drop_last') or loader.get('batch_sampler') or (
            (loader.get('sampler') or {}).get('type') == 'InfiniteSampler'):
        return
    count = len(datasets.dataset_registry('mmseg').build(dict(loader['dataset'], _scope_='mmseg')))
    own = -(-count // processes())
    if own % batch != 1:
        return
    message = (f'train_dataloader has {count} images, {batch} in a batch: the last batch of an '
               f'epoch is one image, but {reason}')
    if 'drop_last' in loader or own == 1:
        raise UserError(f'{message}. Set train_dataloader.drop_last=True, or another batch_size')
    loader['drop_last'] = True
    if is_first_process():
        print(f'{message}. It is left out (train_dataloader.drop_last=True)')


def check_weights(cfg: Config, training: bool) -> None:
    """Check that checkpoints exist and are readable; download URLs once per node.

    Args:
        cfg: Its ``load_from`` and the backbone's ``init_cfg`` are checked.
        training: Whether the backbone's ``init_cfg`` will be used.

    Raises:
        UserError: See :func:`convnext_mm.checkpoints.read_checkpoint`.
    """
    if os.environ.get('LOCAL_RANK', '0') != '0':
        return  # the first process of the node checks for all, before the process group opens
    load_from, resume = cfg.get('load_from'), training and cfg.get('resume')
    if resume and not load_from:
        load_from = resuming.find_checkpoint(cfg)
        content = peek_checkpoint(load_from) if load_from else {}
    else:
        content = checkpoints.read_checkpoint(load_from) if load_from else {}
    if load_from and cfg.get('resume') and 'optimizer' not in content:
        raise UserError(f'--resume {load_from}: it contains weights, but no optimizer state to '
                        'resume from. To start a new run from its weights: '
                        f'--cfg-options load_from={load_from}')
    if resume and load_from:
        check_resumed_schedule(cfg, load_from, content)
    backbone = cfg.get('model', {}).get('backbone', {})
    init_cfg = backbone.get('init_cfg')
    if training and backbone.get('type') == 'ConvNeXt' and init_cfg and init_cfg.get('checkpoint'):
        try:
            checkpoints.locate_checkpoint(init_cfg['checkpoint'])
        except UserError as error:
            raise UserError(f'{error}\nThe backbone starts from it (model.backbone.init_cfg). To '
                            'train from scratch: --cfg-options model.backbone.init_cfg=None'
                            ) from error


def check_resumed_schedule(cfg: Config, path: str, content: dict[str, Any]) -> None:
    """Check that the schedule of a checkpoint, which is restored with it, is as long as the run.

    Raises:
        UserError: The learning rate's schedule ends before the run does.
    """
    length = run_length(cfg.get('train_cfg'))
    states = content.get('param_schedulers')
    if isinstance(states, dict):  # of several optimizers
        states = next(iter(states.values()), [])
    if length is None or not isinstance(states, list):
        return
    ends = [state['end'] for state in states if isinstance(state, dict)
            and state.get('param_name', 'lr') == 'lr' and state.get('by_epoch') == length[1]
            and isinstance(state.get('end'), int)]
    # mmengine's schedules by iteration end one iteration after the run.
    end = max(ends, default=10**9)
    unit = 'epochs' if length[1] else 'iterations'
    if end < length[0]:
        raise UserError(
            f'train_cfg trains for {length[0]} {unit}, but {path}, which is resumed, brings its '
            f'own schedule, which ends at {end if length[1] else end - 1}: from then on the '
            'learning rate would stay at its last value. To train for longer, start a new run from '
            f'its weights, with a schedule of its own: --cfg-options load_from={path}')


def _dataset_paths(dataset: dict) -> Iterator[tuple[str, str]]:
    """Yield each path in a data set's config, and what it contains."""
    root = dataset.get('data_root') or ''
    loads_masks = not dataset.get('pipeline') or any(
        find_transforms(dataset['pipeline'], 'LoadAnnotations'))
    for key, value in dataset.get('data_prefix', {}).items():
        if isinstance(value, str) and value and '://' not in value and (
                loads_masks or 'seg' not in key):
            yield os.path.join(root, value), 'masks' if 'seg' in key else 'images'
    if dataset.get('ann_file'):
        yield os.path.join(root, dataset['ann_file']), 'annotation file'
