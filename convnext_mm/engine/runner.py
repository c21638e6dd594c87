"""The Runner that the recipes select by ``runner_type``."""
from __future__ import annotations

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner

from ..resolution import resolve
from . import speed


class ConvNeXtRunner(Runner):
    """A Runner that completes its config first.

    So ``data_root``, ``classes`` and ``fast`` work with the train and test scripts of mmseg and
    mmdet as well as with the tools of this package.
    """

    @classmethod
    def from_cfg(cls, cfg: Config) -> ConvNeXtRunner:
        """Build a Runner from a config, which is completed in place.

        Raises:
            UserError: See :func:`convnext_mm.resolution.resolve` and :func:`speed.apply_fast`.
        """
        for line in resolve(cfg):
            print_log(line, logger='current')
        speed.apply_fast(cfg)
        return super().from_cfg(cfg)
