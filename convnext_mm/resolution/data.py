"""Datasets, and what follows from their type and classes."""
from __future__ import annotations

import inspect

from ..datasets import complete_config, dataset_classes, dataset_registry, datasets_of_split
from ..datasets.completion import find_transforms
from ..errors import UserError
from ..utils import require_package
from .edits import PIPELINES, Edits

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


NEED_COLORS = ('PhotoMetricDistortion', 'YOLOXHSVRandomAug', 'RGB2Gray', 'CLAHE')
"""Transforms that work on three bands only."""


def in_chans_and_pipelines(edits: Edits) -> None:
    """Pipelines read and keep the bands of ``model.backbone.in_chans``.

    Raises:
        UserError: The user's pipeline reads another number of bands, or changes colors.
    """
    bands = edits.get('model.backbone.in_chans', 3)
    if edits.get('model.backbone.type') != 'ConvNeXt' or not isinstance(bands, int):
        return
    for path in PIPELINES:
        steps = edits.get(path)
        if not steps or steps[0].get('type') != 'LoadImageFromFile':
            continue
        reads = dict(color=3, grayscale=1).get(steps[0].get('color_type', 'color'), bands)
        if reads != bands:
            if edits.was_set(f'{path}.0'):
                raise UserError(
                    f'{path}.0: LoadImageFromFile reads {reads} bands (color_type), but '
                    f'model.backbone.in_chans={bands}: set ' + (
                        "color_type='grayscale'" if bands == 1 else "color_type='color'"
                        if bands == 3 else "color_type='unchanged', imdecode_backend='tifffile'"))
            steps[0].update(dict(color_type='grayscale') if bands == 1 else dict(
                color_type='unchanged', imdecode_backend='tifffile', to_float32=True))
            edits.note(f' read {bands} bands: ' + ', '.join(
                f'{key}={value!r}' for key, value in steps[0].items() if key != 'type'), path)
        for i, step in reversed(list(enumerate(steps))):
            if bands != 3 and step.get('type') in NEED_COLORS:
                if edits.was_set(path):
                    raise UserError(f'{path}.{i}: {step["type"]} needs 3 bands, but model.backbone.'
                                    f'in_chans={bands}: remove it')
                steps.pop(i)
                edits.note(f': without {step["type"]}, which needs 3 bands', path)


def imdecode_backend_and_packages(edits: Edits) -> None:
    """The package that decodes images is installed.

    Raises:
        UserError: It is not, and how to install it.
    """
    packages = dict(tifffile='tifffile', turbojpeg='PyTurboJPEG')
    for path in PIPELINES:
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
