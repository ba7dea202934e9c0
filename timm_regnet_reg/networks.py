"""Regulated ResNets: timm's ResNet with regulated stages, in ImageNet and in CIFAR form, and `regulate`.

Source: Xu et al., RegNet: Self-Regulated Network for Image Classification (arXiv 2101.00590).
"""

import copy
import warnings
from collections import OrderedDict
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.layers import LayerType, get_norm_layer
from timm.models import ResNet, checkpoint_seq, create_model, is_model
from timm.models._features import feature_take_indices
from timm.models._input import get_model_args
from timm.models.resnet import BasicBlock, Bottleneck

from .blocks import (
    REGULATED_BLOCKS,
    PlainStage,
    RegulatedStage,
    ZeroPadShortcut,
    ZeroShortcut,
    can_undo_itself,
    fold_batch_norms,
)
from .cells import CELLS

__all__ = [
    'CifarRegulatedResNet',
    'RegulatedResNet',
    'add_regulators',
    'check_arguments',
    'check_regulable',
    'check_regulated',
    'regulate',
]


class RegulatedResNet(ResNet):
    """timm's ResNet whose stages are regulated by a convolutional RNN, one cell a stage.

    The state dict is timm's plus, in each regulated stage, the cell (`layer1.regulator.*`) and in each of its blocks
    the normalised state (`regulator_bn`) and the fusion (`fusion_conv`, `fusion_bn`). No state outlives a forward.
    """

    shortcuts: Tuple[str, ...] = ('conv', 'none')
    output_strides: Tuple[int, ...] = (8, 16, 32)

    def __init__(
        self,
        block: Union[Type[BasicBlock], Type[Bottleneck]],
        layers: Tuple[int, ...],
        cell: str = 'convlstm',
        regulated_stages: Optional[Sequence[int]] = None,
        shortcut: str = 'conv',
        norm_layer: LayerType = nn.BatchNorm2d,
        zero_init_last: Optional[bool] = None,
        **kwargs,
    ) -> None:
        """
        Args:
            block: timm's BasicBlock or Bottleneck.
            layers: Number of blocks of each stage.
            cell: 'convrnn', 'convgru' or 'convlstm'.
            regulated_stages: Stages with a regulator, counted from 1; None for all, () for the plain network.
            shortcut: 'conv', a 1x1 convolution and BN where the shape changes; 'pad', there every second pixel and
                zero channels (CIFAR form only); 'none', no residual connections.
            norm_layer: Normalisation layer.
            zero_init_last: Start every residual branch at zero; None does so where there are residual connections.
            **kwargs: What else timm's ResNet takes.

        Raises:
            ValueError: Unknown cell, stage or shortcut, a zero-initialised branch without residual connection, or
                `in_chans` or `output_stride` that no network can have.
        """
        check_arguments(self.output_strides, **kwargs)
        if shortcut not in self.shortcuts:
            raise ValueError(f'Unknown shortcut {shortcut!r}: {type(self).__name__} takes {", ".join(self.shortcuts)}.')
        if shortcut == 'none' and zero_init_last:
            raise ValueError("zero_init_last=True with shortcut='none' is a network whose blocks all give zero.")
        if zero_init_last is None:
            zero_init_last = shortcut != 'none'
        _check_cell(cell)
        regulated_stages = _check_stages(regulated_stages, len(layers))
        super().__init__(block, layers, norm_layer=norm_layer, zero_init_last=zero_init_last, **kwargs)
        self.num_stages = len(layers)
        self._set_shortcut(shortcut)
        self._regulate(cell, regulated_stages, get_norm_layer(norm_layer))

    @torch.jit.ignore
    def init_weights(self, zero_init_last: Optional[bool] = None) -> None:
        """As timm's ResNet, and the cells and fusions.

        Args:
            zero_init_last: Start every residual branch at zero; None does so where there are residual connections.
        """
        if zero_init_last is None:
            zero_init_last = not any(isinstance(module, ZeroShortcut) for module in self.modules())
        super().init_weights(zero_init_last)
        for stage in self.children():
            if isinstance(stage, RegulatedStage):
                stage.regulator.reset_parameters()
                stage.start_at_identity()

    def _set_shortcut(self, shortcut: str) -> None:
        if shortcut == 'conv':
            return
        for block in (block for stage in self._stages() for block in stage):
            if shortcut == 'none':
                block.downsample = ZeroShortcut()
            elif block.downsample is not None:
                new_channels = block.conv2.out_channels - block.conv1.in_channels
                block.downsample = ZeroPadShortcut(new_channels, block.stride)

    def _regulate(self, cell: str, stages: Sequence[int], norm_layer: Callable[..., nn.Module]) -> None:
        for i, stage in enumerate(self._stages(), start=1):
            if i in stages:
                stage = RegulatedStage(stage, CELLS[cell], norm_layer)
            else:
                stage = PlainStage(OrderedDict(stage.named_children()))
            setattr(self, f'layer{i}', stage)

    def _stages(self) -> List[nn.Module]:
        return [getattr(self, f'layer{i + 1}') for i in range(self.num_stages)]

    def reparameterize(self) -> None:
        """Fold, in place, everything that is linear in evaluation mode; afterwards the network is for inference alone.

        `timm.utils.reparameterize_model` folds a copy, and calls this method for a network inside another module. Of
        the network that it is given itself it reaches the stages, and leaves the stem's BN as it is.
        """
        for stage in self.children():
            if isinstance(stage, (PlainStage, RegulatedStage)):
                stage.reparameterize()
        fold_batch_norms(self)
        self.eval()

    def train(self, mode: bool = True) -> 'RegulatedResNet':
        """As nn.Module.train.

        Raises:
            RuntimeError: Training mode for a reparameterised network, which stays as it is.
        """
        for stage in self.children():
            if isinstance(stage, (PlainStage, RegulatedStage)):  # first: one that refuses leaves nothing half done
                stage.train(mode)
        return super().train(mode)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """As timm's ResNet; a stage's cell belongs with the stage's first block, where it first acts."""
        matcher = super().group_matcher(coarse=coarse)
        if not coarse:
            matcher['blocks'] = [(matcher['blocks'], None), (r'^layer(\d+)\.regulator', (0,))]
        return matcher

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute every block in backward instead of keeping its activations."""
        super().set_grad_checkpointing(enable)
        for stage in self.children():
            if isinstance(stage, RegulatedStage):
                stage.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """As timm's ResNet: the stem is feature 0, the stages follow.

        Args:
            x: Images (B, C, height, width).
            indices: The last n features if an int, all if None, the given ones if a sequence.
            norm: Has no effect: there is no final norm.
            stop_early: Leave out the stages after the last feature asked for.
            output_fmt: 'NCHW'.
            intermediates_only: Give back the features alone.

        Returns:
            The last stage's output and the list of features, or the list alone.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(1 + self.num_stages, indices)
        x = self.act1(self.bn1(self.conv1(x)))
        intermediates = [x] if 0 in take_indices else []
        x = self.maxpool(x)
        for i in range(1, 1 + (max_index if stop_early else self.num_stages)):
            stage = getattr(self, f'layer{i}')  # a stage that isn't needed may be gone
            x = self._checkpointed(stage, x) if self.grad_checkpointing else stage(x)
            if i in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self,
        indices: Union[int, List[int]] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> List[int]:
        """As timm's ResNet: drop what the given features don't need.

        Args:
            indices: The last n features if an int, the given ones if a sequence.
            prune_norm: Has no effect: there is no final norm.
            prune_head: Drop pooling and classifier.

        Returns:
            The indices of the features that are kept.
        """
        take_indices, max_index = feature_take_indices(1 + self.num_stages, indices)
        for i in range(max_index + 1, self.num_stages + 1):
            setattr(self, f'layer{i}', nn.Sequential())
        if max_index == 0:
            self.maxpool = nn.Identity()
        if max_index < self.num_stages:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
            prune_head = True
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    @staticmethod
    @torch.jit.unused
    def _checkpointed(stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
        # a regulated stage checkpoints its own blocks, as their state has to travel with them
        return checkpoint_seq(stage, x) if isinstance(stage, nn.Sequential) else stage(x)

    def forward_stages(self, x: torch.Tensor) -> torch.Tensor:
        """The stem's output (B, C, height, width) through all stages."""
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (B, C, height, width) to the last stage's output (B, num_features, H, W), smaller by its stride."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            for stage in self._stages():
                x = self._checkpointed(stage, x)
            return x
        return self.forward_stages(x)


class CifarRegulatedResNet(RegulatedResNet):
    """The CIFAR form: a 3x3 stem without pooling and three stages of basic blocks, 16, 32 and 64 channels wide."""

    shortcuts = ('conv', 'pad', 'none')
    output_strides = (2, 4, 8, 16, 32)

    def __init__(
        self,
        block: Type[BasicBlock],
        layers: Tuple[int, int, int],
        in_chans: int = 3,
        output_stride: int = 32,
        **kwargs,
    ) -> None:
        """
        Args:
            block: timm's BasicBlock.
            layers: Number of blocks of each of the three stages.
            in_chans: Channels of the image.
            output_stride: At most this stride, by dilation: 2, 4, which is the network's own, 8, 16 or 32.
            **kwargs: As RegulatedResNet.

        Raises:
            ValueError: As RegulatedResNet, or an argument that this form fixes.
        """
        check_arguments(self.output_strides, output_stride=output_stride)
        if fixed := kwargs.keys() & {'channels', 'stem_type', 'stem_width', 'replace_stem_pool'}:
            raise ValueError(f'{", ".join(sorted(fixed))} was given: the CIFAR form has a stem and widths of its own.')
        super().__init__(
            block,
            layers,
            in_chans=in_chans,
            # a deep stem of width 8 leaves the 16 channels that the first stage needs; the stem itself is replaced
            stem_type='deep',
            stem_width=8,
            channels=(16, 32, 64),
            output_stride=min(4 * output_stride, 32),  # timm counts a stem of stride 4, and this one has stride 1
            **kwargs,
        )
        weight = self.layer1[0].conv1.weight
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
        self.maxpool = nn.Identity()
        stem, *stages = self.feature_info
        stem['reduction'] = 1
        for info in stages:
            info['reduction'] //= 4

    def forward_stages(self, x: torch.Tensor) -> torch.Tensor:
        """The stem's output (B, 16, height, width) through all stages."""
        return self.layer3(self.layer2(self.layer1(x)))


def check_arguments(output_strides: Sequence[int], in_chans: int = 3, output_stride: int = 32, **_: Any) -> None:
    """Raise a ValueError for channels or a stride of which timm makes an error of its own, or a useless network."""
    if not isinstance(in_chans, int) or in_chans < 1:
        raise ValueError(f'in_chans={in_chans!r} was given: 1 or more channels of the images are expected.')
    if output_stride not in output_strides:
        *others, last = output_strides
        raise ValueError(
            f'Output stride {output_stride!r} was given: {", ".join(map(str, others))} or {last} is accepted.'
        )


def _check_cell(cell: str) -> None:
    if cell not in CELLS:
        raise ValueError(f'Unknown cell {cell!r}: choose one of {", ".join(CELLS)}.')


def _check_stages(stages: Optional[Sequence[int]], num_stages: int) -> Tuple[int, ...]:
    """The stages to regulate, sorted; None is all of them."""
    known = range(1, num_stages + 1)
    if stages is None:
        return tuple(known)
    if not isinstance(stages, (tuple, list)) or not set(stages) <= set(known):
        raise ValueError(
            f'Unknown stages {stages!r}: give a tuple of stage numbers from 1 to {num_stages}, such as (1,); '
            'None is all stages, () is none.'
        )
    return tuple(sorted(set(stages)))


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
    for i in range(1, 1 + getattr(model, 'num_stages', 4)):
        name = f'layer{i}'
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
    _check_cell(cell)
    stages = _check_stages(stages, getattr(model, 'num_stages', 4))
    if type(model) is ResNet:
        # its arguments are known to timm's entrypoint alone, so that it can't be built anew as the subclass
        model.__class__ = RegulatedResNet
        model.num_stages = 4
    given = set(model.modules())
    bn = model.layer1[0].bn1
    synchronised = {'process_group': bn.process_group} if isinstance(bn, nn.SyncBatchNorm) else {}

    def norm_layer(channels: int, **kwargs) -> nn.Module:
        return type(bn)(channels, eps=bn.eps, momentum=bn.momentum, **synchronised, **kwargs)

    model._regulate(cell, stages, norm_layer)
    model.set_grad_checkpointing(model.grad_checkpointing)
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
