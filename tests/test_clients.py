"""Client libraries, really installed: what they do with a plain ResNet they do with a regulated one.

Compared are numbers, with torch's own, of networks in which the regulators' state counts: the start, at which a regulated
network is its plain backbone, would hide it.
"""

import copy

import pytest
import timm
import torch

import timm_regnet_reg  # noqa: F401, registers the models


def images(batch=2, seed=0, size=64):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def lively(name, **kwargs):
    """A network in evaluation mode with weights, fusions and batch statistics as after a training."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, zero_init_last=False, **kwargs)
    with torch.no_grad():
        for module_name, module in model.named_modules():
            if 'fusion_conv' in module_name or module_name.endswith('regulator'):
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter) / parameter[0].numel() ** 0.5)
        for seed in range(20):
            model.train()(images(4, seed))
    return model.eval()
