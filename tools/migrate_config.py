"""Convert a config for mmcv 0.x or 1.x, or with mmpretrain's ConvNeXt, and report each key."""
import argparse
from pathlib import Path

from convnext_mm.engine.launch import run_cli
from convnext_mm.migration import migrate

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('old', metavar='OLD.py', help='the old config')
    parser.add_argument('new', metavar='NEW.py', nargs='?', help='the new config (OLD_new.py)')
    parser.add_argument('--trust', action='store_true',
                        help='execute the old config instead of reading it as data')
    args = parser.parse_args()
    old = Path(args.old)
    new = args.new or old.with_name(f'{old.stem}_new.py')
    run_cli(lambda args: print(migrate(old, new, args.trust)), args)
