"""``make demo``: generate data, train and test both tasks, using the same tools as users do."""
from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

WORK_DIR = Path('work_dirs/demo')
RUNS = {
    'Segmentation': ('configs/demo/upernet_convnext_demo.py', 'best_mIoU_*.pth',
                     {'mIoU': ('mIoU', 1)}),
    'Detection': ('configs/demo/cascade_mask_rcnn_convnext_demo.py', 'best_coco_segm_mAP_*.pth',
                  {'box AP50': ('coco/bbox_mAP_50', 100), 'mask AP50': ('coco/segm_mAP_50', 100),
                   'box AP': ('coco/bbox_mAP', 100), 'mask AP': ('coco/segm_mAP', 100)}),
}
"""Task → config, pattern of the best checkpoint, {displayed name: (metric, factor to percent)}."""

console = Console()


def main() -> None:
    """Generate the data, train and test both tasks, and print a table of the results."""
    begin = time.time()
    _call('tools/make_demo_data.py')
    rows = []
    for task, (config, best, metrics) in RUNS.items():
        work_dir = WORK_DIR / Path(config).stem
        started = time.time()
        _call('tools/train.py', config, '--work-dir', work_dir)
        seconds = time.time() - started
        checkpoint = max(work_dir.glob(best), key=lambda path: path.stat().st_mtime)
        _call('tools/test.py', config, checkpoint, '--work-dir', work_dir)
        scores = _test_scores(work_dir)
        result = '   '.join(f'{name} {factor * scores[key]:.1f} %'
                            for name, (key, factor) in metrics.items())
        rows.append((task, result, f'{seconds / 60:.1f} min', work_dir))

    table = Table(title='Results on the validation images')
    for column in ('Task', 'Result', 'Training'):
        table.add_column(column)
    for task, result, minutes, _ in rows:
        table.add_row(task, result, minutes)
    console.print(table)
    for task, _, _, work_dir in rows:
        console.print(f'{task}: predictions in {work_dir}/predictions/, curves in '
                      f'{work_dir}/curves.png', soft_wrap=True)
    console.print(f'The demo took {(time.time() - begin) / 60:.1f} min. Next: train on your '
                  'own data; configs/demo/ shows how (see README.md).', soft_wrap=True)


def _call(script: str, *args: object) -> None:
    """Run one of the tools; exit with its status if it fails."""
    command = [script, *map(str, args)]
    console.rule(f'python {" ".join(command)}')
    status = subprocess.run([sys.executable, *command]).returncode
    if status:
        sys.exit(status)


def _test_scores(work_dir: Path) -> dict[str, float]:
    """Return the metrics that mmengine wrote for the latest test in ``work_dir``."""
    files = [path for path in work_dir.glob('*/*.json') if path.parent.name == path.stem]
    return json.loads(max(files, key=lambda path: path.stat().st_mtime).read_text())
