"""Write a ConvNeXt checkpoint in another library's naming, or as .safetensors, or to publish."""
import argparse

from convnext_mm.checkpoints import export, naming
from convnext_mm.engine.launch import run_cli

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('source', metavar='IN', help='file or URL, of any published naming')
    parser.add_argument('target', metavar='OUT', help='.pth, .pt, .bin or .safetensors file')
    parser.add_argument('--to', choices=naming.TARGETS, help='whose names to give (as they are)')
    parser.add_argument('--publish', action='store_true',
                        help='weights and meta only, with the hash of the file in its name')
    run_cli(export.main, parser.parse_args())
