"""The segmentor predicts what mmseg's does, without maps of all classes at the image's size."""
from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from torch import Tensor, nn

pytest.importorskip('mmseg')
from mmengine.config import Config
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from convnext_mm.engine import speed
from convnext_mm.fused.resampling import interpolation
from convnext_mm.precision import DTYPES, set_inference_dtype
from convnext_mm.segmentation import segmentor, stitching
from convnext_mm.segmentation.segmentor import EncoderDecoder
from convnext_mm.segmentation.stitching import Axis, window_starts

WHOLE = dict(mode='whole')
MODES = [WHOLE, dict(mode='slide', crop_size=(64, 96), stride=(43, 64)),
         dict(mode='slide', crop_size=(64, 64), stride=(20, 20), window_batch=3),
         dict(mode='slide', crop_size=(512, 512), stride=(341, 341))]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
    init_default_scope('mmseg')


def config(ours: bool, mode: dict[str, Any], classes: int = 19, align_corners: bool = False
           ) -> ConfigDict:
    scope = 'convnext_mm.' if ours else ''
    binary = dict(out_channels=1, threshold=0.5, loss_decode=dict(
        type='CrossEntropyLoss', use_sigmoid=True)) if classes == 2 else {}
    return ConfigDict(
        type=f'{scope}EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', mean=[0] * 3, std=[255] * 3, pad_val=0,
                               seg_pad_val=255),
        backbone=dict(type='ConvNeXt', depths=[1, 1, 1, 1], dims=[8, 16, 24, 32]),
        decode_head=dict(
            type=f'{scope}UPerHead', in_channels=[8, 16, 24, 32], in_index=[0, 1, 2, 3],
            channels=32, num_classes=classes, norm_cfg=dict(type='BN'),
            align_corners=align_corners, **binary),
        test_cfg=dict(mode))


def build(*args: Any) -> Any:
    torch.manual_seed(0)
    model = MODELS.build(config(*args))
    model.init_weights()
    nn.init.normal_(model.decode_head.conv_seg.weight, std=0.5)
    return model.eval()


def pair(*args: Any) -> tuple[Any, EncoderDecoder]:
    """mmseg's segmentor and ours, with the same weights."""
    stock, ours = build(False, *args), build(True, *args)
    assert list(stock.state_dict()) == list(ours.state_dict())
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def images(size: tuple[int, int], count: int = 2) -> Tensor:
    """Smooth images, on which the classes form regions."""
    noise = torch.rand(count, 3, max(size[0] // 16, 1), max(size[1] // 16, 1))
    return F.interpolate(noise, size=size, mode='bicubic')


def samples(size, *originals, padding=(0, 0, 0, 0), flip=None) -> list[SegDataSample]:
    return [SegDataSample(metainfo=dict(
        ori_shape=original, img_shape=size, pad_shape=size, padding_size=padding,
        flip=flip is not None, flip_direction=flip)) for original in originals]


INPUTS = [
    dict(size=(133, 201), originals=((133, 201), (140, 201))),
    dict(size=(133, 201), originals=((400, 77), (407, 77)), flip='horizontal'),
    dict(size=(160, 224), originals=((90, 511), (97, 511)), padding=(3, 20, 5, 22),
         flip='vertical')]


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('classes', [2, 19])
@pytest.mark.parametrize('align_corners', [False, True])
@torch.no_grad()
def test_class_maps_are_those_of_mmseg(mode, classes, align_corners):
    stock, ours = pair(mode, classes, align_corners)
    for options in INPUTS:
        size, originals, *_ = options.values()
        x = images(size)
        rest = {key: value for key, value in options.items() if key not in ('size', 'originals')}
        expected, found = (model.predict(x, samples(size, *originals, **rest))
                           for model in (stock, ours))
        for a, b, original in zip(expected, found, originals, strict=True):
            a, b = a.pred_sem_seg.data, b.pred_sem_seg.data
            assert b.shape == a.shape == (1, *original)
            assert b.dtype == a.dtype
            assert len(a.unique()) > 1 or 'padding' in options
            assert (a == b).double().mean() >= 0.99999
    assert all('seg_logits' in a and 'seg_logits' not in b
               for a, b in zip(expected, found, strict=True))
    a, b = (model.predict(x)[0].pred_sem_seg.data for model in (stock, ours))
    assert (a == b).double().mean() >= 0.99999, 'without data samples'


@torch.no_grad()
def test_bf16():
    stock, ours = pair(MODES[1])
    x = images((133, 201), 1)
    with torch.autocast('cpu', torch.bfloat16):
        a, b = (m.predict(x, samples((133, 201), (133, 201)))[0].pred_sem_seg.data
                for m in (stock, ours))
    assert (a == b).double().mean() > 0.97


@torch.no_grad()
def test_logits_are_kept_on_request():
    stock, ours = pair(dict(MODES[1], seg_logits=True))
    x = images((133, 201), 1)
    a, b = (m.predict(x, samples((133, 201), (99, 120)))[0] for m in (stock, ours))
    scale = a.seg_logits.data.abs().max()
    assert (a.seg_logits.data - b.seg_logits.data).abs().max() / scale < 1e-5
    assert torch.equal(a.pred_sem_seg.data, b.pred_sem_seg.data)


@torch.no_grad()
def test_test_time_augmentation_gets_logits():
    def predict(ours: bool) -> Tensor:
        cfg = Config(dict(model=dict(type='SegTTAModel', module=config(ours, WHOLE))))
        speed.request_logits(cfg)
        assert ('seg_logits' in cfg.model.module.test_cfg) == ours
        torch.manual_seed(0)
        model = MODELS.build(cfg.model).eval()
        torch.manual_seed(1)
        x = [image * 255 for image in images((64, 96), 1)]
        views = [samples((64, 96), (64, 96), flip=flip) for flip in (None, 'horizontal')]
        for view in views:
            view[0].set_metainfo(dict(img_path='x.png'))
        data = dict(inputs=[x, [image.flip(2) for image in x]], data_samples=views)
        return model.test_step(data)[0].pred_sem_seg.data
    assert (predict(True) == predict(False)).double().mean() > 0.999
    plain = Config(dict(model=config(True, WHOLE)))
    speed.request_logits(plain)
    assert 'seg_logits' not in plain.model.test_cfg


@torch.no_grad()
def test_own_ways_to_predict_are_kept():
    class Own(EncoderDecoder):
        def encode_decode(self, inputs, metas):
            return super().encode_decode(inputs, metas) * 0 + torch.arange(19.)[:, None, None]
    model = build(True, MODES[1])
    model.__class__ = Own
    found = model.predict(images((70, 100), 1), samples((70, 100), (70, 100)))[0]
    assert found.pred_sem_seg.data.unique().tolist() == [18]
    assert 'seg_logits' in found

    class Head(type(model.decode_head)):
        def predict_by_feat(self, logits, metas):
            return super().predict_by_feat(-logits, metas)
    stock, model = pair(WHOLE)
    stock.decode_head.conv_seg.weight.neg_(), stock.decode_head.conv_seg.bias.neg_()
    model.decode_head.__class__ = Head
    x = images((70, 100), 1)
    a, b = (m.predict(x, samples((70, 100), (70, 100)))[0].pred_sem_seg.data
            for m in (stock, model))
    assert (a == b).double().mean() > 0.999


def test_losses_are_mmsegs():
    stock, ours = pair(WHOLE)
    for model in (stock, ours):
        model.decode_head.dropout = None
        assert type(model).loss is MODELS.get('EncoderDecoder').loss
    x = images((64, 96))
    labels = torch.randint(0, 19, (2, 1, 64, 96))
    from mmengine.structures import PixelData
    batch = samples((64, 96), (64, 96), (64, 96))
    for sample, label in zip(batch, labels, strict=True):
        sample.gt_sem_seg = PixelData(data=label)
    a, b = (model.loss(x, batch)['decode.loss_ce'] for model in (stock, ours))
    assert torch.allclose(a, b, rtol=1e-5)


@torch.no_grad()
def test_no_map_of_all_classes_has_the_size_of_the_image():
    _, ours = pair(dict(mode='slide', crop_size=(64, 64), stride=(43, 43)))
    largest, size = [], (512, 640)

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                largest.append(out.untyped_storage().nbytes())
            return out
    x = images(size, 1)
    with Sizes():
        ours.predict(x, samples(size, size))
    # Two rows of windows of logits at a stride of 4, both overlapping by half.
    assert max(largest) <= max(x.numel() * 4, 8 * size[0] * size[1])


@pytest.mark.parametrize('preprocessor', [
    dict(bgr_to_rgb=True), dict(test_cfg=dict(size=(160, 90))),
    dict(test_cfg=dict(size_divisor=32), pad_val=7),
    dict(type='MultiBandPreprocessor', base='SegDataPreProcessor', mean=[1., 2., 3.],
         std=[4., 5., 6.])])
@torch.no_grad()
def test_windows_of_large_pictures_are_normalized_one_by_one(preprocessor, monkeypatch):
    model = build(True, MODES[1])
    model.data_preprocessor = MODELS.build(dict(
        dict(type='SegDataPreProcessor', mean=[120, 110, 100], std=[60, 50, 40]), **preprocessor))
    image = (images((133, 201), 1)[0] * 255).clip(0, 255).byte()

    def predict() -> tuple[Tensor, dict]:
        sample = samples((133, 201), (70, 210))
        found = model.test_step(dict(inputs=[image], data_samples=sample))[0]
        assert torch.equal(found.pred_sem_seg.data, model.val_step(
            dict(inputs=[image], data_samples=samples((133, 201), (70, 210))))[0].pred_sem_seg.data)
        return found.pred_sem_seg.data, found.metainfo
    expected, meta = predict()
    assert len(expected.unique()) > 1
    largest, shown = [], []
    normalize = type(model.data_preprocessor).forward
    monkeypatch.setattr(type(model.data_preprocessor), 'forward', lambda self, data, *args: (
        largest.append(data['inputs'][0].shape), normalize(self, data, *args))[1])
    monkeypatch.setattr(segmentor, 'LARGE_PICTURE', 100)
    model.progress = lambda rows, total: (shown.append(total), rows)[1]
    found, large_meta = predict()
    assert torch.equal(found, expected)
    assert found.dtype == expected.dtype
    assert max(shape[1] for shape in largest) <= 64
    assert max(shape[2] for shape in largest) <= 96
    assert shown == [70, 70]
    largest.clear()
    with torch.enable_grad():
        model.test_step(dict(inputs=[image], data_samples=samples((133, 201), (70, 210))))
    assert largest == [(3, 133, 201)], "mmseg's way, with gradients"
    assert large_meta.get('img_padding_size') == meta.get('img_padding_size')


@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
@torch.no_grad()
def test_class_maps_by_rows_are_those_of_whole_pictures(dtype):
    model = build(True, MODES[1])
    dtypes = set()
    model.decode_head.conv_seg.register_forward_pre_hook(
        lambda layer, args: dtypes.add(args[0].dtype))
    set_inference_dtype(model, dtype)
    image = (images((133, 201), 1)[0] * 255).clip(0, 255).byte()
    expected = model.test_step(dict(inputs=[image], data_samples=samples(
        (133, 201), (133, 201))))[0].pred_sem_seg.data[0]
    tops = []

    def read(top, bottom, left, right):
        tops.append(top)
        return image[:, top:bottom, left:right]
    assert model.reads_windows()
    rows = list(model.class_rows(read, 133, 201))
    assert dtypes == {DTYPES[dtype]}
    assert torch.equal(torch.cat([classes for _, classes in rows]), expected)
    assert [block.start for block, _ in rows] == list(range(0, 133, stitching.CPU_BLOCK[0]))
    assert tops == sorted(tops)
    assert set(tops) == {0, 43, 69}
    for change in (lambda: model.test_cfg.update(seg_logits=True),
                   lambda: model.register_forward_hook(print)):
        change()
        assert not model.reads_windows()
        model.test_cfg.pop('seg_logits', None)


@pytest.mark.parametrize(('length', 'crop', 'stride', 'expected'), [
    (100, 64, 43, [(0, 64), (36, 100)]), (64, 64, 43, [(0, 64)]), (30, 64, 43, [(0, 30)]),
    (107, 64, 43, [(0, 64), (43, 107)]), (108, 64, 43, [(0, 64), (43, 107), (44, 108)])])
def test_windows_are_those_of_mmsegs_slide_mode(length, crop, stride, expected):
    assert list(window_starts(length, crop, stride)) == expected


@pytest.mark.parametrize('flipped', [False, True])
def test_an_axis_is_resized_windows_averaged_cropped_flipped_and_resized(flipped):
    windows, length, size = [(0, 30), (12, 42), (20, 50)], 8, 50
    axis = Axis(windows, length, False, (3, 45), flipped, 77)
    full, count = torch.zeros(size, 3 * length), torch.zeros(size, 1)
    for i, (a, b) in enumerate(windows):
        full[a:b, i * length:(i + 1) * length] += torch.from_numpy(
            interpolation(length, b - a, False))
        count[a:b] += 1
    cropped = (full / count)[3:45]
    expected = torch.from_numpy(interpolation(42, 77, False)) @ (
        cropped.flip(0) if flipped else cropped)
    found = torch.zeros(77, 3 * length)
    for start in range(0, 77, 10):
        used, weights = axis.block(start, min(start + 10, 77))
        found[start:start + 10, used] = torch.from_numpy(weights)
    assert torch.allclose(found, expected, atol=1e-6)
    assert stitching.CPU_BLOCK[0] > 1
