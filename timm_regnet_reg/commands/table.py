"""Print the table of models with their parameters and multiply-adds.

    regnet-reg table

A Markdown table, the one in README: a row for every backbone, plain and with each cell. Nothing is downloaded, and
no weights are made.
"""

import argparse
from typing import List, Tuple

import timm
import torch
from tqdm import tqdm

from ..cells import CELLS
from ..papers import tables
from ..papers.flops import count
from ..regnet_reg import BACKBONES, CIFAR_BACKBONES

__all__ = ['header', 'row']


def _count(name: str, **kwargs) -> Tuple[int, int]:
    """`count` of a model and one image of its default size, both without data."""
    model = timm.create_model(name, device='meta', **kwargs).eval()
    return count(model, torch.empty(1, *model.default_cfg['input_size'], device='meta'))


def _three_digits(x: float) -> str:
    return f'{x:#.3g}'.rstrip('.')


def header() -> List[str]:
    """The table's first two lines."""
    return tables.header(['backbone', 'input', 'plain', *(cell.__name__ for cell in CELLS.values())], texts=2)


def row(backbone: str) -> str:
    """The table's line of 'resnet50', say: its input, then parameters in millions / multiply-adds in billions."""
    names = [f'regnet_reg_{backbone}_{cell}' for cell in CELLS]
    counts = [_count(names[0], regulated_stages=()), *map(_count, names)]
    size = 'x'.join(map(str, timm.get_pretrained_cfg(names[0]).input_size[1:]))
    columns = [f'{_three_digits(parameters / 1e6)} / {_three_digits(macs / 1e9)}' for parameters, macs in counts]
    return tables.row([backbone, size, *columns])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> None:
    rows = [row(backbone) for backbone in tqdm([*BACKBONES, *CIFAR_BACKBONES], unit='backbone', leave=False)]
    print(*header(), *rows, sep='\n')
