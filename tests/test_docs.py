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
