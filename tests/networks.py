"""Networks that the tests compute with: small ones of every cell, block and form.

Their weights and statistics are random, as in a fresh network every residual branch gives zero.
"""

import copy
import math

import timm
import torch
from timm.layers import BlurPool2d

import timm_regnet_reg  # noqa: F401  (registers the models)

CELLS = ('convrnn', 'convgru', 'convlstm')
# the backbones of our models that timm has as well
IN_TIMM = tuple(
    'resnet18 resnet34 resnet50 resnet101 resnet152 resnet50d resnet101d wide_resnet50_2 seresnet18 seresnet34 '
    'seresnet50 seresnet101 seresnet152 resnext50_32x4d resnext101_32x4d resnext101_64x4d seresnext50_32x4d '
    'seresnext101_32x4d'.split()
)

TINY = dict(layers=(2, 1, 1, 2), channels=(16, 32, 48, 64))
TINY_CIFAR = dict(layers=(2, 1, 2))
NETS = {
    'cifar': ('regnet_reg_resnet20_convlstm', TINY_CIFAR),
    'cifar se pad': ('regnet_reg_seresnet20_convgru', dict(TINY_CIFAR, shortcut='pad')),
    'cifar plain': ('cifar_resnet20', TINY_CIFAR),
    'basic': ('regnet_reg_resnet18_convrnn', TINY),
    'basic se': ('regnet_reg_seresnet34_convgru', TINY),
    'basic blur': ('regnet_reg_resnet18_convlstm', dict(TINY, aa_layer=BlurPool2d)),
    'bottleneck': ('regnet_reg_resnet50_convlstm', TINY),
    'bottleneck d': ('regnet_reg_resnet50d_convgru', TINY),
    'bottleneck blur': ('regnet_reg_resnet50_convrnn', dict(TINY, aa_layer=BlurPool2d, replace_stem_pool=True)),
    'se groups': ('regnet_reg_seresnext50_32x4d_convlstm', TINY),
    'wide': ('regnet_reg_wide_resnet50_2_convrnn', TINY),
    'partly': ('regnet_reg_resnet50_convgru', dict(TINY, regulated_stages=(1, 3))),
    'no shortcut': ('regnet_reg_resnet50_convrnn', dict(TINY, shortcut='none')),
}
ONE_OF_EACH = ['cifar', 'basic', 'bottleneck d', 'se groups', 'partly']  # has every cell, too


@torch.no_grad()
def randomize(module, seed=0):
    """Random weights and statistics that leave no layer at its neutral start, rounded to float32."""
    generator = torch.Generator().manual_seed(seed)
    for path, m in module.named_modules():
        for name, p in list(m.named_parameters(recurse=False)) + list(m.named_buffers(recurse=False)):
            if name == 'num_batches_tracked':
                p.zero_()
            elif name == 'running_var' or (name == 'weight' and p.ndim == 1):
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


def create(net, **kwargs):
    name, model_kwargs = NETS[net]
    return timm.create_model(name, **{**model_kwargs, 'num_classes': 7, **kwargs})


def lively(net, **kwargs):
    return enliven(create(net, **kwargs))


def images(model, batch=2, size=None, seed=0):
    """Random images with the network's channels, of a size that is small for it; float32."""
    size = size or ((32, 32) if model.pretrained_cfg['input_size'][-1] == 32 else (64, 64))
    return torch.randn(batch, model.in_chans, *size, generator=torch.Generator().manual_seed(seed))


def train_step(model, x, seed=0):
    """Outputs of a training step and gradients of all parameters, by name.

    To compare gradients take float64: batch statistics of few pixels make float32's rounding errors large.
    """
    torch.manual_seed(seed)
    model.zero_grad()
    outputs = model.train()(x)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    sum(output.square().mean() for output in outputs).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {**{f'output {i}': output.detach() for i, output in enumerate(outputs)}, **gradients}


def assert_close(actual, expected, tolerance=1e-5, what=''):
    """Equal up to a tolerance relative to the largest value; lists and dicts element by element."""
    if not isinstance(expected, torch.Tensor):
        keys = expected.keys() if isinstance(expected, dict) else range(len(expected))
        assert len(actual) == len(expected)
        for key in keys:
            assert_close(actual[key], expected[key], tolerance, f'{what} {key}')
        return
    assert actual.shape == expected.shape, what
    actual, expected = actual.detach().double(), expected.detach().double()
    largest = expected.abs().max()
    assert largest > 1e-6, f'{what}: the comparison is empty'
    error = ((actual - expected).abs().max() / largest).item()
    assert error <= tolerance, f'{what} off by {error:.1e}'
