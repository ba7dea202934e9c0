"""`regulate`: any of timm's ResNets becomes a regulated network with the same weights and outputs."""

import copy
from typing import Optional, Sequence

import torch.nn as nn
from timm.models import ResNet

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
    for name in (info['module'] for info in model.feature_info[1:]):
        stage = getattr(model, name, None)
        if isinstance(stage, RegulatedStage):
            raise ValueError(f'{name} of the given network is regulated already. {_ACCEPTED}')
        if not isinstance(stage, nn.Sequential) or len(stage) == 0:
            raise ValueError(f'{name} of the given network has been pruned. {_ACCEPTED}')
        for block in stage:
            if type(block) not in REGULATED_BLOCKS:
                raise TypeError(f'{name} of the given network has a block {type(block).__name__}. {_ACCEPTED}')
        check_layers(name, stage)
        widths = {block.conv1.out_channels for block in stage}
        if len(widths) > 1:  # one cell reads all blocks of its stage
            told = f'has been pruned to blocks of different widths, {", ".join(map(str, sorted(widths)))}'
            raise ValueError(f'{name} of the given network {told}. {_ACCEPTED}')


def check_layers(name: str, stage: nn.Module) -> None:
    """Raise what `regulate` raises for layers of a stage, plain or regulated, that can't be started at the identity."""
    for block in stage:
        if type(block.act1) is not nn.ReLU:
            raise TypeError(f'{name} of the given network has activation {type(block.act1).__name__}. {_ACCEPTED}')
        for bn in (block.bn1, block.bn2):
            if not can_undo_itself(bn):
                told = f'{name} of the given network has normalisation {type(bn).__name__}'
                expected = 'a batch norm with trainable weights and running statistics. Freeze layers after regulating'
                raise TypeError(f'{told}, not {expected}. {_ACCEPTED}')


def add_regulators(model: ResNet, cell: str, stages: Optional[Sequence[int]]) -> None:
    """As `regulate`, but in place, of a network that passes `check_regulable`."""
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
    whose arguments are the backbone's name, its arguments as create_model recorded them, the cell and the stages.

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
    """
    check_regulable(model)
    model = copy.deepcopy(model)
    add_regulators(model, cell, stages)
    if hasattr(model, 'pretrained_cfg'):
        recorded = {'backbone': model.pretrained_cfg.get('architecture'), **getattr(model, '_model_args', {})}
        model._model_args = {**recorded, 'cell': cell, 'regulated_stages': stages}
        model.pretrained_cfg = model.default_cfg = dict(model.pretrained_cfg, architecture='regnet_reg')
    return model
