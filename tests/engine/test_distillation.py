"""Training with a teacher."""
from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS, init_default_scope

import convnext_mm as cm
from convnext_mm.engine import cfg_options, distillation
from convnext_mm.engine.checks import read_config
from convnext_mm.errors import UserError
from convnext_mm.key_values import parse_value
from tests.helpers import (
    DEMO_DETECTION,
    DEMO_SEGMENTATION,
    SMALL_DETECTION,
    SMALL_SEGMENTATION,
)

CASES = {'segmentation': (DEMO_SEGMENTATION, SMALL_SEGMENTATION, 'ADEChallengeData2016'),
         'detection': (DEMO_DETECTION, SMALL_DETECTION, 'coco/')}


def options(task: str, demo_data: Path) -> dict:
    """Options of a small model on the demo's data."""
    pairs = (pair.partition('=') for pair in CASES[task][1])
    return {'data_root': f'{demo_data}/{CASES[task][2]}', 'seed': 0, 'num_workers': 0,
            **{key: parse_value(value) for key, _, value in pairs}}


@pytest.fixture(scope='module')
def teachers(demo_data, tmp_path_factory) -> dict[str, tuple[str, str]]:
    """{task: (config, checkpoint)} of untrained teachers of another width than the students."""
    made = {}
    for task, (config, *_) in CASES.items():
        folder = tmp_path_factory.mktemp(task)
        wide = {**options(task, demo_data), 'model.backbone.dims': [16, 24, 32, 40]}
        head = 'neck' if task == 'detection' else 'decode_head'
        wide[f'model.{head}.in_channels'] = [16, 24, 32, 40]
        if task == 'segmentation':
            wide['model.auxiliary_head.in_channels'] = 32
        cfg = read_config(config, wide, notes=[])
        cfg.dump(folder / 'teacher.py')
        init_default_scope(cfg.default_scope)
        torch.manual_seed(1)
        torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), folder / 'teacher.pth')
        made[task] = str(folder / 'teacher.py'), str(folder / 'teacher.pth')
    return made


def test_the_keys_are_those_of_the_options():
    assert cfg_options.UNSET_KEYS['distil'] == distillation.Settings._fields


def test_equal_up_to_a_shift_is_no_loss():
    x = torch.randn(2, 3, 5, 7)
    assert distillation.channel_wise(x, x + torch.randn(2, 3, 1, 1)) < 1e-6
    scaled = x * torch.rand(3, 1, 1) * 4 + torch.randn(3, 1, 1)
    assert distillation.pearson([x], [scaled]) < 1e-5


def test_the_losses_are_those_of_the_papers():
    student, teacher = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    expected = 0.0
    for n in range(2):
        for c in range(3):
            p, q = ((x[n, c] / 2).flatten().softmax(0) for x in (teacher, student))
            expected += float((p * (p / q).log()).sum()) * 4 / 6
    assert float(distillation.channel_wise(student, teacher, 2.0)) == pytest.approx(expected,
                                                                                  rel=1e-5)
    correlations = [torch.corrcoef(torch.stack([student[:, c].flatten(), teacher[:, c].flatten()])
                                   )[0, 1] for c in range(3)]
    found = distillation.pearson([student, student], [teacher, teacher])
    assert float(found) == pytest.approx(2 * (1 - float(sum(correlations)) / 3), rel=1e-5)


def test_maps_of_other_sizes_are_resized():
    student, teacher = torch.randn(1, 2, 8, 8), torch.randn(1, 2, 4, 4)
    resized = F.interpolate(teacher, (8, 8), mode='bilinear')
    for loss in (distillation.channel_wise,
                 lambda own, other: distillation.pearson([own], [other])):
        assert loss(student, teacher) == loss(student, resized)


@pytest.mark.slow
@pytest.mark.parametrize('task', CASES)
def test_a_student_learns_from_a_teacher_that_is_not_saved(task, teachers, demo_data, tmp_path):
    config, checkpoint = teachers[task]
    run = cm.train(CASES[task][0], work_dir=tmp_path, **options(task, demo_data),
                   custom_hooks=[dict(type='EMAHook')],
                   distil=dict(teacher=config, checkpoint=checkpoint))
    assert run is not None
    saved = next(path for path in Path(tmp_path).glob('*_[0-9].pth') if 'best' not in path.name)
    content = torch.load(saved, weights_only=False)
    names = {*content['state_dict'], *content['ema_state_dict']}
    assert not any('teacher' in name for name in names)
    lines = ''.join(path.read_text() for path in Path(tmp_path).rglob('*.log'))
    assert 'loss_distil' in lines
    assert f'Teacher: {config} with {checkpoint}' in lines
    alone = cm.load(tmp_path / Path(CASES[task][0]).name, saved)  # without its teacher
    assert alone is not None


def test_the_teacher_changes_the_gradients_of_the_student_alone(teachers, demo_data):
    cfg = read_config(DEMO_SEGMENTATION, {
        **options('segmentation', demo_data), 'distil': dict(
            teacher=teachers['segmentation'][0], checkpoint=teachers['segmentation'][1])}, notes=[])
    init_default_scope('mmseg')
    torch.manual_seed(0)
    cfg.model.decode_head.dropout_ratio = 0
    model = MODELS.build(cfg.model).train()
    hook = distillation.DistillationHook()

    class Runner:
        pass
    Runner.cfg, Runner.model, Runner.iter = cfg, model, 0
    own = model.decode_head.conv_seg.weight.clone()
    hook.before_train(Runner)
    assert torch.equal(model.decode_head.conv_seg.weight, own)  # a segmentor inherits nothing
    assert not hook.teacher.training
    assert hook.teacher.backbone.training is False
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample
    sample = SegDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64)))
    sample.gt_sem_seg = PixelData(data=torch.zeros(1, 64, 64, dtype=torch.long))
    inputs = torch.randn(2, 3, 64, 64)
    hook.before_train_iter(Runner, 0)
    losses = model(inputs, [sample, sample], mode='loss')
    hook.after_train_iter(Runner, 0)
    assert not model._forward_hooks
    assert not model.decode_head.conv_seg._forward_hooks
    losses[distillation.LOSS].backward()
    assert model.backbone.stages[0][0].pwconv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in hook.teacher.parameters())
    with torch.no_grad():
        logits = hook.teacher.decode_head.forward(hook.teacher.extract_feat(inputs))
    assert torch.equal(distillation.teacher_maps(hook.teacher, inputs, True)[0], logits)
    assert distillation.LOSS not in model(inputs, [sample, sample], mode='loss')


@pytest.mark.parametrize(('changes', 'inherits'), [
    ({}, True), ({'distil.inherit': True}, True), ({'distil.inherit': False}, False),
    ({'load_from': 'mine.pth'}, False), ({'iter': 7}, False)],
    ids=['anew', 'inherit=True', 'inherit=False', 'load_from', 'resumed'])
def test_a_student_that_starts_anew_inherits_neck_and_heads(changes, inherits, teachers, demo_data):
    cfg = read_config(DEMO_DETECTION, {
        **options('detection', demo_data), 'distil': dict(
            teacher=teachers['detection'][0], checkpoint=teachers['detection'][1])}, notes=[])
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    class Runner:
        pass
    Runner.cfg, Runner.model, Runner.iter = cfg, model, changes.get('iter', 0)
    cfg.merge_from_dict({key: value for key, value in changes.items() if key != 'iter'})
    hook = distillation.DistillationHook()
    hook.before_train(Runner)
    taught, heads = hook.teacher.state_dict(), 0
    for name, value in model.state_dict().items():
        fits = inherits and not name.startswith('backbone.') and taught[name].shape == value.shape
        assert torch.equal(value, (taught if fits else before)[name]), name
        heads += fits
    assert (heads > 50) is inherits


def test_mask_rcnn_inherits_the_last_stage_of_a_cascade(teachers):
    teacher = MODELS.build(read_config(teachers['detection'][0], notes=[]).model)
    student = copy.deepcopy(teacher)
    for kind in ('bbox', 'mask'):
        setattr(student.roi_head, f'{kind}_head', copy.deepcopy(
            getattr(student.roi_head, f'{kind}_head')[0]))
    names = distillation.inherit(student, teacher)
    assert {*names} == {name for name in student.state_dict() if not name.startswith('backbone.')}
    for kind in ('bbox', 'mask'):
        own, last = getattr(student.roi_head, f'{kind}_head'), getattr(
            teacher.roi_head, f'{kind}_head')[-1]
        assert all(torch.equal(value, last.state_dict()[name])
                   for name, value in own.state_dict().items())


@pytest.mark.parametrize(('distil', 'message'), [
    (dict(teacher='x.py'), 'distil=.*expected e.g.'), (True, 'distil=True: expected e.g.'),
    (dict(teacher='nothing.py', checkpoint='c.pth'), 'Config not found: .*nothing.py'),
    (dict(teacher=DEMO_SEGMENTATION, checkpoint='c.pth'), 'c.pth'),
    (dict(teacher=DEMO_SEGMENTATION, checkpoint='c.pth', weigth=3), 'distil.weigth is not known'),
    (dict(teacher=DEMO_SEGMENTATION, checkpoint='c.pth', weight=-1), 'distil.weight=-1 must be'),
    (dict(teacher=DEMO_SEGMENTATION, checkpoint='c.pth', inherit=1), 'distil.inherit=1 must be')])
def test_a_wrong_key_is_one_message(distil, message):
    cfg = read_config(DEMO_SEGMENTATION, notes=[])
    cfg.distil = distil
    with pytest.raises(UserError, match=message):
        distillation.read_teacher(cfg)


def test_a_teacher_of_another_task_or_other_classes_is_refused(teachers, demo_data, tmp_path):
    cfg = read_config(DEMO_SEGMENTATION, options('segmentation', demo_data), notes=[])
    config, checkpoint = teachers['detection']
    cfg.distil = dict(teacher=config, checkpoint=checkpoint)
    with pytest.raises(UserError, match='is of mmdet, but this config of mmseg'):
        distillation.read_teacher(cfg)
    cfg.distil = dict(teacher='configs/upernet_convnext_tiny_512_160k_ade20k.py',
                      checkpoint=teachers['segmentation'][1])
    with pytest.raises(UserError, match=r'has 150 classes \(wall, .*but this config \d+ \('):
        distillation.read_teacher(cfg)


def test_images_are_normalized_as_the_teacher_expects():
    class Preprocessor:
        _enable_normalize = True

        def __init__(self, mean: float, std: float) -> None:
            self.mean, self.std = torch.full((3, 1, 1), mean), torch.full((3, 1, 1), std)
    image = torch.rand(1, 3, 4, 4) * 255
    own = (image - 120) / 60
    found = distillation._rescaling(Preprocessor(120, 60), Preprocessor(127.5, 127.5))(own)
    assert torch.allclose(found, (image - 127.5) / 127.5, atol=1e-5)
