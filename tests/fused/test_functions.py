"""The fused block and downsampling: PyTorch's numbers, with less kept."""
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
from convnext_mm.fused import FusedBlock, Packable, eager, functions
from convnext_mm.fused.operations import select_operations
from convnext_mm.layers import DropPath
from convnext_mm.options import MEMORY
from tests.helpers import run_tool, saved_by

SHAPES = [(1, 8, 1, 1), (2, 12, 7, 5), (3, 8, 20, 35), (1, 20, 16, 33)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def block(dim: int, use_grn: bool = False, dilation: int = 1, dtype=torch.float32,
          **kwargs) -> FusedBlock:
    made = FusedBlock(dim, layer_scale_init_value=0.0 if use_grn else 1.0, use_grn=use_grn,
                      dilation=dilation, **kwargs).to(dtype)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def like(made: FusedBlock, **changes) -> FusedBlock:
    other = copy.deepcopy(made)
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


def same(found: tuple, expected: tuple, rel: float = 1e-5) -> None:
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
    made = block(shape[1], use_grn, dilation, memory=memory)
    x, up = torch.randn(shape), torch.randn(shape)
    expected = run(like(made, memory='plain'), x, up)
    same(run(made, x, up), expected)
    with torch.no_grad():
        assert torch.allclose(made(x), expected[0], rtol=0, atol=1e-5 * expected[0].abs().max())
    spread = x.contiguous(memory_format=torch.channels_last)
    same(run(made, spread, up), expected)
    same(run(made, torch.randn(*shape, 2)[..., 0].copy_(x), up), expected)


@pytest.mark.parametrize('memory', ['lean', 'minimal'])
@pytest.mark.parametrize('use_grn', [False, True])
def test_gradients_by_finite_differences(use_grn, memory):
    made = block(4, use_grn, dtype=torch.float64, memory=memory)
    names = [name for name, _ in made.named_parameters()]

    def of(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(made, dict(zip(names, parameters, strict=True)), (x,))
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of, (x, *made.parameters()))


def test_downsampling_by_finite_differences():
    def of(*args: Tensor) -> Tensor:
        return functions.downsample(*args, 1e-6)
    args = [torch.randn(s, dtype=torch.float64, requires_grad=True)
            for s in ((2, 3, 5, 4), (3,), (3,), (4, 3, 2, 2), (4,))]
    assert torch.autograd.gradcheck(of, args)


@pytest.mark.parametrize('mode', ['train', 'infer'])
def test_large_maps_go_through_in_pieces(mode, monkeypatch):
    monkeypatch.setattr(eager, 'PIECE', 25 * 32 * 4)  # 25 positions of 4C channels
    made = block(8)
    x = torch.randn(2, 8, 9, 11)
    if mode == 'train':
        same(run(made, x), run(like(made, memory='plain'), x))
    with torch.no_grad():
        assert torch.allclose(made(x), like(made, memory='plain')(x), atol=1e-5)


@pytest.mark.parametrize('factors', [[0.0, 1.5, 1.5], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0]])
@pytest.mark.parametrize('use_grn', [False, True])
def test_drop_path_is_that_of_the_plain_block(factors, use_grn, monkeypatch):
    """What is dropped is not computed, and yet its parameters get gradients of zero."""
    monkeypatch.setattr(DropPath, 'factors', lambda self, x: torch.tensor(factors, dtype=x.dtype))
    made = block(8, use_grn)
    x, up = torch.randn(3, 8, 6, 5), torch.randn(3, 8, 6, 5)
    expected = run(like(made, memory='plain'), x, up)
    assert expected[1]['pwconv1.weight'] is not None
    same(run(made, x, up), expected)


def test_the_same_seed_drops_the_same():
    made = block(8, drop_path=0.5)
    x = torch.randn(16, 8, 3, 3)
    torch.manual_seed(3)
    expected = run(like(made, memory='plain'), x)
    torch.manual_seed(3)
    same(run(made, x), expected)


@pytest.mark.parametrize('frozen', ['pwconv', 'dwconv', 'gamma', 'norm', ''])
def test_what_is_frozen_gets_no_gradient(frozen):
    made = block(8)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    x = torch.randn(2, 8, 5, 5)
    same(run(made, x), run(like(made, memory='plain'), x))


def test_a_block_used_twice_in_one_graph_and_checkpointed():
    from torch.utils.checkpoint import checkpoint

    class Twice(nn.Module):
        def __init__(self, made: FusedBlock, again: bool) -> None:
            super().__init__()
            self.made, self.again = made, again

        def forward(self, x: Tensor) -> Tensor:
            if self.again:
                return checkpoint(lambda y: self.made(self.made(y)), x, use_reentrant=False)
            return self.made(self.made(x))
    made = block(8)
    x = torch.randn(1, 8, 6, 6)
    expected = run(Twice(like(made, memory='plain'), False), x)
    same(run(Twice(made, False), x), expected)
    same(run(Twice(made, True), x), expected)


def test_a_graph_can_be_gone_through_again():
    made = block(8)
    x = torch.randn(1, 8, 6, 6, requires_grad=True)
    out = made(x).sum()
    first, = torch.autograd.grad(out, x, retain_graph=True)
    again, = torch.autograd.grad(out, x)
    assert torch.equal(first, again)
    g, = torch.autograd.grad(made(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        g.sum().backward()


def test_the_users_changes_are_seen():
    """Hooks, replaced layers and parametrised weights are not passed over."""
    x = torch.randn(1, 8, 4, 4)
    made = block(8)
    assert made._fusible(x)
    seen = []
    handle = made.pwconv1.register_forward_hook(lambda *_: seen.append(1))
    made(x)
    assert seen == [1]
    handle.remove()

    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2
    plain = made(x)
    adapter = Adapter(8, 32)
    adapter.load_state_dict(made.pwconv1.state_dict())
    made.pwconv1 = adapter
    assert not torch.allclose(made(x), plain)
    made = block(8)
    nn.utils.parametrizations.weight_norm(made.pwconv2)
    assert not made._fusible(x)
    made = block(8)
    made.act = nn.GELU(approximate='tanh')
    assert not made._fusible(x)
    assert not block(8).bfloat16()._fusible(x)


def test_weights_that_are_no_parameters():
    """As in replicas of DataParallel, and where FSDP has flattened them."""
    made = block(8, memory='lean')
    x = torch.randn(1, 8, 5, 5)
    expected = made(x)
    for layer in (made.dwconv, made.norm, made.pwconv1, made.pwconv2):
        for name, weight in list(layer._parameters.items()):
            delattr(layer, name)
            setattr(layer, name, weight.detach())
    assert made._fusible(x)
    assert torch.equal(made(x), expected)


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
    made = block(8, use_grn, dtype=dtype).eval()
    x = torch.randn(2, 8, 7, 5, dtype=dtype)
    packed = like(made, packed=True)
    expected, found = made(x), packed(x)
    assert packed._packed is not None
    assert (found - expected).abs().max() <= (
        1e-5 if dtype == torch.float32 else 2e-2) * expected.abs().max()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_packed_backbone(dtype):
    """Of one size of picture after another; a downsampling without its stride stays as it is."""
    model = ConvNeXt(depths=[1, 1, 2], dims=[8, 16, 32], output_stride=8,
                     layer_scale_init_value=0.5, packed=True).eval().to(dtype)
    pictures = [torch.randn(n, 3, *size, dtype=dtype)
                for n, size in ((2, (33, 70)), (1, (64, 64)), (2, (33, 70)), (1, (8, 8)))]
    found = [model(x) for x in pictures]
    parts = [module for module in model.modules() if isinstance(module, Packable)]
    assert [part._packed is not None for part in parts] == [True, False] + [True] * 4
    for part in parts:
        part.packed = False
    for x, maps in zip(pictures, found, strict=True):
        for a, b in zip(maps, model(x), strict=True):
            assert (a - b).abs().max() <= (
                1e-5 if dtype == torch.float32 else 2e-2) * b.abs().max()


def test_packed_weights_are_those_of_now():
    x = torch.randn(1, 8, 5, 5)
    made = block(8, packed=True).eval()

    def check() -> None:
        with torch.no_grad():
            assert torch.allclose(made(x), like(made, packed=False)(x), atol=1e-4)
            used.append(made._packed and made._packed[1])
    used = []
    check()
    check()
    assert used[0] is used[1], 'made once'
    optimizer = torch.optim.SGD(made.parameters(), 0.5)
    made(x).sum().backward()
    optimizer.step()
    check()
    made.load_state_dict(block(8).state_dict())
    check()
    made.gamma.data = torch.full((8,), 3.0)
    check()
    made.to(torch.bfloat16).to(torch.float32)
    check()
    made = pickle.loads(pickle.dumps(copy.deepcopy(made)))
    assert made._packed is None
    check()
    assert len({id(weights) for weights in used}) == 6
    same(run(made, x), run(like(made, packed=False), x))
    assert run(made.train(), x)[1]['pwconv1.weight'] is not None
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(made(x), like(made, packed=False)(x)), 'of another dtype'


@pytest.mark.parametrize('use_grn', [False, True])
@torch.no_grad()
def test_convolutions_where_a_compiler_freezes(use_grn):
    import torch._inductor.config
    made = block(8, use_grn).eval()
    x = torch.randn(2, 8, 7, 5)
    graphs = []

    def keep(graph: torch.fx.GraphModule, _) -> torch.fx.GraphModule:
        graphs.append({node.target for node in graph.graph.nodes})
        return graph
    for freezing in (False, True):
        torch._dynamo.reset()
        with torch._inductor.config.patch(freezing=freezing):
            found = torch.compile(made, backend=keep, fullgraph=True)(x)
        assert torch.allclose(found, made(x), atol=1e-4)
    linear = torch._C._nn.linear
    assert [linear in targets for targets in graphs] == [True, False]

    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2
    adapter = Adapter(8, 32)
    adapter.load_state_dict(made.pwconv1.state_dict())
    made.pwconv1 = adapter
    torch._dynamo.reset()
    with torch._inductor.config.patch(freezing=True):
        found = torch.compile(made, backend=keep, fullgraph=True)(x)
    assert torch.allclose(found, made(x), atol=1e-4), "a user's layer is passed over"


# ------------------------------------------------------------------------ half precision


def errors(model: nn.Module, x: Tensor, exact: nn.Module, autocast: bool) -> dict[str, float]:
    """Root mean square errors to float64, of features and of gradients by kind of parameter."""
    def of(module: nn.Module, x: Tensor, autocast: bool):
        module.zero_grad(set_to_none=True)
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            outs = module(x)
        generator = torch.Generator().manual_seed(7)
        sum((o.double() * torch.randn(o.shape, generator=generator).double()).sum()
            for o in outs).backward()
        return outs, {name.removeprefix('model.'): p.grad.double()
                      for name, p in module.named_parameters()}
    outs, grads = of(model, x, autocast)
    right, right_grads = of(exact, x.double(), False)
    found: dict[str, list[float]] = {}
    for a, b in zip(outs, right, strict=True):
        found.setdefault('features', []).append(
            float((a.double() - b).norm() / b.norm()))
    for name, g in right_grads.items():
        kind = name.split('.', 3)[-1] if name.startswith('stages') else name.split('.')[0][:4]
        found.setdefault(kind, []).append(float((grads[name] - g).norm() / g.norm()))
    return {kind: sum(v) for kind, v in found.items()}


@pytest.mark.parametrize('autocast', [True, False], ids=['autocast', 'bfloat16'])
@pytest.mark.parametrize('memory', ['lean', 'minimal'])
def test_errors_in_half_precision_are_those_of_the_reference(memory, autocast):
    kwargs = dict(depths=(2, 2, 2), dims=(32, 48, 64), layer_scale_init_value=1.0)
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for seed in range(6):  # a single draw's roundings are luck
        torch.manual_seed(seed)
        model = ConvNeXt(memory=memory, **kwargs)
        for p in model.parameters():
            p.data = (torch.randn_like(p) / p[0].numel() ** 0.5 if p.ndim > 1
                      else p + 0.2 * torch.randn_like(p))
        x = torch.randn(2, 3, 96, 64)
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
    made = block(16)
    made.gamma.data.fill_(gamma)
    x = torch.randn(1, 16, 12, 12)
    # A loss scale's worth: what is behind the layer scale is fine, what is before it is not.
    up = torch.randn(1, 16, 12, 12) * (1e4 if abs(gamma) < 1 else 10)
    exact = run(copy.deepcopy(made).double(), x.double(), up.double())
    with torch.autocast('cpu', torch.float16):
        found = run(made, x, up)
    for name, gradient in exact[1].items():
        assert (found[1][name] - gradient).abs().max() <= 0.01 * gradient.abs().max(), name


# -------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(('memory', 'autocast', 'least', 'most'), [
    ('reference', True, 331, 332), ('reference', False, 544, 545.5), ('plain', True, 330, 332),
    ('lean', True, 110, 130), ('lean', False, 200, 260), ('minimal', True, 30, 65),
    ('minimal', False, 50, 65)])
def test_what_is_kept_of_tiny_at_512(memory, autocast, least, most):
    model = ConvNeXt('tiny', layer_scale_init_value=1.0,
                     memory='plain' if memory == 'reference' else memory)
    network, x = OpenMMLab(model) if memory == 'reference' else model, torch.randn(1, 3, 512, 512)
    counted = saved_by(lambda: network(x), list(network.parameters()), autocast)
    assert least <= counted <= most


def test_no_product_is_done_twice():
    """Lean: six products a block, as in plain autograd; minimal: one more."""
    from torch.utils.flop_counter import FlopCounterMode
    flops = {}
    for memory in MEMORY:
        made = block(16, memory=memory).double()  # oneDNN's products are not counted
        x = torch.randn(1, 16, 8, 8, dtype=torch.float64, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            made(x).sum().backward()
        flops[memory] = sum(count for op, count in counter.get_flop_counts()['Global'].items()
                            if 'convolution' not in str(op))
    product = 2 * 64 * 16 * 64
    assert flops == dict(plain=6 * product, lean=6 * product, minimal=7 * product)


def test_distributed_with_a_static_graph(tmp_path):
    """One process is enough for DistributedDataParallel to look at every gradient."""
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
            for _ in range(3):  # with all of the last block dropped
                module.zero_grad()
                sum(o.sum() for o in module(x)).backward()
        for (name, a), b in zip(model.named_parameters(), wrapped.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), name
    finally:
        dist.destroy_process_group()


# --------------------------------------------------------- Triton's operations in the block


@pytest.fixture
def nvidia():
    pytest.importorskip('triton', reason='the kernels need triton, which is not installed')
    from convnext_mm.fused import nvidia
    return nvidia


class OnGpu(NamedTuple):
    """Stands for a tensor where only its place is asked for."""

    is_cuda: bool = True


@pytest.mark.parametrize('use_grn', [False, True])
@pytest.mark.parametrize('memory', ['lean', 'minimal'])
@pytest.mark.parametrize('how', ['eager', 'compiled', 'dropped'])
def test_block_by_tritons_operations(nvidia, how, memory, use_grn, monkeypatch):
    """On a GPU or in the interpreter; torch.compile sees through: one graph, both ways."""
    device = 'cpu' if nvidia.INTERPRETED else 'cuda'
    monkeypatch.setattr('convnext_mm.fused.layers.select_operations', lambda *_: nvidia)
    if how == 'dropped':
        monkeypatch.setattr(DropPath, 'factors',
                            lambda self, x: torch.tensor([0.0, 1.5], device=device))
    made = block(8, use_grn, memory=memory).to(device)
    x, up = (torch.randn(2, 8, 4, 6, device=device) for _ in 'xu')
    module = torch.compile(made, backend='aot_eager', fullgraph=True) if how == 'compiled' else made
    found = run(module, x, up)
    found[1].update({k.removeprefix('_orig_mod.'): v for k, v in found[1].items()})
    expected = run(like(made, memory='plain'), x, up)
    same((found[0], {k: found[1][k] for k in expected[1]}), expected)


def test_which_operations_are_used(nvidia):
    assert select_operations(OnGpu(), True) is nvidia
    assert select_operations(OnGpu(), False) is eager, 'switched off'
    assert select_operations(OnGpu(False), True) is eager


def test_the_choice_of_operations_is_compiled_away(nvidia):
    here = OnGpu()

    def act(h: Tensor) -> Tensor:
        return select_operations(here, True).gelu(h)
    h = torch.randn(1, 2, 3, 8, device='cpu' if nvidia.INTERPRETED else 'cuda')
    torch._dynamo.reset()
    compiled = torch.compile(act, backend='aot_eager', fullgraph=True)
    assert torch.equal(compiled(h), nvidia.gelu(h))


def test_no_compiler_is_imported_with_the_package():
    """It takes seconds, and Triton reads its settings then."""
    done = run_tool(sys.executable, '-c', 'import sys, convnext_mm; '
                    "print([m for m in ('torch._dynamo', 'triton') if m in sys.modules])")
    assert done.stdout.splitlines()[-1] == '[]'
