"""Every page says the same in both languages, its figures are current, and its examples work."""
import re
import shutil

import pytest
import yaml

from tests.helpers import ROOT, run_tool

PAGES = sorted(str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / 'docs')
               for path in folder.glob('*.md') if not path.stem.endswith('_zh-CN'))
TRANSLATED = [page for page in PAGES if page == 'README.md' or page.startswith('docs/')]


def text(page: str) -> str:
    return (ROOT / page).read_text(encoding='utf-8')


def chinese(page: str) -> str:
    return page.replace('.md', '_zh-CN.md')


def without_code(page: str) -> str:
    return re.sub(r'```.*?```', '', page, flags=re.S)


def headings(page: str) -> list[tuple[str, str]]:
    """Level and text of each heading."""
    return re.findall(r'^(#+) (.+)$', without_code(page), re.M)


def anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading."""
    return re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')


def test_every_page_is_translated():
    translated = {str(path.relative_to(ROOT)) for folder in (ROOT, ROOT / 'docs')
                  for path in folder.glob('*_zh-CN.md')}
    assert translated == {chinese(page) for page in TRANSLATED}
    assert len(TRANSLATED) > 8


@pytest.mark.parametrize('page', TRANSLATED)
@pytest.mark.parametrize('part', [
    lambda t: [level for level, _ in headings(t)],
    lambda t: sorted(re.findall(r'\d+(?:\.\d+)?', t)),
    lambda t: sorted(set(re.findall(r'`([^`\n]+)`', without_code(t)))),
    lambda t: [re.sub(r'\s*#.*', '', line) for block in re.findall(r'```.*?```', t, re.S)
               for line in block.splitlines()],
], ids=['headings', 'numbers', 'names', 'commands'])
def test_both_languages_say_the_same(page, part):
    english, translation = part(text(page)), part(text(chinese(page)))
    assert english or '```' not in text(page)
    assert translation == english


@pytest.mark.parametrize('page', [*PAGES, *map(chinese, TRANSLATED)])
def test_links_lead_somewhere(page):
    folder = (ROOT / page).parent
    links = [link for link in re.findall(r'\]\(([^)]+)\)', without_code(text(page)))
             if '://' not in link]
    broken = []
    for link in links:
        path, _, fragment = link.partition('#')
        target = folder / path if path else ROOT / page
        if not target.exists() or (fragment and fragment not in {
                anchor(name) for _, name in headings(target.read_text(encoding='utf-8'))}):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize('page', TRANSLATED)
def test_each_language_links_pages_of_its_own(page):
    """Only the link at the top leads to the other language."""
    for name, other in (page, True), (chinese(page), False):
        links = re.findall(r'\]\(([^)#]+\.md)[^)]*\)', without_code(text(name)))[1:]
        assert [link for link in links if ('_zh-CN' in link) == other and (other or (
            (ROOT / name).parent / chinese(link)).exists())] == []


@pytest.mark.parametrize('page', ['README.md', 'README_zh-CN.md'])
def test_the_readme_is_short_and_leads_to_every_page(page):
    lines = text(page).splitlines()
    assert len(lines) <= 150
    linked = set(re.findall(r'\]\((docs/\S+?\.md)\)', text(page)))
    assert linked == {chinese(p) if 'zh' in page else p for p in PAGES if p.startswith('docs/')}


def test_every_module_is_on_the_map():
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / 'convnext_mm').rglob('*.py')
               if p.name != '__init__.py'}
    assert [m for m in sorted(modules) if f'`{m}`' not in text('CONTRIBUTING.md')] == []


def test_tables_are_current():
    """Whether they agree with metafiles and results; tests/test_metafiles.py counts the former."""
    run_tool('tools/make_tables.py', '--check')
    pages = [*TRANSLATED, *map(chinese, TRANSLATED)]
    names = re.findall(r'<!-- begin: (\S+) -->\n\|', '\n'.join(map(text, pages)))
    assert sorted(names) == sorted(2 * ['upernet', 'rcnn', 'boxes', 'v2', 'sizes', 'speed',
                                        'memory', 'speed-of-sizes'])


@pytest.mark.slow
def test_a_table_that_is_not_current_is_found(tmp_path):
    for name in ('configs', 'benchmarks', 'tools', 'docs'):
        shutil.copytree(ROOT / name, tmp_path / name)
    readme = text('README.md').replace('46.0 (46.11)', '43.1 (46.11)')
    (tmp_path / 'README.md').write_text(readme)
    script = tmp_path / 'tools' / 'make_tables.py'
    done = run_tool(script, '--check', check=False)
    assert done.returncode == 1
    assert 'README.md: tables are not current' in done.stdout
    run_tool(script)
    assert (tmp_path / 'README.md').read_text() == text('README.md')


def test_every_result_is_linked():
    linked = {name for page in (ROOT / 'docs').glob('*.md') for name in re.findall(
        r'\(\.\./(benchmarks/results/[^\s)]+\.md)\)', page.read_text(encoding='utf-8'))}
    assert linked == {str(path.relative_to(ROOT))
                      for path in (ROOT / 'benchmarks/results').glob('*.md')}


def test_what_is_said_of_figures_holds():
    models = yaml.safe_load(text('configs/metafile_ade20k.yml'))['Models']
    memory = {m['Name']: [v for k, v in m['Metadata'].items() if k.startswith('Training Memory')]
              for m in models if m['In Collection'] == 'ConvNeXt'}
    ratios = [measured / plain for name, (plain, _, _, measured) in memory.items()
              if 'xlarge' not in name]
    assert f'{min(ratios):.2f} to {max(ratios):.2f} times' in text('docs/speed.md')
    ours, baseline = (re.findall(r'(\d+) MiB', re.search(
        rf'^\| {row}.*', text('docs/speed.md'), re.M)[0]) for row in (r'ours \|', 'baseline'))
    assert len(ours) == 2
    assert all(int(a) < int(b) / 2 for a, b in zip(ours, baseline, strict=True))


def test_versions_are_those_of_the_setup():
    from packaging.requirements import Requirement

    from setup import COMPILED, FORKS, OPENMMLAB, TORCH
    page = text('docs/install.md')
    allowed = {r.name: r.specifier for r in map(Requirement, (
        *FORKS.values(), *OPENMMLAB.values(), TORCH))}
    tested = re.findall(r'`([\w-]+)` (\d+\.\d+\.\d+)', page)
    assert len(tested) == 8
    torch, = re.findall(r'tested with PyTorch (\d+\.\d+\.\d+)', page)
    assert [(name, version) for name, version in [*tested, ('torch', torch)]
            if version not in allowed[name]] == []
    lowest, below = re.findall(r'at least ([\d.]+) and below ([\d.]+)\)', page)[0]
    assert f'torch>={lowest},<{below}' == TORCH
    for requirement in re.findall(r"'((?:onedl-)?mmcv[^']+)'", page):
        assert requirement in COMPILED.values()


def test_examples_of_backbones_work():
    from convnext_mm import ConvNeXt
    found = re.findall(r"^backbone = (dict\(type='ConvNeXt'.*?\))  #", text('docs/recipes.md'),
                       re.M)
    assert len(found) == 2
    for line in found:
        assert ConvNeXt(**{k: v for k, v in eval(line).items() if k != 'type'}).out_indices


def test_every_option_is_described():
    import inspect

    from convnext_mm import ConvNeXt
    from convnext_mm.engine.speed import DEFAULTS
    from convnext_mm.patches import PATCHES
    first_cells = {page: set(re.findall(r'`(\w+)`', ' '.join(
        re.findall(r'^\|([^|]+)\|', text(page), re.M)))) for page in TRANSLATED}
    assert set(inspect.signature(ConvNeXt).parameters) <= first_cells['docs/recipes.md']
    assert set(DEFAULTS) <= first_cells['docs/speed.md']
    assert set(PATCHES) <= first_cells['docs/training.md']


@pytest.mark.parametrize('tool', ['train.py', 'test.py', 'image_demo.py', 'model_table.py',
                                  'choose_model.py'])
def test_options_of_the_tools_exist(tool):
    row, = re.findall(rf'^\| `tools/{tool} .*?` \|(.*)\|$', text('docs/training.md'), re.M)
    described = set(re.findall(r'`(--[\w-]+)', row))
    assert described
    usage = run_tool(f'tools/{tool}', '--help').stdout
    assert [option for option in sorted(described) if option not in usage] == []


def test_our_messages_in_the_faq_are_those_of_the_code():
    """Between the dots in code that is a heading: parts of messages of this package."""
    source = '\n'.join(path.read_text() for path in (ROOT / 'convnext_mm').rglob('*.py'))
    joined = re.sub(r"""['"]\s*\n\s*f?['"]""", '', source)
    ours = [code for _, heading in headings(text('docs/faq.md'))
            for code in re.findall('`([^`]+)`', heading)
            if code.startswith(('…', '--', 'Data', 'Cannot'))]
    assert len(ours) == 9
    for code in ours:
        for part in re.split('…', code):
            assert part.strip() in re.sub(r'\{[^{}]*\}', '', joined) or part.strip() in joined, code


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
def test_the_lines_for_custom_data_work(scope, demo_data, tmp_path):
    from mmengine.registry import init_default_scope

    from convnext_mm.datasets.completion import dataset_registry, heads_with_classes
    from convnext_mm.engine.checks import read_config
    root = demo_data / ('ADEChallengeData2016' if scope == 'mmseg' else 'coco')
    snippet = next(block for block in re.findall(r'```python\n(.*?)```', text('README.md'), re.S)
                   if 'data/mine' in block and ('seg_map_path' in block) == (scope == 'mmseg'))
    assert len(snippet.splitlines()) == (6 if scope == 'mmseg' else 5), 'a few lines'
    for ours, demo in (("'./", f"'{ROOT}/configs/"), ('data/mine', str(root)),
                       ('images/train', 'images/training'), ('masks/train', 'annotations/training'),
                       ('images/val', 'images/validation'), ('masks/val', 'annotations/validation'),
                       ('train.json', 'annotations/instances_train2017.json'),
                       ('val.json', 'annotations/instances_val2017.json'),
                       ("'train'", "'train2017'"), ("'val'", "'val2017'")):
        snippet = snippet.replace(ours, demo)
    (tmp_path / 'mine.py').write_text(snippet)
    cfg = read_config(str(tmp_path / 'mine.py'))
    assert {head.num_classes for _, head in heads_with_classes(cfg.model)} == {2}
    init_default_scope(scope)
    for loader, count in ((cfg.train_dataloader, 8), (cfg.test_dataloader, 4)):
        dataset = dataset_registry(scope).build(dict(loader.dataset, filter_cfg=None))
        assert len(dataset) == count
        assert len(dataset.metainfo['classes']) == 2
        assert dataset[0]['inputs'].shape[0] == 3


def test_the_example_of_fast_works(tmp_path):
    from convnext_mm.engine.checks import read_config
    snippet, = (block for block in re.findall(r'```python\n(.*?)```', text('docs/speed.md'), re.S)
                if 'fast.py' in block)
    (tmp_path / 'fast.py').write_text(snippet.replace("'./", f"'{ROOT}/configs/"))
    cfg = read_config(str(tmp_path / 'fast.py'))
    assert cfg.model.backbone.memory == 'minimal'
    assert cfg.optim_wrapper.dtype == 'bfloat16'


def test_the_example_of_learning_rates_works():
    from mmengine.registry import init_default_scope
    from torch import nn

    from convnext_mm import ConvNeXt, LearningRateDecayOptimizerConstructor
    snippet, = (block for block in re.findall(r'```python\n(.*?)```', text('docs/recipes.md'), re.S)
                if 'custom_keys' in block)
    values: dict = {}
    exec(snippet, values)
    init_default_scope('mmengine')
    model = nn.ModuleDict(dict(backbone=ConvNeXt(depths=[1, 2], dims=[8, 16]),
                               decode_head=nn.Conv2d(16, 2, 1)))
    wrapper = LearningRateDecayOptimizerConstructor(
        dict(optimizer=dict(type='AdamW', lr=0.1)),
        dict(values['optim_wrapper']['paramwise_cfg'], decay_rate=0.5))(model)
    rates = {group['lr'] for group in wrapper.param_groups}
    assert max(rates) == pytest.approx(1.0)
    assert min(rates) == pytest.approx(0.1 * 0.5 ** 4)
