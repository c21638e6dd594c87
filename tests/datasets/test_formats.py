"""Annotations of other formats, with the boxes, polygons and classes that they have in COCO's."""
import base64
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from convnext_mm import UserError
from convnext_mm.datasets.coco import load_coco
from convnext_mm.datasets.formats import convert, convert_colors, recognise
from tests.helpers import ROOT, SEGMENTATION, call_tool


def picture(path: Path, size: tuple[int, int] = (100, 50)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size).save(path)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')


def voc(root: Path, name: str, folder: str = 'Annotations', polygon: str = '') -> None:
    picture(root / ('JPEGImages' if folder == 'Annotations' else folder) / f'{name}.jpg')
    write(root / folder / f'{name}.xml', f'''<annotation><filename>{name}.jpg</filename>
<object><name>cell</name><difficult>0</difficult>{polygon}
<bndbox><xmin>11</xmin><ymin>6</ymin><xmax>30</xmax><ymax>25</ymax></bndbox></object>
<object><name>blob</name><difficult>1</difficult>
<bndbox><xmin>0</xmin><ymin>1</ymin><xmax>120</xmax><ymax>50</ymax></bndbox></object>
</annotation>''')


def objects(path: Path) -> list[dict]:
    content, problems = load_coco(str(path))
    assert problems == []
    return content['annotations']


def test_pascal_voc(tmp_path):
    for name in 'abc':
        voc(tmp_path, name)
    write(tmp_path / 'ImageSets/Main/train.txt', 'a\nb\n')
    write(tmp_path / 'ImageSets/Main/val.txt', 'c\n')
    assert recognise(tmp_path) == recognise(tmp_path / 'Annotations/a.xml') == 'Pascal VOC'
    done = convert(str(tmp_path), str(tmp_path / 'out'))
    assert done.classes == ['blob', 'cell']
    assert done.counts == dict(train=(2, 4, 0), val=(1, 2, 0))
    cell, blob = objects(done.files['val'])
    assert (cell['bbox'], cell['category_id'], cell['iscrowd']) == ([10, 5, 20, 20], 2, 0)
    assert (blob['bbox'], blob['category_id'], blob['iscrowd']) == ([0, 0, 100, 50], 1, 1)
    image, = load_coco(str(done.files['val'])).content['images']
    assert image == dict(id=1, width=100, height=50, file_name='JPEGImages/c.jpg')
    assert (done.images / image['file_name']).is_file()


def test_voc_of_roboflow_with_polygons(tmp_path):
    polygon = ('<polygon><x1>10</x1><y1>5</y1><x2>30</x2><y2>5</y2><x3>30</x3><y3>25</y3>'
               '</polygon>')
    voc(tmp_path, 'a', 'train', polygon)
    voc(tmp_path, 'b', 'valid')
    done = convert(str(tmp_path), str(tmp_path / 'out'))
    assert done.counts == dict(train=(1, 2, 1), val=(1, 2, 0))
    cell = objects(done.files['train'])[0]
    assert cell['segmentation'] == [[10, 5, 30, 5, 30, 25]]
    assert cell['area'] == 200


@pytest.mark.parametrize('names', ['[cat, dog]', '{0: cat, 1: dog}'])
@pytest.mark.parametrize(('train', 'folder'), [
    ('images/train', 'images/train'), ('../train/images', 'train/images')])
def test_yolo(tmp_path, names, train, folder):
    picture(tmp_path / folder / 'a.jpg')
    picture(tmp_path / folder / 'empty.jpg')
    write(tmp_path / folder.replace('images', 'labels') / 'a.txt',
          '1 0.2 0.3 0.2 0.4\n0 0.1 0.1 0.5 0.1 0.5 0.6\n')
    write(tmp_path / 'data.yaml', f'train: {train}\nval: nothing\nnc: 2\nnames: {names}\n')
    assert recognise(tmp_path) == recognise(tmp_path / 'data.yaml') == 'YOLO'
    done = convert(str(tmp_path / 'data.yaml'), str(tmp_path / 'out'))
    assert (done.classes, done.counts) == (['cat', 'dog'], dict(train=(2, 2, 1)))
    assert done.notes == [
        'nothing of data.yaml is not there', '1 of 2 images of train have no label file, so they '
        f'have no objects: {tmp_path}/{folder.replace("images", "labels")}/empty.txt']
    dog, cat = objects(done.files['train'])
    assert (dog['bbox'], dog['category_id'], dog['segmentation']) == ([10, 5, 20, 20], 2, [])
    assert cat['segmentation'] == [[10, 5, 50, 5, 50, 30]]
    assert (cat['bbox'], cat['category_id'], cat['area']) == ([10, 5, 40, 25], 1, 500)


@pytest.mark.parametrize('name', ['config.yaml', 'coco128.yml'])
def test_yolo_with_ids_that_leave_numbers_out(tmp_path, name):
    picture(tmp_path / 'images/a.jpg')
    write(tmp_path / 'labels/a.txt', '90 0.2 0.3 0.2 0.4\n1 0.2 0.3 0.2 0.4\n')
    write(tmp_path / 'other.yaml', 'lr: 0.1\n')
    write(tmp_path / name, 'path: .\ntrain: images\nnames:\n  90: toothbrush\n  1: person\n')
    assert recognise(tmp_path) == 'YOLO'
    done = convert(str(tmp_path), str(tmp_path / 'out'))
    assert done.classes == ['person', 'toothbrush']
    assert [one['category_id'] for one in objects(done.files['train'])] == [2, 1]
    write(tmp_path / 'labels/a.txt', '2 0.2 0.3 0.2 0.4\n')
    with pytest.raises(UserError, match='one of the 2 classes from 1 to 90'):
        convert(str(tmp_path), str(tmp_path / 'out'))


@pytest.mark.parametrize('root', ['C:\\\\Users\\me\\cells\\', '/content/cells/'])
def test_a_data_set_of_yolo_that_was_moved(tmp_path, root):
    folder = tmp_path / 'cells'
    picture(folder / 'train/images/a.jpg')
    write(folder / 'train/labels/a.txt', '0 0.2 0.3 0.2 0.4\n')
    place = f'{root}train{root[-1]}images'
    write(folder / 'data.yaml', f"train: '{place}'\nval: '{root}images'\nnames: [cell]\n")
    done = convert(str(folder), str(tmp_path / 'out'))
    assert done.counts == dict(train=(1, 1, 0))
    assert done.notes == [
        f'{place} of data.yaml is not there: {folder}/train/images is taken instead',
        f'{root}images of data.yaml is not there']
    write(folder / 'data.yaml', f"train: '{root}images'\nval: '{place}'\nnames: [cell]\n")
    with pytest.raises(UserError, match=r'(?s)data\.yaml names no images .*is not there'):
        convert(str(folder), str(tmp_path / 'out'))


@pytest.mark.parametrize('line', ['7 0.1 0.1 0.1 0.1', '0 0.1 x 0.1 0.1', '0 0.1 0.1'])
def test_a_wrong_line_of_yolo_is_named(tmp_path, line):
    picture(tmp_path / 'images/a.jpg')
    write(tmp_path / 'labels/a.txt', f'0 0.5 0.5 0.1 0.1\n{line}\n')
    write(tmp_path / 'data.yaml', 'train: images\nnames: [cat]\n')
    with pytest.raises(UserError, match=r'labels/a.txt, line 2: .*classes from 0 to 0'):
        convert(str(tmp_path), str(tmp_path / 'out'))


def test_labelme(tmp_path):
    picture(tmp_path / 'in.png', (60, 40))
    shapes = [
        dict(label='cup', points=[[5, 5], [25, 5], [25, 15]], shape_type='polygon', group_id=3),
        dict(label='cup', points=[[30, 5], [40, 5], [40, 15]], shape_type='polygon', group_id=3),
        dict(label='box', points=[[50, 30], [10, 20]], shape_type='rectangle', group_id=None),
        dict(label='ball', points=[[30, 20], [40, 20]], shape_type='circle'),
        dict(label='tip', points=[[3, 3]], shape_type='point'),
        dict(label='__ignore__', points=[[0, 0], [9, 9]], shape_type='rectangle')]
    write(tmp_path / 'a/1.json', json.dumps(dict(version='5', flags={}, shapes=shapes,
                                                 imagePath='..\\in.png', imageData=None)))
    write(tmp_path / 'a/2.json', json.dumps(dict(
        flags={}, shapes=shapes[:1], imagePath='gone.png',
        imageData=base64.b64encode((tmp_path / 'in.png').read_bytes()).decode())))
    assert recognise(tmp_path / 'a') == 'LabelMe'
    done = convert(str(tmp_path / 'a'), str(tmp_path / 'out'))
    assert done.classes == ['ball', 'box', 'cup']
    assert done.counts == dict(train=(2, 4, 3))
    cup, box, ball, other = objects(done.files['train'])
    assert cup['segmentation'] == [[5, 5, 25, 5, 25, 15], [30, 5, 40, 5, 40, 15]]
    assert (cup['bbox'], cup['area']) == ([5, 5, 35, 10], 150)
    assert (box['bbox'], box['segmentation']) == ([10, 20, 40, 10], [])
    assert ball['bbox'] == pytest.approx([20, 10, 20, 20], abs=0.2)
    assert other['image_id'] == 2
    assert 'point of 1 points (tip)' in done.notes[0]
    assert 'of __ignore__, which is no class, is left out' in done.notes[1]


def test_what_is_not_converted(tmp_path):
    with pytest.raises(UserError, match='no annotations of a known format'):
        convert(str(tmp_path), str(tmp_path / 'out'))
    write(tmp_path / 'train/_annotations.coco.json', '{"images": [], "annotations": []}')
    with pytest.raises(UserError, match='COCO format already'):
        convert(str(tmp_path), str(tmp_path / 'out'))
    write(tmp_path / 'b/a.xml', '<!DOCTYPE x [<!ENTITY a "b">]><annotation/>')
    with pytest.raises(UserError, match='defines XML entities'):
        convert(str(tmp_path / 'b'), str(tmp_path / 'out'))


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('data.yaml', b'train: images', r"data\.yaml cannot .*names"),
    ('data.yaml', b'names: [a, b', r'data\.yaml cannot .*ParserError'),
    ('data.yaml', b'just a text', r'data\.yaml cannot .*TypeError'),
    ('a.xml', b'<annotation><object></annotation>', r'a\.xml .*mismatched tag'),
    ('a.xml', b'<annotation><filename>\xff</filename></annotation>', r'a\.xml .*invalid token'),
    ('a.json', b'{"shapes": [{"label": "x"}]}', r"a\.json cannot .*points"),
    ('a.json', b'{"shapes": [], "imagePath": "a.png", "imageData": "x"}', r'a\.json .*base64'),
])
def test_a_broken_file_is_named_and_nothing_is_written(tmp_path, name, content, message):
    picture(tmp_path / 'in' / 'a.jpg' if name != 'a.json' else tmp_path / 'other.jpg')
    (tmp_path / 'in').mkdir(exist_ok=True)
    (tmp_path / 'in' / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        convert(str(tmp_path / 'in'), str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


def test_annotations_without_objects_write_nothing(tmp_path):
    picture(tmp_path / 'in' / 'a.jpg')
    write(tmp_path / 'in' / 'data.yaml', 'names: [cat]\ntrain: .')
    with pytest.raises(UserError, match=r'\(YOLO\) has no objects'):
        convert(str(tmp_path / 'in'), str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


def test_a_broken_mask_in_colors_is_named(tmp_path):
    write(tmp_path / 'in' / 'a.png', 'no image')
    with pytest.raises(UserError, match=r'a\.png cannot be read'):
        convert_colors(str(tmp_path / 'in'), str(tmp_path / 'out'), [(0, 0, 0)])


def test_the_tool_prints_the_lines_of_a_config(tmp_path):
    voc(tmp_path / 'data', 'a')
    done = call_tool('tools/convert_dataset.py', tmp_path / 'data', tmp_path / 'out')
    assert done.returncode == 0
    lines = done.stdout.split('For the config:\n')[1]
    settings: dict = {}
    exec(lines, settings)
    assert settings['classes'] == ('blob', 'cell')
    assert (settings['val'], settings['masks']) == (0.2, False)
    data = settings['train_dataloader']['dataset']
    image = load_coco(data['ann_file']).content['images'][0]['file_name']
    assert Path(data['data_prefix']['img'], image).is_file()


def test_masks_in_colors(tmp_path):
    colors = np.zeros((4, 6, 3), np.uint8)
    colors[:, 2:] = (0, 128, 0)
    (tmp_path / 'masks').mkdir()
    Image.fromarray(colors).save(tmp_path / 'masks' / 'a.png')
    assert convert_colors(str(tmp_path / 'masks'), str(tmp_path / 'out'),
                          [(0, 128, 0), (9, 9, 9), (0, 0, 0)]) == (1, 0, [])
    assert np.asarray(Image.open(tmp_path / 'out/a.png'))[0].tolist() == [2, 2, 0, 0, 0, 0]
    with pytest.raises(UserError, match=r'a.png: 8 pixels have colors .*\(0, 0, 0\)'):
        convert_colors(str(tmp_path / 'masks'), str(tmp_path / 'out'), [(0, 128, 0)])
    assert convert_colors(str(tmp_path / 'masks'), str(tmp_path / 'out'), [(9, 9, 9), (0, 128, 0)],
                          ignore_others=True) == (1, 1 / 3, [(0, 0, 0)])
    assert np.asarray(Image.open(tmp_path / 'out/a.png'))[0].tolist() == [255, 255, 1, 1, 1, 1]
    (tmp_path / 'mine.py').write_text(f"""_base_ = '{ROOT}/{SEGMENTATION}'
classes = ('grass', 'sky', 'road')
palette = [[0, 128, 0], [9, 9, 9], [0, 0, 0]]
data_root = 'x'
reduce_zero_label = False
""")
    done = call_tool('tools/convert_dataset.py', tmp_path / 'masks', tmp_path / 'new', '--colors',
                     tmp_path / 'mine.py')
    assert f'1 masks written to {tmp_path}/new' in done.stdout.splitlines()
