"""The optimizer's state or the whole model divided among the processes, each by one key."""
from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import MODEL_WRAPPERS, OPTIMIZERS
from mmengine.utils import apply_to
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor

from ..backbone import ConvNeXt
from ..errors import UserError
from ..runs.shards import divided_like, whole


@OPTIMIZERS.register_module()
class ShardedOptimizer(ZeroRedundancyOptimizer):
    """PyTorch's ZeroRedundancyOptimizer around an optimizer that is given by name.

    Each process keeps the state of about 1/N of the parameters, updates these, and sends them to
    the others. Checkpoints are as those of the optimizer inside, and are resumed with or without
    sharding (Rajbhandari et al., ZeRO, 2020, section 5.1).

    Args:
        params: Parameters or groups of them, each with its own learning rate.
        optimizer_type: The name of a class in ``torch.optim``.
        kwargs: Its arguments.
    """

    def __init__(self, params: Any, optimizer_type: str = 'AdamW', **kwargs: Any) -> None:
        kind = getattr(torch.optim, optimizer_type, None)
        if kind is None:
            raise UserError(f'shard_optimizer=True shards the optimizers of torch.optim, such as '
                            f'AdamW, not {optimizer_type}')
        super().__init__(list(params), kind, **kwargs)


@MODEL_WRAPPERS.register_module()
class ShardedModel(nn.Module):
    """Stands where mmengine expects DistributedDataParallel; :class:`ShardingHook` does the rest.

    Args:
        module: The model, which is not changed before it is trained.
        find_unused_parameters: Processes may use different parameters in an iteration.
    """

    def __init__(self, module: nn.Module, find_unused_parameters: bool = False) -> None:
        super().__init__()
        self.module = module
        self.find_unused_parameters = find_unused_parameters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.module(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """See mmengine's BaseModel."""
        return self.module.train_step(data, optim_wrapper)  # type: ignore[operator]

    def val_step(self, data: Any) -> list:
        """See mmengine's BaseModel."""
        return self.module.val_step(data)  # type: ignore[operator]

    def test_step(self, data: Any) -> list:
        """See mmengine's BaseModel."""
        return self.module.test_step(data)  # type: ignore[operator]


class ShardingHook(Hook):
    """Divides weights, gradients and the optimizer's state among the processes (FSDP2).

    Units, whose weights are put together while they compute, are each block of a ConvNeXt, what
    else it has, and the rest of the model (Zhao et al., PyTorch FSDP, 2023, section 3). A
    validation computes with whole weights, since processes may have different numbers of windows
    or batches. Checkpoints are as those of one process.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._whole: dict[str, Any] = {}

    def before_train(self, runner: Any) -> None:
        """Divide a model and an optimizer whose states are initialized, loaded or resumed.

        Raises:
            UserError: PyTorch cannot divide a parameter.
        """
        wrapper = runner.model
        divide(wrapper.module, runner.optim_wrapper.optimizer, wrapper.find_unused_parameters)

    def before_val_epoch(self, runner: Any) -> None:
        """Put the weights together, in all processes."""
        for unit in _units(runner.model):
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Divide the weights again."""
        for number, unit in enumerate(_units(runner.model)):
            unit.reshard()
            unit.set_reshard_after_forward(number > 0, recurse=False)

    def collect(self, runner: Any, save_optimizer: bool) -> None:
        """Put together what the next checkpoint has of the model and the optimizer; all call it."""
        states = {'state_dict': runner.model.module.state_dict()}
        if save_optimizer:
            states['optimizer'] = runner.optim_wrapper.state_dict()
        self._whole = apply_to(states, lambda value: isinstance(value, DTensor), _to_first)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        """Save whole tensors."""
        for name, state in self._whole.items():
            checkpoint[name].update(state)
        self._whole = {}


def _to_first(tensor: Tensor) -> Tensor | None:
    put_together = whole(tensor)
    return put_together.cpu() if is_main_process() else None


def _units(model: nn.Module) -> list[Any]:
    """The units of a divided model, the outermost first; none of one that is not divided."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def divide(model: nn.Module, optimizer: torch.optim.Optimizer,
           find_unused_parameters: bool = False) -> None:
    """Divide a model's parameters and an optimizer's state among the processes, in place.

    The optimizer keeps its parameter groups, and with them the learning rates of layers.

    Args:
        model: The same in all processes.
        optimizer: That of its parameters.
        find_unused_parameters: Processes may use different parameters in an iteration.

    Raises:
        UserError: PyTorch cannot divide a parameter.
    """
    before = dict(model.named_parameters())
    for parameter in before.values():
        parameter.data = parameter.data.contiguous()  # channels_last cannot be divided
    # Nothing changes a block's output, which may be a view, in place.
    warnings.filterwarnings('ignore', 'FSDP2-wrapped module .* returned a view tensor')
    mesh = init_device_mesh(next(iter(before.values())).device.type,
                            (torch.distributed.get_world_size(),))
    try:
        for backbone in [module for module in model.modules() if isinstance(module, ConvNeXt)]:
            for stage in backbone.stages:
                for block in cast(nn.Sequential, stage):
                    fully_shard(block, mesh=mesh)
            fully_shard(backbone, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    except (NotImplementedError, ValueError) as error:
        raise UserError(f'shard_model=True: PyTorch cannot divide this model: {error}') from error
    if find_unused_parameters:
        if not hasattr(FSDPModule, 'set_reduce_scatter_unused_params'):
            raise UserError('shard_model=True with find_unused_parameters=True needs a newer '
                            f'PyTorch than {torch.__version__}: leave out one of them')
        for unit in _units(model):
            unit.set_reduce_scatter_unused_params(True)
    after = dict(model.named_parameters())
    divided: dict[Tensor, nn.Parameter] = {
        parameter: after[name] for name, parameter in before.items()}
    for group in optimizer.param_groups:
        group['params'] = [divided[parameter] for parameter in group['params']]
    for old, state in list(optimizer.state.items()):
        new = divided[old]
        optimizer.state[new] = {
            key: divided_like(value, new) if isinstance(value, Tensor)
            and value.shape == new.shape else value for key, value in state.items()}
        del optimizer.state[old]


def shard_optimizer(cfg: Config) -> None:
    """Let a config's optimizer be sharded, in place, if it says so and a launcher starts it.

    The number of processes is not asked for: under Slurm and MPI it is known when the process group
    is there, and one process has all parts. mmengine's own ZeroRedundancyOptimizer, which never
    returns from its first save, becomes ours.

    Raises:
        UserError: ``shard_optimizer`` is neither True nor False.
    """
    wanted = _flag(cfg, 'shard_optimizer')
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer')
    if not isinstance(optimizer, dict):
        return
    if optimizer.get('type') == 'ZeroRedundancyOptimizer':
        optimizer['type'] = optimizer.pop('optimizer_type', 'AdamW')
        wanted = True
    if wanted and _is_launched(cfg):
        optimizer.update(type='ShardedOptimizer', optimizer_type=optimizer['type'])


def shard_model(cfg: Config) -> None:
    """Let a config's model be sharded, in place, if it says so and a launcher starts it.

    Raises:
        UserError: ``shard_model`` is neither True nor False, or cannot go with another setting.
    """
    if not _flag(cfg, 'shard_model'):
        return
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or {}
    wrapper = cfg.get('model_wrapper_cfg') or {}
    hooks = [str(hook.get('type')) for hook in cfg.get('custom_hooks') or []]
    for wrong, what, instead in (
            (cfg.get('shard_optimizer') or optimizer.get('type') == 'ZeroRedundancyOptimizer',
             'shard_optimizer', "it divides the optimizer's state as well"),
            (wrapper.get('type', 'ShardedModel') not in ('ShardedModel',
                                                         'MMDistributedDataParallel'),
             f'model_wrapper_cfg.type={wrapper.get("type")}', 'both wrap the model'),
            ((cfg.get('fast') or {}).get('compile'), 'fast.compile',
             'how compiled parts train when they are divided was not tested'),
            (any('EMAHook' in hook for hook in hooks), 'EMAHook',
             'its average is a whole model, whose weights cannot follow divided ones')):
        if wrong:
            raise UserError(f'shard_model=True cannot go with {what}: {instead}. Leave out one '
                            'of them')
    if _is_launched(cfg):
        cfg.model_wrapper_cfg = dict(type='ShardedModel', find_unused_parameters=bool(
            wrapper.get('find_unused_parameters', cfg.get('find_unused_parameters', False))))


def _is_launched(cfg: Config) -> bool:
    """Whether mmengine makes the run one of several processes, by any launcher."""
    return cfg.get('launcher', 'none') != 'none'


def _flag(cfg: Config, key: str) -> bool:
    """A key that is True or False (not set).

    Raises:
        UserError: It is neither.
    """
    value = cfg.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f'{key}={value!r} must be True or False')
    return value


def collect_state(runner: Any, save_optimizer: bool) -> None:
    """Bring the parts of a divided model or optimizer to the first process; all must call it."""
    optimizer = getattr(runner.optim_wrapper, 'optimizer', None)
    if save_optimizer and isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict()
    for hook in runner.hooks:
        if isinstance(hook, ShardingHook):
            hook.collect(runner, save_optimizer)
