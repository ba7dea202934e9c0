"""The regulator cells' equations, one function a cell.

`W * [X, H]` fuses each pair `(X_c, H_c)` by a grouped 1x1 kernel, and a depthwise 3x3 kernel follows. With nothing
between them the two are one linear map, and are computed as one: two depthwise 3x3 convolutions, of `X` and of `H`,
whose kernels are the products of the pair's. Depthwise convolutions have fast kernels on every device; grouped ones
with two inputs a group do not.

Every function is one time step:

    X: Input (B, N, height, width).
    H: State of the step before, X's shape; None is the zero state.
    C: ConvLSTM's memory of the step before, X's shape; None is zero. The other cells have none.
    W: Kernels of all gates, see `Kernels`.
    Returns the new H and C, of X's shape; C is None for a cell without memory.

Source: Xu et al., RegNet: Self-Regulated Network for Image Classification (arXiv 2101.00590).
"""

from typing import List, Optional, Tuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import sigmoid, tanh

# of all G gates the kernels of X (G, N, 1, 3, 3), those of H (G, N, 1, 3, 3) and the biases (G, N); then the same three
# of the first gate alone, of the second, and so on, without the dimension G
Kernels = List[torch.Tensor]
State = Tuple[torch.Tensor, Optional[torch.Tensor]]  # H and C, (B, N, height, width) each


@torch.fx.wrap  # symbolic tracing can't follow its loop: a node of the graph instead, and so below
def kernels(K_x: torch.Tensor, K_h: torch.Tensor, b: torch.Tensor, gates: int) -> Kernels:
    """What the time steps of a stage are given, taken apart once for all of them.

    Of all G gates, `K_x` and `K_h` (G·N, 1, 3, 3) are the kernels of X and of H, and `b` (G·N,) the biases.
    """
    W = [K_x.unflatten(0, (gates, -1)), K_h.unflatten(0, (gates, -1)), b.unflatten(0, (gates, -1))]
    if gates == 1:  # Core ML's converter knows no single chunk
        return W + [K_x, K_h, b]
    # and not parts of the former three: torch-pruning would not end, as it takes them for reshaped feature maps
    for gate_x, gate_h, gate_b in zip(K_x.chunk(gates), K_h.chunk(gates), b.chunk(gates)):
        W += [gate_x, gate_h, gate_b]
    return W


@torch.fx.wrap
def split_gates(W: Kernels) -> List[Kernels]:
    """The kernels of each gate by itself."""
    return [W[first : first + 3] for first in range(3, len(W), 3)]


def conv(X: torch.Tensor, H: Optional[torch.Tensor], W: Kernels) -> torch.Tensor:
    """`W * [X, H]` of one gate, (B, N, height, width)."""
    K_x, K_h, b = W
    out = F.conv2d(X, K_x, b, padding=1, groups=X.shape[1])
    if H is not None:
        out = out + F.conv2d(H, K_h, padding=1, groups=X.shape[1])
    return out


def convrnn(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
    """H = tanh(W_h * [X, H])"""
    (W_h,) = split_gates(W)
    return tanh(conv(X, H, W_h)), C


def convgru(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
    """z, r = σ(W_{z,r} * [X, H]);  H~ = tanh(W_h * [X, r ⊙ H]);  H = (1 - z) ⊙ H + z ⊙ H~"""
    W_z, W_r, W_h = split_gates(W)
    z = sigmoid(conv(X, H, W_z))
    if H is None:
        return z * tanh(conv(X, None, W_h)), C
    r = sigmoid(conv(X, H, W_r))
    H_new = tanh(conv(X, r * H, W_h))
    return (1 - z) * H + z * H_new, C


def convlstm(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
    """i, f, o = σ(W_{i,f,o} * [X, H]);  g = tanh(W_g * [X, H]);  C = f ⊙ C + i ⊙ g;  H = o ⊙ tanh(C)"""
    W_i, W_f, W_o, W_g = split_gates(W)
    i = sigmoid(conv(X, H, W_i))
    o = sigmoid(conv(X, H, W_o))
    g = tanh(conv(X, H, W_g))
    C_new = i * g
    if C is not None:
        f = sigmoid(conv(X, H, W_f))
        C_new = f * C + C_new
    return o * tanh(C_new), C_new
