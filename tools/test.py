"""Evaluate a segmentor or a detector."""
from convnext_mm.engine.launch import common_parser, run_cli, test

if __name__ == '__main__':
    parser = common_parser(__doc__)
    parser.add_argument('checkpoint', help='file or URL of the weights')
    parser.add_argument('--out', help='write predictions: a folder of PNG masks '
                        '(segmentation), a .pkl file (detection)')
    parser.add_argument('--show', action='store_true', help='show pictures in a window')
    parser.add_argument('--show-dir', help='folder for a picture of every prediction')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds a window stays (2)')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    run_cli(test, parser.parse_args())
