"""Regulator cells: ConvRNN, ConvGRU and ConvLSTM with separable gates.

Every gate convolves the input `X` and the state `H` together: a grouped 1x1 kernel fuses each pair
`(X_c, H_c)` to one channel, and a depthwise 3x3 kernel follows. Without anything between them the two are
one linear map, so they are computed as one: two depthwise 3x3 convolutions, of `X` and of `H`, whose kernels
are the products of the pair's. Depthwise convolutions with as many outputs as inputs have fast kernels on every
device; grouped ones with two inputs do not.

Source: Xu et al., RegNet: Self-Regulated Network for Image Classification (arXiv 2101.00590).
"""
from typing import Callable, List, Optional, Tuple, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch.utils.checkpoint import checkpoint

__all__ = ['CELLS', 'ConvGRU', 'ConvLSTM', 'ConvRNN', 'RegulatorCell']

Kernels = List[torch.Tensor]  # per gate: kernel of X, kernel of H, bias
State = Tuple[torch.Tensor, Optional[torch.Tensor]]


def conv(X: torch.Tensor, H: Optional[torch.Tensor], W: Kernels, gate: int) -> torch.Tensor:
    """`W * [X, H]` of one gate, a new tensor (N, C, H, W); a zero state costs nothing."""
    W_x, W_h, b = W[3 * gate], W[3 * gate + 1], W[3 * gate + 2]
    out = F.conv2d(X, W_x, b, padding=1, groups=W_x.shape[0])
    if H is not None:
        out = out.add_(F.conv2d(H, W_h, padding=1, groups=W_h.shape[0]))
    return out


def tanh(x: torch.Tensor) -> torch.Tensor:
    """tanh; in float32 on the CPU, where torch's takes ten times as long as its sigmoid, 2σ(2x) - 1."""
    if not torch.jit.is_scripting():
        if x.device.type == 'cpu' and x.dtype == torch.float32 and not torch.compiler.is_compiling():
            return torch.sigmoid(2 * x).mul(2).sub_(1)
    return torch.tanh(x)


def convrnn(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
    return tanh(conv(X, H, W, 0)), C


def convgru(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
    z = conv(X, H, W, 0).sigmoid_()
    if H is None:
        return z * tanh(conv(X, None, W, 2)), C
    r = conv(X, H, W, 1).sigmoid_()
    H_new = tanh(conv(X, r * H, W, 2))
    return torch.lerp(H, H_new, z), C  # (1 - z) ⊙ H + z ⊙ H~


def convlstm(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
    i = conv(X, H, W, 0).sigmoid_()
    o = conv(X, H, W, 2).sigmoid_()
    g = tanh(conv(X, H, W, 3))
    if C is None:
        C_new = i * g
    else:
        f = conv(X, H, W, 1).sigmoid_()
        C_new = torch.addcmul(f * C, i, g)
    return o * tanh(C_new), C_new


class RegulatorCell(nn.Module):
    """A convolutional RNN cell with separable gates; the subclasses name their gates and their update.

    Parameters are stacked gate by gate, G gates of `channels` (N) rows each, in the order of `gates`:
    `pointwise` (G·N, 2, 1, 1), the weights of `(X_c, H_c)`; `depthwise` (G·N, 1, 3, 3); `bias` (G·N,).
    """
    gates: Tuple[str, ...] = ()
    update: Callable[..., State]

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        """
        Args:
            channels: Channels N of the input and of the state.
            device: Device of the parameters.
            dtype: Type of the parameters.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.channels = channels
        self.pointwise = nn.Parameter(torch.empty(len(self.gates) * channels, 2, 1, 1, **dd))
        self.depthwise = nn.Parameter(torch.empty(len(self.gates) * channels, 1, 3, 3, **dd))
        self.bias = nn.Parameter(torch.empty(len(self.gates) * channels, **dd))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Weights that keep the variance of what they sum, (He) without the gain of a ReLU; biases zero."""
        nn.init.kaiming_normal_(self.pointwise, nonlinearity='linear')
        nn.init.kaiming_normal_(self.depthwise, nonlinearity='linear')
        nn.init.zeros_(self.bias)

    def kernels(self) -> Kernels:
        """Each gate's kernel of X (N, 1, 3, 3), kernel of H (N, 1, 3, 3) and bias (N,), in the order of `gates`."""
        K_x, K_h = (self.pointwise * self.depthwise).split(1, dim=1)
        W: Kernels = []
        for w_x, w_h, b in zip(K_x.split(self.channels), K_h.split(self.channels), self.bias.split(self.channels)):
            W.extend([w_x, w_h, b])
        return W

    def forward(
            self,
            X: torch.Tensor,
            H: Optional[torch.Tensor] = None,
            C: Optional[torch.Tensor] = None,
    ) -> State:
        """One time step.

        Args:
            X: Input (B, N, height, width).
            H: State of the step before, X's shape; None is the zero state.
            C: ConvLSTM's memory of the step before, X's shape; None is zero. Other cells have none.

        Returns:
            The new H and C, of X's shape; C is None for a cell without memory.
        """
        return self.update(X, H, C, self.kernels())


class ConvRNN(RegulatorCell):
    """H' = tanh(W_h * [X, H])"""
    gates = ('h',)
    update = staticmethod(convrnn)


class ConvGRU(RegulatorCell):
    """z, r = σ(W_{z,r} * [X, H]);  H~ = tanh(W_h * [X, r ⊙ H]);  H' = (1 - z) ⊙ H + z ⊙ H~"""
    gates = ('z', 'r', 'h')
    update = staticmethod(convgru)


class ConvLSTM(RegulatorCell):
    """i, f, o = σ(W_{i,f,o} * [X, H]);  g = tanh(W_g * [X, H]);  C' = f ⊙ C + i ⊙ g;  H' = o ⊙ tanh(C')"""
    gates = ('i', 'f', 'o', 'g')
    update = staticmethod(convlstm)


CELLS = {'convrnn': ConvRNN, 'convgru': ConvGRU, 'convlstm': ConvLSTM}
