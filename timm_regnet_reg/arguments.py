"""The commands' arguments. Nothing here imports torch or timm, so that help and mistakes are answered at once."""

import argparse
import os
from typing import Callable, Dict, Tuple

__all__ = ['COMMANDS', 'DEFAULT_MODEL', 'positive']

DEFAULT_MODEL = 'regnet_reg_resnet20_convlstm'


def positive(text: str) -> int:
    """An argument type: a whole number from 1 on, of up to nine digits, as none here is larger for good reason."""
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} was given, expected a whole number from 1 to 999999999')
    return int(text)


def _threads(text: str) -> int:
    number, cores = positive(text), os.cpu_count() or 1
    if number > cores:
        raise argparse.ArgumentTypeError(f'{number} was given, expected at most {cores}, the cores of this machine')
    return number


def _script(text: str) -> str:
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(
            f'there is no file {text!r}: give the path of a script, such as validate.py in a clone of '
            'github.com/huggingface/pytorch-image-models'
        )
    return text


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f'{text!r} was given, expected a whole number from 0 to 999999999')
    return int(text)


def _words(text: str) -> str:
    """An argument type: text in one line, and not nothing."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f'{text!r} was given, expected a word or more')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f'{text!r} was given, expected text in UTF-8') from error
    return ' '.join(text.split())


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--device', default='cpu', help='cpu, cuda, cuda:1 and the like (default: %(default)s)')


def _quickstart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--output',
        default='.',
        metavar='DIR',
        help=f'where {DEFAULT_MODEL}.digits/ goes; one from an earlier run is replaced (default: here)',
    )


def _classify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('images', metavar='IMAGE', nargs='+', help='an image, a folder of images, or an http(s) URL')
    parser.add_argument(
        '--model',
        default=DEFAULT_MODEL,
        help="a model of timm's with weights, hf-hub:OWNER/NAME or local-dir:FOLDER (default: %(default)s)",
    )
    parser.add_argument(
        '--topk',
        type=positive,
        default=5,
        metavar='K',
        help='how many classes to print (default: %(default)s)',
    )
    parser.add_argument('--json', action='store_true', help='print one JSON document')
    _add_device(parser)


def _package(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='a checkpoint of train.py (model_best.pth.tar, say)')
    parser.add_argument('--model', required=True, help='the architecture that was trained')
    parser.add_argument('--tag', required=True, help='name of these weights, letters, digits and "_" (cifar10, say)')
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='holds {split}/<class>/<image>')
    parser.add_argument(
        '--data-name', required=True, type=_words, metavar='TEXT', help='what those images are, for the model card'
    )
    parser.add_argument('--recipe', required=True, metavar='YAML', help='the file that train.py ran with (--config)')
    parser.add_argument('--split', default='validation', help='folder of the images to score (default: %(default)s)')
    parser.add_argument('--use-ema', action='store_true', help='take the EMA weights')
    parser.add_argument(
        '--license', default='apache-2.0', type=_words, help='license of the weights (default: %(default)s)'
    )
    parser.add_argument('--output', default='.', metavar='DIR', help='where {model}.{tag}/ goes (default: here)')
    parser.add_argument(
        '--overwrite', action='store_true', help='replace an earlier folder even if its README.md was edited by hand'
    )
    parser.add_argument(
        '--batch-size', type=positive, default=128, metavar='N', help='for scoring (default: %(default)s)'
    )
    parser.add_argument(
        '--workers', type=_count, default=2, metavar='N', help='loader processes (default: %(default)s)'
    )
    _add_device(parser)


def _publish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('folder', metavar='FOLDER', help='a folder that `package` wrote')
    parser.add_argument('--repo-id', required=True, metavar='OWNER/NAME', help='the repository; created if need be')
    parser.add_argument('--private', action='store_true', help='create it as a private repository')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead of committing')
    parser.add_argument(
        '--dry-run', action='store_true', help='check, and show what would be sent, and where to; send nothing'
    )


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('output', metavar='OUTPUT', help='the file to write, *.onnx')
    parser.add_argument(
        '--model',
        default=DEFAULT_MODEL,
        metavar='NAME',
        help='a model with weights: of timm.list_pretrained(), hf-hub:OWNER/NAME or local-dir:FOLDER '
        '(default: %(default)s)',
    )
    parser.add_argument(
        '--int8',
        metavar='DIR',
        help='write *.int8.onnx as well; DIR holds train/<class>/<image> and validation/<class>/<image>',
    )


def _run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('script', type=_script, metavar='SCRIPT', help='path of the script')
    # For the help text: what follows the script never reaches argparse.
    parser.add_argument('args', metavar='ARGS', nargs='*', help='arguments of the script')


def _cifar(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('dir', metavar='DIR', help='the folder to write; must not exist, or be empty')
    parser.add_argument('--dataset', choices=['cifar10', 'cifar100'], default='cifar10', help='default: cifar10')
    parser.add_argument('--source', metavar='FOLDER', help='take the images of this folder instead of downloading them')


def _reproduce(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('train_py', metavar='TRAIN_PY', nargs='?', help="path of timm's train.py")
    parser.add_argument('--data-dir', metavar='DIR', help='the folder that `regnet-reg cifar` wrote')
    parser.add_argument('--dataset', choices=['cifar10', 'cifar100'], default='cifar10', help='default: cifar10')
    parser.add_argument(
        '--table',
        nargs='+',
        choices=['resnet20', 'seresnet20', 'stages', 'depth'],
        default=['resnet20'],
        help='default: resnet20',
    )
    parser.add_argument('--models', nargs='+', metavar='MODEL', help='only these of the tables (default: all)')
    parser.add_argument(
        '--seeds',
        nargs='+',
        type=_count,
        default=[0],
        metavar='N',
        help='default: 0; all models are trained with one before the next',
    )
    parser.add_argument('--schedule', choices=['short', 'papers'], default='short', help='default: short')
    parser.add_argument(
        '--float32', action='store_true', help='train in float32, not compiled, instead of compiled in bfloat16'
    )
    parser.add_argument('--jobs', type=positive, default=1, metavar='N', help='runs at a time (default: 1)')
    parser.add_argument('--output', default='runs', metavar='DIR', help='for logs and checkpoints (default: ./runs)')
    parser.add_argument(
        '--results', default='train_recipes/results', metavar='DIR', help='for the CSV files (default: %(default)s)'
    )
    parser.add_argument('--report', action='store_true', help='print and draw all results of --dataset instead')


def _table(parser: argparse.ArgumentParser) -> None:
    pass


def _bench(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        '--backbone', metavar='NAME', help='resnet20, resnext50_32x4d, … (default: resnet20 and resnet50)'
    )
    what.add_argument(
        '--scaling', action='store_true', help='fit how the time of regnet_reg_resnet20_convlstm grows, instead'
    )
    parser.add_argument(
        '--batch-size', type=positive, metavar='B', help='images (default: 128 in the CIFAR form, else 16)'
    )
    parser.add_argument(
        '--image-size', type=positive, metavar='S', help='pixels a side (default: 32 in the CIFAR form, else 224)'
    )
    parser.add_argument('--repeats', type=positive, default=5, metavar='N', help='default: 5')
    parser.add_argument('--threads', type=_threads, metavar='N', help="CPU threads (default: torch's)")
    _add_device(parser)
    parser.add_argument(
        '--compile',
        action='store_true',
        help='time plain and regulated networks compiled, too (each compiles for minutes)',
    )


def _similarity(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'models',
        metavar='MODEL',
        nargs='+',
        help="a ResNet of timm's with weights, plain or regulated, hf-hub:OWNER/NAME or local-dir:FOLDER",
    )
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='holds {split}/<class>/<image>')
    parser.add_argument('--split', default='validation', help='folder of the images (default: %(default)s)')
    parser.add_argument(
        '--images',
        type=positive,
        default=512,
        metavar='N',
        help='how many of them, at most, a random choice that is the same every time (default: %(default)s)',
    )
    parser.add_argument(
        '--batch-size',
        type=positive,
        default=64,
        metavar='N',
        help='images at a time, at most; 4 or more (default: %(default)s)',
    )
    _add_device(parser)
    parser.add_argument(
        '--output', default='.', metavar='DIR', help='where the table and the figures go (default: here)'
    )


# name: (help line, function that adds the arguments); what runs is `main(args)` of the module of that name in commands,
# whose docstring is the help text
COMMANDS: Dict[str, Tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    'quickstart': (
        'Classify a photograph, fine-tune on a small image set, save the result and load it back.',
        _quickstart,
    ),
    'classify': ('Print the most probable classes of images.', _classify),
    'package': ('Turn a checkpoint of train.py into a folder that timm and the Hub load.', _package),
    'publish': ('Upload a packaged folder to the Hugging Face Hub.', _publish),
    'export': ('Export a network to ONNX, and quantise it to int8.', _export),
    'run': ("Run one of timm's own scripts with these models registered.", _run),
    'cifar': ('Write CIFAR-10 or CIFAR-100 as the folders that the recipes train on.', _cifar),
    'reproduce': ("Train the papers' CIFAR tables with train.py, and report the results beside theirs.", _reproduce),
    'table': ('Print the table of models with their parameters and multiply-adds.', _table),
    'bench': ('Measure throughput and memory beside the plain networks.', _bench),
    'similarity': ('Measure how alike the outputs of neighbouring residual blocks are.', _similarity),
}
