"""mmdet's data set and metric in COCO format: labels by name, files repaired when read."""
from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np
from mmdet.datasets import coco as mmdet_coco
from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation.metrics import CocoMetric as MMDetCocoMetric
from mmengine.fileio import get_local_path
from mmengine.logging import print_log

from ..datasets.bad_files import require_images
from ..datasets.coco import load_coco
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
        """The images with their objects; those of a test need no objects."""
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
            self._coco_api = NamedCOCO(path, log=False)
        if 'segm' in self.metrics:
            for one in self._coco_api.dataset['annotations']:
                _ignore_without_polygon(one)

    def compute_metrics(self, results: list) -> dict[str, float]:
        """The metrics of all batches; categories are counted in the order of their ids.

        pycocotools sorts the ids, while mmdet names the rows of its table by the order of labels.
        """
        if self._coco_api is not None:
            ids = self._coco_api.get_cat_ids(cat_names=self.dataset_meta['classes'])
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
