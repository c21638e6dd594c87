"""Runs of a toy model, whose every part draws random numbers, in milliseconds."""
from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from torch import nn

from convnext_mm.engine.runner import ConvNeXtRunner
from tests.runs.training import Record, numbers, recorded


class Noisy(BaseDataset):
    """Samples that each generator augments."""

    def load_data_list(self) -> list[dict[str, Any]]:
        return [dict(number=i) for i in range(7)]

    def prepare_data(self, idx: int) -> dict[str, Any]:
        noise = random.random() + np.random.rand() + torch.rand(3)
        return dict(x=noise + self.get_data_info(idx)['number'])


class Model(BaseModel):
    """Dropout and a linear layer; ``bad`` iterations have a loss of NaN."""

    def __init__(self, bad: tuple[int, ...] = (), dropout: float = 0.5) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Dropout(dropout), nn.Linear(3, 4), nn.Dropout(dropout),
                                    nn.Linear(4, 1))
        self.bad, self.calls = bad, 0

    def forward(self, x, mode='tensor'):
        out = self.layers(torch.stack(list(x)))
        if mode != 'loss':
            return [out]
        self.calls += 1
        factor = float('nan') if self.calls in self.bad else 1.0
        return dict(loss=factor * (out - 1).square().mean())


class Score(BaseMetric):
    """A score that rises and falls."""

    def process(self, data_batch, data_samples) -> None:
        self.results.append(float(random.random()))

    scale = 1.0

    def compute_metrics(self, results) -> dict[str, float]:
        score = self.scale * (1 + sum(results) / 100)
        return dict(score=score, opposite=-score)


class ToyRunner(ConvNeXtRunner):
    """Without the log of the environment, which takes seconds."""

    def _log_env(self, env_cfg) -> None:
        pass


def loader(workers: int = 0, sampler: str = 'DefaultSampler', shuffle: bool = True,
           batch_size: int = 2, even: bool = True, **kwargs: Any) -> dict[str, Any]:
    return dict(batch_size=batch_size, num_workers=workers, dataset=dict(type=Noisy),
                sampler=dict(type=sampler, shuffle=shuffle, **({} if even else dict(
                    round_up=False))), **kwargs)


def build(work_dir: Path, by_epoch: bool = False, workers: int = 0, accumulate: int = 1,
          sampler: str = 'DefaultSampler', seed: int | None = 0, resume: bool = False,
          load_from: str | None = None, length: int | None = None, bad: tuple[int, ...] = (),
          finite: dict[str, Any] | None = None, persistent: bool = False, max_keep: int = 1,
          batch_size: int = 2, dropout: float = 0.5, distributed: bool = False, shard: bool = False,
          clip: float | None = None, even: bool = True,
          optimizer: dict[str, Any] | None = None, cfg: dict[str, Any] | None = None,
          **checkpoint: Any) -> ConvNeXtRunner:
    """A run of 12 iterations, or 3 epochs of 4, that validates and saves twice or thrice."""
    checkpoint = dict(interval=1 if by_epoch else 4, by_epoch=by_epoch, max_keep_ckpts=max_keep,
                      save_best='score', rule='greater') | checkpoint
    hooks = dict(checkpoint=dict(type='CheckpointHook', **checkpoint),
                 logger=dict(type='LoggerHook', interval=1))
    if finite is not None:
        hooks['finite'] = dict(type='FiniteLossHook', **finite)
    train_cfg = (dict(type='EpochBasedTrainLoop', max_epochs=length or 3) if by_epoch else
                 dict(type='IterBasedTrainLoop', max_iters=length or 12, val_interval=4))
    wrapper = (dict(type='ShardedModel') if shard else
               dict(type='MMDistributedDataParallel', device_ids=None))
    return ToyRunner(
        model=dict(type=Model, bad=bad, dropout=dropout), work_dir=str(work_dir), log_level='ERROR',
        train_dataloader=loader(workers, sampler, batch_size=batch_size,
                                persistent_workers=persistent),
        train_cfg=train_cfg,
        val_dataloader=loader(shuffle=False, batch_size=2 if even else 1, even=even),
        val_cfg=dict(), val_evaluator=dict(type=Score),
        optim_wrapper=dict(optimizer=optimizer or dict(type='AdamW', lr=0.01),
                           accumulative_counts=accumulate,
                           clip_grad=clip and dict(max_norm=clip)),
        launcher='pytorch' if distributed else 'none',
        param_scheduler=dict(type='LinearLR', end=10, by_epoch=False),
        default_hooks=hooks, randomness=dict(seed=seed), resume=resume, load_from=load_from,
        experiment_name=f'toy_{next(numbers)}',
        cfg=Config(dict(cfg or {}, **(dict(model_wrapper_cfg=wrapper) if distributed else {}))))


def train(work_dir: Path, *hooks: Hook, **settings: Any) -> Record:
    """Train until the end or a stop."""
    return recorded(build(work_dir, **settings), *hooks)
