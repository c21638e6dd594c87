import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from convnext_mm import ConvNeXt, UserError, checkpoint

DATA = Path(__file__).parent / 'data'
SIZE = dict(depths=[1, 2, 3, 1], dims=[8, 16, 24, 32])


def pretrained(path: Path, **size) -> ConvNeXt:
    backbone = ConvNeXt(**{**SIZE, **size},
                        init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    backbone.init_weights()
    return backbone.eval()


@pytest.fixture
def golden(tmp_path):
    """Writes a golden file's checkpoint alone; returns its path, input and features."""
    def write(name: str, wrap=lambda checkpoint: checkpoint):
        content = torch.load(DATA / f'{name}.pt', weights_only=True)
        path = tmp_path / f'{name}.pth'
        torch.save(wrap(content['checkpoint']), path)
        return path, content['input'], content['features']
    return write


def whole_model(content: dict) -> dict:
    state = {f'backbone.{name}': value for name, value in content['model'].items()}
    return dict(state_dict={**state, 'decode_head.weight': torch.zeros(2)}, meta=dict(epoch=1))


@pytest.mark.parametrize(('name', 'wrap'), [
    ('v1_official_downstream', lambda c: c), ('v1_official_classification', lambda c: c),
    ('v1_official_downstream', lambda c: c['model']), ('v1_official_downstream', whole_model)])
def test_pretrained_weights_give_the_true_features(golden, name, wrap):
    path, picture, features = golden(name, wrap)
    with torch.no_grad():
        ours = pretrained(path)(picture)
    for a, b in zip(ours, features, strict=True):
        assert (a - b).abs().max() <= 1e-5


@pytest.mark.parametrize(('spoil', 'message'), [
    (lambda s: s.pop('stages.2.1.pwconv1.weight'), 'missing stages.2.1.pwconv1.weight'),
    (lambda s: s.update({'stages.9.weight': torch.zeros(1)}), 'unexpected stages.9.weight'),
    (lambda s: s.update({'stages.0.0.gamma': torch.zeros(9)}),
     r'stages.0.0.gamma is \[9\], the model has \[8\]')])
def test_weights_that_do_not_fit_are_listed_and_none_is_loaded(golden, spoil, message):
    def wrap(content):
        spoil(content['model'])
        return content
    path, *_ = golden('v1_official_downstream', wrap)
    backbone = ConvNeXt(**SIZE)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(UserError, match=message):
        checkpoint.load_backbone(backbone, dict(type='Pretrained', checkpoint=str(path)))
    assert all(torch.equal(before[name], value) for name, value in backbone.state_dict().items())


def test_weights_of_another_size_are_refused(golden):
    path, *_ = golden('v1_official_downstream')
    with pytest.raises(UserError, match='Check depths and dims'):
        pretrained(path, dims=[8, 16, 24, 40])


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_code_in_a_checkpoint_never_runs(tmp_path):
    marker, path = tmp_path / 'marker', tmp_path / 'hostile.pth'
    torch.save(dict(state_dict={'a': torch.zeros(1)}, meta=Hostile(marker)), path)
    with pytest.raises(UserError, match='hostile.pth.*never executed'):
        checkpoint.read(str(path))
    with pytest.raises(UserError):
        CheckpointLoader.load_checkpoint(str(path))  # what load_from and resume call
    assert not marker.exists()
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists(), 'the file above would have done nothing: it proves nothing'


@pytest.mark.parametrize(('content', 'message'), [
    (b'', 'cannot be read|damaged'), (b'<!DOCTYPE html><html></html>', 'Not a usable checkpoint'),
    (None, 'Checkpoint not found')])
def test_what_is_no_checkpoint_is_named(tmp_path, content, message):
    path = tmp_path / 'file.pth'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        checkpoint.read(str(path))
    assert str(path) in str(error.value)


def test_truncated_file_is_named(golden):
    path, *_ = golden('v1_official_downstream')
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match='Not a usable checkpoint'):
        checkpoint.read(str(path))


@pytest.mark.parametrize('content', [dict(a=1), [torch.zeros(1)], dict(state_dict={})])
def test_files_without_weights_are_named(tmp_path, content):
    torch.save(content, tmp_path / 'file.pth')
    with pytest.raises(UserError, match='holds no weights'):
        checkpoint.read(str(tmp_path / 'file.pth'))


def test_what_mmengine_stores_beside_weights_is_read(tmp_path):
    history = HistoryBuffer()
    for value in (1.0, 3.0):
        history.update(value)
    content = dict(state_dict={'a': torch.ones(2)}, meta=dict(iter=4, time=np.float64(2.0)),
                   message_hub=dict(log_scalars={'train/loss': history},
                                    resumed_keys={'train/loss': True}, runtime_info={}))
    torch.save(content, tmp_path / 'iter_4.pth')
    read = checkpoint.read(str(tmp_path / 'iter_4.pth'))
    assert read['message_hub']['log_scalars']['train/loss'].mean(2) == 2.0
    assert read['meta']['time'] == 2.0


def test_a_url_without_network_says_where_to_put_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError('no route to host')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    with pytest.raises(UserError, match='put it at .*convnext_tiny_1k_224.pth'):
        checkpoint.locate('https://example.com/convnext/convnext_tiny_1k_224.pth')


def test_a_url_is_downloaded_once(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    calls = []

    def download(url, path, **kwargs):
        calls.append(url)
        torch.save({'a': torch.zeros(1)}, path)
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    for _ in range(2):
        assert 'a' in checkpoint.read('https://example.com/a.pth')
    assert calls == ['https://example.com/a.pth']
