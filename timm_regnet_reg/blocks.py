"""Regulated residual blocks, and the stage that runs them as the time steps of one regulator cell.

A regulated block is timm's own block with three layers more, so its plain part keeps timm's state dict.

Source: Xu et al., RegNet: Self-Regulated Network for Image Classification (arXiv 2101.00590).
"""

import copy
import math
from typing import Callable, List, Optional, Tuple, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import checkpoint
from timm.models.resnet import BasicBlock, Bottleneck
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from .cells import FoldedCell, RegulatorCell
from .equations import fusion

__all__ = [
    'Fusion',
    'PlainStage',
    'RegulatedBasicBlock',
    'RegulatedBottleneck',
    'RegulatedStage',
    'ZeroPadShortcut',
    'ZeroShortcut',
    'can_undo_itself',
    'fold_batch_norms',
    'regulate_block',
]

BlockOutput = Tuple[torch.Tensor, torch.Tensor, Optional[torch.Tensor]]


class Fusion(nn.Module):
    """conv1x1([X, H]) without the concatenation: the sum of a 1x1 convolution of X and one of H.

    Not an nn.Conv2d, which takes one input: whoever looks for those by type would call it as one.
    """

    def __init__(self, X_channels: int, H_channels: int, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(X_channels, X_channels + H_channels, 1, 1, device=device, dtype=dtype))
        self.register_parameter('bias', None)  # a folded batch norm's will come here
        self.reset_parameters()

    @torch.jit.ignore
    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The kernel `[I, 0]`, which gives back X, whatever H is.

        In place of the zeros stands noise as small as a rounding error, so that a gradient reaches the cell at once.
        """
        N_X = self.weight.shape[0]
        nn.init.eye_(self.weight[:, :N_X, 0, 0])
        self.weight[:, N_X:].normal_(std=torch.finfo(self.weight.dtype).eps)

    def forward(self, X: torch.Tensor, H: torch.Tensor) -> torch.Tensor:
        """X (B, N_X, height, width) and H (B, N_H, height, width) to (B, N_X, height, width)."""
        return fusion(X, H, self.weight, self.bias)


class ZeroPadShortcut(nn.Module):
    """He et al.'s option A: every `stride`-th pixel, and zeros in the channels that are new."""

    def __init__(self, new_channels: int, stride: int) -> None:
        super().__init__()
        self.new_channels = new_channels
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = self.new_channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.new_channels - before))


class ZeroShortcut(nn.Module):
    """No residual connection: what is added to the residual branch is zero."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(1)


# not their subclasses, such as timm's, which may hold the activation as well, or statistics of parts of a batch
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def can_undo_itself(norm: nn.Module) -> bool:
    """Whether the norm is a batch norm whose weight and bias can take back what its running statistics do."""
    return type(norm) in BATCH_NORMS and norm.running_mean is not None and norm.weight is not None


class _RegulatedBlock(nn.Module):
    """What the two regulated blocks have in common."""

    @torch.jit.ignore
    @torch.no_grad()
    def start_at_identity(self) -> None:
        """Let the fusion give back its X: a regulated block starts as the plain block that it is made of.

        The fusion's BN undoes itself. For evaluation any mean and variance would do; so that batch statistics leave X
        as it is too, they are those of `X = ReLU(BN(·))`, which follow from that BN alone: its output is taken as
        normal with mean β and deviation |γ|. With other activations and norms than these the kernel alone is set.
        """
        self.fusion_conv.reset_parameters()
        bn, fusion_bn = self.bn1 if isinstance(self, BasicBlock) else self.bn2, self.fusion_bn
        if not can_undo_itself(bn) or type(self.act1) is not nn.ReLU:
            return
        beta, gamma = bn.bias.double(), bn.weight.double().abs().clamp(min=1e-12)
        cdf = torch.special.ndtr(beta / gamma)
        pdf = torch.exp(-((beta / gamma) ** 2) / 2) / math.sqrt(2 * math.pi)
        mean = beta * cdf + gamma * pdf
        var = ((beta**2 + gamma**2) * cdf + beta * gamma * pdf - mean**2).clamp(min=0)
        fusion_bn.running_mean.copy_(mean)
        fusion_bn.running_var.copy_(var)
        fusion_bn.weight.copy_((fusion_bn.running_var.double() + fusion_bn.eps).sqrt())
        fusion_bn.bias.copy_(fusion_bn.running_mean)

    def add_shortcut(self, X: torch.Tensor, X1: torch.Tensor) -> torch.Tensor:
        """The residual branch's X, after its attention and stochastic depth, plus the shortcut of the block's input."""
        if self.se is not None:
            X = self.se(X)
        if self.drop_path is not None:
            X = self.drop_path(X)
        shortcut = X1 if self.downsample is None else self.downsample(X1)
        X += shortcut
        return X


class RegulatedBasicBlock(_RegulatedBlock, BasicBlock):
    """timm's BasicBlock, regulated."""

    def forward(
        self,
        X1: torch.Tensor,
        W: List[torch.Tensor],
        H: Optional[torch.Tensor] = None,
        C: Optional[torch.Tensor] = None,
    ) -> BlockOutput:
        """One time step of the stage's regulator.

        Args:
            X1: Input (B, C_in, height, width).
            W: The kernels that the stage's cell gave.
            H: State left by the block before, (B, N, height, width) in this block's output size; None at the first.
            C: ConvLSTM's memory left by the block before, H's shape.

        Returns:
            The block's output (B, C_out, height / stride, width / stride), H and C for the next block.
        """
        X2 = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(X1)))))
        H, C = self.step(X2, H, C, W)
        H = self.regulator_act(self.regulator_bn(H))
        X3 = self.fusion_act(self.fusion_bn(self.fusion_conv(X2, H)))
        X4 = self.bn2(self.conv2(X3))
        return self.act2(self.add_shortcut(X4, X1)), H, C


class RegulatedBottleneck(_RegulatedBlock, Bottleneck):
    """timm's Bottleneck, regulated. Where the 3x3 strides, the cell reads X2 average-pooled to X3's size."""

    def forward(
        self,
        X1: torch.Tensor,
        W: List[torch.Tensor],
        H: Optional[torch.Tensor] = None,
        C: Optional[torch.Tensor] = None,
    ) -> BlockOutput:
        """As RegulatedBasicBlock.forward."""
        X2 = self.act1(self.bn1(self.conv1(X1)))
        H, C = self.step(self.regulator_pool(X2), H, C, W)
        H = self.regulator_act(self.regulator_bn(H))
        X3 = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(X2)))))
        X4 = self.fusion_act(self.fusion_bn(self.fusion_conv(X3, H)))
        X5 = self.bn3(self.conv3(X4))
        return self.act3(self.add_shortcut(X5, X1)), H, C


REGULATED_BLOCKS = {BasicBlock: RegulatedBasicBlock, Bottleneck: RegulatedBottleneck}


def regulate_block(
    block: nn.Module,
    cell: Type[RegulatorCell],
    norm_layer: Callable[..., nn.Module],
) -> None:
    """Turn a timm block into its regulated class, in place: it keeps its layers, gains new ones, and computes the same.

    Args:
        block: A BasicBlock or Bottleneck.
        cell: Class of the stage's cell.
        norm_layer: Makes a normalisation layer for a number of channels.
    """
    # what the block was made with is known to timm's builder alone, so that it can't be built anew as the subclass
    block.__class__ = REGULATED_BLOCKS[type(block)]
    X_conv = block.conv1 if isinstance(block, BasicBlock) else block.conv2  # makes what the fusion reads beside H
    dd = {'device': X_conv.weight.device, 'dtype': X_conv.weight.dtype}
    block.step = cell.step
    block.regulator_bn = norm_layer(block.conv1.out_channels, **dd)
    block.regulator_act = copy.deepcopy(block.act1)
    block.fusion_conv = Fusion(X_conv.out_channels, block.conv1.out_channels, **dd)
    block.fusion_bn = norm_layer(X_conv.out_channels, **dd)
    block.fusion_act = copy.deepcopy(block.act1)
    if isinstance(block, Bottleneck):
        # as the shortcut of a D variant pools: odd sizes match too
        block.regulator_pool = (
            nn.Identity()
            if block.stride == 1
            else nn.AvgPool2d(2, block.stride, ceil_mode=True, count_include_pad=False)
        )
    block.start_at_identity()


@torch.no_grad()
def fold_batch_norms(module: nn.Module) -> None:
    """Fold batch norms into the convolutions before them, in place; nn.Identity takes a folded one's place.

    Args:
        module: A block, stem, shortcut or whole network. Among its children, and within those that are an
            nn.Sequential, a BN registered right after a convolution is taken to follow it, as in all of timm's ResNets.
    """
    before = None
    for name, child in list(module.named_children()):
        is_bn = type(child) in BATCH_NORMS and child.running_mean is not None
        if is_bn and isinstance(before, (nn.Conv2d, Fusion)):
            before.weight, before.bias = fuse_conv_bn_weights(
                before.weight, before.bias, child.running_mean, child.running_var, child.eps, child.weight, child.bias
            )
            setattr(module, name, nn.Identity())
        before = child
        if type(child) is nn.Sequential:
            fold_batch_norms(child)
            before = child[-1] if len(child) else None


class _Stage(nn.Module):
    """What regulated and plain stages have in common: `timm.utils.reparameterize_model` folds them for inference."""

    folded = False

    def reparameterize(self) -> None:
        """Fold, in place, what is linear in evaluation mode; afterwards the stage is for inference alone."""
        for block in self:
            fold_batch_norms(block)
        self.folded = True
        self.eval()

    def train(self, mode: bool = True) -> nn.Module:
        """As nn.Module.train.

        Raises:
            RuntimeError: Training mode for a stage that has been folded.
        """
        if mode and self.folded:
            raise RuntimeError(
                'This network was reparameterised for inference, and trains no more: its batch norms and the separable '
                'kernels of its regulators are folded. Train the network that it was made from.'
            )
        return super().train(mode)


class PlainStage(_Stage, nn.Sequential):
    """A stage of timm's ResNet."""


class RegulatedStage(_Stage):
    """The blocks of a stage as the time steps of one regulator cell, whose state starts at zero.

    Not an nn.Sequential, so that nothing takes it apart and runs its blocks without the state; indexing, length and
    iteration give its blocks all the same. The blocks are children '0', '1', … and the cell is child 'regulator'.
    """

    def __init__(
        self,
        blocks: nn.Sequential,
        cell: Type[RegulatorCell],
        norm_layer: Callable[..., nn.Module],
    ) -> None:
        """
        Args:
            blocks: A stage of timm's ResNet; its blocks are reused.
            cell: Class of the cell.
            norm_layer: Makes a normalisation layer for a number of channels.
        """
        super().__init__()
        for name, block in blocks.named_children():
            regulate_block(block, cell, norm_layer)
            self.add_module(name, block)
        weight = blocks[0].conv1.weight
        self.regulator = cell(weight.shape[0], device=weight.device, dtype=weight.dtype)
        self.grad_checkpointing = False

    def reparameterize(self) -> None:
        super().reparameterize()
        for block in self:
            bn = block.regulator_bn
            # follows no convolution, and becomes one of its own: no batch norm is left for a runtime to deal with
            if type(bn) in BATCH_NORMS and bn.running_mean is not None:
                identity = nn.Conv2d(bn.num_features, bn.num_features, 1, groups=bn.num_features, bias=False)
                nn.init.ones_(identity.weight)
                block.regulator_bn = fuse_conv_bn_eval(identity.to(bn.running_mean).eval(), bn)
        if isinstance(self.regulator, RegulatorCell):
            self.regulator = FoldedCell(self.regulator)

    @torch.jit.ignore
    def start_at_identity(self) -> None:
        """Let every block start as the plain block that it is made of."""
        for block in self:
            block.start_at_identity()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """A new cell, and every block as the plain block that it is made of."""
        self.regulator.reset_parameters()
        self.start_at_identity()

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Initialise what no checkpoint gave, where transformers asks for it.

        It builds networks on the meta device, loads them, initialises what is missing in the layers that it knows, and
        then calls this method, timm's name for another purpose, on the module around them. Marked by then are the
        tensors that were loaded and the modules that it is done with. Anyone else's call changes nothing.
        """
        mark = '_is_hf_initialized'
        if hasattr(self.regulator, mark) and not hasattr(self, mark):
            state = self.state_dict(keep_vars=True)
            given = {name: tensor.clone() for name, tensor in state.items() if hasattr(tensor, mark)}
            self.init_weights()
            self.load_state_dict(given, strict=False)

    def __len__(self) -> int:
        return len(self._modules) - 1

    def __getitem__(self, index: int) -> nn.Module:
        return list(self)[index]

    def __iter__(self):
        return (m for name, m in self._modules.items() if name != 'regulator')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C_in, height, width) to (B, C_out, height / stride, width / stride)."""
        W = self.regulator()
        H: Optional[torch.Tensor] = None
        C: Optional[torch.Tensor] = None
        for block in self.children():
            if hasattr(block, 'fusion_conv'):  # in TorchScript the cell comes by too, and only hasattr is static
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    # not re-entrant: the kernels come in a list, and the state may be None
                    x, H, C = checkpoint(block, x, W, H, C, use_reentrant=False)
                else:
                    x, H, C = block(x, W, H, C)
        return x
