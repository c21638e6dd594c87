"""Inference in bf16 or fp16: one key of a config, for all that predicts with it."""
import pytest
import torch
from mmdet.apis import DetInferencer
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.apis import MMSegInferencer

from convnext_mm import UserError
from convnext_mm.engine.checks import read_config
from convnext_mm.engine.runner import ConvNeXtRunner
from convnext_mm.engine.speed import enable_packed_inference
from convnext_mm.fused.packed import PackedBlock
from convnext_mm.precision import check_dtype, reset_inference_dtype, set_inference_dtype
from convnext_mm.resolution import resolve
from tests.detectors import build_detector
from tests.helpers import (
    DEMO_DETECTION,
    DEMO_SEGMENTATION,
    ROOT,
    build_model,
    predict,
    run_tool,
)

CASES = [(DEMO_SEGMENTATION, 'mmseg'), (DEMO_DETECTION, 'mmdet')]


def build(config, **options):
    return build_model(config, options)


def dtypes_of(model, name):
    """The dtypes that a layer returns during predictions."""
    found = set()
    model.get_submodule(name).register_forward_hook(
        lambda layer, args, output: found.add(output.dtype))
    return found


LAYERS = {DEMO_SEGMENTATION: ('decode_head.lateral_convs.0', 'decode_head.conv_seg'),
          DEMO_DETECTION: ('neck.fpn_convs.0', 'rpn_head')}


@pytest.mark.parametrize(('config', 'scope'), CASES)
@pytest.mark.parametrize('packed', [False, True])
def test_products_are_in_bf16_and_predictions_in_fp32(config, scope, packed):
    exact = predict(build(config), scope)
    model = build(config, inference_dtype='bf16')
    names = list(model.state_dict())
    if packed:
        enable_packed_inference(model)
    inside = dtypes_of(model, LAYERS[config][0])
    found = predict(model, scope)
    assert inside == {torch.bfloat16}
    assert not torch.is_autocast_enabled('cpu')
    assert list(model.state_dict()) == names
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    blocks = [m._packed for m in model.modules() if getattr(m, '_packed', None)]
    kept = [one for _, one, _ in blocks if isinstance(one, PackedBlock)]
    assert bool(kept) is packed
    assert all(one.linear1[1].dtype == torch.bfloat16 for one in kept)
    if scope == 'mmseg':
        same = found.pred_sem_seg.data == exact.pred_sem_seg.data
        assert same.float().mean() > 0.9
        return
    found, exact = found.pred_instances, exact.pred_instances
    assert found.bboxes.dtype == found.scores.dtype == torch.float32
    assert len(found) > 0
    nearest = torch.cdist(found.bboxes, exact.bboxes, p=float('inf')).min(1).values
    assert nearest.median() < 0.1, 'pixels'


def test_training_and_its_validations_are_as_before():
    model = build(DEMO_SEGMENTATION, inference_dtype='bf16')
    inside = dtypes_of(model, 'decode_head.lateral_convs.0')
    model.train()
    model(torch.zeros(2, 3, 64, 64), mode='tensor')
    assert inside == {torch.float32}
    reset_inference_dtype(model.eval())
    predict(model, 'mmseg')
    assert inside == {torch.float32}


def test_the_runner_resets_before_it_trains(monkeypatch):
    monkeypatch.setattr(Runner, 'train', lambda self: self.model)
    runner = ConvNeXtRunner.__new__(ConvNeXtRunner)
    runner._train_loop = runner._val_loop = None
    runner.model = build(DEMO_SEGMENTATION, inference_dtype='bf16')
    inside = dtypes_of(runner.model, 'decode_head.lateral_convs.0')
    predict(runner.train(), 'mmseg')
    assert inside == {torch.float32}


@pytest.mark.parametrize(('config', 'scope'), CASES)
def test_inferencers_follow_the_key(config, scope, tmp_path):
    (tmp_path / 'mine.py').write_text(
        f"_base_ = '{ROOT}/{config}'\ninference_dtype = 'bf16'\n"
        'model = dict(backbone=dict(init_cfg=None))')
    kind = MMSegInferencer if scope == 'mmseg' else DetInferencer
    settings = {} if scope == 'mmseg' else dict(palette='random')
    inferencer = kind(str(tmp_path / 'mine.py'), device='cpu', **settings)
    inside = dtypes_of(inferencer.model, LAYERS[config][0])
    predict(inferencer.model, scope)
    assert inside == {torch.bfloat16}


def test_a_config_with_the_key_is_resolved_once_and_again():
    cfg = read_config(DEMO_DETECTION, {'inference_dtype': 'bf16'})
    assert cfg.model.type == 'ModelInDtype'
    assert cfg.model.base == 'CascadeRCNN'
    cfg.inference_dtype = 'fp32'
    resolve(cfg)
    assert cfg.model.type == 'CascadeRCNN'
    assert 'inference_dtype' not in cfg.model


def test_wrong_dtypes_are_named(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="inference_dtype='bf61' is unknown. Did you mean bf16"):
        read_config(DEMO_SEGMENTATION, {'inference_dtype': 'bf61'})
    with pytest.raises(UserError, match='fp16 on a CPU is many times slower than fp32'):
        check_dtype('fp16', 'cpu')
    with pytest.raises(UserError, match='fp16 on a CPU'):  # an inferencer on a CPU
        predict(build(DEMO_SEGMENTATION, inference_dtype='fp16'), 'mmseg')
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **options: False)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'Tesla T4')
    with pytest.raises(UserError, match='bf16 is emulated on Tesla T4: use fp16'):
        check_dtype('bf16', 'cuda')
    check_dtype('fp16', 'cuda')
    (tmp_path / 'empty.pth').touch()
    done = run_tool('tools/test.py', DEMO_SEGMENTATION, tmp_path / 'empty.pth', '--dtype', 'fp16',
                    check=False)
    assert done.returncode == 2
    assert 'Error: inference_dtype=fp16 on a CPU' in done.stderr


@pytest.mark.parametrize('name', [
    'retinanet/retinanet_r50_fpn_1x_coco', 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco',
    'faster_rcnn/faster-rcnn_r50_fpn_1x_coco', 'dino/dino-4scale_r50_8xb2-12e_coco',
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco'])
def test_other_detectors_predict_in_bf16(name):
    init_default_scope('mmdet')
    model = build_detector(name).eval()
    enable_packed_inference(model)
    results = {}
    for dtype in ('fp32', 'bf16'):
        set_inference_dtype(model, dtype)
        results[dtype] = predict(model, 'mmdet').pred_instances
    assert {value.dtype for value in (results['bf16'].bboxes, results['bf16'].scores)} == {
        torch.float32}
    count = len(results['fp32'])
    assert abs(len(results['bf16']) - count) <= 0.1 * count
    if count:
        assert (results['bf16'].scores[:20] - results['fp32'].scores[:20]).abs().max() < 0.02


def test_errors_leave_autocast_off():
    model = build(DEMO_SEGMENTATION, inference_dtype='bf16')

    def fail(*args):
        raise RuntimeError
    model.decode_head.conv_seg.register_forward_hook(fail)
    with pytest.raises(RuntimeError):
        predict(model, 'mmseg')
    assert not torch.is_autocast_enabled('cpu')
