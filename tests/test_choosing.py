"""The choice of a recipe, by the tool and by the page."""
import itertools
import json
import re
import shutil
import subprocess

import pytest

from convnext_mm import UserError, choosing
from tests.helpers import DATA, ROOT, call_tool

CASES = json.loads((DATA / 'choices.json').read_text())
PAGE = ROOT / 'docs' / 'choose' / 'index.html'
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
LIMITS = None, 0.5, 3.0, 4, 8.0, 12.5, 24


def row(name: str, accuracy: float | None, latency: float, memory: float, backbone: float = 1,
        rest: float = 3) -> dict:
    return dict(name=name, title=f'{name}, here', accuracy=accuracy, training_memory_gb=memory,
                latency_ms=dict(pytorch=latency, int8=latency / 2), parameters=10**7,
                flops=backbone + rest, backbone_flops=backbone)


TABLE = dict(metric='mIoU', memory_margin=1.5, machine='a CPU', recipes=[
    row('tiny', 46.0, 100.0, 2.0), row('base', 49.5, 300.0, 4.0), row('large', 50.5, 900.0, 8.0),
    row('v2', None, 50.0, 1.0)])


def names(table: dict, *args: object) -> tuple:
    """The names that a choice consists of."""
    found = choosing.choose(table, *args)
    return (*(one and one['name'] for one in found[:3]), found.fitting,
            [one['name'] for one in found.untrained])


@pytest.mark.parametrize(('wish', 'expected'), [
    (('accuracy',), ('large', 'base', None, 3, ['v2'])),
    (('balance',), ('base', 'large', None, 3, ['v2'])),  # 1.0 less, and faster
    (('speed',), ('tiny', 'base', None, 3, ['v2'])),
    (('accuracy', 6.0), ('base', 'tiny', None, 2, ['v2'])),  # 4.0 GB with the margin: exactly 6
    (('accuracy', 5.9), ('tiny', None, None, 1, ['v2'])),
    (('accuracy', None, 299.0), ('tiny', None, None, 1, ['v2'])),
    (('balance', None, 99.0), (None, None, 'tiny', 0, ['v2'])),
    (('speed', 1.0, 1000.0), (None, None, 'tiny', 0, [])),
    (('accuracy', None, 299.0, 'int8'), ('base', 'tiny', None, 2, ['v2'])),
    (('balance', None, 49.0, 'int8'), (None, None, 'tiny', 0, ['v2'])),
])
def test_the_rule(wish, expected):
    assert names(TABLE, *wish) == expected


def test_the_answer_gives_reason_and_runner_up():
    text = choosing.explain(TABLE, 'balance', 12, 1000)
    assert text.splitlines()[0] == 'base'
    assert 'why: the fastest within 1 point of the most accurate of the 3 recipes' in text
    assert 'that fit 12 GB for training and 1000 ms an image' in text
    assert 'mIoU 49.5, 300 ms an image, about 6.0 GB' in text
    assert 'runner-up: large' in text
    assert 'not trained yet:\n  v2: 50 ms' in text
    assert 'one thread of a CPU, in PyTorch' in text
    in_int8 = choosing.explain(TABLE, latency=160, runtime='int8')
    assert in_int8.startswith('base\n')
    assert '150 ms an image' in in_int8
    assert 'in ONNX Runtime in int8' in in_int8
    assert 'is that of the fp32 model' in in_int8
    predicted = choosing.explain(choosing.predict(TABLE, dict(tiny=70.0)), 'accuracy')
    assert '630 ms an image (predicted)' in predicted
    assert 'one thread of a CPU' not in predicted


def test_the_message_when_nothing_fits_names_the_nearest():
    with pytest.raises(UserError, match=r'fits 2 GB for training and 99 ms an image. The nearest '
                       r'is tiny: 100 ms .*, about 3.0 GB') as error:
        choosing.explain(TABLE, gpu_memory=2, latency=99)
    assert 'v2: 50 ms' in str(error.value)


def test_three_recipes_predict_the_others():
    """A machine that is fast in backbones and slow in heads, and 1.5 times as slow with V2."""
    parts = dict(small=(1, 4), middle=(5, 4), other_head=(5, 30), large=(20, 6),
                 convnextv2_a=(1, 4), convnextv2_b=(5, 6), convnextv2_c=(20, 8))

    def table(backbone: float, head: float, v2: float) -> dict:
        return dict(recipes=[row(name, None, (backbone * b + head * h) * (
            v2 if 'v2' in name else 1), 1.0, b, h) for name, (b, h) in parts.items()])
    here, there = table(2.0, 30.0, 1.5), table(10.0, 20.0, 1.2)
    measured = {one['name']: choosing.latency_of(one) for one in here['recipes']}
    anchors = {one['name'] for one in choosing.anchors(there)}
    assert anchors == {'other_head', 'convnextv2_b', 'large'}  # the smallest and largest backbones
    for known in (anchors, {'small', 'large', 'convnextv2_b'}):
        found = choosing.predict(there, {name: measured[name] for name in known})['recipes']
        assert [choosing.latency_of(one) for one in found] == pytest.approx(list(measured.values()))
        assert {one['name'] for one in found if one['latency_from'] == 'measured here'} == known
    assert choosing.latency_of(there['recipes'][0]) == 90.0


def test_recipes_that_do_not_tell_the_parts_apart_predict_by_one_ratio():
    assert [one['name'] for one in choosing.anchors(TABLE)] == ['v2', 'large']
    found = choosing.predict(TABLE, dict(tiny=200.0, base=600.0))['recipes']
    assert [(choosing.latency_of(one), one['latency_from']) for one in found] == [
        (200, 'measured here'), (600, 'measured here'), (1800, 'predicted'), (100, 'predicted')]
    found = choosing.predict(TABLE, dict(tiny=25.0), 'int8')['recipes']  # half of the table's
    assert [choosing.latency_of(one, 'int8') for one in found] == [25, 75, 225, 12.5]


def test_recipes_of_one_version_predict_each_other():
    table = dict(recipes=[row(f'convnextv2_{i}', None, 100.0 * 3**i, 1.0) for i in range(3)])
    assert [one['name'] for one in choosing.anchors(table)] == ['convnextv2_1']
    found = choosing.predict(table, dict(convnextv2_1=150.0))['recipes']
    assert [choosing.latency_of(one) for one in found] == pytest.approx([50, 150, 450])


def test_tables_list_every_recipe():
    for task, name in choosing.TASKS.items():
        table = choosing.read_table(task)
        assert {'machine', 'command', 'date', 'versions', 'method'} <= table.keys()
        recipes = {path.stem for path in (ROOT / 'configs').glob('*.py')
                   if ('rcnn' in path.stem) == (name == 'detection')
                   and not path.stem.endswith(('_ss', '_ms'))}
        assert {one['name'] for one in table['recipes']} == recipes
        for one in table['recipes']:
            times = one['latency_ms']
            assert times['pytorch'] > 100
            assert times.keys() == table['recipes'][0]['latency_ms'].keys()
            assert times.get('int8', 1) < times.get('onnx', 2) < 2 * times['pytorch']
            assert one['inference_memory_gb'] < one['training_memory_gb']
            assert (one['accuracy'] is None) == (one['accuracy_source'] is None)


@pytest.mark.parametrize('case', CASES, ids=range(len(CASES)))
def test_written_cases(case):
    found = names(choosing.read_table(case['task']), case['prefer'], case['gpu_memory'],
                  case['latency_ms'], case['runtime'])
    assert found[:3] == (case['best'], case['runner_up'], case['nearest'])


def grid() -> list[tuple]:
    """The written cases, and every combination of many limits."""
    written = [(c['task'], c['prefer'], c['gpu_memory'], c['latency_ms'], c['runtime'])
               for c in CASES]
    return written + [
        (task, *wish, latency and 1000 * latency, runtime) for task in choosing.TASKS
        for *wish, latency, runtime in itertools.product(
            choosing.PREFERENCES, LIMITS, LIMITS,
            choosing.read_table(task)['recipes'][0]['latency_ms'])]


ANSWERS = '''.map(([task, ...wish]) => {
  const found = choose(tables[task], ...wish);
  return [found.best?.name ?? null, found.runnerUp?.name ?? null, found.nearest?.name ?? null,
          found.fitting, found.untrained.map(row => row.name)];
})'''


def expected() -> list[list]:
    return [list(names(choosing.read_table(task), *wish)) for task, *wish in grid()]


@pytest.mark.skipif(not shutil.which('node'), reason='node is not installed')
def test_the_rule_of_the_page_gives_the_same_answers():
    assert len(CASES) == 30
    text = PAGE.read_text(encoding='utf-8')
    data, rule = (re.search(rf'<script[^>]* id="{name}">(.*?)</script>', text, re.S)[1]
                  for name in ('tables', 'rule'))
    script = (f'const tables = {data};\n{rule}\n'
              f'console.log(JSON.stringify({json.dumps(grid())}{ANSWERS}))')
    done = subprocess.run(['node', '-'], input=script, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected()


def dump(address: str, folder) -> str:
    """The document that Chromium makes of a page without a network."""
    return subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--dump-dom',
                           f'--user-data-dir={folder}', '--host-resolver-rules=MAP * ~NOTFOUND',
                           address], capture_output=True, text=True, check=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason='Chromium is not installed')
def test_the_page_gives_the_same_answers_in_a_browser(tmp_path):
    page = tmp_path / 'page.html'
    page.write_text(PAGE.read_text(encoding='utf-8') + f'''<pre id="answers"></pre><script>
const tables = TABLES;
get('answers').textContent = JSON.stringify({json.dumps(grid())}{ANSWERS});
</script>''', encoding='utf-8')
    shown = re.search(r'<pre id="answers">(.*?)</pre>', dump(page.as_uri(), tmp_path / 'user'))[1]
    assert json.loads(shown) == expected()


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason='Chromium is not installed')
def test_the_page_shows_the_choice_of_its_address(tmp_path):
    wishes = 'task=seg&place=edge-speed&memory=&latency=30000&runtime=onnx&lang=zh'
    shown = dump(f'{PAGE.as_uri()}#{wishes}', tmp_path / 'user')
    best = choosing.choose(choosing.read_table('seg'), 'speed', None, 30000, 'onnx').best
    assert '耗时：ONNX Runtime，' in shown
    assert f'data-best="{best["name"]}"' in shown
    assert '推荐' in shown
    assert shown.count('<svg') == 3


def test_runtimes_that_are_not_measured(monkeypatch, tmp_path):
    table = dict(recipes=[dict(latency_ms=dict(pytorch=1.0))])
    (tmp_path / 'table.json').write_text(json.dumps(table))
    monkeypatch.setattr(choosing, 'shipped_file', lambda name: tmp_path / 'table.json')
    assert choosing.read_table('det') == table
    with pytest.raises(UserError, match='no latencies in ONNX Runtime. Leave out --runtime'):
        choosing.read_table('det', 'onnx')


def test_the_tool():
    done = call_tool('tools/choose_model.py', '--task', 'seg', '--gpu-memory', 1000)
    assert done.returncode == 0
    assert 'upernet_convnext_xlarge_640_160k_ade20k' in done.stdout.splitlines()
    done = call_tool('tools/choose_model.py', '--task', 'seg', '--latency-ms', 1)
    assert done.returncode == 2
    assert 'No recipe with published results fits 1 ms an image' in done.stderr
    done = call_tool('tools/choose_model.py', '--task', 'seg', '--gpu-memory', '-3')
    assert done.returncode == 2
    assert "expected a number above 0, not '-3'" in done.stderr
