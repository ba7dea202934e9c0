"""`regulate`: a ResNet of timm's becomes a regulated one with the same weights and outputs."""

import copy

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from test_equations import enliven
from timm.models import ResNet

from timm_regnet_reg import regulate
from timm_regnet_reg.blocks import RegulatedStage
from timm_regnet_reg.networks import RegulatedResNet

CELLS = ('convrnn', 'convgru', 'convlstm')
TINY = dict(layers=(2, 1, 1, 2), channels=(16, 32, 48, 64))
BACKBONES = {
    'resnet18': ('resnet18', {}),
    'resnet50': ('resnet50', {}),
    'one block a stage, of both kinds': ('test_resnet', {}),
    'basic': ('resnet34', TINY),
    'c': ('resnet50c', TINY),
    'd': ('resnet50d', TINY),
    's': ('resnet50s', TINY),
    't': ('resnet50t', TINY),
    'basic d': ('resnet18d', TINY),
    'se': ('seresnet50', TINY),
    'basic se': ('seresnet34', TINY),
    'eca': ('ecaresnet50t', TINY),
    'anti-aliased by pooling': ('resnetaa50', TINY),
    'anti-aliased by blurring': ('resnetblur50', TINY),
    'basic, anti-aliased': ('resnetblur18', TINY),
    'rs': ('resnetrs50', TINY),
    'resnext': ('resnext50_32x4d', TINY),
    'resnext, anti-aliased, se': ('seresnextaa101d_32x8d', TINY),
    'wide': ('wide_resnet50_2', TINY),
    'senet': ('senet154', dict(layers=(2, 1, 1, 2), channels=(32, 64, 96, 128), cardinality=8)),
    'reduced': ('resnet50', dict(TINY, block_reduce_first=2)),
    'basic, reduced': ('resnet18', dict(TINY, block_reduce_first=2)),
    'dilated to 8': ('resnet50', dict(TINY, output_stride=8)),
    'dilated to 16': ('resnet50d', dict(TINY, output_stride=16)),
    'dropping': ('resnet50', dict(TINY, drop_path_rate=0.2, drop_block_rate=0.1, drop_rate=0.1)),
    'no classes': ('resnet50', dict(TINY, num_classes=0)),
    'no head': ('resnet50', dict(TINY, num_classes=0, global_pool='')),
    'one channel': ('resnet50d', dict(TINY, in_chans=1)),
    'cifar': ('cifar_resnet20', {}),
    'cifar se': ('cifar_seresnet20', {}),
    'cifar pad': ('cifar_resnet20', dict(shortcut='pad')),
    'cifar, no shortcut': ('cifar_resnet20', dict(shortcut='none')),
    'ours, unregulated': ('regnet_reg_resnet50_convgru', dict(TINY, regulated_stages=())),
}


def backbone(kind, **kwargs):
    """With random weights and statistics that leave no layer at its neutral start."""
    name, model_kwargs = BACKBONES[kind]
    return enliven(timm.create_model(name, **dict(model_kwargs, **kwargs)))


def images(model, batch=2):
    size = 32 if model.pretrained_cfg['input_size'][-1] == 32 else 64
    return torch.randn(batch, model.in_chans, size, size, generator=torch.Generator().manual_seed(0))


def difference(actual, expected):
    """Largest difference, relative to the largest expected value."""
    assert actual.shape == expected.shape
    assert expected.isfinite().all() and expected.abs().max() > 1e-3, 'the comparison is empty'
    return ((actual - expected).abs().max() / expected.abs().max()).item()


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
    before = copy.deepcopy(model)
    x = images(model)
    regulated = regulate(model, cell)
    assert isinstance(regulated, RegulatedResNet)
    assert all(isinstance(stage, RegulatedStage) for stage in regulated.stages())
    with torch.no_grad():
        assert difference(regulated(x), model(x)) < 1e-4
    weights = regulated.state_dict()
    assert all(torch.equal(weights[key], t) for key, t in model.state_dict().items())
    for p in regulated.parameters():
        p.data.add_(1)  # nothing is shared
    assert type(model) is type(before)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in before.named_modules()]
    assert all(torch.equal(t, u) for t, u in zip(model.state_dict().values(), before.state_dict().values()))

    model, x = model.double(), x.double()
    with torch.no_grad():
        assert difference(regulate(model, cell)(x), model(x)) < 1e-10


def test_a_fresh_network_takes_part_too():
    # its residual branches give zero, and its batch norms are neutral
    model = timm.create_model('resnet18').eval()
    x = images(model)
    with torch.no_grad():
        assert difference(regulate(model)(x), model(x)) < 1e-4


@pytest.mark.parametrize('again', [False, True], ids=['made', 'initialised again'])
@pytest.mark.parametrize(
    'name, plain, kwargs',
    [
        ('regnet_reg_resnet20_convlstm', 'cifar_resnet20', {}),
        ('regnet_reg_seresnet20_convrnn', 'cifar_seresnet20', {}),
        ('regnet_reg_resnet50_convgru', 'resnet50', TINY),
        ('regnet_reg_resnet18_convlstm', 'resnet18', TINY),
    ],
)
def test_an_untrained_network_starts_as_its_backbone(name, plain, kwargs, again):
    torch.manual_seed(0)
    kwargs = dict(kwargs, zero_init_last=False)  # or every residual branch gives zero
    model, plain = timm.create_model(name, **kwargs), timm.create_model(plain, **kwargs)
    if again:
        model.init_weights(zero_init_last=False)
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key in plain.state_dict()})
    x = images(plain, 32)
    with torch.no_grad():
        assert difference(model.eval()(x), plain.eval()(x)) < 1e-4
        in_training = difference(model.train()(x), plain.train()(x))  # batch statistics are not quite what is expected
        assert in_training < 0.15
        for block in (block for stage in model.stages() for block in stage):
            block.fusion_conv_x.weight.normal_()
        assert difference(model(x), plain(x)) > 3 * in_training, 'the fusion makes no difference'


@pytest.mark.parametrize('kwargs', [dict(act_layer='silu'), dict(norm_layer='groupnorm1')])
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
        if 'regulator' not in name and 'fusion' not in name:
            continue
        gradient = p.grad
        if '.regulator.' in name:
            # a gate that only ever weighs a zero state has no gradient in a stage of a single block
            gates = gradient.chunk({'convrnn': 1, 'convgru': 3, 'convlstm': 4}[cell])
            idle = {'convrnn': (), 'convgru': (1,), 'convlstm': (1,)}[cell] if depths[name.split('.')[0]] == 1 else ()
            gradient = torch.stack([g for i, g in enumerate(gates) if i not in idle])
            assert all(g.any() for g in gradient), name
        assert gradient.any(), name


def test_regulators_learn():
    model = regulate(backbone('cifar')).train()
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = images(model, 16), torch.arange(16) % 10
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    moved = {name: (t - start[name]).abs().max().item() for name, t in model.named_parameters()}
    for name, by in moved.items():
        if '.regulator.' in name or '.fusion_conv' in name:
            assert by > 1e-7, name
    assert model.layer1[0].fusion_conv_h.weight.abs().max() > 1e-4, 'the state has no influence yet'


def test_fusion_starts_with_the_statistics_of_what_it_normalizes():
    model = backbone('d')
    regulated = regulate(model)
    noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, bn in [('layer1.0', model.layer1[0].bn2), ('layer4.1', model.layer4[1].bn2)]:
        X = torch.relu(noise * bn.weight.double() + bn.bias.double())  # if what the batch norm gives is normal
        fusion_bn = regulated.get_submodule(name).fusion_bn
        torch.testing.assert_close(fusion_bn.running_mean.double(), X.mean(0), rtol=0.02, atol=0.01)
        torch.testing.assert_close(fusion_bn.running_var.double(), X.var(0), rtol=0.02, atol=0.01)
        assert fusion_bn.running_mean.std() > 0.05, 'the comparison is empty'


# What is kept


def test_mode_and_frozen_parameters_are_kept():
    model = backbone('d').train()
    model.layer1.eval()
    model.conv1.requires_grad_(False)
    model.layer2[0].conv1.weight.requires_grad_(False)
    regulated = regulate(model)
    flags = dict(model.named_modules())
    for name, module in regulated.named_modules():
        if name == 'layer1' or name not in flags:
            assert module.training, name
        else:
            assert module.training == flags[name].training, name
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
    with pytest.warns(UserWarning, match='not save'):
        regulated = regulate(model)
    norms = [m for m in regulated.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
    with torch.no_grad():
        assert difference(regulated(images(model)), model(images(model))) < 1e-4
    group = 'a group'
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(backbone('basic'))
    for module in synced.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.process_group = group
    added = regulate(synced).layer1[0].fusion_bn
    assert isinstance(added, nn.SyncBatchNorm) and added.process_group == group


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
    'kind, stages, found',
    [
        ('d', (1,), [1]),
        ('d', [4, 2], [2, 4]),
        ('d', (), []),
        ('d', None, [1, 2, 3, 4]),
        ('cifar', (3,), [3]),
        ('cifar', None, [1, 2, 3]),
    ],
)
def test_only_the_stages_asked_for(kind, stages, found):
    model = backbone(kind)
    regulated = regulate(model, stages=stages)
    assert [i for i, stage in enumerate(regulated.stages(), start=1) if isinstance(stage, RegulatedStage)] == found
    x = images(model)
    with torch.no_grad():
        assert difference(regulated(x), model(x)) < 1e-4
        if not found:
            assert list(regulated.state_dict()) == list(model.state_dict())
            assert torch.equal(regulated(x), model(x))


def test_the_result_is_the_registered_network():
    for kind, name in (('resnet18', 'regnet_reg_resnet18_convgru'), ('cifar', 'regnet_reg_resnet20_convgru')):
        regulated = regulate(backbone(kind), 'convgru')
        registered = timm.create_model(name).eval()
        registered.load_state_dict(regulated.state_dict(), strict=True)
        x = images(regulated)
        with torch.no_grad():
            assert torch.equal(registered(x), regulated(x))
            assert all(
                torch.equal(a, b)
                for a, b in zip(
                    registered.forward_intermediates(x, intermediates_only=True),
                    regulated.forward_intermediates(x, intermediates_only=True),
                )
            )
            assert difference(torch.jit.script(regulated)(x), regulated(x)) < 1e-5
        regulated.set_grad_checkpointing()
        regulated.reset_classifier(5)
        assert regulated(x).shape == (2, 5)


# What is refused


def pruned():
    model = timm.create_model('resnet18')
    model.prune_intermediate_layers([2])
    return model


def tied():
    model = timm.create_model('cifar_resnet20')
    model.layer2[2] = model.layer2[1]
    return model


def looped():
    model = timm.create_model('test_resnet')
    model.layer3 = model.layer2
    return model


def cut(layer4):
    model = timm.create_model('test_resnet')
    model.layer4 = layer4
    return model


class Grandchild(ResNet):
    pass


@pytest.mark.parametrize(
    'make, error, what',
    [
        (lambda: timm.create_model('test_vit'), TypeError, 'VisionTransformer'),
        (lambda: timm.create_model('resnet18', features_only=True), TypeError, 'FeatureListNet'),
        (
            lambda: timm.create_model('resnet18', features_only=True, feature_cls='getter'),
            TypeError,
            'FeatureGetterNet',
        ),
        (lambda: timm.create_model('regnetx_002'), TypeError, 'RegNet'),
        (lambda: timm.create_model('skresnet18'), TypeError, 'SelectiveKernelBasic'),
        (lambda: Grandchild(timm.models.resnet.BasicBlock, (1, 1, 1, 1)), TypeError, 'Grandchild'),
        (lambda: nn.DataParallel(timm.create_model('resnet18')), TypeError, 'DataParallel'),
        (lambda: torch.jit.script(timm.create_model('test_resnet')), TypeError, 'RecursiveScriptModule'),
        (lambda: regulate(timm.create_model('resnet18')), ValueError, 'layer1.*regulated already'),
        (
            lambda: timm.create_model('regnet_reg_resnet20_convgru', regulated_stages=(2,)),
            ValueError,
            'layer2.*regulated already',
        ),
        (pruned, ValueError, 'layer3.*pruned'),
        (tied, ValueError, 'layer2.*block that it has already'),
        (looped, ValueError, 'layer3.*block that it has already'),
        (lambda: cut(None), ValueError, 'layer4.*pruned'),
        (lambda: cut(nn.Identity()), ValueError, 'layer4.*pruned'),
        (lambda: timm.layers.convert_splitbn_model(timm.create_model('test_resnet')), TypeError, 'SplitBatchNorm2d'),
        (lambda: timm.create_model('ecaresnet50d_pruned'), ValueError, 'layer1.*widths, 47, 52'),
        (lambda: timm.create_model('resnet50_gn', **TINY, norm_layer='groupnorm1'), TypeError, 'layer1.*GroupNorm1'),
        (lambda: timm.layers.freeze_batch_norm_2d(timm.create_model('test_resnet')), TypeError, 'layer1.*Frozen'),
        (
            lambda: timm.create_model('resnet18', norm_layer=lambda n, **kw: nn.BatchNorm2d(n, affine=False, **kw)),
            TypeError,
            'layer1.*BatchNorm2d',
        ),
        (lambda: timm.create_model('resnet18', act_layer='silu'), TypeError, 'layer1.*SiLU'),
        (lambda: 'resnet18', TypeError, 'str'),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_what_cannot_be_regulated_is_told_what_can(make, error, what):
    with pytest.raises(error, match=what) as raised:
        regulate(make())
    for word in ('accepts', 'timm.models.ResNet', 'BasicBlock', 'Bottleneck', 'batch norm', 'ReLU'):
        assert word in str(raised.value)


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(cell='lstm'), r"'lstm'.*convrnn, convgru, convlstm"),
        (dict(cell=None), r'None.*convrnn, convgru, convlstm'),
        (dict(stages=(0,)), r'\(0,\).*from 1 to 4'),
        (dict(stages=(5, 1)), r'\(5, 1\).*from 1 to 4'),
        (dict(stages=1), r'1.*tuple.*from 1 to 4'),
        (dict(stages='1'), r"'1'.*tuple.*from 1 to 4"),
    ],
    ids=str,
)
def test_unknown_cells_and_stages_are_named(kwargs, message):
    model = timm.create_model('test_resnet')
    with pytest.raises(ValueError, match=message):
        regulate(model, **kwargs)
    assert type(model) is ResNet
