"""Several processes: equal to one, resumable, sharded, and ended when one of them hangs or dies."""
import re
import signal
import time

import pytest

from convnext_mm.errors import UserError
from convnext_mm.runs.heartbeat import HeartbeatHook
from tests.runs import processes, toy
from tests.runs.training import assert_equal, last

SAME = dict(dropout=0.0, sampler='InfiniteSampler')
SHARDED = dict(type='ShardedOptimizer', optimizer_type='AdamW', lr=0.01)


def difference(one: dict, other: dict) -> float:
    """The largest difference of two checkpoints' weights, relative to the largest weight."""
    pairs = [(a, other['state_dict'][name]) for name, a in one['state_dict'].items()]
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


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


CHECK = '''
from mmengine.hooks import Hook
from convnext_mm.engine.launch import run_cli
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
run_cli(action, None)
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
    before = time.monotonic()
    code = started[0].wait(60)
    assert code == 2, (tmp_path / 'output_0.txt').read_text()
    assert time.monotonic() - before < 30
    if '19' in what:
        started[1].send_signal(signal.SIGKILL)
    _, output = processes.wait(started, tmp_path, 60)
    assert len(re.findall(message, output)) == 1, output
    assert output.count('Error: ') == 1, output
    if 'progress' in message:
        assert 'process 1 on' in output
        assert '<string>' in output  # the line
    assert 'Traceback' not in output


def test_timeouts_are_seconds():
    for value in (0, -1, 'long', True):
        with pytest.raises(UserError, match='process_timeout'):
            HeartbeatHook(value)
