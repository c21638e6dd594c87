import pytest
from mmengine.config import Config

from convnext_mm import UserError
from convnext_mm.training import fallbacks
from tests.conftest import DETECTION, SEGMENTATION


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(fallbacks, 'get_device', lambda: 'cpu')


@pytest.mark.parametrize(('config', 'layers'), [(SEGMENTATION, 2), (DETECTION, 3)])
def test_a_recipe_on_a_machine_without_gpu(no_gpu, config, layers):
    cfg = Config.fromfile(config)
    before = str(cfg).count("'SyncBN'")
    assert before >= layers
    cfg.launcher = 'pytorch'
    changes = fallbacks.adapt(cfg)
    assert changes == ['mixed precision → fp32', 'SyncBN → BN', 'nccl → gloo']
    assert cfg.optim_wrapper.type == 'OptimWrapper'
    assert 'loss_scale' not in cfg.optim_wrapper
    assert str(cfg.model).count("'SyncBN'") == 0
    assert str(cfg.model).count("'BN'") >= layers
    assert cfg.env_cfg.dist_cfg.backend == 'gloo'
    assert cfg.model_wrapper_cfg.device_ids is None


def test_nothing_changes_with_a_gpu(monkeypatch):
    monkeypatch.setattr(fallbacks, 'get_device', lambda: 'cuda')
    cfg, untouched = Config.fromfile(SEGMENTATION), Config.fromfile(SEGMENTATION)
    assert fallbacks.adapt(cfg) == []
    assert cfg.to_dict() == untouched.to_dict()


def test_a_launcher_that_needs_gpus_says_so(no_gpu):
    with pytest.raises(UserError, match=r'--launcher slurm needs a GPU.*dist_train.sh'):
        fallbacks.start_processes(Config(dict(launcher='slurm')))


def test_torchrun_forgotten_is_said(no_gpu, monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    with pytest.raises(UserError, match='expects torchrun'):
        fallbacks.start_processes(Config(dict(launcher='pytorch')))
