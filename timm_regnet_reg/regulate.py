"""`regulate`: any of timm's ResNets becomes a regulated network with the same weights and outputs."""

import copy
import warnings
from typing import Dict, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
from timm.models import ResNet, create_model, is_model
from timm.models._input import get_model_args

from .blocks import REGULATED_BLOCKS, RegulatedStage, can_undo_itself
from .networks import CifarRegulatedResNet, RegulatedResNet, check_cell, check_stages

_ACCEPTED = (
    'regulate() accepts a timm.models.ResNet of BasicBlock or Bottleneck blocks with ReLU and batch norm '
    '(timm.create_model of a resnet, resnext, seresnet, ecaresnet, resnetrs, wide_resnet, ...), '
    'whole and not yet regulated.'
)


def check_regulable(model: nn.Module) -> None:
    """Raise what `regulate` raises for a network that it can't take."""
    if type(model) not in (ResNet, RegulatedResNet, CifarRegulatedResNet):
        raise TypeError(f'A {type(model).__module__}.{type(model).__qualname__} was given. {_ACCEPTED}')
    blocks: Set[nn.Module] = set()
    for name in (info['module'] for info in model.feature_info[1:]):
        stage = getattr(model, name, None)
        if isinstance(stage, RegulatedStage):
            raise ValueError(f'{name} of the given network is regulated already. {_ACCEPTED}')
        if not isinstance(stage, nn.Sequential) or len(stage) == 0:
            raise ValueError(f'{name} of the given network has been pruned. {_ACCEPTED}')
        for block in stage:
            if block in blocks:
                raise ValueError(f'{name} of the given network has a block that it has already. {_ACCEPTED}')
            blocks.add(block)
            if type(block) not in REGULATED_BLOCKS:
                raise TypeError(f'{name} of the given network has a block {type(block).__name__}. {_ACCEPTED}')
        _check_layers(name, stage)
        widths = {block.conv1.out_channels for block in stage}
        if len(widths) > 1:  # one cell reads all blocks of its stage
            raise ValueError(
                f'{name} of the given network has been pruned to blocks of different widths, '
                f'{", ".join(map(str, sorted(widths)))}. {_ACCEPTED}'
            )


def check_regulated(model: RegulatedResNet) -> None:
    """Raise what `regulate` raises for layers of regulated stages that can't be started at the identity."""
    for name, stage in model.named_children():
        if isinstance(stage, RegulatedStage):
            _check_layers(name, stage)


def _check_layers(name: str, stage: nn.Module) -> None:
    for block in stage:
        if type(block.act1) is not nn.ReLU:
            raise TypeError(f'{name} of the given network has activation {type(block.act1).__name__}. {_ACCEPTED}')
        for bn in (block.bn1, block.bn2):
            if not can_undo_itself(bn):
                raise TypeError(
                    f'{name} of the given network has normalisation {type(bn).__name__}, not an affine batch norm '
                    f'with running statistics. {_ACCEPTED}'
                )


def _can_be_made_again(model: ResNet) -> bool:
    """Whether what timm writes about a network, when it saves it, makes the same network."""
    if not is_model(model.pretrained_cfg.get('architecture')):
        return False
    args = {**getattr(model, '_model_args', {}), **get_model_args(model)}  # the latter leave out drop rates

    def structure(model: nn.Module) -> Tuple[str, Dict[str, torch.Size]]:
        # synchronised batch norms have the weights and, in evaluation mode, the outputs of others
        layers = str(model).replace('SyncBatchNorm', 'BatchNorm2d')
        return layers, {key: tensor.shape for key, tensor in model.state_dict().items()}

    return structure(model) == structure(create_model(model.pretrained_cfg['architecture'], device='meta', **args))


def add_regulators(model: ResNet, cell: str, stages: Optional[Sequence[int]]) -> None:
    """Turn a network that passes `check_regulable` into a regulated one with the same outputs, in place.

    Args:
        model: The network.
        cell: 'convrnn', 'convgru' or 'convlstm'.
        stages: Stages to regulate, counted from 1; None for all.

    Raises:
        ValueError: The cell or a stage is unknown.
    """
    check_cell(cell)
    stages = check_stages(stages, len(model.feature_info) - 1)
    checkpointing = model.grad_checkpointing or any(
        getattr(stage, 'grad_checkpointing', False) for stage in model.children()
    )
    if type(model) is ResNet:
        # its arguments are known to timm's entrypoint alone, so that it can't be built anew as the subclass
        model.__class__ = RegulatedResNet
    model.grad_checkpointing = False  # the stages checkpoint themselves
    given = set(model.modules())
    bn = model.layer1[0].bn1
    synchronised = {'process_group': bn.process_group} if isinstance(bn, nn.SyncBatchNorm) else {}

    def norm_layer(channels: int, **kwargs) -> nn.Module:
        return type(bn)(channels, eps=bn.eps, momentum=bn.momentum, **synchronised, **kwargs)

    model.add_regulators(cell, stages, norm_layer)
    model.set_grad_checkpointing(checkpointing)
    for module in set(model.modules()) - given:
        module.training = model.training  # and not model.train(), which would wake batch norms that were put to eval


def regulate(model: ResNet, cell: str = 'convlstm', stages: Optional[Sequence[int]] = None) -> RegulatedResNet:
    """Turn a ResNet into a regulated network with the same weights and the same outputs.

    The regulators start where they change nothing in evaluation mode (up to rounding) and little in training mode,
    and learn from the first step on. The given network is copied and stays as it is; the copy's stages are new modules,
    without the hooks of the given ones.

    timm saves the result (`save_for_hf`, `push_to_hf_hub`) and makes it again (`create_model`) as model `regnet_reg`,
    whose arguments are the backbone's name, its arguments, the cell and the stages.

    Args:
        model: A timm.models.ResNet of BasicBlock or Bottleneck blocks with ReLU and batch norm, trained or not, with
            or without a classifier.
        cell: 'convrnn', 'convgru' or 'convlstm'.
        stages: Stages to regulate, counted from 1; None for all.

    Returns:
        The regulated network, on the same device, of the same type and in the same mode.

    Raises:
        TypeError: The network is of another class, or has other blocks, activations or normalisation.
        ValueError: The network is regulated or pruned already, or the cell or a stage is unknown.

    Warns:
        UserWarning: The network isn't what `timm.create_model` gives, and timm will refuse to save the result.
    """
    check_regulable(model)
    plain, model = model, copy.deepcopy(model)
    add_regulators(model, cell, stages)
    if hasattr(model, 'pretrained_cfg'):
        architecture = model.pretrained_cfg.get('architecture')
        args = {'backbone': architecture, **getattr(model, '_model_args', {}), 'cell': cell, 'regulated_stages': stages}
        if not _can_be_made_again(plain):
            warnings.warn(
                f'The given network is not what timm.create_model({architecture!r}) makes with the arguments that timm '
                'recorded, so timm will not save the regulated one. Make the network by timm.create_model with all its '
                'arguments, or give them to save_for_hf: model_args=dict(backbone=NAME, ...).',
                stacklevel=2,
            )
            args['backbone'] = type(plain)  # no JSON: save_for_hf raises an error that asks for a replacement
        model._model_args = args
        model.pretrained_cfg = model.default_cfg = dict(model.pretrained_cfg, architecture='regnet_reg')
    return model
