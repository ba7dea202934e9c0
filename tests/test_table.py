"""`table` and its counts, against torchvision's published figures and sums done by hand."""

import argparse
from pathlib import Path

import pytest
import torchvision

from timm_regnet_reg.commands import table
from timm_regnet_reg.papers.flops import count

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
    _, plain = count('cifar_resnet20')
    _, regulated = count(f'regnet_reg_resnet20_{cell}')
    assert regulated - plain == sum(
        N * size**2 * (first_step + 2 * later_steps) + 3 * 2 * N * N * size**2
        for N, size in ((16, 32), (32, 16), (64, 8))
    )


def test_readme_shows_the_table_as_printed(monkeypatch, capsys):
    """With the figures of three rows; .ci/run compares all of them, which takes a while."""
    shown = README.read_text(encoding='utf-8').partition('<!-- regnet-reg table -->\n')[2].partition('<!-- end')[0]
    rows = {line.split(' | ')[0].removeprefix('| '): line for line in shown.splitlines()[2:]}
    for backbone in ('resnet18', 'resnet20', 'seresnet20'):
        assert table.row(backbone) == rows[backbone]
    monkeypatch.setattr(table, 'row', rows.get)
    table.main(argparse.Namespace())
    assert capsys.readouterr().out == shown
