"""Evaluate a segmentor or a detector."""
from convnext_mm.engine.launch import add_dtype, common_parser, run_cli, test

if __name__ == '__main__':
    parser = common_parser(__doc__)
    parser.add_argument('checkpoint', help='file or URL of the weights')
    parser.add_argument('--out', help='write predictions: to a folder of PNG masks '
                        '(segmentation) or to a .pkl file (detection)')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='folder for an image of each prediction')
    parser.add_argument('--wait-time', type=float, default=2,
                        help='seconds that each window stays open (2)')
    parser.add_argument('--tta', action='store_true', help='use test-time augmentation')
    add_dtype(parser)
    run_cli(test, parser.parse_args())
