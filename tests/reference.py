"""SPEC.md's equations as plain functions of a state dict and tensors.

Nothing here comes from the package under test: cells, blocks, stages and networks are written down from the
equations, with the same symbols, one operation a line, in whatever dtype the tensors have (the tests use float64).
Only the names of the parameters are the package's. A state dict is a flat mapping of names to tensors, and
`within(sd, 'layer1.0')` is the part of it that belongs to one module.
"""

from typing import Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

StateDict = Dict[str, Tensor]

GATES = {'convrnn': ('h',), 'convgru': ('z', 'r', 'h'), 'convlstm': ('i', 'f', 'o', 'g')}


def within(sd: StateDict, prefix: str) -> StateDict:
    """The entries of `sd` below `prefix`, with the prefix taken off; the tensors are shared."""
    return {key[len(prefix) + 1 :]: value for key, value in sd.items() if key.startswith(prefix + '.')}


# Cells


def cell(
    kind: str, params: StateDict, X: Tensor, H: Optional[Tensor] = None, C: Optional[Tensor] = None
) -> Tuple[Tensor, Optional[Tensor]]:
    """One step of a regulator cell.

    Args:
        kind: A key of `GATES`.
        params: `pointwise` (G*N, 2, 1, 1), `depthwise` (G*N, 1, 3, 3) and `bias` (G*N), gate after gate.
        X: Input (B, N, height, width).
        H: Hidden state, of X's shape; None is zero.
        C: Memory of the ConvLSTM, of X's shape; None is zero. The others hand it back.

    Returns:
        The new H and C.
    """
    N = X.shape[1]

    def W(name: str, X: Tensor, H: Tensor) -> Tensor:
        """W_name * [X, H] plus its bias: N groups (X_c, H_c) -> 1, then a 3x3 kernel on each channel."""
        start = GATES[kind].index(name) * N
        pointwise, depthwise, bias = (params[key][start : start + N] for key in ('pointwise', 'depthwise', 'bias'))
        interleaved = torch.stack([X, H], dim=2).flatten(1, 2)  # X_0, H_0, X_1, H_1, …
        fused = F.conv2d(interleaved, pointwise, groups=N)
        return F.conv2d(fused, depthwise, bias, padding=1, groups=N)

    if H is None:
        H = torch.zeros_like(X)
    if kind == 'convrnn':
        return torch.tanh(W('h', X, H)), C
    if kind == 'convgru':
        z = torch.sigmoid(W('z', X, H))
        r = torch.sigmoid(W('r', X, H))
        H_tilde = torch.tanh(W('h', X, r * H))
        return (1 - z) * H + z * H_tilde, C
    if kind == 'convlstm':
        if C is None:
            C = torch.zeros_like(X)
        i = torch.sigmoid(W('i', X, H))
        f = torch.sigmoid(W('f', X, H))
        o = torch.sigmoid(W('o', X, H))
        g = torch.tanh(W('g', X, H))
        C = f * C + i * g
        return o * torch.tanh(C), C
    raise ValueError(f'no cell {kind!r}')


# Layers


def conv(x: Tensor, weight: Tensor, stride: int = 1, dilation: int = 1) -> Tensor:
    """Convolution without bias that keeps the size at stride 1; the weight's shape gives the groups."""
    padding = dilation * (weight.shape[-1] // 2)
    groups = x.shape[1] // weight.shape[1]
    return F.conv2d(x, weight, None, stride, padding, dilation, groups)


def batch_norm(sd: StateDict, x: Tensor, training: bool, eps: float = 1e-5, momentum: float = 0.1) -> Tensor:
    """Batch normalisation over (B, height, width); training updates the running statistics in `sd` in place."""
    if training:
        mean = x.mean((0, 2, 3))
        var = x.var((0, 2, 3), unbiased=False)
        with torch.no_grad():
            sd['running_mean'].copy_((1 - momentum) * sd['running_mean'] + momentum * mean)
            sd['running_var'].copy_((1 - momentum) * sd['running_var'] + momentum * x.var((0, 2, 3), unbiased=True))
            sd['num_batches_tracked'].add_(1)
    else:
        mean, var = sd['running_mean'], sd['running_var']

    def per_channel(v: Tensor) -> Tensor:
        return v[None, :, None, None]

    normal = (x - per_channel(mean)) / torch.sqrt(per_channel(var) + eps)
    return normal * per_channel(sd['weight']) + per_channel(sd['bias'])


def average_pool(x: Tensor) -> Tensor:
    """Mean over 2x2 windows, stride 2; the windows at the edge of an odd size average what is there."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (0, width % 2, 0, height % 2))
    there = F.pad(torch.ones_like(x), (0, width % 2, 0, height % 2))

    def total(v: Tensor) -> Tensor:
        return v[..., 0::2, 0::2] + v[..., 0::2, 1::2] + v[..., 1::2, 0::2] + v[..., 1::2, 1::2]

    return total(padded) / total(there)


def squeeze_excite(sd: StateDict, x: Tensor) -> Tensor:
    """Squeeze-and-Excitation, where the block has one."""
    if 'se.fc1.weight' not in sd:
        return x
    squeezed = x.mean((2, 3), keepdim=True)
    hidden = torch.relu(F.conv2d(squeezed, sd['se.fc1.weight'], sd['se.fc1.bias']))
    return x * torch.sigmoid(F.conv2d(hidden, sd['se.fc2.weight'], sd['se.fc2.bias']))


def add_shortcut(sd: StateDict, X1: Tensor, X: Tensor, stride: int, shortcut: str, training: bool) -> Tensor:
    """`X` plus the shortcut of `X1`: 'conv' (where the shape changes), 'pad' (option A), or 'none'."""
    if shortcut == 'none':
        return X
    if 'downsample.0.weight' in sd:
        assert shortcut == 'conv'
        convolved = conv(X1, sd['downsample.0.weight'], stride)
        return batch_norm(within(sd, 'downsample.1'), convolved, training) + X
    if shortcut == 'pad':
        # the papers don't say on which side the zeros go; half on each is what CIFAR ResNets in PyTorch do
        before = (X.shape[1] - X1.shape[1]) // 2
        widened = torch.zeros_like(X)
        widened[:, before : before + X1.shape[1]] = X1[:, :, ::stride, ::stride]
        X1 = widened
    return X1 + X


# Blocks


def regulate(sd, kind, cell_params, X2, H, C, training):
    """H = ReLU(BN(cell(X2, state))), which the block uses and hands on; C is handed on as it is."""
    H, C = cell(kind, cell_params, X2, H, C)
    return torch.relu(batch_norm(within(sd, 'regulator_bn'), H, training)), C


def fusion(sd: StateDict, X: Tensor, H: Tensor) -> Tensor:
    """conv1x1([X, H]); the kernel's parts for X and for H have names of their own."""
    weight = torch.cat([sd['fusion_conv_x.weight'], sd['fusion_conv_h.weight']], dim=1)
    return conv(torch.cat([X, H], dim=1), weight)


def basic_block(sd, X1, kind, cell_params, H, C, stride, first_dilation, dilation, shortcut, training):
    """Basic block, plain when `kind` is None: (B, channels, height, width) and state -> output and state."""
    X2 = conv(X1, sd['conv1.weight'], stride, first_dilation)
    X2 = torch.relu(batch_norm(within(sd, 'bn1'), X2, training))
    if kind is None:
        X3 = X2
    else:
        H, C = regulate(sd, kind, cell_params, X2, H, C, training)
        X3 = fusion(sd, X2, H)
        X3 = torch.relu(batch_norm(within(sd, 'fusion_bn'), X3, training))
    X4 = batch_norm(within(sd, 'bn2'), conv(X3, sd['conv2.weight'], 1, dilation), training)
    X4 = squeeze_excite(sd, X4)
    return torch.relu(add_shortcut(sd, X1, X4, stride, shortcut, training)), H, C


def bottleneck(sd, X1, kind, cell_params, H, C, stride, first_dilation, dilation, shortcut, training):
    """Bottleneck, plain when `kind` is None; its one 3x3 convolution takes the stride and the first dilation."""
    X2 = torch.relu(batch_norm(within(sd, 'bn1'), conv(X1, sd['conv1.weight']), training))
    X3 = conv(X2, sd['conv2.weight'], stride, first_dilation)
    X3 = torch.relu(batch_norm(within(sd, 'bn2'), X3, training))
    if kind is None:
        X4 = X3
    else:
        H, C = regulate(sd, kind, cell_params, X2 if stride == 1 else average_pool(X2), H, C, training)
        X4 = fusion(sd, X3, H)
        X4 = torch.relu(batch_norm(within(sd, 'fusion_bn'), X4, training))
    X5 = batch_norm(within(sd, 'bn3'), conv(X4, sd['conv3.weight']), training)
    X5 = squeeze_excite(sd, X5)
    return torch.relu(add_shortcut(sd, X1, X5, stride, shortcut, training)), H, C


# Stages and networks


def stage(
    sd: StateDict,
    x: Tensor,
    depth: int,
    kind: Optional[str] = None,
    stride: int = 1,
    first_dilation: int = 1,
    dilation: int = 1,
    shortcut: str = 'conv',
    training: bool = False,
) -> Tensor:
    """`depth` blocks that share one cell, whose state starts at zero; plain when `kind` is None."""
    block = bottleneck if '0.conv3.weight' in sd else basic_block
    cell_params = within(sd, 'regulator')
    H = C = None
    for t in range(depth):
        own = within(sd, str(t))
        x, H, C = block(own, x, kind, cell_params, H, C, stride, first_dilation, dilation, shortcut, training)
        stride, first_dilation = 1, dilation  # those given are the first block's
    return x


def network(
    sd: StateDict,
    x: Tensor,
    depths: Sequence[int],
    kind: Optional[str] = None,
    regulated_stages: Optional[Sequence[int]] = None,
    output_stride: int = 32,
    shortcut: str = 'conv',
    training: bool = False,
) -> Tensor:
    """Images (B, channels, height, width) -> logits.

    Args:
        sd: State dict of the network.
        x: Images.
        depths: Blocks of each stage. Four stages are the ImageNet form (7x7 stem of stride 2, max pooling), three the
            CIFAR form (3x3 stem).
        kind: Cell; None makes a plain network.
        regulated_stages: Stages, counted from 1, that have a regulator; None is all of them.
        output_stride: Stride from which on stages dilate instead, in the ImageNet form.
        shortcut: 'conv', 'pad' or 'none'.
        training: Normalise by the batch.
    """
    imagenet = len(depths) == 4
    x = conv(x, sd['conv1.weight'], 2 if imagenet else 1)
    x = torch.relu(batch_norm(within(sd, 'bn1'), x, training))
    if imagenet:
        x = F.max_pool2d(x, 3, 2, 1)
    reduction, dilation = (4 if imagenet else 1), 1
    for i, depth in enumerate(depths, start=1):
        stride, first_dilation = (1 if i == 1 else 2), dilation
        if imagenet and stride * reduction > output_stride:
            dilation *= stride
            stride = 1
        reduction *= stride
        own_kind = kind if regulated_stages is None or i in regulated_stages else None
        x = stage(within(sd, f'layer{i}'), x, depth, own_kind, stride, first_dilation, dilation, shortcut, training)
    return F.linear(x.mean((2, 3)), sd['fc.weight'], sd['fc.bias'])
