"""The Runner of the recipes (``runner_type`` in their runtime)."""
from __future__ import annotations

from mmengine.config import Config
from mmengine.runner import Runner

from ..datasets import complete
from . import speed


class ConvNeXtRunner(Runner):
    """mmengine's Runner for a config that is completed first.

    So the train and test scripts of mmseg and mmdet apply what a user's ``data_root``, ``classes``
    and ``fast`` imply (:func:`convnext_mm.datasets.complete`, :func:`speed.apply_fast`), as the tools
    of this package do.
    """

    @classmethod
    def from_cfg(cls, cfg: Config) -> ConvNeXtRunner:
        """Build from a config, which is completed in place.

        Raises:
            UserError: As :func:`convnext_mm.datasets.complete` and :func:`speed.apply_fast`.
        """
        complete(cfg)
        speed.apply_fast(cfg)
        return super().from_cfg(cfg)
