"""Checks of the options of exports and pruning against each other, without PyTorch."""
from __future__ import annotations

import argparse

from ..choices import FORMATS
from ..errors import UserError


def check_export(args: argparse.Namespace) -> None:
    """Check the options of an export against each other.

    Raises:
        UserError: Some cannot be combined.
    """
    if args.to == 'coreml':
        raise UserError('Core ML files run on macOS only, so that they cannot be compared here, '
                        'and no file is handed over without that. Use --to onnx: on macOS, ONNX '
                        "Runtime's CoreMLExecutionProvider runs the file")
    for name, formats in (('int8', ('onnx', 'openvino')), ('bf16', ('openvino',))):
        if getattr(args, name) and args.to not in formats:
            raise UserError(f'--{name} is not available with --to {args.to}: use --to '
                            f'{" or ".join(formats)}')
    if args.size and (args.to == 'openvino' or args.int8):
        raise UserError('--size is not available with --to openvino and --int8')
    if args.to == 'aoti' and not args.size:
        raise UserError('AOTInductor compiles for one size of the image: add --size WxH')
    known = [name for name, suffix in FORMATS.items() if (args.out or '').endswith(suffix)]
    if args.out and known[-1:] != [args.to]:
        other = f', which is of --to {known[-1]}' if known else ''
        raise UserError(f'--out {args.out}{other}: expected a name that ends in '
                        f'{FORMATS[args.to]}')
    if not 0 <= args.max_drop <= 100:
        raise UserError(f'--max-drop {args.max_drop}: expected percent, between 0 and 100')


def packages_for(args: argparse.Namespace) -> list[str]:
    """The optional packages that an export needs."""
    if args.to not in ('onnx', 'openvino'):
        return []
    names = ['onnx', 'onnxscript']
    if args.to == 'onnx' or args.int8:
        names.append('onnxruntime')
    if args.to == 'openvino':
        names += ['openvino', *['nncf'] * args.int8]
    return names


def check_pruning(args: argparse.Namespace) -> None:
    """Check the options of pruning against each other.

    Raises:
        UserError: There is nothing to do, or too much.
    """
    sizes = args.flops, args.head_channels
    if args.latency_ms is not None and sizes != (None, None):
        raise UserError('--latency-ms chooses --flops and --head-channels: leave them out')
    if args.latency_ms is None and sizes == (None, None):
        raise UserError('nothing to prune: give --flops, --head-channels or both, or --latency-ms')
    if args.flops is not None and not 0 < args.flops < 1:
        raise UserError(f'--flops {args.flops}: expected the share of the FLOPs of the backbone '
                        'that remains, between 0 and 1')
