"""Datasets, and what follows from their type and classes."""
from __future__ import annotations

import inspect
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

from ..datasets import (
    complete_config,
    dataset_classes,
    dataset_registry,
    datasets_of_split,
    metrics_of_split,
)
from ..datasets.coco import read_categories
from ..datasets.completion import (
    class_names,
    find_transforms,
    follow_data_root,
    metainfo_of_type,
)
from ..datasets.formats import recognise
from ..datasets.segmentation import IGNORED, describe_first_masks
from ..datasets.splitting import split_coco, split_names
from ..errors import UserError
from ..utils import require_package
from .edits import Edits, is_path_variable, lookup, nodes, same

SPLITS = ('train', 'val', 'test')


def dataset_type_and_reduce_zero_label(edits: Edits) -> None:
    """A dataset type that the user has chosen decides whether 0 in a mask is a class.

    The recipe's pipelines are ADE20K's, where it is none: with them, every label of Cityscapes
    would be one too low.
    """
    if edits.get('default_scope') != 'mmseg' or edits.get('reduce_zero_label') is not None:
        return
    for split in SPLITS:
        before = edits.inherited(f'{split}_dataloader.dataset.type')
        for dataset in datasets_of_split(edits.cfg, split):
            kind = dataset.get('type')
            if kind in (before, 'BaseSegDataset') or 'reduce_zero_label' in dataset:
                continue
            default = default_argument(dataset_registry('mmseg').get(kind) if isinstance(
                kind, str) else kind, 'reduce_zero_label')
            if isinstance(default, bool):
                dataset['reduce_zero_label'] = default
                edits.note(f': reduce_zero_label={default}, as {kind} has it', split)


COCO_TYPES = ('CocoDataset', 'convnext_mm.CocoDataset')
COCO_METRICS = ('CocoMetric', 'convnext_mm.CocoMetric')


def classes_and_palette(edits: Edits) -> None:
    """New classes do not take the palette that an inherited config has for its own."""
    palette, classes = edits.get('palette'), edits.get('classes')
    if not isinstance(palette, (list, tuple)) or edits.set_in('classes') >= edits.set_in('palette'):
        return
    if classes is None or len(class_names(classes, edits.get('data_root'))) != len(palette):
        edits.put('palette', None)


def data_root_and_classes(edits: Edits) -> None:
    """Data of the user's own has classes of its own.

    Categories of COCO files are read from them. Data in the recipe's folders below another
    ``data_root`` is the recipe's.

    Raises:
        UserError: Masks, which have no names, without ``classes``.
    """
    scope = edits.get('default_scope')
    if not edits.recipe or edits.get('classes') is not None or edits.get('palette') is not None:
        return
    for split in ('train', 'val', 'test'):
        before = edits.inherited(f'{split}_dataloader.dataset') or {}
        for dataset in datasets_of_split(edits.cfg, split):
            kind = dataset.get('type')
            if (dataset.get('metainfo') or {}).get('classes') or kind not in (
                    before.get('type'), 'BaseSegDataset', *COCO_TYPES):
                continue
            if scope == 'mmseg':
                own = dataset.get('data_prefix')
                if kind == 'BaseSegDataset' or (own and not same(own, before.get('data_prefix'))):
                    raise UserError(
                        f'{split}_dataloader reads masks of your own, but classes is not set: '
                        "write classes=('road', 'car', …) at the top of the config, a name for "
                        'each mask value from 0 (from 1, if 0 is no class)')
            elif kind in COCO_TYPES and not (same(dataset.get('data_root'), before.get('data_root'))
                                             and same(dataset.get('ann_file'),
                                                      before.get('ann_file'))):
                path = os.path.join(dataset.get('data_root') or '', dataset.get('ann_file') or '')
                if not os.path.isfile(path):
                    continue
                names = read_categories(path)
                if set(names) != set(dataset_classes(dataset, 'mmdet')):
                    edits.put('classes', tuple(names))
                    edits.note(f'classes={tuple(names)!r}, the categories of {path}')
                return


def classes_and_reduce_zero_label(edits: Edits) -> None:
    """Own classes come with what 0 in a mask means: the recipe's answer is that of its data set.

    An answer for one split, or in one pipeline, is the answer for all.

    Raises:
        UserError: Nobody has said it; the recipe says that 0 is no class.
    """
    if edits.get('default_scope') != 'mmseg' or not edits.recipe or (
            edits.get('classes') is None or edits.get('reduce_zero_label') is not None):
        return
    said, silent = set(), []
    for split in SPLITS:
        for dataset in datasets_of_split(edits.cfg, split):
            own = _answers(edits, split, dataset)
            answer = next((one for one in own if isinstance(one, bool)), None)
            if answer is None:
                silent.append((split, dataset))
            else:
                said.add(answer)
    if len(said) == 1:
        for split, dataset in silent:
            dataset['reduce_zero_label'] = next(iter(said))
            edits.note(f': reduce_zero_label={next(iter(said))}, as in the other data', split)
    if said or not any(_reduces(dataset) and not _is_recipes_data(edits, split, dataset)
                       for split, dataset in silent):
        return
    classes = class_names(edits.get('classes'), edits.get('data_root'))
    if len(classes) == 1:
        return  # refused for another reason
    seen = describe_first_masks(next((dataset for _, dataset in silent), {}), len(classes))
    raise UserError(
        'classes is set, but not what 0 in a mask means. Write one of these lines at the top of '
        f'the config:\n  reduce_zero_label = False  # 0 is {classes[0]!r}, the last of the '
        f'{len(classes)} classes is {len(classes) - 1}\n  reduce_zero_label = True   # 0 is no '
        f'class and is ignored, 1 is {classes[0]!r}, the last is {len(classes)}' + seen)


def data_format_and_conversion(edits: Edits) -> None:
    """Annotations of a detector are in COCO format, as far as the data set reads that.

    Raises:
        UserError: They are in another format that can be converted; says how.
    """
    follow_data_root(edits.cfg)
    if edits.get('default_scope') != 'mmdet' or not edits.recipe:
        return
    data = [one for split in SPLITS for one in datasets_of_split(edits.cfg, split)
            if one.get('type') in COCO_TYPES]
    before = [edits.inherited(f'{split}_dataloader.dataset') or {} for split in SPLITS]
    if all(any(same(one.get(key), old.get(key)) for old in before)
           for one in data for key in ('data_root', 'ann_file')):
        return  # COCO
    roots = dict.fromkeys(one.get('data_root') or '' for one in data)
    files = dict.fromkeys(os.path.join(one.get('data_root') or '', one.get('ann_file') or '')
                          for one in data)
    for place in [file for file in files if os.path.exists(file)] or roots:
        if place.endswith('.json') and os.path.getsize(place) > 2**24:
            continue  # files of other formats describe one image
        kind = recognise(place) if place else None
        if kind not in (None, 'COCO'):
            folder = next((root for root in roots if root and place.startswith(root)), place)
            raise UserError(
                f'{place} is in the format of {kind}, but detectors read COCO format. Convert it '
                'once; the command prints the lines for the config:\n  python '
                f'tools/convert_dataset.py {folder} {os.path.join(folder, "coco_format")}')


def val_and_dataloaders(edits: Edits) -> None:
    """``val=0.2`` takes validation data from the training data, and writes both lists down.

    They stand in a folder ``split_0.2`` below ``data_root``, and are made again only for other
    images. Near-duplicates of one image are on one side.

    Raises:
        UserError: It is no share, there is validation data already, or the data set has no lists.
    """
    share = edits.get('val')
    if share is None or not edits.recipe or is_path_variable(edits, 'val'):
        return
    if not isinstance(share, float) or not 0 < share < 1:
        raise UserError(f'val={share!r} must be a share of the training images, such as val=0.2')
    found = {split: datasets_of_split(edits.cfg, split) for split in ('train', 'val')}
    if any(len(one) != 1 for one in found.values()):
        raise UserError(f'val={share} needs one data set for training and one for validation: use '
                        'tools/split_dataset.py')
    train, val = found['train'][0], found['val'][0]
    root, file = train.get('data_root') or '', train.get('ann_file') or ''
    out = os.path.join(os.path.abspath(root), f'split_{share}')
    if os.path.dirname(file) == out:
        return  # resolved before
    for key in ('ann_file', 'data_prefix'):
        if edits.was_set(f'val_dataloader.dataset.{key}'):
            raise UserError(f'val={share}, but val_dataloader.dataset.{key} is set: remove one of '
                            'them')
    detector = edits.get('default_scope') == 'mmdet'
    prefix = train.get('data_prefix') or {}
    images = os.path.join(root, prefix.get('img' if detector else 'img_path') or '')
    suffix = '.json' if detector else '.txt'
    if detector and train.get('type') not in COCO_TYPES:
        raise UserError(f'val={share} splits COCO files, but train_dataloader.dataset.type is '
                        f'{train.get("type")}: split it by hand')
    if detector and os.path.isfile(os.path.join(root, file)):
        split_coco(os.path.join(root, file), images, share, 0, Path(out))
    elif not detector and os.path.isdir(images):
        names = _names_of_masks(edits, train, images)
        split_names([os.path.join(images, name) for _, name in names], [name for name, _ in names],
                    share, 0, Path(out))
    train['ann_file'] = os.path.join(out, f'train{suffix}')
    val['ann_file'] = os.path.join(out, f'val{suffix}')
    val['data_prefix'] = deepcopy(prefix)
    edits.note(f'val={share}: the lists of training and validation images are in {out}')


def _names_of_masks(edits: Edits, dataset: dict, images: str) -> list[tuple[str, str]]:
    """Names without their endings, as mmseg's lists have them, and with them."""
    suffixes: Any = edits.get('img_suffix') or dataset.get('img_suffix') or default_argument(
        dataset_registry('mmseg').get(dataset['type']), 'img_suffix') or '.jpg'
    suffixes = (suffixes,) if isinstance(suffixes, str) else tuple(suffixes)
    found = [(name.removesuffix(suffix), name) for name in _files_below(images)
             for suffix in suffixes if name.endswith(suffix)]
    path = os.path.join(dataset.get('data_root') or '', dataset.get('ann_file') or '')
    if dataset.get('ann_file') and os.path.isfile(path):
        listed = set(Path(path).read_text(encoding='utf-8').split('\n'))
        found = [one for one in found if one[0] in listed]
    if not found:
        raise UserError(f'val={edits.get("val")}: no image ends with {" or ".join(suffixes)} in '
                        f'{images}')
    return found


def _files_below(folder: str) -> list[str]:
    return sorted(os.path.relpath(os.path.join(root, name), folder)
                  for root, _, names in os.walk(folder) for name in names)


def _answers(edits: Edits, split: str, dataset: dict) -> list:
    """What the user, not the recipe, says about 0 in the masks of a data set."""
    before = edits.inherited(f'{split}_dataloader.dataset') or {}
    answers = []
    if not same(dataset.get('reduce_zero_label'), before.get('reduce_zero_label')):
        answers.append(dataset.get('reduce_zero_label'))
    name = 'train_pipeline' if split == 'train' else 'test_pipeline'
    path = f'{split}_dataloader.dataset.pipeline'
    wrapped = lookup(edits.history[0], path) is None
    if edits.was_set(name) or edits.was_set(path) or (
            wrapped and not same(dataset.get('pipeline'), before.get('pipeline'))):
        answers += [loader.get('reduce_zero_label') for loader in find_transforms(
            dataset.get('pipeline'), 'LoadAnnotations')]
    return answers


def _reduces(dataset: dict) -> bool:
    """Whether 0 is no class, as mmseg would load these masks."""
    kind = dataset.get('type')
    found = [dataset.get('reduce_zero_label'), *(
        one.get('reduce_zero_label') for one in find_transforms(
            dataset.get('pipeline'), 'LoadAnnotations')), default_argument(
        dataset_registry('mmseg').get(kind) if isinstance(kind, str) else kind,
        'reduce_zero_label')]
    return bool(next((one for one in found if one is not None), False))


def _is_recipes_data(edits: Edits, split: str, dataset: dict) -> bool:
    """Whether some of the recipe's classes are chosen of the recipe's own data."""
    before = edits.inherited(f'{split}_dataloader.dataset') or {}
    own = metainfo_of_type(dataset, 'mmseg').get('classes') or ()
    return all(same(dataset.get(key), before.get(key)) for key in ('data_root', 'data_prefix')
               ) and set(class_names(edits.get('classes'), edits.get('data_root'))) <= set(own)


def ignore_and_datasets(edits: Edits) -> None:
    """``ignore`` (mask values) and several endings of images need our data set of masks.

    Raises:
        UserError: ``ignore`` is no value, or the data set's class has its own way to load masks.
    """
    ignore = None if is_path_variable(edits, 'ignore') else edits.get('ignore')
    if ignore is not None:
        ignore = [ignore] if isinstance(ignore, int) else ignore
        if not isinstance(ignore, (list, tuple)) or not all(
                isinstance(one, int) and not isinstance(one, bool) and 0 <= one <= 255
                for one in ignore):
            raise UserError(f'ignore={edits.get("ignore")!r} must be a mask value from 0 to 255, '
                            'or several: ignore=11, ignore=(11, 12)')
        if edits.get('default_scope') != 'mmseg':
            raise UserError("ignore is a setting of segmentation: a detector's objects are ignored "
                            'by "iscrowd": 1 in the annotation file')
    if edits.get('default_scope') != 'mmseg':
        return
    for split in SPLITS:
        for dataset in datasets_of_split(edits.cfg, split):
            several = isinstance(dataset.get('img_suffix'), (list, tuple))
            if ignore is None and not several:
                continue
            if dataset.get('type') not in ('BaseSegDataset', 'convnext_mm.SegmentationDataset'):
                raise UserError(
                    f'{"img_suffix of several endings" if several else "ignore"} needs data of '
                    f'your own, but {split}_dataloader.dataset.type is {dataset.get("type")}: set '
                    'classes=(...) as well')
            dataset['type'] = 'convnext_mm.SegmentationDataset'
            if ignore is not None:
                dataset['ignore'] = tuple(ignore)


def ignore_index_and_masks(edits: Edits) -> None:
    """Pixels of no class have one label in masks, padding, losses and metrics.

    Raises:
        UserError: The user has set another for some of them.
    """
    if edits.get('default_scope') != 'mmseg' or not edits.recipe:
        return  # a whole config, such as mmengine writes into a work dir, may agree on another
    for place in ('model', *(f'{split}_{part}' for split in SPLITS
                             for part in ('dataloader', 'evaluator'))):
        for path, node in nodes(edits.get(place), place):
            for key in ('ignore_index', 'ignore_label'):
                value, own = node.get(key, IGNORED), f'{path}.{key}'
                if value == IGNORED or not edits.was_set(own):
                    continue
                dataset = next(iter(datasets_of_split(edits.cfg, 'train')), {})
                shifted = dataset.get('reduce_zero_label') is True
                raise UserError(
                    f'{own}={value}, but pixels of no class have the label {IGNORED} in masks, '
                    f'padding, losses and metrics: remove {key}' + (
                        f'. To leave out label {value}, write `ignore = {value + shifted}` at the '
                        'top of the config, its value in the masks'
                        if isinstance(value, int) else ''))


def dataset_type_and_labels(edits: Edits) -> None:
    """Labels of own COCO data follow ``classes``, in whatever order the files have categories."""
    if edits.get('default_scope') != 'mmdet':
        return
    for split in SPLITS:
        own, before = False, edits.inherited(f'{split}_dataloader.dataset') or {}
        for dataset in datasets_of_split(edits.cfg, split):
            changed = before and not all(same(dataset.get(key), before.get(key))
                                         for key in ('data_root', 'ann_file', 'metainfo'))
            named = (dataset.get('metainfo') or {}).get('classes')
            if dataset.get('type') in COCO_TYPES and (changed or named):
                dataset['type'], own = COCO_TYPES[1], True
        for metric in metrics_of_split(edits.cfg, split) if own else ():
            if metric.get('type') == 'CocoMetric':
                metric['type'] = 'convnext_mm.CocoMetric'


def test_data_and_annotations(edits: Edits) -> None:
    """A test set may have no annotations: they are then neither loaded nor compared.

    Images without masks have no ``seg_map_path``, images without objects no ``ann_file``.
    """
    segments = edits.get('default_scope') == 'mmseg'
    metrics = metrics_of_split(edits.cfg, 'test')
    format_only = bool(metrics) and all(one.get('format_only') for one in metrics)
    folder = edits.get('work_dir') or os.path.join('work_dirs', os.path.splitext(
        os.path.basename(edits.cfg.filename or 'test'))[0])
    for dataset in datasets_of_split(edits.cfg, 'test'):
        prefix = dataset.get('data_prefix')
        if segments:
            images_only = isinstance(prefix, dict) and 'seg_map_path' in prefix and (
                prefix['seg_map_path'] in (None, ''))
            if images_only and prefix:
                del prefix['seg_map_path']
        else:
            images_only = not dataset.get('ann_file') and dataset.get('type') in COCO_TYPES
            if images_only:
                dataset.update(type=COCO_TYPES[1], ann_file='')
        if not images_only and not format_only:
            continue
        for path, steps in (('test_dataloader.dataset.pipeline', dataset.get('pipeline')),
                            ('tta_pipeline', edits.get('tta_pipeline'))):
            if _drop_loaders(steps or []):
                edits.note(' load no annotations: the test data has none', path)
        for metric in metrics:
            if segments and images_only and metric.get('type') == 'IoUMetric' and (
                    not metric.get('format_only')):
                out = metric.get('output_dir') or os.path.join(folder, 'test_masks')
                metric.update(format_only=True, output_dir=out)
                edits.note(f'test_evaluator writes class maps to {out}: the test data has no masks')
            elif images_only and metric.get('type') in COCO_METRICS:
                out = os.path.join(folder, 'test_detections.json')
                metric.clear()
                metric.update(type='convnext_mm.DetectionWriter', out_file=out)
                edits.note(f'test_evaluator writes detections to {out}: the test data has no '
                           'annotations')
            elif metric.get('type') in COCO_METRICS and not metric.get('outfile_prefix'):
                metric['outfile_prefix'] = os.path.join(folder, 'test_detections')


def _drop_loaders(steps: list) -> bool:
    """Remove LoadAnnotations from a pipeline, in place; whether there was one."""
    dropped = False
    for i in reversed(range(len(steps))):
        if isinstance(steps[i], dict) and steps[i].get('type') == 'LoadAnnotations':
            steps.pop(i)
            dropped = True
        elif isinstance(steps[i], dict):
            dropped = _drop_loaders(steps[i].get('transforms') or []) or dropped
        elif isinstance(steps[i], list):
            dropped = _drop_loaders(steps[i]) or dropped
            if not steps[i]:
                steps.pop(i)
    return dropped


NEED_COLORS = ('PhotoMetricDistortion', 'YOLOXHSVRandomAug', 'RGB2Gray', 'CLAHE')
"""Transforms that work on three bands of 8 bits only."""


def in_chans_and_pipelines(edits: Edits) -> None:
    """Pipelines read and keep the bands of ``model.backbone.in_chans``.

    All bits of them, if ``mean`` or ``std`` is beyond 8 bits: OpenCV keeps the highest 8 otherwise.

    Raises:
        UserError: The user's pipeline reads another number of bands, or changes colors.
    """
    bands = edits.get('model.backbone.in_chans', 3)
    if edits.get('model.backbone.type') != 'ConvNeXt' or not isinstance(bands, int):
        return
    deep = any(isinstance(value, (int, float)) and value > 255 for key in ('mean', 'std')
               for value in edits.get(f'model.data_preprocessor.{key}') or ())
    for path in (*edits.pipelines(*SPLITS), 'tta_pipeline'):
        steps, before = edits.get(path), edits.recipes_pipeline(path)
        if not steps or steps[0].get('type') != 'LoadImageFromFile':
            continue
        in_8_bits = dict(color=3, grayscale=1)
        color_type = steps[0].get('color_type', 'color')
        reads = in_8_bits.get(color_type, bands)
        own = not same(steps[0], lookup(before, '0'))
        if reads != bands or (deep and color_type in in_8_bits and not own):
            if own:
                raise UserError(
                    f'{path}.0: LoadImageFromFile reads {reads} bands (color_type), but '
                    f'model.backbone.in_chans={bands}: set ' + (
                        "color_type='grayscale'" if bands == 1 else "color_type='color'"
                        if bands == 3 else "color_type='unchanged', imdecode_backend='tifffile'"))
            if bands == 1 and not deep:
                steps[0].update(color_type='grayscale')
            else:
                steps[0].update(color_type='unchanged', to_float32=True)
            if bands not in (1, 3):
                steps[0]['imdecode_backend'] = 'tifffile'
            edits.note(f' read {bands} bands: ' + ', '.join(
                f'{key}={value!r}' for key, value in steps[0].items() if key != 'type'), path)
        for i, step in reversed(list(enumerate(steps))):
            if (bands != 3 or deep) and step.get('type') in NEED_COLORS:
                needs, has = ('3 bands', f'model.backbone.in_chans={bands}') if bands != 3 else (
                    'values of 8 bits', 'mean and std of model.data_preprocessor exceed them')
                if not same(lookup(edits.history[0], path), before):
                    raise UserError(f'{path}.{i}: {step["type"]} needs {needs}, but {has}: remove '
                                    'it')
                steps.pop(i)
                edits.note(f': without {step["type"]}, which needs {needs}', path)


def imdecode_backend_and_packages(edits: Edits) -> None:
    """The package that decodes images is installed.

    Raises:
        UserError: It is not, and how to install it.
    """
    packages = dict(tifffile='tifffile', turbojpeg='PyTurboJPEG')
    for path in (*edits.pipelines(*SPLITS), 'tta_pipeline'):
        for step in find_transforms(edits.get(path), 'LoadImageFromFile'):
            backend = step.get('imdecode_backend')
            if backend in packages:
                require_package(backend, packages[backend], f'{path}: imdecode_backend={backend!r}')


def datasets_and_tta_pipeline(edits: Edits) -> None:
    """Test-time augmentation reads masks as the test dataset does."""
    if edits.get('default_scope') != 'mmseg':
        return
    dataset = next(iter(datasets_of_split(edits.cfg, 'test')), {})
    if isinstance(dataset.get('reduce_zero_label'), bool):
        for loader in find_transforms(edits.get('tta_pipeline'), 'LoadAnnotations'):
            loader['reduce_zero_label'] = dataset['reduce_zero_label']


def default_argument(kind: type | None, name: str) -> object:
    """The default of a class's argument, looked for in its bases as well; None: there is none."""
    for base in kind.__mro__ if inspect.isclass(kind) else ():
        init = base.__dict__.get('__init__')
        parameter = inspect.signature(init).parameters.get(name) if inspect.isfunction(
            init) else None
        if parameter is not None:
            return parameter.default
    return None


def data_and_heads(edits: Edits) -> None:
    """Datasets, evaluators and heads follow ``data_root``, paths and ``classes``.

    Raises:
        UserError: See :func:`convnext_mm.datasets.complete_config`.
    """
    complete_config(edits.cfg)


def classes_and_background(edits: Edits) -> None:
    """A segmentor has two classes at least: with one, every pixel is certain to be of it.

    Raises:
        UserError: There is one.
    """
    if edits.get('default_scope') != 'mmseg':
        return
    for split in SPLITS:
        for dataset in datasets_of_split(edits.cfg, split):
            classes = dataset_classes(dataset, 'mmseg')
            if len(classes) == 1:
                raise UserError(
                    f'{split}_dataloader.dataset has the one class {classes[0]!r}: a pixel of no '
                    'class is ignored, so that there is nothing to learn. Name the background as '
                    f"well: classes=('background', {classes[0]!r}) and reduce_zero_label=False, "
                    f'with 0 for the background and 1 for {classes[0]} in the masks')
