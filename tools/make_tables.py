"""Write the tables of figures into README.md and docs/, in both languages, and into docs/choose.

Figures come from configs/metafile_*.yml, the backbone itself and benchmarks/results/. A table
replaces the text between the comments "begin: NAME" and "end: NAME" of a page. The page docs/choose
contains docs/tables.
"""
from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
CLASSES = 1000  # of ImageNet, as published sizes are counted
MARKERS = re.compile(r'(<!-- begin: (\S+) -->\n).*?(<!-- end: \2 -->)', re.S)
PAGE = ROOT / 'docs' / 'choose' / 'index.html'
DATA = re.compile(r'(<script type="application/json" id="tables">\n).*?(</script>)', re.S)

CHINESE = {
    'config': '配置', 'pretrained on': '预训练数据', 'parameters': '参数量',
    'mIoU, single scale': 'mIoU（单尺度）', 'mIoU, multi-scale + flip': 'mIoU（多尺度 + 翻转）',
    'box AP': '框 AP', 'mask AP': '掩码 AP',
    'training, fp32': '训练，fp32', 'training, bf16': '训练，bf16',
    'saved activations, fp32': '保存的激活，fp32', 'saved activations, bf16': '保存的激活，bf16',
    'inference, fp32': '推理，fp32', 'inference, bf16': '推理，bf16',
    "baseline: OpenMMLab's sequence of operations": '基线：OpenMMLab 的运算序列', 'ours': '本项目',
    'ours, `minimal`': '本项目，`minimal`', 'ours, `packed`': '本项目，`packed`',
    'ours, compiled': '本项目，编译后', "reference: the blocks' matmuls": '参考：仅各块的矩阵乘法',
    'reference: all matmuls and convolutions': '参考：仅全部矩阵乘法与卷积',
    'inference, `packed`, fp32': '推理，`packed`，fp32',
    'inference, `packed`, bf16': '推理，`packed`，bf16',
    '`lean` (default)': '`lean`（默认）', 'measured by OpenMMLab': 'OpenMMLab 实测'}

SPEED = {  # label → row in the results
    "baseline: OpenMMLab's sequence of operations": 'OpenMMLab', 'ours': 'ours',
    'ours, `minimal`': 'ours, minimal', 'ours, `packed`': 'ours, packed',
    'ours, compiled': 'ours, compiled', "reference: the blocks' matmuls": 'matmuls alone',
    'reference: all matmuls and convolutions': 'matmuls and convolutions alone'}

Rows = list[list[str]]


def models(start: str, version: int) -> list[dict]:
    """The metafiles' models whose names start so, of ConvNeXt V1 or V2."""
    files = sorted((ROOT / 'configs').glob('metafile_*.yml'))
    collection = 'ConvNeXt' + ' V2' * (version == 2)
    return [model for file in files for model in yaml.safe_load(file.read_text())['Models']
            if model['In Collection'] == collection and re.match(start, model['Name'])]


def recipe_rows(found: list[dict], link: str, *metrics: str) -> Rows:
    """One row per model: its config, these metrics (OpenMMLab's in brackets), its size."""
    rows = []
    for model in found:
        meta = model['Metadata']
        values = {k: v for result in model.get('Results', ()) for k, v in result['Metrics'].items()}
        name = re.sub(r'(rcnn_convnext(?:v2)?_[a-z]+)_.*_', r'\1_…_', model['Name'])
        rows.append([
            f'[`{name}`]({link}{model["Config"]})', meta['Pretrained On'],
            *(f'{values[m]:.1f}' + (f' ({values[other]:.2f})' if (other := f'{m} (OpenMMLab)')
                                    in values else '') for m in metrics),
            f'{meta["Parameters (M)"]:.2f}M', f'{meta["FLOPs (G)"]}G'])
    return rows


def upernet(link: str) -> Rows:
    return [['config', 'pretrained on', 'mIoU, single scale', 'mIoU, multi-scale + flip',
             'parameters', 'FLOPs'],
            *recipe_rows(models('upernet', 1), link, 'mIoU', 'mIoU(ms+flip)')]


def rcnn(link: str) -> Rows:
    return [['config', 'pretrained on', 'box AP', 'mask AP', 'parameters', 'FLOPs'],
            *recipe_rows(models('(cascade_)?mask_rcnn', 1), link, 'box AP', 'mask AP')]


def boxes(link: str) -> Rows:
    return [['config', 'pretrained on', 'parameters', 'FLOPs'],
            *recipe_rows(models('(cascade|faster)_rcnn', 1), link)]


def v2(link: str) -> Rows:
    return [['config', 'pretrained on', 'parameters', 'FLOPs'],
            *recipe_rows(models('upernet', 2) + models('.*rcnn', 2), link)]


def sizes(link: str) -> Rows:
    """Depths, dims and parameters with ImageNet's classifier, counted on the meta device."""
    import torch

    from convnext_mm import ConvNeXt
    from convnext_mm.archs import ARCHS
    rows = [['`arch`', '`depths`', '`dims`', 'parameters']]
    for name, arch in ARCHS.items():
        with torch.device('meta'):
            backbone = ConvNeXt(name)
        count = sum(p.numel() for name, p in backbone.named_parameters() if name[:4] != 'norm')
        count += 2 * arch.dims[-1] + (arch.dims[-1] + 1) * CLASSES  # a norm and a linear layer
        rows.append([f'`{name}`', ', '.join(map(str, arch.depths)), ', '.join(map(str, arch.dims)),
                     f'{count / 1e6:.2f}M'])
    return rows


def memory(link: str) -> Rows:
    rows = [['', '`plain`', '`lean` (default)', '`minimal`', 'measured by OpenMMLab']]
    for model in models('upernet', 1):
        size = re.search('convnext_([a-z]+_[0-9]+)', model['Name'])[1].replace('_', ' ')
        values = [v for k, v in model['Metadata'].items() if k.startswith('Training Memory')]
        rows.append([size, *(f'{value:.2f} GB' for value in values)])
    return rows


def results(kind: str) -> dict[tuple[str, ...], dict[str, dict[str, str]]]:
    """The newest results of a kind: (size, step, dtype, input) → row → column → cell."""
    file = max((ROOT / 'benchmarks' / 'results').glob(f'*-backbone-{kind}-cpu.md'))
    found = {}
    for title, text in re.findall(r'^\*\*(.+?)\*\*.*\n\n((?:\|.*\n)+)', file.read_text(), re.M):
        header, _, *rows = [[cell.strip() for cell in line.strip('|').split('|')]
                            for line in text.splitlines()]
        found[tuple(title.split(', '))] = {
            name.split(' (')[0]: dict(zip(header[1:], cells, strict=True)) for name, *cells in rows}
    return found


def speed(link: str) -> Rows:
    columns = [('training', 'train', 'ms'), ('training', 'train', 'MiB'),
               ('inference', 'infer', 'ms')]
    rows = [['', *(f'{title}, {dtype}' for title in ('training', 'saved activations', 'inference')
                   for dtype in ('fp32', 'bf16'))]]
    for label, name in SPEED.items():
        cells = []
        for kind, step, unit in columns:
            for dtype in 'fp32', 'bf16':
                row = results(kind)['tiny', step, dtype, '1 × 512×512'].get(name, {})
                cell = next((v for k, v in row.items() if unit in k), '')
                cells.append(f'{float(cell):.0f} {unit}' if cell else '')
        rows.append([label, *cells])
    return rows


def speed_of_sizes(link: str) -> Rows:
    rows = [['', 'training, fp32', 'training, bf16', 'inference, `packed`, fp32',
             'inference, `packed`, bf16']]
    for size in 'small', 'base', 'large', 'xlarge':
        cells = []
        for kind, step, *names in (
                ('sizes', 'train', 'ours', 'matmuls alone'),
                ('sizes-inference', 'infer', 'ours, packed', 'matmuls and convolutions alone')):
            for dtype in 'fp32', 'bf16':
                table = results(kind)[size, step, dtype, '1 × 512×512']
                cells.append('{} ({})'.format(*(table[name]['speedup'] for name in names)))
        rows.append([size, *cells])
    return rows


TABLES: dict[str, Callable[[str], Rows]] = {
    'upernet': upernet, 'rcnn': rcnn, 'boxes': boxes, 'v2': v2, 'sizes': sizes, 'memory': memory,
    'speed': speed, 'speed-of-sizes': speed_of_sizes}


def with_tables(page: Path) -> str:
    """The text of a page, with its tables made anew."""
    chinese = page.stem.endswith('_zh-CN')

    def table(match: re.Match) -> str:
        rows = TABLES[match[2]]('' if page.parent == ROOT else '../')
        rows.insert(1, ['---'] * len(rows[0]))
        lines = ['| ' + ' | '.join(CHINESE.get(cell, cell) if chinese else cell for cell in row)
                 + ' |' for row in rows]
        return match[1] + re.sub(' {2,}', ' ', '\n'.join(lines)) + '\n' + match[3]
    return MARKERS.sub(table, page.read_text(encoding='utf-8'))


def with_data(page: Path) -> str:
    """The text of docs/choose/index.html, with docs/tables in it: a local page can read no file."""
    from convnext_mm import choosing
    rows = [f'{json.dumps(task)}: {(ROOT / "docs/tables" / f"{name}.json").read_text().strip()}'
            for task, name in choosing.TASKS.items()]
    data = '{' + ',\n'.join(rows).replace('</', '<\\/') + '}'
    return DATA.sub(lambda match: f'{match[1]}{data}\n{match[2]}', page.read_text(encoding='utf-8'))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--check', action='store_true',
                        help='write nothing; fail if a table is not current')
    args = parser.parse_args()
    pages = [*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')]
    texts = {page: with_tables(page) for page in sorted(pages)}
    texts[PAGE] = with_data(PAGE)
    changed = [page for page, text in texts.items() if page.read_text(encoding='utf-8') != text]
    for page in changed:
        if not args.check:
            page.write_text(texts[page], encoding='utf-8')
        print(f'{page.relative_to(ROOT)}: tables {"are not current" if args.check else "written"}')
    if changed and args.check:
        sys.exit('Run python tools/make_tables.py')
