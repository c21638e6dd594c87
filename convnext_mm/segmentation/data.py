"""mmseg's data set with mask values to ignore, and images whose names end in several ways."""
from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from mmseg.datasets import BaseSegDataset

from ..datasets.bad_files import require_images
from ..datasets.segmentation import endings_below
from ..registry import DATASETS

IGNORED = 255


@DATASETS.register_module()
class SegmentationDataset(BaseSegDataset):
    """mmseg's BaseSegDataset with two more settings.

    Args:
        ignore: Mask values that are no class, such as 11 for CamVid's void. As they become 255
            when a mask is loaded, losses, metrics and pictures leave them out.
        img_suffix: How the names of images end, or several such endings.
        kwargs: As for mmseg's BaseSegDataset.
    """

    def __init__(self, ignore: Sequence[int] = (), img_suffix: str | Sequence[str] = '.jpg',
                 **kwargs: Any) -> None:
        self.ignore = tuple(ignore)
        self.img_suffix: Any = img_suffix
        super().__init__(img_suffix=img_suffix, **kwargs)

    def get_label_map(self, new_classes: Sequence[str] | None = None) -> dict[int, int] | None:
        """The labels of ignored values; mmseg's loading applies them after ``reduce_zero_label``.
        """
        labels = [value - 1 if self.reduce_zero_label else value for value in self.ignore]
        return {label: IGNORED for label in labels if label >= 0} or None

    def load_data_list(self) -> list[dict]:
        """The images of all endings, with their masks.

        Raises:
            UserError: There are none.
        """
        found, folder = self._load_data_list(), self.data_prefix.get('img_path')
        if found or self.ann_file or not (existing := endings_below(folder)):
            return require_images(found, self.ann_file or folder)
        return require_images(found, folder, fix=f'none of {existing} ends with {self.img_suffix}, '
                              "set img_suffix='…' at the top of the config")

    def _load_data_list(self) -> list[dict]:
        suffixes: Any = self.img_suffix
        if isinstance(suffixes, str):
            return super().load_data_list()
        found: dict[str, dict] = {}
        for suffix in suffixes:
            self.img_suffix = suffix
            found.update((info['img_path'], info) for info in super().load_data_list())
        self.img_suffix = suffixes
        if self.ann_file and os.path.isfile(self.ann_file):  # it lists names without endings
            found = {path: info for path, info in found.items() if os.path.isfile(path)}
        return [found[path] for path in sorted(found)]
