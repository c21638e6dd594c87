"""A resumed run says what has changed in its config."""
from mmengine.config import Config

from convnext_mm.engine.changes import changed_settings
from tests.runs import toy

BASE = dict(optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-4)), classes=('a', 'b'),
            work_dir='here', model=dict(type='M', heads=[dict(n=1), dict(n=2)]),
            train_dataloader=dict(batch_size=2, num_workers=2))


def test_changes_are_listed_old_to_new():
    new = Config(dict(
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=2e-4)), classes=['a', 'b'],
        work_dir='there', model=dict(type='M', heads=[dict(n=1), dict(n=3)], extra=True),
        train_dataloader=dict(batch_size=2, num_workers=8)))
    assert changed_settings(Config(BASE).pretty_text, new) == [
        'model.extra: (not set) → True', 'model.heads.1.n: 2 → 3',
        'optim_wrapper.optimizer.lr: 0.0001 → 0.0002']
    assert changed_settings(Config(BASE).pretty_text, Config(BASE)) == []


def test_a_text_is_read_as_data(tmp_path):
    evil = f'a = open({str(tmp_path / "file")!r}, "w")\nb = 1\n'
    assert changed_settings(evil, Config(dict(b=2)))[-1] == 'b: 1 → 2'
    assert not (tmp_path / 'file').exists()
    for text in (None, 3, 'a = (', '', '\0', '(' * 500):
        assert changed_settings(text, Config(BASE)) == []


def test_resuming_says_what_changed(tmp_path):
    def setting(lr: float, work_dir: str) -> Config:
        return Config(dict(optimizer=dict(lr=lr), work_dir=work_dir))
    said = []
    for resume in (False, True):
        runner = toy.build(tmp_path, length=8 if resume else 4, resume=resume)
        runner.cfg = setting(0.02, 'there') if resume else setting(0.01, 'here')
        runner.logger.warning = said.append
        runner.train()
    differs = [line for line in said if 'differs' in line]
    assert len(differs) == 1
    assert differs[0].splitlines()[1:] == ['  optimizer.lr: 0.01 → 0.02']
