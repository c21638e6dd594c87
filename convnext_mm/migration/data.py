"""data of the old style → loaders, data sets, pipelines, data preprocessor, evaluators."""
from __future__ import annotations

import os
from copy import deepcopy
from importlib import import_module
from typing import Any, Protocol

from ..errors import UserError
from .parsing import OldConfig, merge
from .pipelines import Converter, Pipeline, tta_pipeline

SPLITS = ('train', 'val', 'test')
LOADER = dict(samples_per_gpu='batch_size', workers_per_gpu='num_workers', shuffle=None,
              persistent_workers='persistent_workers', drop_last='drop_last',
              pin_memory='pin_memory', prefetch_factor='prefetch_factor')
RENAMED = dict(
    mmseg=dict(img_dir=('data_prefix', 'img_path'), ann_dir=('data_prefix', 'seg_map_path'),
               split=('ann_file',), classes=('metainfo', 'classes'),
               palette=('metainfo', 'palette')),
    mmdet=dict(img_prefix=('data_prefix', 'img'), seg_prefix=('data_prefix', 'seg'),
               classes=('metainfo', 'classes'), palette=('metainfo', 'palette'),
               filter_empty_gt=('filter_cfg', 'filter_empty_gt')))
LEFT_OUT = dict(gt_seg_map_loader_cfg='', proposal_file='proposals of a file are no longer read',
                separate_eval='', file_client_args='files are read by backend_args now')


class Converted(Protocol):
    """The parts of a conversion that this module reads and changes."""

    old: OldConfig
    scope: str
    target: dict[str, Any]

    def note(self, old: str, new: str, warning: str = '') -> None:
        """Add a row to the report."""


class DataConverter:
    """Converts ``data`` of one config.

    Args:
        conversion: The conversion whose ``target`` and report are changed.
    """

    def __init__(self, conversion: Converted) -> None:
        self.whole, self.target, self.scope = conversion, conversion.target, conversion.scope
        self.tests: list[Pipeline] = []

    def convert(self, data: dict) -> None:
        """All splits.

        Raises:
            UserError: A data set or step that is not registered.
        """
        shared = {key: data[key] for key in LOADER if key in data}
        for split in SPLITS:
            loader = self.target[f'{split}_dataloader']
            # Evaluation takes one picture at a time unless its own loader says otherwise.
            said = {key: value for key, value in shared.items() if split == 'train' or key not in (
                'samples_per_gpu', 'shuffle', 'drop_last')}
            said.update(data.get(f'{split}_dataloader') or {})
            for key, value in said.items():
                new = LOADER.get(key)
                if key not in LOADER:
                    raise UserError(f'{self.whole.old.path}: data.{key} is not known: '
                                    f'{", ".join(LOADER)}, train, val, test')
                if new:
                    loader[new] = value
            if loader.get('num_workers') == 0:
                loader['persistent_workers'] = False
            if split in data:
                before = None if self._is_whole(data[split]) else loader['dataset']
                loader['dataset'] = self.dataset(data[split], f'data.{split}', split, before)
        for key in data:
            if key not in (*SPLITS, *LOADER, '_delete_') and not key.endswith('_dataloader'):
                raise UserError(f'{self.whole.old.path}: data.{key} is not known: '
                                f'{", ".join(LOADER)}, train, val, test')
        for key, new in LOADER.items():
            if key in data and new:
                self.whole.note(f'data.{key}', f'train_dataloader.{new}' + (
                    '' if key == 'samples_per_gpu' else ' and the others'))
        if self.scope == 'mmdet':
            self._evaluate_by_the_data()
        self._tta()

    def dataset(self, old: Any, where: str, split: str, before: dict | None) -> dict:
        """A data set, with the wrappers around it.

        Args:
            old: As in the old config.
            where: Its place there.
            split: 'train', 'val' or 'test'.
            before: The inherited one that ``old`` is laid over, where it is only a part.
        """
        if isinstance(old, (list, tuple)):
            return dict(type='ConcatDataset', datasets=[
                self.dataset(one, f'{where}.{i}', split, before) for i, one in enumerate(old)])
        kind = old.get('type', '').rsplit('.', 1)[-1]
        if 'datasets' in old:
            self.whole.note(where, f'{split}_dataloader.dataset, ConcatDataset')
            return dict(type='ConcatDataset', datasets=[
                self.dataset(one, f'{where}.datasets.{i}', split, None)
                for i, one in enumerate(old['datasets'])])
        if kind in ('RepeatDataset', 'ClassBalancedDataset', 'MultiImageMixDataset'):
            new = {k: v for k, v in old.items() if k not in ('dataset', 'pipeline', 'type')}
            if 'pipeline' in old:
                new['pipeline'] = self.pipeline(old['pipeline'], f'{where}.pipeline', split)
            self.whole.note(where, f'{split}_dataloader.dataset, {kind}')
            return dict(type=kind, dataset=self.dataset(old['dataset'], f'{where}.dataset', split,
                                                        None), **new)
        several = next((key for key in ('ann_file', 'img_dir', 'img_prefix', 'split', 'ann_dir')
                        if isinstance(old.get(key), (list, tuple))), None)
        if several:
            parts = [{key: value[i] if isinstance(value, (list, tuple)) and key in (
                'ann_file', 'img_dir', 'img_prefix', 'split', 'ann_dir') else value
                for key, value in old.items()} for i in range(len(old[several]))]
            self.whole.note(f'{where}.{several}', 'ConcatDataset, a data set each')
            return dict(type='ConcatDataset', datasets=[
                self.dataset(one, where, split, before) for one in parts])
        return self._one(old, where, split, before)

    def _one(self, old: dict, where: str, split: str, before: dict | None) -> dict:
        new: dict[str, Any] = {}
        old = self._below_root(old, before)
        for key, value in old.items():
            place = RENAMED[self.scope].get(key)
            if key == 'pipeline':
                new['pipeline'] = self.pipeline(value, f'{where}.pipeline', split)
            elif key in LEFT_OUT:
                self.whole.note(f'{where}.{key}', 'left out', LEFT_OUT[key])
            elif place is None:
                new[key] = value
            elif value is not None:
                node = new
                for part in place[:-1]:
                    node = node.setdefault(part, {})
                node[place[-1]] = value
                self.whole.note(f'{where}.{key}', f'{split}_dataloader.dataset.{".".join(place)}')
        kind = new.get('type')
        if kind:
            kind = new['type'] = kind.rsplit('.', 1)[-1]
            if kind == 'CustomDataset' and self.scope == 'mmseg':
                new['type'] = kind = 'BaseSegDataset'
            if import_module(f'{self.scope}.registry').DATASETS.get(kind) is None:
                raise UserError(f'{self.whole.old.path}: {where}.type={kind!r} is not registered '
                                f'in {self.scope}: import the module that has it (custom_imports)')
        if before is not None:
            return merge(before, new)
        if split != 'train' and self.scope == 'mmdet':
            new.setdefault('test_mode', True)
        if self.scope == 'mmdet' and split == 'train' and 'filter_cfg' not in new:
            new['filter_cfg'] = dict(filter_empty_gt=True, min_size=32)  # what it did before
        elif new.get('filter_cfg'):
            new['filter_cfg'].setdefault('min_size', 32)
        if self.scope == 'mmseg' and 'pipeline' in new and kind == 'BaseSegDataset':
            reduce = [step['reduce_zero_label'] for step in new['pipeline']
                      if 'reduce_zero_label' in step]
            if reduce:
                new.setdefault('reduce_zero_label', reduce[0])
        return new

    def _is_whole(self, old: Any) -> bool:
        """Whether a split says all of its data set, or only a part over the inherited one."""
        first = old[0] if isinstance(old, (list, tuple)) else old
        return bool(first.get('type')) and ('pipeline' in first or 'dataset' in first
                                            or 'datasets' in first)

    def _below_root(self, old: dict, before: dict | None) -> dict:
        """Paths from the working folder, as mmdet had them, as paths below ``data_root``."""
        paths = [key for key in ('ann_file', 'img_prefix', 'seg_prefix', 'img_dir', 'ann_dir')
                 if isinstance(old.get(key), str)]
        if not paths or old.get('data_root'):
            return old
        new = dict(old)
        root = (before or {}).get('data_root') or self.target.get('data_root') or ''
        if self.scope == 'mmseg' and before is not None:
            return old  # below the inherited root, as ever
        if root and all(old[key].startswith(root.rstrip('/') + '/') for key in paths):
            for key in paths:
                new[key] = old[key][len(root.rstrip('/')) + 1:]
            return dict(new, data_root=root)
        if before is not None:  # what is inherited lies below its own root
            inherited = {'ann_file': before.get('ann_file'),
                         'img_prefix': (before.get('data_prefix') or {}).get('img')}
            for key, value in inherited.items():
                if value and key not in new:
                    new[key] = os.path.join(before.get('data_root') or '', value)
        return dict(new, data_root='')

    def pipeline(self, old: list[dict], where: str, split: str) -> list[dict]:
        """A pipeline; what it says of pictures goes to the model's data_preprocessor."""
        found = Converter(self.scope, f'{self.whole.old.path}: {where}').convert(
            deepcopy(old), test=split != 'train')
        for one, new in found.notes:
            self.whole.note(f'{where}: {one}', new)
        preprocessor = dict(found.preprocessor)
        if split != 'train':  # pictures are tested at their own size
            preprocessor = {k: preprocessor[k] for k in ('mean', 'std', 'bgr_to_rgb')
                            if k in preprocessor}
        if preprocessor:
            own = self.target['model'].setdefault('data_preprocessor', dict(
                type='SegDataPreProcessor' if self.scope == 'mmseg' else 'DetDataPreprocessor'))
            own.update(preprocessor)
            if self.scope == 'mmdet' and any(step.get('with_mask') for step in found.steps):
                own['pad_mask'] = True
        if split == 'test' and found.augmentation:
            self.tests.append(found)
        return found.steps

    def _tta(self) -> None:
        """Several scales or flips were test-time augmentation without being asked for."""
        for found in self.tests:
            if found.augmentation['flip'] or len(found.augmentation['scales']) > 1:
                self.target['tta_pipeline'] = tta_pipeline(found.augmentation, found.steps)
                self.target['test_time_augmentation'] = True
                self.whole.note('data.test.pipeline: flip, img_ratios', 'tta_pipeline and '
                                'test_time_augmentation=True: tools/test.py augments as before')

    def _evaluate_by_the_data(self) -> None:
        for split in ('val', 'test'):
            dataset = self.target[f'{split}_dataloader']['dataset']
            while dataset.get('dataset'):
                dataset = dataset['dataset']
            evaluator = self.target.get(f'{split}_evaluator')
            if dataset.get('ann_file') and isinstance(evaluator, dict):
                self.target[f'{split}_evaluator'] = dict(evaluator, ann_file=os.path.join(
                    dataset.get('data_root') or '', dataset['ann_file']))
