"""`table` and its counts, against torchvision's published figures, the paper's, and sums done by hand."""

import argparse
from pathlib import Path

import pytest
import torchvision

from timm_regnet_reg.commands import table
from timm_regnet_reg.papers.flops import count

README = Path(__file__).resolve().parents[1] / 'README.md'


@pytest.mark.parametrize('backbone', ['resnet18', 'resnet50', 'resnext50_32x4d'])
def test_plain_networks_are_as_large_as_torchvision_says(backbone):
    meta = torchvision.models.get_model_weights(backbone).IMAGENET1K_V1.meta
    parameters, multiply_adds = count(f'regnet_reg_{backbone}_convgru', regulated_stages=())
    assert parameters == meta['num_params'] and multiply_adds == pytest.approx(1e9 * meta['_ops'], rel=0.005)


@pytest.mark.parametrize(
    'cell, gates, first_step, later_steps',
    [
        ('convrnn', 1, 9, 18),
        ('convgru', 3, 2 * 9, 3 * 18),  # without state there is nothing to reset
        ('convlstm', 4, 3 * 9, 4 * 18),  # nor to forget
    ],
)
def test_regulators_cost_what_they_are_made_of(cell, gates, first_step, later_steps):
    """Of three blocks a stage: a cell of separable gates, fusions of 2N to N channels, and batch norms of both."""
    plain, regulated = count('cifar_resnet20'), count(f'regnet_reg_resnet20_{cell}')
    stages = ((16, 32), (32, 16), (64, 8))
    parameters = sum(gates * (2 + 9 + 1) * N + 3 * (2 * N * N + 2 * N + 2 * N) for N, _ in stages)
    steps = first_step + 2 * later_steps
    multiply_adds = sum(N * size**2 * steps + 3 * 2 * N * N * size**2 for N, size in stages)
    assert regulated == (plain[0] + parameters, plain[1] + multiply_adds)


@pytest.mark.parametrize(
    'depth, cell, num_classes, increase',
    [
        (20, 'convgru', 10, 0.04),
        (20, 'convlstm', 10, 0.04),
        (32, 'convgru', 10, 0.06),
        (32, 'convgru', 100, 0.07),
        (32, 'convlstm', 10, 0.07),
        (56, 'convgru', 10, 0.11),
        (56, 'convlstm', 10, 0.12),
    ],
)
def test_regulators_add_what_the_paper_reports(depth, cell, num_classes, increase):
    plain, _ = count(f'cifar_resnet{depth}', num_classes=num_classes)
    regulated, _ = count(f'regnet_reg_resnet{depth}_{cell}', num_classes=num_classes)
    # at the paper's precision of 0.01M, which matters for the last row alone: by the equations it is +0.106M
    assert round((regulated - plain) / 1e6, 2) == pytest.approx(increase, abs=0.0101)


@pytest.mark.parametrize('num_classes, parameters', [(10, 0.273), (100, 0.278)])
def test_resnet20_has_the_papers_number_of_parameters(num_classes, parameters):
    # 0.272474M and 0.278324M: the first is 26 parameters short of being rounded to 0.273M
    assert count('cifar_resnet20', num_classes=num_classes)[0] / 1e6 == pytest.approx(parameters, abs=0.0006)


@pytest.mark.parametrize('backbone', ['resnet50', *(f'resnext50_{s}d' for s in ('2x40', '4x24', '8x14', '32x4'))])
def test_resnexts_cost_the_same_as_the_paper_says(backbone):
    assert count(f'regnet_reg_{backbone}_convlstm', regulated_stages=())[0] == pytest.approx(25.3e6, rel=0.015)


def test_readme_shows_the_table_as_printed(monkeypatch, capsys):
    """With the figures of three rows; .ci/run compares all of them, which takes a while."""
    shown = README.read_text(encoding='utf-8').partition('<!-- regnet-reg table -->\n')[2].partition('<!-- end')[0]
    rows = {line.split(' | ')[0].removeprefix('| '): line for line in shown.splitlines()[2:]}
    for backbone in ('resnet18', 'resnet20', 'seresnet20'):
        assert table.row(backbone) == rows[backbone]
    monkeypatch.setattr(table, 'row', rows.get)
    table.main(argparse.Namespace())
    assert capsys.readouterr().out == shown
