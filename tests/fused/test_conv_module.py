"""mmcv's ConvModule on the fast path, with its parameters and numbers."""
from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip('mmcv')
from mmcv.cnn import ConvModule

from convnext_mm.fused import winograd
from convnext_mm.fused.conv_module import FusedConvModule, fuse_conv_modules


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    torch.manual_seed(0)
    # So that the small layers of the tests are computed as the recipes' are.
    monkeypatch.setattr(winograd, 'MIN_CHANNELS', 32)
    monkeypatch.setattr(winograd, 'MIN_CHANNELS_AMX', 32)
    monkeypatch.setattr(winograd, 'MIN_TILES', 64)


def pair(kernel: int = 3, norm: str | None = 'BN', act: str | None = 'ReLU', **kwargs
         ) -> tuple[ConvModule, FusedConvModule]:
    """A plain module with statistics, and its fused copy."""
    kwargs.setdefault('padding', kernel // 2 * kwargs.get('dilation', 1))
    plain = ConvModule(36, 40, kernel, norm_cfg=norm and dict(type=norm),
                       act_cfg=act and dict(type=act), **kwargs)
    if isinstance(plain.norm, nn.BatchNorm2d):
        for tensor in (plain.norm.running_mean, plain.norm.running_var, plain.norm.weight.data,
                       plain.norm.bias.data):
            tensor.uniform_(0.2, 1.5)
    fused = copy.deepcopy(plain)
    fuse_conv_modules(fused)
    assert type(fused) is FusedConvModule
    return plain, fused


def image(size: tuple[int, int] = (33, 38)) -> Tensor:
    return torch.randn(2, 36, *size)


OPTIONS = [{}, dict(kernel=1), dict(dilation=2), dict(norm=None), dict(act=None),
           dict(norm=None, act=None), dict(act='GELU'), dict(norm='SyncBN'), dict(norm='IN'),
           dict(stride=2), dict(padding=0), dict(padding_mode='reflect'), dict(groups=2),
           dict(order=('norm', 'conv', 'act')), dict(bias=True), dict(with_spectral_norm=True),
           dict(kernel=2)]


def gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Output, and gradients of the input and every parameter."""
    x = x.clone().requires_grad_()
    out = module(x)
    out.backward(torch.ones_like(out))
    return out, x.grad, *(p.grad for p in module.parameters())


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-3)).item()


@pytest.mark.filterwarnings('ignore:Unnecessary conv bias')
@pytest.mark.parametrize('options', OPTIONS)
def test_every_kind_of_module_computes_the_same(options):
    plain, fused = pair(**options)
    x = image()
    # SyncBN's training needs a GPU; in that of BN, a bias before it has no gradient.
    if options in (dict(norm='SyncBN'), dict(bias=True)):
        plain.eval(), fused.eval()
    for found, expected in zip(gradients(fused, x), gradients(plain, x), strict=True):
        assert relative(found, expected) < 1e-4 if options.get('act', 'ReLU') == 'ReLU' else 1e-5
    plain.eval(), fused.eval()
    fused.packed = True
    with torch.no_grad():
        for _ in range(2):
            assert relative(fused(x), plain(x)) < 1e-5
        assert relative(fused(x, activate=False), plain(x, activate=False)) < 1e-5
        assert relative(fused(x, norm=False), plain(x, norm=False)) < 1e-5
        with torch.autocast('cpu', torch.bfloat16):
            assert relative(fused(x), plain(x)) < 1e-2
        kept = ({}, dict(kernel=1), dict(dilation=2), dict(norm=None), dict(act=None),
                dict(norm=None, act=None), dict(norm='SyncBN'), dict(bias=True))
        assert (fused._packed is not None) == (options in kept)


@torch.no_grad()
def test_folded_norms_are_up_to_date():
    plain, fused = (m.eval() for m in pair())
    fused.packed, x = True, image()
    first = fused(x)
    packed = fused._packed
    assert fused(x).equal(first)
    assert fused._packed is packed, 'folded once'
    for tensor in (fused.norm.running_mean, fused.norm.running_var, fused.norm.bias,
                   fused.conv.weight):
        tensor.mul_(1.5)
        plain.load_state_dict(fused.state_dict())
        assert torch.allclose(fused(x), plain(x), atol=3e-5)
        assert fused._packed is not packed
        packed = fused._packed
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert other._packed is None
        assert torch.equal(other(x), fused(x))
    assert fused.state_dict().keys() == plain.state_dict().keys()


def test_a_norm_is_folded_only_where_nobody_would_notice():
    _, fused = pair()
    fused.packed, x = True, image()
    fused.eval()
    with torch.no_grad():
        fused.norm.train()
        fused(x)
        assert fused._packed is None, 'the norm updates its statistics'
        fused.eval()
        seen = []
        for layer in (fused.conv, fused.norm, fused.activate):
            hook = layer.register_forward_hook(lambda *args: seen.append(args[0]))
            fused(x)
            hook.remove()
        assert seen == [fused.conv, fused.norm, fused.activate]
        assert fused._packed is None
    fused(x)
    assert fused._packed is None, 'gradients are enabled'
    with torch.no_grad():
        fused(x)
        assert fused._packed is not None


@pytest.mark.parametrize('packed', [False, True])
def test_the_output_has_the_layout_of_the_input(packed):
    _, fused = pair(norm=None)
    fused.packed, x = packed, image()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert fused.train(grad)(x).is_contiguous()
            assert fused(x.contiguous(memory_format=torch.channels_last)).is_contiguous(
                memory_format=torch.channels_last)


def test_large_convolutions_use_fewer_products(monkeypatch):
    calls = []
    original = winograd.convolution
    monkeypatch.setattr(winograd, 'convolution',
                        lambda *args: calls.append(1) or original(*args))
    _, fused = pair()
    x = image().requires_grad_()
    fused(x).sum().backward()
    assert len(calls) == 2 * winograd.suits(x, 40), 'output and gradient of the input'
    calls.clear()
    fused(torch.randn(1, 36, 5, 5))
    assert not calls


@pytest.mark.slow
def test_compiled_and_exported_modules_run_the_plain_layers():
    plain, fused = (m.eval() for m in pair())
    x = image()
    with torch.no_grad():
        assert torch.allclose(torch.compile(fused)(x), plain(x), atol=3e-5)
        assert torch.allclose(torch.export.export(fused, (x,)).module()(x), plain(x), atol=3e-5)
        assert torch.allclose(torch.jit.trace(fused, x, check_trace=False)(x), plain(x), atol=3e-5)
