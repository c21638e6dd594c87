"""Old configs are read as data, without executing them."""
import pytest

from convnext_mm import UserError
from convnext_mm.migration.parsing import CONFIGS, merge, old_keys, parse_config
from tests.helpers import SEGMENTATION


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = 'old.py'):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path
    return write


def test_values_of_every_kind(write):
    values = parse_config(write('''"""A docstring."""
a = 1 + 2 * 3
b: int = -a
c, d = (1, 2)
e = [x * 2 for x in range(3) if x != 1]
f = {'k': [*e, 5], **dict(z=True)}
g = dict(f, k=None)
h = f'{a}-{c}'
i = f['k'][-1] if a > 3 else 0
j = (1, 2, 3)[1:]
a += 1
f['new'] = {k: v for k, v in zip('xy', (1, 2))}
k = 'per cent %d' % 5
l = not g['z']
m = max(3, 4), round(2.6), list(range(2))
_private = 3
'''), ).values
    assert values == dict(
        a=8, b=-7, c=1, d=2, e=[0, 4], f={'k': [0, 4, 5], 'z': True, 'new': {'x': 1, 'y': 2}},
        g={'k': None, 'z': True}, h='7-1', i=5, j=(2, 3), k='per cent 5', l=False,
        m=(4, 3, [0, 1]))


@pytest.mark.parametrize(('code', 'line'), [
    ('import os\n', 1), ('a = 1\nfrom os import path\n', 2), ('def f():\n    pass\n', 1),
    ('a = __import__("os").system("true")\n', 1), ('a = open("x")\n', 1), ('print(1)\n', 1),
    ('a = 1\n\nfor i in [1]:\n    a = i\n', 3), ('a = "x".upper()\n', 1),
    ('a = (lambda: 1)()\n', 1), ('a = [].__class__\n', 1), ('if True:\n    a = 1\n', 1),
    ('del a\n', 1), ('dict = open\na = dict("x")\n', 1), ('a = b\n', 1), ('a = 9 ** 9999\n', 1),
    ('a = dict(b=1)\na.update(c=2)\n', 2),
    ('a = 1\nb = f"{a:02d}"\n', 2), ('a = 1\nb = f"{a!r}"\n', 2)])
def test_code_is_refused_with_its_line(write, code, line):
    path = write(code)
    with pytest.raises(UserError) as error:
        parse_config(path)
    assert f'{path}, line {line}: ' in str(error.value)


def test_code_runs_only_if_it_is_trusted(write, tmp_path):
    marker = tmp_path / 'marker'
    path = write(f'import pathlib\npathlib.Path({str(marker)!r}).touch()\na = 3\n')
    with pytest.raises(UserError, match='a file that you trust, use --trust'):
        parse_config(path)
    assert not marker.exists()
    assert parse_config(path, trust=True).values == dict(a=3)
    assert marker.exists()


def test_existing_bases_and_bases_of_this_package(write):
    write('lr = 1\nmodel = dict(a=1, b=dict(c=2, d=3), e=[1])\n', 'bases/one.py')
    write("_base_ = '../bases/one.py'\nrunner = dict(max_iters=5)\n", 'more/two.py')
    old = parse_config(write('''
_base_ = ['./more/two.py', '../_base_/datasets/ade20k.py', '../_base_/schedules/schedule_40k.py',
          r'..\\_base_\\default_runtime.py', './upernet_convnext_base_512_160k_ade20k.py']
model = dict(b=dict(_delete_=True, f=1), e=[2], g=_base_.model.b.c)
x = {{_base_.model.b}}
y = '{{ fileBasenameNoExtension }}'
'''))
    assert old.values == dict(lr=1, runner=dict(max_iters=5), y='old', x=dict(c=2, d=3),
                              model=dict(a=1, b=dict(f=1, _delete_=True), e=[2], g=2))
    assert [str(file.relative_to(CONFIGS)) for _, file in old.own_bases] == [
        '_base_/datasets/ade20k.py', '_base_/schedules/schedule_160k.py',
        '_base_/default_runtime.py', 'upernet_convnext_base_512_160k_ade20k.py']


@pytest.mark.parametrize(('text', 'message'), [
    ('a = (\n', r'old.py, line 1: .*never closed'),
    ("_base_ = './old.py'\n", r'Circular _base_: .*old.py → .*old.py'),
    ("_base_ = '../_base_/models/swin.py'\n", r'base ../_base_/models/swin.py not found at .*'
                                              r'provides: .*upernet_convnext.py'),
    ('_base_ = [1 + x]\n', r'old.py, line 1: _base_ must be'),
    ('_base_ = 5\n', r'old.py, line 1: _base_ must be'),
    ('a = dict(b=1)["c"]\n', r"old.py, line 1: .*KeyError: 'c'"),
    ('a = [1] * 10 ** 6 * 10 ** 6\n', r'line 1: .*\nThe result would be too large')])
def test_broken_files(write, text, message):
    with pytest.raises(UserError, match=message):
        parse_config(write(text))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match='Config not found: .*absent.py'):
        parse_config(tmp_path / 'absent.py')


def test_a_longer_circle(write):
    write("_base_ = './b.py'\n", 'a.py')
    with pytest.raises(UserError, match=r'Circular _base_: .*b.py → .*a.py → .*b.py'):
        parse_config(write("_base_ = './a.py'\n", 'b.py'))


def test_merge():
    base = dict(a=dict(b=1, c=2), d=[1])
    assert merge(base, dict(a=dict(b=3), d=[2, 3])) == dict(a=dict(b=3, c=2), d=[2, 3])
    assert merge(base, dict(a=dict(_delete_=True, e=1))) == dict(a=dict(e=1), d=[1])
    assert base == dict(a=dict(b=1, c=2), d=[1])


def test_old_keys_recognizes_old_configs(write):
    assert old_keys(write("optimizer = dict(type='SGD')\nlr_config = dict()\nmodel = {}\n")) == [
        'optimizer', 'lr_config']
    assert old_keys(write("_base_ = './x.py'\nmodel = {{_base_.model}}\n")) == []
    assert old_keys(write("optimizer = dict(type='SGD')\noptim_wrapper = dict(o=1)\n")) == []
    assert old_keys(write('a = (\n')) == []
    assert old_keys(SEGMENTATION) == []
