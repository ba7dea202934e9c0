"""The regulator cells' equations.

Every gate convolves the input `X` and the state `H` together: a grouped 1x1 kernel fuses each pair `(X_c, H_c)` to
one channel, and a depthwise 3x3 kernel follows. With nothing between them the two are one linear map, and are
computed as one: two depthwise 3x3 convolutions, of `X` and of `H`, whose kernels are the products of the pair's.
Depthwise convolutions have fast kernels on every device; grouped ones with two inputs a group do not.

Source: Xu et al., RegNet: Self-Regulated Network for Image Classification (arXiv 2101.00590).
"""

from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F

__all__ = ['Kernels', 'State', 'conv', 'convgru', 'convlstm', 'convrnn', 'fusion']

Kernels = List[torch.Tensor]  # gate by gate: kernel of X (N, 1, 3, 3), kernel of H (N, 1, 3, 3), bias (N,)
State = Tuple[torch.Tensor, Optional[torch.Tensor]]  # H and C, (B, N, height, width) each


def conv(X: torch.Tensor, H: Optional[torch.Tensor], W: Kernels, gate: int) -> torch.Tensor:
    """`W * [X, H]` of one gate, a new tensor (B, N, height, width); H = None is the zero state and costs nothing."""
    W_x, W_h, b = W[3 * gate], W[3 * gate + 1], W[3 * gate + 2]
    out = F.conv2d(X, W_x, b, padding=1, groups=W_x.shape[0])
    return out if H is None else out + F.conv2d(H, W_h, padding=1, groups=W_h.shape[0])


def convrnn(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
    return torch.tanh(conv(X, H, W, 0)), C


def convgru(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
    z = torch.sigmoid(conv(X, H, W, 0))
    if H is None:
        return z * torch.tanh(conv(X, H, W, 2)), C
    r = torch.sigmoid(conv(X, H, W, 1))
    H_new = torch.tanh(conv(X, r * H, W, 2))
    return (1 - z) * H + z * H_new, C


def convlstm(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
    i = torch.sigmoid(conv(X, H, W, 0))
    o = torch.sigmoid(conv(X, H, W, 2))
    g = torch.tanh(conv(X, H, W, 3))
    C_new = i * g
    if C is not None:
        f = torch.sigmoid(conv(X, H, W, 1))
        C_new = f * C + C_new
    return o * torch.tanh(C_new), C_new


def fusion(
    X: torch.Tensor,
    H: torch.Tensor,
    W_X: torch.Tensor,
    W_H: torch.Tensor,
    b: Optional[torch.Tensor],
) -> torch.Tensor:
    """`W * [X, H]` with a 1x1 kernel in two parts, (N_X, N_X, 1, 1) for X and (N_X, N_H, 1, 1) for H."""
    return F.conv2d(X, W_X, b) + F.conv2d(H, W_H)
