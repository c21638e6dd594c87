"""The fused block and downsampling layer: the plain layers' numbers with fewer activations."""
from __future__ import annotations

import copy
import pickle
import sys
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from benchmarks.peers import OpenMMLab
from convnext_mm import ConvNeXt
from convnext_mm.fused import FusedBlock, FusedDownsample, Packable, eager, functions
from convnext_mm.fused.operations import select_operations
from convnext_mm.layers import Block, Downsample, DropPath
from convnext_mm.options import MEMORY
from tests.helpers import run_tool, saved_by

SHAPES = [(1, 8, 1, 1), (2, 12, 7, 5), (3, 8, 20, 35), (1, 20, 16, 33)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make_block(dim: int, use_grn: bool = False, dilation: int = 1, dtype=torch.float32,
               **kwargs) -> FusedBlock:
    block = FusedBlock(dim, layer_scale_init_value=0.0 if use_grn else 1.0, use_grn=use_grn,
                       dilation=dilation, **kwargs).to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def copy_with(block: FusedBlock, **changes) -> FusedBlock:
    other = copy.deepcopy(block)
    for name, value in changes.items():
        setattr(other, name, value)
    return other


def run(module: nn.Module, x: Tensor, up: Tensor | None = None, autocast: bool = False
        ) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Output, and gradients of the input and every parameter."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    with torch.autocast(x.device.type, torch.bfloat16) if autocast else nullcontext():
        out = module(x)
    out.backward(torch.ones_like(out) if up is None else up.to(out.dtype))
    return out.detach(), {'x': x.grad, **{n: p.grad for n, p in module.named_parameters()}}


def assert_same(found: tuple, expected: tuple, rel: float = 1e-5) -> None:
    assert found[0].shape == expected[0].shape
    assert found[1].keys() == expected[1].keys()
    for name, a, b in [('output', found[0], expected[0]),
                       *((k, found[1][k], expected[1][k]) for k in expected[1])]:
        if b is None:
            assert a is None, name
            continue
        assert a.dtype == b.dtype, name
        assert (a - b).abs().max() <= rel * b.abs().max(), name


@pytest.mark.parametrize('memory', ['lean', 'minimal'])
@pytest.mark.parametrize('dilation', [1, 2])
@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize('shape', SHAPES)
def test_block_is_exact(shape, use_grn, dilation, memory):
    block = make_block(shape[1], use_grn, dilation, memory=memory)
    x, up = torch.randn(shape), torch.randn(shape)
    expected = run(copy_with(block, memory='plain'), x, up)
    assert_same(run(block, x, up), expected)
    with torch.no_grad():
        assert torch.allclose(block(x), expected[0], rtol=0, atol=1e-5 * expected[0].abs().max())
    for layout in (x.contiguous(memory_format=torch.channels_last),
                   torch.randn(*shape, 2)[..., 0].copy_(x)):
        assert_same(run(block, layout, up), expected)


@pytest.mark.parametrize('memory', ['lean', 'minimal'])
@pytest.mark.parametrize('use_grn', [False, True])
def test_gradients_by_finite_differences(use_grn, memory):
    block = make_block(3, use_grn, dtype=torch.float64, memory=memory)
    names = [name for name, _ in block.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, *block.parameters()))


def test_downsampling_by_finite_differences():
    def call(*args: Tensor) -> Tensor:
        return functions.downsample(*args, 1e-6)
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True)
            for s in ((2, 3, 5, 4), (3,), (3,), (4, 3, 2, 2), (4,))]
    assert torch.autograd.gradcheck(call, args)


@pytest.mark.parametrize('mode', ['train', 'infer'])
def test_large_maps_are_computed_in_pieces(mode, monkeypatch):
    monkeypatch.setattr(eager, 'PIECE_BYTES', 25 * 32 * 4)  # 25 positions of 4C channels
    block = make_block(8)
    x = torch.randn(2, 8, 9, 11)
    if mode == 'train':
        assert_same(run(block, x), run(copy_with(block, memory='plain'), x))
    with torch.no_grad():
        assert torch.allclose(block(x), copy_with(block, memory='plain')(x), atol=1e-5)


@pytest.mark.parametrize('factors', [[0.0, 1.5, 1.5], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
@pytest.mark.parametrize('use_grn', [False, True])
def test_drop_path_is_that_of_the_plain_block(factors, use_grn, monkeypatch):
    """Parameters of a branch that is dropped in all samples get gradients of zero, not None."""
    monkeypatch.setattr(DropPath, 'factors', lambda self, x: torch.tensor(factors, dtype=x.dtype))
    block = make_block(8, use_grn)
    x, up = torch.randn(3, 8, 6, 5), torch.randn(3, 8, 6, 5)
    expected = run(copy_with(block, memory='plain'), x, up)
    assert expected[1]['pwconv1.weight'] is not None
    assert_same(run(block, x, up), expected)


def test_the_same_seed_drops_the_same_samples():
    block = make_block(8, drop_path=0.5)
    x = torch.randn(16, 8, 3, 3)
    torch.manual_seed(3)
    expected = run(copy_with(block, memory='plain'), x)
    torch.manual_seed(3)
    assert_same(run(block, x), expected)


@pytest.mark.parametrize('frozen', ['pwconv', 'dwconv', 'gamma', 'norm', ''])
def test_frozen_parameters_get_no_gradient(frozen):
    block = make_block(8)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    x = torch.randn(2, 8, 5, 5)
    assert_same(run(block, x), run(copy_with(block, memory='plain'), x))


def test_a_block_used_twice_in_one_graph_and_checkpointed():
    from torch.utils.checkpoint import checkpoint

    class Twice(nn.Module):
        def __init__(self, block: FusedBlock, checkpointed: bool) -> None:
            super().__init__()
            self.block, self.checkpointed = block, checkpointed

        def forward(self, x: Tensor) -> Tensor:
            if self.checkpointed:
                return checkpoint(lambda y: self.block(self.block(y)), x, use_reentrant=False)
            return self.block(self.block(x))
    block = make_block(8)
    x = torch.randn(1, 8, 6, 6)
    expected = run(Twice(copy_with(block, memory='plain'), False), x)
    assert_same(run(Twice(block, False), x), expected)
    assert_same(run(Twice(block, True), x), expected)


def test_a_graph_can_be_differentiated_again_but_not_twice():
    block = make_block(8)
    x = torch.randn(1, 8, 6, 6, requires_grad=True)
    out = block(x).sum()
    first, = torch.autograd.grad(out, x, retain_graph=True)
    again, = torch.autograd.grad(out, x)
    assert torch.equal(first, again)
    g, = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        g.sum().backward()


@pytest.mark.parametrize('name', ['dwconv', 'norm', 'pwconv1', 'act', 'grn', 'pwconv2',
                                  'drop_path'])
def test_hooks_of_layers_run(name):
    block, calls = make_block(8, use_grn=True), []
    assert block._fusible(torch.randn(1, 8, 4, 4))
    block.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    block(torch.randn(1, 8, 4, 4))
    assert calls == [name]


@pytest.mark.parametrize('changes', [
    dict(dwconv=nn.Conv2d(8, 8, 5, padding=2, groups=8)),
    dict(dwconv=nn.Conv2d(8, 8, 7, padding=3, groups=4)),
    dict(dwconv=nn.Conv2d(8, 8, 7, padding=3, groups=8, padding_mode='reflect')),
    dict(dwconv=nn.Conv2d(8, 8, 7, padding='same', groups=8)),
    dict(norm=nn.LayerNorm(8, elementwise_affine=False)), dict(norm=nn.LayerNorm(8, eps=0.5)),
    dict(pwconv1=nn.Linear(8, 32, bias=False)), dict(act=nn.ReLU())])
def test_replaced_layers_compute(changes):
    block, x = make_block(8), torch.randn(1, 8, 5, 6)
    assert_same(run(copy_with(block, **changes), x),
                run(copy_with(block, memory='plain', **changes), x))


@pytest.mark.parametrize('conv', [nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(4, 8, 1),
                                  nn.Conv2d(4, 8, 2, stride=2, bias=False)])
def test_replaced_convolutions_downsample(conv):
    downsample, x = FusedDownsample(4, 8), torch.randn(1, 4, 6, 8)
    downsample[1] = conv
    assert torch.equal(downsample(x), conv(downsample[0](x)))


def test_other_types_of_layers_compute():
    x = torch.randn(1, 8, 4, 4)
    block = make_block(8)

    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2
    plain = block(x)
    adapter = Adapter(8, 32)
    adapter.load_state_dict(block.pwconv1.state_dict())
    block.pwconv1 = adapter
    assert not torch.allclose(block(x), plain)
    block = make_block(8)
    nn.utils.parametrizations.weight_norm(block.pwconv2)
    assert not block._fusible(x)
    block = make_block(8)
    block.act = nn.GELU(approximate='tanh')
    assert not block._fusible(x)
    assert not make_block(8).bfloat16()._fusible(x)


def test_weights_that_are_not_parameters():
    """As in replicas of DataParallel and with FSDP."""
    block = make_block(8, memory='lean')
    x = torch.randn(1, 8, 5, 5)
    expected = block(x)
    for layer in (block.dwconv, block.norm, block.pwconv1, block.pwconv2):
        for name, weight in list(layer._parameters.items()):
            delattr(layer, name)
            setattr(layer, name, weight.detach())
    assert block._fusible(x)
    assert torch.equal(block(x), expected)


def test_tracing_and_export_see_the_layers():
    model = ConvNeXt(depths=[1, 1], dims=[8, 16]).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        traced = torch.jit.trace(model, x)(x)
        exported = torch.export.export(model, (x,)).module()(x)
        compiled = torch.compile(model, backend='eager', fullgraph=True)(x)
    for found in (traced, exported, compiled):
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    names = {node.target for node in torch.export.export(model, (x,)).graph.nodes}
    assert torch.ops.aten.gelu.default in names


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('use_grn', [False, True])
@torch.no_grad()
def test_packed_weights(use_grn, dtype):
    block = make_block(8, use_grn, dtype=dtype).eval()
    x = torch.randn(2, 8, 7, 5, dtype=dtype)
    packed = copy_with(block, packed=True)
    expected, found = block(x), packed(x)
    assert packed._packed is not None
    assert (found - expected).abs().max() <= (
        1e-5 if dtype == torch.float32 else 2e-2) * expected.abs().max()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_packed_backbone(dtype):
    """With images of several sizes; downsampling without stride is not packed."""
    model = ConvNeXt(depths=[1, 1, 2], dims=[8, 16, 32], output_stride=8,
                     layer_scale_init_value=0.5, packed=True).eval().to(dtype)
    images = [torch.randn(n, 3, *size, dtype=dtype)
                for n, size in ((2, (33, 70)), (1, (64, 64)), (2, (33, 70)), (1, (8, 8)))]
    found = [model(x) for x in images]
    parts = [module for module in model.modules() if isinstance(module, Packable)]
    assert [part._packed is not None for part in parts] == [True, False] + [True] * 4
    for part in parts:
        part.packed = False
    for x, maps in zip(images, found, strict=True):
        for a, b in zip(maps, model(x), strict=True):
            assert (a - b).abs().max() <= (
                1e-5 if dtype == torch.float32 else 2e-2) * b.abs().max()


def test_packed_weights_are_up_to_date():
    x = torch.randn(1, 8, 5, 5)
    block = make_block(8, packed=True).eval()

    def check() -> None:
        with torch.no_grad():
            assert torch.allclose(block(x), copy_with(block, packed=False)(x), atol=1e-4)
            used.append(block._packed and block._packed[1])
    used = []
    check()
    check()
    assert used[0] is used[1], 'packed once'
    optimizer = torch.optim.SGD(block.parameters(), 0.5)
    block(x).sum().backward()
    optimizer.step()
    check()
    block.load_state_dict(make_block(8).state_dict())
    check()
    block.gamma.data = torch.full((8,), 3.0)
    check()
    block.to(torch.bfloat16).to(torch.float32)
    check()
    block = pickle.loads(pickle.dumps(copy.deepcopy(block)))
    assert block._packed is None
    check()
    assert len({id(weights) for weights in used}) == 6
    assert_same(run(block, x), run(copy_with(block, packed=False), x))
    assert run(block.train(), x)[1]['pwconv1.weight'] is not None
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(block(x), copy_with(block, packed=False)(x)), 'another dtype'


@pytest.mark.parametrize('use_grn', [False, True])
@torch.no_grad()
def test_convolutions_where_a_compiler_freezes(use_grn):
    import torch._inductor.config
    block = make_block(8, use_grn).eval()
    x = torch.randn(2, 8, 7, 5)
    graphs = []

    def record(graph: torch.fx.GraphModule, _) -> torch.fx.GraphModule:
        graphs.append({node.target for node in graph.graph.nodes})
        return graph
    for freezing in (False, True):
        torch._dynamo.reset()
        with torch._inductor.config.patch(freezing=freezing):
            found = torch.compile(block, backend=record, fullgraph=True)(x)
        assert torch.allclose(found, block(x), atol=1e-4)
    linear = torch._C._nn.linear
    assert [linear in targets for targets in graphs] == [True, False]

    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2
    adapter = Adapter(8, 32)
    adapter.load_state_dict(block.pwconv1.state_dict())
    block.pwconv1 = adapter
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True):
        found = torch.compile(block, backend=record, fullgraph=True)(x)
    assert torch.allclose(found, block(x), atol=1e-4), 'the custom layer is skipped'


# ------------------------------------------------------------------------ half precision


def errors(model: nn.Module, x: Tensor, exact: nn.Module, autocast: bool) -> dict[str, float]:
    """Relative errors to fp64, of features and of gradients by kind of parameter."""
    def compute(module: nn.Module, x: Tensor, autocast: bool):
        module.zero_grad(set_to_none=True)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            outs = module(x)
        generator = torch.Generator().manual_seed(7)
        sum((o.double() * torch.randn(o.shape, generator=generator).double()).sum()
            for o in outs).backward()
        return outs, {name.removeprefix('model.'): p.grad.double()
                      for name, p in module.named_parameters()}
    outs, grads = compute(model, x, autocast)
    exact_outs, exact_grads = compute(exact, x.double(), False)
    found: dict[str, list[float]] = {}
    for a, b in zip(outs, exact_outs, strict=True):
        found.setdefault('features', []).append(
            float(((a.double() - b).norm() / b.norm()).detach()))
    for name, g in exact_grads.items():
        kind = name.split('.', 3)[-1] if name.startswith('stages') else name.split('.')[0][:4]
        found.setdefault(kind, []).append(float((grads[name] - g).norm() / g.norm()))
    return {kind: sum(v) for kind, v in found.items()}


@pytest.mark.parametrize('autocast', [True, False], ids=['autocast', 'bfloat16'])
@pytest.mark.parametrize('memory', ['lean', 'minimal'])
def test_errors_in_half_precision_are_those_of_the_reference(memory, autocast):
    kwargs = dict(depths=(1, 2), dims=(32, 48), layer_scale_init_value=1.0)
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for seed in range(6):  # the rounding errors of a single draw are chance
        torch.manual_seed(seed)
        model = ConvNeXt(memory=memory, **kwargs)
        for p in model.parameters():
            p.data = (torch.randn_like(p) / p[0].numel() ** 0.5 if p.ndim > 1
                      else p + 0.2 * torch.randn_like(p))
        x = torch.randn(2, 3, 64, 48)
        exact = OpenMMLab(copy.deepcopy(model).double())
        if not autocast:
            model, x = model.bfloat16(), x.bfloat16()
            exact = OpenMMLab(copy.deepcopy(model).double())
        for total, module in ((ours, model), (theirs, OpenMMLab(copy.deepcopy(model)))):
            for kind, error in errors(module, x, exact, autocast).items():
                total[kind] = total.get(kind, 0.0) + error
    for kind, error in theirs.items():
        assert ours[kind] <= 1.1 * error, kind


@pytest.mark.parametrize('gamma', [1e-3, -1e-3, 0.0, 1.0])
def test_gradients_before_a_small_layer_scale_stay_in_the_range_of_fp16(gamma):
    block = make_block(16)
    block.gamma.data.fill_(gamma)
    x = torch.randn(1, 16, 12, 12)
    # With a loss scale, gradients after the layer scale are in range, those before it are not.
    up = torch.randn(1, 16, 12, 12) * (1e4 if abs(gamma) < 1 else 10)
    exact = run(copy.deepcopy(block).double(), x.double(), up.double())
    with torch.autocast('cpu', torch.float16):
        found = run(block, x, up)
    for name, gradient in exact[1].items():
        assert (found[1][name] - gradient).abs().max() <= 0.01 * gradient.abs().max(), name


# -------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(('memory', 'autocast', 'least', 'most'), [
    ('reference', True, 331, 332), ('reference', False, 544, 545.5), ('plain', True, 330, 332),
    ('lean', True, 110, 130), ('lean', False, 200, 260), ('minimal', True, 30, 65),
    ('minimal', False, 50, 65)])
def test_saved_activations_of_tiny_at_512(memory, autocast, least, most):
    model = ConvNeXt('tiny', layer_scale_init_value=1.0,
                     memory='plain' if memory == 'reference' else memory)
    network, x = OpenMMLab(model) if memory == 'reference' else model, torch.randn(1, 3, 512, 512)
    counted = saved_by(lambda: network(x), list(network.parameters()), autocast)
    assert least <= counted <= most


def test_number_of_matmuls():
    """Lean: six per block, as in plain autograd; minimal: one more."""
    from torch.utils.flop_counter import FlopCounterMode
    flops = {}
    for memory in MEMORY:
        block = make_block(16, memory=memory).double()  # the counter does not know oneDNN's matmuls
        x = torch.randn(1, 16, 8, 8, dtype=torch.float64, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            block(x).sum().backward()
        flops[memory] = sum(count for op, count in counter.get_flop_counts()['Global'].items()
                            if 'convolution' not in str(op))
    matmul = 2 * 64 * 16 * 64
    assert flops == dict(plain=6 * matmul, lean=6 * matmul, minimal=7 * matmul)


def test_distributed_with_a_static_graph(tmp_path):
    """Even one process makes DistributedDataParallel check every gradient."""
    import torch.distributed as dist
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model = ConvNeXt(depths=[1, 2], dims=[8, 16], drop_path_rate=1.0,
                         layer_scale_init_value=1.0)
        x = torch.randn(1, 3, 32, 32)
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(model), static_graph=True)
        for module in (model, wrapped):
            for _ in range(3):  # the last block is always dropped
                module.zero_grad()
                sum(o.sum() for o in module(x)).backward()
        for (name, a), b in zip(model.named_parameters(), wrapped.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), name
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------- choice of path


@pytest.mark.parametrize(('memory', 'kinds'), [
    ('plain', (Block, Downsample)), ('lean', (FusedBlock, FusedDownsample)),
    ('minimal', (FusedBlock, FusedDownsample))])
def test_classes_of_each_memory_option(memory, kinds):
    size = dict(depths=[1, 2], dims=[8, 16], use_grn=True, output_stride=8)
    model = ConvNeXt(memory=memory, **size)
    assert [type(block) for stage in model.stages for block in stage] == [kinds[0]] * 3
    assert [type(layer) for layer in model.downsample_layers] == [nn.Sequential, kinds[1]]
    assert model.state_dict().keys() == ConvNeXt(**size).state_dict().keys()


@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize('amx', [False, True])
@torch.no_grad()
def test_autocast_without_grad_on_a_cpu_with_amx_runs_the_plain_layers(use_grn, amx, monkeypatch):
    monkeypatch.setattr(eager, 'has_amx', lambda: amx)
    fused = make_block(8, use_grn)
    plain = Block(8, layer_scale_init_value=0.0 if use_grn else 1.0, use_grn=use_grn)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 8, 7, 5)
    assert fused._fusible(x)
    with torch.autocast('cpu', torch.bfloat16):
        assert fused._fusible(x) is not amx
        if amx:
            assert torch.equal(fused(x), plain(x))
        torch.testing.assert_close(fused(x), plain(x), rtol=0.05, atol=0.05)
        with torch.enable_grad():
            assert fused._fusible(x)


# ---------------------------------------------------------------------- Triton in the block


@pytest.fixture
def nvidia():
    pytest.importorskip('triton', reason='the kernels need triton, which is not installed')
    from convnext_mm.fused import nvidia
    return nvidia


class OnGpu(NamedTuple):
    """Stands for a tensor of which only ``is_cuda`` is read."""

    is_cuda: bool = True


@pytest.mark.parametrize(('mode', 'memory', 'use_grn', 'dilation'), [
    ('eager', 'lean', False, 2), ('eager', 'minimal', True, 2), *(
        pytest.param(*values, 1, marks=pytest.mark.slow) for values in (
            ('eager', 'lean', False), ('eager', 'minimal', True), ('dropped', 'minimal', False),
            ('dropped', 'lean', True), ('compiled', 'minimal', False),
            ('compiled', 'lean', True)))])
def test_block_with_triton(nvidia, mode, memory, use_grn, dilation, monkeypatch):
    """On a GPU or in the interpreter; torch.compile makes one graph of forward and backward."""
    device = 'cpu' if nvidia.INTERPRETED else 'cuda'
    monkeypatch.setattr('convnext_mm.fused.layers.select_operations', lambda *_: nvidia)
    if mode == 'dropped':
        monkeypatch.setattr(DropPath, 'factors',
                            lambda self, x: torch.tensor([0.0, 1.5], device=device))
    block = make_block(8, use_grn, dilation, memory=memory).to(device)
    images = 2 if mode == 'dropped' else 1
    x, up = (torch.randn(images, 8, 3, 4, device=device) for _ in 'xu')
    module = (torch.compile(block, backend='aot_eager', fullgraph=True) if mode == 'compiled'
              else block)
    out, grads = run(module, x, up)
    assert_same((out, {name.removeprefix('_orig_mod.'): g for name, g in grads.items()}),
                run(copy_with(block, memory='plain'), x, up))
    if dilation != 1:
        monkeypatch.setattr('convnext_mm.fused.layers.select_operations', lambda *_: eager)
        assert_same((out, grads), run(block, x, up))


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize(('dim', 'side'), [
    (40, 97), (96, 128), (192, 64), (352, 33), (384, 32), (768, 16), (1024, 20), (2048, 16)])
def test_block_with_triton_at_the_sizes_of_recipes(nvidia, dim, side, use_grn, dtype):
    """Output and gradients as near to those in double precision as the plain layers are."""
    block = FusedBlock(dim, layer_scale_init_value=0.0 if use_grn else 1.0, use_grn=use_grn,
                       triton=True).cuda()
    if use_grn:
        for parameter in block.grn.parameters():
            nn.init.normal_(parameter, std=0.3)
    x, up = (torch.randn(2, dim, side, side + 3, device='cuda') for _ in 'xu')
    exact, plain = copy_with(block, memory='plain').double(), copy_with(block, memory='plain')
    reference = flatten(run(exact, x.double(), up.double()))
    half = nullcontext() if dtype == torch.float32 else torch.autocast('cuda', dtype)
    with half:
        ours, theirs = flatten(run(block, x, up)), flatten(run(plain, x, up))
    for name, value in reference.items():
        error = relative_error(ours[name], value)
        assert error <= 2 * relative_error(theirs[name], value) + 1e-6, name


def flatten(found: tuple[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {'output': found[0], **found[1]}


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def test_selected_operations(nvidia):
    assert select_operations(OnGpu(), True) is nvidia
    assert select_operations(OnGpu(), False) is eager, 'disabled'
    assert select_operations(OnGpu(False), True) is eager


def test_selecting_operations_is_compiled_away(nvidia):
    x = OnGpu()

    def act(h: Tensor) -> Tensor:
        return select_operations(x, True).gelu(h)
    h = torch.randn(1, 2, 3, 8, device='cpu' if nvidia.INTERPRETED else 'cuda')
    torch._dynamo.reset()
    compiled = torch.compile(act, backend='aot_eager', fullgraph=True)
    assert torch.equal(compiled(h), nvidia.gelu(h))


@pytest.mark.slow
def test_no_compiler_is_imported_with_the_package():
    """It takes seconds, and Triton reads its settings on import."""
    done = run_tool(sys.executable, '-c', 'import sys, convnext_mm; '
                    "print([m for m in ('torch._dynamo', 'triton') if m in sys.modules])")
    assert done.stdout.splitlines()[-1] == '[]'
