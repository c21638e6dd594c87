"""Several processes: equal to one, resumable, sharded, and ended when one of them hangs or dies."""
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from convnext_mm.errors import UserError
from convnext_mm.runs.heartbeat import HeartbeatHook
from tests.helpers import DEMO_SEGMENTATION, ROOT, run_tool
from tests.runs import processes, toy, training
from tests.runs.training import assert_equal, flat, last

SAME = dict(dropout=0.0, sampler='InfiniteSampler')
SHARDED = dict(type='ShardedOptimizer', optimizer_type='AdamW', lr=0.01)


def difference(one: dict, other: dict) -> float:
    """The largest difference of two checkpoints' weights, relative to the largest weight."""
    pairs = [(a, other['state_dict'][name]) for name, a in one['state_dict'].items()
             if a.is_floating_point()]
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1e-30)) for a, b in pairs)


def test_two_processes_are_one(tmp_path):
    """Plain and sharded, whole and interrupted: in one start, because imports take seconds."""
    processes.run(f'''
for name, optimizer in (('plain', None), ('sharded', {SHARDED!r})):
    toy.train(folder / name, distributed=True, optimizer=optimizer, **{SAME!r})
    for resume in (False, True):
        stops = [] if resume else [training.AskToStop(6)] if rank else []
        toy.train(folder / (name + '_stopped'), *stops, distributed=True, optimizer=optimizer,
                  resume=resume, **{SAME!r})
''', tmp_path)
    toy.train(tmp_path / 'one', batch_size=4, **SAME)
    one = last(tmp_path / 'one')
    plain, sharded = last(tmp_path / 'plain'), last(tmp_path / 'sharded')
    assert one['meta']['iter'] == 12
    assert difference(one, plain) < 1e-6
    assert difference(plain, sharded) < 1e-6
    for name in ('plain', 'sharded'):
        log = ''.join(path.read_text() for path in (tmp_path / f'{name}_stopped').glob('*/*.log'))
        assert_equal(last(tmp_path / name), last(tmp_path / f'{name}_stopped'))
        assert (tmp_path / f'{name}_stopped' / 'iter_12.pth').is_file(), log
    # A sharded run goes on in one process.
    toy.train(tmp_path / 'sharded', batch_size=4, resume=True, length=16, **SAME)
    assert last(tmp_path / 'sharded')['meta']['iter'] == 16
    state = last(tmp_path / 'sharded')['optimizer']['state']
    assert {int(entry['step']) for entry in state.values()} == {16}


def test_four_processes_are_one(tmp_path):
    """Plain, with a sharded optimizer and with a divided model, an image in each process."""
    processes.run(f'''
more = dict(distributed=True, batch_size=1, **{SAME!r})
toy.train(folder / 'plain', **more)
toy.train(folder / 'sharded', optimizer={SHARDED!r}, **more)
toy.train(folder / 'divided', shard=True, **more)
''', tmp_path, 4)
    toy.train(tmp_path / 'one', batch_size=4, **SAME)
    one = last(tmp_path / 'one')
    for name in ('plain', 'sharded', 'divided'):
        other = last(tmp_path / name)
        assert other['meta']['iter'] == one['meta']['iter'] == 12
        assert difference(one, other) < 1e-6


def test_two_processes_with_a_divided_model_are_one(tmp_path):
    """Interrupted before a validation and in an accumulation; resumed with and without division.

    Processes validate different numbers of batches.
    """
    kinds = dict(plain=dict(clip=0.1), accumulated=dict(clip=0.1, accumulate=3))
    stops = dict(plain=4, accumulated=5)
    same = dict(SAME, even=False)
    processes.run(f'''
for name, more in {kinds!r}.items():
    more = dict(more, distributed=True, **{same!r})
    toy.train(folder / name, **more)
    toy.train(folder / (name + '_divided'), shard=True, **more)
    for kind, shards in (('stopped', (True, True)), ('mixed', (True, False))):
        for resume, shard in enumerate(shards):
            asks = [] if resume else [training.AskToStop({stops!r}[name])] if rank else []
            toy.train(folder / (name + '_' + kind), *asks, shard=shard, resume=bool(resume), **more)
''', tmp_path)
    for name, more in kinds.items():
        whole, divided = last(tmp_path / name), last(tmp_path / f'{name}_divided')
        assert whole['meta']['iter'] == 12
        states = [flat(one['optimizer']['state']).keys() for one in (whole, divided)]
        assert states[0] == states[1]
        assert difference(whole, divided) < 1e-6
        assert difference(whole, last(tmp_path / f'{name}_mixed')) < 1e-6
        assert_equal(divided, last(tmp_path / f'{name}_stopped'))
        # A divided run goes on in one process.
        for run in (name, f'{name}_divided'):
            toy.train(tmp_path / run, batch_size=4, resume=True, length=16, **more, **SAME)
        whole, divided = last(tmp_path / name), last(tmp_path / f'{name}_divided')
        assert whole['meta']['iter'] == 16
        assert difference(whole, divided) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(('count', 'shard'), [(2, False), (2, True), (4, False), (4, True)])
@pytest.mark.parametrize(('task', 'small'), [
    ('segmentation', {'model.decode_head.channels': 32, 'model.auxiliary_head.channels': 32}),
    ('detection', {'model.neck.out_channels': 32})])
def test_gradients_of_recipes_are_those_of_the_whole_batch(task, small, count, shard, tmp_path):
    small = {'model.backbone.depths': [1, 1, 1, 1], 'model.backbone.dims': [8, 16, 24, 32], **small}
    output = processes.run(f'''
from tests.runs import gradients
print('errors', *gradients.compare({task!r}, {small!r}, {shard}))
''', tmp_path, count)
    found = re.findall(r'^errors (\S+) (\S+)$', output, re.MULTILINE)
    assert len(found) == count
    print(f'{task}, {count} processes, shard={shard}: loss and gradient differ by {found[0]}')
    for loss, gradient in found:
        assert float(loss) < 1e-6
        assert 0 < float(gradient) < 5e-6


RECIPE = '''
from convnext_mm.engine.runner import ConvNeXtRunner
ConvNeXtRunner._log_env = lambda self, cfg: None
task, data = TASK, DATA
for name in ('plain', 'shard_optimizer', 'shard_model'):
    options = dict(seed=0, check_data=False, **({} if name == 'plain' else {name: True}))
    options['train_dataloader.num_workers'] = options['val_dataloader.num_workers'] = 0
    options.update({'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2,
                    'default_hooks.checkpoint.interval': 2} if task == 'segmentation'
                   else {'train_cfg.max_epochs': 1})
    cfg = training.config(task, pathlib.Path(data), folder / name, options)
    cfg.launcher = 'pytorch'
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)
    cfg.env_cfg.dist_cfg = dict(backend='gloo')
    runner = ConvNeXtRunner.from_cfg(cfg)
    record = training.recorded(runner)
    torch.save(record.losses, folder / f'losses_{name}_{rank}')
    optimizer = runner.optim_wrapper.optimizer
    assert (type(optimizer).__name__ == 'ShardedOptimizer') == (name == 'shard_optimizer')
    if name == 'shard_model':
        divided = [p for group in optimizer.param_groups for p in group['params']]
        local = sum(p.to_local().numel() for p in divided)
        assert 0.4 < local / sum(p.numel() for p in divided) < 0.6
        kinds = [type(part).__name__ for part in runner.model.modules()]
        assert kinds.count('FSDPConvNeXt') == 1
        assert sum(kind.startswith('FSDP') for kind in kinds) == 6  # 4 blocks, backbone, model
    if name == 'shard_optimizer':
        ours = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
        inside = [(group, p) for group in optimizer.optim.param_groups for p in group['params']]
        assert 0 < len(inside) < len(ours)
        assert all(group['lr_scale'] > 0 for group, _ in inside)
'''


@pytest.mark.slow
@pytest.mark.parametrize('task', ['segmentation', 'detection'])
def test_a_sharded_recipe_trains_as_one_that_is_not(task, demo_data, tmp_path):
    """With the layer decay of the recipe, its losses and its weights."""
    processes.run(RECIPE.replace('TASK', repr(task)).replace('DATA', repr(str(demo_data))),
                  tmp_path)
    plain = last(tmp_path / 'plain')
    rates = [(group['lr_scale'], group['lr'], group['weight_decay'], len(group['params']))
             for group in plain['optimizer']['param_groups']]
    assert len({scale for scale, *_ in rates}) > 2
    for name in ('shard_optimizer', 'shard_model'):
        sharded = last(tmp_path / name)
        assert rates == [(group['lr_scale'], group['lr'], group['weight_decay'],
                          len(group['params'])) for group in sharded['optimizer']['param_groups']]
        assert difference(plain, sharded) < 1e-5
        states = [flat(one['optimizer']['state']).keys() for one in (plain, sharded)]
        assert states[0] == states[1]
        for rank in (0, 1):
            losses = [torch.load(tmp_path / f'losses_{one}_{rank}') for one in ('plain', name)]
            assert losses[0] == pytest.approx(losses[1], rel=1e-5)
            assert len(losses[0]) >= 2


DISTILLED = '''
from convnext_mm.engine.runner import ConvNeXtRunner
ConvNeXtRunner._log_env = lambda self, cfg: None
for name, shard in (('plain', False), ('divided', True)):
    cfg = training.config(TASK, pathlib.Path(DATA), folder / name, dict(OPTIONS, shard_model=shard))
    cfg.launcher = 'pytorch'
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)
    cfg.env_cfg.dist_cfg = dict(backend='gloo')
    record = training.recorded(ConvNeXtRunner.from_cfg(cfg))
    torch.save(record.losses, folder / f'losses_{name}_{rank}')
'''


@pytest.mark.slow
@pytest.mark.parametrize('task', ['segmentation', 'detection'])
def test_a_divided_model_learns_from_a_teacher(task, demo_data, tmp_path):
    options = {'seed': 0, 'check_data': False, 'train_dataloader.num_workers': 0, **(
        {'train_cfg.max_iters': 2} if task == 'segmentation' else {'train_cfg.max_epochs': 1})}
    cfg = training.config(task, demo_data, tmp_path / 'teacher', options)
    init_default_scope(cfg.default_scope)
    teacher = MODELS.build(cfg.model)
    cfg.dump(tmp_path / 'teacher.py')
    torch.save(dict(state_dict=teacher.state_dict()), tmp_path / 'teacher.pth')
    options |= {'val_cfg': None, 'val_dataloader': None, 'val_evaluator': None, 'distil': dict(
        teacher=str(tmp_path / 'teacher.py'), checkpoint=str(tmp_path / 'teacher.pth'))}
    processes.run(DISTILLED.replace('TASK', repr(task)).replace('DATA', repr(str(demo_data)))
                  .replace('OPTIONS', repr(options)), tmp_path)
    for rank in (0, 1):
        plain, divided = (torch.load(tmp_path / f'losses_{one}_{rank}')
                          for one in ('plain', 'divided'))
        assert len(plain) >= 2
        assert plain == pytest.approx(divided, rel=1e-5)


LAUNCHED = '''
import importlib.util, pathlib, runpy, sys
import torch, torch.distributed as dist
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
import convnext_mm
torch.set_num_threads(1)
torch.cuda.set_device = lambda device: None  # which mmengine's launchers choose a GPU with
folder = pathlib.Path(sys.argv[1])
@HOOKS.register_module()
class Note(Hook):
    def after_train(self, runner):
        model, optimizer = runner.model, runner.optim_wrapper.optimizer
        (folder / f'note_{dist.get_rank()}').write_text(
            f'{dist.get_world_size()} {type(model).__name__} {type(optimizer).__name__}')
toolbox = importlib.util.find_spec(TOOLBOX).submodule_search_locations[0]
sys.argv = ['train.py', str(folder / 'config.py'), '--launcher', LAUNCHER,
            '--work-dir', str(folder / 'run')]
runpy.run_path(toolbox + '/.mim/tools/train.py', run_name='__main__')
dist.destroy_process_group()
'''


@pytest.mark.slow
@pytest.mark.parametrize(('task', 'launcher', 'key', 'kinds'), [
    ('segmentation', 'slurm', 'shard_optimizer', 'MMDistributedDataParallel ShardedOptimizer'),
    ('segmentation', 'mpi', 'shard_model', 'ShardedModel AdamW'),
    ('detection', 'mpi', 'shard_optimizer', 'MMDistributedDataParallel ShardedOptimizer'),
    ('detection', 'pytorch', 'shard_optimizer', 'MMDistributedDataParallel ShardedOptimizer')])
def test_the_scripts_of_the_toolboxes_shard_with_every_launcher(
        task, launcher, key, kinds, demo_data, tmp_path):
    """Some of which tell the number of processes only when mmengine has set up the group."""
    short = ({'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2,
              'default_hooks.checkpoint.interval': 2} if task == 'segmentation'
             else {'train_cfg.max_epochs': 1})
    cfg = training.config(task, demo_data, tmp_path / 'run', {
        **short, 'check_data': False, 'train_dataloader.num_workers': 0,
        'val_dataloader.num_workers': 0, key: True})
    cfg.custom_hooks = [dict(type='Note')]
    cfg.model_wrapper_cfg = dict(type='MMDistributedDataParallel', device_ids=None)
    cfg.env_cfg.dist_cfg = dict(backend='gloo')
    cfg.dump(tmp_path / 'config.py')
    toolbox = 'mmseg' if task == 'segmentation' else 'mmdet'
    processes.run(LAUNCHED.replace('TOOLBOX', repr(toolbox)).replace('LAUNCHER', repr(launcher)),
                  tmp_path, launcher=launcher, preamble='')
    for rank in (0, 1):
        assert (tmp_path / f'note_{rank}').read_text() == f'2 {kinds}'
    assert last(tmp_path / 'run')['optimizer']['state']


CHECK = '''
from mmengine.hooks import Hook
from convnext_mm.cli import run
class Stop(Hook):
    priority = 'VERY_HIGH'
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 3 and rank == 1:
            (folder / 'here').write_text(str(os.getpid()))
            WHAT
def action(args):
    runner = toy.build(folder / 'run', distributed=True, length=1000,
                       cfg=dict(process_timeout=TIMEOUT))
    runner.register_hook(Stop())
    runner.train()
run(action, None)
'''


@pytest.mark.parametrize(('what', 'timeout', 'message'), [
    ('time.sleep(1000)', 3, r'no progress in 3 s'),
    ('os.kill(os.getpid(), 19)', 3, r'does not answer'),
    ('time.sleep(1.5); os.kill(os.getpid(), 9)', 10, r'process 1 on \S+ \(\D+ 3\) has ended'),
    ('raise __import__("convnext_mm").UserError("a bad file")', 60, 'Error: a bad file')])
def test_a_process_that_hangs_or_dies_is_named(what, timeout, message, tmp_path):
    code = CHECK.replace('WHAT', what).replace('TIMEOUT', str(timeout))
    started = processes.start(code, tmp_path)
    while not (tmp_path / 'here').is_file():
        assert started[0].poll() is None, (tmp_path / 'output_0.txt').read_text()
        time.sleep(0.05)
    code = started[0].wait(60)
    assert code == 2, (tmp_path / 'output_0.txt').read_text()
    if '19' in what:
        started[1].send_signal(signal.SIGKILL)
    _, output = processes.wait(started, tmp_path, 60)
    assert len(re.findall(message, output)) == 1, output
    assert output.count('Error: ') == 1, output
    if 'progress' in message:
        assert 'process 1 on' in output
        assert '<string>' in output  # the line
    assert 'Traceback' not in output


def under_torchrun(what: str, rank: int, folder: Path) -> subprocess.CompletedProcess:
    """Two processes that torchrun starts as tools/dist_train.sh does, of which one fails."""
    script = folder / 'run.py'
    script.write_text(processes.PREAMBLE + CHECK.replace('WHAT', what).replace(
        'TIMEOUT', '5').replace('rank == 1', f'rank == {rank}'))
    return run_tool('tools/_torchrun.py', '--nproc_per_node=2', '--master_addr=127.0.0.1',
                    f'--master_port={processes.free_port()}', script, folder, check=False,
                    timeout=120)


@pytest.mark.parametrize(('what', 'rank', 'message'), [
    ('time.sleep(1000)', 0, r'no progress in 5 s.*\n  process 0 on \S+: after iteration 3, '),
    ('time.sleep(1000)', 1, r'no progress in 5 s.*\n  process 1 on \S+: after iteration 3, '),
    ('os.kill(os.getpid(), 9)', 1, r'process 1 of this machine was ended by SIGKILL')])
def test_torchrun_ends_when_a_process_hangs_or_dies(what, rank, message, tmp_path):
    done = under_torchrun(what, rank, tmp_path)
    assert done.returncode in ((1, 2) if '9' in what else (2,)), done.stderr
    assert len(re.findall(message, done.stderr)) == 1, done.stderr
    assert 'Traceback' not in done.stderr
    hung = int((tmp_path / 'here').read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(hung, 0)  # it does not outlive the run


HANG = """
_base_ = 'BASE'
custom_imports = dict(imports=['convnext_mm', 'hang'])
custom_hooks = [dict(type='Hang')]
"""
HOOK = """
import time
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
@HOOKS.register_module()
class Hang(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 2 and get_rank() == 1:
            time.sleep(1000)
"""


@pytest.mark.slow
def test_dist_train_ends_when_a_process_hangs(demo_data, tmp_path):
    (tmp_path / 'hang.py').write_text(HOOK)
    (tmp_path / 'config.py').write_text(HANG.replace('BASE', f'{ROOT}/{DEMO_SEGMENTATION}'))
    small = [f'{key}={value}'.replace(' ', '') for key, value in training.SEGMENTATION.items()
             if key != 'custom_hooks']
    done = run_tool('tools/dist_train.sh', tmp_path / 'config.py', '2', '--work-dir',
                    tmp_path / 'run', '--cfg-options', *small, 'check_data=False',
                    f'data_root={demo_data}/ADEChallengeData2016', 'process_timeout=20',
                    env={'PYTHONPATH': f'{ROOT}:{tmp_path}'}, check=False)
    assert done.returncode == 2, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r'no progress in 20 s .*of 2 processes, the others wait for\n'
                     r'  process 1 on \S+: after iteration 2, at \S+hang\.py:10', done.stderr)
    assert done.stderr.count('Error: ') == 1
    assert 'Traceback' not in done.stderr


def test_timeouts_are_seconds():
    for value in (0, -1, 'long', True):
        with pytest.raises(UserError, match='process_timeout'):
            HeartbeatHook(value)
