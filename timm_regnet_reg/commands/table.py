"""Print the table of models with their parameters and multiply-adds.

    regnet-reg table

A Markdown table, the one in README: a row for every backbone, plain and with each cell. Nothing is downloaded, and
no weights are made.
"""

import argparse
from typing import List

import timm
from tqdm import tqdm

from ..cells import CELLS
from ..papers import output
from ..papers.flops import count
from ..regnet_reg import BACKBONES, CIFAR_BACKBONES


def header() -> List[str]:
    """The table's first two lines."""
    return output.header(['backbone', 'input', 'plain', *(cell.__name__ for cell in CELLS.values())], texts=2)


def _three_digits(x: float) -> str:
    return f'{x:#.3g}'.rstrip('.')


def row(backbone: str) -> str:
    """The table's line of 'resnet50', say: its input, then parameters in millions / multiply-adds in billions."""
    names = [f'regnet_reg_{backbone}_{cell}' for cell in CELLS]
    counts = [count(names[0], regulated_stages=()), *map(count, names)]
    size = 'x'.join(map(str, timm.get_pretrained_cfg(names[0]).input_size[1:]))
    columns = [f'{_three_digits(parameters / 1e6)} / {_three_digits(macs / 1e9)}' for parameters, macs in counts]
    return output.row([backbone, size, *columns])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> None:
    rows = [row(backbone) for backbone in tqdm([*BACKBONES, *CIFAR_BACKBONES], unit='backbone', leave=False)]
    print(*header(), *rows, sep='\n')
