"""Keys that divide the optimizer or the model, and what they cannot go with."""
import pytest
import torch
from mmengine.config import Config
from torch import nn

from convnext_mm import UserError
from convnext_mm.engine import sharding


def config(**more) -> Config:
    return Config(dict(launcher='pytorch', shard_model=True, optim_wrapper=dict(
        optimizer=dict(type='AdamW')), **more))


@pytest.mark.parametrize(('more', 'message'), [
    (dict(shard_optimizer=True), 'shard_optimizer'),
    (dict(custom_hooks=[dict(type='mmengine.EMAHook')]), 'EMAHook'),
    (dict(fast=dict(compile=['backbone'])), 'fast.compile'),
    (dict(model_wrapper_cfg=dict(type='MMFullyShardedDataParallel')),
     'model_wrapper_cfg.type=MMFullyShardedDataParallel')])
def test_what_cannot_go_together_is_refused(more, message):
    with pytest.raises(UserError, match=f'shard_model=True cannot go with {message}'):
        sharding.shard_model(config(**more))


def test_other_values_than_true_and_false_are_refused():
    with pytest.raises(UserError, match="shard_model='yes' must be True or False"):
        sharding.shard_model(Config(dict(shard_model='yes')))
    with pytest.raises(UserError, match='shard_optimizer=1 must be True or False'):
        sharding.shard_optimizer(Config(dict(shard_optimizer=1)))


def test_the_wrapper_takes_over_what_the_other_one_finds():
    cfg = config(model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None,
                                        find_unused_parameters=True))
    sharding.shard_model(cfg)
    assert cfg.model_wrapper_cfg == dict(type='ShardedModel', find_unused_parameters=True)
    alone = config()
    alone.launcher = 'none'
    sharding.shard_model(alone)
    assert 'model_wrapper_cfg' not in alone


@pytest.mark.parametrize(('launcher', 'kind'), [
    ('none', 'AdamW'), ('pytorch', 'ShardedOptimizer'), ('slurm', 'ShardedOptimizer'),
    ('mpi', 'ShardedOptimizer')])
def test_an_optimizer_is_sharded_where_a_launcher_starts_the_run(launcher, kind, monkeypatch):
    monkeypatch.delenv('WORLD_SIZE', raising=False)
    for given in (dict(shard_optimizer=True, optim_wrapper=dict(optimizer=dict(type='AdamW'))),
                  dict(optim_wrapper=dict(optimizer=dict(type='ZeroRedundancyOptimizer')))):
        cfg = Config(dict(launcher=launcher, **given))
        sharding.shard_optimizer(cfg)
        assert cfg.optim_wrapper.optimizer.type == kind


def test_a_parameter_that_pytorch_cannot_divide_is_named(tmp_path):
    model = nn.Linear(2, 2)
    model.scale = nn.Parameter(torch.tensor(1.0))
    torch.distributed.init_process_group('gloo', f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match='shard_model=True: .*scale'):
            sharding.divide(model, torch.optim.SGD(model.parameters(), 0.1))
    finally:
        torch.distributed.destroy_process_group()
