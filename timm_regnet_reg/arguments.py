"""Types of arguments, and arguments, that several commands have."""

import argparse
from functools import partial

DEFAULT_MODEL = 'regnet_reg_resnet20_convlstm'


def count(text: str, least: int = 0) -> int:
    """An argument type: a whole number of up to nine digits, as none here is larger for good reason."""
    if not text.isdecimal() or len(text) > 9 or int(text) < least:
        raise argparse.ArgumentTypeError(f'{text!r} was given, expected a whole number from {least} to 999999999')
    return int(text)


positive = partial(count, least=1)


def words(text: str) -> str:
    """An argument type: text in one line, and not nothing."""
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f'{text!r} was given, expected a word or more in one line')
    return text


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--data-dir', required=True, metavar='DIR', help='holds {split}/<class>/<image>')
    parser.add_argument('--split', default='validation', help='folder of the images (default: %(default)s)')


def add_model(parser: argparse.ArgumentParser) -> None:
    told = "a model of timm's with weights, hf-hub:OWNER/NAME or local-dir:FOLDER (default: %(default)s)"
    parser.add_argument('--model', default=DEFAULT_MODEL, help=told)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--device', default='cpu', help='cpu, cuda, cuda:1 and the like (default: %(default)s)')
