"""Options of the command line, from their text to the resolved config."""
import pytest

from convnext_mm import UserError
from convnext_mm.engine.checks import read_config
from convnext_mm.key_values import parse_value
from tests.helpers import DETECTION, ROOT, SEGMENTATION


@pytest.mark.parametrize(('text', 'value'), [
    ("('traffic light','sky')", ('traffic light', 'sky')), ('(traffic light,sky)', (
        'traffic light', 'sky')), ('my data/set 1', 'my data/set 1'), ('1e-3', 1e-3),
    ('[1,2,3]', [1, 2, 3]), ('1,2', (1, 2)), ('a,b', ['a', 'b']), ('True', True), ('false', False),
    ('None', None), ('[(1,2),[a,b],c]', [(1, 2), ['a', 'b'], 'c']), ("dict", 'dict'),
    ("{'a': 1}", {'a': 1}), ("'quoted text'", 'quoted text'), ('640x480', '640x480')])
def test_values(text, value):
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_elements_of_lists_and_tuples():
    cfg = read_config(SEGMENTATION, {'crop_size.0': 256, 'model.decode_head.pool_scales.3': 8})
    assert list(cfg.crop_size) == [256, 512]
    assert tuple(cfg.model.data_preprocessor.size) == (256, 512)
    assert list(cfg.model.decode_head.pool_scales) == [1, 2, 3, 8]
    cfg = read_config(DETECTION, {'model.roi_head.bbox_head.1.fc_out_channels': 512})
    assert [head.fc_out_channels for head in cfg.model.roi_head.bbox_head] == [1024, 512, 1024]


@pytest.mark.parametrize(('options', 'path', 'value'), [
    ({'max_iters': 2000}, 'train_cfg.max_iters', 2000),
    ({'scale': (1024, 256)}, 'val_dataloader.dataset.pipeline.1.scale', (1024, 256)),
    ({'batch_size': 3}, 'train_dataloader.batch_size', 3),
    ({'default_hooks.checkpoint.save_last': False}, 'default_hooks.checkpoint.save_last', False),
    ({'model.decode_head.align_corners': True}, 'model.decode_head.align_corners', True),
    ({'model.backbone.arch': 'small'}, 'model.backbone.arch', 'small')])
def test_options_reach_what_they_name(options, path, value):
    from convnext_mm.resolution.edits import lookup
    assert lookup(read_config(SEGMENTATION, options), path) == value


@pytest.mark.parametrize(('options', 'message'), [
    ({'optim_wrapper.optimizer.lrr': 1.0}, "optim_wrapper.optimizer has no key 'lrr'.*mean lr"),
    ({'model.decode_head.xyz': 1.0}, "decode_head.xyz: UPerHead has no argument 'xyz'"),
    ({'default_hooks.checkpoint.intervall': 5}, 'Did you mean interval'),
    ({'model.test_cfg.stried': (1, 1)}, 'stried.*Did you mean stride'),
    ({'crop_size.2': 5}, 'crop_size is a list of length 2'),
    ({'max_iter': 5}, "has no key 'max_iter'.*max_iters")])
def test_options_that_name_nothing(options, message):
    with pytest.raises(UserError, match=message):
        read_config(SEGMENTATION, options)


def test_an_option_overrides_a_short_name_of_the_file(tmp_path):
    """Also with the recipe's own value, which does not look like a change."""
    path = tmp_path / 'mine.py'
    path.write_text(f"_base_ = '{ROOT}/{SEGMENTATION}'\nbatch_size = 8\nnum_workers = 0\n"
                    'max_iters = 900\n')
    cfg = read_config(str(path), {'train_dataloader.batch_size': 2,
                                  'val_dataloader.num_workers': 4, 'train_cfg.max_iters': 160000})
    assert cfg.train_dataloader.batch_size == 2
    assert [cfg[f'{split}_dataloader'].num_workers for split in ('train', 'val', 'test')] == [
        0, 4, 0]
    assert (cfg.train_cfg.max_iters, cfg.param_scheduler[1].end) == (160000, 160001)
    assert read_config(str(path), {'batch_size': 3}).train_dataloader.batch_size == 3
