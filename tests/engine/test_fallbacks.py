"""Running a recipe for several GPUs on a machine without one."""
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from convnext_mm import UserError
from convnext_mm.engine import fallbacks
from convnext_mm.engine.checks import read_config
from convnext_mm.engine.speed import apply_fast
from tests.helpers import DETECTION, SEGMENTATION


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(fallbacks, 'get_device', lambda: 'cpu')


@pytest.mark.parametrize(('config', 'layers'), [(SEGMENTATION, 2), (DETECTION, 3)])
def test_a_recipe_is_adapted_to_a_machine_without_gpu(no_gpu, config, layers):
    cfg = Config.fromfile(config)
    before = str(cfg).count("'SyncBN'")
    assert before >= layers
    cfg.launcher = 'pytorch'
    changes = fallbacks.adapt_to_device(cfg)
    assert changes == ['mixed precision → fp32', 'SyncBN → BN', 'nccl → gloo']
    assert cfg.optim_wrapper.type == 'OptimWrapper'
    assert 'loss_scale' not in cfg.optim_wrapper
    assert str(cfg.model).count("'SyncBN'") == 0
    assert str(cfg.model).count("'BN'") >= layers
    assert cfg.env_cfg.dist_cfg.backend == 'gloo'
    assert cfg.model_wrapper_cfg.device_ids is None


def test_bf16_stays_on_a_cpu(no_gpu):
    cfg = read_config(DETECTION, {'fast.bf16': True})
    assert 'mixed precision → fp32' not in fallbacks.adapt_to_device(cfg)
    apply_fast(cfg)  # as the Runner does
    assert cfg.optim_wrapper.type == 'CPUAmpOptimWrapper'
    layer = nn.Linear(2, 2)
    wrapper = OPTIM_WRAPPERS.build(dict(
        type=cfg.optim_wrapper.type, optimizer=torch.optim.SGD(layer.parameters(), lr=1)))
    with wrapper.optim_context(layer):
        loss = layer(torch.ones(1, 2)).sum()
    assert loss.dtype == torch.bfloat16
    wrapper.update_params(loss)
    assert layer.weight.dtype == torch.float32


def test_nothing_changes_with_a_gpu(monkeypatch):
    monkeypatch.setattr(fallbacks, 'get_device', lambda: 'cuda')
    cfg, untouched = Config.fromfile(SEGMENTATION), Config.fromfile(SEGMENTATION)
    assert fallbacks.adapt_to_device(cfg) == []
    assert cfg.to_dict() == untouched.to_dict()


def test_a_loss_that_needs_a_gpu_is_named_before_training(monkeypatch):
    """mmseg's FocalLoss raises in the first step on a CPU."""
    from convnext_mm.engine import launch
    cfg = read_config(SEGMENTATION, {'model.decode_head.loss_decode.type': 'FocalLoss'})
    monkeypatch.setattr(fallbacks, 'get_device', lambda: 'cuda')
    fallbacks.check_losses(cfg)
    monkeypatch.setattr(fallbacks, 'get_device', lambda: 'cpu')
    with pytest.raises(UserError, match="loss_decode.type='FocalLoss': .* on a GPU only"), \
            launch._build_runner(cfg, ('train',)):
        pass


def test_a_launcher_that_needs_gpus_is_refused(no_gpu):
    with pytest.raises(UserError, match=r'--launcher slurm needs a GPU.*dist_train.sh'):
        fallbacks.process_group(Config(dict(launcher='slurm'))).__enter__()


def test_missing_variables_of_torchrun_are_reported(no_gpu, monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(UserError, match='expects torchrun'):
        fallbacks.process_group(Config(dict(launcher='pytorch'))).__enter__()


@pytest.mark.parametrize('fails', [False, True])
def test_the_process_group_is_destroyed_in_any_case(fails, no_gpu, monkeypatch):
    for key, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR='127.0.0.1',
                           MASTER_PORT=0, OMP_NUM_THREADS=1).items():
        monkeypatch.setenv(key, str(value))
    calls = []
    monkeypatch.setattr(fallbacks.dist, 'barrier', lambda: calls.append('barrier'))

    def work() -> None:
        with fallbacks.process_group(Config(dict(launcher='pytorch'))):
            assert fallbacks.dist.is_initialized()
            if fails:
                raise UserError('a mistake')
    if fails:
        with pytest.raises(UserError, match='a mistake'):
            work()
    else:
        work()
    # After an error, the other processes may never reach a barrier.
    assert calls == ([] if fails else ['barrier'])
    assert not fallbacks.dist.is_initialized()


def test_a_single_process_opens_no_group(no_gpu):
    with fallbacks.process_group(Config(dict(launcher='none'))):
        assert not fallbacks.dist.is_initialized()
