import sys

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from convnext_mm import ConvNeXt, UserError
from convnext_mm.archs import ARCHS
from convnext_mm.layers import GRN, DropPath
from tests.helpers import GOLDEN_SIZE, assert_close, golden, run_tool


def small(**kwargs) -> ConvNeXt:
    return ConvNeXt(**{**GOLDEN_SIZE, **kwargs})


@pytest.fixture(scope='module', name='golden')
def authors() -> dict:
    return golden('v1_official_downstream')


def test_features_are_those_of_the_authors(golden):
    backbone = small().eval()
    backbone.load_state_dict(golden['checkpoint']['model'], strict=True)
    with torch.no_grad():
        assert_close(backbone(golden['input']), golden['features'])


# Millions of parameters of the ImageNet classifiers with 1000 classes, from the papers' tables.
PARAMETERS = {
    'tiny': 28.6, 'small': 50.2, 'base': 88.6, 'large': 197.8, 'xlarge': 350.2, 'v2_atto': 3.7,
    'v2_femto': 5.2, 'v2_pico': 9.1, 'v2_nano': 15.6, 'v2_tiny': 28.6, 'v2_base': 89,
    'v2_large': 198, 'v2_huge': 660}


@pytest.mark.parametrize('arch', ARCHS)
def test_published_sizes(arch):
    with torch.device('meta'):
        backbone = ConvNeXt(arch)
    last = backbone.arch.dims[-1]
    count = sum(p.numel() for name, p in backbone.named_parameters()
                if not name.startswith('norm')) + 2 * last + 1000 * last + 1000
    assert round(count / 1e6, 0 if PARAMETERS[arch] in (89, 198, 660) else 1) == PARAMETERS[arch]
    assert backbone.arch.use_grn == arch.startswith('v2')


def test_explicit_values_override_arch():
    backbone = ConvNeXt('small', depths=[1, 1, 2, 1], use_grn=True)
    assert backbone.arch == ((1, 1, 2, 1), (96, 192, 384, 768), True)


@pytest.mark.parametrize('stages', [1, 2, 3, 5])
def test_any_number_of_stages(stages):
    dims = [8, 16, 24, 32, 40][:stages]
    features = ConvNeXt(depths=[1] * stages, dims=dims)(torch.zeros(1, 3, 128, 128))
    assert [f.shape[1:] for f in features] == [
        (dim, 32 // 2**i, 32 // 2**i) for i, dim in enumerate(dims)]


@pytest.mark.parametrize('size', [(64, 64), (96, 160)])
def test_strides_are_4_8_16_32(size):
    height, width = size
    features = small()(torch.zeros(2, 3, height, width))
    assert [tuple(f.shape) for f in features] == [
        (2, dim, height // stride, width // stride)
        for dim, stride in zip([8, 16, 24, 32], [4, 8, 16, 32], strict=True)]


def test_memory_layout_of_the_input_changes_nothing(golden):
    backbone = small().eval()
    image = golden['input']
    for a, b in zip(backbone(image), backbone(image.to(memory_format=torch.channels_last)),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_outputs_suit_mmcvs_ops(golden):
    from mmcv.ops import RoIAlign
    rois = torch.tensor([[0.0, 2, 2, 20, 12], [1.0, 0, 0, 9, 9]])
    for layout in (torch.contiguous_format, torch.channels_last):
        features = small().eval()(golden['input'].contiguous(memory_format=layout))
        for feature in features:
            assert feature.is_contiguous()
    align = RoIAlign(7, spatial_scale=0.25, sampling_ratio=2)
    torch.testing.assert_close(align(features[0], rois), align(features[0].clone(
        memory_format=torch.contiguous_format), rois), rtol=0, atol=0)


@pytest.mark.parametrize(('indices', 'same'), [([-1], [3]), ([-2, 0], [0, 2]), ([3, -1], [3])])
def test_negative_out_indices_count_from_the_last(indices, same):
    assert small(out_indices=indices).out_indices == tuple(same)


def test_stages_after_the_last_output_are_not_built():
    backbone = small(out_indices=[0, 1])
    assert len(backbone.stages) == len(backbone.downsample_layers) == 2
    sum(f.sum() for f in backbone(torch.randn(1, 3, 32, 32))).backward()
    assert all(p.grad is not None for p in backbone.parameters()), 'DDP needs all gradients'


def trainable_parts(backbone: ConvNeXt) -> set[str]:
    return {'.'.join(name.split('.')[:2]) if 'norm' not in name[:4] else 'norms'
            for name, p in backbone.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('frozen', [-1, 0, 1, 2, 4])
def test_frozen_stages(frozen):
    backbone = small(frozen_stages=frozen, drop_path_rate=0.5)
    assert backbone.train() is backbone
    stem = {'downsample_layers.0'} if frozen >= 0 else set()
    stages = {f'{part}.{i}' for i in range(max(frozen, 0)) for part in (
        'stages', 'downsample_layers')} | stem
    everything = trainable_parts(small())
    assert len(everything) == 9
    assert trainable_parts(backbone) == everything - stages
    for name, module in backbone.named_modules():
        if name.count('.') >= 1 and name.startswith(('stages', 'downsample_layers')):
            part = '.'.join(name.split('.')[:2])
            assert module.training == (part not in stages), name
    assert backbone.norm0.training
    sum(f.sum() for f in backbone(torch.randn(2, 3, 32, 32))).backward()
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())
    assert not any(module.training for module in backbone.eval().modules())
    assert small().train().stages[0].training


def test_norm_eval():
    backbone = small(norm_eval=True)
    backbone.norm0 = nn.BatchNorm2d(8)
    backbone.train()
    assert not backbone.norm0.training
    assert not backbone.stages[0][0].norm.training
    assert backbone.stages[0][0].training


@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize(('with_cp', 'stages'), [
    (True, (0, 1, 2, 3)), ([2], (2,)), ([-1, 0], (0, 3)), ([False, True, True, False], (1, 2)),
    (False, ())])
def test_activation_checkpointing_changes_only_memory(with_cp, stages, use_grn):
    grads, sizes = [], []
    for cp in (False, with_cp):
        torch.manual_seed(0)
        backbone = small(with_cp=cp, drop_path_rate=0.5, use_grn=use_grn)
        torch.manual_seed(1)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: (saved.append(t.numel()), t)[1], lambda t: t):
            loss = sum(f.square().mean() for f in backbone(torch.randn(2, 3, 64, 64)))
        sizes.append(sum(saved))
        loss.backward()
        grads.append([p.grad for p in backbone.parameters()])
    assert backbone.with_cp == stages
    assert (sizes[1] < sizes[0]) == bool(stages)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(('output_stride', 'strides'), [
    (None, [4, 8, 16, 32]), (32, [4, 8, 16, 32]), (16, [4, 8, 16, 16]), (8, [4, 8, 8, 8])])
def test_output_stride_preserves_the_features_of_pretrained_weights(output_stride, strides, golden):
    """The larger maps contain the features of the strided network, at its positions."""
    backbone = small(output_stride=output_stride).eval()
    backbone.load_state_dict(golden['checkpoint']['model'], strict=True)
    with torch.no_grad():
        features = backbone(golden['input'])
    height, width = golden['input'].shape[2:]
    assert [f.shape[2:] for f in features] == [(height // s, width // s) for s in strides]
    for i, (dense, plain) in enumerate(zip(features, golden['features'], strict=True)):
        step = 4 * 2**i // strides[i]
        assert_close([dense[:, :, ::step, ::step]], [plain])


def test_maps_inside_are_channels_last(golden):
    backbone, layouts = small(use_grn=True), set()
    for name, module in backbone.named_modules():
        if name.count('.') == 2 or name.endswith('dwconv'):
            module.register_forward_hook(lambda m, x, y: layouts.update(
                t.is_contiguous(memory_format=torch.channels_last) for t in (x[0], y)
                if t.ndim == 4 and t.shape[1] in (8, 16, 24, 32)))
    backbone(golden['input'])
    assert layouts == {True}


def test_grn_is_that_of_the_paper():
    """Algorithm 1 of ConvNeXt V2."""
    torch.manual_seed(0)
    grn, x = GRN(8), torch.randn(2, 5, 6, 8, requires_grad=True)
    nn.init.normal_(grn.gamma)
    nn.init.normal_(grn.beta)
    g = x.square().sum(dim=(1, 2), keepdim=True).sqrt()
    expected = grn.gamma * (x * (g / (g.mean(dim=-1, keepdim=True) + 1e-6))) + grn.beta + x
    torch.testing.assert_close(grn(x), expected)
    for a, b in zip(torch.autograd.grad(grn(x).square().sum(), [x, *grn.parameters()]),
                    torch.autograd.grad(expected.square().sum(), [x, *grn.parameters()]),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_grn_in_half_precision_does_not_overflow(dtype):
    x = torch.full((1, 64, 64, 4), 300.0, dtype=dtype)
    grn = GRN(4).to(dtype)
    nn.init.ones_(grn.gamma)
    out = grn(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, 2 * x, rtol=1e-2, atol=0)


def test_v2_has_grn_instead_of_layer_scale():
    names = [name for name, _ in ConvNeXt('v2_atto').stages[0][0].named_parameters()]
    assert [name for name in names if 'gamma' in name or 'beta' in name] == [
        'grn.gamma', 'grn.beta']
    names = [name for name, _ in small().stages[0][0].named_parameters()]
    assert [name for name in names if 'gamma' in name or 'beta' in name] == ['gamma']


def test_out_indices_select_maps_and_norms():
    backbone = small(out_indices=[3, 1])
    names = {name.split('.')[0] for name, _ in backbone.named_parameters()}
    assert [f.shape[1] for f in backbone(torch.zeros(1, 3, 32, 32))] == [16, 32]
    assert 'norm1' in names
    assert 'norm0' not in names


def test_drop_path_rises_linearly_over_all_blocks():
    rates = [block.drop_path.drop_prob for stage in small(drop_path_rate=0.6).stages
             for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_drop_path_drops_whole_samples_and_preserves_the_mean():
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
    assert len(gammas) == sum(GOLDEN_SIZE['depths']) * present
    assert all(torch.equal(g, torch.full_like(g, value)) for g in gammas)


def test_initial_weights():
    torch.manual_seed(0)
    backbone = ConvNeXt(depths=[1, 1, 1, 1], dims=[32, 64, 128, 256])
    for name, parameter in backbone.named_parameters():
        if name.endswith('bias'):
            nn.init.ones_(parameter)
    backbone.init_weights()
    layer = backbone.stages[3][0].pwconv1
    assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert layer.bias.abs().max() == 0


def test_gradients_reach_every_parameter():
    backbone = small()
    sum(f.square().mean() for f in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize('scope', ['mmengine', 'mmseg', 'mmdet'])
def test_every_scope_finds_the_backbone(scope):
    backbone = MODELS.build(dict(type='ConvNeXt', depths=[1, 1, 1, 1], dims=[8, 8, 8, 8],
                                 _scope_=scope))
    assert type(backbone) is ConvNeXt


@pytest.mark.parametrize(('kwargs', 'message'), [
    (dict(depths=[1, 1]), r'depths=\[1, 1\] and dims'),
    (dict(depths=[1, 1, 0, 1]), 'whole numbers'), (dict(out_indices=[4]), 'out_indices'),
    (dict(out_indices=[-5]), 'out_indices'), (dict(out_indices=[]), 'out_indices'),
    (dict(arch='atto'), 'Did you mean v2_atto'), (dict(arch='huge22k'), 'the sizes are tiny, sm'),
    (dict(arch='v2_tiny', use_grn=False), "arch='v2_tiny' contradicts use_grn=False"),
    (dict(use_grn=True, layer_scale_init_value=1.0), 'V2 has no layer scale'),
    (dict(frozen_stages=5), 'frozen_stages=5'), (dict(with_cp=[True]), 'each of the 4 stages'),
    (dict(with_cp=[4]), 'with_cp'), (dict(output_stride=4), 'output_stride=4'),
    (dict(drop_path_rate=1.5), 'drop_path_rate=1.5'),
    (dict(init_cfg=dict(type='Constant')), "expected dict\\(type='Pretrained'")])
def test_wrong_and_contradictory_arguments(kwargs, message):
    with pytest.raises(UserError, match=f'ConvNeXt: .*{message}'):
        ConvNeXt(**{'dims': [8, 16, 24, 32], **kwargs}).init_weights()


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
import importlib.util
import sys
missing = {*sys.argv[1:], 'mmpretrain', 'torchvision', 'timm', 'transformers', 'onnx'}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in missing:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name in missing else find(name, *args)
import convnext_mm
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, init_default_scope
for scope in {'mmseg', 'mmdet'} - missing:
    init_default_scope(scope)
    built = OPTIM_WRAPPER_CONSTRUCTORS.build(dict(
        type='LearningRateDecayOptimizerConstructor', optim_wrapper_cfg=dict(optimizer={}),
        paramwise_cfg=dict(decay_rate=0.9, num_layers=6)))
    print(scope, built.__module__)
"""


@pytest.mark.slow
@pytest.mark.parametrize(('missing', 'found'), [
    (['mmdet'], ['mmseg']), (['mmseg'], ['mmdet']), (['mmseg', 'mmdet'], [])])
def test_import_without_optional_packages(missing, found):
    done = run_tool(sys.executable, '-c', IMPORT, *missing)
    assert [line for line in done.stdout.splitlines() if 'optimizer_constructor' in line] == [
        f'{scope} convnext_mm.optimizer_constructor' for scope in found]


def test_the_epsilon_of_norms():
    """CLIP's largest tower was trained with 1e-5; timm's ConvNeXt has that for this size only."""
    def epsilons(**kwargs) -> set[float]:
        with torch.device('meta'):
            backbone = ConvNeXt(**kwargs)
        return {module.eps for module in backbone.modules() if hasattr(module, 'eps')}
    assert epsilons() == {1e-6}
    assert epsilons(depths=[3, 4, 30, 3], dims=[384, 768, 1536, 3072]) == {1e-5}
    assert epsilons(norm_eps=1e-3, memory='plain') == {1e-3}


def test_one_stage_may_be_given_as_a_number():
    backbone = ConvNeXt(depths=[1, 1, 1, 1], dims=[8, 16, 24, 32], out_indices=-1)
    assert backbone.out_indices == (3,)
