"""Generate the demo's images in the layouts of ADE20K and COCO."""
import argparse

from convnext_mm_command import run


def main(args: argparse.Namespace) -> None:
    """Generate the images and print their folder."""
    from convnext_mm.demo_data import make
    print('Demo data:', make(args.out, args.num_train, args.num_val, args.seed))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', default='data/demo', help='output folder (data/demo)')
    parser.add_argument('--num-train', type=int, default=400, help='training images (400)')
    parser.add_argument('--num-val', type=int, default=80, help='validation images (80)')
    parser.add_argument('--seed', type=int, default=0, help='the same seed, the same images (0)')
    run(main, parser.parse_args())
