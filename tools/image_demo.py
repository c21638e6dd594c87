"""Draw a trained model's predictions on your own images."""
import argparse

from convnext_mm.engine.cfg_options import add_cfg_options
from convnext_mm.engine.launch import add_dtype, run_cli
from convnext_mm.prediction import image_demo

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('images', nargs='+', metavar='IMAGE',
                        help="images, folders of images, or patterns such as 'photos/*.jpg'")
    parser.add_argument('config', metavar='CONFIG', help='config file')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='file or URL of the weights')
    parser.add_argument('--out', metavar='DIR', default='predictions',
                        help='output folder (default: predictions)')
    parser.add_argument('--device', help='for example cuda:1 or cpu (default: the best available)')
    parser.add_argument('--score-threshold', type=float, default=0.3, metavar='SCORE',
                        help='minimum score of drawn detections (default: 0.3)')
    parser.add_argument('--masks', action='store_true', help='also write the class map of each '
                        'image (segmentation); of large pictures, it is always written')
    add_dtype(parser)
    add_cfg_options(parser)
    run_cli(image_demo, parser.parse_args())
