"""The Triton kernels against PyTorch: on a GPU, or else in Triton's interpreter on the CPU."""
from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convnext_mm.layers import Block
from tests.helpers import ROOT

pytest.importorskip('triton', reason='the kernels need triton, which is not installed')

from convnext_mm.fused import eager, nvidia
from tests.fused.operator_calls import DEVICE, calls, rand

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# One position; four rows and one more; two strips of columns and, at 100, two of channels.
SHAPES = [(1, 1, 1, 8), (2, 5, 7, 40), (1, 3, 9, 96), (1, 2, 19, 100)]
CASES = [*((shape, torch.float32) for shape in SHAPES),
         (SHAPES[1], torch.float16), (SHAPES[1], torch.bfloat16), (SHAPES[3], torch.bfloat16)]
# Too wide for one kernel of convolution and norm.
WIDE = ((1, 1, 2, 520), torch.bfloat16)
# The last has more tiles of rows than are in a group.
FLAT = [(1, 1, 1, 8), (2, 5, 7, 40), (1, 5, 9, 100), (1, 1, 3, 520), (1, 23, 25, 24)]


@pytest.fixture(autouse=True, scope='module')
def exact_bfloat16():
    """The interpreter cuts float32 off where a GPU rounds it, and has no bfloat16 products."""
    if not nvidia.INTERPRETED:
        yield
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            data = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return TensorHandle(data.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, target)

    def float_dot(self, a, b, *args):
        if a.dtype.scalar == tl.bfloat16:
            a, b = (self.cast_impl(x, tl.float32) for x in (a, b))
        return dot(self, a, b, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, 'cast_impl', rounding_cast)
        patch.setattr(InterpreterBuilder, 'create_dot', float_dot)
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def check(ours: Tensor, exact: Tensor, plain: Tensor | None = None) -> None:
    """Within 1e-5 of float64's result in float32; in half precision no worse than PyTorch."""
    assert ours.shape == exact.shape
    error = ours.double() - exact
    if ours.dtype == torch.float32:
        assert error.abs().max() <= 1e-5 * exact.abs().max()
        return
    assert ours.dtype == plain.dtype
    theirs, eps = plain.double() - exact, torch.finfo(ours.dtype).eps
    # Of few values, whose roundings happen to be smaller is luck.
    luck = eps * exact.norm() / exact.numel() ** 0.5
    assert error.norm() <= 1.1 * theirs.norm() + luck
    assert error.abs().max() <= 1.1 * theirs.abs().max() + eps / 2 * exact.abs().max()


def against(ours: tuple, function, *inputs: Tensor | None) -> None:
    """Check outputs against a function of PyTorch's, in float64 and in the type of inputs[0]."""
    exact = function(*(x if x is None else x.double() for x in inputs))
    plain = function(*(x if x is None else x.to(inputs[0].dtype) for x in inputs))
    for mine, right, theirs in zip(ours, exact, plain, strict=True):
        check(mine, right, theirs)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=3,
                    groups=x.shape[-1]).permute(0, 2, 3, 1)


def gradients(function, up: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs), inputs, up)


@pytest.mark.parametrize(('shape', 'dtype'), [*CASES, WIDE])
def test_dwconv_norm(shape, dtype):
    C = shape[-1]
    x, params = rand(*shape, dtype=dtype), (rand(C, 1, 7, 7) / 7, rand(C), rand(C), rand(C))
    n, y, mean, rstd = nvidia.dwconv_norm(x, *params, 1e-6, True)

    def plain(x, weight, bias, norm_weight, norm_bias):
        y = conv(x, weight, bias)
        return F.layer_norm(y, (C,), norm_weight, norm_bias, 1e-6), y

    against((n, y), plain, x, *params)
    kept = y.double().reshape(-1, C)
    check(mean, kept.mean(1))
    check(rstd, (kept.var(1, correction=0) + 1e-6).rsqrt())

    if dtype == torch.float32 or C > nvidia.FUSED_CHANNELS:
        again = nvidia.dwconv_norm(x, *params, 1e-6, False)
        assert again[1].numel() == 0
        for mine, first in [(again[0], n), (again[2], mean), (again[3], rstd)]:
            assert torch.equal(mine, first)


@pytest.mark.parametrize(('shape', 'dtype'), [*CASES, WIDE])
def test_norm_backward(shape, dtype):
    C = shape[-1]
    y, dn = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype)
    weight, bias = rand(C), rand(C)
    wide = y.double().reshape(-1, C)
    mean, rstd = wide.mean(1).float(), (wide.var(1, correction=0) + 1e-6).rsqrt().float()
    ours = nvidia.norm_backward(dn, y, mean, rstd, weight)
    assert ours[1].dtype == ours[2].dtype == torch.float32

    def plain(dn, y, weight, bias):
        return gradients(lambda *args: F.layer_norm(args[0], (C,), *args[1:], 1e-6),
                         dn, y, weight, bias)

    against(ours, plain, dn, y, weight, bias)


@pytest.mark.parametrize(('shape', 'dtype'), CASES)
def test_dwconv_backward(shape, dtype):
    dy, x, g = (rand(*shape, dtype=dtype) for _ in range(3))
    weight = rand(shape[-1], 1, 7, 7) / 7

    def plain(dy, weight, g):
        dx, = gradients(lambda x: conv(x, weight), dy, torch.zeros_like(dy))
        return (dx if g is None else dx + g,)

    g = None if shape == SHAPES[2] else g
    against((nvidia.dwconv_backward_input(dy, weight, g),), plain, dy, weight, g)

    dweight, dbias = nvidia.dwconv_backward_weight(dy, x)
    check(dweight, gradients(lambda w: conv(x.double(), w), dy.double(), weight.double())[0])
    check(dbias, dy.double().sum((0, 1, 2)))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', FLAT)
def test_linear_gelu(shape, dtype):
    C = shape[-1]
    n, weight, bias = rand(*shape, dtype=dtype), rand(4 * C, C) / C ** 0.5, rand(4 * C)
    a, h = nvidia.linear_gelu(n, weight, bias, True)

    def plain(n, weight, bias):
        h = F.linear(n, weight, bias)
        return F.gelu(h), h

    against((a, h), plain, n, weight, bias)
    a2, nothing = nvidia.linear_gelu(n, weight, bias, False)
    assert nothing.numel() == 0
    assert torch.equal(a2, a)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', FLAT)
def test_linear_residual(shape, dtype):
    N, C = shape[0], shape[-1]
    a, weight = rand(*shape[:-1], 4 * C, dtype=dtype), rand(C, 4 * C) / (4 * C) ** 0.5
    bias, gamma, x = rand(C), rand(C), rand(*shape, dtype=dtype)
    drop = torch.arange(N, device=DEVICE) / 0.7

    def plain(a, weight, bias, gamma, drop, x):
        y = F.linear(a, weight, bias)
        y = y if gamma is None else y * gamma
        return (x + (y if drop is None else y * drop[:, None, None, None]),)

    optional = [(gamma, drop), (gamma, None), (None, drop), (None, None)]
    for scale, factor in optional if dtype == torch.float32 else optional[:1]:
        inputs = a, weight, bias, scale, factor, x
        against((nvidia.linear_residual(*inputs),), plain, *inputs)


@pytest.mark.parametrize('dtype', DTYPES[1:])
def test_a_residual_stream_in_float32_stays_so(dtype):
    a, weight, bias, gamma = rand(2, 5, 7, 32, dtype=dtype), rand(8, 32) / 6, rand(8), rand(8)
    x = rand(2, 5, 7, 8)
    out = nvidia.linear_residual(a, weight, bias, gamma, None, x)
    # The weight is rounded; nothing else is.
    check(out, x.double() + gamma * F.linear(a.double(), weight.to(dtype).double(), bias.double()))
    dy, taps = rand(1, 3, 2, 8, dtype=dtype), rand(8, 1, 7, 7)
    g = 1000 * rand(1, 3, 2, 8)
    dx = nvidia.dwconv_backward_input(dy, taps, g)
    check(dx, g.double() + conv(dy.double(), taps.double().flip(2, 3)))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', FLAT)
def test_linear_gelu_backward(shape, dtype):
    C = shape[-1]
    g, weight = rand(*shape, dtype=dtype), rand(C, 4 * C) / C ** 0.5
    h = rand(*shape[:-1], 4 * C, dtype=dtype)

    def plain(g, weight, h):
        return *gradients(F.gelu, g @ weight, h), F.gelu(h)

    against(nvidia.linear_gelu_backward(g, weight, h), plain, g, weight, h)


@pytest.mark.parametrize('dtype', DTYPES)
def test_gelu(dtype):
    # More than one program, and values so large that nothing or everything passes.
    h, da = 3 * rand(1, 9, 3, 100, dtype=dtype), rand(1, 9, 3, 100, dtype=dtype)
    h[0, 0, 0, :4] = torch.tensor([-200.0, 200.0, 0.0, -6.0])
    against((nvidia.gelu(h),), lambda h: (F.gelu(h),), h)
    ours = nvidia.gelu_backward(da, h)
    against(ours, lambda da, h: (*gradients(F.gelu, da, h), F.gelu(h)), da, h)
    assert torch.equal(ours[1], nvidia.gelu(h))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', FLAT)
def test_mlp(shape, dtype):
    N, C = shape[0], shape[-1]
    n, x = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype)
    first = rand(4 * C, C) / C ** 0.5, rand(4 * C)
    second = rand(C, 4 * C) / (4 * C) ** 0.5, rand(C)
    drop = torch.arange(N, device=DEVICE) / 0.7

    def plain(n, weight1, bias1, weight2, bias2, gamma, drop, x):
        h = F.linear(n, weight1, bias1)
        y = F.linear(F.gelu(h), weight2, bias2)
        y = y if gamma is None else y * gamma
        return x + (y if drop is None else y * drop[:, None, None, None]), h

    optional = [(rand(C), drop, True), (None, None, False)]
    for gamma, factor, keep in optional if dtype == torch.float32 else optional[:1]:
        inputs = n, *first, *second, gamma, factor, x
        out, h = nvidia.mlp(*inputs, keep)
        against((out, h) if keep else (out,), lambda *args, k=keep: plain(*args)[:1 + k], *inputs)
        assert keep or h.numel() == 0


def grn_inputs(shape, dtype):
    N, C = shape[0], shape[-1]
    return (rand(*shape, dtype=dtype), rand(*shape[:-1], 4 * C, dtype=dtype), rand(N, 4 * C),
            rand(4 * C), rand(C, 4 * C) / (4 * C) ** 0.5)


# Maps that fill groups of rows and tiles, and such that end within them.
MAPS = [(1, 1, 1, 8), (2, 5, 7, 40), (3, 8, 8, 20), (1, 17, 18, 24)]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', MAPS)
def test_sums_of_squares_with_the_product(shape, dtype):
    C = shape[-1]
    n, weight, bias = rand(*shape, dtype=dtype), rand(4 * C, C) / C ** 0.5, rand(4 * C)
    a, h, sums = nvidia.linear_gelu_squares(n, weight, bias, True)
    for mine, alone in zip((a, h), nvidia.linear_gelu(n, weight, bias, True), strict=True):
        assert torch.equal(mine, alone)
    check(sums, a.double().square().sum((1, 2)))
    again, nothing, _ = nvidia.linear_gelu_squares(n, weight, bias, False)
    assert nothing.numel() == 0
    assert torch.equal(again, a)
    # The pass behind a product of cuBLAS's.
    written = torch.empty_like(h)
    check(nvidia._run_sums(h, None, written), a.double().square().sum((1, 2)))
    assert torch.equal(written, a)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', MAPS)
def test_product_of_grns_output(shape, dtype):
    N, C = shape[0], shape[-1]
    x, a, scale, beta, weight = grn_inputs(shape, dtype)
    bias, drop = rand(C), torch.arange(1, N + 1, device=DEVICE) / 0.7

    def plain(a, scale, beta, weight, bias, gamma, drop, x):
        y = F.linear(a * scale[:, None, None] + beta, weight, bias)
        y = y if gamma is None else y * gamma
        return (x + (y if drop is None else y * drop[:, None, None, None]),)

    for gamma, factor in [(rand(C), drop), (None, None)]:
        inputs = a, scale, beta, weight, bias, gamma, factor, x
        against((nvidia.grn_linear_residual(*inputs),), plain, *inputs)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', MAPS)
def test_backward_through_grn(shape, dtype):
    g, h, scale, beta, weight = grn_inputs(shape, dtype)
    du, sums = nvidia.grn_linear_backward(g, weight, h)
    against((du,), lambda g, weight: (g @ weight,), g, weight)
    exact = (du.double() * F.gelu(h.double())).sum((1, 2))
    check(sums, exact)
    check(nvidia._run_sums(h, du, None), exact)
    extra = rand(*scale.shape)

    def plain(du, h, scale, beta, extra):
        a = F.gelu(h)
        da = du * scale[:, None, None] + a * extra[:, None, None]
        return *gradients(F.gelu, da, h), a * scale[:, None, None] + beta
    inputs = du, h, scale, beta, extra
    against(nvidia.grn_gelu_backward(*inputs), plain, *inputs)


def test_large_sums_of_half_precision_do_not_overflow():
    n = torch.full((1, 4, 4, 8), 50.0, dtype=torch.float16, device=DEVICE)
    weight, bias = torch.eye(8, device=DEVICE) * 4, torch.zeros(8, device=DEVICE)
    check(nvidia.linear_gelu_squares(n, weight, bias, True)[2],
          torch.full((1, 8), 16 * 200.0 ** 2, dtype=torch.float64, device=DEVICE))


def test_programs_share_what_is_more_than_they_are(monkeypatch):
    monkeypatch.setattr(nvidia, 'PARTIALS', 2)
    monkeypatch.setattr(nvidia, 'CHUNK', 32)
    # Each sample has two chunks of rows.
    dy, x, weight = rand(2, 30, 2, 8), rand(2, 30, 2, 8), rand(8, 1, 7, 7)
    dweight, dbias = nvidia.dwconv_backward_weight(dy, x)
    check(dweight, gradients(lambda w: conv(x.double(), w), dy.double(), weight.double())[0])
    check(dbias, dy.double().sum((0, 1, 2)))
    check(nvidia._run_sums(x, dy, None), (dy.double() * F.gelu(x.double())).sum((1, 2)))
    factor = rand(2, 8)
    check(nvidia.grn_gelu_backward(dy, x, factor, rand(8).fill_(1), factor)[1],
          F.gelu(x.double()) * factor[:, None, None].double() + 1)
    y, dn = rand(5, 5, 7, 520), rand(5, 5, 7, 520)
    mean = y.mean(-1).flatten()
    rstd = (y.var(-1, correction=0).flatten() + 1e-6).rsqrt()
    d_weight, d_bias = nvidia.norm_backward(dn, y, mean, rstd, rand(520))[1:]
    check(d_weight, (dn.double() * F.layer_norm(y.double(), (520,), eps=1e-6)).sum((0, 1, 2)))
    check(d_bias, dn.double().sum((0, 1, 2)))


def test_layouts_and_empty_batches():
    x, weight = rand(1, 8, 4, 3), rand(8, 1, 7, 7)
    strided = x.permute(0, 2, 3, 1)
    assert torch.equal(nvidia.dwconv_backward_input(strided, weight, None),
                       nvidia.dwconv_backward_input(strided.contiguous(), weight, None))
    empty = strided[:0]
    assert nvidia.dwconv_norm(empty, weight, *[rand(8)] * 3, 1e-6, True)[0].shape == (0, 4, 3, 8)
    assert nvidia.linear_gelu(empty, rand(32, 8), rand(32), True)[0].shape == (0, 4, 3, 32)
    assert torch.equal(nvidia.dwconv_backward_weight(empty, empty)[0], torch.zeros_like(weight))


def test_every_operator_is_called():
    assert set(calls()) == {name.split('::')[1].split('.')[0]
                            for name in nvidia.LIBRARY._op_defs}


@pytest.mark.parametrize('name', calls())
def test_operators_keep_to_their_schemas(name):
    for args in calls()[name]:
        torch.library.opcheck(getattr(torch.ops.convnext_mm, name).default, args,
                              test_utils=('test_schema', 'test_faketensor'))


def block(dim: int, **kwargs) -> Block:
    made = Block(dim, memory='plain', **kwargs).to(DEVICE)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 1 or 'grn' in name:
                parameter.normal_()
    return made


def compare_gradients(made: Block, x: Tensor, drop: Tensor | None, out: Tensor, up: Tensor,
                      ours: dict[str, Tensor]) -> None:
    """Against autograd through the plain block: x is (N, C, H, W) there."""
    made = made.double()
    plain = x.double().permute(0, 3, 1, 2).requires_grad_()
    if drop is not None:
        made.drop_path.forward = lambda y: y * drop.double()[:, None, None, None]
    right = made(plain)
    check(out, right.permute(0, 2, 3, 1))
    names = dict(made.named_parameters())
    assert set(ours) == {'x', *names}
    found = torch.autograd.grad(right, [plain, *names.values()], up.double().permute(0, 3, 1, 2))
    check(ours['x'], found[0].permute(0, 2, 3, 1))
    for name, gradient in zip(names, found[1:], strict=True):
        check(ours[name], gradient)


def backward_of_conv_norm(p: dict, x: Tensor, dn: Tensor, kept: tuple, g: Tensor) -> dict:
    ours = {}
    dy, ours['norm.weight'], ours['norm.bias'] = nvidia.norm_backward(dn, *kept, p['norm.weight'])
    ours['dwconv.weight'], ours['dwconv.bias'] = nvidia.dwconv_backward_weight(dy, x)
    return {**ours, 'x': nvidia.dwconv_backward_input(dy, p['dwconv.weight'], g)}


@torch.no_grad()
def test_gradients_of_a_block():
    made, x, up = block(40), rand(2, 5, 7, 40), rand(2, 5, 7, 40)
    drop = torch.tensor([0.0, 1.25], device=DEVICE)
    p = {name: value.detach() for name, value in made.named_parameters()}
    n, *kept = nvidia.dwconv_norm(x, p['dwconv.weight'], p['dwconv.bias'], p['norm.weight'],
                                  p['norm.bias'], 1e-6, True)
    a, h = nvidia.linear_gelu(n, p['pwconv1.weight'], p['pwconv1.bias'], True)
    second = p['pwconv2.weight'], p['pwconv2.bias'], p['gamma']
    out = nvidia.linear_residual(a, *second, drop, x)

    # gamma is left out of the second layer's gradients, so that its own follows from them.
    g = up * drop[:, None, None, None]
    dh, a = nvidia.linear_gelu_backward(g * p['gamma'], p['pwconv2.weight'], h)
    dweight, dbias = g.flatten(0, 2).t() @ a.flatten(0, 2), g.sum((0, 1, 2))
    ours = backward_of_conv_norm(p, x, dh @ p['pwconv1.weight'], kept, up)
    ours.update({'pwconv2.weight': dweight * p['gamma'][:, None],
                 'pwconv2.bias': dbias * p['gamma'],
                 'gamma': (dweight * second[0]).sum(1) + dbias * second[1],
                 'pwconv1.weight': dh.flatten(0, 2).t() @ n.flatten(0, 2),
                 'pwconv1.bias': dh.sum((0, 1, 2))})
    with torch.enable_grad():
        compare_gradients(made, x, drop, out, up, ours)


@torch.no_grad()
def test_gradients_of_a_block_with_grn():
    made = block(24, use_grn=True, layer_scale_init_value=0)
    x, up = rand(2, 5, 7, 24), rand(2, 5, 7, 24)
    p = {name: value.detach() for name, value in made.named_parameters()}
    gamma, beta = p['grn.gamma'].flatten(), p['grn.beta'].flatten()
    n, *kept = nvidia.dwconv_norm(x, p['dwconv.weight'], p['dwconv.bias'], p['norm.weight'],
                                  p['norm.bias'], 1e-6, True)
    a, h, squares = nvidia.linear_gelu_squares(n, p['pwconv1.weight'], p['pwconv1.bias'], True)
    norms = squares.sqrt()
    scale = eager.grn_scale(norms, gamma)
    second = p['pwconv2.weight'], p['pwconv2.bias']
    out = nvidia.grn_linear_residual(a, scale, beta, *second, None, None, x)
    dh, u, dgamma = nvidia.grn_linear_gelu_backward(up, second[0], h, norms, gamma, beta)
    ours = backward_of_conv_norm(p, x, dh @ p['pwconv1.weight'], kept, up)
    ours.update({'grn.gamma': dgamma.view_as(p['grn.gamma']),
                 'grn.beta': (up.sum((0, 1, 2)) @ second[0]).view_as(p['grn.beta']),
                 'pwconv2.weight': up.flatten(0, 2).t() @ u.flatten(0, 2),
                 'pwconv2.bias': up.sum((0, 1, 2)),
                 'pwconv1.weight': dh.flatten(0, 2).t() @ n.flatten(0, 2),
                 'pwconv1.bias': dh.sum((0, 1, 2))})
    with torch.enable_grad():
        compare_gradients(made, x, None, out, up, ours)


def test_the_kernels_are_available():
    assert nvidia.available()


def test_what_is_faster_is_measured_once(monkeypatch):
    """Triton's product or cuBLAS, by a size's first call; not while a graph is captured."""
    seconds, capturing = dict(ours=1.0, theirs=2.0), []
    monkeypatch.setattr(nvidia, 'INTERPRETED', False)
    monkeypatch.setattr(nvidia, 'FASTER', {})
    monkeypatch.setattr('torch.cuda.is_current_stream_capturing', lambda: bool(capturing))
    monkeypatch.setattr('triton.testing.do_bench', lambda call, **_: seconds[call()])

    def choose(rows: int) -> str:
        return nvidia._faster('kind', torch.empty(1, 1, rows, 8), torch.empty(32, 8),
                              lambda: 'ours', lambda: 'theirs')
    capturing.append(True)
    assert choose(70) == 'ours'
    assert nvidia.FASTER == {}
    capturing.clear()
    seconds['ours'] = 3.0
    assert choose(70) == 'theirs'
    seconds['ours'] = 1.0
    assert choose(100) == 'theirs', 'of the same power of two'
    assert choose(200) == 'ours'


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from convnext_mm.fused import nvidia
from tests.fused.operator_calls import calls


class Driver:
    def get_current_target(self):
        return GPUTarget('cuda', 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_benchmarker(self):
        return lambda call, quantiles: call() or [0.0, 0.0, 0.0]


def compile_only(self, *args, warmup, **kwargs):
    assert run(self, *args, warmup=True, **kwargs).asm['cubin']
    compiled.add(self.__name__)


compiled, run, JITFunction.run = set(), JITFunction.run, compile_only
driver.set_active(Driver())
nvidia._faster = lambda kind, a, weight, ours, theirs: (theirs(), ours())[1]
for name in dir(nvidia):
    if hasattr(getattr(nvidia, name), 'configs'):
        del getattr(nvidia, name).configs[1:-1]
for name, calls in calls().items():
    for args in calls:
        getattr(nvidia, name)(*args)
print(*sorted(compiled))
"""


@pytest.mark.skipif(not nvidia.INTERPRETED, reason='a GPU is here: all other tests compile')
def test_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter takes what the compiler does not; that needs no GPU, only a target."""
    done = subprocess.run([sys.executable, '-c', COMPILE], capture_output=True, text=True, cwd=ROOT,
                          timeout=300, env={**os.environ, 'TRITON_INTERPRET': '0',
                                            'TRITON_CACHE_DIR': str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [
        '_conv', '_conv_norm', '_conv_weight', '_gelu', '_grn_gelu_backward',
        '_grn_linear_backward', '_linear_gelu', '_linear_gelu_backward', '_linear_residual',
        '_map_sums', '_mlp', '_norm', '_norm_backward']
