"""The two READMEs say the same, and what they point to is there."""
import re

import pytest

from tests.conftest import ROOT

READMES = ('README.md', 'README_zh-CN.md')


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


@pytest.mark.parametrize('name', READMES)
def test_the_tables_of_recipes_are_those_of_the_configs(name):
    from tests.test_configs import RECIPES
    rows = dict(re.findall(r'\| \[`\S+`\]\(configs/(\S+)\.py\) \|.*\| ([\d.]+)M \|', text(name)))
    assert rows.keys() == {r for r in RECIPES if not r.endswith(('_ss', '_ms'))}
    for recipe, millions in rows.items():
        assert float(millions) == pytest.approx(RECIPES[recipe][-1], abs=0.001)


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


def test_the_config_for_ones_own_data_works(demo_data, tmp_path):
    from mmengine.config import Config
    from mmengine.registry import DATASETS, init_default_scope
    snippet = next(block for block in re.findall(r'```python\n(.*?)```', text('README.md'), re.S)
                   if 'data/mine' in block)
    snippet = snippet.replace("'../", f"'{ROOT}/configs/").replace(
        'data/mine', str(demo_data / 'ADEChallengeData2016'))
    (tmp_path / 'mine.py').write_text(snippet)
    cfg = Config.fromfile(tmp_path / 'mine.py')
    assert cfg.model.decode_head.num_classes == cfg.model.auxiliary_head.num_classes == 2
    init_default_scope('mmseg')
    for loader, count in ((cfg.train_dataloader, 8), (cfg.val_dataloader, 4)):
        dataset = DATASETS.build(loader.dataset)
        assert len(dataset) == count
        assert dataset.metainfo['classes'] == ('road', 'car')
    # 0 in a mask is no class, so that the first class, 1 in the mask, is label 0.
    import numpy as np
    from PIL import Image
    sample = dataset[0]['data_samples']
    mask = np.asarray(Image.open(sample.seg_map_path)).astype(int)
    assert (sample.gt_sem_seg.data[0].numpy() == mask - 1).all()
