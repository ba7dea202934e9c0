"""Regulator cells: ConvRNN, ConvGRU and ConvLSTM, the modules that hold the gates' weights.

Source: Xu et al., RegNet: Self-Regulated Network for Image Classification (arXiv 2101.00590).
"""

from typing import Callable, Tuple

import torch
import torch.fx
import torch.nn as nn

from .equations import Kernels, State, by_gate, convgru, convlstm, convrnn

__all__ = ['CELLS', 'ConvGRU', 'ConvLSTM', 'ConvRNN', 'FoldedCell', 'RegulatorCell']


torch.fx.wrap('by_gate')  # symbolic tracing can't follow its loop: a node of the graph instead


class RegulatorCell(nn.Module):
    """A convolutional RNN cell with separable gates; the subclasses name their gates and their time step.

    The module makes the kernels, and the static `step(X, H, C, W)` computes a time step with them:
        X: Input (B, N, height, width).
        H: State of the step before, X's shape; None is the zero state.
        C: ConvLSTM's memory of the step before, X's shape; None is zero. Other cells have none.
        W: What `forward` gave.
        Returns the new H and C, of X's shape; C is None for a cell without memory.

    Parameters are stacked gate by gate, G gates of `channels` (N) rows each, in the order of `gates`:
    `pointwise` (G·N, 2, 1, 1), the weights of `(X_c, H_c)`; `depthwise` (G·N, 1, 3, 3); `bias` (G·N,).
    """

    gates: Tuple[str, ...] = ()
    step: Callable[..., State]

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
        rows = len(self.gates) * channels
        self.pointwise = nn.Parameter(torch.empty(rows, 2, 1, 1, **dd))
        self.depthwise = nn.Parameter(torch.empty(rows, 1, 3, 3, **dd))
        self.bias = nn.Parameter(torch.empty(rows, **dd))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """He's weights without the gain of a ReLU, which keep the variance of what they sum; biases zero."""
        nn.init.kaiming_normal_(self.pointwise, nonlinearity='linear')
        nn.init.kaiming_normal_(self.depthwise, nonlinearity='linear')
        nn.init.zeros_(self.bias)

    def products(self) -> Tuple[torch.Tensor, torch.Tensor]:
        """All gates' kernels of X and of H, each a product of a pointwise and a depthwise one, (G·N, 1, 3, 3)."""
        return self.pointwise[:, :1] * self.depthwise, self.pointwise[:, 1:] * self.depthwise

    def forward(self) -> Kernels:
        """The kernels of the time steps: each gate's kernel of X (N, 1, 3, 3), of H (N, 1, 3, 3) and bias (N,).

        A stage calls its cell once a forward, whatever the number of its steps, and hands the result to each `step`.
        """
        K_x, K_h = self.products()
        # cloned, as a view of a parameter says that it requires a gradient even under no_grad, and torch's counter of
        # operations, which meets the kernels as arguments of the blocks, then looks for one
        return by_gate(K_x, K_h, self.bias.clone(), self.channels)


class ConvRNN(RegulatorCell):
    """H' = tanh(W_h * [X, H])"""

    gates = ('h',)
    step = staticmethod(convrnn)


class ConvGRU(RegulatorCell):
    """z, r = σ(W_{z,r} * [X, H]);  H~ = tanh(W_h * [X, r ⊙ H]);  H' = (1 - z) ⊙ H + z ⊙ H~"""

    gates = ('z', 'r', 'h')
    step = staticmethod(convgru)


class ConvLSTM(RegulatorCell):
    """i, f, o = σ(W_{i,f,o} * [X, H]);  g = tanh(W_g * [X, H]);  C' = f ⊙ C + i ⊙ g;  H' = o ⊙ tanh(C')"""

    gates = ('i', 'f', 'o', 'g')
    step = staticmethod(convlstm)


class FoldedCell(nn.Module):
    """What is left of a cell for inference: the products of its kernels."""

    def __init__(self, cell: RegulatorCell) -> None:
        super().__init__()
        self.channels = cell.channels
        K_x, K_h = cell.products()
        self.K_x = nn.Parameter(K_x.detach(), requires_grad=False)
        self.K_h = nn.Parameter(K_h.detach(), requires_grad=False)
        self.bias = nn.Parameter(cell.bias.detach(), requires_grad=False)

    def forward(self) -> Kernels:
        """As RegulatorCell.forward."""
        return by_gate(self.K_x, self.K_h, self.bias, self.channels)


CELLS = {'convrnn': ConvRNN, 'convgru': ConvGRU, 'convlstm': ConvLSTM}
