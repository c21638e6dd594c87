"""mmdet's data set and metric in COCO format: labels by name, files repaired when read.

Also images without annotations, whose detections are written.
"""
from __future__ import annotations

import functools
import io
import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.datasets import coco as mmdet_coco
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation.metrics import CocoMetric as MMDetCocoMetric
from mmengine.evaluator import BaseMetric
from mmengine.fileio import get_local_path
from mmengine.logging import print_log
from mmengine.structures import InstanceData

from ..datasets.bad_files import require_images
from ..datasets.coco import load_coco
from ..detection_files import DetectionFiles
from ..errors import UserError
from ..inputs import IMAGE_SUFFIXES
from ..registry import DATASETS, METRICS


class NamedCOCO(COCO):
    """pycocotools' index of an annotation file that :func:`load_coco` has read and repaired.

    Args:
        annotation_file: A JSON file.
        log: Whether to log what was repaired.
        labelled: Whether the file must have annotations.

    Raises:
        UserError: The file has errors.
    """

    def __init__(self, annotation_file: str | None = None, log: bool = True,
                 labelled: bool = True) -> None:
        super().__init__()
        if annotation_file is None:
            return
        self.dataset, problems = load_coco(annotation_file, labelled)
        with redirect_stdout(io.StringIO()):  # pycocotools prints its steps
            self.createIndex()
        self.img_ann_map, self.cat_img_map = self.imgToAnns, self.catToImgs
        for problem in problems if log else ():
            print_log(f'{annotation_file}: {problem.message}', logger='current')

    def get_cat_ids(self, cat_names: Sequence[str] = (), sup_names: Sequence[str] = (),
                    cat_ids: Sequence[int] = ()) -> list[int]:
        """Ids of categories; in the order of ``cat_names``, if they are given.

        mmdet takes the position of an id in this list as its label, and pycocotools returns them in
        the order of the file.
        """
        found = super().get_cat_ids(list(cat_names), list(sup_names), list(cat_ids))
        names = list(cat_names) if not isinstance(cat_names, str) else [cat_names]
        if not names:
            return found
        return sorted(found, key=lambda one: names.index(self.cats[one]['name']))


@DATASETS.register_module()
class CocoDataset(mmdet_coco.CocoDataset):
    """mmdet's CocoDataset whose label of an object is the position of its name in ``classes``."""

    COCOAPI: Any = NamedCOCO

    def load_data_list(self) -> list[dict]:
        """The images with their objects; those of a test need no objects, and no file."""
        if self.test_mode and not self.ann_file:
            folder = self.data_prefix.get('img') or '.'
            paths = sorted(os.path.join(root, name) for root, _, names in os.walk(folder)
                           for name in names if name.lower().endswith(IMAGE_SUFFIXES))
            self.cat_ids: list[int] = []
            return require_images([dict(img_path=path, img_id=i, instances=[])
                                   for i, path in enumerate(paths)], folder)
        self.COCOAPI = functools.partial(NamedCOCO, labelled=not self.test_mode)
        found = super().load_data_list()
        del self.COCOAPI  # the class's own again, which is pickled with the data set
        return found

    def filter_data(self) -> list[dict]:
        """The images that ``filter_cfg`` keeps.

        Raises:
            UserError: There are none.
        """
        return require_images(super().filter_data(), self.ann_file, len(self.data_list))


@METRICS.register_module()
class CocoMetric(MMDetCocoMetric):
    """mmdet's CocoMetric with labels by name, as :class:`CocoDataset` has them.

    Args:
        ann_file: The annotation file; None: the annotations that the data set has loaded.
        kwargs: As for mmdet's CocoMetric.

    Raises:
        UserError: The file has errors.
    """

    def __init__(self, ann_file: str | None = None, **kwargs: Any) -> None:
        super().__init__(ann_file=None, **kwargs)
        if ann_file is None:
            return
        with get_local_path(ann_file, backend_args=self.backend_args) as path:
            self._coco_api = NamedCOCO(path, log=False, labelled=not self.format_only)
        if 'segm' in self.metrics:
            for one in self._coco_api.dataset['annotations']:
                _ignore_without_polygon(one)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The metrics of all batches; categories are counted in the order of their ids.

        pycocotools sorts the ids, while mmdet names the rows of its table by the order of labels.
        """
        if self._coco_api is not None:
            classes = self.dataset_meta['classes']
            ids = self._coco_api.get_cat_ids(cat_names=classes)
            if self.format_only and not self._coco_api.cats:  # a test's file may list images only
                ids = list(range(1, len(classes) + 1))
            self.cat_ids = sorted(ids)
            rank = np.array([self.cat_ids.index(one) for one in ids], dtype=np.int64)
            results = [(truth, dict(found, labels=rank[found['labels']]))
                       for truth, found in results]
        return super().compute_metrics(results)


def _ignore_without_polygon(annotation: dict) -> None:
    """Ignore an object as training does whose polygons have fewer than three points.

    pycocotools would take four numbers as a box.
    """
    mask = annotation.get('segmentation')
    if isinstance(mask, list) and not any(len(polygon) >= 6 for polygon in mask):
        x, y, w, h = annotation['bbox']
        annotation.update(iscrowd=1, segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]])


@METRICS.register_module()
class DetectionWriter(BaseMetric):
    """Writes the detections of images without annotations; there is nothing to compare with.

    Args:
        out_file: The JSON file in COCO format, see :meth:`DetectionFiles.write_coco`.
        score_threshold: Detections with a lower score are left out.
        kwargs: As for mmengine's BaseMetric.
    """

    def __init__(self, out_file: str, score_threshold: float = 0.05, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.out_file, self.score_threshold = out_file, score_threshold

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keep the detections of a batch."""
        for sample in data_samples:
            files = DetectionFiles(self.dataset_meta['classes'], self.score_threshold)
            files.add(sample['img_path'], sample['ori_shape'],
                      InstanceData(**sample['pred_instances']))
            self.results.append((files.images[0], files.annotations))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Write the file; there are no metrics.

        Raises:
            UserError: The file cannot be written.
        """
        files = DetectionFiles(self.dataset_meta['classes'], self.score_threshold)
        for image, found in results:
            files.extend(image, found)
        try:
            Path(self.out_file).parent.mkdir(parents=True, exist_ok=True)
            files.write_coco(Path(self.out_file))
        except OSError as error:
            raise UserError(f'cannot write {self.out_file}: {error.strerror or error}') from error
        print_log(f'{len(files.annotations)} detections written to {self.out_file}',
                  logger='current')
        return {}
