import hashlib
import json

import pytest
import torch
from safetensors import safe_open

from convnext_mm import UserError
from convnext_mm.checkpoints import extract_weights, naming, read_checkpoint
from convnext_mm.checkpoints.export import convert_checkpoint
from tests.helpers import FILES, golden, official, run_tool


@pytest.fixture
def saved(tmp_path):
    def save(content, name='in.pth') -> str:
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)
    return save


def state_of(path) -> dict:
    return extract_weights(read_checkpoint(str(path)))


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('to', naming.EXPORT_SCHEMES)
@pytest.mark.parametrize('name', ['v1_official_classification', 'v2_official_classification'])
def test_round_trips_are_bit_equal(name, to, suffix, saved, tmp_path):
    source = saved(golden(name)['checkpoint'])
    if name.startswith('v2') and to == 'torchvision':
        with pytest.raises(UserError, match='V2, which torchvision does not have'):
            convert_checkpoint(source, tmp_path / 'there.pth', to)
        return
    there, report = convert_checkpoint(source, tmp_path / f'there{suffix}', to)
    back, _ = convert_checkpoint(str(there), tmp_path / f'back{suffix}', 'official')
    assert_same(state_of(back), official(name))
    assert not [line for line in report if 'Excluded' in line]


@pytest.mark.parametrize('name', FILES)
def test_every_family_through_official_and_safetensors(name, saved, tmp_path):
    content = golden(name)['checkpoint']
    family = naming.find_convnext(extract_weights(content), '').scheme
    there, _ = convert_checkpoint(saved(content), tmp_path / 'there.safetensors', 'official')
    back, _ = convert_checkpoint(str(there), tmp_path / 'back.pth', family)
    assert_same(state_of(back), extract_weights(content))
    wrapped = {'model', 'state_dict'}
    assert torch.load(back, weights_only=True).keys() & wrapped == content.keys() & wrapped


@pytest.mark.parametrize('version', [1, 2])
def test_transformers_loads_what_is_converted(version, saved, tmp_path):
    import transformers as hf
    config, backbone, classifier = (
        (hf.ConvNextConfig, hf.ConvNextBackbone, hf.ConvNextForImageClassification),
        (hf.ConvNextV2Config, hf.ConvNextV2Backbone, hf.ConvNextV2ForImageClassification)
    )[version - 1]
    content = golden(f'v{version}_official_classification')
    size = dict(depths=[1, 2, 3, 1], hidden_sizes=[8, 16, 24, 32],
                out_features=['stage1', 'stage2', 'stage3', 'stage4'])
    path, _ = convert_checkpoint(saved(content['checkpoint']), tmp_path / 'hf.safetensors', 'transformers')
    classifier(config(**size, num_labels=5)).load_state_dict(state_of(path), strict=True)
    with_norms = dict(content['checkpoint']['model'])
    for i, dim in enumerate([8, 16, 24, 32]):
        with_norms.update({f'norm{i}.weight': torch.ones(dim), f'norm{i}.bias': torch.zeros(dim)})
    bare = {k: v for k, v in with_norms.items() if not k.startswith(('norm.', 'head.'))}
    path, _ = convert_checkpoint(saved(dict(model=bare)), tmp_path / 'backbone.pth', 'transformers')
    model = backbone(config(**size)).eval()
    model.load_state_dict(state_of(path), strict=True)
    with torch.no_grad():
        for a, b in zip(model(content['input']).feature_maps, content['features'], strict=True):
            assert (a - b).abs().max() <= 1e-5


def training_checkpoint() -> dict:
    """What mmengine saves of a whole model with the authors' names."""
    state = {f'backbone.{k}': v for k, v in official('v1_official_downstream').items()}
    return dict(meta=dict(epoch=3, dataset_meta=dict(classes=('a', 'b')), odd=object),
                state_dict={**state, 'decode_head.weight': torch.ones(2)},
                optimizer=dict(state={}), message_hub={})


def test_whole_models_keep_their_heads_where_they_can(saved, tmp_path):
    content = training_checkpoint()
    del content['meta']['odd']
    source = saved(content)
    there, _ = convert_checkpoint(source, tmp_path / 'mm.pth', 'mmpretrain')
    assert 'backbone.stages.0.0.depthwise_conv.weight' in state_of(there)
    back, _ = convert_checkpoint(str(there), tmp_path / 'back.pth', 'official')
    assert_same(state_of(back), content['state_dict'])
    assert read_checkpoint(str(back))['meta'] == content['meta']
    alone, report = convert_checkpoint(source, tmp_path / 'timm.pth', 'timm')
    assert not any('head' in name or 'norm0' in name for name in state_of(alone))
    raw = torch.load(alone, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in raw.values()), 'timm has no wrapping'
    assert 'decode_head (1)' in ''.join(report)
    assert 'norm0 (2)' in ''.join(report)


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_publishing(saved, suffix, tmp_path):
    content = training_checkpoint()
    del content['meta']['odd']
    path, report = convert_checkpoint(saved(content), tmp_path / f'convnext{suffix}', publish=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    assert path.name == f'convnext-{digest}{suffix}'
    assert 'optimizer' in report[0]
    published = read_checkpoint(str(path))
    assert published.keys() == {'meta', 'state_dict'}
    assert list(published['meta']['dataset_meta']['classes']) == ['a', 'b']
    assert_same(published['state_dict'], content['state_dict'])
    assert [p.name for p in tmp_path.iterdir()] == ['in.pth', path.name] or len(
        list(tmp_path.iterdir())) == 2


def test_safetensors_are_what_transformers_reads(saved, tmp_path):
    path, _ = convert_checkpoint(saved(golden('v1_transformers')['checkpoint']), tmp_path / 'a.safetensors')
    with safe_open(path, framework='pt') as file:
        assert file.metadata() == {'format': 'pt'}
    path, _ = convert_checkpoint(saved(dict(training_checkpoint()['state_dict'])), tmp_path / 'b.safetensors')
    with safe_open(path, framework='pt') as file:
        assert json.loads(file.metadata().get('meta', '{}')) == {}


def test_a_mistake_writes_nothing(saved, tmp_path):
    source = saved(golden('v1_timm')['checkpoint'])
    before = sorted(tmp_path.iterdir())
    for target, message in ((tmp_path / 'in.pth', 'source itself'), (tmp_path / 'a.onnx', '.onnx'),
                            (tmp_path / 'no/a.pth', 'does not exist')):
        done = run_tool('tools/convert_checkpoint.py', source, target, '--to', 'timm', check=False)
        assert done.returncode == 2
        assert message in done.stderr
        assert 'Traceback' not in done.stderr
    with pytest.raises(UserError, match='no ConvNeXt'):
        convert_checkpoint(saved({'a.b': torch.zeros(1)}, 'other.pth'), tmp_path / 'a.pth', 'timm')
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / 'other.pth'])


def test_the_tool_says_what_it_did(saved, tmp_path):
    done = run_tool('tools/convert_checkpoint.py', saved(golden('v1_timm')['checkpoint']),
                    tmp_path / 'out.safetensors', '--to', 'torchvision')
    assert 'with the names of timm' in done.stdout
    assert f'Wrote {tmp_path}/out.safetensors' in done.stdout
