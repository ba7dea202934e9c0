"""`regulate`: a ResNet of timm's becomes a regulated one with the same weights and outputs."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
from networks import CELLS, TINY, assert_close, enliven, images
from timm.models import ResNet
from timm.models.resnet import BasicBlock

from timm_regnet_reg import regulate
from timm_regnet_reg.blocks import RegulatedStage
from timm_regnet_reg.networks import RegulatedResNet

BACKBONES = {
    'one block a stage, of both kinds': ('test_resnet', {}),
    'basic': ('resnet34', TINY),
    'd': ('resnet50d', TINY),
    't': ('resnet50t', TINY),
    'se': ('seresnet50', TINY),
    'basic se': ('seresnet34', TINY),
    'eca': ('ecaresnet50t', TINY),
    'anti-aliased by blurring': ('resnetblur50', TINY),
    'basic, anti-aliased': ('resnetblur18', TINY),
    'rs': ('resnetrs50', TINY),
    'resnext, anti-aliased, se': ('seresnextaa101d_32x8d', TINY),
    'senet': ('senet154', dict(layers=(2, 1, 1, 2), channels=(32, 64, 96, 128), cardinality=8)),
    'reduced': ('resnet50', dict(TINY, block_reduce_first=2)),
    'basic, reduced': ('resnet18', dict(TINY, block_reduce_first=2)),
    'dilated to 8': ('resnet50', dict(TINY, output_stride=8)),
    'no head': ('resnet50', dict(TINY, num_classes=0, global_pool='')),
    'cifar': ('cifar_resnet20', {}),
    'cifar se': ('cifar_seresnet20', {}),
    'cifar pad': ('cifar_resnet20', dict(shortcut='pad')),
    'cifar, no shortcut': ('cifar_resnet20', dict(shortcut='none')),
    'ours, unregulated': ('regnet_reg_resnet50_convgru', dict(TINY, regulated_stages=())),
}


def backbone(kind):
    """With random weights and statistics that leave no layer at its neutral start."""
    name, kwargs = BACKBONES[kind]
    return enliven(timm.create_model(name, **kwargs))


@pytest.mark.parametrize(
    'kind, cell',
    [
        (kind, cell)
        for i, kind in enumerate(BACKBONES)
        for j, cell in enumerate(CELLS)
        if i % 3 == j or kind in ('one block a stage, of both kinds', 'basic', 'd', 'cifar')
    ],
)
def test_outputs_are_unchanged_and_so_is_the_given_network(kind, cell):
    model = backbone(kind)
    before, x = copy.deepcopy(model), images(model)
    regulated = regulate(model, cell)
    assert isinstance(regulated, RegulatedResNet) and regulated.default_cfg is regulated.pretrained_cfg
    assert all(isinstance(stage, RegulatedStage) for stage in regulated.stages())
    weights = regulated.state_dict()
    assert all(torch.equal(weights[key], t) for key, t in model.state_dict().items())
    with torch.no_grad():
        assert_close(regulated(x), model(x), 1e-4)
        assert_close(regulate(model.double(), cell)(x.double()), model(x.double()), 1e-10)
        model.float()
        for p in regulated.parameters():
            p.add_(1)  # nothing is shared
    assert type(model) is type(before) and str(model) == str(before)
    assert all(torch.equal(t, u) for t, u in zip(model.state_dict().values(), before.state_dict().values()))


@pytest.mark.parametrize(
    'name, plain, kwargs',
    [
        ('regnet_reg_resnet20_convlstm', 'cifar_resnet20', {}),
        ('regnet_reg_seresnet20_convrnn', 'cifar_seresnet20', {}),
        ('regnet_reg_resnet50_convgru', 'resnet50', TINY),
        ('regnet_reg_resnet18_convlstm', 'resnet18', TINY),
    ],
)
def test_an_untrained_network_starts_as_its_backbone(name, plain, kwargs):
    torch.manual_seed(0)
    kwargs = dict(kwargs, zero_init_last=False)  # or every residual branch gives zero
    model, plain = timm.create_model(name, **kwargs), timm.create_model(plain, **kwargs)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key in plain.state_dict()})
    x = images(plain, 32)
    with torch.no_grad():
        assert_close(model.eval()(x), plain.eval()(x), 1e-4)
        expected = plain.train()(x)
        difference = (model.train()(x) - expected).abs().max()  # batch statistics are not quite what is expected
        assert difference < 0.15 * expected.abs().max()
        for block in (block for stage in model.stages() for block in stage):
            block.fusion_conv_x.weight.normal_()
        assert (model(x) - expected).abs().max() > 3 * difference, 'the fusion makes no difference'


def no_statistics(N, **kwargs):
    return nn.BatchNorm2d(N, track_running_stats=False, **kwargs)


@pytest.mark.parametrize(
    'kwargs', [dict(act_layer='silu'), dict(norm_layer='groupnorm1'), dict(norm_layer=no_statistics)]
)
def test_an_untrained_network_of_other_layers_starts_with_the_kernel_alone(kwargs):
    block = timm.create_model('regnet_reg_resnet18_convgru', **TINY, **kwargs).layer1[0]
    W_x, W_h = block.fusion_conv_x.weight[:, :, 0, 0], block.fusion_conv_h.weight
    assert torch.equal(W_x, torch.eye(16))
    assert 0 < W_h.abs().max() < 1e-5, 'H counts from the start, or no gradient would reach the cell'
    assert (block.fusion_bn.weight == 1).all() and not block.fusion_bn.bias.any()


@pytest.mark.parametrize('cell', CELLS)
@pytest.mark.parametrize(
    'kind',
    ['one block a stage, of both kinds', 'basic', 'd', 'senet', 'anti-aliased by blurring', 'cifar', 'dilated to 8'],
)
def test_gradients_reach_every_regulator_from_the_first_step(kind, cell):
    regulated = regulate(backbone(kind), cell).train()
    regulated(images(regulated, 8)).square().mean().backward()
    depths = {f'layer{i}': len(stage) for i, stage in enumerate(regulated.stages(), start=1)}
    for name, p in regulated.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if '.regulator.' in name:
            gates = list(p.grad.chunk({'convrnn': 1, 'convgru': 3, 'convlstm': 4}[cell]))
            if depths[name.split('.')[0]] == 1 and cell != 'convrnn':
                del gates[1]  # r and f only ever weigh a zero state in a stage of a single block
            assert all(gate.any() for gate in gates), name
        elif 'regulator' in name or 'fusion' in name:
            assert p.grad.any(), name


def test_fusion_starts_with_the_statistics_of_what_it_normalizes():
    model = backbone('d')
    with torch.no_grad():
        for p in (model.layer1[0].bn2.weight, model.layer1[0].bn2.bias):
            p[0] = 0  # a channel that says nothing, as training may leave it
        model.layer1[0].bn2.weight[1:9], model.layer1[0].bn2.bias[1:9] = 1, torch.linspace(-8.38, -8.36, 8)  # nor these
    regulated = regulate(model)
    noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, bn in [('layer1.0', model.layer1[0].bn2), ('layer4.1', model.layer4[1].bn2)]:
        X = torch.relu(noise * bn.weight.double() + bn.bias.double())  # if what the batch norm gives is normal
        fusion_bn = regulated.get_submodule(name).fusion_bn
        torch.testing.assert_close(fusion_bn.running_mean.double(), X.mean(0), rtol=0.02, atol=0.01)
        torch.testing.assert_close(fusion_bn.running_var.double(), X.var(0), rtol=0.02, atol=0.01)
        assert fusion_bn.running_mean.std() > 0.05, 'the comparison is empty'
        assert (fusion_bn.running_var >= 0).all()


# What is kept


def test_mode_and_frozen_parameters_are_kept():
    model = backbone('d').train()
    model.layer1.eval()
    model.conv1.requires_grad_(False)
    model.layer2[0].conv1.weight.requires_grad_(False)
    regulated = regulate(model)
    modes = {name: module.training for name, module in model.named_modules() if name != 'layer1'}
    for name, module in regulated.named_modules():
        assert module.training == modes.get(name, True), name
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, p in regulated.named_parameters():
        assert p.requires_grad == trainable.get(name, True), name
    assert not any(m.training for m in regulate(model.eval()).modules())


@pytest.mark.parametrize('kind', ['cifar', 'se'])
def test_type_and_device_are_kept(kind):
    for dtype in (torch.float64, torch.bfloat16):
        regulated = regulate(backbone(kind).to(dtype))
        assert {t.dtype for t in regulated.state_dict().values() if t.is_floating_point()} == {dtype}
        assert regulated(images(regulated).to(dtype)).dtype == dtype
    regulated = regulate(timm.create_model(BACKBONES[kind][0], device='meta'))
    assert {t.device.type for t in regulated.state_dict().values()} == {'meta'}


def test_settings_of_batch_norm_are_kept():
    model = backbone('basic')
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps, m.momentum = 1e-3, 0.01
    regulated = regulate(model)
    norms = [m for m in regulated.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
    with torch.no_grad():
        assert_close(regulated(images(model)), model(images(model)), 1e-4)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(backbone('basic'), process_group='a group')
    added = regulate(synced).layer1[0].fusion_bn
    assert isinstance(added, nn.SyncBatchNorm) and added.process_group == 'a group'


@pytest.mark.parametrize('stages', [None, (1,)])
def test_grad_checkpointing_is_kept(stages):
    model = backbone('basic').train()
    model.set_grad_checkpointing()
    regulated = regulate(model, stages=stages)
    forwards = {}
    for name, module in regulated.named_modules():
        if hasattr(module, 'downsample'):
            forwards[name] = 0
            module.register_forward_pre_hook(lambda *_, name=name: forwards.update({name: forwards[name] + 1}))
    regulated(images(model)).sum().backward()
    assert len(forwards) == 6 and set(forwards.values()) == {2}, 'every block runs again in backward'


@pytest.mark.parametrize(
    'kind, stages, found', [('d', (1,), [1]), ('d', [4, 2], [2, 4]), ('d', (), []), ('cifar', (3,), [3])]
)
def test_only_the_stages_asked_for(kind, stages, found):
    model = backbone(kind)
    regulated = regulate(model, stages=stages)
    assert [i for i, stage in enumerate(regulated.stages(), start=1) if isinstance(stage, RegulatedStage)] == found
    with torch.no_grad():
        assert_close(regulated(images(model)), model(images(model)), 1e-4 if found else 0)
    assert found or list(regulated.state_dict()) == list(model.state_dict())


def test_a_network_made_by_its_class_is_regulated():
    model = enliven(ResNet(BasicBlock, (1, 1, 1, 1)))
    x = torch.randn(2, 3, 32, 32)
    assert_close(regulate(model)(x), model(x), 1e-4)


# What is refused


def made(name, **kwargs):
    return lambda: timm.create_model(name, **kwargs)


def altered(change):
    def make():
        model = timm.create_model('test_resnet')
        change(model)
        return model

    return make


small = made('test_resnet')
not_affine = made('resnet18', norm_layer=lambda n, **kwargs: nn.BatchNorm2d(n, affine=False, **kwargs))


@pytest.mark.parametrize(
    'make, error, what',
    [
        (made('test_vit'), TypeError, 'VisionTransformer'),
        (made('skresnet18'), TypeError, 'SelectiveKernelBasic'),
        (lambda: type('Grandchild', (ResNet,), {})(BasicBlock, (1, 1, 1, 1)), TypeError, 'Grandchild'),
        (lambda: regulate(small()), ValueError, 'layer1.*regulated already'),
        (made('regnet_reg_resnet20_convgru', regulated_stages=(2,)), ValueError, 'layer2.*regulated already'),
        (altered(lambda model: model.prune_intermediate_layers([2])), ValueError, 'layer3.*pruned'),
        (altered(lambda model: setattr(model, 'layer4', None)), ValueError, 'layer4.*pruned'),
        (altered(lambda model: setattr(model.layer2[0], 'bn2', nn.Identity())), TypeError, 'layer2.*Identity'),
        (made('ecaresnet50d_pruned'), ValueError, 'layer1.*widths, 47, 52'),
        (lambda: timm.layers.convert_splitbn_model(small()), TypeError, 'SplitBatchNorm2d'),
        (not_affine, TypeError, 'layer1.*BatchNorm2d'),
        (made('resnet18', norm_layer=no_statistics), TypeError, 'layer1.*BatchNorm2d'),
        (made('resnet18', act_layer='silu'), TypeError, 'layer1.*SiLU'),
        (lambda: 'resnet18', TypeError, 'str'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_what_cannot_be_regulated_is_told_what_can(make, error, what):
    with pytest.raises(error, match=what) as raised:
        regulate(make())
    for word in ('accepts', 'timm.models.ResNet', 'BasicBlock', 'Bottleneck', 'batch norm', 'ReLU'):
        assert word in str(raised.value)


def test_unknown_cells_and_stages_are_named():
    for kwargs, message in (
        (dict(cell='lstm'), "'lstm'.*convrnn, convgru"),
        (dict(stages=(0,)), r'\(0,\).*from 1 to 4'),
    ):
        with pytest.raises(ValueError, match=message):
            regulate(small(), **kwargs)
