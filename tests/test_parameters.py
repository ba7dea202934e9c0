"""Numbers of parameters against the papers' tables and SPEC.md's formulas."""

import pytest
import timm

import timm_regnet_reg  # noqa: F401  (registers the models)

GATES = {'convrnn': 1, 'convgru': 3, 'convlstm': 4}


def sizes(name, **kwargs):
    """Number of elements of each parameter of a model, by name; nothing is allocated."""
    model = timm.create_model(name, device='meta', **kwargs)
    return {key: p.numel() for key, p in model.named_parameters()}


def count(name, **kwargs):
    """Parameters of a model, in millions."""
    return sum(sizes(name, **kwargs).values()) / 1e6


@pytest.mark.parametrize('num_classes, expected', [(10, 0.273), (100, 0.278)])
def test_resnet20_has_the_papers_number_of_parameters(num_classes, expected):
    # 0.272474M and 0.278324M: the first is 26 parameters short of being rounded to 0.273M
    assert count('cifar_resnet20', num_classes=num_classes) == pytest.approx(expected, abs=0.0006)


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
    plain = count(f'cifar_resnet{depth}', num_classes=num_classes)
    regulated = count(f'regnet_reg_resnet{depth}_{cell}', num_classes=num_classes)
    # At the paper's precision of 0.01M. It matters for the last row alone, where the equations give +0.106M: from
    # ConvGRU to ConvLSTM they add one gate of 12 weights a channel in each stage, 0.0013M at any depth.
    assert round(regulated - plain, 2) == pytest.approx(increase, abs=0.0101)


@pytest.mark.parametrize('cell', GATES)
@pytest.mark.parametrize(
    'plain, backbone, depths, widths',
    [
        ('cifar_resnet20', 'regnet_reg_resnet20', (3, 3, 3), (16, 32, 64)),
        ('cifar_seresnet56', 'regnet_reg_seresnet56', (9, 9, 9), (16, 32, 64)),
        ('resnet34', 'regnet_reg_resnet34', (3, 4, 6, 3), (64, 128, 256, 512)),
        ('resnet50', 'regnet_reg_resnet50', (3, 4, 6, 3), (64, 128, 256, 512)),
        ('wide_resnet50_2', 'regnet_reg_wide_resnet50_2', (3, 4, 6, 3), (128, 256, 512, 1024)),
        ('seresnext101_32x4d', 'regnet_reg_seresnext101_32x4d', (3, 4, 23, 3), (128, 256, 512, 1024)),
    ],
)
def test_each_stage_grows_by_the_formula(plain, backbone, depths, widths, cell):
    before, after = sizes(plain), sizes(f'{backbone}_{cell}')
    assert set(before) <= set(after)
    grown = {}
    for key, size in after.items():
        stage = key.split('.')[0]
        grown[stage] = grown.get(stage, 0) + size - before.get(key, 0)
    expected = {}
    for i, (depth, N) in enumerate(zip(depths, widths), start=1):
        one_cell = GATES[cell] * (2 * N + 9 * N + N)
        each_block = 2 * N + 2 * N * N + 2 * N  # BN of the state, the fusion, BN of the fusion
        expected[f'layer{i}'] = one_cell + depth * each_block
    assert {stage: growth for stage, growth in grown.items() if growth} == expected


def test_option_a_has_no_parameters_in_its_shortcuts():
    before, after = sizes('cifar_resnet20'), sizes('cifar_resnet20', shortcut='pad')
    gone = {key: before[key] for key in before if key not in after}
    assert set(gone) == {key for key in before if 'downsample' in key}
    assert sum(gone.values()) == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


@pytest.mark.parametrize('C, d', [(1, 64), (2, 40), (4, 24), (8, 14), (32, 4)])
def test_resnext_block_and_network_cost_what_the_paper_says(C, d):
    backbone = 'resnet50' if C == 1 else f'resnext50_{C}x{d}d'
    model = sizes(f'regnet_reg_{backbone}_convlstm', regulated_stages=())
    weights = sum(model[f'layer1.1.conv{i}.weight'] for i in (1, 2, 3))
    assert weights == C * (256 * d + 9 * d * d + d * 256)
    assert weights == pytest.approx(70_000, rel=0.03)
    assert sum(model.values()) == pytest.approx(25.3e6, rel=0.015)  # all five cost the same
