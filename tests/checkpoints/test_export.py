"""Exported checkpoints have the names and format of the other library, and the same values."""
import hashlib
import json

import pytest
import torch
from safetensors import safe_open

from convnext_mm import UserError
from convnext_mm.checkpoints import extract_weights, naming, read_checkpoint
from convnext_mm.checkpoints.export import convert_checkpoint
from convnext_mm.choices import EXPORT_SCHEMES
from tests.helpers import FILES, GOLDEN_SIZE, assert_close, call_tool, golden, official


@pytest.fixture
def save(tmp_path):
    """A function that saves a checkpoint's contents and returns the path."""
    def save_content(content: dict, name: str = 'in.pth') -> str:
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)
    return save_content


def weights_in(path) -> dict:
    return extract_weights(read_checkpoint(str(path)))


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize(('name', 'to'), [
    *(('v1_official_classification', to) for to in EXPORT_SCHEMES),
    *(('v2_official_classification', to) for to in EXPORT_SCHEMES if to != 'torchvision')])
def test_round_trips_are_bit_equal(name, to, suffix, save, tmp_path):
    source = save(golden(name)['checkpoint'])
    there, report = convert_checkpoint(source, tmp_path / f'there{suffix}', to)
    back, _ = convert_checkpoint(str(there), tmp_path / f'back{suffix}', 'official')
    assert_same(weights_in(back), official(name))
    assert len(report) == 1, 'nothing was excluded'
    assert report[0].endswith('with the names of the authors')


def test_v2_has_no_form_in_torchvision(save, tmp_path):
    source = save(golden('v2_official_classification')['checkpoint'])
    with pytest.raises(UserError, match='V2, which torchvision does not have'):
        convert_checkpoint(source, tmp_path / 'there.pth', 'torchvision')


@pytest.mark.parametrize('name', FILES)
def test_every_naming_survives_official_names_and_safetensors(name, save, tmp_path):
    content = golden(name)['checkpoint']
    scheme = naming.find_convnext(extract_weights(content), '').scheme
    there, _ = convert_checkpoint(save(content), tmp_path / 'there.safetensors', 'official')
    back, _ = convert_checkpoint(str(there), tmp_path / 'back.pth', scheme)
    assert_same(weights_in(back), extract_weights(content))
    wrapper_keys = {'model', 'state_dict'}
    back_keys = torch.load(back, weights_only=True).keys()
    assert back_keys & wrapper_keys == content.keys() & wrapper_keys


@pytest.mark.parametrize('version', [1, 2])
def test_transformers_loads_exported_files(version, save, tmp_path):
    import transformers as hf
    config, backbone, classifier = {
        1: (hf.ConvNextConfig, hf.ConvNextBackbone, hf.ConvNextForImageClassification),
        2: (hf.ConvNextV2Config, hf.ConvNextV2Backbone, hf.ConvNextV2ForImageClassification),
    }[version]
    content = golden(f'v{version}_official_classification')
    size = dict(depths=GOLDEN_SIZE['depths'], hidden_sizes=GOLDEN_SIZE['dims'],
                out_features=['stage1', 'stage2', 'stage3', 'stage4'])
    source = save(content['checkpoint'])
    path, _ = convert_checkpoint(source, tmp_path / 'hf.safetensors', 'transformers')
    classifier(config(**size, num_labels=5)).load_state_dict(weights_in(path), strict=True)

    state = {name: value for name, value in content['checkpoint']['model'].items()
             if not name.startswith(('norm.', 'head.'))}
    for i, dim in enumerate(GOLDEN_SIZE['dims']):
        state.update({f'norm{i}.weight': torch.ones(dim), f'norm{i}.bias': torch.zeros(dim)})
    source = save(dict(model=state))
    path, _ = convert_checkpoint(source, tmp_path / 'backbone.pth', 'transformers')
    model = backbone(config(**size)).eval()
    model.load_state_dict(weights_in(path), strict=True)
    with torch.no_grad():
        assert_close(model(content['input']).feature_maps, content['features'])


def training_checkpoint() -> dict:
    """What mmengine saves for a whole model, with the authors' names."""
    state = {f'backbone.{k}': v for k, v in official('v1_official_downstream').items()}
    return dict(meta=dict(epoch=3, dataset_meta=dict(classes=['a', 'b'])),
                state_dict={**state, 'decode_head.weight': torch.ones(2)},
                optimizer=dict(state={}), message_hub={})


def test_whole_models_keep_their_heads_in_mmpretrain_and_official(save, tmp_path):
    content = training_checkpoint()
    there, _ = convert_checkpoint(save(content), tmp_path / 'mm.pth', 'mmpretrain')
    assert 'backbone.stages.0.0.depthwise_conv.weight' in weights_in(there)
    back, _ = convert_checkpoint(str(there), tmp_path / 'back.pth', 'official')
    assert_same(weights_in(back), content['state_dict'])
    assert read_checkpoint(str(back))['meta'] == content['meta']


def test_only_the_backbone_of_a_whole_model_goes_to_timm(save, tmp_path):
    source = save(training_checkpoint())
    path, report = convert_checkpoint(source, tmp_path / 'timm.pth', 'timm')
    content = torch.load(path, weights_only=True)  # a plain state dict, as timm writes it
    assert 'stages.0.blocks.0.conv_dw.weight' in content
    assert not [name for name in content if name.startswith(('decode_head', 'norm', 'backbone'))]
    assert 'no place for it: norm0 (2), norm1 (2), norm2 (2), norm3 (2), decode_head (1)' in report[
        1]
    assert report[2].endswith('optimizer, message_hub')


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_publish(save, suffix, tmp_path):
    content = training_checkpoint()
    content['meta']['tensor'] = torch.ones(1)  # has no form in the JSON of .safetensors
    path, report = convert_checkpoint(save(content), tmp_path / f'convnext{suffix}', publish=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert path.name == f'convnext-{digest}{suffix}'
    assert len(report) == 1
    assert report[0].endswith('optimizer, message_hub')
    published = read_checkpoint(str(path))
    assert published.keys() == {'meta', 'state_dict'}
    assert ('tensor' in published['meta']) == (suffix == '.pth')
    assert published['meta']['dataset_meta'] == content['meta']['dataset_meta']
    assert_same(published['state_dict'], content['state_dict'])
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, 'in.pth']


@pytest.mark.parametrize('meta', [{}, dict(epoch=3)])
def test_the_metadata_of_safetensors_is_what_transformers_expects(meta, save, tmp_path):
    source = save(dict(state_dict=official(), meta=meta))
    path, _ = convert_checkpoint(source, tmp_path / 'out.safetensors')
    with safe_open(path, framework='pt') as file:
        metadata = file.metadata()
    assert metadata.pop('format') == 'pt'
    assert json.loads(metadata.pop('meta', '{}')) == meta
    assert metadata == {}


def test_a_mistake_writes_nothing(save, tmp_path):
    source = save(golden('v1_timm')['checkpoint'])
    other = save({'a.b': torch.zeros(1)}, 'other.pth')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for inp, target, message in (
            (source, tmp_path / 'in.pth', 'source itself'), (source, tmp_path / 'a.onnx', '.onnx'),
            (source, tmp_path / 'no/a.pth', 'folder .*no does not exist'),
            (other, tmp_path / 'a.pth', 'no ConvNeXt')):
        with pytest.raises(UserError, match=message):
            convert_checkpoint(inp, target, 'timm')
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_target_that_cannot_be_written_is_named(suffix, save, tmp_path, monkeypatch):
    target = tmp_path / f'folder/out{suffix}'
    target.parent.mkdir()
    source = save(golden('v1_timm')['checkpoint'])
    # Removed when the weights are read; root may write to folders without permission.
    monkeypatch.setattr(naming, 'sparse_to_dense', lambda state: target.parent.rmdir() or state)
    with pytest.raises(UserError, match=f'Cannot write {target}'):
        convert_checkpoint(source, target, 'official')


def test_the_tool(save, tmp_path):
    source, target = save(golden('v1_timm')['checkpoint']), tmp_path / 'out.safetensors'
    done = call_tool('tools/convert_checkpoint.py', source, target, '--to', 'torchvision')
    assert done.returncode == 0
    assert 'with the names of timm' in done.stdout
    assert f'Wrote {target} (' in done.stdout
    assert 'features.0.0.weight' in weights_in(target)
    done = call_tool('tools/convert_checkpoint.py', source, source, '--to', 'torchvision')
    assert done.returncode == 2
    assert 'source itself' in done.stderr
