"""Cells, blocks, stages and networks against `reference.py`, and against timm's own networks."""

import copy
import math

import pytest
import reference
import timm
import torch
import torch.nn as nn
from timm.layers import get_attn
from timm.models.resnet import BasicBlock, Bottleneck, downsample_conv

import timm_regnet_reg  # noqa: F401  (registers the models)
from timm_regnet_reg.blocks import RegulatedStage
from timm_regnet_reg.cells import CELLS

KINDS = ('convrnn', 'convgru', 'convlstm')
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


@torch.no_grad()
def randomize(module, seed=0):
    """Random weights and statistics that leave no layer at its neutral start, rounded to float32."""
    generator = torch.Generator().manual_seed(seed)
    for path, m in module.named_modules():
        for name, p in list(m.named_parameters(recurse=False)) + list(m.named_buffers(recurse=False)):
            if name == 'num_batches_tracked':
                continue
            if name == 'running_var' or (name == 'weight' and p.ndim == 1):
                p.copy_(torch.rand(p.shape, generator=generator) + 0.5)
            else:
                inputs = p[0].numel() * (2 if 'fusion_conv' in path else 1)  # two convolutions are summed
                scale = 0.5 if p.ndim == 1 else 1 / math.sqrt(inputs)
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return module


def enliven(model):
    """The model in evaluation mode, none of its layers at its neutral start any more."""
    model.load_state_dict(randomize(copy.deepcopy(model)).state_dict())  # not the fixed kernel of a blur, say
    return model.eval()


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
    total = sum((o.double() * random_image(*o.shape, seed=7 + i)).sum() for i, o in enumerate(outputs))
    return torch.autograd.grad(total, inputs, allow_unused=True)


def test_reference_gate_is_the_sum_that_the_text_describes():
    N, height, width = 3, 4, 5
    X, H = random_image(1, N, height, width), random_image(1, N, height, width, seed=2)
    cell = randomize(CELLS['convrnn'](N)).double()
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
@pytest.mark.parametrize('kind', KINDS)
def test_cell_is_its_equations(kind, N, size, given):
    cell = randomize(CELLS[kind](N)).double()
    names = [name for name, _ in cell.named_parameters()]
    states = {'nothing': 0, 'state': 2 if kind == 'convlstm' else 1}[given]
    inputs = [random_image(2, N, *size, seed=s) for s in range(1 + states)]

    sd = reference_state(cell)
    reference_inputs = [i.clone().requires_grad_() for i in inputs]
    expected = reference.cell(kind, sd, *reference_inputs)
    expected_gradients = gradients(
        [o for o in expected if o is not None], reference_inputs + [sd[name] for name in names]
    )

    for dtype, output, gradient in (
        (torch.float64, OUTPUT_64, GRADIENT_64),
        (torch.float32, OUTPUT_32, GRADIENT_32),
    ):
        for memory_format in FORMATS:
            cell = cell.to(dtype)
            leaves = [i.to(dtype).contiguous(memory_format=memory_format).requires_grad_() for i in inputs]
            actual = cell.step(*leaves, *[None] * (3 - len(leaves)), cell())
            with torch.no_grad():
                quiet = cell.step(*leaves, *[None] * (3 - len(leaves)), cell())
            for name, a, q, e in zip('HC', actual, quiet, expected):
                assert (a is None) == (e is None)
                check(a, e, output, name)
                check(q, e, output, f'{name} without gradients')
            actual_gradients = gradients(
                [o for o in actual if o is not None], leaves + [cell.get_parameter(name) for name in names]
            )
            for name, a, e in zip(['X', 'H', 'C'][: len(leaves)] + names, actual_gradients, expected_gradients):
                check(a, e, gradient, f'gradient of {name}')
            for leaf, i in zip(leaves, inputs):
                assert torch.equal(leaf, i.to(dtype)), 'an input was changed in place'


@pytest.mark.parametrize('kind', KINDS)
def test_zero_state_and_no_state_are_the_same(kind):
    cell = randomize(CELLS[kind](4)).double()
    X = random_image(2, 4, 5, 6)
    zero = torch.zeros_like(X)
    H, C = cell.step(X, None, None, cell())
    H_zero, C_zero = cell.step(X, zero, zero if kind == 'convlstm' else None, cell())
    check(H, H_zero, OUTPUT_64, 'H')
    check(C, C_zero, OUTPUT_64, 'C')


# Blocks and stages

FORMS = {
    'basic': (BasicBlock, {}),
    'bottleneck': (Bottleneck, {}),
    'resnext': (Bottleneck, {'cardinality': 2, 'base_width': 32}),
}


def make_stage(form, kind, stride, se=False, depth=3, in_channels=6, planes=4, dilation=1):
    """A regulated stage of `depth` blocks with random weights, float64; the first block may stride and dilate less."""
    block, kwargs = FORMS[form]
    kwargs = dict(kwargs, attn_layer=get_attn('se') if se else None, dilation=dilation)
    out_channels = planes * block.expansion
    downsample = downsample_conv(in_channels, out_channels, 1, stride)
    blocks = [block(in_channels, planes, stride, downsample, first_dilation=1, **kwargs)]
    blocks += [block(out_channels, planes, **kwargs) for _ in range(depth - 1)]
    stage = RegulatedStage(nn.Sequential(*blocks), CELLS[kind], nn.BatchNorm2d)
    return randomize(stage).double()


def check_stage(stage, x, kind, depth, stride, dilation=1):
    """Outputs, gradients and running statistics, in both modes, precisions and memory formats."""
    names = [name for name, _ in stage.named_parameters()]
    for training in (False, True):
        sd = reference_state(stage)
        X1 = x.clone().requires_grad_()
        expected = reference.stage(sd, X1, depth, kind, stride, first_dilation=1, dilation=dilation, training=training)
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
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('form', FORMS)
def test_blocks_sharing_a_cell_are_their_equations(form, kind, stride, size, se):
    stage = make_stage(form, kind, stride, se)
    check_stage(stage, random_image(6, 6, *size), kind, 3, stride)


@pytest.mark.parametrize('form', FORMS)
def test_dilated_blocks_pool_nothing(form):
    stage = make_stage(form, 'convlstm', 1, dilation=2)
    check_stage(stage, random_image(6, 6, 7, 6), 'convlstm', 3, 1, dilation=2)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('form', FORMS)
def test_each_state_travels(form, kind):
    # the reference without the state, or with it passed through the wrong norm, is far from the stage
    stage = make_stage(form, kind, 1).eval()
    x = random_image(2, 6, 6, 6)
    sd = reference_state(stage)
    right = reference.stage(sd, x, 3, kind)
    forgetful = x
    for t in range(3):
        block = reference.bottleneck if form != 'basic' else reference.basic_block
        forgetful, _, _ = block(
            reference.within(sd, str(t)), forgetful, kind, reference.within(sd, 'regulator'), None, None
        )
    assert (right - forgetful).abs().max() > 1e-3
    check(stage(x), right, OUTPUT_64, 'output')


# Networks

DEPTHS = {'20': (3, 3, 3), '18': (2, 2, 2, 2), '50': (3, 4, 6, 3)}


def check_network(name, kind, depths, form, size, training=False, **kwargs):
    model = randomize(timm.create_model(name, num_classes=7, **kwargs)).double().train(training)
    x = random_image(2, 3, *size)
    sd = {key: t.clone() for key, t in model.state_dict().items()}
    with torch.no_grad():
        expected = reference.network(sd, x, depths, kind, form=form, training=training, **kwargs)
        actual = model(x)
    assert expected.std() > 1e-3, 'the comparison is empty'
    check(actual, expected, OUTPUT_64, name)
    for key, t in model.state_dict().items():
        check(t, sd[key], OUTPUT_64, key)


@pytest.mark.parametrize('training', [False, True], ids=['eval', 'train'])
@pytest.mark.parametrize(
    'name, kind',
    [(f'regnet_reg_resnet20_{kind}', kind) for kind in KINDS]
    + [
        ('regnet_reg_seresnet20_convlstm', 'convlstm'),
    ],
)
def test_cifar_network_is_its_equations(name, kind, training):
    check_network(name, kind, DEPTHS['20'], 'cifar', (32, 31), training)


@pytest.mark.parametrize(
    'name, kind, depths, size',
    [
        ('regnet_reg_resnet18_convgru', 'convgru', DEPTHS['18'], (65, 60)),
        ('regnet_reg_resnet50_convlstm', 'convlstm', DEPTHS['50'], (65, 60)),
        ('regnet_reg_resnext50_32x4d_convrnn', 'convrnn', DEPTHS['50'], (33, 64)),
        ('regnet_reg_seresnet50_convgru', 'convgru', DEPTHS['50'], (33, 40)),
    ],
)
def test_imagenet_network_is_its_equations(name, kind, depths, size):
    check_network(name, kind, depths, 'imagenet', size)


@pytest.mark.parametrize('stages', [(), (1,), (2,), (3,), (1, 3)])
def test_regulated_stages_choose_the_stages(stages):
    check_network('regnet_reg_resnet20_convgru', 'convgru', DEPTHS['20'], 'cifar', (16, 17), regulated_stages=stages)


@pytest.mark.parametrize('shortcut', ['pad', 'none'])
def test_other_shortcuts_of_the_cifar_form(shortcut):
    check_network('regnet_reg_resnet20_convlstm', 'convlstm', DEPTHS['20'], 'cifar', (17, 16), shortcut=shortcut)


@pytest.mark.parametrize(
    'name, depths',
    [
        ('regnet_reg_resnet18_convrnn', DEPTHS['18']),
        ('regnet_reg_resnext50_32x4d_convrnn', DEPTHS['50']),
    ],
)
def test_network_without_shortcuts(name, depths):
    check_network(name, 'convrnn', depths, 'imagenet', (33, 40), shortcut='none')


@pytest.mark.parametrize(
    'name, kind, depths, output_stride',
    [
        ('regnet_reg_resnet50_convlstm', 'convlstm', DEPTHS['50'], 8),
        ('regnet_reg_resnet50_convlstm', 'convlstm', DEPTHS['50'], 16),
        ('regnet_reg_resnet18_convgru', 'convgru', DEPTHS['18'], 8),
    ],
)
def test_smaller_output_stride_dilates(name, kind, depths, output_stride):
    check_network(name, kind, depths, 'imagenet', (41, 48), output_stride=output_stride)


# ResNeXt's three forms


@pytest.mark.parametrize('cardinality, d', [(1, 64), (2, 40), (4, 24), (8, 14), (32, 4)])
def test_three_forms_of_the_resnext_block_are_one_function(cardinality, d):
    block = randomize(Bottleneck(256, 64, cardinality=cardinality, base_width=d)).double().eval()
    x = random_image(2, 256, 5, 4)
    sd = block.state_dict()
    forms = [
        torch.relu(x + form(sd, x, cardinality))
        for form in (reference.resnext_branches, reference.resnext_split, reference.resnext_grouped)
    ]
    with torch.no_grad():
        expected = block(x)
    for form in forms:
        check(form, expected, OUTPUT_64, f'{cardinality}x{d}d')


# Plain networks

IN_TIMM = (
    'resnet18',
    'resnet34',
    'resnet50',
    'resnet101',
    'resnet152',
    'resnet50d',
    'resnet101d',
    'wide_resnet50_2',
    'seresnet18',
    'seresnet34',
    'seresnet50',
    'seresnet101',
    'seresnet152',
    'resnext50_32x4d',
    'resnext101_32x4d',
    'resnext101_64x4d',
    'seresnext50_32x4d',
    'seresnext101_32x4d',
)


def fill(model):
    """Give a model of the meta device cheap random weights that are not neutral anywhere."""
    model = model.to_empty(device='cpu')
    with torch.no_grad():
        for name, t in model.state_dict().items():
            if t.ndim > 1:
                t.uniform_(-1, 1).mul_(math.sqrt(3 / t[0].numel()))
            elif name.endswith('num_batches_tracked'):
                t.zero_()
            elif name.endswith('bias') or name.endswith('mean'):
                t.uniform_(-0.5, 0.5)
            else:
                t.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize('backbone', IN_TIMM)
def test_unregulated_network_is_timms_own_bit_for_bit(backbone):
    torch.manual_seed(0)
    theirs = fill(timm.create_model(backbone, device='meta')).eval()
    ours = timm.create_model(f'regnet_reg_{backbone}_convlstm', regulated_stages=(), device='meta').eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(x)
        assert expected.isfinite().all() and expected.std() > 1e-3, 'the comparison is empty'
        assert torch.equal(ours(x), expected)


@pytest.mark.parametrize('backbone', ['resnet18', 'seresnet50', 'resnext50_32x4d'])
def test_unregulated_network_trains_as_timms_own(backbone):
    torch.manual_seed(0)
    theirs = timm.create_model(backbone, num_classes=5)
    ours = timm.create_model(f'regnet_reg_{backbone}_convgru', num_classes=5, regulated_stages=())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 3, 64, 64)
    for model in (theirs, ours):
        model.train()(x).square().sum().backward()
    for (name, expected), actual in zip(theirs.named_parameters(), ours.parameters()):
        assert torch.equal(actual.grad, expected.grad), name
    for (name, expected), actual in zip(theirs.named_buffers(), ours.buffers()):
        assert torch.equal(actual, expected), name


@pytest.mark.parametrize('backbone', ['resnet20', 'seresnet20', 'resnet56'])
def test_unregulated_cifar_network_is_the_plain_one(backbone):
    torch.manual_seed(0)
    plain = randomize(timm.create_model(f'cifar_{backbone}')).eval()
    ours = timm.create_model(f'regnet_reg_{backbone}_convlstm', regulated_stages=()).eval()
    ours.load_state_dict(plain.state_dict(), strict=True)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(x), plain(x))
    sd = {name: t.double() for name, t in plain.state_dict().items()}
    n = (int(backbone[-2:]) - 2) // 6
    with torch.no_grad():
        check(
            plain.double()(x.double()), reference.network(sd, x.double(), (n, n, n), form='cifar'), OUTPUT_64, 'logits'
        )
