"""Train a segmentor or a detector."""
from convnext_mm.engine.launch import common_parser, run_cli, train

if __name__ == '__main__':
    parser = common_parser(__doc__)
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='resume from CHECKPOINT, or from the latest one in the work dir')
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help="scale the learning rate by the total batch size / the recipe's 16")
    parser.add_argument('--migrate', action='store_true',
                        help='first convert a config for mmcv 0.x or 1.x into the work dir')
    parser.add_argument('--dry-run', action='store_true',
                        help='show what would be trained, check the data, and stop')
    run_cli(train, parser.parse_args())
