"""What a user changes in a recipe reaches what follows from it, or is refused."""
from pathlib import Path

import pytest
from mmengine.config import Config

from convnext_mm import UserError
from convnext_mm.bases import without_completion
from convnext_mm.resolution import RULES, edits, resolve, signatures
from tests.helpers import DEMO_DETECTION, DEMO_SEGMENTATION, DETECTION, ROOT, SEGMENTATION
from tests.recipes import MASK

ALL = sorted(str(path) for path in (ROOT / 'configs').glob('*.py'))


@pytest.fixture
def resolved(tmp_path):
    """Resolves a recipe with some lines of a user's; the notes are kept in ``notes``."""
    def resolved(text: str, recipe: str = SEGMENTATION, name: str = 'mine.py') -> Config:
        base = recipe if recipe[0] == '/' or '::' in recipe else f'{ROOT}/{recipe}'
        (tmp_path / name).write_text(f"_base_ = '{base}'\n{text}")
        with without_completion():
            cfg = Config.fromfile(tmp_path / name)
        notes.extend(resolve(cfg))
        once = cfg.to_dict()
        assert resolve(cfg) == []
        assert cfg.to_dict() == once, 'resolving again changes nothing'
        return cfg
    notes: list[str] = []
    resolved.notes = notes
    return resolved


MINE = '''data_root = 'data/mine'
classes = ('road', 'car', 'sky')
reduce_zero_label = True
'''


@pytest.mark.parametrize('path', ALL)
def test_recipes_as_shipped_stay_as_they_are(path):
    with without_completion():
        cfg = Config.fromfile(path)
    before = cfg.to_dict()
    assert resolve(cfg) == []
    for split in ('train', 'val', 'test'):  # explicit, as ADE20KDataset has it
        before[f'{split}_dataloader']['dataset'].update(
            {k: v for k, v in cfg[f'{split}_dataloader'].dataset.items()
             if k == 'reduce_zero_label'})
    assert cfg.to_dict() == before


def test_each_rule_names_a_pair_of_settings_and_says_what_it_does():
    assert [rule.__name__ for rule in RULES
            if '_and_' not in rule.__name__ and rule.__name__ != 'misspelt_keys'] == []
    assert [rule.__name__ for rule in RULES if not rule.__doc__] == []


# ---- length of a run


def test_the_schedule_follows_the_length_of_a_run(resolved):
    cfg = resolved('train_cfg = dict(max_iters=20000)')
    assert [(s.type, s.begin, s.end) for s in cfg.param_scheduler] == [
        ('LinearLR', 0, 188 + 1), ('PolyLR', 0, 20000 + 1)]
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == 2000
    assert resolved.notes == ['20000 iterations instead of 160000, scaled with it: '
                              'param_scheduler, train_cfg.val_interval=2000, '
                              'default_hooks.checkpoint.interval=2000']


def test_the_rate_arrives_at_its_end(resolved):
    """By the rates of mmengine's own schedulers."""
    import torch
    from mmengine.registry import PARAM_SCHEDULERS
    cfg = resolved('max_iters = 400')
    assert cfg.train_cfg.max_iters == 400
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = [PARAM_SCHEDULERS.build(dict(s), default_args=dict(optimizer=optimizer))
                  for s in cfg.param_scheduler]
    rates = []
    for _ in range(400):
        rates.append(optimizer.param_groups[0]['lr'])
        for scheduler in schedulers:
            scheduler.step()
    assert rates[0] < 1e-5
    assert max(rates) > 0.98
    assert rates[-1] < 0.004


@pytest.mark.parametrize(('epochs', 'warm_up', 'milestones'), [
    (12, 167, [9, 11]), (72, 1000, [54, 66]), (2, 28, [1]), (1, 14, [])])
def test_epochs_and_milestones(epochs, warm_up, milestones, resolved):
    cfg = resolved(f'train_cfg = dict(max_epochs={epochs})', DETECTION)
    linear, steps = cfg.param_scheduler
    assert (linear.end, steps.milestones, steps.end) == (warm_up + 1, milestones, epochs)
    assert cfg.train_cfg.val_interval == max(1, round(epochs / 36))


def test_a_schedule_of_the_users_stays(resolved):
    cfg = resolved('''train_cfg = dict(max_iters=1000)
param_scheduler = [dict(type='PolyLR', power=0.9, by_epoch=False, begin=0, end=1000)]''')
    assert cfg.param_scheduler[0].end == 1000
    assert cfg.param_scheduler[0].power == 0.9


def test_a_schedule_follows_the_run_of_the_file_that_set_it(resolved, tmp_path):
    """As for the recipe's: a file or an option that changes the length alone."""
    own = ("param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=50),\n"
           "    dict(type='PolyLR', by_epoch=False, begin=0, end=901)]\n")
    resolved('max_iters = 900\n' + own, name='first.py')
    cfg = resolved('train_cfg = dict(max_iters=90)', f'{tmp_path}/first.py', 'second.py')
    assert [s.end for s in cfg.param_scheduler] == [5, 91]
    cfg = resolved('max_iters = 1800', f'{tmp_path}/first.py', 'third.py')
    assert cfg.train_cfg.max_iters == 1800
    assert [s.end for s in cfg.param_scheduler] == [100, 1801]
    cfg = resolved('max_iters = 5\n' + own.replace('50', '2').replace('901', '6'),
                   f'{tmp_path}/first.py', 'fourth.py')
    assert [s.end for s in cfg.param_scheduler] == [2, 6]


@pytest.mark.parametrize('options', [
    {'train_cfg.max_iters': 4}, {'max_iters': 4},
    {'train_cfg.max_iters': 4, 'train_cfg.val_interval': 2, 'crop_size': (64, 64)}])
def test_the_demo_is_shortened_from_the_command_line(options):
    from convnext_mm.engine.checks import read_config
    cfg = read_config(DEMO_SEGMENTATION, options)
    assert (cfg.train_cfg.max_iters, [s.end for s in cfg.param_scheduler]) == (4, [2, 5])
    assert cfg.train_cfg.val_interval == options.get('train_cfg.val_interval', 1)
    crop = options.get('crop_size', (128, 128))
    assert tuple(cfg.model.data_preprocessor.size) == crop
    assert {tuple(step.crop_size) for step in cfg.train_dataloader.dataset.pipeline
            if step.type == 'RandomCrop'} == {crop}


@pytest.mark.parametrize(('text', 'recipe', 'message'), [
    ("param_scheduler = [dict(type='PolyLR', by_epoch=False, begin=0, end=160000)]\n"
     'train_cfg = dict(max_iters=1000)', SEGMENTATION,
     r'PolyLR ends at 160000, but the run at 1000'),
    ("param_scheduler = [dict(type='MultiStepLR', by_epoch=True, begin=0, end=36, milestones=[27])]"
     '\ntrain_cfg = dict(max_epochs=12)', DETECTION, r'milestones=\[27\], but the run ends at 12'),
    ("train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=50)", SEGMENTATION,
     'an InfiniteSampler, with which an epoch never ends'),
    ("train_cfg = dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=50)\n"
     "train_dataloader = dict(sampler=dict(type='DefaultSampler'))", SEGMENTATION,
     'trains for 50 epochs, but param_scheduler was made for 160000 iterations'),
    ("param_scheduler = [dict(type='PolyLR', power=0.9, begin=0, end=160000)]", SEGMENTATION,
     'PolyLR counts epochs, but train_cfg trains for 160000 iterations.*Write by_epoch=False'),
    ("param_scheduler = [dict(type='MultiStepLR', milestones=[9])]", SEGMENTATION,
     'MultiStepLR counts epochs.*its milestones in iterations'),
    ("param_scheduler = [dict(type='PolyLR', by_epoch=False, begin=0, end=40000)]", SEGMENTATION,
     'PolyLR ends at 40000, but the run at 160000 iterations .* stay at 0: set end=160000, or'),
    ("param_scheduler = [dict(type='LinearLR', by_epoch=False, start_factor=0.1, end=500),\n"
     "    dict(type='CosineAnnealingLR', begin=0, end=10, eta_min_ratio=0.001)]", DETECTION,
     'CosineAnnealingLR ends at 10, but the run at 36 epochs'),
    ("param_scheduler = [dict(type='OneCycleLR', eta_max=1e-4, total_steps=160000, "
     'by_epoch=False)]',
     SEGMENTATION, 'OneCycleLR has eta_max=0.0001, one rate for all parameter groups'),
    ("param_scheduler = [dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, end=160000)]",
     SEGMENTATION, 'eta_min=1e-06, .* use eta_min_ratio')])
def test_schedules_that_do_not_fit(text, recipe, message, resolved):
    with pytest.raises(UserError, match=message):
        resolved(text, recipe)


@pytest.mark.parametrize('schedule', [
    "dict(type='MultiStepLR', by_epoch=False, end=100, milestones=[50])",
    "dict(type='PolyLR', by_epoch=False, end=90), dict(type='ConstantLR', factor=1, end=100, "
    'by_epoch=False)',
    "dict(type='PolyLR', by_epoch=False, end=152000)", "dict(type='ConstantLR', factor=1.0)",
    "dict(type='PolyLR', end=9, convert_to_iter_based=True)",
    "dict(type='ReduceOnPlateauLR', monitor='mIoU')"])
def test_schedules_that_are_meant(schedule, resolved):
    assert len(resolved(f'param_scheduler = [{schedule}]').param_scheduler) == len(
        schedule.split('type')) - 1


ITERATIONS = """train_cfg = dict(
    _delete_=True, type='IterBasedTrainLoop', max_iters=90000, val_interval=5000)
param_scheduler = [dict(type='MultiStepLR', by_epoch=False, milestones=[60000, 80000])]
"""


def test_hooks_count_what_the_loop_counts(resolved):
    cfg = resolved(ITERATIONS, DETECTION)
    checkpoint = cfg.default_hooks.checkpoint
    assert (checkpoint.by_epoch, checkpoint.interval) == (False, 90000 // 36)
    assert (cfg.log_processor.by_epoch, cfg.default_hooks.logger.log_metric_by_epoch) == (
        False, False)
    assert resolved.notes[0] == ('90000 iterations instead of 36 epochs, scaled with it: '
                                 'default_hooks.checkpoint.interval=2500')
    cfg = resolved("""train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=50)
train_dataloader = dict(sampler=dict(type='DefaultSampler'))
param_scheduler = [dict(type='PolyLR', end=50)]""")
    checkpoint = cfg.default_hooks.checkpoint
    assert (checkpoint.by_epoch, checkpoint.interval, cfg.train_cfg.val_interval) == (True, 5, 5)
    assert cfg.log_processor.by_epoch is cfg.default_hooks.logger.log_metric_by_epoch is True
    own = 'default_hooks = dict(checkpoint=dict(by_epoch=True, interval=1))'
    checkpoint = resolved(ITERATIONS + own, DETECTION).default_hooks.checkpoint
    assert (checkpoint.by_epoch, checkpoint.interval) == (True, 1)


# ---- the model


@pytest.mark.parametrize(('text', 'dims'), [
    ("model = dict(backbone=dict(arch='base'))", [128, 256, 512, 1024]),
    ("arch = 'v2_nano'\nmodel = dict(backbone=dict(layer_scale_init_value=0.0))",
     [80, 160, 320, 640]),
    ('dims = [8, 16, 24, 32]', [8, 16, 24, 32])])
def test_heads_have_the_channels_of_the_backbone(text, dims, resolved):
    cfg = resolved(text)
    assert list(cfg.model.decode_head.in_channels) == dims
    assert cfg.model.auxiliary_head.in_channels == dims[2]
    assert list(resolved(text, DETECTION).model.neck.in_channels) == dims


@pytest.mark.parametrize(('text', 'message'), [
    ("model = dict(backbone=dict(arch='base'), decode_head=dict(in_channels=[1, 2, 3, 4]))",
     r'decode_head.in_channels=\[1, 2, 3, 4\], but model.backbone has \[128, 256, 512, 1024\] '
     'channels'),
    ('model = dict(auxiliary_head=dict(in_index=4))', 'in_index names map 4, but .* 4 maps'),
    ('model = dict(data_preprocessor=dict(mean=[1.0, 2.0]))',
     'mean has 2 values, but .*in_chans=3'),
    ('model = dict(backbone=dict(in_chans=6))',
     'mean has 3 values, but .*in_chans=6: give mean 6 values'),
    ('in_chans = 6\nmodel = dict(data_preprocessor=dict(mean=[0.0] * 6))',
     'std has 3 values, but .*in_chans=6: give std 6 values'),
    ('model = dict(decode_head=dict(out_channels=1))', 'out_channels=1, but loss_decode is a soft'),
    (MINE + 'model = dict(decode_head=dict(loss_decode=dict(class_weight=[1.0, 2.0])))',
     'class_weight has 2 weights, but there are 3 classes'),
    ("data_root = 'data/mine'\nclasses = ('road',)", "one class 'road': .* classes=.'background'")])
def test_models_that_contradict_themselves(text, message, resolved):
    with pytest.raises(UserError, match=message):
        resolved(text)


def test_bands_are_not_swapped(resolved):
    cfg = resolved('in_chans = 6\n'
                   'model = dict(data_preprocessor=dict(mean=[1200.0], std=[600.0]))')
    assert cfg.model.backbone.in_chans == 6
    assert cfg.model.data_preprocessor.bgr_to_rgb is False


def test_maps_that_no_head_uses_are_not_computed(resolved):
    cfg = resolved('''model = dict(auxiliary_head=None, decode_head=dict(
    _delete_=True, type='FCNHead', in_channels=768, in_index=3, channels=16, num_classes=150,
    loss_decode=dict(type='CrossEntropyLoss')))''')
    assert cfg.model.backbone.out_indices == [3]
    assert cfg.model.decode_head.in_index == 0


DEEPLAB = '''model = dict(backbone=dict(out_indices={}), decode_head=dict(
    _delete_=True, type='DepthwiseSeparableASPPHead', in_channels=768, in_index=-1, channels=16,
    dilations=(1, 12), c1_in_channels={}, c1_channels=8, num_classes=150))'''


@pytest.mark.parametrize(('finest', 'left', 'index'), [(96, [0, 2, 3], 2), (0, [2, 3], 1)])
def test_deeplabs_head_reads_the_first_map_as_well(finest, left, index, resolved):
    model = resolved(DEEPLAB.format('[0, 1, 2, 3]', finest)).model
    assert model.backbone.out_indices == left
    assert (model.decode_head.in_index, model.auxiliary_head.in_index) == (index, index - 1)
    assert model.decode_head.c1_in_channels == finest


def test_the_first_map_has_the_channels_of_the_backbone(resolved):
    recipe = 'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512.py'
    backbone = "backbone=dict(_delete_=True, type='ConvNeXt', arch='base')"
    head = resolved(f'model = dict(pretrained=None, {backbone})', recipe).model.decode_head
    assert (head.c1_in_channels, head.in_channels) == (128, 1024)
    with pytest.raises(UserError, match='c1_in_channels=96, but model.backbone has 192 channels'):
        resolved(DEEPLAB.format('[1, 2, 3]', 96))


MASKS_OF_ALL_MAPS = '''model = dict(decode_head=dict(
    _delete_=True, type='{}', in_channels=[96, 192, 384, 768], num_classes=150))'''


@pytest.mark.parametrize('head', ['Mask2FormerHead', 'MaskFormerHead'])
def test_heads_of_masks_read_all_maps(head, resolved):
    model = resolved(MASKS_OF_ALL_MAPS.format(head)).model
    assert model.decode_head.in_channels == [96, 192, 384, 768]
    assert 'in_index' not in model.decode_head
    assert model.backbone.out_indices == [0, 1, 2, 3]


def test_maps_that_the_users_file_names_stay(resolved):
    """Also where they are the recipe's, with a head that reads one map unless told otherwise."""
    text = "model = dict(decode_head=dict(type='FCNHead', in_channels=[96, 192, 384, 768]))"
    assert resolved(text).model.decode_head.in_channels == [96, 192, 384, 768]


# ---- data


def test_k_nets_first_kernels_are_made_from_the_maps(resolved):
    cfg = resolved('''model = dict(auxiliary_head=None, decode_head=dict(
    _delete_=True, type='IterativeDecodeHead', num_stages=1, kernel_update_head=[], num_classes=150,
    kernel_generate_head=dict(type='UPerHead', in_channels=[96, 192, 384, 768], channels=16,
                              in_index=[0, 1, 2, 3], num_classes=150)))''')
    assert 'in_index' not in cfg.model.decode_head  # it takes none
    assert cfg.model.decode_head.kernel_generate_head.in_index == [0, 1, 2, 3]
    assert list(cfg.model.backbone.get('out_indices', range(4))) == [0, 1, 2, 3]


@pytest.mark.parametrize('kind', ['CityscapesDataset', 'PascalVOCDataset', 'BDD100KDataset'])
def test_a_datasets_type_overrides_the_recipes_pipeline(kind, resolved):
    cfg = resolved(f"data_root = 'data/mine'\ndataset_type = '{kind}'")
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert (dataset.type, dataset.reduce_zero_label) == (kind, False)
        assert [step.reduce_zero_label for step in dataset.pipeline
                if step.type == 'LoadAnnotations'] == [False]
    assert cfg.tta_pipeline[1].transforms[2][0].reduce_zero_label is False
    assert cfg.model.decode_head.num_classes == len(
        signatures.find_class('mmseg', 'DATASETS', kind).METAINFO['classes'])


def test_a_config_of_a_config_follows_to_any_depth(resolved, tmp_path):
    prefix = "data_prefix=dict(img_path='{0}', seg_map_path='{0}')"
    resolved(MINE + f"val_dataloader = dict(dataset=dict({prefix.format('v')}))\n"
             "reduce_zero_label = False\nimg_suffix = '.tif'", name='first.py')
    resolved('train_cfg = dict(max_iters=80000)', f'{tmp_path}/first.py', 'second.py')
    cfg = resolved('batch_size = 4', f'{tmp_path}/second.py', 'third.py')
    assert cfg.train_dataloader.batch_size == 4
    assert cfg.param_scheduler[1].end == 80001
    for split in ('val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        assert dataset.data_prefix.img_path == 'v'
        assert (dataset.data_root, dataset.img_suffix) == ('data/mine', '.tif')
        assert dataset.reduce_zero_label is False


@pytest.mark.parametrize(('text', 'message'), [
    ('model = dict(decode_head=dict(ignore_index=0))',
     'model.decode_head.ignore_index=0, but .*label 255 .*: remove ignore_index.*`ignore = 1`'),
    ('model = dict(auxiliary_head=dict(ignore_index=None))', 'ignore_index=None, .*: remove .*x$'),
    ('val_evaluator = dict(ignore_index=0)\nreduce_zero_label = False',
     'val_evaluator.ignore_index=0, but .*`ignore = 0`')])
def test_pixels_of_no_class_have_one_label(text, message, resolved):
    with pytest.raises(UserError, match=message):
        resolved(text)


def test_a_recipe_may_have_another_label_of_no_class(resolved):
    cfg = resolved('', 'mmseg::unet/unet-s5-d16_fcn_4xb4-160k_hsidrive-192x384.py')
    assert cfg.model.decode_head.ignore_index == cfg.val_evaluator.ignore_index == 0
    cfg = resolved('model = dict(decode_head=dict(ignore_index=255))')
    assert cfg.model.decode_head.ignore_index == 255


def test_what_is_set_on_val_reaches_test(resolved):
    cfg = resolved(MINE + '''val_dataloader = dict(dataset=dict(seg_map_suffix='_m.png', pipeline=[
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]))
val_evaluator = dict(iou_metrics=['mDice'])''')
    assert cfg.test_dataloader.dataset.seg_map_suffix == '_m.png'
    assert len(cfg.test_dataloader.dataset.pipeline) == 3
    assert cfg.test_evaluator.iou_metrics == ['mDice']
    assert cfg.default_hooks.checkpoint.save_best == 'mDice'


# ---- short names


def test_smaller_images_and_a_shorter_run_in_five_lines(resolved):
    cfg = resolved(MINE + 'crop_size = (128, 128)\nscale = (160, 160)\nmax_iters = 900\n'
                   'batch_size = 8\nearly_stopping = 3')
    train, test = (cfg[f'{split}_dataloader'].dataset.pipeline for split in ('train', 'test'))
    steps = {step.type: step for step in train}
    assert steps['RandomCrop'].crop_size == cfg.model.data_preprocessor.size == (128, 128)
    assert (cfg.model.test_cfg.crop_size, cfg.model.test_cfg.stride) == ((128, 128), (85, 85))
    assert steps['RandomResize'].scale == (160, 160)
    assert {step.type: step for step in test}['Resize'].scale == (160, 160)
    assert cfg.tta_pipeline[1].transforms[0][0].scale == (80, 80)
    assert (cfg.train_cfg.max_iters, cfg.train_dataloader.batch_size) == (900, 8)
    assert cfg.custom_hooks[-1].to_dict() == dict(
        type='EarlyStoppingHook', monitor='mIoU', rule='greater', patience=3)


def test_scalars_are_logged_elsewhere_by_one_key(resolved, monkeypatch):
    monkeypatch.setattr('convnext_mm.utils.find_spec', lambda name: True)
    cfg = resolved(MINE + "log_to = ['tensorboard', 'wandb']")
    assert [backend.type for backend in cfg.visualizer.vis_backends] == [
        'LocalVisBackend', 'TensorboardVisBackend', 'WandbVisBackend']
    with pytest.raises(UserError, match="log_to='board' must be one of 'tensorboard', 'wandb'"):
        resolved(MINE + "log_to = 'board'")


def test_a_file_sets_the_recipes_value_again(resolved, tmp_path):
    """Against a short name of the file that it inherits."""
    resolved('batch_size = 3\nmax_iters = 4000', name='parent.py')
    parent = str(tmp_path / 'parent.py')
    cfg = resolved('train_dataloader = dict(batch_size=2)\ntrain_cfg = dict(max_iters=160000)',
                   parent)
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.train_cfg.max_iters == 160000
    assert cfg.param_scheduler[-1].end == 160000 + 1
    assert resolved('', parent).train_dataloader.batch_size == 3
    with pytest.raises(UserError, match=r'batch_size=3 contradicts train_dataloader\.batch_size=2'):
        resolved('batch_size = 3\ntrain_dataloader = dict(batch_size=2)')


def test_intervals_that_are_set_stay(resolved):
    cfg = resolved('max_iters = 900\nval_interval = 300')
    assert cfg.train_cfg.val_interval == 300
    assert cfg.default_hooks.checkpoint.interval == 90


def test_a_variable_that_is_used_is_one(resolved):
    cfg = resolved('iters = 4000\ntrain_cfg = dict(max_iters=iters)\n'
                   'num_class = 3\nn = [num_class]')
    assert cfg.train_cfg.max_iters == 4000


@pytest.mark.parametrize(('text', 'message'), [
    ('optim_wraper = dict(optimizer=dict(lr=1e-3))', 'sets optim_wraper, .*mean optim_wrapper'),
    ('train_dataloadr = dict(batch_size=4)', 'train_dataloadr.* mean train_dataloader'),
    ('learning_rate = 1e-3', 'sets learning_rate=0.001, which nothing reads: write lr'),
    ('max_epochs = 5', 'max_epochs=5, but this recipe trains by iters: set max_iters'),
    ('lr = 1e-3\noptim_wrapper = dict(optimizer=dict(lr=2e-3))', 'lr=0.001 contradicts .*0.002'),
    ("crop_size = 'big'", 'crop_size=.big. must be two whole numbers'),
    ('early_stopping = 0', 'early_stopping=0 must be'),
    ('model = dict(data_preprocessor=dict(size=(64, 64)))',
     r'size=\(64, 64\), but images are cropped to \(512, 512\)')])
def test_names_that_would_do_nothing(text, message, resolved):
    with pytest.raises(UserError, match=message):
        resolved(text)


# ---- types and arguments


@pytest.mark.parametrize(('text', 'path', 'gone'), [
    ("optim_wrapper = dict(type='OptimWrapper')", 'optim_wrapper', 'loss_scale'),
    ("optim_wrapper = dict(optimizer=dict(type='SGD', momentum=0.9))", 'optim_wrapper.optimizer',
     'betas'),
    ("model = dict(backbone=dict(type='ResNet', depth=50))", 'model.backbone', 'arch')])
def test_arguments_of_another_type_are_dropped(text, path, gone, resolved):
    cfg = resolved(text)
    assert gone not in edits.lookup(cfg, path)
    assert any(line.startswith(f'{path}: ') and gone in line for line in resolved.notes)


def test_an_argument_that_another_loss_refuses_is_dropped(resolved):
    cfg = resolved("model = dict(decode_head=dict(loss_decode=dict(type='FocalLoss')))")
    assert cfg.model.decode_head.loss_decode == dict(type='FocalLoss', loss_weight=1.0)
    assert resolved.notes == ['model.decode_head.loss_decode: FocalLoss takes no use_sigmoid=False,'
                              ' dropped (of CrossEntropyLoss in the recipe)']
    loss = 'model = dict(decode_head=dict(loss_decode=dict({})))'
    cfg = resolved(loss.format("type='DiceLoss'"))
    assert cfg.model.decode_head.loss_decode.use_sigmoid is False, 'taken, so that it stays'
    cfg = resolved(loss.format("type='FocalLoss', use_sigmoid=False"))
    assert cfg.model.decode_head.loss_decode.use_sigmoid is False, "the user's own"


WEIGHTS = "init_cfg=dict(type='Pretrained', checkpoint='{}')"


def test_weights_of_another_backbone_are_not_loaded(resolved, tmp_path):
    cfg = resolved("model = dict(backbone=dict(type='ResNet', depth=50))")
    assert 'init_cfg' not in cfg.model.backbone
    assert ("model.backbone.init_cfg: the recipe's weights are of ConvNeXt, ResNet starts from "
            'random ones') in resolved.notes
    cfg = resolved(f"model = dict(backbone=dict(type='ResNet', {WEIGHTS.format('mine.pth')}))")
    assert cfg.model.backbone.init_cfg.checkpoint == 'mine.pth'
    resolved(f'model = dict(backbone=dict({WEIGHTS.format("mine.pth")}))', name='first.py')
    both = f"model = dict(backbone=dict(type='ResNet', {WEIGHTS.format('mine.pth')}))"
    cfg = resolved(both, f'{tmp_path}/first.py', 'second.py')
    assert cfg.model.backbone.init_cfg.checkpoint == 'mine.pth'


@pytest.mark.parametrize(('text', 'message'), [
    ('default_hooks = dict(checkpoint=dict(intervall=5))',
     "checkpoint.intervall: CheckpointHook has no argument 'intervall'. Did you mean interval"),
    ('model = dict(decode_head=dict(dropout=0.1))', 'UPerHead has no argument .dropout.'),
    ("optim_wrapper = dict(optimizer=dict(type='SGD', betas=(0.8, 0.9)))",
     'betas: SGD has no argument .betas.. It is inherited from AdamW, .*_delete_=True'),
    ('train_dataloader = dict(dataset=dict(img_sufix=".tif"))', 'Did you mean img_suffix')])
def test_arguments_that_a_class_does_not_take(text, message, resolved):
    with pytest.raises(UserError, match=message):
        resolved(text)


def test_a_pretrained_of_the_model_is_the_backbones_init_cfg(resolved):
    cfg = resolved("model = dict(pretrained='weights.pth')")
    assert cfg.model.backbone.init_cfg.checkpoint == 'weights.pth'
    assert 'pretrained' not in cfg.model


# ---- lists that replace


def test_hooks_and_backends_of_the_recipe_stay(resolved, monkeypatch):
    monkeypatch.setattr('convnext_mm.utils.find_spec', lambda name: True)
    cfg = resolved("custom_hooks = [dict(type='EMAHook')]\n"
                   "visualizer = dict(vis_backends=[dict(type='TensorboardVisBackend')])")
    assert [hook.type for hook in cfg.custom_hooks] == [
        'FitCheckpointHook', 'CurvesHook', 'PredictionsHook', 'AbsentClassesHook', 'ResultsHook',
        'EMAHook']
    assert [one.type for one in cfg.visualizer.vis_backends] == [
        'LocalVisBackend', 'TensorboardVisBackend']


def test_a_backend_whose_package_is_missing(resolved, monkeypatch):
    monkeypatch.setattr('convnext_mm.utils.find_spec', lambda name: None)
    with pytest.raises(UserError, match='needs the package wandb, .*: pip install wandb'):
        resolved("visualizer = dict(vis_backends=[dict(type='WandbVisBackend')])")


def test_the_best_checkpoint_is_chosen_by_what_is_computed(resolved):
    with pytest.raises(UserError, match="save_best='mDice', but val_evaluator computes mIoU"):
        resolved("default_hooks = dict(checkpoint=dict(save_best='mDice'))")
    cfg = resolved("val_evaluator = dict(metric='bbox')", DETECTION)
    assert cfg.default_hooks.checkpoint.save_best == 'coco/bbox_mAP'
    cfg = resolved('masks = False', DEMO_DETECTION)  # which sets 'coco/segm_mAP'
    assert cfg.default_hooks.checkpoint.save_best == 'coco/bbox_mAP'


def test_the_best_by_several_metrics(resolved):
    cfg = resolved("default_hooks = dict(checkpoint=dict(save_best=['mIoU', 'mAcc']))\n"
                   'early_stopping = 2')
    assert cfg.default_hooks.checkpoint.save_best == ['mIoU', 'mAcc']
    assert cfg.custom_hooks[-1].monitor == 'mIoU'
    with pytest.raises(UserError, match=r"save_best=\['mIoU', 'mDice'\], but .* computes mIoU"):
        resolved("default_hooks = dict(checkpoint=dict(save_best=['mIoU', 'mDice']))")
    cfg = resolved("masks = False\ndefault_hooks = dict(checkpoint=dict(save_best=["
                   "'coco/bbox_mAP', 'coco/segm_mAP']))", DETECTION)
    assert cfg.default_hooks.checkpoint.save_best == 'coco/bbox_mAP'


@pytest.mark.parametrize('best', ["'auto'", 'None'])
@pytest.mark.parametrize(('recipe', 'monitor'), [
    (SEGMENTATION, 'mIoU'), (DETECTION, 'coco/bbox_mAP')])
def test_early_stopping_monitors_what_is_computed(best, recipe, monitor, resolved):
    best = f'default_hooks = dict(checkpoint=dict(save_best={best}))\nearly_stopping = 2\n'
    assert resolved(best, recipe).custom_hooks[-1].monitor == monitor
    with pytest.raises(UserError, match="early_stopping=2 needs a metric .*save_best='…'"):
        resolved(best + "val_evaluator = dict(_delete_=True, type='Mine')", recipe)


def test_no_workers_are_not_kept(resolved):
    cfg = resolved('num_workers = 0')
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        assert (loader.num_workers, loader.persistent_workers) == (0, False)


def test_recipes_are_known_wherever_users_files_lie():
    assert edits.is_shipped(ROOT / SEGMENTATION)
    assert edits.is_shipped(ROOT / 'configs' / '_base_' / 'datasets' / 'ade20k.py')
    assert not edits.is_shipped(ROOT / 'configs' / 'mine.py')
    assert not edits.is_shipped(ROOT / 'configs' / 'demo' / 'upernet_convnext_demo.py')
    assert not edits.is_shipped(Path('/tmp') / Path(SEGMENTATION).name)


@pytest.mark.parametrize('recipe', [SEGMENTATION, DETECTION])
def test_the_config_that_a_run_writes_stays_as_it_is(recipe, resolved, tmp_path):
    """mmengine dumps the whole config, with the recipe's variables beside the user's values."""
    cfg = resolved(MINE + 'batch_size = 3\narch = "small"\n' + (
        'crop_size = (64, 64)\nmax_iters = 80' if recipe == SEGMENTATION else 'max_epochs = 2'),
        recipe)
    cfg.dump(tmp_path / 'dumped.py')
    with without_completion():
        dumped = Config.fromfile(tmp_path / 'dumped.py')
    before = dumped.to_dict()
    assert resolve(dumped) == []
    assert dumped.to_dict() == before


# ---- bases by name


@pytest.mark.parametrize('base', [
    'convnext_mm::upernet_convnext_tiny_512_160k_ade20k.py',
    'convnext_mm::upernet_convnext_tiny_512_160k_ade20k',
    'mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py'])
def test_a_recipe_by_its_name_is_completed_like_a_path(base, resolved):
    cfg = resolved(MINE + 'train_cfg = dict(max_iters=8000)', base)
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 3
    for split in ('train', 'val', 'test'):
        assert cfg[f'{split}_dataloader'].dataset.data_root == 'data/mine'
    assert cfg.param_scheduler[-1].end == 8000 + base.startswith('convnext_mm')


def test_a_recipe_that_no_package_has(resolved):
    with pytest.raises(UserError, match=r'convnext_mm has no config upernet_convnext_tinny.*mean '
                                        'upernet_convnext_tiny'):
        resolved('', 'convnext_mm::upernet_convnext_tinny_512_160k_ade20k.py')


# ---- bands


SIX = 'in_chans = 6\nmodel = dict(data_preprocessor=dict(mean=[9.0] * 6, std=[{}]))\n'


def test_six_bands_are_read_and_normalized(resolved):
    cfg = resolved(SIX.format('1, 2, 3, 4, 5, 6'))
    loader = dict(type='LoadImageFromFile', color_type='unchanged', imdecode_backend='tifffile',
                  to_float32=True)
    pipelines = [cfg[f'{split}_dataloader'].dataset.pipeline for split in ('train', 'val', 'test')]
    for pipeline in (*pipelines, cfg.tta_pipeline):
        assert pipeline[0].to_dict() == loader
        assert 'PhotoMetricDistortion' not in [step.type for step in pipeline]
    assert cfg.model.data_preprocessor.type == 'MultiBandPreprocessor'
    assert cfg.model.data_preprocessor.base == 'SegDataPreProcessor'
    assert len(resolved.notes) == 3


def test_gray_images_have_the_mean_of_the_recipe(resolved):
    cfg = resolved('in_chans = 1')
    assert cfg.model.data_preprocessor.mean == [pytest.approx((123.675 + 116.28 + 103.53) / 3,
                                                              abs=1e-3)]
    assert cfg.train_dataloader.dataset.pipeline[0].color_type == 'grayscale'


@pytest.mark.parametrize('bands', [1, 3])
def test_mean_beyond_8_bits_reads_all_bits(bands, resolved):
    cfg = resolved(f'in_chans = {bands}\n'
                   'model = dict(data_preprocessor=dict(mean=[1200.0], std=[600.0]))')
    for split in ('train', 'val', 'test'):
        pipeline = cfg[f'{split}_dataloader'].dataset.pipeline
        assert pipeline[0].to_dict() == dict(type='LoadImageFromFile', color_type='unchanged',
                                             to_float32=True)
        assert 'PhotoMetricDistortion' not in [step.type for step in pipeline]
    with pytest.raises(UserError, match='pipeline.1: PhotoMetricDistortion needs '):
        resolved(f'in_chans = {bands}\n'
                 'model = dict(data_preprocessor=dict(mean=[1200.0], std=[600.0]))\n'
                 "train_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile', "
                 "color_type='unchanged'), dict(type='PhotoMetricDistortion')]))")


@pytest.mark.parametrize(('text', 'message'), [
    ("train_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile', "
     "color_type='grayscale')]))", r'pipeline.0: LoadImageFromFile reads 1 bands .*in_chans=3'),
    (SIX.format('1') + "train_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFrom"
     "File', color_type='unchanged'), dict(type='PhotoMetricDistortion')]))",
     'pipeline.1: PhotoMetricDistortion needs 3 bands')])
def test_pipelines_that_read_other_bands(text, message, resolved):
    with pytest.raises(UserError, match=message):
        resolved(text)


def test_a_package_that_reads_images_is_missing(resolved, monkeypatch):
    monkeypatch.setattr('convnext_mm.utils.find_spec', lambda name: None)
    with pytest.raises(UserError, match="imdecode_backend='tifffile' needs .*pip install tifffile"):
        resolved(SIX.format('1'))


# ---- heads that count classes


MASK2FORMER = 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'


def test_heads_of_masks_count_the_classes(resolved):
    cfg = resolved(MINE, MASK2FORMER)
    for head in (cfg.model.panoptic_head, cfg.model.panoptic_fusion_head):
        assert (head.num_things_classes, head.num_stuff_classes) == (3, 0)
    assert cfg.model.panoptic_head.loss_cls.class_weight == [1.0, 1.0, 1.0, 0.1]


def test_panoptic_heads_count_things_and_stuff(resolved):
    meta = "metainfo=dict(classes=('a', 'b', 'c'), thing_classes=('a',), stuff_classes=('b', 'c'))"
    loaders = '\n'.join(f'{split}_dataloader = dict(dataset=dict({meta}))'
                        for split in ('train', 'val', 'test'))
    cfg = resolved(loaders, 'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py')
    head = cfg.model.semantic_head
    assert (head.num_things_classes, head.num_stuff_classes) == (1, 2)


def test_a_segmentors_masks_count_the_classes(resolved):
    cfg = resolved(MINE, 'mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py')
    assert cfg.model.decode_head.num_classes == 3
    assert cfg.model.decode_head.loss_cls.class_weight == [1.0, 1.0, 1.0, 0.1]


def test_a_seesaw_loss_counts_the_classes(resolved):
    cfg = resolved(MINE, 'mmdet::seesaw_loss/mask-rcnn_r50_fpn_seesaw-loss_sample1e-3-ms-2x_'
                         'lvis-v1.py')
    assert cfg.model.roi_head.bbox_head.loss_cls.num_classes == 3


@pytest.mark.parametrize(('text', 'message'), [
    ('model = dict(panoptic_head=dict(num_things_classes=5))',
     'panoptic_head.num_things_classes=5, but the training data has 3'),
    ('model = dict(panoptic_head=dict(loss_cls=dict(class_weight=[1.0, 2.0, 1.0])))',
     'class_weight has 3 weights, but there are 3 classes, and one of')])
def test_counts_that_contradict_the_classes(text, message, resolved):
    with pytest.raises(UserError, match=message):
        resolved(MINE + text, MASK2FORMER)


def test_without_a_mask_head_there_are_no_masks(resolved):
    cfg = resolved('model = dict(roi_head=dict(mask_head=None))', DETECTION)
    assert cfg.val_evaluator.metric == cfg.test_evaluator.metric == ['bbox']
    assert cfg.default_hooks.checkpoint.save_best == 'coco/bbox_mAP'
    for split in ('train', 'val', 'test'):
        load, = [step for step in cfg[f'{split}_dataloader'].dataset.pipeline
                 if step.type == 'LoadAnnotations']
        assert (load.with_bbox, load.with_mask) == (True, False)
    with pytest.raises(UserError, match='test_evaluator.metric=.*no mask head: set .*bbox'):
        resolved("model = dict(roi_head=dict(mask_head=None))\n"
                 "test_evaluator = dict(metric=['segm'])", DETECTION)


def test_without_a_mask_head_no_evaluator_of_a_list_has_masks(resolved):
    listed = ("val_evaluator = [dict(type='CocoMetric', metric=['bbox', 'segm']), "
              "dict(type='CocoMetric', prefix='boxes', metric='bbox')]\n"
              'test_evaluator = val_evaluator\n')
    cfg = resolved(f'masks = False\n{listed}', DETECTION)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        assert [one.metric for one in evaluator] == [['bbox'], 'bbox']
    with pytest.raises(UserError, match=r'val_evaluator\.0\.metric=.*no mask head: set .*bbox'):
        resolved(f'model = dict(roi_head=dict(mask_head=None))\n{listed}', DETECTION)


def test_a_metric_of_another_kind(resolved):
    cfg = resolved("val_evaluator = dict(type='VOCMetric')", DETECTION)
    assert cfg.val_evaluator.to_dict().keys() == {'type'} | (
        cfg.val_evaluator.to_dict().keys() & {'metric'})
    assert cfg.default_hooks.checkpoint.save_best == 'pascal_voc/mAP'


def test_datasets_that_are_joined_have_one_set_of_classes(resolved):
    other = "metainfo=dict(classes=('a', 'b'))"
    with pytest.raises(UserError, match='has the classes a, b, but train_dataloader has wall'):
        resolved(f"train_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', "
                 f"datasets=[dict(type='BaseSegDataset', {other}), dict(type='ADE20KDataset')]))")


# ---- batches


@pytest.mark.parametrize('norm', ['BN', 'SyncBN'])
def test_batch_norm_of_one_value(norm, resolved):
    with pytest.raises(UserError, match=f'batch_size=1, but model.decode_head .*{norm}.*GN'):
        resolved(f"batch_size = 1\nnorm_cfg = dict(type='{norm}')")
    resolved("batch_size = 1\nnorm_cfg = dict(type='GN', num_groups=32)")


OWN = """[dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True),
    {}, dict(type='PackSegInputs')]
"""
WRAPPED = """train_dataloader = dict(dataset=dict(
    _delete_=True, type='RepeatDataset', times=2, dataset=dict(
        type='ADE20KDataset', data_root='data/ade/ADEChallengeData2016', data_prefix=dict(
            img_path='images/training', seg_map_path='annotations/training'){})))
"""


@pytest.mark.parametrize(('step', 'size', 'stride'), [
    ("dict(type='RandomCrop', crop_size=256)", (256, 256), (170, 170)),
    ("dict(type='Resize', scale=(512, 256))", (256, 512), (170, 341)),
    ("dict(type='Resize', scale=128, keep_ratio=True)", (128, 128), (85, 85)),
    ("dict(type='RandomCrop', crop_size=(64, 64)), dict(type='Resize', scale=(256, 256))",
     (256, 256), (170, 170))])
def test_padding_and_window_have_the_size_of_the_images(step, size, stride, resolved):
    for text in ('train_pipeline = ' + OWN.format(step),
                 WRAPPED.format(', pipeline=' + OWN.format(step))):
        cfg = resolved(text)
        assert cfg.model.data_preprocessor.size == cfg.model.test_cfg.crop_size == size
        assert cfg.model.test_cfg.stride == stride


@pytest.mark.parametrize('step', [
    "dict(type='RandomFlip', prob=0.5)", "dict(type='Resize', scale=(2048, 512), keep_ratio=True)",
    "dict(type='RandomChoice', transforms=[[dict(type='RandomCrop', crop_size=(64, 64))]])"])
def test_images_of_no_one_size_are_padded_to_the_largest_of_a_batch(step, resolved):
    cfg = resolved('train_pipeline = ' + OWN.format(step))
    assert 'size' not in cfg.model.data_preprocessor
    assert cfg.model.data_preprocessor.size_divisor == 32
    assert cfg.model.test_cfg.crop_size == (512, 512)
    assert resolved.notes[-1] == ('model.data_preprocessor.size_divisor=32 instead of size: the '
                                  'images of training have no one size')


def test_what_is_set_at_the_top_reaches_wrapped_datasets(resolved, tmp_path):
    wrapped = WRAPPED.format(', pipeline=_base_.train_pipeline')
    cfg = resolved(f'crop_size = (256, 256)\nscale = (1024, 256)\nin_chans = 1\n{wrapped}')
    steps = {step.type: step for step in cfg.train_dataloader.dataset.dataset.pipeline}
    assert steps['RandomCrop'].crop_size == cfg.model.data_preprocessor.size == (256, 256)
    assert steps['RandomResize'].scale == (1024, 256)
    assert steps['LoadImageFromFile'].color_type == 'grayscale'
    assert 'PhotoMetricDistortion' not in steps
    crop = OWN.format("dict(type='RandomCrop', crop_size=(64, 64))")
    cfg = resolved(f'train_pipeline = {crop}' + WRAPPED.format(''))
    assert cfg.train_dataloader.dataset.dataset.pipeline[2].crop_size == (64, 64)
    resolved(wrapped, name='parent.py')
    cfg = resolved(f"dataset_type = 'CityscapesDataset'\ntrain_pipeline = {crop}",
                   str(tmp_path / 'parent.py'))
    dataset = cfg.train_dataloader.dataset
    assert (dataset.type, dataset.dataset.type) == ('RepeatDataset', 'CityscapesDataset')
    assert cfg.model.data_preprocessor.size == dataset.dataset.pipeline[2].crop_size == (64, 64)


def test_a_detectors_scale_reaches_wrapped_datasets(resolved):
    cfg = resolved("""scale = (667, 400)
train_dataloader = dict(dataset=dict(_delete_=True, type='ConcatDataset', datasets=[dict(
    type='CocoDataset', data_root='data/coco/', ann_file='annotations/instances_train2017.json',
    data_prefix=dict(img='train2017/'), pipeline=_base_.train_pipeline)]))""", DETECTION)
    first, _ = cfg.train_dataloader.dataset.datasets[0].pipeline[3].transforms
    assert first[0].scales[-1] == (400, 667)


def test_images_are_padded_to_a_size_or_to_a_multiple(resolved, tmp_path):
    cfg = resolved('model = dict(data_preprocessor=dict(size_divisor=64))')
    assert 'size' not in cfg.model.data_preprocessor
    assert cfg.model.data_preprocessor.size_divisor == 64
    resolved('model = dict(data_preprocessor=dict(test_cfg=dict(size=(64, 64))))', name='first.py')
    cfg = resolved('model = dict(data_preprocessor=dict(test_cfg=dict(size_divisor=64)))',
                   str(tmp_path / 'first.py'))
    assert cfg.model.data_preprocessor.test_cfg.to_dict() == dict(size_divisor=64)
    assert cfg.model.data_preprocessor.size == (512, 512)


def test_the_stride_keeps_its_share_of_the_window(resolved):
    test_cfg = resolved('model = dict(test_cfg=dict(crop_size=(256, 384)))').model.test_cfg
    assert (test_cfg.crop_size, test_cfg.stride) == ((256, 384), (170, 255))
    test_cfg = resolved('model = dict(test_cfg=dict(crop_size=(256, 384), stride=(256, 9)))'
                        ).model.test_cfg
    assert test_cfg.stride == (256, 9)


@pytest.mark.parametrize(('text', 'message'), [
    ("model = dict(test_cfg=dict(mode='all'))", "mode='all' must be 'whole' or 'slide'"),
    ("model = dict(test_cfg=dict(_delete_=True, mode='slide', stride=(9, 9)))",
     "mode='slide' needs crop_size"),
    ('model = dict(test_cfg=dict(crop_size=(256, 600), stride=(200, 601)))',
     r'stride=\(200, 601\), but windows have crop_size=\(256, 600\): no window covers'),
    ('model = dict(test_cfg=dict(stride=341.5))', r'test_cfg\.stride=341\.5 must be two whole'),
    ('model = dict(data_preprocessor=dict(size=(64, 64), size_divisor=32))',
     r'data_preprocessor has size=\(64, 64\) and size_divisor=32, but .* one of them'),
    ('train_pipeline = ' + OWN.format("dict(type='RandomCrop', crop_size=0)"),
     r'crop_size=.* must be two whole numbers'),
    ("val_evaluator = dict(iou_metrics=['mIou'])", "IoUMetric has no 'mIou'. Did you mean mIoU"),
    ('train_dataloader = dict(batch_sise=4)', "no argument 'batch_sise'. Did you mean batch_size"),
    ("custom_hooks = [dict(type='EMAHok')]", "type='EMAHok' is no registered class. Did.*EMAHook"),
    ("dataset_type = 'CityscapeDataset'", 'Did you mean CityscapesDataset'),
    ('batch_size = 0', 'train_dataloader.batch_size=0 must be a whole number from 1 up'),
    ("log_level = 'LOUD'", "log_level='LOUD' must be one of DEBUG, INFO")])
def test_values_that_nothing_takes(text, message, resolved):
    with pytest.raises(UserError, match=message):
        resolved(text)


@pytest.mark.parametrize(('unset', 'split', 'other'), [
    ('val_dataloader', 'val', 'test'), ('val_evaluator', 'val', 'test'),
    ('test_cfg', 'test', 'val')])
@pytest.mark.parametrize('recipe', [SEGMENTATION, DETECTION])
def test_a_loop_without_data_is_none(unset, split, other, recipe, resolved):
    cfg = resolved(f'{unset} = None', recipe)
    for part in ('dataloader', 'cfg', 'evaluator'):
        assert cfg[f'{split}_{part}'] is None
        assert cfg[f'{other}_{part}'] is not None


def test_determinism_needs_no_seed(resolved):
    cfg = resolved('randomness = dict(deterministic=True)')
    assert cfg.randomness == dict(deterministic=True, seed=None)


def test_heads_have_the_channels_of_the_neck(resolved):
    cfg = resolved('model = dict(neck=dict(out_channels=64))', DETECTION)
    model = cfg.model
    assert model.rpn_head.in_channels == model.roi_head.mask_head.in_channels == 64
    assert [head.in_channels for head in model.roi_head.bbox_head] == [64, 64, 64]
    assert (model.roi_head.bbox_roi_extractor.out_channels
            == model.roi_head.mask_roi_extractor.out_channels == 64)
    with pytest.raises(UserError, match='in_channels=8, but model.neck has 64 channels'):
        resolved('model = dict(neck=dict(out_channels=64), rpn_head=dict(in_channels=8))',
                 DETECTION)


def test_a_detectors_sizes_follow_its_scale(resolved):
    cfg = resolved('scale = (667, 400)', DETECTION)
    for split in ('val', 'test'):
        resize, = [step for step in cfg[f'{split}_dataloader'].dataset.pipeline
                   if step.type == 'Resize']
        assert resize.scale == (667, 400)
    first, second = cfg.train_dataloader.dataset.pipeline[3].transforms
    assert first[0].scales[0] == (240, 667)
    assert first[0].scales[-1] == (400, 667)
    assert [step.get('scales', step.get('crop_size')) for step in second][1] == (192, 300)
    assert second[0].scales == [(200, 667), (250, 667), (300, 667)]
    assert second[2].scales == first[0].scales
    square = resolved('scale = (96, 96)', DETECTION).train_dataloader.dataset.pipeline[3]
    assert square.transforms[1][1].crop_size == (46, 72)
    with pytest.raises(UserError, match='crop_size=.* is a setting of segmentation'):
        resolved('crop_size = (64, 64)', DETECTION)


def test_a_scale_reaches_the_pipelines_of_the_config_that_it_is_set_on(resolved):
    cfg = resolved('scale = (320, 240)', DEMO_SEGMENTATION)
    train, test = (cfg[f'{split}_dataloader'].dataset.pipeline for split in ('train', 'test'))
    assert train[2].scale == {step.type: step for step in test}['Resize'].scale == (320, 240)
    cfg = resolved('scale = (320, 320)', DEMO_DETECTION)
    train, test = (cfg[f'{split}_dataloader'].dataset.pipeline for split in ('train', 'test'))
    assert train[3].scales == [(256, 256), (288, 288), (320, 320)]
    assert {step.type: step for step in test}['Resize'].scale == (320, 320)
    own = "train_pipeline = [dict(type='RandomResize', scale=(99, 99)), dict(type='PackSegInputs')]"
    cfg = resolved(f'scale = (320, 240)\nreduce_zero_label = True\n{own}', DEMO_SEGMENTATION)
    assert cfg.train_dataloader.dataset.pipeline[0].scale == (99, 99), "the user's own"


@pytest.mark.parametrize(('step', 'resizes'), [
    ('', [dict(scale_factor=0.5), dict(scale_factor=0.75)]),
    ("dict(type='Resize', scale_factor=(0.5, 1.0), keep_ratio=True), ",
     [dict(scale_factor=(0.25, 0.5)), dict(scale_factor=(0.375, 0.75))]),
    ("dict(type='ResizeShortestEdge', scale=64, max_size=99), ", None)])
def test_augmentations_of_a_test_are_relative_to_its_size(step, resizes, resolved):
    cfg = resolved(f"test_pipeline = [dict(type='LoadImageFromFile'), {step}"
                   "dict(type='LoadAnnotations', reduce_zero_label=True), "
                   "dict(type='PackSegInputs')]")
    groups = cfg.tta_pipeline[1].transforms
    if resizes is None:
        assert [group[0].type for group in groups] == [
            'RandomFlip', 'ResizeShortestEdge', 'LoadAnnotations', 'PackSegInputs']
        return
    assert [one.to_dict() for one in groups[0][:2]] == [
        dict(one, type='Resize', keep_ratio=True) for one in resizes]
    assert [group[0].type for group in groups[1:]] == [
        'RandomFlip', 'LoadAnnotations', 'PackSegInputs']


def test_augmentations_of_a_detectors_test(resolved):
    cfg = resolved("""test_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(640, 640), keep_ratio=True),
    dict(type='Pad', size_divisor=32), dict(type='PackDetInputs', meta_keys=('img_id',))]""",
                   DETECTION)
    groups = cfg.tta_pipeline[1].transforms
    assert groups[0][0].scale == (640, 640)
    assert [group[0].type for group in groups] == ['Resize', 'RandomFlip', 'Pad', 'PackDetInputs']
    assert 'flip' in groups[-1][0].meta_keys
    assert resolved('scale = (667, 400)', DETECTION).tta_pipeline[1].transforms[0][0].scale == (
        667, 400)


# ---- parts that follow each other


@pytest.mark.parametrize('text', ["arch = 'v2_nano'", 'model = dict(backbone=dict(use_grn=True))'])
def test_v2_takes_the_layer_scale_away(text, resolved):
    assert resolved(text).model.backbone.layer_scale_init_value == 0.0


def test_a_head_of_one_map_reads_the_last(resolved):
    head = resolved("model = dict(decode_head=dict(type='FCNHead'))").model.decode_head
    assert (head.in_channels, head.in_index) == (768, 1)  # of the maps 2 and 3, which are left
    assert resolved.notes[-1].startswith('model.backbone.out_indices=[2, 3]')
    head = resolved("model = dict(decode_head=dict(type='SegformerHead'))").model.decode_head
    assert head.in_channels == [96, 192, 384, 768]


def test_heads_read_the_maps_that_are_left(resolved):
    model = resolved('model = dict(backbone=dict(out_indices=[1, 3]))').model
    assert (model.decode_head.in_index, model.decode_head.in_channels) == ([0, 1], [192, 768])
    assert (model.auxiliary_head.in_index, model.auxiliary_head.in_channels) == (1, 768)
    model = resolved('model = dict(backbone=dict(out_indices=[1, 2]))').model
    assert (model.auxiliary_head.in_index, model.auxiliary_head.in_channels) == (1, 384)


def test_a_mask_rcnn_without_masks_is_a_faster_rcnn(resolved):
    cfg = resolved('model = dict(roi_head=dict(mask_head=None))', f'configs/{MASK}.py')
    assert cfg.val_evaluator.metric == ['bbox']


@pytest.mark.parametrize(('text', 'strides', 'featmaps'), [
    ('model = dict(backbone=dict(out_indices=[1, 2, 3]))', [8, 16, 32, 64, 128], [8, 16, 32, 64]),
    ('model = dict(backbone=dict(output_stride=16))', [4, 8, 16, 16, 32], [4, 8, 16, 16]),
    ('model = dict(neck=dict(num_outs=4))', [4, 8, 16, 32], [4, 8, 16, 32])])
def test_anchors_have_the_strides_of_the_maps(text, strides, featmaps, resolved):
    model = resolved(text, DETECTION).model
    assert model.rpn_head.anchor_generator.strides == strides
    for kind in ('bbox', 'mask'):
        assert model.roi_head[f'{kind}_roi_extractor'].featmap_strides == featmaps
    with pytest.raises(UserError, match=r'strides=\[4, 8\], but model.neck has .4, 8, 16'):
        resolved('model = dict(rpn_head=dict(anchor_generator=dict(strides=[4, 8])))', DETECTION)


FCOS = 'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
RETINANET = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'
REPPOINTS = 'mmdet::reppoints/reppoints-moment_r50_fpn_1x_coco.py'
PYRAMID = ("model = dict(backbone=dict(_delete_=True, type='ConvNeXt', out_indices={}), "
           'neck=dict(start_level={}))')


@pytest.mark.parametrize(('recipe', 'key'), [
    (RETINANET, 'anchor_generator.strides'), (FCOS, 'strides'), (REPPOINTS, 'point_strides')])
@pytest.mark.parametrize(('given', 'start', 'left', 'strides'), [
    ([0, 1, 2, 3], 1, [1, 2, 3], [8, 16, 32, 64, 128]),
    ([1, 2, 3], 1, [2, 3], [16, 32, 64, 128, 256]),
    ([0, 1, 2, 3], 0, [0, 1, 2, 3], [4, 8, 16, 32, 64])])
def test_a_pyramid_from_a_later_map(recipe, key, given, start, left, strides, resolved):
    """Maps before its first are not computed, and the heads have the strides of its maps."""
    model = resolved(PYRAMID.format(given, start), recipe).model
    assert (model.backbone.out_indices, model.neck.start_level) == (left, 0)
    assert model.neck.in_channels == [(96, 192, 384, 768)[i] for i in left]
    assert list(edits.lookup(model, f'bbox_head.{key}')) == strides


def test_a_pyramid_to_an_earlier_map(resolved):
    model = resolved('model = dict(neck=dict(start_level=1, end_level=2, num_outs=2))',
                     DETECTION).model
    assert (model.backbone.out_indices, model.neck.in_channels) == ([1, 2], [192, 384])
    assert (model.neck.start_level, model.neck.end_level) == (0, -1)
    assert model.rpn_head.anchor_generator.strides == [8, 16]


def test_strides_of_points_that_the_neck_does_not_have(resolved):
    text = PYRAMID.format([0, 1, 2, 3], '0), bbox_head=dict(strides=[4, 8, 16, 32, 9]')
    with pytest.raises(UserError, match=r'strides=\[4, 8, 16, 32, 9\], but model.neck has .4, 8'):
        resolved(text, FCOS)


@pytest.mark.parametrize('given', ['[3]', '[0, 1, 2, 3]'])
def test_a_neck_of_one_map_reads_the_last(given, resolved):
    neck = ("neck=dict(_delete_=True, type='DilatedEncoder', in_channels={}, out_channels=256, "
            'block_mid_channels=8, num_residual_blocks=1, block_dilations=[2])')
    text = 'model = dict(backbone=dict(out_indices={}), ' + neck + ')'
    model = resolved(text.format(given, 768), DETECTION).model
    assert (model.backbone.out_indices, model.neck.in_channels) == ([3], 768)
    with pytest.raises(UserError, match='in_channels=96, but model.backbone has 768 channels'):
        resolved(text.format(given, 96), DETECTION)


def test_necks_in_a_list(resolved):
    recipe = 'mmdet::libra_rcnn/libra-retinanet_r50_fpn_1x_coco.py'
    backbone = "backbone=dict(_delete_=True, type='ConvNeXt', arch='base')"
    first, second = resolved(f'model = dict({backbone})', recipe).model.neck
    assert (first.in_channels, first.start_level, second.in_channels) == ([256, 512, 1024], 0, 256)


# ---- boxes and their losses


def box_loss(kind: str, more: str = '') -> str:
    return f"dict(loss_bbox=dict(type='{kind}'){more})"


@pytest.mark.parametrize(('kind', 'decoded'), [('GIoULoss', True), ('SmoothL1Loss', None)])
@pytest.mark.parametrize(('recipe', 'path', 'text'), [
    (f'configs/{MASK}.py', 'roi_head.bbox_head', 'model = dict(roi_head=dict(bbox_head={}))'),
    (f'configs/{MASK}.py', 'rpn_head', 'model = dict(rpn_head={})'),
    (RETINANET, 'bbox_head', 'model = dict(bbox_head={})')])
def test_boxes_are_decoded_for_losses_of_the_iou(kind, decoded, recipe, path, text, resolved):
    model = resolved(text.format(box_loss(kind)), recipe).model
    assert edits.lookup(model, f'{path}.reg_decoded_bbox') is decoded
    stated = text.format(box_loss(kind, f', reg_decoded_bbox={not decoded}'))
    with pytest.raises(UserError, match=f'reg_decoded_bbox={not decoded}, but .*{kind}. compares'):
        resolved(stated, recipe)


def test_deltas_are_not_decoded_for_a_distance(resolved):
    """In Cascade R-CNN, whose recipe decodes boxes for its GIoU; heads as a user lists them."""
    cfg = Config.fromfile(ROOT / DETECTION)
    heads = [head.to_dict() for head in cfg.model.roi_head.bbox_head]
    for head in heads:
        del head['reg_decoded_bbox']
        head['loss_bbox'] = dict(type='SmoothL1Loss')
    assert 'reg_decoded_bbox' not in resolved(
        f'model = dict(roi_head=dict(bbox_head={heads}))', DETECTION).model.roi_head.bbox_head[0]
    heads[1]['reg_decoded_bbox'] = True
    with pytest.raises(UserError, match='bbox_head.1.reg_decoded_bbox=True, but .* the deltas of'):
        resolved(f'model = dict(roi_head=dict(bbox_head={heads}))', DETECTION)


def test_an_option_for_the_loss_of_a_cascade():
    from convnext_mm.engine.checks import read_config
    heads = read_config(DETECTION, {
        'model.roi_head.bbox_head.0.loss_bbox.type': 'SmoothL1Loss'}).model.roi_head.bbox_head
    assert [head.reg_decoded_bbox for head in heads] == [False, True, True]


@pytest.mark.parametrize('recipe', [
    'mmdet::atss/atss_r50_fpn_1x_coco.py', 'mmdet::gfl/gfl_r50_fpn_1x_coco.py',
    'mmdet::free_anchor/freeanchor_r50_fpn_1x_coco.py'])
def test_heads_that_decode_by_themselves_stay(recipe, resolved):
    head = resolved("model = dict(bbox_head=dict(loss_bbox=dict(type='DIoULoss')))",
                    recipe).model.bbox_head
    assert 'reg_decoded_bbox' not in head


@pytest.mark.parametrize(('text', 'message'), [
    ("model = dict(backbone=dict(type='ConvNeXtt'))", 'model.backbone.type=.*mean ConvNeXt'),
    ("norm_cfg = dict(type='SyncBNN')", 'norm_cfg.type=.SyncBNN.*mean SyncBN'),
    ('model = dict(decode_head=dict(channels=0))', 'decode_head.channels=0 must be a whole')])
def test_parts_that_do_not_exist(text, message, resolved):
    with pytest.raises(UserError, match=message):
        resolved(text)


@pytest.mark.parametrize(('text', 'layout'), [
    ('', True),
    ("model = dict(roi_head=dict(bbox_roi_extractor=dict(type='SingleRoIExtractor')))", False),
    ("model = dict(rpn_head=dict(type='RPNHead'))", False)])
def test_maps_are_in_channels_last_only_for_parts_that_take_them(text, layout, resolved):
    assert resolved(text, f'configs/{MASK}.py').model.neck.channels_last == layout


@pytest.mark.parametrize('name', [
    'mmdet::vfnet/vfnet_r50_fpn_1x_coco.py', 'mmdet::ssd/ssd300_coco.py',
    'mmdet::dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py',
    'mmseg::maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512.py'])
def test_what_toolboxes_ship_is_no_mistake(name, resolved):
    """Arguments that a class takes and ignores, and counts for several levels."""
    cfg = resolved('', name)
    assert cfg.model.type
    head = 'decode_head' if 'mmseg' in name else 'bbox_head'
    if cfg.model.get(head):
        with pytest.raises(UserError, match=f'model.{head}.num_clases: .* has no argument'):
            resolved(f'model = dict({head}=dict(num_clases=3))', name)
