"""Draw what a trained model sees in pictures of your own."""
import argparse

from convnext_mm.engine.launch import add_cfg_options, run_cli
from convnext_mm.prediction import image_demo

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('images', nargs='+', metavar='IMAGE',
                        help="pictures, folders of pictures, or patterns such as 'photos/*.jpg'")
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='file or URL of the weights')
    parser.add_argument('--out', metavar='DIR', default='predictions',
                        help='folder for the pictures (predictions)')
    parser.add_argument('--device', help='such as cuda:1 or cpu (a GPU if there is one)')
    parser.add_argument('--score-threshold', type=float, default=0.3, metavar='SCORE',
                        help='draw detections from this score up (0.3)')
    add_cfg_options(parser)
    run_cli(image_demo, parser.parse_args())
