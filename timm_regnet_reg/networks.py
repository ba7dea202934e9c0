"""Regulated ResNets: timm's ResNet with regulated stages, in ImageNet and in CIFAR form.

Source: Xu et al., RegNet: Self-Regulated Network for Image Classification (arXiv 2101.00590).
"""

from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.layers import LayerType, get_norm_layer
from timm.models import ResNet
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck

from .blocks import BATCH_NORMS, PlainStage, RegulatedStage, ZeroPadShortcut, ZeroShortcut, fuse_batch_norms
from .cells import CELLS


class RegulatedResNet(ResNet):
    """timm's ResNet whose stages are regulated by a convolutional RNN, one cell a stage.

    The state dict is timm's plus, in each regulated stage, the cell (`layer1.regulator.*`) and in each of its blocks
    the normalised state (`regulator_bn`) and the fusion (`fusion_conv_x`, `fusion_conv_h`, `fusion_bn`). No state
    outlives a stage's forward.
    """

    shortcuts: Tuple[str, ...] = ('conv', 'none')
    output_strides: Tuple[int, ...] = (8, 16, 32)
    cell_weight_decay = True

    def __init__(
        self,
        block: Union[Type[BasicBlock], Type[Bottleneck]],
        layers: Tuple[int, ...],
        cell: str = 'convlstm',
        regulated_stages: Optional[Sequence[int]] = None,
        shortcut: str = 'conv',
        cell_weight_decay: bool = True,
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
            cell_weight_decay: Whether optimizers that timm makes decay the cells' weights, too.
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
        check_cell(cell)
        regulated_stages = check_stages(regulated_stages, len(layers))
        super().__init__(block, layers, norm_layer=norm_layer, zero_init_last=zero_init_last, **kwargs)
        self.cell_weight_decay = cell_weight_decay
        self._set_stem()
        self._set_shortcut(shortcut)
        self.add_regulators(cell, regulated_stages, get_norm_layer(norm_layer))

    @torch.jit.ignore
    def init_weights(self, zero_init_last: Optional[bool] = None) -> None:
        """As timm's ResNet, and the batch norms, cells and fusions; by default as the constructor does."""
        if zero_init_last is None:
            zero_init_last = not any(isinstance(module, ZeroShortcut) for module in self.modules())
        for module in self.modules():
            if isinstance(module, BATCH_NORMS):
                module.reset_parameters()  # to_empty left them uninitialised, and the fusions start from them
        super().init_weights(zero_init_last)
        for stage in self.stages():
            if isinstance(stage, RegulatedStage):
                stage.init_weights()

    def _set_stem(self) -> None:
        """For a form that has another stem than timm's ResNet."""

    def _set_shortcut(self, shortcut: str) -> None:
        if shortcut == 'conv':
            return
        for block in (block for stage in self.stages() for block in stage):
            if shortcut == 'none':
                block.downsample = ZeroShortcut()
            elif block.downsample is not None:
                new_channels = block.conv2.out_channels - block.conv1.in_channels
                block.downsample = ZeroPadShortcut(new_channels, block.stride)

    def add_regulators(self, cell: str, stages: Sequence[int], norm_layer: Callable[..., nn.Module]) -> None:
        """Regulate plain stages, counted from 1, in place; `norm_layer` makes a norm for a number of channels."""
        for i, stage in enumerate(self.stages(), start=1):
            new = RegulatedStage(stage, CELLS[cell], norm_layer) if i in stages else PlainStage(*stage)
            setattr(self, f'layer{i}', new)

    def stages(self) -> List[nn.Module]:
        """layer1, layer2, …, but for those that have been taken away."""
        stages = [getattr(self, info['module'], None) for info in self.feature_info[1:]]
        return [stage for stage in stages if stage]

    def reparameterize(self) -> None:
        """Fuse, in place, everything that is linear in evaluation mode; afterwards the network is for inference alone.

        `timm.utils.reparameterize_model` fuses a copy, and calls this method for a network inside another module. Of
        the network that it is given itself it reaches the stages, and leaves the stem's BN as it is.
        """
        for stage in self.stages():
            if hasattr(stage, 'reparameterize'):  # not a user's own
                stage.reparameterize()
        fuse_batch_norms(self)
        self.eval()

    def train(self, mode: bool = True) -> 'RegulatedResNet':
        """As nn.Module.train; a RuntimeError if a reparameterised network, which stays as it is, is to train."""
        for stage in self.stages():  # first: one that refuses leaves nothing half done
            stage.train(mode)
        return super().train(mode)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of the parameters that optimizers of timm's don't decay: none, or the cells'."""
        return set() if self.cell_weight_decay else {n for n, _ in self.named_parameters() if '.regulator.' in n}

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
        for stage in self.stages():  # each by itself, as the state of its blocks has to travel with them
            stage.grad_checkpointing = enable


class CifarRegulatedResNet(RegulatedResNet):
    """The CIFAR form: a 3x3 stem without pooling and three stages of basic blocks, 16, 32 and 64 channels wide."""

    shortcuts = ('conv', 'pad', 'none')
    output_strides = (2, 4, 8, 16, 32)

    def __init__(
        self,
        block: Type[BasicBlock],
        layers: Tuple[int, int, int],
        num_classes: int = 10,
        output_stride: int = 32,
        **kwargs,
    ) -> None:
        """
        Args:
            block: timm's BasicBlock.
            layers: Number of blocks of each of the three stages.
            num_classes: Classes.
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
            num_classes=num_classes,
            # a deep stem of width 8 leaves the 16 channels that the first stage needs; the stem itself is replaced
            stem_type='deep',
            stem_width=8,
            channels=(16, 32, 64),
            output_stride=min(4 * output_stride, 32),  # timm counts a stem of stride 4, and this one has stride 1
            **kwargs,
        )
        self.layer4 = nn.Sequential()  # empty, so that everything of timm's ResNet works
        stem, *stages = self.feature_info
        stem['reduction'] = 1
        for info in stages:
            info['reduction'] //= 4

    def _set_stem(self) -> None:
        """Before there are regulators: a seed gives plain and regulated networks the same backbone."""
        weight = self.layer1[0].conv1.weight
        self.conv1 = nn.Conv2d(self.in_chans, 16, 3, padding=1, bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
        self.maxpool = nn.Identity()

    def forward_intermediates(
        self, x: torch.Tensor, indices: Optional[Union[int, List[int]]] = None, *args: Any, **kwargs: Any
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """As timm's ResNet, with a feature less: there is no `layer4` that computes anything."""
        return super().forward_intermediates(x, feature_take_indices(4, indices)[0], *args, **kwargs)

    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """As timm's ResNet, with a feature less."""
        taken, last = feature_take_indices(4, indices)
        if last == 3 and not prune_head:  # of timm's ResNet, feature 3 isn't the last one
            return taken
        return super().prune_intermediate_layers(taken, prune_norm, prune_head)


def check_arguments(output_strides: Sequence[int], in_chans: int = 3, output_stride: int = 32, **_: Any) -> None:
    """Raise a ValueError for channels or a stride of which timm makes an error of its own, or a useless network."""
    if not isinstance(in_chans, int) or in_chans < 1:
        raise ValueError(f'in_chans={in_chans!r} was given: 1 or more channels of the images are expected.')
    if output_stride not in output_strides:
        raise ValueError(f'Output stride {output_stride!r} was given: one of {output_strides} is accepted.')


def check_cell(cell: str) -> None:
    """Raise a ValueError for a cell that there is not."""
    if cell not in CELLS:
        raise ValueError(f'Unknown cell {cell!r}: choose one of {", ".join(CELLS)}.')


def check_stages(stages: Optional[Sequence[int]], num_stages: int) -> Tuple[int, ...]:
    """The stages to regulate; None is all of them. Raises a ValueError for others than there are."""
    known = range(1, num_stages + 1)
    if stages is None:
        return tuple(known)
    if not isinstance(stages, (tuple, list)) or not set(stages) <= set(known):
        told = f'give a tuple of stage numbers from 1 to {num_stages}, such as (1,); None is all stages, () is none'
        raise ValueError(f'Unknown stages {stages!r}: {told}.')
    return tuple(stages)
