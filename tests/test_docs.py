"""The two READMEs say the same, and what they point to is there."""
import re

import pytest

from tests.conftest import ROOT

READMES = ('README.md', 'README_zh-CN.md')


@pytest.fixture(scope='module')
def recipes() -> list[str]:
    """The names of the configs, without those that only test otherwise."""
    return sorted(path.stem for path in (ROOT / 'configs').glob('*.py')
                  if not path.stem.endswith(('_ss', '_ms')))


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding='utf-8')


@pytest.mark.parametrize('find', [
    lambda t: [len(m) for m in re.findall(r'^#+', t, re.M)],
    lambda t: re.findall(r'\d+(?:\.\d+)?', re.sub(r'16 万|160k', '', t)),
    lambda t: set(re.findall(r'`([^`\n]+)`', re.sub(r'```.*?```', '', t, flags=re.S))),
    lambda t: [re.sub(r'\s*#.*', '', line) for block in re.findall(r'```.*?```', t, re.S)
               for line in block.splitlines()],
], ids=['headings', 'numbers', 'names', 'commands'])
def test_both_languages_say_the_same(find):
    english, chinese = (sorted(find(text(name))) for name in READMES)
    assert english == chinese


@pytest.mark.parametrize('name', [*READMES, 'CONTRIBUTING.md'])
def test_links_lead_somewhere(name):
    links = [link for link in re.findall(r'\]\(([^)#]+)', text(name)) if '://' not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_module_is_on_the_map():
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / 'convnext_mm').rglob('*.py')
               if p.name != '__init__.py' and 'overrides' not in p.parts}
    assert [m for m in sorted(modules) if f'`{m}`' not in text('CONTRIBUTING.md')] == []


def test_the_tables_of_recipes_are_what_the_tool_counts(recipes):
    from convnext_mm.complexity import table
    counted = re.findall(r'\| `(\S+)` \| (\S+)M \| (\S+)G \|',
                         table(f'{ROOT}/configs/{name}.py' for name in recipes))
    assert len(counted) == 23
    for readme in READMES:
        rows = re.findall(r'\| \[`\S+`\]\(configs/(\S+)\.py\) \|.*\| (\S+)M \| (\S+)G \|',
                          text(readme))
        assert sorted(rows) == sorted(counted)


def test_the_sizes_are_those_of_the_backbone():
    import torch

    from convnext_mm import ConvNeXt
    from convnext_mm.archs import ARCHS
    table = dict(re.findall(r'\| `(\w+)` \| ([\d.]+)M', text('README.md')))
    assert table.keys() == ARCHS.keys()
    for arch, count in table.items():
        with torch.device('meta'):
            backbone = ConvNeXt(arch)
        last = backbone.arch.dims[-1]
        own = sum(p.numel() for name, p in backbone.named_parameters() if name[:4] != 'norm')
        assert f'{(own + 2 * last + 1000 * last + 1000) / 1e6:.2f}' == count
    for line in re.findall(r"backbone = (dict\(type='ConvNeXt'.*?\))  ", text('README.md')):
        assert ConvNeXt(**{k: v for k, v in eval(line).items() if k != 'type'})


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
def test_the_four_lines_for_ones_own_data_work(scope, demo_data, tmp_path):
    from mmengine.registry import init_default_scope

    from convnext_mm.datasets.completing import heads, registry_of
    from convnext_mm.training.checks import read_config
    root = demo_data / ('ADEChallengeData2016' if scope == 'mmseg' else 'coco')
    snippet = next(block for block in re.findall(r'```python\n(.*?)```', text('README.md'), re.S)
                   if 'data/mine' in block and ('seg_map_path' in block) == (scope == 'mmseg'))
    assert len(snippet.splitlines()) == 5, 'the recipe and four lines'
    for ours, demo in (("'./", f"'{ROOT}/configs/"), ('data/mine', str(root)),
                       ('images/train', 'images/training'), ('masks/train', 'annotations/training'),
                       ('images/val', 'images/validation'), ('masks/val', 'annotations/validation'),
                       ('train.json', 'annotations/instances_train2017.json'),
                       ('val.json', 'annotations/instances_val2017.json'),
                       ("'train'", "'train2017'"), ("'val'", "'val2017'")):
        snippet = snippet.replace(ours, demo)
    (tmp_path / 'mine.py').write_text(snippet)
    cfg = read_config(str(tmp_path / 'mine.py'))
    assert {head.num_classes for _, head in heads(cfg.model)} == {2}
    init_default_scope(scope)
    for loader, count in ((cfg.train_dataloader, 8), (cfg.test_dataloader, 4)):
        dataset = registry_of(scope).build(dict(loader.dataset, filter_cfg=None))
        assert len(dataset) == count
        assert len(dataset.metainfo['classes']) == 2
        assert dataset[0]['inputs'].shape[0] == 3


def results(section: str, kind: str) -> dict[tuple[str, ...], dict[str, list[str]]]:
    """Of the file that a section links as ``kind``: setting → who → the cells of its row."""
    link, = re.findall(rf'\[{kind}\]\((benchmarks/results/\S+)\)', section)
    tables = {}
    for title, body in re.findall(r'^\*\*(.+?)\*\*.*\n\n((?:\|.*\n)+)', text(link), re.M):
        rows = [[cell.strip() for cell in line.strip('|').split('|')]
                for line in body.splitlines()[2:]]
        tables[tuple(title.split(', '))] = {name: cells for name, *cells in rows}
    return tables


def test_the_speeds_are_those_of_the_results():
    section = text('README.md').split('## Speed and memory')[1].split('\n## ')[0]
    table = section.split('| | training, fp32 ')[1].split('\n\n')[0].splitlines()[2:]
    names = ('OpenMMLab (reference)', 'ours', 'ours, minimal', 'ours, packed', 'ours, compiled',
             'products alone (limit)', 'products and convolutions (limit)')
    for row, name in zip(table, names, strict=True):
        found = [re.findall(r'[\d.]+', cell) for cell in row.strip('|').split('|')[1:]]
        expected = []
        for kind, step, columns in [('training', 'train', (0, 3)), ('inference', 'infer', (0,))]:
            for column in columns:
                for dtype in 'fp32', 'bf16':
                    cells = results(section, kind)['tiny', step, dtype, '1 × 512×512'].get(name)
                    expected.append([f'{float(cells[column]):.0f}'] if cells and cells[column]
                                    else [])
        assert found == expected, name


def test_the_sizes_are_those_of_the_results():
    section = text('README.md').split('## Speed and memory')[1].split('\n## ')[0]
    rows = re.findall(r'^\| (\w+) \|((?: [\d.]+ \([\d.]+\) \|){4})', section, re.M)
    assert [row[0] for row in rows] == ['small', 'base', 'large', 'xlarge']
    for size, cells in rows:
        found = iter(re.findall(r'[\d.]+', cells))
        for kind, step, name, limit in [
                ('sizes', 'train', 'ours', 'products alone (limit)'),
                ('their inference', 'infer', 'ours, packed', 'products and convolutions (limit)')]:
            for dtype in 'fp32', 'bf16':
                table = results(section, kind)[size, step, dtype, '1 × 512×512']
                for who in name, limit:
                    assert next(found) == table[who][1], (size, step, dtype, who)


def test_the_memory_is_what_the_tool_reckons():
    from convnext_mm.complexity import training_memory
    from convnext_mm.kernels import MEMORY
    from convnext_mm.training.checks import read_config
    rows = re.findall(r'^\| (\w+) (512|640) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \|',
                      text('README.md'), re.M)
    assert len(rows) == 4
    for size, crop, *cells in rows:
        config = f'{ROOT}/configs/upernet_convnext_{size}_{crop}_160k_ade20k.py'
        for memory, cell in zip(MEMORY, cells, strict=True):
            cfg = read_config(config, {'model.backbone.memory': memory})
            assert cell == f'{training_memory(cfg).total / 1e9:.2f}'
