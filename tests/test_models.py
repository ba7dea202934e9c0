"""The models in timm's registry, and that each is used like a timm ResNet.

What needs no numbers runs for every model, on the meta device, where nothing is computed. What does need them runs on
the small networks of `networks.py`.
"""

import copy
import io
import pydoc
import re
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn as nn
from networks import CELLS, IN_TIMM, NETS, ONE_OF_EACH, TINY, assert_close, create, images, lively, train_step
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import FeatureInfo, group_parameters
from timm.models.resnet import BasicBlock
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, grad, jvp, vmap

import timm_regnet_reg
from timm_regnet_reg import cells
from timm_regnet_reg.cells import ConvGRU, ConvLSTM
from timm_regnet_reg.networks import CifarRegulatedResNet, RegulatedResNet

IMAGENET = IN_TIMM + ('resnext50_2x40d', 'resnext50_4x24d', 'resnext50_8x14d')
CIFAR = tuple(f'{kind}{depth}' for kind in ('resnet', 'seresnet') for depth in (20, 32, 44, 56, 110))
PLAIN = tuple(f'cifar_{backbone}' for backbone in CIFAR)
MODELS = PLAIN + tuple(f'regnet_reg_{backbone}_{cell}' for backbone in IMAGENET + CIFAR for cell in CELLS)
# every backbone with one of the cells, in turn
SOME_CELLS = PLAIN + tuple(
    f'regnet_reg_{backbone}_{CELLS[i % len(CELLS)]}' for i, backbone in enumerate(IMAGENET + CIFAR)
)


# All models


def backbone_of(name):
    return re.sub('^(cifar|regnet_reg)_|_conv.*$', '', name)


def test_timm_lists_exactly_these_models():
    assert len(MODELS) == len(set(MODELS)) == 103
    assert sorted(timm.list_models(module='regnet_reg')) == sorted([*MODELS, 'regnet_reg'])
    assert set(timm.list_models(['regnet_reg_*', 'cifar_*'])) >= set(MODELS)
    assert not set(timm.list_models(module='regnet')) & set(MODELS)


@pytest.mark.parametrize('name', MODELS)
def test_entrypoint_can_be_looked_up_and_explains_itself(name):
    entrypoint = timm.model_entrypoint(name)
    assert entrypoint is getattr(timm_regnet_reg.regnet_reg, name)
    assert (entrypoint.__module__, entrypoint.__qualname__) == ('timm_regnet_reg.regnet_reg', name)
    text = pydoc.plain(pydoc.render_doc(entrypoint))
    assert f'{name}(pretrained: bool = False, **kwargs)' in text
    assert backbone_of(name) in text
    assert name in PLAIN or name.split('_')[-1] in text.lower()
    for word in ('pretrained:', 'regulated_stages', 'shortcut', 'features_only'):
        assert word in text


ADDED = re.compile(
    r'layer\d\.(regulator\.(pointwise|depthwise|bias)'
    r'|\d+\.(regulator_bn|fusion_bn)\.(weight|bias|running_mean|running_var|num_batches_tracked)'
    r'|\d+\.fusion_conv_[xh]\.weight)'
)


@pytest.mark.parametrize('name', SOME_CELLS)
def test_network_is_as_its_config_says_and_its_plain_part_is_timms_own(name):
    model = timm.create_model(name, device='meta', dtype=torch.bfloat16).eval()
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {('meta', torch.bfloat16)}
    cfg = model.default_cfg
    assert cfg is model.pretrained_cfg
    assert cfg['architecture'] == name
    if backbone_of(name) in CIFAR:
        plain = timm.create_model(f'cifar_{backbone_of(name)}', device='meta')
        assert (cfg['input_size'], cfg['num_classes']) == ((3, 32, 32), 10)
        assert cfg['mean'] == pytest.approx((0.4914, 0.4822, 0.4465), abs=5e-4)  # of CIFAR-10's training images
        assert cfg['std'] == pytest.approx((0.2470, 0.2435, 0.2616), abs=5e-4)
    else:
        assert (cfg['input_size'][0], cfg['num_classes']) == (3, 1000)
        assert (cfg['mean'], cfg['std']) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        if backbone_of(name) in IN_TIMM:
            plain = timm.create_model(backbone_of(name), device='meta')
        else:  # timm's block, in a network that timm has no name for
            C, d = re.match(r'resnext50_(\d+)x(\d+)d', backbone_of(name)).groups()
            plain = timm.create_model('resnext50_32x4d', device='meta', cardinality=int(C), base_width=int(d))
            assert (cfg['crop_pct'], cfg['interpolation']) == (224 / 256, 'bicubic')
    assert isinstance(model.get_submodule(cfg['first_conv']), nn.Conv2d)
    assert model.get_submodule(cfg['classifier']).out_features == model.num_classes == cfg['num_classes']

    x = torch.empty(2, *cfg['input_size'], device='meta', dtype=torch.bfloat16)
    final, features = model.forward_intermediates(x)
    assert final.shape == (2, model.num_features, *cfg['pool_size'])
    info = FeatureInfo(model.feature_info, len(features))
    assert [f.shape[1] for f in features] == info.channels()
    assert [-(-x.shape[2] // f.shape[2]) for f in features] == info.reduction()
    assert info.module_name() == ['act1'] + [f'layer{i}' for i in range(1, len(features))]
    assert model.forward_head(final).shape == (2, cfg['num_classes'])

    weights = {key: t.shape for key, t in model.state_dict().items()}
    added = [key for key in weights if ADDED.fullmatch(key)]
    assert bool(added) == (name not in PLAIN)
    assert [(key, shape) for key, shape in weights.items() if key not in added] == [
        (key, t.shape) for key, t in plain.state_dict().items()
    ]


def test_import_registers_without_network_and_without_building_models():
    code = """
import socket, sys, timm, torch.nn as nn
def forbidden(*args, **kwargs): raise AssertionError('not at import')
socket.socket.connect = socket.create_connection = socket.getaddrinfo = forbidden
nn.Module.__init__ = nn.Parameter.__new__ = forbidden
import timm_regnet_reg
assert len(timm.list_models(module='regnet_reg')) == 104
drawers = tuple(f'timm_regnet_reg.{drawer}' for drawer in ('commands', 'weights', 'papers'))
print([module for module in sys.modules if module.startswith(drawers)])
"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout == '[]\n'


# Heads and features


@pytest.mark.parametrize('net', ['cifar', 'bottleneck'])
def test_head_and_features_come_apart(net):
    model = lively(net)
    x = images(model)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    for num_classes, pool, pooled in ((5, 'max', features.amax((2, 3))), (0, 'avg', features.mean((2, 3)))):
        model.reset_classifier(num_classes, pool)
        assert_close(model(x), model.fc(pooled))
    assert torch.equal(lively(net, num_classes=0, global_pool='')(x), features)


@pytest.mark.parametrize('net', NETS)
def test_features_are_what_each_stages_last_block_gives(net):
    """As of a plain network, whose `model.layer4[-1]` visual explanations hook."""
    model = lively(net)
    x = images(model)
    taps = []
    for module in (model.act1, *(model.get_submodule(info['module'])[-1] for info in model.feature_info[1:])):
        module.register_forward_hook(lambda *args: taps.append(args[-1].clone()))
    last = len(model.feature_info) - 1
    for indices, wanted in ((None, range(last + 1)), (2, [last - 1, last]), ([-1, 1], [1, last]), ([0], [0])):
        final, found = model.forward_intermediates(x, indices)
        assert torch.equal(final, model.forward_features(x))
        early, alone = model.forward_intermediates(x, indices, False, True)  # stops early
        assert len(found) == len(alone) == len(wanted)
        for i, feature, other in zip(wanted, found, alone):
            assert torch.equal(feature, taps[i]) and torch.equal(other, taps[i])
        assert torch.equal(early, model.maxpool(taps[0]) if wanted == [0] else taps[last])


def extractor_of(model, net, feature_cls='list', **kwargs):
    """A feature extractor with the network's weights; each kind puts the network under another prefix."""
    extractor = create(net, features_only=True, feature_cls=feature_cls, **kwargs)
    weights = model.state_dict()
    extractor.load_state_dict(
        {key: weights[re.sub(r'^(body|model|graph_module)\.', '', key)] for key in extractor.state_dict()}
    )
    return extractor.eval()


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'fx', 'getter'])
@pytest.mark.parametrize(
    'net, kwargs',
    [
        ('cifar', {}),
        ('basic', {}),
        ('bottleneck d', {}),
        ('se groups', dict(out_indices=(1, 3))),
        ('partly', dict(out_indices=(-2,))),
    ],
    ids=str,
)
def test_feature_extractors_give_the_intermediate_features(net, kwargs, feature_cls):
    model = lively(net)
    x = images(model)
    indices = kwargs.get('out_indices', range(len(model.feature_info)))
    extractor = extractor_of(model, net, feature_cls, **kwargs)
    expected = model.forward_intermediates(x, list(indices), intermediates_only=True)
    for _ in range(2):
        actual = extractor(x)
        if feature_cls == 'dict':
            assert list(actual) == [str(i) for i in indices]
            actual = list(actual.values())
        assert_close(actual, expected)
    if feature_cls in ('list', 'fx'):
        assert_close(torch.jit.script(extractor)(x), expected)
    assert type(create(net, features_only=True, feature_cfg=dict(feature_cls=feature_cls))) is type(extractor)
    assert extractor.feature_info.channels() == [e.shape[1] for e in expected]
    assert extractor.feature_info.reduction() == [x.shape[2] // e.shape[2] for e in expected]


@pytest.mark.parametrize(
    'net, output_stride',
    [('cifar', stride) for stride in (2, 4, 8, 16, 32)]
    + [(net, stride) for net in ('basic', 'bottleneck d', 'partly', 'no shortcut') for stride in (8, 16, 32)],
)
def test_output_stride(net, output_stride):
    model = lively(net, output_stride=output_stride)
    x = images(model, size=(65, 96))
    extractor = extractor_of(model, net, output_stride=output_stride)
    reductions = [min(r, output_stride) for r in ((1, 1, 2, 4) if net == 'cifar' else (2, 4, 8, 16, 32))]
    assert extractor.feature_info.reduction() == reductions
    features = extractor(x)
    assert [f.shape[2:] for f in features] == [(-(-65 // r), 96 // r) for r in reductions]
    assert torch.equal(model.forward_features(x), features[-1])


@pytest.mark.parametrize('net', ['basic', 'bottleneck'])
def test_strides_can_be_changed_after_the_network_was_made(net):
    """As code for segmentation does with a ResNet-50; 32 pixels are one in its last stage, which broadcasts."""
    model, expected = lively(net), lively(net, output_stride=16)
    for conv, dense in zip(model.layer4.modules(), expected.layer4.modules()):
        if isinstance(conv, nn.Conv2d):
            conv.stride, conv.dilation, conv.padding = dense.stride, dense.dilation, dense.padding
    for size in (32, 65):
        x = images(model, size=(size, size))
        assert_close(model.forward_features(x), expected.forward_features(x))
    if net == 'bottleneck':
        for stride, rows in ((1, 9), ((2, 1), 5)):  # of the 65 pixels
            model.layer3[0].conv2.stride = model.layer3[0].downsample[0].stride = stride
            assert model.forward_features(x).shape[2:] == (rows, 9)
        features = expected.forward_features(x)
        expected.layer2[0].conv2 = nn.Sequential(expected.layer2[0].conv2)  # an adapter without a stride
        assert torch.equal(expected.forward_features(x), features)


@pytest.mark.parametrize('net', ONE_OF_EACH)
def test_pruned_network_keeps_the_features_asked_for(net):
    model = lively(net)
    x = images(model)
    last = len(model.feature_info) - 1
    features = model.forward_intermediates(x, intermediates_only=True)
    for indices, kept in [([1], [1]), ([0, 2], [0, 2]), (1, [last]), ([0], [0]), ([-2], [last - 1])]:
        pruned = copy.deepcopy(model)
        assert list(pruned.prune_intermediate_layers(indices)) == kept
        pruned.set_grad_checkpointing(net == 'partly')
        for actual, i in zip(pruned.forward_intermediates(x, kept, intermediates_only=True), kept):
            assert torch.equal(actual, features[i])
        assert torch.equal(pruned(x), features[kept[-1]])
        assert pruned.num_features == pruned.head_hidden_size == features[kept[-1]].shape[1]
        assert not any(key.startswith(('fc', f'layer{kept[-1] + 1}')) for key in pruned.state_dict())
    whole = copy.deepcopy(model)
    whole.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(whole(x), model(x))
    whole.prune_intermediate_layers([1], prune_head=False)
    assert {key.split('.')[0] for key in whole.state_dict()} == {'conv1', 'bn1', 'layer1'}


@pytest.mark.parametrize('net', ['cifar', 'basic se'])
def test_a_stage_can_be_taken_away(net):
    """As detectors do that run a backbone's stages by themselves."""
    model = lively(net)
    x = images(model)
    [expected] = model.forward_intermediates(x, [1], intermediates_only=True)
    del model.layer3
    model.layer2 = None
    assert not model.train().eval().training
    model.set_grad_checkpointing()
    [feature] = model.forward_intermediates(x, [1], stop_early=True, intermediates_only=True)
    assert torch.equal(feature, expected)
    model.reparameterize()
    assert_close(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(x))))), expected)


@pytest.mark.parametrize('coarse', [False, True])
@pytest.mark.parametrize('net', [net for net in NETS if net != 'cifar plain'])
def test_layer_wise_learning_rates_have_a_regulator_with_its_stages_first_block(net, coarse):
    model, plain = create(net), create(net, regulated_stages=())
    group, expected = (group_parameters(m, m.group_matcher(coarse=coarse), reverse=True) for m in (model, plain))
    assert set(group) == {name for name, _ in model.named_parameters()}
    assert {name: group[name] for name, _ in plain.named_parameters()} == expected
    for name in group.keys() - expected.keys():
        block = re.match(r'layer\d(\.\d)?', name.replace('regulator.', '0.')).group()
        assert group[name] == group[f'{block}.conv1.weight']


@pytest.mark.parametrize(
    'name, plain', [('regnet_reg_resnet20_convgru', 'cifar_resnet20'), ('regnet_reg_resnet18_convgru', 'resnet18')]
)
def test_a_seed_starts_plain_and_regulated_networks_with_one_backbone(name, plain):
    states = []
    for model in name, plain:
        torch.manual_seed(0)
        states.append(timm.create_model(model, num_classes=10).state_dict())
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())


class ForgetBias(ConvLSTM):
    """README's example of a cell."""

    def reset_parameters(self):
        super().reset_parameters()
        with torch.no_grad():
            self.bias.chunk(4)[1].fill_(1)


def test_an_own_cell_regulates_and_its_states_can_be_recorded_as_readme_says(monkeypatch):
    monkeypatch.setitem(cells.CELLS, 'forget_bias', ForgetBias)
    model = timm_regnet_reg.regulate(lively('cifar plain'), cell='forget_bias', stages=(3,)).eval()
    assert model.layer3.regulator.bias.tolist() == 64 * [0] + 64 * [1] + 128 * [0]
    seen, states = [], []
    for block in model.layer3:
        block.regulator_bn.register_forward_hook(lambda bn, given, out: seen.append(given[0]))

        def step(*args, step=block.step):
            states.append(step(*args))
            return states[-1]

        block.step = step
    x = images(model)
    expected = model(x)
    assert len(states) == len(model.layer3) and all(torch.equal(H, given) for (H, _), given in zip(states, seen))
    assert_close(reparameterize_model(model)(x), expected)


@pytest.mark.parametrize('name', ['regnet_reg_resnet20_convgru', 'regnet_reg'])
@pytest.mark.parametrize('kwargs', [{}, {'cell_weight_decay': False}])
def test_weight_decay_spares_the_cells_where_it_is_to(name, kwargs):
    model = timm.create_model(name, cell='convgru', **kwargs)
    cells = {p for module in model.modules() if isinstance(module, ConvGRU) for p in module.parameters()}
    groups = create_optimizer_v2(model, weight_decay=0.1, filter_bias_and_bn=False).param_groups
    spared = {p for group in groups if not group['weight_decay'] for p in group['params']}
    assert spared == (cells if kwargs else set()) and len(cells) % 3 == 0 < len(cells)


# Gradient checkpointing


@pytest.mark.parametrize('feature_cls', [None, 'list', 'hook', 'getter'])
@pytest.mark.parametrize('net', ['cifar', 'basic se', 'bottleneck d', 'partly', 'cifar plain'])
def test_grad_checkpointing_changes_nothing_but_memory(net, feature_cls):
    model = lively(net, drop_path_rate=0.3)
    x = images(model, 4).double()
    if feature_cls:
        model = extractor_of(model, net, feature_cls, drop_path_rate=0.3)
    expected = train_step(copy.deepcopy(model).double(), x)
    forwards = {}
    for name, block in model.named_modules():
        if re.search(r'layer\d\.\d$', name):
            block.register_forward_pre_hook(lambda *_, name=name: forwards.update({name: forwards.get(name, 0) + 1}))
    for enable, times in ((True, 2), (False, 1)):
        (model.model if feature_cls == 'getter' else model).set_grad_checkpointing(enable)
        forwards.clear()
        assert_close(train_step(model.double(), x), expected, 1e-9)
        if feature_cls in (None, 'getter'):  # timm's other extractors choose themselves what they checkpoint
            assert set(forwards.values()) == {times}, 'every block runs again in backward'


# Inputs of every kind


@pytest.mark.parametrize('net', NETS)
def test_channels_last_is_kept_through_the_network(net):
    model = lively(net).double()
    x = images(model).double()
    expected = train_step(copy.deepcopy(model), x)
    model, x = (t.to(memory_format=torch.channels_last) for t in (model, x))
    seen, lost = set(), set()

    def look(name):
        def hook(module, args, output):
            for t in output if isinstance(output, tuple) else (output,):
                if isinstance(t, torch.Tensor) and t.ndim == 4 and min(t.shape[1:]) > 1:
                    (seen if t.is_contiguous(memory_format=torch.channels_last) else lost).add(name)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(look(name))
    assert_close(train_step(model, x), expected, 1e-6)
    model.float()(x.float())
    assert not lost
    assert {'layer1', 'layer2', 'layer3', 'layer1.0', 'layer1.1.conv1'} <= seen


@pytest.mark.parametrize('net', ['cifar', 'basic', 'bottleneck d', 'se groups'])
def test_precisions(net):
    model = lively(net).double()
    x = images(model).double()
    expected = model(x)
    assert expected.dtype == torch.float64
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        low = copy.deepcopy(model).to(dtype)(x.to(dtype))
        assert low.dtype == dtype
        assert_close(low, expected, tolerance, str(dtype))
    with torch.autocast('cpu', torch.bfloat16):
        assert_close(model(x), expected, 1e-9, 'autocast, which leaves float64 alone')


# torch.func and forward-mode derivatives


@pytest.mark.parametrize('net', ONE_OF_EACH)
def test_gradients_of_each_image_by_torch_func(net):
    model = lively(net).double()
    x = images(model).double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    per_image = vmap(grad(lambda p, image: functional_call(model, p, (image[None],)).square().sum()), in_dims=(None, 0))
    actual = per_image(params, x)
    for i, image in enumerate(x):
        model.zero_grad()
        model(image[None]).square().sum().backward()
        for name, p in model.named_parameters():
            assert_close(actual[name][i], p.grad, 1e-8, name)


@pytest.mark.parametrize('net', ONE_OF_EACH)
def test_forward_mode_derivatives(net):
    model = lively(net).double()
    x, v = images(model).double(), images(model, seed=1).double()
    small = 1e-6
    expected = (model(x + small * v) - model(x - small * v)) / (2 * small)
    assert_close(jvp(model, (x,), (v,))[1], expected, 1e-4)


# Compilers


@pytest.mark.parametrize('net', [*ONE_OF_EACH, 'no shortcut'])
def test_compiles_to_one_graph(net):
    torch._dynamo.reset()
    model = lively(net)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (2, 3, 5, 4):
        x = images(model, batch)
        torch._dynamo.mark_dynamic(x, 0)
        assert_close(compiled(x), model(x))
    assert counter.frame_count == 1, 'another batch size compiled anew'


def test_compiles_to_machine_code():
    torch._dynamo.reset()
    model = lively('cifar', layers=(2, 1, 1), regulated_stages=(1,))
    x = images(model)
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True)(x), model(x))


@pytest.mark.parametrize('net', ONE_OF_EACH)
def test_scripts(net):
    model = lively(net)
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(model), stream)
    stream.seek(0)
    scripted = torch.jit.load(stream)
    for x in (images(model), images(model, 3, (65, 40))):
        assert_close(scripted(x), model(x))
    assert_close(train_step(scripted.double(), x.double()), train_step(model.double(), x.double()), 1e-6)


# Copies and state


@pytest.mark.parametrize('net', NETS)
def test_copies_and_files_hold_the_whole_network_and_nothing_of_an_earlier_forward(net, tmp_path):
    model, fresh = lively(net), create(net).eval()
    x = images(model)
    torch.save(model, tmp_path / 'model.pt')
    fresh.load_state_dict(model.state_dict())
    expected = model(x)
    for other in (copy.deepcopy(model), torch.load(tmp_path / 'model.pt', weights_only=False), fresh):
        assert torch.equal(other(x), expected)
        for p in other.parameters():
            p.data.add_(1)  # nothing is shared
    model(images(model, 5, (33, 65), seed=1))
    assert torch.equal(model(x), expected)
    assert not any(isinstance(value, torch.Tensor) for m in model.modules() for value in vars(m).values())


# Arguments


@pytest.mark.parametrize('net, plain', [('basic', 'resnet18'), ('bottleneck', 'resnet50')])
def test_drop_rates(net, plain):
    rates = dict(drop_path_rate=0.5, drop_block_rate=0.2, drop_rate=0.3)

    def drops(model):
        return {name: (type(m), m.drop_prob) for name, m in model.named_modules() if hasattr(m, 'drop_prob')}

    model = lively(net, **rates)
    assert drops(model) == drops(timm.create_model(plain, **TINY, **rates)) != {}
    x = images(model)
    assert torch.equal(model(x), lively(net)(x))
    for name, rate in rates.items():
        model = lively(net, **{name: rate}).train()
        assert not torch.equal(model(x), model(x)), name


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(norm_layer='groupnorm', channels=(32, 64, 96, 128)),
        dict(act_layer='silu'),
        dict(act_layer=nn.LeakyReLU),
        dict(aa_layer=timm.layers.BlurPool2d),
        dict(aa_layer=nn.AvgPool2d),
        dict(aa_layer=timm.layers.BlurPool2d, output_stride=8),
        dict(block_args=dict(attn_layer='eca')),
        dict(stem_type='deep_tiered', stem_width=32, replace_stem_pool=True, avg_down=True, in_chans=4),
        dict(block_reduce_first=2, down_kernel_size=3),
        dict(block_reduce_first=2, output_stride=8),
    ],
    ids=str,
)
@pytest.mark.parametrize('net', ['basic', 'bottleneck'])
def test_takes_what_timms_resnet_takes(net, kwargs):
    model, plain = lively(net, **kwargs), lively(net, regulated_stages=(), **kwargs)
    theirs = timm.create_model('resnet18' if net == 'basic' else 'resnet50', **{**TINY, 'num_classes': 7, **kwargs})
    assert set(theirs.state_dict()) <= set(model.state_dict())
    x = images(model)
    assert model(x).shape == theirs(x).shape
    assert all(tensor.isfinite().all() for tensor in train_step(model, x).values())
    theirs.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(plain(x), theirs.eval()(x))
    norm, act = type(theirs.layer1[0].bn1), type(theirs.layer1[0].act1)
    for block in model.layer2:
        assert type(block.regulator_bn) is type(block.fusion_bn) is norm
        assert type(block.regulator_act) is type(block.fusion_act) is act


@pytest.mark.parametrize(
    'net, kwargs, message',
    [
        ('basic', dict(regulated_stages=(0, 1)), r'\(0, 1\).*from 1 to 4'),
        ('cifar', dict(regulated_stages=(4,)), r'\(4,\).*from 1 to 3'),
        ('cifar', dict(regulated_stages=1), r'1.*tuple.*from 1 to 3'),
        ('basic', dict(shortcut='pad'), r"'pad'.*conv, none"),
        ('cifar', dict(shortcut='identity'), r"'identity'.*conv, pad, none"),
        ('cifar', dict(shortcut='none', zero_init_last=True), 'zero_init_last'),
        ('basic', dict(in_chans=0), 'in_chans=0 .* 1 or more'),
        ('basic', dict(in_chans='3'), "in_chans='3' .* 1 or more"),
        ('basic', dict(output_stride=7), 'Output stride 7 .*8, 16, 32'),
        ('cifar', dict(output_stride=7), 'Output stride 7 .*2, 4, 8, 16, 32'),
        ('basic', dict(features_only=True, out_indices=(5,)), r'out_indices=\(5,\) .* 0 to 4'),
        ('cifar', dict(features_only=True, out_indices=(-5,)), r'out_indices=\(-5,\) .* 0 to 3'),
        ('cifar', dict(features_only=True, out_indices=-1), 'out_indices=-1 .* from 1 to 4'),
        ('cifar', dict(channels=(8, 8, 8), replace_stem_pool=True), 'channels, replace_stem_pool was given: the CIFAR'),
        ('cifar', dict(stem_width=32, stem_type='deep'), 'stem_type, stem_width was given: the CIFAR form'),
    ],
    ids=str,
)
def test_bad_arguments_are_named(net, kwargs, message):
    with pytest.raises(ValueError, match=message):
        create(net, **kwargs)


def test_bad_arguments_of_any_backbone_are_named():
    with pytest.raises(ValueError, match='Output stride 7 .*8, 16, 32'):
        timm.create_model('regnet_reg', output_stride=7)


def test_a_network_made_by_its_class_names_the_cells_and_has_cifars_classes():
    with pytest.raises(ValueError, match=r"'lstm'.*convrnn, convgru, convlstm"):
        RegulatedResNet(BasicBlock, (1, 1, 1, 1), cell='lstm')
    assert CifarRegulatedResNet(BasicBlock, (1, 1, 1)).num_classes == 10


@pytest.mark.parametrize(
    'name, kwargs, is_what, allowed',
    [
        ('regnet_reg_resnet20_convgru', dict(cell='convlstm'), 'regulated by a convgru', dict(cell='convgru')),
        ('regnet_reg_resnet18_convrnn', dict(cell='lstm'), 'regulated by a convrnn', dict(cell='convrnn')),
        ('cifar_resnet20', dict(cell='convlstm'), 'a plain network', {}),
        ('cifar_resnet20', dict(regulated_stages=(1,)), 'a plain network', dict(regulated_stages=[])),
    ],
)
def test_a_network_is_what_its_name_says(name, kwargs, is_what, allowed):
    with pytest.raises(ValueError, match=f'{name} is {is_what}.*choose the model of that name'):
        timm.create_model(name, **kwargs)
    assert str(timm.create_model(name, device='meta', **allowed)) == str(timm.create_model(name, device='meta'))
