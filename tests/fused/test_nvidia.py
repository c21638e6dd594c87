"""The Triton kernels against PyTorch, on a GPU or in Triton's interpreter on the CPU."""
from __future__ import annotations

import inspect
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
from convnext_mm.fused.operations import Operations
from tests.fused.operator_calls import DEVICE, operator_calls, rand


def slow(*values) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# The interpreter takes long for each program, so that shapes have few. Of convolutions: one
# position; two images with four rows and one more; several strips of columns and channel blocks.
CONV_CASES = [((1, 1, 1, 8), torch.float32), slow((2, 5, 3, 24), torch.float32),
              slow((1, 2, 19, 100), torch.float32), slow((1, 4, 8, 96), torch.float16),
              slow((1, 4, 8, 96), torch.bfloat16)]
# Of matmuls: wider than FUSED_MLP_CHANNELS; more tiles of rows than share L2.
MATMUL_SHAPES = [(1, 1, 1, 8), (2, 5, 7, 40), slow((1, 5, 9, 100)), slow((1, 1, 3, 136)),
                 slow((1, 23, 25, 24))]


@pytest.fixture(autouse=True, scope='module')
def exact_bfloat16():
    """Rounds as a GPU does: the interpreter truncates fp32, and has no matmuls of bf16."""
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
    """Check that fp32 is within 1e-5 of fp64, and half precision no worse than PyTorch's."""
    assert ours.shape == exact.shape
    error = ours.double() - exact
    if ours.dtype == torch.float32:
        assert error.abs().max() <= 1e-5 * exact.abs().max()
        return
    assert ours.dtype == plain.dtype
    theirs, eps = plain.double() - exact, torch.finfo(ours.dtype).eps
    # With few values, smaller rounding errors are chance.
    chance = eps * exact.norm() / exact.numel() ** 0.5
    assert error.norm() <= 1.1 * theirs.norm() + chance
    assert error.abs().max() <= 1.1 * theirs.abs().max() + eps / 2 * exact.abs().max()


def compare(ours: tuple, function, *inputs: Tensor | None) -> None:
    """Check outputs against a PyTorch function in fp64 and in the dtype of inputs[0]."""
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


@pytest.mark.parametrize(('shape', 'dtype'), CONV_CASES)
def test_dwconv_norm(shape, dtype):
    check_dwconv_norm(shape, dtype)


@pytest.mark.slow
def test_dwconv_and_norm_as_separate_kernels(monkeypatch):
    monkeypatch.setattr(nvidia, 'FUSED_NORM_CHANNELS', 64)
    check_dwconv_norm((1, 4, 8, 96), torch.bfloat16)


def check_dwconv_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    C = shape[-1]
    x, params = rand(*shape, dtype=dtype), (rand(C, 1, 7, 7) / 7, rand(C), rand(C), rand(C))
    n, y, mean, rstd = nvidia.dwconv_norm(x, *params, 1e-6, True)

    def plain(x, weight, bias, norm_weight, norm_bias):
        y = conv(x, weight, bias)
        return F.layer_norm(y, (C,), norm_weight, norm_bias, 1e-6), y

    compare((n, y), plain, x, *params)
    rows = y.double().reshape(-1, C)
    check(mean, rows.mean(1))
    check(rstd, (rows.var(1, correction=0) + 1e-6).rsqrt())

    if dtype == torch.bfloat16:
        again = nvidia.dwconv_norm(x, *params, 1e-6, False)
        assert again[1].numel() == 0
        for second, first in [(again[0], n), (again[2], mean), (again[3], rstd)]:
            assert torch.equal(second, first)


@pytest.mark.parametrize(('shape', 'dtype'), [*CONV_CASES, ((1, 1, 2, 520), torch.bfloat16)])
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

    compare(ours, plain, dn, y, weight, bias)


@pytest.mark.parametrize(('shape', 'dtype'), CONV_CASES)
def test_dwconv_backward(shape, dtype):
    dy, x, g = (rand(*shape, dtype=dtype) for _ in range(3))
    weight = rand(shape[-1], 1, 7, 7) / 7

    def plain(dy, weight, g):
        dx, = gradients(lambda x: conv(x, weight), dy, torch.zeros_like(dy))
        return (dx if g is None else dx + g,)

    g = None if dtype == torch.float16 else g
    compare((nvidia.dwconv_backward_input(dy, weight, g),), plain, dy, weight, g)

    dweight, dbias = nvidia.dwconv_backward_weight(dy, x)
    check(dweight, gradients(lambda w: conv(x.double(), w), dy.double(), weight.double())[0])
    check(dbias, dy.double().sum((0, 1, 2)))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', MATMUL_SHAPES)
def test_linear_gelu(shape, dtype):
    C = shape[-1]
    n, weight, bias = rand(*shape, dtype=dtype), rand(4 * C, C) / C ** 0.5, rand(4 * C)
    a, h = nvidia.linear_gelu(n, weight, bias, True)

    def plain(n, weight, bias):
        h = F.linear(n, weight, bias)
        return F.gelu(h), h

    compare((a, h), plain, n, weight, bias)
    a2, nothing = nvidia.linear_gelu(n, weight, bias, False)
    assert nothing.numel() == 0
    assert torch.equal(a2, a)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', MATMUL_SHAPES)
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
        compare((nvidia.linear_residual(*inputs),), plain, *inputs)


@pytest.mark.parametrize('dtype', DTYPES[1:])
def test_a_residual_in_fp32_stays_in_fp32(dtype, monkeypatch):
    # cuBLAS, where it is faster, rounds the branch as well.
    monkeypatch.setattr(nvidia, '_run_faster', lambda kind, a, weight, ours, cublas: ours())
    a, weight, bias, gamma = rand(2, 5, 7, 32, dtype=dtype), rand(8, 32) / 6, rand(8), rand(8)
    x = rand(2, 5, 7, 8)
    out = nvidia.linear_residual(a, weight, bias, gamma, None, x)
    # Only the weight is rounded.
    check(out, x.double() + gamma * F.linear(a.double(), weight.to(dtype).double(), bias.double()))
    dy, taps = rand(1, 3, 2, 8, dtype=dtype), rand(8, 1, 7, 7)
    g = 1000 * rand(1, 3, 2, 8)
    dx = nvidia.dwconv_backward_input(dy, taps, g)
    check(dx, g.double() + conv(dy.double(), taps.double().flip(2, 3)))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', MATMUL_SHAPES)
def test_linear_gelu_backward(shape, dtype):
    C = shape[-1]
    g, weight = rand(*shape, dtype=dtype), rand(C, 4 * C) / C ** 0.5
    h = rand(*shape[:-1], 4 * C, dtype=dtype)

    def plain(g, weight, h):
        return *gradients(F.gelu, g @ weight, h), F.gelu(h)

    compare(nvidia.linear_gelu_backward(g, weight, h), plain, g, weight, h)


@pytest.mark.parametrize('dtype', DTYPES)
def test_gelu(dtype):
    # More than one program, and values so large that GELU is 0 or the identity.
    h, da = 3 * rand(1, 9, 3, 100, dtype=dtype), rand(1, 9, 3, 100, dtype=dtype)
    h[0, 0, 0, :4] = torch.tensor([-200.0, 200.0, 0.0, -6.0])
    compare((nvidia.gelu(h),), lambda h: (F.gelu(h),), h)
    ours = nvidia.gelu_backward(da, h)
    compare(ours, lambda da, h: (*gradients(F.gelu, da, h), F.gelu(h)), da, h)
    assert torch.equal(ours[1], nvidia.gelu(h))


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', MATMUL_SHAPES)
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
        compare((out, h) if keep else (out,), lambda *args, k=keep: plain(*args)[:1 + k], *inputs)
        assert keep or h.numel() == 0


def grn_inputs(shape, dtype):
    N, C = shape[0], shape[-1]
    return (rand(*shape, dtype=dtype), rand(*shape[:-1], 4 * C, dtype=dtype), rand(N, 4 * C),
            rand(4 * C), rand(C, 4 * C) / (4 * C) ** 0.5)


# Maps that fill groups of rows and tiles, and maps that end within them.
MAPS = [(1, 1, 1, 8), (2, 5, 7, 40), slow((3, 8, 8, 20)), slow((1, 17, 18, 24))]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', MAPS)
def test_linear_gelu_squares(shape, dtype):
    C = shape[-1]
    n, weight, bias = rand(*shape, dtype=dtype), rand(4 * C, C) / C ** 0.5, rand(4 * C)
    a, h, sums = nvidia.linear_gelu_squares(n, weight, bias, True)
    for mine, alone in zip((a, h), nvidia.linear_gelu(n, weight, bias, True), strict=True):
        assert torch.equal(mine, alone)
    check(sums, a.double().square().sum((1, 2)))
    again, nothing, _ = nvidia.linear_gelu_squares(n, weight, bias, False)
    assert nothing.numel() == 0
    assert torch.equal(again, a)
    # The kernel that follows a matmul of cuBLAS.
    written = torch.empty_like(h)
    check(nvidia._run_map_sums(h, None, written), a.double().square().sum((1, 2)))
    assert torch.equal(written, a)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', MAPS)
def test_grn_linear_residual(shape, dtype):
    N, C = shape[0], shape[-1]
    x, a, scale, beta, weight = grn_inputs(shape, dtype)
    bias, drop = rand(C), torch.arange(1, N + 1, device=DEVICE) / 0.7

    def plain(a, scale, beta, weight, bias, gamma, drop, x):
        y = F.linear(a * scale[:, None, None] + beta, weight, bias)
        y = y if gamma is None else y * gamma
        return (x + (y if drop is None else y * drop[:, None, None, None]),)

    for gamma, factor in [(rand(C), drop), (None, None)]:
        inputs = a, scale, beta, weight, bias, gamma, factor, x
        compare((nvidia.grn_linear_residual(*inputs),), plain, *inputs)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', MAPS)
def test_grn_backward(shape, dtype):
    g, h, scale, beta, weight = grn_inputs(shape, dtype)
    du, sums = nvidia.grn_linear_backward(g, weight, h)
    compare((du,), lambda g, weight: (g @ weight,), g, weight)
    exact = (du.double() * F.gelu(h.double())).sum((1, 2))
    check(sums, exact)
    check(nvidia._run_map_sums(h, du, None), exact)
    extra = rand(*scale.shape)

    def plain(du, h, scale, beta, extra):
        a = F.gelu(h)
        da = du * scale[:, None, None] + a * extra[:, None, None]
        return *gradients(F.gelu, da, h), a * scale[:, None, None] + beta
    inputs = du, h, scale, beta, extra
    compare(nvidia.grn_gelu_backward(*inputs), plain, *inputs)


def test_large_sums_of_half_precision_do_not_overflow():
    n = torch.full((1, 4, 4, 8), 50.0, dtype=torch.float16, device=DEVICE)
    weight, bias = torch.eye(8, device=DEVICE) * 4, torch.zeros(8, device=DEVICE)
    check(nvidia.linear_gelu_squares(n, weight, bias, True)[2],
          torch.full((1, 8), 16 * 200.0 ** 2, dtype=torch.float64, device=DEVICE))


@pytest.mark.slow
def test_programs_with_several_units_of_work(monkeypatch):
    monkeypatch.setattr(nvidia, 'MAX_PARTIALS', 1)
    monkeypatch.setattr(nvidia, 'CHUNK', 32)
    # 28 rows and 2 rows, both done by the same programs.
    dy, x, weight = rand(1, 30, 1, 8), rand(1, 30, 1, 8), rand(8, 1, 7, 7)
    dweight, dbias = nvidia.dwconv_backward_weight(dy, x)
    check(dweight, gradients(lambda w: conv(x.double(), w), dy.double(), weight.double())[0])
    check(dbias, dy.double().sum((0, 1, 2)))
    # Two chunks of positions in each sample.
    dy, x, factor = rand(2, 30, 2, 8), rand(2, 30, 2, 8), rand(2, 8)
    check(nvidia._run_map_sums(x, dy, None), (dy.double() * F.gelu(x.double())).sum((1, 2)))
    check(nvidia.grn_gelu_backward(dy, x, factor, rand(8).fill_(1), factor)[1],
          F.gelu(x.double()) * factor[:, None, None].double() + 1)
    y, dn = rand(2, 5, 7, 40), rand(2, 5, 7, 40)
    mean = y.mean(-1).flatten()
    rstd = (y.var(-1, correction=0).flatten() + 1e-6).rsqrt()
    d_weight, d_bias = nvidia.norm_backward(dn, y, mean, rstd, rand(40))[1:]
    check(d_weight, (dn.double() * F.layer_norm(y.double(), (40,), eps=1e-6)).sum((0, 1, 2)))
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


def test_dilation_is_that_of_eager():
    """The kernels have dilation 1 only, so the operators call PyTorch's."""
    x, dy, g = rand(1, 6, 5, 8), rand(1, 6, 5, 8), rand(1, 6, 5, 8)
    weight, params = rand(8, 1, 7, 7), [rand(8) for _ in range(3)]
    ours = nvidia.dwconv_norm(x, weight, *params, 1e-6, True, 2)
    theirs = eager.dwconv_norm(x, weight, *params, 1e-6, True, 2)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b.view_as(a))
    assert torch.equal(nvidia.dwconv_backward_input(dy, weight, g, 2),
                       eager.dwconv_backward_input(dy, weight, g, 2))
    for a, b in zip(nvidia.dwconv_backward_weight(dy, x, 2),
                    eager.dwconv_backward_weight(dy, x, 2), strict=True):
        assert torch.equal(a, b)


def test_signatures_are_those_of_the_protocol():
    """mypy checks the types of modules that implement a protocol, but not the parameters' names."""
    names = [name for name in vars(Operations) if not name.startswith('_')]
    assert len(names) == 9
    for name in names:
        _, *expected = inspect.signature(getattr(Operations, name)).parameters.values()
        for module in (eager, nvidia):
            found = inspect.signature(getattr(module, name)).parameters.values()
            assert [(p.name, p.default) for p in found] == [
                (p.name, p.default) for p in expected], f'{module.__name__}.{name}'


def test_every_operator_is_called():
    assert set(operator_calls()) == {name.split('::')[1].split('.')[0]
                                     for name in nvidia.LIBRARY._op_defs}


@pytest.mark.slow
@pytest.mark.parametrize('name', operator_calls())
def test_operators_match_their_schemas(name, monkeypatch):
    monkeypatch.setattr(nvidia, 'FUSED_NORM_CHANNELS', 16)
    for args in operator_calls(wide=24)[name]:
        torch.library.opcheck(getattr(torch.ops.convnext_mm, name).default, args,
                              test_utils=('test_schema', 'test_faketensor'))


def random_block(dim: int, **kwargs) -> Block:
    block = Block(dim, **kwargs).to(DEVICE)
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if parameter.ndim == 1 or 'grn' in name:
                parameter.normal_()
    return block


def compare_gradients(block: Block, x: Tensor, drop: Tensor | None, out: Tensor, up: Tensor,
                      ours: dict[str, Tensor]) -> None:
    """Check output and gradients against autograd through the plain block, where x is NCHW."""
    block = block.double()
    plain = x.double().permute(0, 3, 1, 2).requires_grad_()
    if drop is not None:
        block.drop_path.forward = lambda y: y * drop.double()[:, None, None, None]
    exact = block(plain)
    check(out, exact.permute(0, 2, 3, 1))
    names = dict(block.named_parameters())
    assert set(ours) == {'x', *names}
    dx, *grads = torch.autograd.grad(exact, [plain, *names.values()],
                                     up.double().permute(0, 3, 1, 2))
    check(ours['x'], dx.permute(0, 2, 3, 1))
    for name, gradient in zip(names, grads, strict=True):
        check(ours[name], gradient)


def backward_of_conv_norm(p: dict, x: Tensor, dn: Tensor, saved: tuple, g: Tensor) -> dict:
    ours = {}
    dy, ours['norm.weight'], ours['norm.bias'] = nvidia.norm_backward(dn, *saved, p['norm.weight'])
    ours['dwconv.weight'], ours['dwconv.bias'] = nvidia.dwconv_backward_weight(dy, x)
    return {**ours, 'x': nvidia.dwconv_backward_input(dy, p['dwconv.weight'], g)}


@pytest.mark.slow
@torch.no_grad()
def test_gradients_of_a_block():
    block, x, up = random_block(24), rand(2, 3, 4, 24), rand(2, 3, 4, 24)
    drop = torch.tensor([0.0, 1.25], device=DEVICE)
    p = {name: value.detach() for name, value in block.named_parameters()}
    n, *saved = nvidia.dwconv_norm(x, p['dwconv.weight'], p['dwconv.bias'], p['norm.weight'],
                                  p['norm.bias'], 1e-6, True)
    a, h = nvidia.linear_gelu(n, p['pwconv1.weight'], p['pwconv1.bias'], True)
    second = p['pwconv2.weight'], p['pwconv2.bias'], p['gamma']
    out = nvidia.linear_residual(a, *second, drop, x)

    # Without gamma in the second layer's gradients, that of gamma follows from them.
    g = up * drop[:, None, None, None]
    dh, a = nvidia.linear_gelu_backward(g * p['gamma'], p['pwconv2.weight'], h)
    dweight, dbias = g.flatten(0, 2).t() @ a.flatten(0, 2), g.sum((0, 1, 2))
    ours = backward_of_conv_norm(p, x, dh @ p['pwconv1.weight'], saved, up)
    ours.update({'pwconv2.weight': dweight * p['gamma'][:, None],
                 'pwconv2.bias': dbias * p['gamma'],
                 'gamma': (dweight * second[0]).sum(1) + dbias * second[1],
                 'pwconv1.weight': dh.flatten(0, 2).t() @ n.flatten(0, 2),
                 'pwconv1.bias': dh.sum((0, 1, 2))})
    with torch.enable_grad():
        compare_gradients(block, x, drop, out, up, ours)


@pytest.mark.slow
@torch.no_grad()
def test_gradients_of_a_block_with_grn():
    block = random_block(24, use_grn=True, layer_scale_init_value=0)
    x, up = rand(2, 3, 4, 24), rand(2, 3, 4, 24)
    p = {name: value.detach() for name, value in block.named_parameters()}
    gamma, beta = p['grn.gamma'].flatten(), p['grn.beta'].flatten()
    n, *saved = nvidia.dwconv_norm(x, p['dwconv.weight'], p['dwconv.bias'], p['norm.weight'],
                                  p['norm.bias'], 1e-6, True)
    a, h, squares = nvidia.linear_gelu_squares(n, p['pwconv1.weight'], p['pwconv1.bias'], True)
    norms = squares.sqrt()
    scale = eager.grn_scale(norms, gamma)
    second = p['pwconv2.weight'], p['pwconv2.bias']
    out = nvidia.grn_linear_residual(a, scale, beta, *second, None, None, x)
    dh, u, dgamma = nvidia.grn_linear_gelu_backward(up, second[0], h, norms, gamma, beta)
    ours = backward_of_conv_norm(p, x, dh @ p['pwconv1.weight'], saved, up)
    ours.update({'grn.gamma': dgamma.view_as(p['grn.gamma']),
                 'grn.beta': (up.sum((0, 1, 2)) @ second[0]).view_as(p['grn.beta']),
                 'pwconv2.weight': up.flatten(0, 2).t() @ u.flatten(0, 2),
                 'pwconv2.bias': up.sum((0, 1, 2)),
                 'pwconv1.weight': dh.flatten(0, 2).t() @ n.flatten(0, 2),
                 'pwconv1.bias': dh.sum((0, 1, 2))})
    with torch.enable_grad():
        compare_gradients(block, x, None, out, up, ours)


def test_the_kernels_are_available():
    assert nvidia.available()


def test_the_faster_matmul_is_measured_once(monkeypatch):
    """The first call for a size times Triton and cuBLAS, except while a graph is captured."""
    seconds, capturing = dict(triton=1.0, cublas=2.0), []
    monkeypatch.setattr(nvidia, 'INTERPRETED', False)
    monkeypatch.setattr(nvidia, 'TRITON_IS_FASTER', {})
    monkeypatch.setattr('torch.cuda.is_current_stream_capturing', lambda: bool(capturing))
    monkeypatch.setattr('triton.testing.do_bench', lambda call, **_: seconds[call()])

    def choose(rows: int) -> str:
        return nvidia._run_faster('kind', torch.empty(1, 1, rows, 8), torch.empty(32, 8),
                                  lambda: 'triton', lambda: 'cublas')
    capturing.append(True)
    assert choose(70) == 'triton'
    assert nvidia.TRITON_IS_FASTER == {}
    capturing.clear()
    seconds['triton'] = 3.0
    assert choose(70) == 'cublas'
    seconds['triton'] = 1.0
    assert choose(100) == 'cublas', 'the same power of two'
    assert choose(200) == 'triton'


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from convnext_mm.fused import nvidia
from tests.fused.operator_calls import operator_calls


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
nvidia._run_faster = lambda kind, a, weight, run_triton, run_cublas: (run_cublas(), run_triton())[1]
for name in dir(nvidia):
    if hasattr(getattr(nvidia, name), 'configs'):
        del getattr(nvidia, name).configs[1:-1]
for name, calls in operator_calls().items():
    for args in calls:
        getattr(nvidia, name)(*args)
print(*sorted(compiled))
"""


@pytest.mark.slow
@pytest.mark.skipif(not nvidia.INTERPRETED, reason='there is a GPU: all other tests compile')
def test_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter accepts more than the compiler, which needs a target but no GPU."""
    done = subprocess.run([sys.executable, '-c', COMPILE], capture_output=True, text=True, cwd=ROOT,
                          timeout=900, env={**os.environ, 'TRITON_INTERPRET': '0',
                                            'TRITON_CACHE_DIR': str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [
        '_conv', '_conv_norm', '_conv_weight', '_gelu', '_grn_gelu_backward',
        '_grn_linear_backward', '_linear_gelu', '_linear_gelu_backward', '_linear_residual',
        '_map_sums', '_mlp', '_norm', '_norm_backward']
