"""Converts ``data`` into dataloaders, data sets, a data preprocessor and evaluators."""
from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from copy import deepcopy
from importlib import import_module
from typing import Any, NoReturn, Protocol

from ..errors import UserError
from .parsing import REGISTER_HINT, OldConfig, merge
from .pipelines import ConvertedPipeline, PipelineConverter, tta_pipeline

SPLITS = ('train', 'val', 'test')
LOADER_KEYS: dict[str, str | None] = dict(
    samples_per_gpu='batch_size', workers_per_gpu='num_workers', shuffle=None,
    persistent_workers='persistent_workers', drop_last='drop_last', pin_memory='pin_memory',
    prefetch_factor='prefetch_factor')
RENAMED_KEYS: dict[str, dict[str, tuple[str, ...]]] = dict(
    mmseg=dict(img_dir=('data_prefix', 'img_path'), ann_dir=('data_prefix', 'seg_map_path'),
               split=('ann_file',), classes=('metainfo', 'classes'),
               palette=('metainfo', 'palette')),
    mmdet=dict(img_prefix=('data_prefix', 'img'), seg_prefix=('data_prefix', 'seg'),
               classes=('metainfo', 'classes'), palette=('metainfo', 'palette'),
               filter_empty_gt=('filter_cfg', 'filter_empty_gt')))
PATH_KEYS = ('ann_file', 'img_dir', 'img_prefix', 'split', 'ann_dir')
REMOVED_KEYS = dict(
    gt_seg_map_loader_cfg='', separate_eval='',
    proposal_file='proposals are no longer read from a file',
    file_client_args='use backend_args, which replaces it')
"""Removed keys of data sets, with a warning where something may be lost."""


class ConversionState(Protocol):
    """The parts of a conversion that this module reads and changes."""

    old: OldConfig
    scope: str
    inherited: dict[str, Any]
    target: dict[str, Any]

    def add_row(self, old: str, new: str, warning: str = '') -> None:
        """Add a row to the report."""


class DataConverter:
    """Converts ``data`` of one config.

    Args:
        conversion: The conversion whose ``target`` and report are changed.
    """

    def __init__(self, conversion: ConversionState) -> None:
        self.conversion = conversion
        self.target, self.scope = conversion.target, conversion.scope
        self.pipelines: dict[str, list[ConvertedPipeline]] = {}

    def convert(self, data: dict) -> None:
        """Convert the loaders and data sets of all splits.

        Raises:
            UserError: An unknown key, or a data set or step that is not registered.
        """
        shared = {key: data[key] for key in LOADER_KEYS if key in data}
        for split in SPLITS:
            loader = self.target[f'{split}_dataloader']
            # Evaluation uses batches of one image unless its own loader sets another size.
            settings = {key: value for key, value in shared.items()
                        if split == 'train' or key not in (
                            'samples_per_gpu', 'shuffle', 'drop_last')}
            settings.update(data.get(f'{split}_dataloader') or {})
            for key, value in settings.items():
                if key not in LOADER_KEYS:
                    self._refuse_key(f'data.{split}_dataloader.{key}', LOADER_KEYS)
                new_key = LOADER_KEYS[key]
                if new_key:
                    loader[new_key] = value
            if loader.get('num_workers') == 0:
                loader['persistent_workers'] = False
            if split in data:
                inherited = None if self._is_complete(data[split]) else loader['dataset']
                loader['dataset'] = self.convert_dataset(data[split], f'data.{split}', split,
                                                         inherited)
        for key in data:
            if key not in (*SPLITS, *LOADER_KEYS, '_delete_') and not key.endswith('_dataloader'):
                self._refuse_key(f'data.{key}', (*LOADER_KEYS, *SPLITS))
        for key, new_key in LOADER_KEYS.items():
            if key in data and new_key:
                self.conversion.add_row(f'data.{key}', f'train_dataloader.{new_key}' if key in (
                    'samples_per_gpu', 'drop_last') else f'{new_key} of all dataloaders')
        if self.scope == 'mmdet':
            self._update_evaluators()
        elif data.get('samples_per_gpu') == 1:
            self.conversion.add_row('data.samples_per_gpu', 'train_dataloader.batch_size', 'heads '
                                    'that pool the image need several GPUs, or '
                                    "norm_cfg=dict(type='GN', num_groups=32)")
        self._add_tta()

    def _refuse_key(self, key: str, known: Iterable[str]) -> NoReturn:
        raise UserError(f'{self.conversion.old.path}: unknown key {key}; expected one of '
                        f'{", ".join(known)}')

    def convert_dataset(self, old: Any, location: str, split: str, inherited: dict | None) -> dict:
        """Convert a data set and the wrappers around it.

        Args:
            old: The data set in the old config.
            location: Its key there, such as 'data.train'.
            split: 'train', 'val' or 'test'.
            inherited: The new data set that ``old`` changes; None if ``old`` is complete.
        """
        if isinstance(old, (list, tuple)):
            return self._concatenate(old, location, split, inherited)
        kind = old.get('type', '').rsplit('.', 1)[-1]
        if 'datasets' in old:
            self.conversion.add_row(location, f'{split}_dataloader.dataset, ConcatDataset')
            return self._concatenate(old['datasets'], f'{location}.datasets', split, None)
        if kind in ('RepeatDataset', 'ClassBalancedDataset', 'MultiImageMixDataset'):
            new = {k: v for k, v in old.items() if k not in ('dataset', 'pipeline', 'type')}
            if 'pipeline' in old:
                new['pipeline'] = self.convert_pipeline(old['pipeline'], f'{location}.pipeline',
                                                        split)
            self.conversion.add_row(location, f'{split}_dataloader.dataset, {kind}')
            inner = self.convert_dataset(old['dataset'], f'{location}.dataset', split, None)
            return dict(type=kind, dataset=inner, **new)
        lists = [key for key in PATH_KEYS if isinstance(old.get(key), (list, tuple))]
        if lists:
            self.conversion.add_row(f'{location}.{lists[0]}', 'ConcatDataset, one data set each')
            parts = [dict(old, **{key: old[key][i] for key in lists})
                     for i in range(len(old[lists[0]]))]
            return dict(type='ConcatDataset', datasets=[
                self.convert_dataset(part, location, split, inherited) for part in parts])
        return self._convert_single(old, location, split, inherited)

    def _concatenate(self, datasets: Sequence[Any], location: str, split: str,
                     inherited: dict | None) -> dict:
        return dict(type='ConcatDataset', datasets=[
            self.convert_dataset(dataset, f'{location}.{i}', split, inherited)
            for i, dataset in enumerate(datasets)])

    def _convert_single(self, old: dict, location: str, split: str, inherited: dict | None) -> dict:
        """Convert a data set that wraps no other."""
        new: dict[str, Any] = {}
        for key, value in self._split_paths(old, inherited).items():
            new_key = RENAMED_KEYS[self.scope].get(key)
            if key == 'pipeline':
                new['pipeline'] = self.convert_pipeline(value, f'{location}.pipeline', split)
            elif key in REMOVED_KEYS:
                self.conversion.add_row(f'{location}.{key}', 'removed', REMOVED_KEYS[key])
            elif new_key is None:
                new[key] = value
            elif value is not None:
                node = new
                for part in new_key[:-1]:
                    node = node.setdefault(part, {})
                node[new_key[-1]] = value
                self.conversion.add_row(f'{location}.{key}',
                                        f'{split}_dataloader.dataset.{".".join(new_key)}')
        kind = new.get('type')
        if kind:
            kind = new['type'] = kind.rsplit('.', 1)[-1]
            if kind == 'CustomDataset' and self.scope == 'mmseg':
                new['type'] = kind = 'BaseSegDataset'
            if import_module(f'{self.scope}.registry').DATASETS.get(kind) is None:
                raise UserError(f'{self.conversion.old.path}: {location}.type={kind!r} is not '
                                f'registered in {self.scope}. {REGISTER_HINT}')
        if inherited is not None:
            return merge(inherited, new)
        if split != 'train' and self.scope == 'mmdet':
            new.setdefault('test_mode', True)
        if self.scope == 'mmdet' and split == 'train' and 'filter_cfg' not in new:
            new['filter_cfg'] = dict(filter_empty_gt=True, min_size=32)  # mmdet 2.x's defaults
        elif new.get('filter_cfg'):
            new['filter_cfg'].setdefault('min_size', 32)
        if self.scope == 'mmseg' and 'pipeline' in new and kind == 'BaseSegDataset':
            reduce_zero_label = [step['reduce_zero_label'] for step in new['pipeline']
                                 if 'reduce_zero_label' in step]
            if reduce_zero_label:
                new.setdefault('reduce_zero_label', reduce_zero_label[0])
        return new

    def _is_complete(self, old: Any) -> bool:
        """Whether a split defines its data set, rather than changing the inherited one."""
        first = old[0] if isinstance(old, (list, tuple)) else old
        return bool(first.get('type')) and ('pipeline' in first or 'dataset' in first
                                            or 'datasets' in first)

    def _split_paths(self, old: dict, inherited: dict | None) -> dict:
        """Return ``old`` with paths relative to ``data_root``; in mmdet 2.x they included it."""
        paths = [key for key in ('ann_file', 'img_prefix', 'seg_prefix', 'img_dir', 'ann_dir')
                 if isinstance(old.get(key), str)]
        if not paths or old.get('data_root'):
            return old
        new = dict(old)
        root = (inherited or {}).get('data_root') or self.target.get('data_root') or ''
        if self.scope == 'mmseg' and inherited is not None:
            return old  # relative to the inherited root in both styles
        prefix = root.rstrip('/') + '/'
        if root and all(old[key].startswith(prefix) for key in paths):
            for key in paths:
                new[key] = old[key][len(prefix):]
            return dict(new, data_root=root)
        if inherited is not None:  # its paths are relative to its own root
            inherited_paths = {'ann_file': inherited.get('ann_file'),
                               'img_prefix': (inherited.get('data_prefix') or {}).get('img')}
            for key, value in inherited_paths.items():
                if value and key not in new:
                    new[key] = os.path.join(inherited.get('data_root') or '', value)
        return dict(new, data_root='')

    def convert_pipeline(self, old: list[dict], location: str, split: str) -> list[dict]:
        """Convert a pipeline, and move its settings of the model to ``data_preprocessor``."""
        converter = PipelineConverter(self.scope, f'{self.conversion.old.path}: {location}')
        pipeline = converter.convert(deepcopy(old), test=split != 'train')
        for old_step, new_step in pipeline.notes:
            self.conversion.add_row(f'{location}: {old_step}', new_step)
        preprocessor = dict(pipeline.preprocessor)
        if split != 'train':  # test images are not padded to a fixed size
            preprocessor = {key: preprocessor[key] for key in ('mean', 'std', 'bgr_to_rgb')
                            if key in preprocessor}
        if preprocessor:
            target = self.target['model'].setdefault('data_preprocessor', dict(
                type='SegDataPreProcessor' if self.scope == 'mmseg' else 'DetDataPreprocessor'))
            target.update(preprocessor)
            if self.scope == 'mmdet' and any(step.get('with_mask') for step in pipeline.steps):
                target['pad_mask'] = True
        self.pipelines.setdefault(split, []).append(pipeline)
        return pipeline.steps

    def _add_tta(self) -> None:
        """Test with augmentation where the old test pipeline had several scales or flips.

        Otherwise the recipe's augmentation, which --tta switches on, follows the old test scale.
        """
        inherited = self.conversion.inherited.get('test_dataloader', {})
        scale = next((step['scale'] for step in inherited.get('dataset', {}).get('pipeline', ())
                      if step['type'] == 'Resize'), None)
        augment = next((step['transforms'] for step in self.target.get('tta_pipeline') or ()
                        if step['type'] == 'TestTimeAug'), None)
        for pipeline in self.pipelines.get('test', ()):
            if not pipeline.augmentation:
                continue
            old_scale = pipeline.augmentation['scales'][0]
            if scale and augment and old_scale != scale:
                ratios = [step['scale'][0] / scale[0] for step in augment[0]]
                self.target['tta_pipeline'] = tta_pipeline(dict(
                    pipeline.augmentation, flip=len(augment[1]) > 1, scales=[
                        tuple(round(side * ratio) for side in old_scale) for ratio in ratios]),
                    pipeline.steps)
            if pipeline.augmentation['flip'] or len(pipeline.augmentation['scales']) > 1:
                self.target['tta_pipeline'] = tta_pipeline(pipeline.augmentation, pipeline.steps)
                self.target['test_time_augmentation'] = True
                self.conversion.add_row(
                    'data.test.pipeline: flip, img_ratios', 'tta_pipeline, and '
                    'test_time_augmentation=True, so that tools/test.py augments')

    def _update_evaluators(self) -> None:
        """Let mmdet's evaluators read the annotation files of the data sets."""
        for split in ('val', 'test'):
            dataset = self.target[f'{split}_dataloader']['dataset']
            while dataset.get('dataset'):
                dataset = dataset['dataset']
            evaluator = self.target.get(f'{split}_evaluator')
            if dataset.get('ann_file') and isinstance(evaluator, dict):
                self.target[f'{split}_evaluator'] = dict(evaluator, ann_file=os.path.join(
                    dataset.get('data_root') or '', dataset['ann_file']))
