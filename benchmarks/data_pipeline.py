"""Compare the data pipelines of the recipes with mmseg's and mmdet's own transforms.

    python benchmarks/data_pipeline.py

The same image goes through both in one process, in turn and with the same random numbers, so both
make the same crops. Times are processor times of one core and their least values over the rounds;
a round is 50 images. The image is matplotlib's photograph of Grace Hopper, at the usual size of
ADE20K (683×512, 20 regions) or COCO (640×480, 7 objects of 30 corners). Results go to
benchmarks/results.
"""
from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import cv2
import matplotlib.cbook
import measuring
import numpy as np
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

from convnext_mm.datasets.transforms import use_faster_transforms
from convnext_mm.engine.checks import read_config

STOCK, OURS = 'stock', 'ours'
IMAGES = 50
RECIPES = dict(
    mmseg='configs/upernet_convnext_tiny_512_160k_ade20k.py',
    mmdet='configs/cascade_mask_rcnn_convnext_tiny_patch4_window7_mstrain_480-800_giou_4conv1f_'
          'adamw_3x_coco_in1k.py')


def photograph(path: Path, size: tuple[int, int]) -> str:
    """Write the photograph in a size (width, height)."""
    with matplotlib.cbook.get_sample_data('grace_hopper.jpg') as file:
        image = cv2.imdecode(np.frombuffer(file.read(), np.uint8), cv2.IMREAD_COLOR)
    cv2.imwrite(str(path), cv2.resize(image, size, interpolation=cv2.INTER_CUBIC))
    return str(path)


def segmentation_data(folder: Path) -> dict:
    """What mmseg's data set hands to the first transform."""
    rng = np.random.default_rng(0)
    seeds = rng.uniform((0, 0), (512, 683), (20, 2))
    grid = np.stack(np.mgrid[:512, :683], -1)[:, :, None]
    nearest = ((grid - seeds) ** 2).sum(-1).argmin(-1)
    cv2.imwrite(str(folder / 'mask.png'), rng.permutation(151)[:20].astype(np.uint8)[nearest])
    return dict(img_path=photograph(folder / 'ade.jpg', (683, 512)), reduce_zero_label=True,
                seg_map_path=str(folder / 'mask.png'), label_map=None, seg_fields=[])


def detection_data(folder: Path) -> dict:
    """What mmdet's data set hands to the first transform."""
    rng, instances = np.random.default_rng(0), []
    for label in range(7):
        angle = np.sort(rng.uniform(0, 2 * np.pi, 30))
        corners = rng.uniform((100, 100), (540, 380)) + rng.uniform(20, 100) * np.stack(
            [np.cos(angle), np.sin(angle)], 1)
        instances.append(dict(bbox=[*corners.min(0), *corners.max(0)], bbox_label=label,
                              mask=[corners.ravel().tolist()], ignore_flag=0))
    return dict(img_path=photograph(folder / 'coco.jpg', (640, 480)), img_id=0, height=480,
                width=640, instances=instances)


DATA = dict(mmseg=segmentation_data, mmdet=detection_data)


def compare(toolbox: str, mode: str, data: dict, repeats: int) -> list[str]:
    """Measure one pipeline; return the lines of a table."""
    DefaultScope.get_instance(toolbox, scope_name=toolbox)
    import_module(f'{toolbox}.datasets')
    registry = import_module(f'{toolbox}.registry').TRANSFORMS
    steps = read_config(RECIPES[toolbox])[f'{mode}_dataloader'].dataset.pipeline
    pipelines = {name: [registry.build(copy.deepcopy(step)) for step in steps]
                 for name in (STOCK, OURS)}
    use_faster_transforms(SimpleNamespace(pipeline=pipelines[OURS]))

    def run(name: str) -> Callable[[], np.ndarray]:
        def step() -> np.ndarray:
            spent = np.zeros(len(steps))
            np.random.seed(0)
            for _ in range(IMAGES):
                results = copy.deepcopy(data)
                for i, transform in enumerate(pipelines[name]):
                    begin = time.process_time()
                    results = transform(results)
                    spent[i] += time.process_time() - begin
            return 1e3 * spent / IMAGES
        return step
    rounds = [{name: run(name)() for name in pipelines} for _ in range(repeats)]
    best = {name: min((r[name] for r in rounds), key=np.sum) for name in pipelines}
    rows = [f'| {type(step).__name__} | {a:.2f} | {b:.2f} | {a / b:.2f} |'
            for step, a, b in zip(pipelines[STOCK], best[STOCK], best[OURS], strict=True)]
    total = [best[name].sum() for name in pipelines]
    return [f'**{Path(RECIPES[toolbox]).stem.split("_patch4")[0]}, {mode}**', '',
            '| transform | stock, ms | ours, ms | speedup |', '|---|---|---|---|', *rows,
            f'| all | {total[0]:.2f} | {total[1]:.2f} | {total[0] / total[1]:.2f} |',
            f'| images a second and core | {1e3 / total[0]:.0f} | {1e3 / total[1]:.0f} | |']


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--repeats', type=int, default=7)
    parser.add_argument('--name', default='data-pipeline',
                        help='name of the result file in benchmarks/results (data-pipeline)')
    args = parser.parse_args()
    MMLogger.get_instance('mmengine', log_level='WARNING')
    cv2.setNumThreads(0)  # as in the workers of a data loader
    tables = []
    with TemporaryDirectory() as temporary:
        for kind, make in DATA.items():
            for split in ('train', 'test'):
                lines = compare(kind, split, make(Path(temporary)), args.repeats)
                print('\n'.join(lines) + '\n', flush=True)
                tables.append('\n'.join(lines))
    print(f'''Results: {measuring.write_results(
        args.name, "Data pipelines compared with mmseg's and mmdet's own transforms",
        chr(10).join(f"{table}{chr(10)}" for table in tables))}''')
