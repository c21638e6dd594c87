"""A resumed run equals one that was never interrupted; what is resumed is the newest whole file."""
import multiprocessing
import os
import shutil
import time

import pytest
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.hooks import CheckpointHook
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch.utils.data import BatchSampler

from convnext_mm.errors import UserError
from convnext_mm.runs import loops, resuming
from convnext_mm.runs.batches import NumberedBatches
from tests.runs import toy, training
from tests.runs.training import AskToStop, assert_equal, contents, last


@pytest.mark.parametrize(('by_epoch', 'sampler'), [
    (False, 'InfiniteSampler'), (False, 'DefaultSampler'), (True, 'DefaultSampler')])
@pytest.mark.parametrize(('accumulate', 'seed'), [(1, 0), (3, None)])
def test_interrupted_anywhere_and_resumed_is_the_same(by_epoch, sampler, accumulate, seed,
                                                      tmp_path):
    settings = dict(by_epoch=by_epoch, sampler=sampler, accumulate=accumulate)
    whole = toy.train(tmp_path / 'whole', seed=seed, **settings)
    wanted = last(tmp_path / 'whole')
    assert sorted(whole.losses) == list(range(1, 13))
    for stop in (1, 3, 4, 6, 8, 11, 12):
        folder = tmp_path / str(stop)
        first = toy.train(folder, AskToStop(stop), seed=wanted['meta']['seed'], **settings)
        assert max(first.losses) == stop
        second = toy.train(folder, seed=seed, resume=True, **settings)
        assert {**first.losses, **second.losses} == whole.losses, stop
        assert not set(first.losses) & set(second.losses)
        assert_equal(last(folder), wanted)
        assert not (folder / 'interrupted.pth').exists()


@pytest.mark.parametrize('by_epoch', [False, True])
@pytest.mark.parametrize('persistent', [False, True])
def test_workers_draw_what_one_process_draws(by_epoch, persistent, tmp_path):
    whole = toy.train(tmp_path / 'whole', by_epoch=by_epoch)
    folder = tmp_path / 'workers'
    settings = dict(by_epoch=by_epoch, workers=2, persistent=persistent)
    others = set(multiprocessing.active_children())  # of earlier tests
    first = toy.train(folder, AskToStop(6), **settings)
    second = toy.train(folder, resume=True, **settings)
    assert {**first.losses, **second.losses} == whole.losses
    assert_equal(last(folder), last(tmp_path / 'whole'))
    if persistent:
        assert set(multiprocessing.active_children()) <= others, 'they ended with their run'


@pytest.mark.slow
@pytest.mark.parametrize('task', ['segmentation', 'detection'])
def test_both_tasks_resume_exactly(task, demo_data, tmp_path):
    options = {'seed': None, 'train_dataloader.num_workers': 2, 'check_data': False,
               'train_dataloader.persistent_workers': False,
               'optim_wrapper.accumulative_counts': 3}
    whole = training.train(training.config(task, demo_data, tmp_path / 'whole', options))
    wanted = last(tmp_path / 'whole')
    folder, seed = tmp_path / 'parts', wanted['meta']['seed']
    first = training.train(training.config(task, demo_data, folder, {**options, 'seed': seed}),
                           AskToStop(5))
    second = training.train(training.config(task, demo_data, folder, options), resume=True)
    assert sorted(first.losses) == [1, 2, 3, 4, 5]
    assert {**first.losses, **second.losses} == whole.losses
    assert {**first.images, **second.images} == whole.images
    assert_equal(last(folder), wanted)


@pytest.mark.parametrize('by_epoch', [False, True])
def test_checkpoints_of_mmengine_resume(by_epoch, tmp_path, monkeypatch):
    """Without a place in the run, it follows from the number of iterations."""
    monkeypatch.setattr(loops, 'LOOPS', {})
    monkeypatch.setattr('convnext_mm.engine.runner.LOOPS', {})
    monkeypatch.setattr('convnext_mm.engine.runner.SafeCheckpointHook', CheckpointHook)
    toy.train(tmp_path, by_epoch=by_epoch, length=1 if by_epoch else 4)
    assert 'run_state' not in last(tmp_path / '.')
    monkeypatch.undo()
    assert issubclass(loops.LOOPS['IterBasedTrainLoop'], IterBasedTrainLoop)
    assert issubclass(loops.LOOPS['EpochBasedTrainLoop'], EpochBasedTrainLoop)
    whole = toy.train(tmp_path / 'whole', by_epoch=by_epoch)
    record = toy.train(tmp_path, by_epoch=by_epoch, resume=True)
    assert sorted(record.losses) == list(range(5, 13))
    assert {i: record.images[i] for i in range(5, 13)} == {i: whole.images[i] for i in range(5, 13)}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A finished run with all its checkpoints."""
    folder = tmp_path_factory.mktemp('finished') / 'run'
    toy.train(folder, max_keep=-1)
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of it, in another place."""
    return shutil.copytree(finished, tmp_path / 'moved')


def find(folder):
    found = resuming.find_checkpoint(dict(work_dir=str(folder)))
    return found and os.path.relpath(found, folder)


def flip(path) -> None:
    """Change one bit of a checkpoint's weights."""
    weight = contents(path)['state_dict']['layers.1.weight'].numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.find(weight)] ^= 16
    path.write_bytes(content)


def logged(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(resuming, 'print_log', lambda text, **kwargs: lines.append(text))
    return lines


def test_the_newest_is_found_wherever_the_folder_is(folder):
    assert (folder / 'last_checkpoint').read_text() == 'iter_12.pth'
    assert find(folder) == 'iter_12.pth'
    (folder / 'last_checkpoint').unlink()
    assert find(folder) == 'iter_12.pth'
    (folder / 'last_checkpoint').write_text('/elsewhere/iter_8.pth')  # as mmengine writes it
    assert find(folder) == 'iter_8.pth', 'a run that went on from an earlier checkpoint'
    time.sleep(0.01)
    (folder / 'iter_12.pth').touch()
    assert find(folder) == 'iter_12.pth', 'killed before the pointer named it'


def test_damaged_files_are_skipped_and_named(folder, monkeypatch):
    lines = logged(monkeypatch)
    flip(folder / 'iter_12.pth')
    assert find(folder) == 'iter_8.pth'
    (folder / 'iter_8.pth').write_bytes((folder / 'iter_8.pth').read_bytes()[:5000])
    assert find(folder) == 'iter_4.pth'
    text = '\n'.join(lines)
    assert text.count('iter_12.pth is damaged') == 2
    assert text.count('iter_8.pth is cut off') == 1
    flip(folder / 'iter_4.pth')
    with pytest.raises(UserError, match='no checkpoint in .* can be resumed') as raised:
        find(folder)
    for number in (4, 8, 12):
        assert f'iter_{number}.pth' in str(raised.value)


def test_an_empty_folder_starts_from_the_beginning_and_a_lost_file_does_not(tmp_path):
    assert find(tmp_path) is None
    (tmp_path / 'last_checkpoint').write_text('iter_4.pth')
    with pytest.raises(UserError, match=r'names iter_4\.pth, which is not there'):
        find(tmp_path)


def test_weights_alone_are_not_resumed(tmp_path):
    torch.save(dict(state_dict=dict(a=torch.zeros(1))), tmp_path / 'iter_3.pth')
    with pytest.raises(UserError, match=r'iter_3\.pth has no optimizer state'):
        find(tmp_path)


def test_processes_draw_differently(tmp_path, monkeypatch):
    first = toy.train(tmp_path / '0', length=4)
    monkeypatch.setattr(loops, 'get_rank', lambda: 1)
    assert toy.train(tmp_path / '1', length=4).losses != first.losses


def test_a_finished_run_says_so(folder, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob('*.pth')}
    said = []
    monkeypatch.setattr(loops, 'print_log', lambda text, **kwargs: said.append(text))
    toy.train(folder, resume=True, max_keep=-1)
    assert len(said) == 1
    assert 'finished: all 12 iterations' in said[0]
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob('*.pth')} == before


def test_a_run_killed_in_its_last_validation_validates(tmp_path):
    class Killed(BaseException):
        pass

    class Kill(training.Hook):
        def before_val_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 12:
                raise Killed
    with pytest.raises(Killed):
        toy.train(tmp_path / 'killed', Kill())
    toy.train(tmp_path / 'killed', resume=True)
    toy.train(tmp_path / 'whole')
    assert_equal(last(tmp_path / 'killed'), last(tmp_path / 'whole'))
    info = [last(tmp_path / name)['message_hub']['runtime_info']['best_score']
            for name in ('killed', 'whole')]
    assert info[0] == info[1]


def test_the_seed_of_the_checkpoint_is_kept(finished, tmp_path):
    shutil.copytree(finished, tmp_path / 'run')
    runner = toy.build(tmp_path / 'run', seed=5, resume=True)
    runner.train()
    assert runner.seed == contents(finished / 'iter_12.pth')['meta']['seed'] == 0


def test_history_stays_short(tmp_path, monkeypatch):
    monkeypatch.setattr(loops, 'history_length', lambda runner: 5)
    toy.train(tmp_path)
    scalars = last(tmp_path)['message_hub']['log_scalars']
    assert len(scalars['train/loss'].data[0]) == 5
    assert torch.tensor(scalars['train/loss'].data[0]).isfinite().all()


def test_a_late_resume_draws_as_little_as_an_early_one(tmp_path, monkeypatch):
    """At iteration 100,000 as at 8: two permutations of the 7 samples for 4 batches of 2."""
    toy.train(tmp_path / 'run', AskToStop(8), sampler='InfiniteSampler', length=200_000)
    early = last(tmp_path / 'run')
    late = 100_000
    order = NumberedBatches(BatchSampler(InfiniteSampler(range(7), seed=0), 2, False), seed=0)
    order.start_at(0, late)
    next(iter(order))
    drawn, losses = [], []
    randperm = torch.randperm
    monkeypatch.setattr(torch, 'randperm', lambda *args, **more: drawn.append(args) or randperm(
        *args, **more))
    counts = []
    for iteration, state in ((8, early['run_state']['order']), (late, order.state(late)),
                             (late, None)):
        early['meta']['iter'] = iteration
        early['run_state'].update(batches=iteration, order=state)
        (tmp_path / 'copy').mkdir(exist_ok=True)
        torch.save(early, tmp_path / 'copy' / 'iter_8.pth')
        (tmp_path / 'copy' / 'last_checkpoint').write_text('iter_8.pth')
        drawn.clear()
        record = toy.train(tmp_path / 'copy', AskToStop(iteration + 4), sampler='InfiniteSampler',
                           length=200_000, resume=True)
        assert list(record.losses) == [iteration + one for one in range(1, 5)]
        losses.append(record.losses)
        counts.append(len(drawn))
    assert counts[0] == counts[1] <= 3
    assert counts[2] > 28_000  # of a checkpoint without a state
    assert losses[1] == losses[2]
