"""The heads compute what mmseg's do, with mmseg's parameters."""
from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mmengine.registry import init_default_scope
from torch import Tensor, nn

pytest.importorskip('mmseg')
from mmseg.registry import MODELS

from convnext_mm.fused import pyramid, winograd
from convnext_mm.fused.packed import Packable
from tests.helpers import saved_by

CHANNELS, SIZES = (32, 40, 48, 64), ((45, 61), (23, 31), (12, 16), (6, 8))
ALL = dict(in_channels=list(CHANNELS), in_index=[0, 1, 2, 3])
HEADS: list[tuple[str, dict[str, Any]]] = [
    ('UPerHead', ALL), ('UPerHead', dict(in_channels=[32, 64], in_index=[0, 3])),
    ('UPerHead', dict(in_channels=[64], in_index=[3])),
    ('SegformerHead', ALL), ('FPNHead', dict(ALL, feature_strides=[4, 8, 16, 32])),
    ('FCNHead', dict(ALL, input_transform='resize_concat', num_convs=2)),
    ('FCNHead', dict(in_channels=48, in_index=2))]


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    torch.manual_seed(0)
    # So that the small layers of the tests are computed as the recipes' are.
    monkeypatch.setattr(winograd, 'MIN_CHANNELS', 32)
    monkeypatch.setattr(winograd, 'MIN_CHANNELS_AMX', 32)
    monkeypatch.setattr(winograd, 'MIN_TILES', 64)
    init_default_scope('mmseg')


def pair(kind: str, **options: Any) -> tuple[Any, Any]:
    """mmseg's head with random parameters and statistics, and ours with the same."""
    options = dict(dict(channels=64, num_classes=7, norm_cfg=dict(type='BN')), **options)
    # Without kinks: where rounding flips the sign of a ReLU's input, gradients differ much.
    options.setdefault('act_cfg', dict(type='GELU'))
    stock, ours = (MODELS.build(dict(options, type=scope + kind))
                   for scope in ('', 'convnext_mm.'))
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data):
                tensor.uniform_(0.2, 1.5)
    nn.init.normal_(stock.conv_seg.weight, std=0.3)
    assert list(ours.state_dict()) == list(stock.state_dict())
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def maps(images: int = 2) -> list[Tensor]:
    return [torch.randn(images, c, *size) for c, size in zip(CHANNELS, SIZES, strict=True)]


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def run(head: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients; the same random numbers for dropout."""
    torch.manual_seed(1)
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = head(inputs)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
    return [out, *(x.grad for x in inputs if x.grad is not None),
            *(p.grad for p in head.parameters())]


@pytest.mark.parametrize(('kind', 'options'), HEADS)
@pytest.mark.parametrize('align_corners', [False, True])
def test_outputs_and_gradients_are_those_of_mmseg(kind, options, align_corners):
    stock, ours = pair(kind, align_corners=align_corners, **options)
    inputs = maps(4)  # with two, the norm after the pooling to one value has no gradient
    for training in (True, False):
        stock.train(training), ours.train(training)
        for a, b in zip(run(ours, inputs), run(stock, inputs), strict=True):
            assert relative(a, b) < 1e-5
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(
            ours.buffers(), stock.buffers(), strict=True)), 'statistics of the norms'


@pytest.mark.parametrize(('kind', 'options'), HEADS)
def test_with_relu_and_packed_weights(kind, options):
    stock, ours = pair(kind, act_cfg=dict(type='ReLU'), **options)
    inputs = maps()
    assert relative(run(ours, inputs)[0], run(stock, inputs)[0]) < 1e-5
    stock.eval(), ours.eval()
    for module in ours.modules():
        if isinstance(module, Packable):
            module.packed = True
    with torch.no_grad():
        assert relative(ours(inputs), stock(inputs)) < 1e-5
        with torch.autocast('cpu', torch.bfloat16):
            found, expected = ours(inputs), stock(inputs)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert relative(found, expected) < 2e-2


def test_the_weights_of_the_bottleneck_are_used_at_the_maps_own_size(monkeypatch):
    _, ours = pair('UPerHead', **ALL)
    sizes = []
    original = pyramid.convolution

    def convolution(inputs, weight, layout):
        sizes.append([tuple(x.shape[2:]) for x in inputs])
        return original(inputs, weight, layout)
    monkeypatch.setattr(pyramid, 'convolution', convolution)
    ours(maps())
    assert list(SIZES) in sizes
    assert [(6, 8), (1, 1), (2, 2), (3, 3), (6, 6)] in sizes, 'of the pooling, too'


@pytest.mark.parametrize('amp', [False, True])
def test_training_saves_less(amp):
    torch.manual_seed(0)
    options = dict(ALL, norm_cfg=dict(type='BN'), num_classes=20, channels=128)
    inputs = [torch.randn(2, c, 64 >> i, 64 >> i, requires_grad=True)
              for i, c in enumerate(CHANNELS)]
    stock, ours = (saved_by(lambda head=head: head(inputs), list(head.parameters()), amp)
                   for head in (MODELS.build(dict(options, type=kind))
                                for kind in ('UPerHead', 'convnext_mm.UPerHead')))
    assert ours < 0.6 * stock


@pytest.mark.parametrize(('kind', 'options'), [HEADS[0], HEADS[3], HEADS[5]])
def test_hooks_and_replaced_layers_run_mmsegs_code(kind, options):
    stock, ours = pair(kind, **options)
    stock.eval(), ours.eval()
    name = dict(UPerHead='fpn_bottleneck', SegformerHead='fusion_conv', FCNHead='convs.0')[kind]
    inputs = maps()
    expected = stock(inputs)
    for place in (name, f'{name}.conv'):
        seen = []
        hook = ours.get_submodule(place).register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(tuple(args[0].shape[1:])))
        assert relative(ours(inputs), expected) < 1e-5
        hook.remove()
        channels = sum(CHANNELS) if kind == 'FCNHead' else 4 * 64
        assert seen == [(channels, *SIZES[0])], 'the concatenated map'
    module = ours.get_submodule(name)
    module.conv = nn.Sequential(module.conv)
    assert relative(ours(inputs), expected) < 1e-5


def test_frozen_and_synchronized_norms():
    stock, ours = pair('UPerHead', **ALL)
    for head in (stock, ours):
        head.eval().dropout = None
        for module in head.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
    for a, b in zip(run(ours, maps()), run(stock, maps()), strict=True):
        assert (a is None) == (b is None)
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(ours))
    inputs = maps()
    with torch.no_grad():
        expected = ours(inputs)
        for module in synchronized.modules():
            if isinstance(module, Packable):
                module.packed = True
        assert relative(synchronized(inputs), expected) < 1e-5


def train_distributed(rank: int, folder: str) -> None:
    """One of two processes, each with one image; the first saves the gradients."""
    torch.set_num_threads(1)
    init_default_scope('mmseg')
    dist.init_process_group('gloo', init_method=f'file://{folder}/store', rank=rank, world_size=2,
                            timeout=timedelta(seconds=100))
    torch.manual_seed(0)
    _, ours = pair('UPerHead', **ALL)
    wrapped = nn.parallel.DistributedDataParallel(ours.eval())
    torch.manual_seed(3)
    wrapped([x[rank:rank + 1] for x in maps()]).square().sum().backward()
    if rank == 0:
        torch.save([p.grad for p in ours.parameters()], f'{folder}/gradients.pt')
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_mmsegs_head(tmp_path):
    torch.multiprocessing.spawn(train_distributed, (str(tmp_path),), 2, daemon=True)
    stock, _ = pair('UPerHead', **ALL)
    torch.manual_seed(3)
    stock.eval()(maps()).square().sum().div(2).backward()
    found = torch.load(tmp_path / 'gradients.pt')
    for a, b in zip(found, stock.parameters(), strict=True):
        assert relative(a, b.grad) < 1e-5


@pytest.mark.slow
@torch.no_grad()
def test_compiled_and_exported_heads():
    stock, ours = pair('UPerHead', **ALL)
    stock.eval(), ours.eval()
    inputs = maps()
    expected = stock(inputs)
    assert relative(torch.compile(ours)(inputs), expected) < 1e-5
    exported = torch.export.export(ours, (inputs,)).module()
    assert relative(exported(inputs), expected) < 1e-5


def test_one_key_chooses_ours_and_its_arguments_are_mmsegs():
    options = dict(ALL, channels=8, num_classes=3)
    head = MODELS.build(dict(options, type='convnext_mm.UPerHead', packed=True))
    assert isinstance(head, MODELS.get('UPerHead'))
    assert head.fpn_bottleneck.packed
    assert not MODELS.build(dict(options, type='convnext_mm.UPerHead')).fpn_bottleneck.packed
    assert type(MODELS.build(dict(options, type='UPerHead'))) is MODELS.get('UPerHead')
