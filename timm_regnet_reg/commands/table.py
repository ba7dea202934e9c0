"""Print the table of models with their parameters and multiply-adds.

    regnet-reg table

A Markdown table, the one in README: a row for every backbone, plain and with each cell. Nothing is downloaded.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor

import timm
from tqdm import tqdm

from ..cells import CELLS
from ..papers import output
from ..papers.flops import count
from ..regnet_reg import BACKBONES, CIFAR_BACKBONES


def row(backbone: str) -> str:
    """The table's line of 'resnet50', say: its input, then parameters in millions / multiply-adds in billions."""
    names = [f'regnet_reg_{backbone}_{cell}' for cell in CELLS]
    counts = [count(names[0], regulated_stages=()), *map(count, names)]
    three_digits = [[f'{x:#.3g}'.rstrip('.') for x in (parameters / 1e6, macs / 1e9)] for parameters, macs in counts]
    size = 'x'.join(map(str, timm.get_pretrained_cfg(names[0]).input_size[1:]))
    return output.row([backbone, size, *map(' / '.join, three_digits)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def main(args: argparse.Namespace) -> None:
    columns = ['backbone', 'input', 'plain', *(cell.__name__ for cell in CELLS.values())]
    backbones = [*BACKBONES, *CIFAR_BACKBONES]
    with ProcessPoolExecutor() as pool:
        rows = [*tqdm(pool.map(row, backbones), total=len(backbones), unit='backbone', leave=False)]
    print(*output.header(columns, texts=2), *rows, sep='\n')
