"""Annotation files as tools write them: repaired when read, or refused."""
import json
from pathlib import Path

import pytest

from convnext_mm import UserError
from convnext_mm.datasets.coco import load_coco, read_categories, read_coco

SQUARE = [10, 10, 30, 10, 30, 30, 10, 30]
POINTS = [[10, 10], [30, 10], [30, 30], [10, 30]]


def content(**annotation) -> dict:
    return dict(
        images=[dict(id=1, file_name='a.jpg', width=60, height=40)],
        categories=[dict(id=1, name='ball')],
        annotations=[dict(dict(id=1, image_id=1, category_id=1, bbox=[10, 10, 20, 20], area=400,
                               iscrowd=0, segmentation=[SQUARE]), **annotation)])


def write(path: Path, content: object) -> str:
    path.write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize('mask', [
    SQUARE, POINTS, [POINTS], [SQUARE, []], [[str(v) for v in SQUARE]], json.dumps([SQUARE]),
    [SQUARE, [1, 2, 3, 4]]])
def test_polygons_in_any_nesting(tmp_path, mask):
    found, problems = load_coco(write(tmp_path / 'a.json', content(segmentation=mask)))
    assert found['annotations'][0]['segmentation'] == [SQUARE]
    assert [problem.level for problem in problems] == ['note'] * (mask != [SQUARE, []])


@pytest.mark.parametrize(('values', 'message'), [
    (dict(segmentation=[[1, 2, float('nan'), 4, 5, 6]]), 'coordinate that is no number'),
    (dict(segmentation=[[1, 2, None, 4, 5, 6]]), 'coordinate that is no number'),
    (dict(segmentation=[[1, 2, float('inf'), 4, 5, 6]]), 'coordinate that is no number'),
    (dict(segmentation='a mask'), 'neither polygons nor a run-length encoding'),
    (dict(segmentation=7), 'neither polygons nor a run-length encoding'),
    (dict(segmentation=dict(size=[60, 40], counts=[0, 2400])), r'\[width, height\], not'),
    (dict(segmentation=dict(size=[20, 20], counts=[0, 400])), 'another size than its image'),
    (dict(segmentation=dict(size=[40, 60], counts=[0, 7])), 'do not add up'),
    (dict(segmentation=dict(counts='abc')), 'without size and counts'),
    (dict(bbox=[1, 2, float('nan'), 4]), 'not four numbers'),
    (dict(bbox=[1, 2, 'a', 4]), 'not four numbers'),
    (dict(area='large'), 'value that is no number')])
def test_what_cannot_be_used(tmp_path, values, message):
    path = write(tmp_path / 'a.json', content(**values))
    with pytest.raises(UserError, match=f'(?s){tmp_path}/a.json cannot be used:.*{message}.*id 1'):
        load_coco(path)
    problem, = read_coco(path).problems
    assert problem.level == 'error'


@pytest.mark.parametrize('name', [None, 7, ''])
def test_file_names_are_texts(name, tmp_path):
    text = content()
    text['images'][0]['file_name'] = name
    with pytest.raises(UserError, match='file_name is no text'):
        load_coco(write(tmp_path / 'a.json', text))


@pytest.mark.parametrize('key', ['images', 'categories', 'annotations'])
def test_ids_are_numbers_or_texts(key, tmp_path):
    text = content()
    text[key][0]['id'] = [1]
    with pytest.raises(UserError, match=rf'neither a number nor a text(?s:.*){key}: id=\[1\]'):
        load_coco(write(tmp_path / 'a.json', text))


@pytest.mark.parametrize('name', ['area', 'iscrowd', 'ignore'])
def test_lists_are_no_numbers(name, tmp_path):
    with pytest.raises(UserError, match=rf'no number(?s:.*){name}=\[\]'):
        load_coco(write(tmp_path / 'a.json', content(**{name: []})))


def test_numbers_as_strings(tmp_path):
    text = content(id='1', image_id='1', category_id='1', bbox=['10', '10', '20.5', '20'],
                   area='400')
    text['images'][0].update(id='1', width='60', height='40')
    (found, (problem,)) = load_coco(write(tmp_path / 'a.json', text))
    assert found['annotations'][0]['bbox'] == [10, 10, 20.5, 20]
    assert found['annotations'][0]['area'] == 400
    assert found['images'][0] == dict(id=1, file_name='a.jpg', width=60, height=40)
    assert problem.message.startswith('numbers written as strings, read as numbers: 1 × images: id')


def test_annotation_0_is_renumbered(tmp_path):
    text = content(id=0)
    text['annotations'].append(dict(text['annotations'][0], id=1))
    found, (problem,) = load_coco(write(tmp_path / 'a.json', text))
    assert [one['id'] for one in found['annotations']] == [1, 2]
    assert 'numbered from 1' in problem.message


@pytest.mark.parametrize('missing', [True, False])
def test_an_object_without_iscrowd_is_no_crowd(tmp_path, missing):
    text = content(iscrowd=None)
    if missing:
        del text['annotations'][0]['iscrowd']
    found, (problem,) = load_coco(write(tmp_path / 'a.json', text))
    assert found['annotations'][0]['iscrowd'] == 0
    assert (problem.level, problem.where) == ('note', ['id 1'])
    assert 'without iscrowd' in problem.message


def test_categories_of_one_name(tmp_path):
    text = content()
    text['categories'] = [dict(id=0, name='ball'), dict(id=1, name='ball')]
    found, (problem,) = load_coco(write(tmp_path / 'a.json', text))
    assert found['categories'] == [dict(id=1, name='ball')]
    assert problem.where == ["'ball': id 0"]
    text['annotations'].append(dict(text['annotations'][0], id=2, category_id=0))
    with pytest.raises(UserError, match="'ball': ids 0, 1"):
        load_coco(write(tmp_path / 'a.json', text))


@pytest.mark.parametrize(('used', 'parents', 'names'), [
    (2, ['none', 'cells', 'cells'], ['rbc', 'wbc']),
    (0, ['none', 'cells', 'cells'], ['cells', 'rbc', 'wbc']),
    (2, ['none', 'none', 'cells'], ['cells', 'rbc', 'wbc']),
    (2, ['none', 'none', 'none'], ['cells', 'rbc', 'wbc'])])
def test_the_category_that_roboflow_adds_is_no_class(tmp_path, used, parents, names):
    text = content(category_id=used)
    text['categories'] = [dict(id=i, name=name, supercategory=parent) for i, (name, parent) in
                          enumerate(zip(['cells', 'rbc', 'wbc'], parents, strict=True))]
    assert read_categories(write(tmp_path / 'a.json', text)) == names


def test_only_a_test_may_have_no_annotations(tmp_path):
    path = write(tmp_path / 'a.json', dict(images=content()['images']))
    assert read_coco(path, labelled=False).problems == []
    problem, = read_coco(path).problems
    assert "has no list 'annotations', 'categories'" in problem.message


def test_names_of_categories(tmp_path):
    text = content()
    text['info'] = dict(description='"categories": [1, 2]')
    text['categories'] = [dict(id=10, name='b'), dict(id=2, name='a'), dict(id=11, name='b')]
    assert read_categories(write(tmp_path / 'a.json', text)) == ['a', 'b']
    with pytest.raises(UserError, match='names no categories'):
        read_categories(write(tmp_path / 'a.json', dict(images=[])))
