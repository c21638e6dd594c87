"""Fewer hidden channels with weights solved by least squares."""
import argparse
import copy
import re

import numpy as np
import pytest
import torch
from mmengine.config import Config

from convnext_mm import ConvNeXt, UserError
from convnext_mm.deployment import (
    arguments,
    head_pruning,
    least_squares,
    pruning,
    roi_head_pruning,
)
from convnext_mm.deployment.head_pruning import modules, prune_head
from convnext_mm.deployment.pruning import STEP, Counter, prune
from convnext_mm.engine.checks import read_config
from tests.helpers import DEMO_DETECTION, DEMO_SEGMENTATION, ROOT, build_model, call_tool

SIZE = dict(depths=[1, 2], dims=[16, 32], layer_scale_init_value=None)


def backbone(use_grn: bool, memory: str = 'plain') -> ConvNeXt:
    """A small backbone whose hidden channels differ in size."""
    torch.manual_seed(0)
    built = ConvNeXt(**SIZE, use_grn=use_grn, memory=memory)
    generator = torch.Generator().manual_seed(1)
    for stage in built.stages:
        for block in stage:
            hidden = block.pwconv1.out_features
            for name, weight in block.named_parameters():
                if name in ('gamma',):
                    weight.data.fill_(0.5)
                elif name != 'norm.weight':
                    weight.data.normal_(std=0.2, generator=generator)
            block.pwconv2.weight.data *= torch.logspace(0, -3, hidden)
    return built.eval()


def images(count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, 3, 64, 48, generator=generator) for _ in range(count)]


def cut(model: ConvNeXt, share: float) -> list[list[int]]:
    """Prune on images of noise."""
    def run(image):
        with torch.no_grad():
            model(image)
    return prune(model, images(), run, share)


def flops(model: ConvNeXt) -> int:
    counter = Counter(model)
    with counter, torch.no_grad():
        model(images()[0])
    return counter.total


@pytest.mark.parametrize('memory', ['plain', 'lean'])
@pytest.mark.parametrize('use_grn', [False, True])
@torch.no_grad()
def test_the_output_stays_while_flops_go(use_grn, memory):
    model = backbone(use_grn, memory)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    before, cost = model(x), flops(model)
    hidden = cut(model, 0.75)
    assert flops(model) <= 0.75 * cost
    assert flops(model) > 0.5 * cost
    assert all(n % STEP == 0 for stage in hidden for n in stage)
    assert [[block.pwconv1.out_features for block in stage] for stage in model.stages] == hidden
    for a, b in zip(before, model(x), strict=True):
        assert (a - b).norm() < 0.05 * a.norm()
    new = ConvNeXt(**SIZE, use_grn=use_grn, hidden_dims=hidden).eval()
    new.load_state_dict(model.state_dict())
    for a, b in zip(model(x), new(x), strict=True):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize('use_grn', [False, True])
@torch.no_grad()
def test_least_squares_is_better_than_leaving_out(use_grn):
    model, other = backbone(use_grn), backbone(use_grn)
    for built in (model, other):  # all channels matter
        for stage in built.stages:
            for block in stage:
                block.pwconv2.weight.data /= torch.logspace(0, -3, block.pwconv1.out_features)
    x = images(5)[4]
    before = model(x)
    cut(model, 0.7)
    for stage, kept in zip(other.stages, model.stages, strict=True):
        for block, small in zip(stage, kept, strict=True):
            gone = [i for i, row in enumerate(block.pwconv1.weight)
                    if not (small.pwconv1.weight == row).all(1).any()]
            assert gone
            block.pwconv2.weight[:, gone] = 0
    ours, theirs = ((a - b).norm() for a, b in ((model(x)[-1], before[-1]),
                                                (other(x)[-1], before[-1])))
    assert ours < 0.9 * theirs


@torch.no_grad()
def test_equal_channels_are_removed_without_a_loss():
    model = backbone(False)
    for stage in model.stages:
        for block in stage:
            half = block.pwconv1.out_features // 2
            block.pwconv2.weight /= torch.logspace(0, -3, 2 * half)
            for weight in (block.pwconv1.weight, block.pwconv1.bias, block.pwconv2.weight.t()):
                weight[half:] = weight[:half]
            block.pwconv2.weight[:, half:] *= 0.01
    x = images(5)[4]
    before = model(x)
    cut(model, 0.75)
    for a, b in zip(before, model(x), strict=True):
        assert (a - b).norm() < 0.02 * a.norm()


def test_as_many_channels_are_chosen_as_asked_for():
    """Also where fewer vary, and rounding leaves variances below zero."""
    x = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 100
    statistics = least_squares.Statistics.empty(40)
    statistics.add(x)
    weight = torch.eye(40, dtype=torch.double)
    use = least_squares.Use(statistics.covariance()[1] - 1e-3 * weight, weight)
    assert len(least_squares.select([use], 30)) == 30


def test_impossible_shares_and_sizes_are_refused():
    with pytest.raises(UserError, match=r'--flops 0.01 is impossible: with 32 hidden'):
        cut(backbone(False), 0.01)
    for wrong in ([[64]], [[64], [128]], [[64], [128, 0]], [[64], 128], 64):
        with pytest.raises(UserError, match='hidden_dims=.*as many as it has blocks'):
            ConvNeXt(**SIZE, hidden_dims=wrong)


def segmentor(twins: bool) -> torch.nn.Module:
    """A small UPerNet with random statistics; with ``twins``, of every channel there are two."""
    model = build_model(DEMO_SEGMENTATION, {'model.backbone.depths': [1, 1, 1, 1],
                                            'model.backbone.dims': [8, 16, 24, 32],
                                            'model.decode_head.channels': 16})
    generator = torch.Generator().manual_seed(3)
    for module in modules(model.decode_head).values():
        module.norm.running_mean.normal_(std=0.1, generator=generator)
        module.norm.running_var.uniform_(0.5, 2, generator=generator)
        for one in (module.conv.weight.data, *module.norm.state_dict().values()) if twins else ():
            if one.ndim:
                one[8:] = one[:8]
    return model


def smooth_images(count: int) -> list[torch.Tensor]:
    """Of several pixels in the last map."""
    generator = torch.Generator().manual_seed(2)
    return [torch.nn.functional.interpolate(torch.randn(1, 3, 8, 8, generator=generator),
                                            size=(128, 128), mode='bicubic') for _ in range(count)]


def cut_head(model: torch.nn.Module, channels: int) -> None:
    settings = read_config(DEMO_SEGMENTATION, {'model.backbone.dims': [8, 16, 24, 32]}
                           ).model.decode_head
    prune_head(model, settings, channels, smooth_images(40), lambda x: logits(model, x))


@torch.no_grad()
def logits(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.decode_head.forward(model.extract_feat(x))


def test_twins_in_the_head_are_removed_without_a_loss():
    model, x = segmentor(True), smooth_images(41)[40]
    before = logits(model, x)
    cut_head(model, 8)
    assert model.decode_head.channels == 8
    assert (logits(model, x) - before).norm() < 1e-3 * before.norm()


def with_and_without_least_squares(monkeypatch, module, error) -> list:
    """An error twice: with least squares, and with only the means of the channels that are gone.

    Args:
        module: Where the channels are chosen; the second time, they are the same.
        error: Prunes a model and says how far its outputs are from those before.
    """
    kept, errors = [], []

    def select(uses, count):
        kept.append(least_squares.select(uses, count))
        return kept[-1]

    for ridge, choice in (least_squares.RIDGE, select), (1e20, lambda uses, count: kept.pop(0)):
        monkeypatch.setattr(least_squares, 'RIDGE', ridge)
        monkeypatch.setattr(module, 'select', choice)
        errors.append(error())
    assert kept == []
    return errors


def test_a_head_makes_up_for_lost_channels(monkeypatch):
    def error():
        model, x = segmentor(False), smooth_images(41)[40]
        before = logits(model, x)
        cut_head(model, 12)
        return (logits(model, x) - before).norm()
    ours, theirs = with_and_without_least_squares(monkeypatch, head_pruning, error)
    assert ours < 0.9 * theirs


def test_heads_that_cannot_be_pruned_are_refused():
    model = segmentor(False)
    with pytest.raises(UserError, match='--head-channels 16: expected fewer than the head has, 16'):
        cut_head(model, 16)
    model.decode_head = model.auxiliary_head
    with pytest.raises(UserError, match='only a UPerHead with batch norms'):
        cut_head(model, 8)


def detector(twins: bool, config: str = DEMO_DETECTION) -> tuple[torch.nn.Module, dict]:
    """A small detector; with ``twins``, of every hidden channel of its RoI heads there are two."""
    options = {'model.backbone.depths': [1, 1, 1, 1], 'model.backbone.dims': [8, 16, 24, 32]}
    model = build_model(config, options)
    generator = torch.Generator().manual_seed(3)
    for head in roi_heads(model):
        for name, module in head.named_modules():
            if not isinstance(getattr(module, 'weight', None), torch.Tensor):
                continue
            tensors = module.state_dict(keep_vars=True)
            for key, value in tensors.items():
                if value.ndim:
                    value.data = torch.randn(value.shape, generator=generator) * (
                        2 / value[0].numel()) ** 0.5
                if key in ('running_var', 'weight') and value.ndim == 1:
                    value.data = value.data.abs() + 0.5
                last = name.endswith(('fc_cls', 'fc_reg', 'conv_logits'))
                if twins and value.ndim and not last:  # the outputs of a transposed convolution
                    outputs = value.data.transpose(0, 1) if name == 'upsample' and (
                        value.ndim > 1) else value.data
                    outputs[len(outputs) // 2:] = outputs[:len(outputs) // 2]
    return model, read_config(config, options).model.roi_head


def roi_heads(model: torch.nn.Module) -> list:
    return [*model.roi_head.bbox_head, *model.roi_head.mask_head]


def rois(size: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.nn.functional.interpolate(
        torch.randn(count, 64, 3, 3, generator=generator), size=(size, size), mode='bicubic')


@torch.no_grad()
def roi_outputs(model: torch.nn.Module, first: int = 0, last: int = 1000) -> list[torch.Tensor]:
    """What the heads say of maps of RoIs."""
    outputs = []
    for head in model.roi_head.bbox_head:
        outputs += head(rois(7, last)[first:])
    return outputs + [head(rois(14, last)[first:][:32]) for head in model.roi_head.mask_head]


def cut_roi_heads(model: torch.nn.Module, settings: dict, channels: int, run=None) -> dict:
    settings = copy.deepcopy(settings)
    for head in settings.bbox_head:
        head.norm_cfg.type = 'BN'
    return roi_head_pruning.prune_roi_heads(model, settings, channels, [None], run or (
        lambda image: roi_outputs(model)))


def test_twins_in_roi_heads_are_removed_without_a_loss():
    model, settings = detector(True)
    before = roi_outputs(model)
    changes = cut_roi_heads(model, settings, 16)
    assert changes == dict(bbox_head=[dict(conv_out_channels=16, fc_out_channels=128)] * 3,
                           mask_head=[dict(conv_out_channels=16)] * 3)
    for head in roi_heads(model):
        assert head.conv_out_channels == 16
    for new, old in zip(roi_outputs(model), before, strict=True):
        assert (new - old).norm() < 3e-3 * old.norm()
    written = roi_head_pruning.in_config(settings, changes)
    assert [head['norm_cfg']['type'] for head in written['bbox_head']] == ['SyncBN'] * 3
    assert written['mask_head'] == dict(conv_out_channels=16)


def test_roi_heads_make_up_for_lost_channels(monkeypatch):
    def error():
        model, settings = detector(False)
        before = roi_outputs(model, 1000, 1040)
        cut_roi_heads(model, settings, 20)
        return sum((new - old).norm() / old.norm() for new, old in zip(
            roi_outputs(model, 1000, 1040), before, strict=True))
    ours, theirs = with_and_without_least_squares(monkeypatch, roi_head_pruning, error)
    assert ours < 0.95 * theirs


@pytest.mark.parametrize('layer', ['conv', 'transposed', 'linear'])
@torch.no_grad()
def test_a_layer_without_a_channel_that_follows_from_others(layer):
    """The last of four is 2 × the first + 0.5; the padding of zeros would not follow."""
    old, new = ({'conv': torch.nn.Conv2d(n, 3, 3), 'linear': torch.nn.Linear(n * 36, 3),
                 'transposed': torch.nn.ConvTranspose2d(n, 3, 2, stride=2)}[layer] for n in (4, 3))
    if layer == 'transposed':  # a bias is the same at all of its positions
        old.weight.copy_(old.weight.mean((2, 3), keepdim=True).expand_as(old.weight))
    x = torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 2 * x[:, 0] + 0.5
    matrix, constant = torch.eye(4, 3, dtype=torch.double), torch.zeros(4, dtype=torch.double)
    matrix[3, 0], constant[3] = 2, 0.5
    head_pruning.copy_layer(new, old, None, matrix, constant, 36 if layer == 'linear' else 1)
    before, after = (model(maps.flatten(1) if layer == 'linear' else maps)
                     for model, maps in ((old, x), (new, x[:, :3])))
    assert (after - before).abs().max() < 1e-5


def test_roi_heads_that_cannot_be_pruned_are_refused():
    model, settings = detector(False)
    with pytest.raises(UserError, match='--head-channels 32: expected fewer than the heads have'):
        cut_roi_heads(model, settings, 32)
    with pytest.raises(UserError, match='FCBBoxHead was not used, since nothing is detected'):
        cut_roi_heads(model, settings, 16, lambda image: None)
    model.roi_head.mask_head[0].upsample_method = 'nearest'
    with pytest.raises(UserError, match='FCNMaskHead cannot be pruned'):
        cut_roi_heads(model, settings, 16)


def test_sizes_are_chosen_for_a_latency(monkeypatch):
    """Here the time is the number of the head's channels, 64 before."""
    tried = []

    def prune_model(model, settings, images, flops, channels):
        tried.append((flops, channels))
        model.decode_head.channels = channels
    monkeypatch.setattr(pruning, 'latency', lambda model, image: model.decode_head.channels)
    monkeypatch.setattr(pruning, 'prune_model', prune_model)
    model = torch.nn.Module()
    model.decode_head = torch.nn.Module()
    model.decode_head.channels = 64
    assert pruning.sizes_for_latency(model, {}, [], None, 50) == (0.8, 48)
    assert tried == [(0.9, 56), (0.8, 48)]
    assert model.decode_head.channels == 64
    with pytest.raises(UserError, match='--latency-ms 70: an image takes 64 ms already'):
        pruning.sizes_for_latency(model, {}, [], None, 70)
    with pytest.raises(UserError, match='--latency-ms 5: with 30 % an image takes 16 ms'):
        pruning.sizes_for_latency(model, {}, [], None, 5)


def test_options_that_exclude_each_other():
    def given(**options):
        return argparse.Namespace(**{**dict.fromkeys(('flops', 'head_channels', 'latency_ms')),
                                     **options})
    for options, message in (({}, 'nothing to prune'), (dict(flops=1.5), '--flops 1.5'),
                             (dict(latency_ms=9.0, flops=0.5), 'leave them out')):
        with pytest.raises(UserError, match=message):
            arguments.check_pruning(given(**options))
    arguments.check_pruning(given(latency_ms=9.0))


@pytest.mark.slow
def test_a_pruned_model_is_tested_as_its_config_says(demo_data, tmp_path):
    options = {'depths': [1, 1, 1, 1], 'dims': [16, 24, 32, 48],
               'data_root': str(demo_data / 'ADEChallengeData2016')}
    model = build_model(DEMO_SEGMENTATION, options)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    (tmp_path / 'mine.py').write_text(f'_base_ = {str(ROOT / DEMO_SEGMENTATION)!r}')

    def prune_to(folder, *more):
        return call_tool('tools/prune.py', tmp_path / 'mine.py', tmp_path / 'model.pth', '--flops',
                         '0.7', '--head-channels', '48', '--images', '4', '--out',
                         tmp_path / folder, '--cfg-options', *(
                             f'{key}={value}'.replace(' ', '') for key, value in options.items()),
                         *more)
    done = prune_to('small')
    assert done.returncode == 0, done.stderr
    assert prune_to('bf16', 'inference_dtype=bf16').returncode == 0
    weights, same = (torch.load(tmp_path / folder / 'pruned.pth', weights_only=True)['state_dict']
                     for folder in ('small', 'bf16'))
    assert all(weights[key].equal(same[key]) for key in weights)
    metric = re.search(r'mIoU: .* → (.*)', done.stdout)[1]
    config = tmp_path / 'small' / 'mine_pruned.py'
    cfg = read_config(str(config))
    assert np.sum([sum(stage) for stage in cfg.model.backbone.hidden_dims]) < 4 * 120
    assert cfg.model.decode_head.channels == 48
    done = call_tool('tools/test.py', config, tmp_path / 'small' / 'pruned.pth', '--work-dir',
                     tmp_path / 'work')
    assert done.returncode == 0, done.stderr
    assert re.search(rf'mIoU\S* +{metric}', done.stdout), done.stdout


def test_options_are_repeated_in_the_config():
    cfg = Config(dict(model=dict(heads=[dict(a=1), dict(a=2)]), size=3))
    options = {'model.heads.1.a': 2, 'size': 3, 'model.test_cfg.mode': 'whole'}
    found = pruning.inherited(cfg, options)
    assert found.to_dict() == dict(size=3, model=dict(
        heads=[dict(a=1), dict(a=2)], test_cfg=dict(mode='whole')))
