"""Depths of parameters in layer-wise learning-rate decay, and their factors."""
import pytest
import torch

from convnext_mm import ConvNeXt, layer_decay


@pytest.mark.parametrize(('name', 'layer', 'stage', 'block'), [
    ('downsample_layers.0.0.weight', 0, 0, 0), ('downsample_layers.1.1.bias', 2, 0, 4),
    ('downsample_layers.3.1.bias', 12, 0, 34), ('stages.0.2.gamma', 1, 1, 3),
    ('stages.2.26.norm.weight', 11, 3, 33), ('stages.3.0.dwconv.weight', 12, 4, 34),
    ('stages.3.2.dwconv.weight', 12, 4, 36), ('norm3.weight', 13, 13, 37)])
def test_depth_from_name(name, layer, stage, block):
    assert layer_decay.convnext_layer_id(name, 12) == layer
    assert layer_decay.convnext_stage_id(name, 12) == stage
    assert layer_decay.convnext_block_id(name, (3, 3, 27, 3)) == block


def test_factor_from_depth():
    assert layer_decay.lr_scale(13, 12, 0.8) == 1.0
    assert layer_decay.lr_scale(0, 6, 0.9) == pytest.approx(0.9 ** 7)


def test_get_layer_depth_of_the_backbone():
    """Depth and number of depths, as in mmpretrain; by default those of the authors."""
    with torch.device('meta'):
        tiny, base = ConvNeXt('tiny'), ConvNeXt('base')
    assert tiny.get_layer_depth('stages.2.4.gamma') == (4, 8)
    assert base.get_layer_depth('stages.2.26.gamma') == (11, 14)
    assert base.get_layer_depth('backbone.norm3.weight', 'backbone.') == (13, 14)
    assert tiny.get_layer_depth('stages.3.0.gamma', '', 'stage_wise', 6) == (4, 8)
    assert tiny.get_layer_depth('stages.3.2.gamma', '', 'layer_wise', 'auto') == (18, 20)


def test_embeddings_of_a_subclass_are_the_first_layer():
    for name in ('cls_token', 'mask_token', 'pos_embed'):
        assert layer_decay.convnext_layer_id(name, 6) == 0
        assert layer_decay.convnext_stage_id(name, 6) == 0
        assert layer_decay.convnext_block_id(name, [1, 2, 3, 1]) == 0
    assert layer_decay.convnext_layer_id('norm3.weight', 6) == 7
