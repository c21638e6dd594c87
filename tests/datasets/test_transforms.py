"""The faster transforms give what mmseg's and mmdet's give, to the last bit."""
import copy
import pickle
import random
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope, init_default_scope

from convnext_mm import UserError
from convnext_mm.datasets.transforms import use_faster_transforms
from convnext_mm.engine.checks import read_config
from tests.helpers import DETECTION, ROOT, SEGMENTATION


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """A photograph-like JPEG and a mask with every value that matters."""
    folder = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / 'image.jpg'), cv2.resize(coarse, (400, 300)))
    classes = rng.choice([0, 1, 2, 3, 149, 150, 151, 254, 255], (3, 4)).astype(np.uint8)
    cv2.imwrite(str(folder / 'mask.png'),
                cv2.resize(classes, (400, 300), interpolation=cv2.INTER_NEAREST))
    return folder


def build(config, mode, toolbox, replace=None):
    """The pipeline of a recipe, mmseg's or mmdet's own, and with our transforms."""
    DefaultScope._instance_dict.clear()
    init_default_scope(toolbox)
    __import__(f'{toolbox}.datasets')
    registry = __import__(f'{toolbox}.registry', fromlist=['TRANSFORMS']).TRANSFORMS
    steps = read_config(str(ROOT / config))[f'{mode}_dataloader'].dataset.pipeline
    steps = [{**step, **(replace or {}).get(step['type'], {})} for step in steps]
    stock, ours = ([registry.build(copy.deepcopy(step)) for step in steps] for _ in range(2))
    use_faster_transforms(SimpleNamespace(pipeline=ours))
    changed = {type(b).__name__ for a, b in zip(stock, ours, strict=True) if type(a) is not type(b)}
    return stock, ours, changed


def run(steps, seed, results):
    """The results, and the random numbers that follow."""
    np.random.seed(seed)
    random.seed(seed)
    torch.manual_seed(seed)
    results = copy.deepcopy(results)
    for step in steps:
        results = step(results)
    return results, (np.random.random(), random.random(), torch.rand(1).item())


def assert_equal(stock, ours):
    a, b = stock['inputs'], ours['inputs']
    assert a.is_contiguous() == b.is_contiguous()
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    a, b = stock['data_samples'], ours['data_samples']
    assert a.metainfo == b.metainfo
    assert a.keys() == b.keys()
    for name in a.keys():  # noqa: SIM118 - not a dict
        for key, value in a.get(name).items():
            other = b.get(name).get(key)
            if hasattr(value, 'masks'):
                assert len(value) == len(other)
                assert (value.height, value.width) == (other.height, other.width)
                value, other = torch.from_numpy(value.masks.copy()), torch.from_numpy(
                    other.masks.copy())
            value, other = getattr(value, 'tensor', value), getattr(other, 'tensor', other)
            torch.testing.assert_close(value, other, rtol=0, atol=0)


@pytest.mark.parametrize('label_map', [None, {0: 3, 2: 255, 149: 0}])
@pytest.mark.parametrize('reduce', [True, False])
@pytest.mark.parametrize('mode', ['train', 'test'])
def test_segmentation(pictures, mode, reduce, label_map):
    small = dict(LoadAnnotations=dict(reduce_zero_label=reduce),
                 RandomResize=dict(scale=(512, 192)), RandomCrop=dict(crop_size=(128, 160)))
    stock, ours, changed = build(SEGMENTATION, mode, 'mmseg', small)
    assert changed == {'LoadAnnotations', 'PackSegInputs'} | (
        {'RandomCrop', 'PhotoMetricDistortion'} if mode == 'train' else set())
    results = dict(img_path=str(pictures / 'image.jpg'), seg_map_path=str(pictures / 'mask.png'),
                   reduce_zero_label=reduce, label_map=label_map, seg_fields=[])
    for seed in range(40 if mode == 'train' else 1):
        (a, after), (b, after_ours) = run(stock, seed, results), run(ours, seed, results)
        assert after == after_ours
        assert_equal(a, b)


def test_a_loader_of_another_label_range_is_mmsegs_error(pictures):
    stock, ours, _ = build(SEGMENTATION, 'test', 'mmseg')
    results = dict(img_path=str(pictures / 'image.jpg'), seg_map_path=str(pictures / 'mask.png'),
                   reduce_zero_label=False, label_map=None, seg_fields=[])
    for steps in (stock, ours):
        with pytest.raises(AssertionError, match='reduce_zero_label'):
            run(steps, 0, results)


def instances(seed):
    """Objects of every kind: polygons, several parts, RLE, at the border, invalid, ignored."""
    rng = np.random.default_rng(seed)
    found = []
    for kind in ('polygon', 'parts', 'rle', 'outside', 'invalid', 'ignored', 'dot'):
        parts = []
        for _ in range(1 + (kind == 'parts')):
            center, radius = rng.uniform([40, 40], [360, 260]), rng.uniform(5, 60)
            center = [2.0, 298.0] if kind == 'outside' else center
            radius = 0.4 if kind == 'dot' else radius
            angle = np.sort(rng.uniform(0, 2 * np.pi, 12))
            parts.append(np.stack([center[0] + radius * np.cos(angle),
                                   center[1] + radius * np.sin(angle)], 1).ravel().tolist())
        mask = [[1.0, 2.0, 3.0]] if kind == 'invalid' else parts
        if kind == 'rle':
            mask = dict(size=[300, 400], counts=[int(rng.integers(1, 60_000)), 7000, 2000, 900])
            mask['counts'].append(120_000 - sum(mask['counts']))
        xs, ys = np.array(parts[0][::2]), np.array(parts[0][1::2])
        found.append(dict(bbox=[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], bbox_label=1,
                          mask=mask, ignore_flag=int(kind == 'ignored')))
    return found


@pytest.mark.parametrize('mode', ['train', 'test'])
def test_detection(pictures, mode):
    pytest.importorskip('mmdet')
    stock, ours, changed = build(DETECTION, mode, 'mmdet')
    assert changed == {'LoadAnnotations', 'PackDetInputs'}
    for seed in range(12):
        results = dict(img_path=str(pictures / 'image.jpg'), img_id=0, height=300, width=400,
                       instances=instances(seed) if seed else [])
        (a, after), (b, after_ours) = run(stock, seed, results), run(ours, seed, results)
        assert after == after_ours
        if a is None or b is None:  # a crop without objects
            assert a is b
            continue
        assert_equal(a, b)


@pytest.mark.parametrize(('method', 'args'), [
    ('rescale', ((90, 70),)), ('rescale', (1.7,)), ('resize', ((33, 91),)),
    ('resize', ((33, 91), 'bilinear')), ('flip', ('horizontal',)), ('flip', ('vertical',)),
    ('flip', ('diagonal',)), ('pad', ((80, 99),)), ('pad', ((80, 99), 1)),
    ('crop', (np.array([5, 6, 40, 30]),)), ('__getitem__', (np.array([True, False, True]),)),
    ('__getitem__', (np.array([2, 0]),)), ('__getitem__', (np.arange(3),)), ('__getitem__', (1,))])
@pytest.mark.parametrize('count', [3, 0])
def test_masks(method, args, count):
    pytest.importorskip('mmdet')
    from mmdet.structures.mask import BitmapMasks

    from convnext_mm.detection.transforms import BitmapMasks as Ours
    if not count and method == '__getitem__':
        return
    masks = (np.random.default_rng(0).random((count, 60, 80)) > 0.7).astype(np.uint8)
    masks[:, :, :9] = masks[:, 50:] = 0
    stock, ours = (getattr(cls(masks, 60, 80), method)(*args) for cls in (BitmapMasks, Ours))
    assert type(ours) is Ours
    assert (ours.height, ours.width) == (stock.height, stock.width)
    assert ours.masks.dtype == stock.masks.dtype
    np.testing.assert_array_equal(ours.masks, stock.masks)


def test_masks_that_nobody_reads_are_not_decoded(pictures):
    pytest.importorskip('mmdet')
    _, ours, _ = build(DETECTION, 'test', 'mmdet')
    results = dict(img_path=str(pictures / 'image.jpg'), img_id=0, height=300, width=400,
                   instances=instances(1))
    masks = run(ours, 0, results)[0]['data_samples'].gt_instances.masks
    assert masks.decoded is None
    sent = pickle.loads(pickle.dumps(masks))  # as a worker of a data loader does
    assert sent.decoded is None
    np.testing.assert_array_equal(sent.masks, masks.masks)
    masks.masks = masks.masks[:1] * 0
    assert len(masks) == 1
    assert not masks.masks.any()


def test_a_mask_of_another_size_is_an_error():
    pytest.importorskip('mmdet')
    from convnext_mm.detection.transforms import EncodedMasks
    masks = EncodedMasks([dict(size=[4, 6], counts=[10, 5, 9])], (6, 4), 'a.jpg')
    with pytest.raises(UserError, match=r'a\.jpg: a mask of 6×4 pixels for an image of 4×6'):
        masks.masks  # noqa: B018


def test_transforms_inside_of_others_are_replaced_and_subclasses_are_not():
    from mmcv.transforms import RandomChoice
    from mmseg.datasets.transforms import PhotoMetricDistortion

    class Mine(PhotoMetricDistortion):
        pass
    choice = RandomChoice([[PhotoMetricDistortion()], [Mine()]])
    inner = SimpleNamespace(pipeline=SimpleNamespace(transforms=[choice]))
    use_faster_transforms(SimpleNamespace(datasets=[SimpleNamespace(dataset=inner)]))
    first, second = (branch.transforms[0] for branch in choice.transforms)
    assert type(first).__module__ == 'convnext_mm.segmentation.transforms'
    assert type(second) is Mine
