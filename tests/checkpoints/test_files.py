"""Files are found, downloaded once, and read without running code in them."""
import argparse
import contextlib
import hashlib
import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import _load_checkpoint
from safetensors.torch import save_file

from convnext_mm import ConvNeXt, UserError
from convnext_mm.checkpoints import extract_weights, locate_checkpoint, read_checkpoint
from tests.helpers import SEGMENTATION, SMALL_SEGMENTATION, call_tool, golden, run_tool


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def save_malicious(marker: Path, path: Path) -> None:
    torch.save(dict(state_dict={'a': torch.zeros(1)}, optimizer={}, meta=Malicious(marker)), path)


def save_in_legacy_format(marker: Path, path: Path) -> None:
    torch.save(dict(meta=Malicious(marker)), path, _use_new_zipfile_serialization=False)


def save_pickle(marker: Path, path: Path) -> None:
    path.write_bytes(pickle.dumps(Malicious(marker)))


@pytest.fixture
def malicious_file(request, tmp_path):
    """A file that creates a marker when it is unpickled, and the marker."""
    marker, path = tmp_path / 'marker', tmp_path / 'malicious.pth'
    getattr(request, 'param', save_malicious)(marker, path)
    with contextlib.suppress(Exception):  # torch.load runs a bare pickle, then refuses it
        torch.load(path, weights_only=False)
    assert marker.exists(), 'the file is harmless, so the tests would prove nothing'
    marker.unlink()
    return path, marker


@pytest.mark.parametrize('malicious_file', [save_in_legacy_format, save_pickle], indirect=True)
def test_code_in_other_formats_never_runs(malicious_file):
    path, marker = malicious_file
    with pytest.raises(UserError, match='never executed'):
        read_checkpoint(str(path))
    assert not marker.exists()


@pytest.mark.parametrize('load', [
    read_checkpoint, CheckpointLoader.load_checkpoint, _load_checkpoint,
    lambda path: ConvNeXt(init_cfg=dict(type='Pretrained', checkpoint=path)).init_weights()],
    ids=['read_checkpoint', 'CheckpointLoader', '_load_checkpoint', 'init_cfg'])
def test_code_in_a_checkpoint_never_runs(malicious_file, load):
    path, marker = malicious_file
    with pytest.raises(UserError, match=r'malicious.pth contains more than weights \(\S+\), which '
                                        'is never executed.\n.*CONVNEXT_MM_TRUST=/.*malicious.pth'):
        load(str(path))
    assert not marker.exists()


@pytest.mark.parametrize('command', [
    ('tools/train.py', SEGMENTATION, '--resume', '{path}'),
    ('tools/train.py', SEGMENTATION, 'load_from={path}'),
    ('tools/test.py', SEGMENTATION, '{path}'),
    ('tools/convert_checkpoint.py', '{path}', '{path}.out.pth', '--to', 'timm')],
    ids=['resume', 'load_from', 'test', 'convert'])
def test_code_in_a_checkpoint_never_runs_in_a_tool(malicious_file, command, demo_data, tmp_path):
    path, marker = malicious_file
    args = [part.format(path=path) for part in command]
    options = [arg for arg in args if '=' in arg]
    args = [arg for arg in args if '=' not in arg]
    if 'convert' not in args[0]:
        args += ['--work-dir', tmp_path / 'run', '--cfg-options', *options,
                 f'data_root={demo_data}/ADEChallengeData2016']
    done = call_tool(*args)
    assert done.returncode == 2, done.stderr[-2000:]
    assert 'never executed' in done.stderr
    assert not marker.exists()


@pytest.mark.slow
def test_code_in_an_init_cfg_never_runs_in_training(malicious_file, demo_data, tmp_path):
    path, marker = malicious_file
    done = run_tool('tools/train.py', SEGMENTATION, '--work-dir', tmp_path / 'run', '--cfg-options',
                    f'data_root={demo_data}/ADEChallengeData2016',
                    *[option for option in SMALL_SEGMENTATION if 'init_cfg' not in option],
                    f'model.backbone.init_cfg.checkpoint={path}', check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert 'never executed' in done.stderr
    assert 'Traceback' not in done.stderr
    assert not marker.exists()


def test_mmengines_loaders_for_other_places_never_run_code(malicious_file, monkeypatch):
    path, marker = malicious_file
    loader = CheckpointLoader._get_checkpoint_loader('open-mmlab://x')
    monkeypatch.setattr('mmengine.runner.checkpoint.get_external_models', lambda: {'x': str(path)})
    with pytest.raises(UserError, match='never executed'):
        loader('open-mmlab://x')
    assert not marker.exists()


def test_a_user_can_trust_a_single_file(malicious_file, monkeypatch, tmp_path):
    path, marker = malicious_file
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
    (b'PK\x03\x04 and nothing else', 'its end is missing'),
    (b'not a pickle', 'is damaged, or was not written by torch.save'),
    (b'\x10\0\0\0\0\0\0\0{"a": ', 'is cut off or damaged'), (None, 'Checkpoint not found')])
def test_files_that_are_not_checkpoints_are_recognized(tmp_path, content, message):
    path = tmp_path / 'file.pth'
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_checkpoint(str(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
@pytest.mark.parametrize('fraction', [0.1, 0.9])
def test_a_truncated_file_is_recognized(tmp_path, suffix, fraction):
    state = golden('v1_official_downstream')['checkpoint']['model']
    path = tmp_path / f'file.{suffix}'
    (save_file if suffix == 'safetensors' else torch.save)(state, path)
    path.write_bytes(path.read_bytes()[:int(path.stat().st_size * fraction)])
    with pytest.raises(UserError, match='Not a usable checkpoint.*is cut off'):
        read_checkpoint(str(path))


def test_the_message_for_a_folder_lists_the_checkpoints_in_it(tmp_path):
    (tmp_path / 'model.safetensors').touch()
    with pytest.raises(UserError, match='is a folder.*\n.*model.safetensors'):
        read_checkpoint(str(tmp_path))


@pytest.mark.parametrize(('save', 'content'), [
    (torch.save, dict(a=1)), (torch.save, [torch.zeros(1)]), (torch.save, dict(state_dict={})),
    (save_file, {})])
def test_files_without_weights_are_refused(tmp_path, save, content):
    save(content, tmp_path / 'file.pth')
    with pytest.raises(UserError, match='contains no weights'):
        read_checkpoint(str(tmp_path / 'file.pth'))


def test_what_trainers_store_with_the_weights_is_read(tmp_path):
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


@pytest.mark.parametrize(('stored', 'meta'), [
    (json.dumps(dict(epoch=3)), dict(epoch=3)), ("another program's", {}), ('3', {})])
def test_safetensors_are_recognized_by_their_contents(tmp_path, stored, meta):
    path = tmp_path / 'model.bin'
    save_file({'a': torch.ones(2)}, path, dict(meta=stored))
    content = read_checkpoint(str(path))
    assert torch.equal(extract_weights(content)['a'], torch.ones(2))
    assert content['meta'] == meta


def test_without_network_the_message_says_where_to_put_the_file(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError('no route to host')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    with pytest.raises(UserError, match=f'put it at {tmp_path}/checkpoints/convnext_tiny.pth'):
        locate_checkpoint('https://example.com/convnext/convnext_tiny.pth')


@pytest.fixture
def web_server(tmp_path, monkeypatch):
    """A folder served over HTTP, its address, and the requests so far; torch hub's cache is hub."""
    requests: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            requests.append(self.path)

    (tmp_path / 'served').mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    with ThreadingHTTPServer(('127.0.0.1', 0), partial(Handler, directory=tmp_path / 'served')
                             ) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield tmp_path / 'served', f'http://127.0.0.1:{server.server_port}', requests
        server.shutdown()
        thread.join()


def test_a_url_is_downloaded_once(web_server, monkeypatch, tmp_path):
    """The lock on a file works between threads as it does between processes."""
    folder, address, requests = web_server
    torch.save({'a': torch.zeros(1)}, folder / 'tiny.pth')
    download = torch.hub.download_url_to_file

    def download_slowly(*args) -> None:
        time.sleep(0.3)  # all threads are waiting by then
        download(*args)
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download_slowly)
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(locate_checkpoint, [f'{address}/tiny.pth'] * 3))
    assert paths == [tmp_path / 'hub/checkpoints/tiny.pth'] * 3
    assert paths[0].read_bytes() == (folder / 'tiny.pth').read_bytes()
    assert requests == ['/tiny.pth']


@pytest.mark.parametrize('correct', [True, False])
def test_a_hash_in_the_name_is_verified(web_server, correct, tmp_path):
    folder, address, _ = web_server
    torch.save({'a': torch.zeros(1)}, folder / 'a.pth')
    digest = hashlib.sha256((folder / 'a.pth').read_bytes()).hexdigest()[:8]
    name = f'a-{digest if correct else "0" * 8}.pth'
    (folder / 'a.pth').rename(folder / name)
    if correct:
        assert 'a' in read_checkpoint(f'{address}/{name}')
    else:
        with pytest.raises(UserError, match='Cannot download.*invalid hash'):
            read_checkpoint(f'{address}/{name}')
    assert (tmp_path / 'hub/checkpoints' / name).exists() == correct


def test_files_with_one_name_in_different_repositories_are_distinguished(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file',
                        lambda url, path, digest: save_file({url: torch.zeros(1)}, path))
    urls = [f'https://huggingface.co/facebook/convnext-{size}-224/resolve/main/model.safetensors'
            for size in ('tiny', 'base')]
    assert [list(extract_weights(read_checkpoint(url))) for url in urls] == [[url] for url in urls]
    assert (tmp_path / 'checkpoints/facebook--convnext-tiny-224--model.safetensors').is_file()


def write_shards(folder, stem: str = 'model') -> dict[str, torch.Tensor]:
    """Two files and their index, as transformers writes them."""
    state = golden('v1_official_downstream')['checkpoint']['model']
    names = list(state)
    files = {f'{stem}-{i + 1:05}-of-00002.safetensors': names[i::2] for i in range(2)}
    for file, part in files.items():
        save_file({name: state[name] for name in part}, folder / file)
    (folder / f'{stem}.safetensors.index.json').write_text(json.dumps(dict(
        metadata=dict(total_size=1),
        weight_map={name: file for file, part in files.items() for name in part})))
    return state


def test_files_named_by_an_index_are_read_as_one(tmp_path):
    state = write_shards(tmp_path)
    path = tmp_path / 'model.safetensors.index.json'
    found = extract_weights(read_checkpoint(str(path)))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())
    with pytest.raises(UserError, match='model.safetensors.index.json'):
        read_checkpoint(str(tmp_path))
    save_file({'a': torch.zeros(1)}, tmp_path / 'model-00002-of-00002.safetensors')
    with pytest.raises(UserError, match='00002.safetensors lacks .* parameters that model'):
        read_checkpoint(str(path))
    (tmp_path / 'model-00001-of-00002.safetensors').unlink()
    with pytest.raises(UserError, match='not found: .*model-00001-of-00002.*\n.*one of 2 files'):
        locate_checkpoint(str(path))
    for text, message in (('{}', 'is no index'), ('[', 'is no index'),
                          ('{"weight_map": {"a": "../b.pth"}}', 'outside of its folder')):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            read_checkpoint(str(path))


def test_files_named_by_an_index_are_downloaded(web_server, tmp_path):
    folder, address, requests = web_server
    (folder / 'me/net/resolve/main').mkdir(parents=True)
    state = write_shards(folder / 'me/net/resolve/main')
    url = f'{address}/me/net/resolve/main/model.safetensors.index.json'
    locate_checkpoint(url)
    assert len(requests) == 3
    assert extract_weights(read_checkpoint(url)).keys() == state.keys()
    assert len(requests) == 3, 'from the cache'
