"""Regulated residual blocks, and the stage that runs them as the time steps of one regulator cell.

A regulated block is timm's own block with some layers more, so its plain part keeps timm's state dict.

Source: Xu et al., RegNet: Self-Regulated Network for Image Classification (arXiv 2101.00590).
"""

import copy
import math
from typing import Any, Callable, Dict, Iterator, List, Optional, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import checkpoint, checkpoint_seq
from timm.models.resnet import BasicBlock, Bottleneck
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_conv_bn_weights

from .cells import REPARAMETERIZED, RegulatorCell
from .equations import Kernels


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


def split_fusions(state_dict: Dict[str, Any], prefix: str = '') -> None:
    """Give fusions, in place, the names they have had since 0.3: until then X and H had one kernel, `fusion_conv`.

    All fusions, or only that of the block with the prefix (its name and a dot).
    """
    old = f'{prefix}fusion_conv.weight'
    for key in [key for key in state_dict if key == old or not prefix and key.endswith('.fusion_conv.weight')]:
        weight = state_dict.pop(key)
        N_X = len(weight)
        name = key.removesuffix('.weight')
        state_dict[f'{name}_x.weight'] = weight[:, :N_X].contiguous()
        state_dict[f'{name}_h.weight'] = weight[:, N_X:].contiguous()


class _RegulatedBlock(nn.Module):
    """What the two regulated blocks have in common."""

    __constants__ = ['is_last']

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        split_fusions(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def add_regulator(self, cell: Type[RegulatorCell], norm_layer: Callable[..., nn.Module], is_last: bool) -> None:
        """What makes of a plain block a regulated one, which computes the same."""
        self.step = cell.step
        self.is_last = is_last
        X_conv = self.conv1 if isinstance(self, BasicBlock) else self.conv2  # makes what the fusion reads beside H
        N_X, N_H = X_conv.out_channels, self.conv1.out_channels
        dd = {'device': X_conv.weight.device, 'dtype': X_conv.weight.dtype}
        self.regulator_bn = norm_layer(N_H, **dd)
        self.regulator_act = copy.deepcopy(self.act1)
        self.fusion_conv_x = nn.Conv2d(N_X, N_X, 1, bias=False, **dd)
        self.fusion_conv_h = nn.Conv2d(N_H, N_X, 1, bias=False, **dd)
        self.fusion_bn = norm_layer(N_X, **dd)
        self.fusion_act = copy.deepcopy(self.act1)
        if isinstance(self, Bottleneck):
            self.conv2_stride = X_conv.stride
            self.aa_stride = 1 if isinstance(self.aa, nn.Identity) else int(self.stride)
        self.start_at_identity()

    @torch.jit.ignore
    @torch.no_grad()
    def start_at_identity(self) -> None:
        """Let the fusion give back its X: a regulated block starts as the plain block that it is made of.

        The kernel is `[I, 0]`. In place of the zeros stands noise as small as a rounding error, so that a gradient
        reaches the cell at once. The fusion's BN undoes itself. For evaluation any mean and variance would do; so that
        batch statistics leave X as it is too, they are those of `X = ReLU(BN(·))`, which follow from that BN alone: its
        output is taken as normal with mean β and standard deviation |γ|. With other activations and norms than these
        the kernel alone is set.
        """
        nn.init.dirac_(self.fusion_conv_x.weight)
        nn.init.normal_(self.fusion_conv_h.weight, std=torch.finfo(self.fusion_conv_h.weight.dtype).eps)
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

    # what it returns is not annotated, as TorchScript would take the two for one type
    def forward(self, X1: torch.Tensor, W: Kernels, H: Optional[torch.Tensor] = None, C: Optional[torch.Tensor] = None):
        """One time step of the stage's regulator.

        Args:
            X1: Input (B, C_in, height, width).
            W: The kernels that the stage's cell gave.
            H: State left by the block before, (B, N, height, width) in this block's output size; None at the first.
            C: ConvLSTM's memory left by the block before, H's shape.

        Returns:
            The block's output (B, C_out, height / stride, width / stride), H and C for the next block; of a stage's
            last block the output alone.
        """
        X2 = self.aa(self.act1(self.drop_block(self.bn1(self.conv1(X1)))))
        H, C = self.step(X2, H, C, W)
        H = self.regulator_act(self.regulator_bn(H))
        X3 = self.fusion_act(self.fusion_bn(self.fusion_conv_x(X2) + self.fusion_conv_h(H)))
        X4 = self.bn2(self.conv2(X3))
        out = self.act2(self.add_shortcut(X4, X1))
        if self.is_last:
            return out
        return out, H, C


class RegulatedBottleneck(_RegulatedBlock, Bottleneck):
    """timm's Bottleneck, regulated. Where the 3x3 strides, the cell reads X2 average-pooled to X3's size."""

    def pool(self, X2: torch.Tensor) -> torch.Tensor:
        """X2 in X3's size, as the shortcut of a D variant pools: odd sizes match too."""
        # as it is now, for users set it to 1 to have denser features; an adapter in conv2's place may not tell
        stride = self.conv2.stride if hasattr(self.conv2, 'stride') else self.conv2_stride
        if isinstance(stride, int):
            stride = (stride, stride)
        kernel = (self.aa_stride * stride[0], self.aa_stride * stride[1])
        if kernel[0] == 1 and kernel[1] == 1:
            return X2
        return F.avg_pool2d(X2, kernel, kernel, ceil_mode=True, count_include_pad=False)

    def forward(self, X1: torch.Tensor, W: Kernels, H: Optional[torch.Tensor] = None, C: Optional[torch.Tensor] = None):
        """As RegulatedBasicBlock.forward."""
        X2 = self.act1(self.bn1(self.conv1(X1)))
        H, C = self.step(self.pool(X2), H, C, W)
        H = self.regulator_act(self.regulator_bn(H))
        X3 = self.aa(self.act2(self.drop_block(self.bn2(self.conv2(X2)))))
        X4 = self.fusion_act(self.fusion_bn(self.fusion_conv_x(X3) + self.fusion_conv_h(H)))
        X5 = self.bn3(self.conv3(X4))
        out = self.act3(self.add_shortcut(X5, X1))
        if self.is_last:
            return out
        return out, H, C


REGULATED_BLOCKS: Dict[type, type] = {BasicBlock: RegulatedBasicBlock, Bottleneck: RegulatedBottleneck}


@torch.no_grad()
def fuse_batch_norms(module: nn.Module) -> None:
    """Fuse batch norms with the convolutions before them, in place; nn.Identity takes a fused one's place.

    Among the children of a block or network, and within those that are an nn.Sequential, a BN registered right after a
    convolution is taken to follow it, as in all of timm's ResNets. Convolutions whose weight is made of parameters, and
    isn't one, stay as they are: pruned ones, say.
    """
    before: Any = None
    for name, child in list(module.named_children()):
        convs = [before, module.fusion_conv_x] if name == 'fusion_bn' else [before]
        can_fuse = all(type(conv) is nn.Conv2d and isinstance(conv.weight, nn.Parameter) for conv in convs)
        is_bn = type(child) in BATCH_NORMS and child.running_mean is not None
        if is_bn and can_fuse and name != 'regulator_bn':  # which follows no convolution
            for x_conv in convs[1:]:  # the BN is of the sum; its shift goes with H's part
                zero = torch.zeros_like(child.running_mean)
                x_conv.weight, bias = fuse_conv_bn_weights(
                    x_conv.weight, x_conv.bias, zero, child.running_var, child.eps, child.weight, zero
                )
                x_conv.bias = None if x_conv.bias is None else bias
            before.weight, before.bias = fuse_conv_bn_weights(
                before.weight, before.bias, child.running_mean, child.running_var, child.eps, child.weight, child.bias
            )
            setattr(module, name, nn.Identity())
        before = child
        if type(child) is nn.Sequential:
            fuse_batch_norms(child)
            before = child[-1] if len(child) else None


class _Stage(nn.Module):
    """What regulated and plain stages have in common."""

    reparameterized = False

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.grad_checkpointing = False

    def reparameterize(self) -> None:
        """Fuse, in place, what is linear in evaluation mode; afterwards the stage is for inference alone.

        `timm.utils.reparameterize_model` calls this.
        """
        for block in self:
            fuse_batch_norms(block)
        self.reparameterized = True
        self.eval()

    def train(self, mode: bool = True) -> nn.Module:
        """As nn.Module.train; a RuntimeError if a stage that has been reparameterised is to train."""
        if mode and self.reparameterized:
            raise RuntimeError(
                'This network was reparameterised for inference, and trains no more: its batch norms and the separable '
                'kernels of its regulators are fused. Train the network that it was made from; call eval() on this one.'
            )
        return super().train(mode)


class PlainStage(_Stage, nn.Sequential):
    """A stage of timm's ResNet."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C_in, height, width) to (B, C_out, height / stride, width / stride)."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self, x)
        for block in self:
            x = block(x)
        return x


class RegulatedStage(_Stage):
    """The blocks of a stage as the time steps of one regulator cell, whose state starts at zero and ends with it.

    Not an nn.Sequential, so that nothing takes it apart and runs its blocks without the state; indexing, length and
    iteration give its blocks all the same. The blocks are children '0', '1', … and the cell is child 'regulator'.
    """

    def __init__(self, blocks: nn.Sequential, cell: Type[RegulatorCell], norm_layer: Callable[..., nn.Module]) -> None:
        """Of a stage of timm's ResNet, whose blocks are reused; `norm_layer` makes a norm for a number of channels."""
        super().__init__()
        for i, block in enumerate(blocks):
            # what the block was made with is known to timm's builder alone, so that it can't be built anew
            block.__class__ = REGULATED_BLOCKS[type(block)]
            block.add_regulator(cell, norm_layer, is_last=i == len(blocks) - 1)
            self.add_module(str(i), block)
        weight = blocks[0].conv1.weight
        self.regulator = cell(weight.shape[0], device=weight.device, dtype=weight.dtype)

    def reparameterize(self) -> None:
        super().reparameterize()
        for block in self:
            bn = block.regulator_bn
            # follows no convolution, and becomes one of its own: no batch norm is left for a runtime to deal with
            if type(bn) in BATCH_NORMS and bn.running_mean is not None:
                identity = nn.Conv2d(bn.num_features, bn.num_features, 1, groups=bn.num_features, bias=False)
                nn.init.ones_(identity.weight)
                block.regulator_bn = fuse_conv_bn_eval(identity.to(bn.running_mean).eval(), bn)
        if type(getattr(self, 'regulator', None)) in REPARAMETERIZED:  # a cell of the user's stays as it is
            for block in self:
                del block.step
                # of its own: not all runtimes know shared layers
                block.step = REPARAMETERIZED[type(self.regulator)](self.regulator)
            del self.regulator

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
        if hasattr(self[0], mark) and not hasattr(self, mark):
            state = self.state_dict(keep_vars=True)
            given = {name: tensor.clone() for name, tensor in state.items() if hasattr(tensor, mark)}
            self.init_weights()
            self.load_state_dict(given, strict=False)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __getitem__(self, index: int) -> nn.Module:
        return list(self)[index]

    def __iter__(self) -> Iterator[nn.Module]:
        return (module for name, module in self._modules.items() if name != 'regulator')

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C_in, height, width) to (B, C_out, height / stride, width / stride)."""
        W: List[torch.Tensor] = []  # of a reparameterised stage, whose steps have theirs
        if hasattr(self, 'regulator'):
            W = self.regulator()
        H: Optional[torch.Tensor] = None
        C: Optional[torch.Tensor] = None
        for block in self.children():
            if hasattr(block, 'is_last'):  # in TorchScript the cell comes by too, and only hasattr is static
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    # not re-entrant: the kernels come in a list, and the state may be None
                    out = checkpoint(block, x, W, H, C, use_reentrant=False)
                else:
                    out = block(x, W, H, C)
                if block.is_last:
                    x = out
                else:
                    x, H, C = out
        return x
