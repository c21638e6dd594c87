"""The Runner that the recipes select by ``runner_type``."""
from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from ..datasets.transforms import use_faster_transforms
from ..precision import keep_outputs_in_fp32, reset_inference_dtype
from ..resolution import resolve
from ..utils import unwrap_model
from . import speed
from .evaluation import count_in_blocks
from .fallbacks import CPUAmpOptimWrapper


class ConvNeXtRunner(Runner):
    """A Runner that completes its config first.

    So ``data_root``, ``classes`` and ``fast`` work with the train and test scripts of mmseg and
    mmdet as well as with the tools of this package. The environment, the config and the parameter
    groups, hundreds of lines, go to the log file only.
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

    def train(self) -> nn.Module:
        """Train; validations compute as the optimizer wrapper and ``val_cfg`` say."""
        reset_inference_dtype(unwrap_model(self.model))
        return super().train()

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        """Log environment and config, to the file."""
        with self._only_to_file():
            super()._log_env(env_cfg)

    def get_hooks_info(self) -> str:
        """The hooks in their order, in one line."""
        return ', '.join(type(hook).__name__ for hook in self.hooks)

    def build_optim_wrapper(self, optim_wrapper: Any) -> OptimWrapper:
        """Build the optimizer wrapper; its groups are listed in the file."""
        with self._only_to_file():
            built = super().build_optim_wrapper(optim_wrapper)
        if isinstance(built, (AmpOptimWrapper, CPUAmpOptimWrapper)):
            keep_outputs_in_fp32(unwrap_model(self.model))
        return built

    @staticmethod
    def build_dataloader(dataloader: Any, seed: int | None = None,
                         diff_rank_seed: bool = False) -> DataLoader:
        """Build a data loader, with faster transforms in place of equal ones."""
        built = Runner.build_dataloader(dataloader, seed, diff_rank_seed)
        use_faster_transforms(built.dataset)
        return built

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        """Build the evaluator, which counts the pixels of large class maps exactly."""
        built = super().build_evaluator(evaluator)
        count_in_blocks(built)
        return built

    def dump_config(self) -> None:
        """Write the whole config to the work dir, unless it was read from there."""
        path = Path(self.work_dir, Path(self.cfg.filename or '').name)
        if not path.is_file() or path.resolve() != Path(self.cfg.filename).resolve():
            super().dump_config()

    @contextmanager
    def _only_to_file(self) -> Iterator[None]:
        """Inside, log messages below warnings are not shown on the console."""
        levels = {handler: handler.level for handler in self.logger.handlers
                  if not isinstance(handler, logging.FileHandler)}
        for handler in levels:
            handler.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for handler, level in levels.items():
                handler.setLevel(level)
