"""Print a table of configs: parameters, FLOPs (multiply-adds), memory; nothing is run for it."""
import argparse
from pathlib import Path

from convnext_mm.complexity import complexity_table
from convnext_mm.engine.launch import run_cli


def size(text: str) -> tuple[int, int]:
    width, height = map(int, text.split('x'))
    return width, height


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='*', help='config files (the recipes of configs/)')
    parser.add_argument('--size', type=size, metavar='WxH',
                        help="of the picture (the authors': 2048x512, 2560x640, 1280x800)")
    parser.add_argument('--memory', action='store_true',
                        help='reckon what a GPU holds in training, for 2 pictures in mixed '
                        'precision, with each of model.backbone.memory (segmentors)')
    args = parser.parse_args()
    recipes = sorted(str(path) for path in (Path(__file__).parent.parent / 'configs').glob('*.py')
                     if not path.stem.endswith(('_ss', '_ms')))
    run_cli(lambda args: print(complexity_table(args.configs or recipes, args.size, args.memory)), args)
