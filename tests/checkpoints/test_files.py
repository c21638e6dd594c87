import argparse
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import _load_checkpoint
from safetensors.torch import save_file

from convnext_mm import ConvNeXt, UserError
from convnext_mm.checkpoints import extract_weights, locate_checkpoint, read_checkpoint
from tests.helpers import ROOT, SEGMENTATION, golden, run_tool


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def save_hostile(marker: Path, path: Path) -> None:
    torch.save(dict(state_dict={'a': torch.zeros(1)}, optimizer={}, meta=Hostile(marker)), path)


def save_hostile_in_the_old_format(marker: Path, path: Path) -> None:
    torch.save(dict(meta=Hostile(marker)), path, _use_new_zipfile_serialization=False)


def save_hostile_pickle(marker: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps(Hostile(marker)))


@pytest.mark.parametrize('save', [save_hostile_in_the_old_format, save_hostile_pickle])
def test_old_formats_and_bare_pickles_never_run(save, tmp_path):
    save(tmp_path / 'marker', tmp_path / 'file.pth')
    with pytest.raises(UserError, match='never executed'):
        read_checkpoint(str(tmp_path / 'file.pth'))
    assert not (tmp_path / 'marker').exists()


@pytest.fixture
def hostile(tmp_path):
    """A file that would write a marker where it is loaded without care, and the marker."""
    marker, path = tmp_path / 'marker', tmp_path / 'hostile.pth'
    save_hostile(marker, path)
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists(), 'the file does nothing: what follows would prove nothing'
    marker.unlink()
    return path, marker


@pytest.mark.parametrize('load', [
    read_checkpoint, CheckpointLoader.load_checkpoint, _load_checkpoint,
    lambda path: ConvNeXt(init_cfg=dict(type='Pretrained', checkpoint=path)).init_weights()],
    ids=['read', 'CheckpointLoader', '_load_checkpoint', 'init_cfg'])
def test_code_in_a_checkpoint_never_runs(hostile, load):
    path, marker = hostile
    with pytest.raises(UserError, match=r'hostile.pth contains more than weights \(\S+\), which is '
                                        'never executed.\n.*CONVNEXT_MM_TRUST=/.*hostile.pth'):
        load(str(path))
    assert not marker.exists()


@pytest.mark.parametrize('command', [
    ('tools/train.py', SEGMENTATION, '--resume', '{path}'),
    ('tools/train.py', SEGMENTATION, 'load_from={path}'),
    ('tools/train.py', SEGMENTATION, 'model.backbone.init_cfg.checkpoint={path}'),
    ('tools/test.py', SEGMENTATION, '{path}'),
    ('tools/convert_checkpoint.py', '{path}', '{path}.out.pth', '--to', 'timm')],
    ids=['resume', 'load_from', 'init_cfg', 'test', 'convert'])
def test_no_tool_runs_it(hostile, command, demo_data, tmp_path):
    path, marker = hostile
    args = [part.format(path=path) for part in command]
    options = [arg for arg in args if '=' in arg]
    args = [arg for arg in args if '=' not in arg]
    if 'convert' not in args[0]:
        args += ['--work-dir', tmp_path / 'run', '--cfg-options', *options,
                 f'data_root={demo_data}/ADEChallengeData2016']
    done = run_tool(*args, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert 'never executed' in done.stderr
    assert 'Traceback' not in done.stderr
    assert not marker.exists()


def test_other_places_of_mmengine_do_not_fall_back_to_running_it(hostile, monkeypatch):
    path, marker = hostile
    loader = CheckpointLoader._get_checkpoint_loader('open-mmlab://x')
    monkeypatch.setattr('mmengine.runner.checkpoint.get_external_models', lambda: {'x': str(path)})
    with pytest.raises(UserError, match='never executed'):
        loader('open-mmlab://x')
    assert not marker.exists()


def test_a_user_can_trust_one_file(hostile, monkeypatch, tmp_path):
    path, marker = hostile
    monkeypatch.setenv('CONVNEXT_MM_TRUST', str(tmp_path / 'another.pth'))
    with pytest.raises(UserError, match='never executed'):
        read_checkpoint(str(path))
    assert not marker.exists()
    monkeypatch.setenv('CONVNEXT_MM_TRUST', f'{tmp_path}/another.pth:{path}')
    assert 'a' in extract_weights(read_checkpoint(str(path)))
    assert marker.exists()


@pytest.mark.parametrize(('content', 'message'), [
    (b'', 'is empty'), (b'  <!DOCTYPE html><html></html>', 'is a web page'),
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0', 'git lfs pull'),
    (b'PK\x03\x04 and no more', 'its end is missing'),
    (b'no pickle at all', 'is damaged, or was not written by torch.save'),
    (b'\x10\0\0\0\0\0\0\0{"a": ', 'is cut off or damaged'), (None, 'Checkpoint not found')])
def test_what_is_no_checkpoint_is_named(tmp_path, content, message):
    path = tmp_path / 'file.pth'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('share', [0.1, 0.9])
def test_truncated_file_is_named(tmp_path, suffix, share):
    state = golden('v1_official_downstream')['checkpoint']['model']
    path = tmp_path / f'file.{suffix}'
    (save_file if suffix == 'safetensors' else torch.save)(state, path)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * share)])
    with pytest.raises(UserError, match='Not a usable checkpoint.*is cut off'):
        read_checkpoint(str(path))


def test_a_folder_is_named_with_what_is_in_it(tmp_path):
    (tmp_path / 'model.safetensors').touch()
    with pytest.raises(UserError, match='is a folder.*\n.*model.safetensors'):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize('content', [dict(a=1), [torch.zeros(1)], dict(state_dict={})])
def test_files_without_weights_are_named(tmp_path, content):
    torch.save(content, tmp_path / 'file.pth')
    with pytest.raises(UserError, match='contains no weights'):
        read_checkpoint(str(tmp_path / 'file.pth'))


def test_what_trainers_store_beside_weights_is_read(tmp_path):
    history = HistoryBuffer()
    for value in (1.0, 3.0):
        history.update(value)
    content = dict(state_dict={'a': torch.ones(2)}, meta=dict(iter=4, time=np.float64(2.0)),
                   args=argparse.Namespace(drop_path=0.1),
                   message_hub=dict(log_scalars={'train/loss': history},
                                    resumed_keys={'train/loss': True}, runtime_info={}))
    torch.save(content, tmp_path / 'iter_4.pth')
    content = read_checkpoint(str(tmp_path / 'iter_4.pth'))
    assert content['message_hub']['log_scalars']['train/loss'].mean(2) == 2.0
    assert content['meta']['time'] == 2.0
    assert content['args'].drop_path == 0.1


def test_safetensors_are_known_by_their_contents(tmp_path):
    path = tmp_path / 'model.bin'
    save_file({'a': torch.ones(2)}, path, dict(meta=json.dumps(dict(epoch=3))))
    content = read_checkpoint(str(path))
    assert torch.equal(extract_weights(content)['a'], torch.ones(2))
    assert content['meta'] == dict(epoch=3)


def test_a_url_without_network_says_where_to_put_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError('no route to host')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    with pytest.raises(UserError, match='put it at .*convnext_tiny_1k_224.pth'):
        locate_checkpoint('https://example.com/convnext/convnext_tiny_1k_224.pth')


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder served over HTTP, its address, and torch hub's cache elsewhere."""
    folder, hub = tmp_path / 'served', tmp_path / 'hub'
    folder.mkdir()
    monkeypatch.setenv('TORCH_HOME', str(hub))
    with open(tmp_path / 'log', 'wb') as log:
        server = subprocess.Popen(
            [sys.executable, '-u', '-m', 'http.server', '0', '--bind', '127.0.0.1'], cwd=folder,
            stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            port = server.stdout.readline().split('port ')[1].split()[0]
            yield folder, f'http://127.0.0.1:{port}', hub, tmp_path / 'log'
        finally:
            server.kill()
            server.wait()


def test_a_url_is_downloaded_once_by_one_process(served):
    folder, address, hub, log = served
    torch.save({'a': torch.zeros(1)}, folder / 'tiny.pth')
    script = ('from convnext_mm.checkpoints import read_checkpoint; '
              f'assert "a" in read_checkpoint("{address}/tiny.pth")')
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: subprocess.run(
            [sys.executable, '-c', script], cwd=ROOT, capture_output=True, text=True), range(3)))
    assert [one.returncode for one in done] == [0, 0, 0], done[0].stderr[-1000:]
    assert (hub / 'hub/checkpoints/tiny.pth').is_file()
    assert log.read_text().count('GET /tiny.pth') == 1
    assert sum('100%' in one.stderr for one in done) == 1, 'one progress bar'


@pytest.mark.parametrize(('name', 'fits'), [('a-{}.pth', True), ('a-00000000.pth', False)])
def test_a_hash_in_the_name_is_verified(served, name, fits):
    import hashlib
    folder, address, hub, _ = served
    torch.save({'a': torch.zeros(1)}, folder / 'a.pth')
    name = name.format(hashlib.sha256((folder / 'a.pth').read_bytes()).hexdigest()[:8])
    (folder / 'a.pth').rename(folder / name)
    if fits:
        assert 'a' in read_checkpoint(f'{address}/{name}')
    else:
        with pytest.raises(UserError, match='Cannot download.*invalid hash'):
            read_checkpoint(f'{address}/{name}')
        assert not (hub / 'hub/checkpoints' / name).exists()


def test_repositories_with_files_of_one_name_are_told_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file',
                        lambda url, path, digest: save_file({url: torch.zeros(1)}, path))
    urls = [f'https://huggingface.co/facebook/convnext-{size}-224/resolve/main/model.safetensors'
            for size in ('tiny', 'base')]
    assert [list(extract_weights(read_checkpoint(url))) for url in urls] == [[url] for url in urls]
    assert (tmp_path / 'checkpoints/facebook--convnext-tiny-224--model.safetensors').is_file()
