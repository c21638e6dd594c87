"""Print a table of parameters, FLOPs and memory of configs, without running the models."""
import argparse
from pathlib import Path

from convnext_mm.complexity import complexity_table
from convnext_mm.engine.launch import run_cli


def parse_size(text: str) -> tuple[int, int]:
    """Parse WxH."""
    width, height = map(int, text.split('x'))
    return width, height


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    folder = Path(__file__).resolve().parent.parent / 'configs'
    recipes = sorted(str(path) for path in folder.glob('*.py')
                     if not path.stem.endswith(('_ss', '_ms')))
    print(complexity_table(args.configs or recipes, args.size, args.memory))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('configs', nargs='*', help='config files (all recipes in configs/)')
    parser.add_argument('--size', type=parse_size, metavar='WxH',
                        help="input size (the authors': 2048x512, 2560x640, 1280x800)")
    parser.add_argument('--memory', action='store_true',
                        help='estimate the memory of training with 2 images per GPU in mixed '
                        'precision, for each value of model.backbone.memory (segmentors only)')
    run_cli(main, parser.parse_args())
