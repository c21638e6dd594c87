"""Detections as files: COCO's JSON and CSV."""
from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .utils import atomic_path

COLUMNS = ('image', 'class', 'score', 'left', 'top', 'right', 'bottom')


class DetectionFiles:
    """Collects the detections of images, and writes them.

    Args:
        classes: Names of the classes; the id of a category is its index + 1.
        score_threshold: Detections with a lower score are left out.
    """

    def __init__(self, classes: Sequence[str], score_threshold: float) -> None:
        self.classes, self.score_threshold = classes, score_threshold
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []

    def add(self, path: str, size: tuple[int, int], instances: Any) -> None:
        """Add the detections of an image.

        Args:
            path: Its file.
            size: Height and width.
            instances: mmdet's ``pred_instances``.
        """
        self.images.append(dict(id=len(self.images) + 1, file_name=path, height=size[0],
                                width=size[1]))
        found = instances[instances.scores >= self.score_threshold]
        masks = found.masks.cpu().numpy() if 'masks' in found else None
        for i, (box, score, label) in enumerate(zip(
                found.bboxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)):
            left, top, right, bottom = (round(value, 2) for value in box)
            width, height = round(right - left, 2), round(bottom - top, 2)
            annotation = dict(
                id=len(self.annotations) + 1, image_id=len(self.images), category_id=label + 1,
                bbox=[left, top, width, height], area=width * height, iscrowd=0,
                score=round(score, 4))
            if masks is not None:
                annotation.update(segmentation=_encode(masks[i]), area=int(masks[i].sum()))
            self.annotations.append(annotation)

    def extend(self, image: dict[str, Any], annotations: list[dict[str, Any]]) -> None:
        """Add an image and its detections, with new ids."""
        self.images.append(dict(image, id=len(self.images) + 1))
        for one in annotations:
            self.annotations.append(dict(one, id=len(self.annotations) + 1,
                                         image_id=len(self.images)))

    def write_coco(self, path: Path) -> None:
        """Write images, categories, and annotations with ``score``; masks as RLE.

        Raises:
            OSError: The file cannot be written.
        """
        categories = [dict(id=i + 1, name=name) for i, name in enumerate(self.classes)]
        with atomic_path(path) as part:
            part.write_text(json.dumps(dict(
                images=self.images, categories=categories, annotations=self.annotations),
                ensure_ascii=False), encoding='utf-8')

    def write_csv(self, path: Path) -> None:
        """Write a row of :data:`COLUMNS` for each detection, in pixels.

        Raises:
            OSError: The file cannot be written.
        """
        with atomic_path(path) as part, open(part, 'w', newline='', encoding='utf-8') as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for one in self.annotations:
                left, top, width, height = one['bbox']
                writer.writerow([
                    self.images[one['image_id'] - 1]['file_name'],
                    self.classes[one['category_id'] - 1], one['score'], left, top,
                    round(left + width, 2), round(top + height, 2)])


def _encode(mask: np.ndarray) -> dict[str, Any]:
    """COCO's RLE of a mask (H, W), with text instead of bytes."""
    from pycocotools.mask import encode
    rle = encode(np.asfortranarray(mask, dtype=np.uint8))
    return dict(size=list(rle['size']), counts=rle['counts'].decode())
