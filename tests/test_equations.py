"""Cells, blocks, stages and networks against `reference.py`, and against timm's own networks."""

import copy
import math
import re

import pytest
import reference
import timm
import torch
import torch.nn as nn
from networks import CELLS, IN_TIMM, TINY, randomize
from timm.layers import get_attn
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv

from timm_regnet_reg import cells
from timm_regnet_reg.blocks import RegulatedStage

FORMATS = (torch.contiguous_format, torch.channels_last)
# largest absolute difference, relative to the largest reference value where that is above 1
OUTPUT_64, OUTPUT_32, GRADIENT_64, GRADIENT_32 = 1e-10, 1e-5, 1e-8, 1e-4


def check(actual, expected, tolerance, what):
    """Compare tensors in float64; a missing tensor counts as zero."""
    if actual is None or expected is None:
        there = actual if expected is None else expected
        assert there is None or not there.any(), f'{what}: one side is missing'
        return
    assert actual.shape == expected.shape, f'{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}'
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.isfinite().all(), f'{what}: not finite'
    error = ((actual - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
    assert error <= tolerance, f'{what}: off by {error:.2e}, more than {tolerance:.0e}'


def random_image(*shape, seed=1):
    """Float64, with values that float32 has too."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def reference_state(module):
    """The module's state dict as float64 copies, of which the parameters take gradients."""
    sd = {name: t.detach().clone() for name, t in module.state_dict().items()}
    sd = {name: t.double() if t.is_floating_point() else t for name, t in sd.items()}
    for name, _ in module.named_parameters():
        sd[name].requires_grad_()
    return sd


def gradients(outputs, inputs):
    """Gradients of a fixed random combination of the outputs."""
    outputs = [output for output in outputs if output is not None]
    total = sum((o.double() * random_image(*o.shape, seed=7 + i)).sum() for i, o in enumerate(outputs))
    return torch.autograd.grad(total, inputs, allow_unused=True)


def test_reference_gate_is_the_sum_that_the_text_describes():
    N, height, width = 3, 4, 5
    X, H = random_image(1, N, height, width), random_image(1, N, height, width, seed=2)
    cell = randomize(cells.ConvRNN(N)).double()
    params = {name: p.detach() for name, p in cell.named_parameters()}
    expected = torch.empty(1, N, height, width).double()
    for c in range(N):
        for y in range(height):
            for x in range(width):
                total = params['bias'][c].item()
                for v in range(max(y - 1, 0), min(y + 2, height)):
                    for u in range(max(x - 1, 0), min(x + 2, width)):
                        w_x, w_h = params['pointwise'][c].flatten().tolist()
                        fused = w_x * X[0, c, v, u].item() + w_h * H[0, c, v, u].item()
                        total += params['depthwise'][c, 0, v - y + 1, u - x + 1].item() * fused
                expected[0, c, y, x] = math.tanh(total)
    check(reference.cell('convrnn', params, X, H)[0], expected, 1e-14, 'H')


# Cells


@pytest.mark.parametrize('given', ['nothing', 'state'])
@pytest.mark.parametrize('size', [(4, 6), (5, 7), (1, 1)])
@pytest.mark.parametrize('N', [1, 5, 16])
@pytest.mark.parametrize('kind', CELLS)
def test_cell_is_its_equations(kind, N, size, given):
    cell = randomize(cells.CELLS[kind](N)).double()
    names = [name for name, _ in cell.named_parameters()]
    states = {'nothing': 0, 'state': 2 if kind == 'convlstm' else 1}[given]
    inputs = [random_image(2, N, *size, seed=s) for s in range(1 + states)]

    sd = reference_state(cell)
    reference_inputs = [i.clone().requires_grad_() for i in inputs]
    expected = reference.cell(kind, sd, *reference_inputs)
    expected_gradients = gradients(expected, reference_inputs + [sd[name] for name in names])

    for dtype, output, gradient in ((torch.float64, OUTPUT_64, GRADIENT_64), (torch.float32, OUTPUT_32, GRADIENT_32)):
        for memory_format in FORMATS:
            cell = cell.to(dtype)
            leaves = [i.to(dtype).contiguous(memory_format=memory_format).requires_grad_() for i in inputs]
            actual = cell.step(*leaves, *[None] * (3 - len(leaves)), cell())
            for name, a, e in zip('HC', actual, expected):
                assert (a is None) == (e is None)
                check(a, e, output, name)
            actual_gradients = gradients(actual, leaves + [cell.get_parameter(name) for name in names])
            for name, a, e in zip([*'XHC'[: len(leaves)], *names], actual_gradients, expected_gradients):
                check(a, e, gradient, f'gradient of {name}')
            for leaf, i in zip(leaves, inputs):
                assert torch.equal(leaf, i.to(dtype)), 'an input was changed in place'


@pytest.mark.parametrize('kind', CELLS)
def test_cells_begin_without_biases_and_keep_the_variance_of_their_sums(kind):
    torch.manual_seed(0)
    cell = cells.CELLS[kind](300)
    assert cell.pointwise.std().item() == pytest.approx((1 / 2) ** 0.5, rel=0.1)
    assert cell.depthwise.std().item() == pytest.approx((1 / 9) ** 0.5, rel=0.1)
    assert not cell.bias.any()


# Blocks and stages

FORMS = {
    'basic': (BasicBlock, {}),
    'bottleneck': (Bottleneck, {}),
    'resnext': (Bottleneck, {'cardinality': 2, 'base_width': 32}),
}
DEPTH, CHANNELS, PLANES = 3, 6, 4


def make_stage(form, kind, stride, se=False, dilation=1):
    """A regulated stage with random weights, float64; the first block may stride and dilate less."""
    block, kwargs = FORMS[form]
    kwargs = dict(kwargs, attn_layer=get_attn('se') if se else None, dilation=dilation)
    out_channels = PLANES * block.expansion
    downsample = downsample_conv(CHANNELS, out_channels, 1, stride)
    blocks = [block(CHANNELS, PLANES, stride, downsample, first_dilation=1, **kwargs)]
    blocks += [block(out_channels, PLANES, **kwargs) for _ in range(DEPTH - 1)]
    return randomize(RegulatedStage(nn.Sequential(*blocks), cells.CELLS[kind], nn.BatchNorm2d)).double()


def check_stage(stage, x, kind, stride, dilation=1):
    """Outputs, gradients and running statistics, in both modes, precisions and memory formats."""
    names = [name for name, _ in stage.named_parameters()]
    for training in (False, True):
        sd = reference_state(stage)
        stateless = {key: torch.zeros_like(t) if 'fusion_conv_h' in key else t.clone() for key, t in sd.items()}
        X1 = x.clone().requires_grad_()
        expected, without_state = (
            reference.stage(weights, X1, DEPTH, kind, stride, 1, dilation, training=training)
            for weights in (sd, stateless)
        )
        assert (expected - without_state).abs().max() > 1e-3, 'the state makes no difference'
        expected_gradients = gradients([expected], [X1] + [sd[name] for name in names])
        for dtype, output in ((torch.float64, OUTPUT_64), (torch.float32, OUTPUT_32)):
            for memory_format in FORMATS:
                actual_stage = copy.deepcopy(stage).train(training).to(dtype, memory_format=memory_format)
                leaf = x.to(dtype).contiguous(memory_format=memory_format).requires_grad_()
                actual = actual_stage(leaf)
                check(actual, expected, output, f'output in {dtype}')
                for name, buffer in actual_stage.named_buffers():
                    check(buffer, sd[name], output, f'{name} in {dtype}')
                if dtype == torch.float64:
                    actual_gradients = gradients([actual], [leaf] + list(actual_stage.parameters()))
                    for name, a, e in zip(['input'] + names, actual_gradients, expected_gradients):
                        check(a, e, GRADIENT_64, f'gradient of {name}')
                assert torch.equal(leaf, x.to(dtype)), 'the input was changed in place'


@pytest.mark.parametrize('se', [False, True], ids=['plain', 'se'])
@pytest.mark.parametrize('size', [(6, 8), (7, 5)], ids=['even', 'odd'])
@pytest.mark.parametrize('stride', [1, 2])
@pytest.mark.parametrize('kind', CELLS)
@pytest.mark.parametrize('form', FORMS)
def test_blocks_sharing_a_cell_are_their_equations(form, kind, stride, size, se):
    check_stage(make_stage(form, kind, stride, se), random_image(6, CHANNELS, *size), kind, stride)


@pytest.mark.parametrize('form', FORMS)
def test_dilated_blocks_pool_nothing(form):
    stage = make_stage(form, 'convlstm', 1, dilation=2)
    check_stage(stage, random_image(6, CHANNELS, 7, 6), 'convlstm', 1, dilation=2)


# Networks


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize(
    'name, size, kwargs',
    [
        ('cifar_resnet56', (32, 31), {}),
        ('cifar_seresnet20', (32, 31), {}),
        ('regnet_reg_resnet20_convrnn', (32, 31), {}),
        ('regnet_reg_resnet20_convgru', (32, 31), {}),
        ('regnet_reg_resnet20_convlstm', (32, 31), {}),
        ('regnet_reg_seresnet20_convlstm', (32, 31), {}),
        *(('regnet_reg_resnet20_convgru', (16, 17), dict(regulated_stages=s)) for s in [(), (1,), (2,), (3,), (1, 3)]),
        ('regnet_reg_resnet20_convlstm', (17, 16), dict(shortcut='pad')),
        ('regnet_reg_resnet20_convlstm', (17, 16), dict(shortcut='none')),
        ('regnet_reg_resnet18_convgru', (65, 60), {}),
        ('regnet_reg_resnet50_convlstm', (65, 60), {}),
        ('regnet_reg_resnext50_32x4d_convrnn', (33, 64), {}),
        ('regnet_reg_seresnet50_convgru', (33, 40), {}),
        ('regnet_reg_resnet18_convrnn', (33, 40), dict(shortcut='none')),
        ('regnet_reg_resnext50_32x4d_convrnn', (33, 40), dict(shortcut='none')),
        ('regnet_reg_resnet50_convlstm', (41, 48), dict(output_stride=8)),
        ('regnet_reg_resnet50_convlstm', (41, 48), dict(output_stride=16)),
        ('regnet_reg_resnet18_convgru', (41, 48), dict(output_stride=8)),
    ],
    ids=str,
)
def test_network_is_its_equations(name, size, kwargs, training):
    depths = {'20': (3, 3, 3), '56': (9, 9, 9)}.get(re.search(r'resnex?t(\d+)', name)[1])
    small = {} if depths else TINY  # in the ImageNet form
    depths = depths or TINY['layers']
    model = randomize(timm.create_model(name, num_classes=7, **small, **kwargs)).double().train(training)
    x = random_image(2, 3, *size)
    sd = copy.deepcopy(model.state_dict())
    cell = next((cell for cell in CELLS if cell in name), None)
    with torch.no_grad():
        expected = reference.network(sd, x, depths, cell, training=training, **kwargs)
        actual = model(x)
    assert expected.std() > 1e-3, 'the comparison is empty'
    tolerance = 1e-9 if training else OUTPUT_64  # batch statistics of few pixels make rounding errors large
    check(actual, expected, tolerance, name)
    for key, t in model.state_dict().items():
        check(t, sd[key], tolerance, key)


# Plain networks


@pytest.mark.parametrize('backbone', IN_TIMM)
def test_unregulated_network_is_timms_own_bit_for_bit(backbone):
    theirs = randomize(timm.create_model(backbone, device='meta').to_empty(device='cpu')).eval()
    ours = timm.create_model(f'regnet_reg_{backbone}_convlstm', regulated_stages=(), device='meta').eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(x)
        assert expected.isfinite().all() and expected.std() > 1e-3, 'the comparison is empty'
        assert torch.equal(ours(x), expected)
