"""The regulator cells' equations.

Every gate convolves the input `X` and the state `H` together: a grouped 1x1 kernel fuses each pair `(X_c, H_c)` to
one channel, and a depthwise 3x3 kernel follows. With nothing between them the two are one linear map, and are
computed as one: two depthwise 3x3 convolutions, of `X` and of `H`, whose kernels are the products of the pair's.
Depthwise convolutions have fast kernels on every device; grouped ones with two inputs a group do not.

On a CPU these steps are bound by memory, so what is only of use within them is worked on in place.

Source: Xu et al., RegNet: Self-Regulated Network for Image Classification (arXiv 2101.00590).
"""

from typing import List, Optional, Tuple

import torch
import torch.fx
import torch.nn.functional as F

__all__ = ['Kernels', 'State', 'by_gate', 'conv', 'convgru', 'convlstm', 'convrnn', 'fusion', 'tanh']

Kernels = List[torch.Tensor]  # gate by gate: kernel of X (N, 1, 3, 3), kernel of H (N, 1, 3, 3), bias (N,)
State = Tuple[torch.Tensor, Optional[torch.Tensor]]  # H and C, (B, N, height, width) each


@torch.fx.wrap  # symbolic tracing can't follow its conditions: a node of the graph instead, and so below
def as_autocast(W: torch.Tensor) -> torch.Tensor:
    """A kernel in the type that autocast, where it is on, would convert it to in every convolution anew."""
    if not torch.jit.is_scripting():
        device = W.device.type
        if W.dtype != torch.float64 and device != 'meta' and torch.is_autocast_enabled(device):
            W = W.to(torch.get_autocast_dtype(device))
    return W


def by_gate(K_x: torch.Tensor, K_h: torch.Tensor, bias: torch.Tensor, channels: int) -> Kernels:
    """All gates' kernels of X and of H (G·N, 1, 3, 3) and biases (G·N,), for N = `channels`, gate by gate."""
    W: Kernels = []
    for W_x, W_h, b in zip(
        as_autocast(K_x).split(channels), as_autocast(K_h).split(channels), as_autocast(bias).split(channels)
    ):
        W += [W_x, W_h, b]
    return W


def conv(X: torch.Tensor, H: Optional[torch.Tensor], W: Kernels, gate: int) -> torch.Tensor:
    """`W * [X, H]` of one gate, a new tensor (B, N, height, width); H = None is the zero state and costs nothing."""
    W_x, W_h, b = W[3 * gate], W[3 * gate + 1], W[3 * gate + 2]
    out = F.conv2d(X, W_x, b, padding=1, groups=W_x.shape[0])
    return out if H is None else out.add_(F.conv2d(H, W_h, padding=1, groups=W_h.shape[0]))


@torch.fx.wrap
def tanh(x: torch.Tensor, times: Optional[torch.Tensor] = None) -> torch.Tensor:
    """tanh(x), or `times` ⊙ tanh(x).

    In float32 on the CPU, torch's tanh takes six times as long as its σ, so there it is 2σ(2x) - 1 = 1 - 2σ(-2x); with
    the product worked out, autograd keeps no more for it than for the product with tanh itself.
    """
    if x.device.type == 'cpu' and x.dtype == torch.float32:
        if times is None:
            return (2 * x).sigmoid_().mul(2).sub_(1)
        return torch.addcmul(times, times, (-2 * x).sigmoid_(), value=-2)
    y = torch.tanh(x)
    return y if times is None else times * y


def convrnn(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
    return tanh(conv(X, H, W, 0)), C


def convgru(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
    z = conv(X, H, W, 0).sigmoid_()
    if H is None:
        return tanh(conv(X, H, W, 2), times=z), C
    r = conv(X, H, W, 1).sigmoid_()
    H_new = tanh(conv(X, r * H, W, 2))
    return torch.addcmul(H, z, H_new - H), C  # (1 - z) ⊙ H + z ⊙ H~


def convlstm(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
    i = conv(X, H, W, 0).sigmoid_()
    C_new = tanh(conv(X, H, W, 3), times=i)  # i ⊙ g
    if C is not None:
        f = conv(X, H, W, 1).sigmoid_()
        C_new = torch.addcmul(C_new, f, C)
    o = conv(X, H, W, 2).sigmoid_()
    return tanh(C_new, times=o), C_new


def fusion(X: torch.Tensor, H: torch.Tensor, W: torch.Tensor, b: Optional[torch.Tensor]) -> torch.Tensor:
    """`W * [X, H]` with a 1x1 kernel (N_X, N_X + N_H, 1, 1), as the sum of a convolution of X and one of H."""
    W = as_autocast(W)
    N_X = W.shape[0]
    # not in place: under vmap either may have a dimension that the other lacks
    return F.conv2d(X, W[:, :N_X], b) + F.conv2d(H, W[:, N_X:])
