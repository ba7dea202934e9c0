"""`table` and its counts, against torchvision's published figures and sums done by hand."""

import argparse
import re
from pathlib import Path

import pytest
import torchvision

from timm_regnet_reg.commands import table
from timm_regnet_reg.regnet_reg import BACKBONES, CIFAR_BACKBONES

README = Path(__file__).resolve().parents[1] / 'README.md'


def figures(line):
    """A row's backbone, input and [(parameters in millions, multiply-adds in billions), …]."""
    backbone, size, *columns = (cell.strip() for cell in line.strip('|').split('|'))
    return backbone, size, [tuple(map(float, column.split(' / '))) for column in columns]


@pytest.mark.parametrize('backbone', ['resnet18', 'resnet50', 'resnext50_32x4d'])
def test_plain_networks_are_as_large_as_torchvision_says(backbone):
    meta = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.meta
    name, size, [(parameters, multiply_adds), *regulated] = figures(table.row(backbone))
    assert (name, size, len(regulated)) == (backbone, '224x224', 3)
    assert parameters == pytest.approx(meta['num_params'] / 1e6, rel=0.005)
    assert multiply_adds == pytest.approx(meta['_ops'], rel=0.005)
    assert all(p > parameters and m > multiply_adds for p, m in regulated)


@pytest.mark.parametrize(
    'cell, first_step, later_steps',
    [
        ('convrnn', 9, 18),
        ('convgru', 2 * 9, 3 * 18),  # without state there is nothing to reset
        ('convlstm', 3 * 9, 4 * 18),  # nor to forget
    ],
)
def test_multiply_adds_of_a_regulator_are_those_of_its_convolutions(cell, first_step, later_steps):
    """Of three blocks a stage: the gates' 3x3 kernels of X and of H, and the fusion's 2N to N channels."""
    _, plain = table._count('cifar_resnet20')
    _, regulated = table._count(f'regnet_reg_resnet20_{cell}')
    assert regulated - plain == sum(
        N * size**2 * (first_step + 2 * later_steps) + 3 * 2 * N * N * size**2
        for N, size in ((16, 32), (32, 16), (64, 8))
    )


def test_every_backbone_has_a_row(monkeypatch, capsys):
    monkeypatch.setattr(table, 'row', lambda backbone: backbone)
    table.main(argparse.Namespace())
    assert capsys.readouterr().out.splitlines() == [*table.header(), *BACKBONES, *CIFAR_BACKBONES]


def test_readme_shows_the_table_as_printed():
    """A few rows of it; .ci/run compares the whole, which takes a minute."""
    text = README.read_text(encoding='utf-8')
    rows = dict(re.findall(r'^(?=\| (\w+) \| \d+x\d+ )(.*)$', text, re.MULTILINE))
    assert list(rows) == [*BACKBONES, *CIFAR_BACKBONES]
    assert '\n'.join(table.header()) in text
    for backbone in ('resnet18', 'resnet20', 'seresnet20'):
        assert rows[backbone] == table.row(backbone)
