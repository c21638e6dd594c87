"""The commands of ``convnext-mm``, which the scripts in ``tools/`` call as well.

A command imports what it needs after its arguments are read, and after what can be told without
PyTorch and the toolboxes, which take seconds to import.
"""
from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from . import choices, choosing, inputs
from .deployment.arguments import check_export, check_pruning
from .deployment.optional import check_installed
from .errors import UserError, print_error
from .key_values import add_cfg_options
from .utils import has_several_processes


class Command(NamedTuple):
    """A command.

    Args:
        description: What it does.
        add_arguments: Adds its arguments to a parser.
        action: Runs it.
    """

    description: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    action: Callable[[argparse.Namespace], object]


MISLEADING = ('`reduce_zero_label` will be deprecated', 'faster_coco_eval is not installed',
              'Default ``avg_non_ignore`` is False', 'The draw is False',
              'TF32 acceleration on top of oneDNN')
"""Warnings of the toolboxes about what the recipes mean as it is, or do not use."""


def main(command: str | None = None, argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        command: A key of :data:`COMMANDS`; None: the first argument names it.
        argv: The arguments; None: those of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__ if command is None else
                                     COMMANDS[command].description)
    if command is None:
        parser.prog, parser.description = 'convnext-mm', 'ConvNeXt for OpenMMLab.'
        subparsers = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
        for name, one in COMMANDS.items():
            one.add_arguments(subparsers.add_parser(name, help=one.description,
                                                    description=one.description))
    else:
        COMMANDS[command].add_arguments(parser)
    args = parser.parse_args(argv)
    run(COMMANDS[command or args.command].action, args)


def run(action: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Call ``action(args)``; on a :class:`UserError`, print its message and exit with status 2.

    Ctrl-C before or after a training, which saves itself, ends with status 130.
    """
    for text in MISLEADING:
        warnings.filterwarnings('ignore', text)
    try:
        action(args)
    except UserError as error:
        if has_several_processes():
            from .runs.heartbeat import report
            report(str(error))
        else:
            print_error(str(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def register() -> None:
    """Run the package's ``__init__``, if ``convnext_mm_command`` has put that off.

    Until then, nothing is registered with mmengine, and mmengine is as it is without the patches.
    """
    package = sys.modules[__name__.partition('.')[0]]
    spec = package.__spec__
    if not hasattr(package, '__version__') and spec is not None and spec.loader is not None:
        spec.loader.exec_module(package)


def check_files(args: argparse.Namespace) -> None:
    """Check the files that most commands name, without PyTorch.

    Args:
        args: ``config``, and ``checkpoint`` if the command takes one.

    Raises:
        UserError: One does not exist, or the config cannot be parsed.
    """
    inputs.check_syntax(inputs.find_config(args.config))
    checkpoint = vars(args).get('checkpoint')
    if checkpoint and not inputs.is_url(checkpoint) and not inputs.is_exported(checkpoint):
        inputs.find_local_checkpoint(checkpoint)


def add_config(parser: argparse.ArgumentParser, launcher: bool = True) -> None:
    """Add the arguments that training, testing and checking share.

    Args:
        parser: The parser.
        launcher: Whether to add the arguments for several processes.
    """
    parser.add_argument('config', help='config file, or the name of a recipe, such as '
                        'upernet_convnext_tiny_512_160k_ade20k')
    parser.add_argument('--work-dir', help='folder for logs, checkpoints and figures '
                        '(work_dirs/CONFIG)')
    add_cfg_options(parser)
    if launcher:
        parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'],
                            default='none', help='how the processes are started (none)')
        parser.add_argument('--local_rank', '--local-rank', type=int, default=0,
                            help=argparse.SUPPRESS)


def _add_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--dtype', choices=choices.DTYPES, help='dtype of convolutions and matrix '
                        "products (the config's inference_dtype, else fp32)")


def _add_train(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
                        help='resume from CHECKPOINT, or from the latest one in the work dir')
    parser.add_argument('--amp', action='store_true', help='train in mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help="scale the learning rate by the total batch size / the recipe's 16")
    parser.add_argument('--migrate', action='store_true',
                        help='first convert a config for mmcv 0.x or 1.x into the work dir')
    parser.add_argument('--dry-run', action='store_true',
                        help='show what would be trained, check the data, and stop')


def _train(args: argparse.Namespace) -> object:
    check_files(args)
    register()
    from .engine import launch
    return launch.train(args)


def _add_test(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument('checkpoint', help='file or URL of the weights, or a file of '
                        'tools/export.py')
    parser.add_argument('--out', help='write predictions: to a folder of PNG masks '
                        '(segmentation) or to a .pkl file (detection)')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='folder for an image of each prediction')
    parser.add_argument('--wait-time', type=float, default=2,
                        help='seconds that each window stays open (2)')
    parser.add_argument('--tta', action='store_true', help='use test-time augmentation')
    _add_dtype(parser)


def _test(args: argparse.Namespace) -> object:
    check_files(args)
    register()
    if inputs.is_exported(args.checkpoint):
        from .deployment import testing
        return testing.test(args)
    from .engine import launch
    return launch.test(args)


def _check(args: argparse.Namespace) -> None:
    check_files(args)
    register()
    from .engine import launch
    launch.check_dataset(args)


def _add_predict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('images', nargs='+', metavar='IMAGE',
                        help="images, folders of images, or patterns such as 'photos/*.jpg'")
    parser.add_argument('config', metavar='CONFIG', help='config file, or the name of a recipe')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='file or URL of the weights')
    parser.add_argument('--out', metavar='DIR', default='predictions',
                        help='output folder (default: predictions)')
    parser.add_argument('--device', help='for example cuda:1 or cpu (default: the best available)')
    parser.add_argument('--score-threshold', type=float, default=0.3, metavar='SCORE',
                        help='minimum score of drawn detections (default: 0.3)')
    parser.add_argument('--save', nargs='+', choices=choices.SAVED, default=[],
                        help='also write: masks, the class map of each image (segmentation; of '
                        "large pictures, it is always written), coco or csv, all images' "
                        'detections in predictions.json or predictions.csv')
    parser.add_argument('--masks', dest='save', action='append_const', const='masks',
                        help='the same as --save masks')
    _add_dtype(parser)
    add_cfg_options(parser)


def _predict(args: argparse.Namespace) -> None:
    inputs.find_images(args.images)
    check_files(args)
    register()
    from . import prediction
    prediction.image_demo(args)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help='config file, or the name of a recipe')
    parser.add_argument('checkpoint', help='file or URL of the weights')
    parser.add_argument('--to', choices=[*choices.FORMATS, 'coreml'], default='onnx',
                        help='format of the file (onnx)')
    parser.add_argument('--out', metavar='FILE', help='the file to write (CONFIG.onnx, ...)')
    parser.add_argument('--int8', action='store_true', help='quantize to 8 bits, calibrated on '
                        'training images (onnx, openvino)')
    parser.add_argument('--bf16', action='store_true', help='compute in bf16 (openvino); with '
                        '--int8, what is not quantized')
    parser.add_argument('--size', type=_parse_size, metavar='WxH', help='one image of this size '
                        'alone, for runtimes that need constant shapes')
    parser.add_argument('--max-drop', type=float, default=0.5, metavar='PERCENT',
                        help='how much lower the metric may be with --int8 and --bf16 (0.5)')
    parser.add_argument('--calibration', type=_parse_count, default=32, metavar='N',
                        help='training images to calibrate on (32)')
    parser.add_argument('--images', type=_parse_count, default=100, metavar='N',
                        help='test images to compare the file on (100)')
    parser.add_argument('--pictures', metavar='DIR',
                        help='folder for a picture of the results on each of these images')
    add_cfg_options(parser)


def _export(args: argparse.Namespace) -> object:
    check_export(args)
    check_files(args)
    register()
    from .deployment import export
    return export.main(args)


def _add_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help='config file, or the name of a recipe')
    parser.add_argument('checkpoint', help='file or URL of the weights')
    parser.add_argument('--flops', type=float, metavar='SHARE',
                        help="how much of the backbone's FLOPs remains, such as 0.6")
    parser.add_argument('--head-channels', type=_parse_count, metavar='N',
                        help="channels that remain in UPerNet's decode_head, or in the "
                        'convolutions of box and mask heads, such as 256')
    parser.add_argument('--latency-ms', type=_parse_limit, metavar='MS', help='instead, choose '
                        'both so that a test image takes no longer on this machine')
    parser.add_argument('--out', metavar='DIR', help='output folder (CONFIG_pruned)')
    parser.add_argument('--images', type=_parse_count, default=100, metavar='N',
                        help='training images to solve for the weights on (100)')
    parser.add_argument('--test-images', type=_parse_count, default=100, metavar='N',
                        help='test images to measure the metric on (100)')
    add_cfg_options(parser)


def _prune(args: argparse.Namespace) -> object:
    check_pruning(args)
    check_files(args)
    register()
    from .deployment import pruning
    return pruning.main(args)


def _add_browser_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('models', nargs='+', metavar='MODEL.onnx', help='files of tools/export.py; '
                        'with --int8 they are a quarter as large')
    parser.add_argument('--images', nargs='+', metavar='IMAGE',
                        help='samples on the page: images, folders of images, or patterns')
    parser.add_argument('--out', metavar='FILE', default='browser_demo.html',
                        help='the page (browser_demo.html)')
    parser.add_argument('--runtime', metavar='DIR', help='folder dist of '
                        f'{choices.WEB_RUNTIME} (npm downloads it)')


def _browser_demo(args: argparse.Namespace) -> object:
    inputs.find_images(args.images or ())
    register()
    from .deployment import browser
    return browser.main(args)


def _add_web_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('config', help='config file, or the name of a recipe')
    parser.add_argument('checkpoint', help='file or URL of the weights')
    parser.add_argument('--host', default='127.0.0.1', help='address to serve at; 0.0.0.0 also '
                        'serves other machines (127.0.0.1)')
    parser.add_argument('--port', type=int, default=7860, help='port (7860)')
    parser.add_argument('--device', help='for example cuda:1 or cpu (default: the best available)')
    _add_dtype(parser)
    add_cfg_options(parser)


def _web_demo(args: argparse.Namespace) -> None:
    check_installed('gradio', extra='web')
    check_files(args)
    register()
    from . import web_demo
    web_demo.main(args)


def _add_migrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('old', metavar='OLD', help='the old config, or a folder of old configs')
    parser.add_argument('new', metavar='NEW', nargs='?', help='the new config (OLD_new.py), or '
                        'the folder for the new configs (OLD_new)')
    parser.add_argument('--trust', action='store_true', help='execute the old config instead of '
                        'reading it as data, and import what it and --import name')
    parser.add_argument('--import', dest='imports', action='append', default=[], metavar='MODULE',
                        help='a module or .py file that registers types of your own, with --trust; '
                        'may be repeated')


def _migrate(args: argparse.Namespace) -> None:
    old = Path(args.old)
    if not old.is_dir():
        inputs.find_config(old)
    new = args.new or old.with_name(f'{old.stem}_new{old.suffix}')
    register()
    from .engine import conversion
    convert = conversion.migrate_folder if old.is_dir() else conversion.migrate
    print(convert(old, new, args.trust, args.imports))


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('source', metavar='IN', help='file or URL with any published naming')
    parser.add_argument('target', metavar='OUT', help='.pth, .pt, .bin or .safetensors file')
    parser.add_argument('--to', choices=choices.EXPORT_SCHEMES,
                        help='library whose names to use (default: names stay the same)')
    parser.add_argument('--publish', action='store_true',
                        help="add the beginning of the file's SHA-256 to its name")


def _convert(args: argparse.Namespace) -> None:
    if not inputs.is_url(args.source):
        inputs.find_local_checkpoint(args.source)
    from .checkpoints import export
    export.main(args)


def _add_convert_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('source', help="folder of annotations and images, or YOLO's data.yaml")
    parser.add_argument('out', help='folder of the new files')
    parser.add_argument('--colors', metavar='CONFIG', help='instead, convert the masks in the '
                        "folder from the colors of this config's palette to class indices")
    parser.add_argument('--ignore-others', action='store_true', help='with --colors: colors that '
                        'are not in the palette become 255, which is ignored')


def _convert_data(args: argparse.Namespace) -> None:
    if args.colors:
        inputs.check_syntax(inputs.find_config(args.colors))
        register()
    from .engine import datasets_cli
    datasets_cli.convert_dataset(args)


def _add_split_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('images', help='folder of the images')
    parser.add_argument('out', help='folder of the lists')
    parser.add_argument('--annotations', metavar='FILE', help='annotation file in COCO format, '
                        'which is split; without it, lists of names are written')
    parser.add_argument('--val', type=float, default=0.2, metavar='SHARE',
                        help='share of the validation images (0.2)')
    parser.add_argument('--seed', type=int, default=0, help='seed of the shuffle (0)')


def _split_data(args: argparse.Namespace) -> None:
    from .engine import datasets_cli
    datasets_cli.split_dataset(args)


def _add_table(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('configs', nargs='*', help='config files (all recipes)')
    parser.add_argument('--size', type=_parse_size, metavar='WxH',
                        help="input size (the authors': 2048x512, 2560x640, 1280x800)")
    parser.add_argument('--memory', action='store_true',
                        help='estimate the memory of training with 2 images per GPU in mixed '
                        'precision, for each value of model.backbone.memory')
    parser.add_argument('--measure', nargs='?', const='docs/tables', metavar='DIR',
                        help='instead, measure the latency of recipes on this machine, on one '
                        'thread, and write tables for tools/choose_model.py to DIR (docs/tables)')


def _parse_size(text: str) -> tuple[int, int]:
    """Parse WxH."""
    width, _, height = text.partition('x')
    try:
        return _parse_count(width), _parse_count(height)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f'expected width and height in pixels, such as 1280x800, not {text!r}') from None


def _table(args: argparse.Namespace) -> None:
    for config in args.configs:
        inputs.check_syntax(inputs.find_config(config))
    register()
    configs = args.configs or inputs.recipe_files()
    if args.measure:
        from . import model_tables
        print(*model_tables.write_tables(args.measure, configs), sep='\n')
        return
    from . import complexity
    print(complexity.complexity_table(configs, args.size, args.memory))


def _add_choose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--task', choices=choosing.TASKS, required=True,
                        help='segmentation or detection')
    parser.add_argument('--gpu-memory', type=_parse_limit, metavar='GB',
                        help='memory of the GPU that you train on')
    parser.add_argument('--latency-ms', type=_parse_limit, metavar='MS',
                        help='the longest that an image may take')
    parser.add_argument('--runtime', choices=choosing.RUNTIMES, default='pytorch',
                        help='what images run in: ' + ', '.join(
                            f'{key}: {name}' for key, name in choosing.RUNTIMES.items())
                        + ' (pytorch)')
    parser.add_argument('--prefer', choices=choosing.PREFERENCES, default='accuracy',
                        help='; '.join(f'{key}: {text}' for key, text in
                                       choosing.PREFERENCES.items()) + ' (accuracy)')
    parser.add_argument('--measure-here', action='store_true', help='measure three recipes on this '
                        'machine, and predict the latency of the others')
    parser.add_argument('--threads', type=int, choices=range(1, 257), default=1, metavar='N',
                        help='threads of a CPU with --measure-here (1)')


def _parse_count(text: str) -> int:
    """Parse a whole number from 1."""
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f'expected a whole number from 1, not {text!r}')


def _parse_limit(text: str) -> float:
    """Parse a number above 0."""
    try:
        if (value := float(text)) > 0:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f'expected a number above 0, not {text!r}')


def _choose(args: argparse.Namespace) -> None:
    table = choosing.read_table(args.task, args.runtime)
    if args.measure_here:
        register()
        from . import model_tables
        table = model_tables.measure_here(table, threads=args.threads, runtime=args.runtime)
        for row in table['recipes']:
            print(f'{choosing.latency_of(row, args.runtime):8.0f} ms, {row["latency_from"]}: '
                  f'{row["name"]}')
    print(choosing.explain(table, args.prefer, args.gpu_memory, args.latency_ms, args.runtime))


COMMANDS = {
    'train': Command('Train a segmentor or a detector.', _add_train, _train),
    'test': Command('Evaluate a segmentor or a detector.', _add_test, _test),
    'predict': Command("Draw a trained model's predictions on your own images.", _add_predict,
                       _predict),
    'check': Command("Check all images and annotations of a config's datasets, and draw "
                     'dataset.png.', lambda parser: add_config(parser, launcher=False),
                     _check),
    'migrate': Command("Convert a config for mmcv 0.x or 1.x, or with mmpretrain's ConvNeXt, and "
                       'report each key.', _add_migrate, _migrate),
    'convert': Command("Convert a ConvNeXt checkpoint to another library's names or file format, "
                       'or publish it.', _add_convert, _convert),
    'convert-data': Command('Convert annotations of Pascal VOC, YOLO, LabelMe or Roboflow to COCO '
                            'format.', _add_convert_data, _convert_data),
    'split-data': Command('Split images into training and validation data; near-duplicates stay '
                          'on one side.', _add_split_data, _split_data),
    'export': Command('Export a model for another runtime, and compare it with PyTorch on the test '
                      'images.', _add_export, _export),
    'prune': Command("Remove channels of a trained model's backbone and head.", _add_prune,
                     _prune),
    'browser-demo': Command('Write one page that runs exported models in a browser, without a '
                            'server.', _add_browser_demo, _browser_demo),
    'web-demo': Command('Serve a web page that runs a checkpoint on uploaded images.',
                        _add_web_demo, _web_demo),
    'choose': Command('Recommend a recipe for a GPU memory and a latency.', _add_choose, _choose),
    'table': Command('Print a table of parameters, FLOPs and memory of configs, without running '
                     'the models.', _add_table, _table),
}
