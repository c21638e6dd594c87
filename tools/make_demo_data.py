"""Draw the demo's pictures, in the layouts of ADE20K and COCO."""
import argparse

from convnext_mm.demo_data import make
from convnext_mm.engine.launch import run_cli

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', default='data/demo', help='folder to write (data/demo)')
    parser.add_argument('--num-train', type=int, default=400, help='pictures to train on (400)')
    parser.add_argument('--num-val', type=int, default=80, help='held-out pictures (80)')
    parser.add_argument('--seed', type=int, default=0, help='same seed, same pictures (0)')
    run_cli(lambda args: print('Demo data:', make(args.out, args.num_train, args.num_val, args.seed)),
        parser.parse_args())
