"""Split images into training and validation data; near-duplicates stay on one side."""
import argparse

from convnext_mm.engine.datasets_cli import split_dataset
from convnext_mm.engine.launch import run_cli

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('images', help='folder of the images')
    parser.add_argument('out', help='folder of the lists')
    parser.add_argument('--annotations', metavar='FILE', help='annotation file in COCO format, '
                        'which is split; without it, lists of names are written')
    parser.add_argument('--val', type=float, default=0.2, metavar='SHARE',
                        help='share of the validation images (0.2)')
    parser.add_argument('--seed', type=int, default=0, help='seed of the shuffle (0)')
    run_cli(split_dataset, parser.parse_args())
