"""Normalization of images with any number of bands."""
import pytest
import torch
from mmengine.registry import MODELS, init_default_scope

from convnext_mm.datasets.loading import image_loader

MEAN, STD = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]


@pytest.mark.parametrize(('scope', 'base', 'settings'), [
    ('mmseg', 'SegDataPreProcessor', dict(size=(8, 8))),
    ('mmdet', 'DetDataPreprocessor', dict(pad_size_divisor=4))])
def test_each_band_has_its_mean_and_std(scope, base, settings):
    init_default_scope(scope)
    preprocessor = MODELS.build(dict(
        type='MultiBandPreprocessor', base=base, mean=MEAN, std=STD, **settings))
    assert type(preprocessor).__name__ == base
    image = torch.arange(6 * 8 * 8).view(6, 8, 8)
    output = preprocessor(dict(inputs=[image], data_samples=None))['inputs']
    expected = (image - torch.tensor(MEAN).view(6, 1, 1)) / torch.tensor(STD).view(6, 1, 1)
    assert torch.equal(output, expected[None])
    assert dict(preprocessor.state_dict()) == {}


def test_images_are_read_as_the_pipeline_does(tmp_path):
    import numpy as np
    import tifffile
    values = np.arange(5 * 7 * 6, dtype=np.uint16).reshape(5, 7, 6) * 100
    tifffile.imwrite(tmp_path / 'a.tif', values, photometric='minisblack', planarconfig='contig')
    load = image_loader([dict(type='LoadImageFromFile', color_type='unchanged',
                              imdecode_backend='tifffile')], 'mmseg')
    assert np.array_equal(load(str(tmp_path / 'a.tif')), values)
