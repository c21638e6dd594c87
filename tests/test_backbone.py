from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS

from convnext_mm import ConvNeXt, UserError
from tests.conftest import ROOT, run_tool

DATA = Path(__file__).parent / 'data'


@pytest.fixture(scope='module')
def golden() -> dict:
    return torch.load(DATA / 'v1_official_downstream.pt', weights_only=True)


def small(**kwargs) -> ConvNeXt:
    return ConvNeXt(depths=[1, 2, 3, 1], dims=[8, 16, 24, 32], **kwargs)


def test_reproduces_the_authors_features(golden):
    backbone = small().eval()
    backbone.load_state_dict(golden['checkpoint']['model'], strict=True)
    with torch.no_grad():
        features = backbone(golden['input'])
    assert len(features) == len(golden['features']) == 4
    for ours, theirs in zip(features, golden['features'], strict=True):
        assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize('size', [(64, 64), (96, 160)])
def test_strides_are_4_8_16_32(size):
    height, width = size
    features = small()(torch.zeros(2, 3, height, width))
    assert [tuple(f.shape) for f in features] == [
        (2, dim, height // stride, width // stride)
        for dim, stride in zip([8, 16, 24, 32], [4, 8, 16, 32], strict=True)]


def test_memory_layout_of_the_input_changes_nothing(golden):
    backbone = small().eval()
    picture = golden['input']
    for a, b in zip(backbone(picture),
                    backbone(picture.to(memory_format=torch.channels_last)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_maps_are_what_mmcvs_ops_read(golden):
    from mmcv.ops import RoIAlign
    rois = torch.tensor([[0.0, 2, 2, 20, 12], [1.0, 0, 0, 9, 9]])
    for layout in (torch.contiguous_format, torch.channels_last):
        features = small().eval()(golden['input'].contiguous(memory_format=layout))
        for feature in features:
            assert feature.is_contiguous()
    align = RoIAlign(7, spatial_scale=0.25, sampling_ratio=2)
    torch.testing.assert_close(align(features[0], rois), align(features[0].clone(
        memory_format=torch.contiguous_format), rois), rtol=0, atol=0)


def test_out_indices_choose_maps_and_norms():
    backbone = small(out_indices=[3, 1])
    names = {name.split('.')[0] for name, _ in backbone.named_parameters()}
    assert [f.shape[1] for f in backbone(torch.zeros(1, 3, 32, 32))] == [16, 32]
    assert 'norm1' in names
    assert 'norm0' not in names


def test_drop_path_rises_linearly_over_all_blocks():
    rates = [block.drop_path.drop_prob for stage in small(drop_path_rate=0.6).stages
             for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    from convnext_mm.layers import DropPath
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    out = drop(torch.ones(4000, 2, 3, 3))
    per_sample = out.flatten(1)
    assert torch.equal(per_sample.min(1).values, per_sample.max(1).values)
    assert out.mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop.eval()(out), out)


@pytest.mark.parametrize(('value', 'present'), [(1.0, True), (0.0, False)])
def test_layer_scale(value, present):
    gammas = [p for name, p in small(layer_scale_init_value=value).named_parameters()
              if name.endswith('gamma')]
    assert bool(gammas) is present
    assert all(torch.equal(g, torch.full_like(g, value)) for g in gammas)


def test_initial_weights():
    torch.manual_seed(0)
    backbone = ConvNeXt(depths=[1, 1, 1, 1], dims=[32, 64, 128, 256])
    backbone.init_weights()
    weight = backbone.stages[3][0].pwconv1.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert backbone.stages[3][0].pwconv1.bias.abs().max() == 0


def test_gradients_reach_every_parameter():
    backbone = small()
    sum(f.square().mean() for f in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize('scope', ['mmengine', 'mmseg', 'mmdet'])
def test_plain_name_is_found_from_every_scope(scope):
    backbone = MODELS.build(dict(type='ConvNeXt', depths=[1, 1, 1, 1], dims=[8, 8, 8, 8],
                                 _scope_=scope))
    assert type(backbone) is ConvNeXt


@pytest.mark.parametrize('kwargs', [dict(depths=[1, 1]), dict(out_indices=[4]),
                                    dict(out_indices=[])])
def test_contradictory_arguments_are_named(kwargs):
    with pytest.raises(UserError, match='ConvNeXt: .*' + next(iter(kwargs))):
        ConvNeXt(**{'dims': [8, 16, 24, 32], **kwargs})


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_mixed_precision_on_a_gpu(golden):
    backbone = small().cuda().eval()
    backbone.load_state_dict(golden['checkpoint']['model'], strict=True)
    with torch.autocast('cuda', dtype=torch.float16):
        features = backbone(golden['input'].cuda())
    sum(f.float().square().mean() for f in features).backward()
    assert all(p.grad.isfinite().all() for p in backbone.parameters())
    for ours, theirs in zip(features, golden['features'], strict=True):
        assert (ours.float().cpu() - theirs).abs().max() <= 2e-2


IMPORT = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {hidden!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in {hidden!r} else find(name, *a)
import convnext_mm
heavy = {{'mmpretrain', 'torchvision', 'timm', 'transformers'}} & set(sys.modules)
assert not heavy, heavy
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS, init_default_scope
for scope in {{'mmseg', 'mmdet'}} - set({hidden!r}):
    init_default_scope(scope)
    assert OPTIM_WRAPPER_CONSTRUCTORS.build(dict(
        type='LearningRateDecayOptimizerConstructor', optim_wrapper_cfg=dict(optimizer={{}}),
        paramwise_cfg=dict(decay_rate=0.9, num_layers=6))).__module__.startswith('convnext_mm')
print('fine')
"""


@pytest.mark.parametrize('hidden', [(), ('mmdet',), ('mmseg',), ('mmseg', 'mmdet')])
def test_import_needs_no_more_than_there_is(hidden, tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(IMPORT.format(hidden=hidden))
    assert 'fine' in run_tool(script, env={'PYTHONPATH': str(ROOT)}).stdout
