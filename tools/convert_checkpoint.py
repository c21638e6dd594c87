"""Convert a ConvNeXt checkpoint to another library's names or file format, or publish it."""
import argparse

from convnext_mm.checkpoints import export, naming
from convnext_mm.engine.launch import run_cli

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', metavar='IN', help='file or URL with any published naming')
    parser.add_argument('target', metavar='OUT', help='.pth, .pt, .bin or .safetensors file')
    parser.add_argument('--to', choices=naming.EXPORT_SCHEMES,
                        help='library whose names to use (default: names stay the same)')
    parser.add_argument('--publish', action='store_true',
                        help="add the beginning of the file's SHA-256 to its name")
    run_cli(export.main, parser.parse_args())
