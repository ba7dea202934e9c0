"""Regulator cells: ConvRNN, ConvGRU and ConvLSTM, the modules that hold the gates' weights.

Source: Xu et al., RegNet: Self-Regulated Network for Image Classification (arXiv 2101.00590).
"""

from typing import Callable, Dict, Optional, Tuple, Type

import torch
import torch.fx
import torch.nn as nn
from torch import sigmoid, tanh

from . import fused
from .equations import Kernels, State, convgru, convlstm, convrnn, kernels

torch.fx.wrap('kernels')  # the name that is called from here


@torch.fx.wrap  # symbolic tracing can't follow its conditions: a node of the graph instead
def as_autocast(K: torch.Tensor) -> torch.Tensor:
    """Kernels in the type that autocast, where it is on, would convert them to in every convolution anew."""
    if not torch.jit.is_scripting():
        device = K.device.type
        if K.dtype != torch.float64 and device != 'meta' and torch.is_autocast_enabled(device):
            K = K.to(torch.get_autocast_dtype(device))
    return K


class RegulatorCell(nn.Module):
    """A convolutional RNN cell with separable gates; the subclasses name their gates and their time step.

    The module makes the kernels; `step(X, H, C, W)` computes a time step with them, see `equations`.

    Parameters are stacked gate by gate, G gates of `channels` (N) rows each, in the order of `gates`:
    `pointwise` (G·N, 2, 1, 1), the weights of `(X_c, H_c)`; `depthwise` (G·N, 1, 3, 3); `bias` (G·N,).
    """

    gates: Tuple[str, ...] = ()
    step: Callable[..., State]

    def __init__(self, channels: int, device=None, dtype=None) -> None:
        """`channels` is N, of the input and of the state."""
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.channels, self.num_gates = channels, len(self.gates)
        rows = self.num_gates * channels
        self.pointwise = nn.Parameter(torch.empty(rows, 2, 1, 1, **dd))
        self.depthwise = nn.Parameter(torch.empty(rows, 1, 3, 3, **dd))
        self.bias = nn.Parameter(torch.empty(rows, **dd))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Kaiming initialisation without the gain of a ReLU, which keeps the variance of the sums; biases zero."""
        nn.init.kaiming_normal_(self.pointwise, nonlinearity='linear')
        nn.init.kaiming_normal_(self.depthwise, nonlinearity='linear')
        nn.init.zeros_(self.bias)

    def merged_kernels(self) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All gates' kernels of X and of H (G·N, 1, 3, 3), products of pointwise and depthwise, and biases (G·N,)."""
        # not [:, :1], which torch-pruning takes for a part of the channels
        return self.pointwise[:, 0, None] * self.depthwise, self.pointwise[:, 1, None] * self.depthwise, self.bias

    def forward(self) -> Kernels:
        """The kernels of the time steps.

        A stage calls its cell once a forward, whatever the number of its steps, and hands the result to each `step`.
        """
        K_x, K_h, b = self.merged_kernels()
        # cloned, as a view of a parameter says that it requires a gradient even under no_grad, and torch's counter of
        # operations, which meets the kernels as arguments of the blocks, then looks for one
        return kernels(as_autocast(K_x), as_autocast(K_h), as_autocast(b.clone()), self.num_gates)


class ConvRNN(RegulatorCell):
    __doc__ = convrnn.__doc__
    gates = ('h',)
    step = staticmethod(convrnn)


class ConvGRU(RegulatorCell):
    __doc__ = convgru.__doc__
    gates = ('z', 'r', 'h')
    step = staticmethod(fused.convgru)


class ConvLSTM(RegulatorCell):
    __doc__ = convlstm.__doc__
    gates = ('i', 'f', 'o', 'g')
    step = staticmethod(fused.convlstm)


CELLS = {'convrnn': ConvRNN, 'convgru': ConvGRU, 'convlstm': ConvLSTM}


# For inference: the equations once more, of standard layers, for runtimes that know nothing else


class _Gate(nn.Module):
    """`W * [X, H]` of one gate: two depthwise convolutions and their sum."""

    def __init__(self, K_x: torch.Tensor, K_h: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        N = len(b)
        args = dict(kernel_size=3, padding=1, groups=N, device=b.device, dtype=b.dtype)
        self.conv_x = nn.Conv2d(N, N, **args)
        self.conv_h = nn.Conv2d(N, N, bias=False, **args)
        self.conv_x.load_state_dict({'weight': K_x, 'bias': b})
        self.conv_h.load_state_dict({'weight': K_h})

    def forward(self, X: torch.Tensor, H: Optional[torch.Tensor]) -> torch.Tensor:
        out = self.conv_x(X)
        if H is not None:
            out = out + self.conv_h(H)
        return out


class _Step(nn.Module):
    """A cell's time step, called as those of `equations`; it has its kernels and ignores W."""

    def __init__(self, cell: RegulatorCell) -> None:
        super().__init__()
        for name, *W in zip(cell.gates, *(K.detach().chunk(cell.num_gates) for K in cell.merged_kernels())):
            self.add_module(name, _Gate(*W))


class _ConvRNNStep(_Step):
    def forward(self, X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
        return tanh(self.h(X, H)), C


class _ConvGRUStep(_Step):
    def forward(self, X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
        z = sigmoid(self.z(X, H))
        if H is None:
            return z * tanh(self.h(X, None)), C
        r = sigmoid(self.r(X, H))
        return (1 - z) * H + z * tanh(self.h(X, r * H)), C


class _ConvLSTMStep(_Step):
    def forward(self, X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
        C_new = sigmoid(self.i(X, H)) * tanh(self.g(X, H))
        if C is not None:
            C_new = sigmoid(self.f(X, H)) * C + C_new
        return sigmoid(self.o(X, H)) * tanh(C_new), C_new


REPARAMETERIZED: Dict[type, Type[_Step]] = {ConvRNN: _ConvRNNStep, ConvGRU: _ConvGRUStep, ConvLSTM: _ConvLSTMStep}
