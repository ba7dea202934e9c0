"""The models in timm's registry, and that each is used like a timm ResNet.

What needs no numbers runs for every model, on the meta device, where nothing is computed. What does need them runs on
`NETS`: real entrypoints, most of them made smaller by timm's own arguments, that together have every cell, block and
form. Their weights and statistics are random, as in a fresh network every residual branch gives zero.
"""

import copy
import inspect
import io
import pickle
import pydoc
import re
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn as nn
from test_equations import IN_TIMM, enliven
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import FeatureInfo, group_parameters
from timm.models.resnet import BasicBlock
from timm.optim import param_groups_layer_decay
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, stack_module_state, vmap

import timm_regnet_reg
from timm_regnet_reg.blocks import RegulatedStage
from timm_regnet_reg.networks import RegulatedResNet

CELLS = ('convrnn', 'convgru', 'convlstm')
IMAGENET = IN_TIMM + ('resnext50_2x40d', 'resnext50_4x24d', 'resnext50_8x14d')
CIFAR = tuple(f'{kind}{depth}' for kind in ('resnet', 'seresnet') for depth in (20, 32, 44, 56, 110))
PLAIN = tuple(f'cifar_{backbone}' for backbone in CIFAR)
MODELS = PLAIN + tuple(f'regnet_reg_{backbone}_{cell}' for backbone in IMAGENET + CIFAR for cell in CELLS)
# every backbone with one of the cells, in turn
SOME_CELLS = PLAIN + tuple(
    f'regnet_reg_{backbone}_{list(CELLS)[i % len(CELLS)]}' for i, backbone in enumerate(IMAGENET + CIFAR)
)


# All models


def backbone_of(name):
    return re.sub('^(cifar|regnet_reg)_|_conv.*$', '', name)


def is_cifar(name):
    return backbone_of(name) in CIFAR


def test_timm_lists_exactly_these_models():
    assert len(MODELS) == len(set(MODELS)) == 103
    assert sorted(timm.list_models(module='regnet_reg')) == sorted([*MODELS, 'regnet_reg'])
    assert set(timm.list_models('regnet_reg_*') + timm.list_models('cifar_*')) >= set(MODELS)
    assert not set(timm.list_models(module='regnet')) & set(MODELS)


@pytest.mark.parametrize('name', MODELS)
def test_entrypoint_can_be_looked_up_and_explains_itself(name):
    entrypoint = timm.model_entrypoint(name)
    assert entrypoint is getattr(timm_regnet_reg.regnet_reg, name)
    assert name in timm_regnet_reg.regnet_reg.__all__
    assert entrypoint.__name__ == entrypoint.__qualname__ == name
    assert entrypoint.__module__ == 'timm_regnet_reg.regnet_reg'
    pretrained, kwargs = inspect.signature(entrypoint).parameters.values()
    assert (pretrained.name, pretrained.default) == ('pretrained', False)
    assert (kwargs.name, kwargs.kind) == ('kwargs', inspect.Parameter.VAR_KEYWORD)
    text = pydoc.plain(pydoc.render_doc(entrypoint))
    assert f'{name}(pretrained' in text
    assert backbone_of(name) in text
    assert name.startswith('cifar_') or re.sub('.*_conv', 'conv', name) in text.lower()
    for word in ('pretrained:', 'regulated_stages', 'shortcut', 'features_only'):
        assert word in text


@pytest.mark.parametrize('name', SOME_CELLS)
def test_default_cfg_and_feature_info_describe_the_network(name):
    model = timm.create_model(name, device='meta').eval()
    cfg = model.default_cfg
    assert cfg is model.pretrained_cfg
    assert cfg['architecture'] == name
    if is_cifar(name):
        assert cfg['input_size'] == (3, 32, 32)
        assert cfg['num_classes'] == 10
        assert cfg['mean'] == pytest.approx((0.4914, 0.4822, 0.4465), abs=5e-4)  # of CIFAR-10's training images
        assert cfg['std'] == pytest.approx((0.2470, 0.2435, 0.2616), abs=5e-4)
    else:
        assert cfg['input_size'][0] == 3
        assert cfg['num_classes'] == 1000
        assert cfg['mean'] == IMAGENET_DEFAULT_MEAN
        assert cfg['std'] == IMAGENET_DEFAULT_STD
    assert isinstance(model.get_submodule(cfg['first_conv']), nn.Conv2d)
    assert isinstance(model.get_submodule(cfg['classifier']), nn.Linear)
    assert model.num_classes == model.get_submodule(cfg['classifier']).out_features == cfg['num_classes']

    images = torch.empty(2, *cfg['input_size'], device='meta')
    x, features = model.forward_intermediates(images)
    assert x.shape == (2, model.num_features, *cfg['pool_size'])
    info = FeatureInfo(model.feature_info, len(features))
    assert [f.shape[1] for f in features] == info.channels()
    assert [-(-images.shape[2] // f.shape[2]) for f in features] == info.reduction()
    assert info.module_name() == ['act1'] + [f'layer{i}' for i in range(1, len(features))]
    assert model(images).shape == (2, cfg['num_classes'])


ADDED = re.compile(
    r'layer\d\.(regulator\.(pointwise|depthwise|bias)'
    r'|\d+\.(regulator_bn|fusion_bn)\.(weight|bias|running_mean|running_var|num_batches_tracked)'
    r'|\d+\.fusion_conv_[xh]\.weight)'
)


@pytest.mark.parametrize('name', SOME_CELLS)
def test_plain_part_of_the_state_dict_is_timms_own(name):
    actual = {key: t.shape for key, t in timm.create_model(name, device='meta').state_dict().items()}
    if is_cifar(name):
        plain = timm.create_model(f'cifar_{backbone_of(name)}', device='meta')
    elif backbone_of(name) in IN_TIMM:
        plain = timm.create_model(backbone_of(name), device='meta')
    else:  # timm's block, in a network that timm has no name for
        C, d = re.match(r'resnext50_(\d+)x(\d+)d', backbone_of(name)).groups()
        plain = timm.create_model('resnext50_32x4d', device='meta', cardinality=int(C), base_width=int(d))
    added = [key for key in actual if ADDED.fullmatch(key)]
    assert bool(added) == (name not in PLAIN)
    assert [(key, shape) for key, shape in actual.items() if key not in added] == [
        (key, t.shape) for key, t in plain.state_dict().items()
    ]


@pytest.mark.parametrize(
    'name', [name for name in SOME_CELLS if not re.search('34|44|56|101|110|152', name)]
)  # the same blocks
def test_every_parameter_is_used_in_training(name):
    model = timm.create_model(name, device='meta').train()
    model(torch.empty(2, 3, 64, 64, device='meta')).sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


# A few models, with numbers

TINY = dict(layers=(2, 2, 1, 2), channels=(16, 32, 48, 64))
NETS = {
    'cifar': ('regnet_reg_resnet20_convlstm', {}),
    'cifar se pad': ('regnet_reg_seresnet20_convgru', dict(shortcut='pad')),
    'cifar plain': ('cifar_resnet20', {}),
    'basic': ('regnet_reg_resnet18_convrnn', TINY),
    'basic se': ('regnet_reg_seresnet34_convgru', TINY),
    'bottleneck': ('regnet_reg_resnet50_convlstm', TINY),
    'bottleneck d': ('regnet_reg_resnet50d_convgru', TINY),
    'se groups': ('regnet_reg_seresnext50_32x4d_convlstm', TINY),
    'wide': ('regnet_reg_wide_resnet50_2_convrnn', TINY),
    'partly': ('regnet_reg_resnet50_convgru', dict(TINY, regulated_stages=(1, 3))),
    'no shortcut': ('regnet_reg_resnet50_convrnn', dict(TINY, shortcut='none')),
}
REGULATED = [net for net in NETS if net != 'cifar plain']
ONE_OF_EACH = ['cifar', 'basic', 'bottleneck d', 'se groups', 'partly']  # has every cell, too


def create(net, **kwargs):
    name, model_kwargs = NETS[net]
    return timm.create_model(name, **dict(dict(model_kwargs, num_classes=7), **kwargs))


def lively(net, **kwargs):
    """A network in evaluation mode none of whose layers is at its neutral start."""
    return enliven(create(net, **kwargs))


def images(net, batch=2, size=None, channels=3, seed=0, **kwargs):
    size = size or ((32, 32) if net.startswith('cifar') else (64, 64))
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed)).to(**kwargs)


def assert_close(actual, expected, tolerance=1e-5, what=''):
    assert actual.shape == expected.shape, what
    actual, expected = actual.detach().double(), expected.detach().double()
    largest = expected.abs().max()
    assert largest > 1e-6, f'{what}: the comparison is empty'
    error = ((actual - expected).abs().max() / largest).item()
    assert error <= tolerance, f'{what} off by {error:.1e}'


def train_step(model, x, seed=0):
    """Outputs of a training step and gradients of all parameters, by name.

    To compare gradients take float64: batch statistics of few pixels make float32's rounding errors large.
    """
    torch.manual_seed(seed)
    model.zero_grad()
    outputs = model.train()(x)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    sum(o.square().mean() for o in outputs).backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize('net', NETS)
def test_head_and_features_come_apart(net):
    model = lively(net)
    x = images(net)
    with torch.no_grad():
        logits = model(x)
        features = model.forward_features(x)
        pre_logits = model.forward_head(features, pre_logits=True)
        assert_close(pre_logits, features.mean((2, 3)))
        assert torch.equal(model.forward_head(features), logits)
        assert torch.equal(model.get_classifier()(pre_logits), logits)
        assert model.get_classifier() is model.get_submodule(model.get_classifier(name_only=True))
        assert pre_logits.shape == (2, model.num_features) == (2, model.head_hidden_size)

        model.reset_classifier(5, 'max')
        assert torch.equal(model(x), model.fc(features.amax((2, 3))))
        model.reset_classifier(0)
        assert torch.equal(model(x), features.amax((2, 3)))
        model.reset_classifier(0, 'avg')
        assert torch.equal(model(x), pre_logits)
        model.reset_classifier(0, '')
        assert torch.equal(model(x), features)
        assert model.num_classes == 0

        assert lively(net, num_classes=0, global_pool='')(x).shape == features.shape
        assert lively(net, num_classes=0)(x).shape == pre_logits.shape
        assert lively(net, global_pool='catavgmax')(x).shape == logits.shape


@pytest.mark.parametrize('indices, wanted', [(None, [0, 1, 2, 3]), (2, [2, 3]), ([-1, 1], [1, 3]), ([0], [0])], ids=str)
@pytest.mark.parametrize('net', ['cifar', 'partly'])
def test_intermediate_features(net, indices, wanted):
    model = lively(net)
    x = images(net)
    if net == 'partly' and indices != [0]:
        indices = [i + 1 for i in wanted]  # it has a stage more
        wanted = indices
    taps = []
    for name in ['act1', *(info['module'] for info in model.feature_info[1:])]:
        model.get_submodule(name).register_forward_hook(lambda *args: taps.append(args[-1].clone()))
    with torch.no_grad():
        final, found = model.forward_intermediates(x, indices)
        assert torch.equal(final, model.forward_features(x))
        early, alone = model.forward_intermediates(x, indices, stop_early=True)
    assert len(found) == len(alone) == len(wanted)
    for i, feature, other in zip(wanted, found, alone):
        assert torch.equal(feature, taps[i]) and torch.equal(other, taps[i])
    assert torch.equal(early, taps[wanted[-1]] if wanted != [0] else model.maxpool(taps[0]))


@pytest.mark.parametrize('net', REGULATED)
def test_a_stages_last_block_gives_the_feature_map_alone(net):
    """What visual explanations hook, as `model.layer4[-1]` of a plain ResNet."""
    model = lively(net)
    stages = [info['module'] for info in model.feature_info[1:]]
    seen = {}
    for stage in stages:
        model.get_submodule(stage)[-1].register_forward_hook(lambda *args, stage=stage: seen.update({stage: args[-1]}))
    with torch.no_grad():
        features = model.forward_intermediates(images(net), intermediates_only=True)
    for stage, feature in zip(stages, features[1:]):
        assert torch.equal(seen[stage], feature)


def load_by_suffix(wrapper, model):
    """Load a feature extractor from the whole network; each kind puts the network under another prefix."""
    weights = model.state_dict()
    wrapper.load_state_dict(
        {key: weights[re.sub(r'^(body|model|graph_module)\.', '', key)] for key in wrapper.state_dict()}
    )
    return wrapper.eval()


@pytest.mark.parametrize(
    'net, indices',
    [('cifar', None), ('basic', None), ('bottleneck d', None), ('se groups', (1, 3)), ('partly', (-2,))],
    ids=str,
)
@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'fx', 'getter'])
def test_feature_extractors_give_the_intermediate_features(net, feature_cls, indices):
    model = lively(net)
    x = images(net)
    last = len(model.feature_info) - 1
    wanted = range(last + 1) if indices is None else [i % (last + 1) for i in indices]
    if feature_cls != 'getter' and indices:
        indices = tuple(wanted)  # timm's other extractors name their outputs by the index as it was given
    kwargs = {} if indices is None else dict(out_indices=indices)
    wrapper = load_by_suffix(create(net, features_only=True, feature_cls=feature_cls, **kwargs), model)
    with torch.no_grad():
        expected = model.forward_intermediates(x, list(wanted), intermediates_only=True)
        for _ in range(2):
            actual = wrapper(x)
            if feature_cls == 'dict':
                assert list(actual) == [str(i) for i in wanted]
                actual = list(actual.values())
            assert len(actual) == len(expected)
            for i, (a, e) in enumerate(zip(actual, expected)):
                # torch.fx traces the equations, which eager execution rounds in another order
                assert_close(a, e, 1e-5 if feature_cls == 'fx' else 0, f'feature {i}')
    assert wrapper.feature_info.channels() == [e.shape[1] for e in expected]
    assert wrapper.feature_info.reduction() == [x.shape[2] // e.shape[2] for e in expected]


@pytest.mark.parametrize('output_stride', [8, 16, 32])
@pytest.mark.parametrize('net', ['basic', 'bottleneck d', 'partly', 'no shortcut'])
def test_output_stride(net, output_stride):
    x = images(net, size=(65, 96))
    model = lively(net, output_stride=output_stride)
    theirs = lively(net, output_stride=output_stride, regulated_stages=())
    wrapper = load_by_suffix(create(net, features_only=True, output_stride=output_stride), model)
    reductions = [min(r, output_stride) for r in (2, 4, 8, 16, 32)]
    assert wrapper.feature_info.reduction() == reductions
    with torch.no_grad():
        features = wrapper(x)
        assert [f.shape[2:] for f in features] == [(-(-65 // r), 96 // r) for r in reductions]
        assert [f.shape for f in features] == [f.shape for f in theirs.forward_intermediates(x)[1]]
        assert torch.equal(model.forward_features(x), features[-1])


def test_output_stride_of_the_cifar_form():
    assert [f.shape[2] for f in create('cifar', output_stride=2, features_only=True)(images('cifar'))] == [
        32,
        32,
        16,
        16,
    ]
    for output_stride in (4, 8, 16, 32):
        wrapper = create('cifar', output_stride=output_stride, features_only=True)
        assert [f.shape[2] for f in wrapper(images('cifar'))] == [32, 32, 16, 8]
        assert wrapper.feature_info.reduction() == [1, 1, 2, 4]
    with pytest.raises(ValueError, match='2, 4, 8, 16 or 32'):
        create('cifar', output_stride=3)


@pytest.mark.parametrize('net', ONE_OF_EACH)
def test_pruned_network_keeps_the_features_asked_for(net):
    model = lively(net)
    x = images(net)
    last = len(model.feature_info) - 1
    with torch.no_grad():
        taps = model.forward_intermediates(x, intermediates_only=True)
        for indices, kept in [([1], [1]), ([0, 2], [0, 2]), (1, [last]), ([0], [0]), ([-2], [last - 1])]:
            pruned = copy.deepcopy(model)
            assert list(pruned.prune_intermediate_layers(indices)) == kept
            pruned.set_grad_checkpointing(net == 'partly')
            for a, i in zip(pruned.forward_intermediates(x, kept, intermediates_only=True), kept):
                assert torch.equal(a, taps[i])
            assert torch.equal(pruned(x), taps[max(kept)])
            assert pruned.num_features == pruned.head_hidden_size == taps[max(kept)].shape[1]
            assert not any(key.startswith(('fc', f'layer{max(kept) + 1}')) for key in pruned.state_dict())
        whole = copy.deepcopy(model)
        whole.prune_intermediate_layers(1, prune_head=False)
        assert torch.equal(whole(x), model(x))


@pytest.mark.parametrize('net', REGULATED)
def test_regulator_is_in_the_group_of_its_stages_first_block(net):
    model = create(net)
    for coarse in (False, True):
        group = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert set(group) == {name for name, _ in model.named_parameters()}
        plain = create(net, regulated_stages=())
        assert {name: group[name] for name, _ in plain.named_parameters()} == group_parameters(
            plain, plain.group_matcher(coarse=coarse), reverse=True
        )
        for name in group:
            if '.regulator.' in name:
                assert group[name] == group[name.split('.')[0] + '.0.conv1.weight']
            elif ADDED.fullmatch(name):
                assert group[name] == group[re.sub(r'(layer\d\.\d+).*', r'\1.conv1.weight', name)]

    scales = {}
    names = {p: name for name, p in model.named_parameters()}
    for params in param_groups_layer_decay(model, layer_decay=0.5):
        for p in params['params']:
            scales[names[p]] = params['lr_scale']
    assert set(scales) == set(names.values())
    regulators = [name for name in scales if '.regulator.' in name]
    assert regulators
    for name in regulators:
        stage = name.split('.')[0]
        assert scales[name] == scales[f'{stage}.0.conv1.weight'] < scales['fc.weight']
        assert scales[name] > scales['conv1.0.weight' if 'conv1.0.weight' in scales else 'conv1.weight']


# Gradient checkpointing


@pytest.mark.parametrize('net', ['cifar', 'basic se', 'bottleneck d', 'partly', 'cifar plain'])
def test_grad_checkpointing_changes_nothing_but_memory(net):
    model = lively(net, drop_path_rate=0.3).double()
    x = images(net, 4).double()
    expected, expected_grads = train_step(copy.deepcopy(model), x)
    model.set_grad_checkpointing()
    forwards = {}
    for name, block in model.named_modules():
        if re.fullmatch(r'layer\d\.\d', name):
            block.register_forward_pre_hook(lambda *_, name=name: forwards.update({name: forwards.get(name, 0) + 1}))
    plain_model = copy.deepcopy(model)
    actual, grads = train_step(model, x)
    assert set(forwards.values()) == {2}, 'every block runs again in backward'
    assert torch.equal(actual[0], expected[0])
    assert grads.keys() == expected_grads.keys()
    for name in grads:
        assert_close(grads[name], expected_grads[name], 1e-9, name)

    plain_model.set_grad_checkpointing(False)
    forwards.clear()
    train_step(plain_model, x)
    assert set(forwards.values()) == {1}


@pytest.mark.parametrize('feature_cls', ['list', 'hook', 'getter'])
@pytest.mark.parametrize('net', ['cifar', 'bottleneck', 'partly'])
def test_grad_checkpointing_of_feature_extractors(net, feature_cls):
    model = lively(net)
    x = images(net, 4).double()
    wrapper = load_by_suffix(create(net, features_only=True, feature_cls=feature_cls), model).double()
    expected, expected_grads = train_step(copy.deepcopy(wrapper), x)
    (wrapper.model if feature_cls == 'getter' else wrapper).set_grad_checkpointing(True)
    actual, grads = train_step(wrapper, x)
    for a, e in zip(actual, expected):
        assert torch.equal(a, e)
    for name in expected_grads:
        assert_close(grads[name], expected_grads[name], 1e-9, name)


# Inputs of every kind


@pytest.mark.parametrize('size', [(33, 33), (97, 97), (225, 225), (40, 72), (51, 34)], ids=str)
@pytest.mark.parametrize('net', ['cifar', 'basic', 'bottleneck', 'bottleneck d', 'no shortcut'])
def test_any_image_and_batch_size(net, size):
    model = lively(net)
    plain = lively(net, regulated_stages=(), shortcut='conv')
    x = images(net, 3, size)
    with torch.no_grad():
        final, features = model.forward_intermediates(x)
        assert [f.shape for f in features] == [f.shape for f in plain.forward_intermediates(x)[1]]
        assert all(f.isfinite().all() for f in features)
        logits = model(x)
        for i in range(3):
            assert_close(model(x[i : i + 1])[0], logits[i], 1e-4)


@pytest.mark.parametrize('in_chans', [1, 4])
@pytest.mark.parametrize('net', ['cifar', 'basic', 'bottleneck d'])
def test_images_of_other_channels(net, in_chans):
    model = lively(net, in_chans=in_chans)
    assert model.in_chans == in_chans
    assert model(images(net, channels=in_chans)).shape == (2, 7)


@pytest.mark.parametrize('net', NETS)
def test_channels_last_is_kept_through_the_network(net):
    model = lively(net)
    x = images(net)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    seen, lost = [], []

    def check(name):
        def hook(module, args, output):
            for i, t in enumerate(output if isinstance(output, tuple) else (output,)):
                if isinstance(t, torch.Tensor) and t.ndim == 4 and min(t.shape[1:]) > 1:
                    seen.append(name)
                    if not t.is_contiguous(memory_format=torch.channels_last):
                        lost.append(f'{name}[{i}]')

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(check(name))
    with torch.no_grad():
        assert_close(model(x), expected)
    train_step(model, x)
    assert lost == []
    assert {'layer1', 'layer2', 'layer3', 'layer1.0', 'layer1.1.conv1'} <= set(seen)

    model = lively(net).double()
    x = x.double()
    expected, expected_grads = train_step(copy.deepcopy(model), x.contiguous())
    actual, grads = train_step(model.to(memory_format=torch.channels_last), x)
    assert_close(actual[0], expected[0], 1e-9)
    for name in expected_grads:
        assert_close(grads[name], expected_grads[name], 1e-6, name)


@pytest.mark.parametrize('net', ['cifar', 'basic', 'bottleneck d', 'se groups'])
def test_precisions(net):
    model = lively(net).double()
    x = images(net).double()
    with torch.no_grad():
        expected = model(x)
        assert expected.dtype == torch.float64
        assert_close(copy.deepcopy(model).float()(x.float()), expected, 1e-4)
        for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02)):
            low = copy.deepcopy(model).to(dtype)(x.to(dtype))
            assert low.dtype == dtype
            assert_close(low, expected, tolerance, str(dtype))
        model, x = model.float(), x.float()
        with torch.autocast('cpu', torch.bfloat16):
            low = model(x)
        assert low.dtype == torch.bfloat16
        assert_close(low, expected, 0.1, 'autocast')
    with torch.autocast('cpu', torch.bfloat16):
        _, grads = train_step(model, x)
    for name, gradient in grads.items():
        assert gradient.dtype == torch.float32, name
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize('net', ['cifar se pad', 'se groups', 'no shortcut'])
def test_device_and_dtype_arguments(net):
    for dtype in (torch.float64, torch.bfloat16):
        model = create(net, dtype=dtype)
        assert {t.dtype for t in model.parameters()} == {dtype}
        assert model(images(net, dtype=dtype)).dtype == dtype
    model = create(net, device='meta')
    assert {t.device.type for t in model.state_dict().values()} == {'meta'}


# torch.func and forward-mode derivatives


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize('net', ONE_OF_EACH)
def test_ensembles_run_as_one_network(net, memory_format):
    models = [lively(net).to(memory_format=memory_format) for _ in range(2)]
    with torch.no_grad():
        for p in models[1].parameters():
            p.mul_(0.9)
    x = images(net).contiguous(memory_format=memory_format)
    stateless = copy.deepcopy(models[0]).to('meta')
    params, buffers = stack_module_state(models)
    actual = vmap(lambda *state: functional_call(stateless, state, (x,)))(params, buffers)
    for a, model in zip(actual, models):
        assert_close(a, model(x))


@pytest.mark.parametrize('net', ONE_OF_EACH)
def test_gradients_of_each_image_by_torch_func(net):
    model = lively(net).double()
    x = images(net).double()
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
    x, v = images(net).double(), images(net, seed=1).double()
    small = 1e-6
    expected = (model(x + small * v) - model(x - small * v)) / (2 * small)
    assert_close(jvp(model, (x,), (v,))[1], expected, 1e-4)
    with torch.no_grad(), forward_ad.dual_level():
        actual = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v))).tangent
    assert_close(actual, expected, 1e-4)


# Compilers and exporters


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize('net', ONE_OF_EACH + ['no shortcut'])
def test_compiles_to_one_graph(net, fresh_compiler):
    model = lively(net)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (2, 3, 5, 4):
        x = images(net, batch)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            assert_close(compiled(x), model(x))
    assert counter.frame_count == 1, 'another batch size compiled anew'


@pytest.mark.parametrize('net, checkpointing', [('cifar', True), ('basic se', False)])
def test_compiled_network_trains(net, checkpointing, fresh_compiler):
    model = lively(net, layers=(2, 1, 1, 1)[: 3 if net == 'cifar' else 4]).double()
    x = images(net, 4).double()
    expected, expected_grads = train_step(copy.deepcopy(model), x)
    model.set_grad_checkpointing(checkpointing)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    actual, grads = train_step(compiled, x)
    assert_close(actual[0], expected[0], 1e-9)
    for name in expected_grads:
        assert_close(grads[f'_orig_mod.{name}'], expected_grads[name], 1e-6, name)


def test_compiles_to_machine_code(fresh_compiler):
    model = lively('cifar', layers=(2, 1, 1), regulated_stages=(1,))
    x = images('cifar')
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True)(x), model(x))


@pytest.mark.parametrize('net', ['cifar', 'cifar se pad', 'basic', 'bottleneck', 'bottleneck d'])
def test_exports_for_any_batch_and_image_size(net):
    model = lively(net, layers=(2, 1, 1) if 'cifar' in net else TINY['layers'])
    if 'cifar' not in net and torch.__version__ < (2, 14):
        pytest.skip(f'torch {torch.__version__} exports pooling for either even or odd sizes')
    any_size = torch.export.Dim.AUTO
    exported = torch.export.export(model, (images(net),), dynamic_shapes=({0: any_size, 2: any_size, 3: any_size},))
    for batch, size in ((2, (64, 64)), (5, (65, 97)), (3, (80, 70))):
        x = images(net, batch, size)
        with torch.no_grad():
            assert_close(exported.module()(x), model(x), 1e-5, str(size))


@pytest.mark.parametrize('net', ONE_OF_EACH)
def test_scripts(net):
    model = lively(net)
    x = images(net)
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(model), stream)
    stream.seek(0)
    scripted = torch.jit.load(stream)
    with torch.no_grad():
        for size in (x.shape[2:], (65, 40)):
            x = images(net, 3, size)
            assert_close(scripted(x), model(x))
    expected, expected_grads = train_step(model.double(), x.double())
    actual, grads = train_step(scripted.double(), x.double())
    assert_close(actual[0], expected[0], 1e-9)
    for name in expected_grads:
        assert_close(grads[name], expected_grads[name], 1e-6, name)


@pytest.mark.parametrize('net', ['cifar', 'bottleneck d'])
def test_feature_extractor_scripts(net):
    layers = (2, 1, 1) if net == 'cifar' else TINY['layers']
    model = lively(net, layers=layers)
    x = images(net)
    for feature_cls in ('list', 'fx'):
        wrapper = load_by_suffix(create(net, features_only=True, feature_cls=feature_cls, layers=layers), model)
        with torch.no_grad():
            for a, e in zip(torch.jit.script(wrapper)(x), model.forward_intermediates(x, intermediates_only=True)):
                assert_close(a, e)


# Copies and state


@pytest.mark.parametrize('net', ['cifar', 'basic se'])
def test_a_stage_can_be_taken_away(net):
    """As detectors do that run a backbone's stages by themselves."""
    model = lively(net)
    del model.layer3
    model.layer2 = None
    assert not model.train().eval().training
    model.set_grad_checkpointing()
    x = images(net)
    [feature] = model.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True)
    assert torch.equal(feature, model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(x))))))
    model.reparameterize()
    assert_close(model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(x))))), feature)


@pytest.mark.parametrize('net', NETS)
def test_copies_and_files_hold_the_whole_network(net):
    model = lively(net)
    x = images(net)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    with torch.no_grad():
        expected = model(x)
        for other in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(stream, weights_only=False),
        ):
            assert torch.equal(other(x), expected)
            for p in other.parameters():
                p.add_(1)  # nothing is shared
        assert torch.equal(model(x), expected)
        fresh = create(net).eval()
        fresh.load_state_dict(model.state_dict(), strict=True)
        assert torch.equal(fresh(x), expected)


@pytest.mark.parametrize('net', NETS)
def test_no_state_survives_a_forward(net):
    model = lively(net)
    weights = copy.deepcopy(model.state_dict())
    x = images(net)
    with torch.no_grad():
        expected = model(x)
        for batch, size, seed in ((1, (40, 40), 1), (5, (33, 65), 2), (2, None, 3)):
            model(images(net, batch, size, seed=seed))
            assert torch.equal(model(x), expected)
    train_step(model, images(net, 4, seed=4))
    model.load_state_dict(weights)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), expected)
    assert not any(isinstance(value, torch.Tensor) for m in model.modules() for value in vars(m).values())


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


# Arguments


def test_drop_rates():
    model = lively('bottleneck', drop_path_rate=0.5, drop_block_rate=0.2, drop_rate=0.3)
    theirs = timm.create_model('resnet50', drop_path_rate=0.5, drop_block_rate=0.2, drop_rate=0.3, **TINY)
    drops = {
        name: (type(m), m.drop_prob)
        for name, m in model.named_modules()
        if name.endswith(('drop_path', 'drop_block')) and hasattr(m, 'drop_prob')
    }
    assert drops == {name: (type(m), m.drop_prob) for name, m in theirs.named_modules() if hasattr(m, 'drop_prob')}
    assert len(drops) == 6 + 3
    assert model.drop_rate == 0.3
    x = images('bottleneck')
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
        assert torch.equal(model(x), lively('bottleneck')(x))
        for kwargs in (dict(drop_path_rate=0.5), dict(drop_block_rate=0.2), dict(drop_rate=0.3)):
            model = lively('bottleneck', **kwargs).train()
            assert not torch.equal(model(x), model(x)), kwargs


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
        dict(stem_type='deep_tiered', stem_width=32, replace_stem_pool=True, avg_down=True),
        dict(block_reduce_first=2, down_kernel_size=3),
        dict(block_reduce_first=2, output_stride=8),
    ],
    ids=str,
)
@pytest.mark.parametrize('net', ['basic', 'bottleneck'])
def test_takes_what_timms_resnet_takes(net, kwargs):
    model = lively(net, **kwargs)
    theirs = timm.create_model(
        'resnet18' if net == 'basic' else 'resnet50', **dict(dict(TINY, num_classes=7), **kwargs)
    )
    assert set(theirs.state_dict()) <= set(model.state_dict())
    x = images(net)
    assert model(x).shape == theirs(x).shape
    _, grads = train_step(model, x)
    assert all(g.isfinite().all() for g in grads.values())
    plain = lively(net, regulated_stages=(), **kwargs)
    theirs.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(plain(x), theirs.eval()(x))
    norm = type(theirs.layer1[0].bn1)
    act = type(theirs.layer1[0].act1)
    for block in model.layer2:
        assert type(block.regulator_bn) is type(block.fusion_bn) is norm
        assert type(block.regulator_act) is type(block.fusion_act) is act


@pytest.mark.parametrize('stages', [(), (1,), (2, 3), [3, 1], None], ids=str)
def test_regulated_stages_are_those_asked_for(stages):
    for net, count in (('cifar', 3), ('basic', 4)):
        model = create(net, regulated_stages=stages)
        found = [i for i in range(1, count + 1) if isinstance(getattr(model, f'layer{i}'), RegulatedStage)]
        assert found == (sorted(stages) if stages is not None else list(range(1, count + 1)))


@pytest.mark.parametrize('net', ['cifar', 'bottleneck'])
def test_no_shortcut_leaves_no_path_around_a_block(net):
    model = lively(net, shortcut='none')
    assert not any('downsample' in key for key in model.state_dict())
    last = 'bn2' if net == 'cifar' else 'bn3'
    for stage in (model.layer1, model.layer3):
        for block in stage:
            nn.init.zeros_(getattr(block, last).weight)
            nn.init.zeros_(getattr(block, last).bias)
    for x in model.forward_intermediates(images(net), [1, 3], intermediates_only=True):
        assert not x.any()


@pytest.mark.parametrize(
    'net, kwargs, message',
    [
        ('basic', dict(regulated_stages=(5,)), r'\(5,\).*from 1 to 4'),
        ('basic', dict(regulated_stages=(0, 1)), r'\(0, 1\).*from 1 to 4'),
        ('cifar', dict(regulated_stages=(4,)), r'\(4,\).*from 1 to 3'),
        ('cifar', dict(regulated_stages=1), r'1.*tuple.*from 1 to 3'),
        ('cifar', dict(regulated_stages='all'), r"'all'.*from 1 to 3"),
        ('basic', dict(shortcut='pad'), r"'pad'.*conv, none"),
        ('cifar', dict(shortcut='identity'), r"'identity'.*conv, pad, none"),
        ('cifar', dict(shortcut='none', zero_init_last=True), 'zero_init_last'),
        ('basic', dict(in_chans=0), 'in_chans=0 .* 1 or more'),
        ('cifar', dict(in_chans=0), 'in_chans=0 .* 1 or more'),
        ('basic', dict(output_stride=7), 'Output stride 7 .*8, 16 or 32'),
        ('cifar', dict(output_stride=7), 'Output stride 7 .*2, 4, 8, 16 or 32'),
        ('basic', dict(features_only=True, out_indices=(5,)), r'out_indices=\(5,\) .* 0 to 4'),
        ('cifar', dict(features_only=True, out_indices=(-5,)), r'out_indices=\(-5,\) .* 0 to 3'),
        ('cifar', dict(features_only=True, out_indices=5), 'out_indices=5 .* from 1 to 4'),
        ('cifar', dict(features_only=True, out_indices=-1), 'out_indices=-1 .* from 1 to 4'),
        ('basic', dict(features_only=True, out_indices=()), r'out_indices=\(\) .* 0 to 4'),
        ('cifar', dict(channels=(32, 64, 128)), 'channels was given: the CIFAR form'),
        ('cifar', dict(stem_width=32, stem_type='deep'), 'stem_type, stem_width was given: the CIFAR form'),
        ('cifar', dict(replace_stem_pool=True), 'replace_stem_pool was given: the CIFAR form'),
    ],
    ids=str,
)
def test_bad_arguments_are_named(net, kwargs, message):
    with pytest.raises(ValueError, match=message):
        create(net, **kwargs)


def test_a_network_made_by_its_class_names_the_cells():
    with pytest.raises(ValueError, match=r"'lstm'.*convrnn, convgru, convlstm"):
        RegulatedResNet(BasicBlock, (1, 1, 1, 1), cell='lstm')


@pytest.mark.parametrize(
    'name, kwargs, is_what',
    [
        ('regnet_reg_resnet20_convgru', dict(cell='convlstm'), 'regulated by a convgru'),
        ('regnet_reg_resnet18_convrnn', dict(cell='lstm'), 'regulated by a convrnn'),
        ('cifar_resnet20', dict(cell='convlstm'), 'a plain network'),
        ('cifar_resnet20', dict(regulated_stages=(1,)), 'a plain network'),
    ],
    ids=str,
)
def test_a_network_is_what_its_name_says(name, kwargs, is_what):
    with pytest.raises(ValueError, match=f'{name} is {is_what}.*choose the model of that name'):
        timm.create_model(name, **kwargs)
    allowed = dict(regulated_stages=[]) if is_what == 'a plain network' else dict(cell=is_what.split()[-1])
    same, model = (timm.create_model(name, device='meta', **args) for args in (allowed, {}))
    assert str(same) == str(model)
