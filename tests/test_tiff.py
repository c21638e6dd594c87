"""TIFF files that are read and written piece by piece."""
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import pytest
import tifffile

from convnext_mm import tiff
from convnext_mm.tiff import DamagedTiff, NotByRows, TiffReader, read_georeference, write_class_map

COLOR = dict(type='LoadImageFromFile')
BANDS = dict(type='LoadImageFromFile', color_type='unchanged', imdecode_backend='tifffile')
GEO = [(33550, 'd', 3, (0.3, 0.3, 0.0), True),
       (33922, 'd', 6, (0.0, 0.0, 0.0, 500000.0, 5600000.0, 0.0), True),
       (34735, 'H', 4, (1, 1, 0, 0), True)]
IMAGE = np.random.default_rng(0).integers(0, 256, (203, 157, 6), np.uint8)


@pytest.fixture(autouse=True)
def large(monkeypatch):
    monkeypatch.setattr(tiff, 'LARGE_PICTURE', 1000)


def write(path: Path, image: np.ndarray, **options: Any) -> str:
    kind = 'rgb' if image.ndim == 3 and image.shape[2] in (3, 4) else 'minisblack'
    tifffile.imwrite(path, image, **{'photometric': kind, 'planarconfig': 'contig' if
                                     image.ndim == 3 else None, 'compression': 'zlib', **options})
    return str(path)


@pytest.mark.parametrize('layout', [
    dict(tile=(64, 48)), dict(rowsperstrip=17, predictor=True), dict(rowsperstrip=203),
    dict(tile=(32, 32), bigtiff=True, compression=None)])
@pytest.mark.parametrize(('image', 'step'), [
    (IMAGE[..., :3], COLOR), (IMAGE[..., 0], COLOR), (IMAGE[..., 0], dict(
        COLOR, color_type='grayscale')), (IMAGE, BANDS), (IMAGE.astype(np.uint16) * 200, BANDS),
    (IMAGE[..., :4], COLOR)])
def test_rows_are_those_that_the_pipeline_loads(layout, image, step, tmp_path):
    more = dict(extrasamples=['unspecified']) if image.shape[2:] == (4,) else {}
    path = write(tmp_path / 'a.tif', image, **layout, **more)
    expected = mmcv.imread(path, step.get('color_type', 'color'),
                           backend=step.get('imdecode_backend', 'cv2')).reshape(203, 157, -1)
    reader = TiffReader(path, step)
    assert reader.size == (203, 157)
    assert reader.bands == expected.shape[2]
    for top, bottom in ((0, 50), (33, 83), (66, 116), (99, 149), (132, 182), (153, 203)):
        assert np.array_equal(reader.rows(top, bottom), expected[top:bottom])
    step_drawn = tiff.drawn_step(reader.size)
    assert np.array_equal(reader.small, expected[::step_drawn, ::step_drawn])


@pytest.mark.parametrize(('image', 'options', 'step', 'reason'), [
    (IMAGE[..., :3].astype(np.uint16), {}, COLOR, 'the pipeline converts its colors'),
    (IMAGE[..., :4], dict(extrasamples=['unassalpha']), COLOR, 'the pipeline converts its colors'),
    (IMAGE[..., :3], dict(extratags=[(274, 'H', 1, 6, True)]), COLOR, 'converts its colors'),
    (IMAGE[..., :3], {}, dict(COLOR, color_type='unchanged'), 'converts its colors'),
    (IMAGE[..., 0], dict(photometric='miniswhite'), COLOR, 'converts its colors'),
    (np.moveaxis(IMAGE, 2, 0), dict(planarconfig='separate'), BANDS, 'not one page of height'),
    (IMAGE[:20, :20, :3], {}, COLOR, 'it is small')])
def test_what_the_pipeline_loads_in_another_way_is_not_read_by_rows(image, options, step, reason,
                                                                     tmp_path):
    with pytest.raises(NotByRows, match=reason):
        TiffReader(write(tmp_path / 'a.tif', image, **options), step)


def test_damage_and_missing_decoders_are_named(tmp_path):
    whole = Path(write(tmp_path / 'a.tif', IMAGE[..., :3], rowsperstrip=50)).read_bytes()
    (tmp_path / 'cut.tif').write_bytes(whole[:-1000])
    with pytest.raises(DamagedTiff, match='truncated: it has'):
        TiffReader(str(tmp_path / 'cut.tif'), COLOR)
    with tifffile.TiffFile(tmp_path / 'a.tif') as file:
        start = file.pages[0].dataoffsets[2]
    (tmp_path / 'bad.tif').write_bytes(whole[:start] + b'x' * 500 + whole[start + 500:])
    reader = TiffReader(str(tmp_path / 'bad.tif'), COLOR)
    reader.rows(0, 100)
    with pytest.raises(DamagedTiff, match='strip or tile 2 is damaged'):
        reader.rows(60, 130)
    (tmp_path / 'text.tif').write_text('no image')
    with pytest.raises(NotByRows, match='not a TIFF file'):
        TiffReader(str(tmp_path / 'text.tif'), COLOR)
    try:
        import imagecodecs  # noqa: F401
    except ImportError:
        from PIL import Image
        Image.fromarray(IMAGE[..., :3]).save(tmp_path / 'lzw.tif', compression='tiff_lzw')
        with pytest.raises(NotByRows, match='LZW, needs the package imagecodecs: pip install'):
            TiffReader(str(tmp_path / 'lzw.tif'), COLOR)


@pytest.mark.parametrize('blocks', [1, 32, 203, 700])
def test_class_maps_are_written_with_the_georeference(blocks, tmp_path):
    classes = np.random.default_rng(1).integers(0, 150, (1203, 700), np.uint8)
    source = write(tmp_path / 'a.tif', IMAGE[..., :3], extratags=GEO)
    finished = []

    def rows():
        for i in range(0, 1203, blocks):
            yield classes[i:i + blocks]
        finished.append(True)
    write_class_map(tmp_path / 'b.tif', rows(), classes.shape, np.uint8,
                    read_georeference(source, 150))
    assert finished
    with tifffile.TiffFile(tmp_path / 'b.tif') as file:
        page = file.pages[0]
        assert np.array_equal(page.asarray(), classes)
        assert page.is_tiled
        assert page.compression == tifffile.COMPRESSION.ADOBE_DEFLATE
        for code, _, _, value, _ in GEO:
            assert page.tags[code].value == value
    assert [path.name for path in tmp_path.iterdir()].count('b.tif') == 1
    assert not [path for path in tmp_path.iterdir() if 'part' in path.name]


@pytest.mark.parametrize(('value', 'kept'), [('255', True), ('0', False), ('-9999', False),
                                             ('nan', False), ('none', False)])
def test_no_data_that_would_hide_a_class_is_not_copied(value, kept, tmp_path):
    path = write(tmp_path / 'a.tif', IMAGE[..., 0], extratags=[(42113, 's', 0, value, True)])
    assert [tag[0] for tag in read_georeference(path, 150)] == ([42113] if kept else [])


def test_nothing_half_written_is_left(tmp_path):
    def rows():
        yield np.zeros((600, 700), np.uint8)
        raise OSError(28, 'No space left on device')
    with pytest.raises(OSError, match='No space left'):
        write_class_map(tmp_path / 'b.tif', rows(), (1203, 700), np.uint8, [])
    assert list(tmp_path.iterdir()) == []
