"""A run that dies at any step of a save loses nothing: each is tried."""
import errno
import os
import shutil
from contextlib import suppress

import pytest
import torch
from mmengine.hooks import Hook

from convnext_mm.checkpoints.files import check_whole, read_checkpoint
from convnext_mm.errors import UserError
from convnext_mm.runs import guards, resuming, saving
from tests.runs import toy
from tests.runs.training import assert_equal, contents, last


class Dead(BaseException):
    """The process has been killed."""


class Killer:
    """Kills the process before its nth change of the file system; then nothing changes any more."""

    CALLS = ('replace', 'unlink', 'remove', 'link', 'fsync')

    def __init__(self, monkeypatch, at: int) -> None:
        self.count, self.at = 0, at
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.wrap(getattr(os, name)))

    def wrap(self, call):
        def wrapper(*args, **kwargs):
            self.count += 1
            if self.count > self.at:
                raise Dead
            return call(*args, **kwargs)
        return wrapper


def die(folder, monkeypatch, at: int, **settings) -> bool:
    """Train until the process dies; return whether it did."""
    with monkeypatch.context() as patched:
        killer = Killer(patched, at)
        with suppress(Dead):
            toy.train(folder, **settings)
        return killer.count > at


def files(folder) -> list[str]:
    """The names of the checkpoints, hidden ones included, and of the pointer."""
    return sorted(path.name for path in folder.iterdir()
                  if path.suffix == '.pth' or path.name == saving.POINTER)


@pytest.mark.slow
@pytest.mark.parametrize('by_epoch', [False, True])
def test_a_kill_at_any_step_of_any_save_loses_nothing(by_epoch, tmp_path, monkeypatch):
    whole = toy.train(tmp_path / 'whole', by_epoch=by_epoch)
    wanted, names = last(tmp_path / 'whole'), files(tmp_path / 'whole')
    at, iteration = 0, 0
    while True:
        folder = tmp_path / str(at)
        if not die(folder, monkeypatch, at, by_epoch=by_epoch):
            break
        found = resuming.find_checkpoint(dict(work_dir=str(folder)))
        now = contents(found)['meta']['iter'] if found else 0
        assert now >= iteration, 'a later kill loses what an earlier one keeps'
        iteration = now
        best = sorted(folder.glob('best_*.pth'))
        assert bool(best) >= (folder / 'best.pth').exists() >= (iteration > 4)
        for path in (*best, *folder.glob('best.pth')):
            check_whole(path)
        record = toy.train(folder, by_epoch=by_epoch, resume=True)
        assert record.losses == {i: loss for i, loss in whole.losses.items() if i > iteration}
        assert_equal(last(folder), wanted)
        assert files(folder) == names
        shutil.rmtree(folder)
        at += 1
    assert iteration == 12
    assert at > 30


def test_a_changed_bit_is_noticed_or_changes_nothing(tmp_path):
    toy.train(tmp_path, length=4)
    path = tmp_path / 'iter_4.pth'
    content, wanted = path.read_bytes(), contents(path)
    generator = torch.Generator().manual_seed(0)
    noticed = 0
    for place in torch.randint(8 * len(content), (400,), generator=generator).tolist():
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            assert_equal(read_checkpoint(str(path)), wanted)
        except UserError:
            noticed += 1
    assert 100 < noticed < 400, 'padding between tensors is not checked'


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    toy.train(tmp_path, length=4)
    write = torch.save

    def full(checkpoint, file, *args, **kwargs):
        write(checkpoint, file, *args, **kwargs)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(UserError, match=r'cannot write .*iter_8\.pth: No space left on device'):
        toy.train(tmp_path, resume=True)
    assert last(tmp_path)['meta']['iter'] == 4
    assert not list(tmp_path.glob('.*'))


def test_several_best_checkpoints_each_stay_until_replaced(tmp_path):
    class Worse(Hook):
        def before_val_epoch(self, runner):
            runner.val_loop.evaluator.metrics[0].scale = -runner.iter
    toy.train(tmp_path, Worse(), save_best=['score', 'opposite'], rule='greater')
    best = sorted(path.name for path in tmp_path.glob('best_*.pth'))
    assert best == ['best_opposite_iter_12.pth', 'best_score_iter_4.pth']
    info = last(tmp_path)['message_hub']['runtime_info']
    assert info['best_ckpt_score'].endswith(best[1])
    assert (tmp_path / 'best.pth').samefile(tmp_path / 'best_score_iter_4.pth')


def test_a_moved_folder_keeps_its_best(tmp_path):
    toy.train(tmp_path / 'old', length=8)
    shutil.copytree(tmp_path / 'old', tmp_path / 'new')
    toy.train(tmp_path / 'new', resume=True)
    assert len(list((tmp_path / 'new').glob('best_*.pth'))) == 1
    assert len(list((tmp_path / 'old').glob('best_*.pth'))) == 1


def test_best_is_copied_where_there_are_no_links(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError
    monkeypatch.setattr(os, 'link', fail)
    (tmp_path / 'best_a.pth').write_text('a')
    saving.link_best(tmp_path / 'best_a.pth')
    assert (tmp_path / 'best.pth').read_text() == 'a'


def test_a_model_that_is_not_finite_is_not_kept_and_deletes_nothing(tmp_path):
    class Break(Hook):
        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter + 1 == 6:
                next(runner.model.parameters()).data[0] = float('inf')
    toy.train(tmp_path / 'run', length=4)
    before = {p.name: p.read_bytes() for p in (tmp_path / 'run').glob('*.pth')}
    toy.train(tmp_path / 'run', Break(), resume=True, finite=dict(stop_after=100))
    after = {p.name: p.read_bytes() for p in (tmp_path / 'run').glob('*.pth')}
    assert after == before
    assert 'iter_4.pth' in after


def test_the_loss_ends_the_run_with_images_and_the_last_checkpoint(tmp_path):
    bad = tuple(range(6, 100))
    with pytest.raises(UserError) as raised:
        toy.train(tmp_path / 'run', bad=bad, finite=dict(stop_after=3))
    for text in ('in 3 iterations in a row', 'the last of them 8', 'iter_4.pth', 'finite.skip'):
        assert text in str(raised.value)
    assert last(tmp_path / 'run')['meta']['iter'] == 4


def test_updates_by_bad_losses_can_be_left_out(tmp_path):
    record = toy.train(tmp_path / 'run', bad=(3, 4), finite=dict(stop_after=1, skip=True))
    assert [i for i, loss in record.losses.items() if loss != loss] == [3, 4]
    checkpoint = last(tmp_path / 'run')
    assert checkpoint['meta']['iter'] == 12
    assert {int(state['step']) for state in checkpoint['optimizer']['state'].values()} == {10}


def test_images_of_a_batch_are_named():
    class Sample:
        img_path = 'a.jpg'
    assert guards.image_names(dict(inputs=[1], data_samples=[Sample(), object()])) == ['a.jpg']
    assert guards.image_names([1]) == []
