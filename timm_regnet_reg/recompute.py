"""The cells' time step for eager execution: in place, and with backward passes that compute the gates again.

Plain autograd would keep every gate of every block until the backward pass. Here a step keeps what lives on anyway:
its inputs and results. What it computes is what `equations` says; whatever traces, compiles or differentiates twice
takes those equations themselves.
"""
from typing import Any, Callable, List, Optional, Tuple

import torch
import torch.fx

from . import equations
from .equations import Kernels, State, conv

__all__ = ['convgru', 'convlstm', 'convrnn']

OptTensor = Optional[torch.Tensor]
Delta = Tuple[int, torch.Tensor]  # a gate, and the gradient of its convolution's result
sigmoid_backward = torch.ops.aten.sigmoid_backward
tanh_backward = torch.ops.aten.tanh_backward


def tanh_(x: torch.Tensor) -> torch.Tensor:
    """tanh in place; as 2σ(2x) - 1 in float32 on the CPU, where torch's tanh takes ten times as long as its sigmoid."""
    if x.device.type == 'cpu' and x.dtype == torch.float32:
        return x.mul_(2).sigmoid_().mul_(2).sub_(1)
    return x.tanh_()


def conv_backward(
        deltas: List[Delta],
        X: torch.Tensor,
        H: OptTensor,
        W: Kernels,
        dW: List[OptTensor],
) -> Tuple[torch.Tensor, OptTensor]:
    """Gradients of X and H through `conv` of some gates; those of the gates' kernels go into dW."""
    dX: OptTensor = None
    dH: OptTensor = None

    def backward(delta: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> List[torch.Tensor]:
        return torch.ops.aten.convolution_backward(
            delta, x, w, None, (1, 1), (1, 1), (1, 1), False, (0, 0), w.shape[0], (True, True, False))

    for gate, delta in deltas:
        dx, dW[3 * gate], _ = backward(delta, X, W[3 * gate])
        dX = dx if dX is None else dX.add_(dx)
        if H is not None:
            dh, dW[3 * gate + 1], _ = backward(delta, H, W[3 * gate + 1])
            dH = dh if dH is None else dH.add_(dh)
        dW[3 * gate + 2] = delta.sum((0, 2, 3))
    return dX, dH


class ConvRNNStep:
    equations = staticmethod(equations.convrnn)

    @staticmethod
    def forward(X: torch.Tensor, H: OptTensor, C: OptTensor, W: Kernels) -> State:
        return tanh_(conv(X, H, W, 0)), None

    @staticmethod
    def backward(X, H, C, H_new, C_new, W, gH, gC, dW) -> Tuple[OptTensor, ...]:
        return (*conv_backward([(0, tanh_backward(gH, H_new))], X, H, W, dW), None)


class ConvGRUStep:
    equations = staticmethod(equations.convgru)

    @staticmethod
    def forward(X: torch.Tensor, H: OptTensor, C: OptTensor, W: Kernels) -> State:
        z = conv(X, H, W, 0).sigmoid_()
        if H is None:
            return tanh_(conv(X, H, W, 2)).mul_(z), None
        r = conv(X, H, W, 1).sigmoid_()
        return torch.lerp(H, tanh_(conv(X, r.mul_(H), W, 2)), z), None

    @staticmethod
    def backward(X, H, C, H_new, C_new, W, gH, gC, dW) -> Tuple[OptTensor, ...]:
        z = conv(X, H, W, 0).sigmoid_()
        if H is None:
            h = tanh_(conv(X, H, W, 2))
            deltas = [(0, sigmoid_backward(gH * h, z)), (2, tanh_backward(gH * z, h))]
            return (*conv_backward(deltas, X, H, W, dW), None)
        r = conv(X, H, W, 1).sigmoid_()
        rH = r * H
        h = tanh_(conv(X, rH, W, 2))
        gh = gH * z
        dX, drH = conv_backward([(2, tanh_backward(gh, h))], X, rH, W, dW)
        deltas = [(0, sigmoid_backward(h.sub_(H).mul_(gH), z)), (1, sigmoid_backward(drH * H, r))]
        dX_gates, dH = conv_backward(deltas, X, H, W, dW)
        return dX.add_(dX_gates), dH.add_(gH).sub_(gh).addcmul_(drH, r), None


class ConvLSTMStep:
    equations = staticmethod(equations.convlstm)

    @staticmethod
    def forward(X: torch.Tensor, H: OptTensor, C: OptTensor, W: Kernels) -> State:
        i = conv(X, H, W, 0).sigmoid_()
        C_new = i.mul_(tanh_(conv(X, H, W, 3)))
        if C is not None:
            C_new.addcmul_(conv(X, H, W, 1).sigmoid_(), C)
        return conv(X, H, W, 2).sigmoid_().mul_(tanh_(C_new.clone())), C_new

    @staticmethod
    def backward(X, H, C, H_new, C_new, W, gH, gC, dW) -> Tuple[OptTensor, ...]:
        i = conv(X, H, W, 0).sigmoid_()
        o = conv(X, H, W, 2).sigmoid_()
        g = tanh_(conv(X, H, W, 3))
        c = tanh_(C_new.clone())
        dC = tanh_backward(gH * o, c)
        if gC is not None:
            dC.add_(gC)
        deltas = [
            (2, sigmoid_backward(c.mul_(gH), o)),
            (0, sigmoid_backward(dC * g, i)),
            (3, tanh_backward(i.mul_(dC), g)),
        ]
        if C is not None:
            f = conv(X, H, W, 1).sigmoid_()
            deltas.append((1, sigmoid_backward(dC * C, f)))
            dC.mul_(f)
        return (*conv_backward(deltas, X, H, W, dW), dC if C is not None else None)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(cell: Any, X: torch.Tensor, H: OptTensor, C: OptTensor, *W: torch.Tensor) -> State:
        return cell.forward(X, H, C, W)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: State) -> None:
        ctx.cell, X, H, C, *W = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(X, H, C, *output, *W)

    @staticmethod
    def backward(ctx: Any, gH: OptTensor, gC: OptTensor) -> Tuple[OptTensor, ...]:
        X, H, C, H_new, C_new, *W = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated in turn
            return None, *_graph_of_gradients(ctx.cell.equations, X, H, C, W, gH, gC)
        if gH is None:
            gH = torch.zeros_like(X)
        dW: List[OptTensor] = [None] * len(W)
        return (None, *ctx.cell.backward(X, H, C, H_new, C_new, W, gH, gC, dW), *dW)


def _graph_of_gradients(
        update: Callable[..., State],
        X: torch.Tensor,
        H: OptTensor,
        C: OptTensor,
        W: Kernels,
        gH: OptTensor,
        gC: OptTensor,
) -> Tuple[OptTensor, ...]:
    inputs = (X, H, C, *W)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    results = [(y, g) for y, g in zip(update(X, H, C, W), (gH, gC)) if g is not None]
    gradients = iter(torch.autograd.grad(
        [y for y, _ in results], wanted, [g for _, g in results], create_graph=True, allow_unused=True))
    return tuple(next(gradients) if x is not None and x.requires_grad else None for x in inputs)


def _step(cell: Any, X: torch.Tensor, H: OptTensor, C: OptTensor, W: Kernels) -> State:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or isinstance(X, torch.fx.Proxy):
        return cell.equations(X, H, C, W)
    device = X.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            X, H, C = (x if x is None else x.to(dtype) for x in (X, H, C))
            return _Step.apply(cell, X, H, C, *(w.to(dtype) for w in W))
    return _Step.apply(cell, X, H, C, *W)


def convrnn(X: torch.Tensor, H: OptTensor, C: OptTensor, W: Kernels) -> State:
    """`equations.convrnn`"""
    return equations.convrnn(X, H, C, W) if torch.jit.is_scripting() else _step(ConvRNNStep, X, H, C, W)


def convgru(X: torch.Tensor, H: OptTensor, C: OptTensor, W: Kernels) -> State:
    """`equations.convgru`"""
    return equations.convgru(X, H, C, W) if torch.jit.is_scripting() else _step(ConvGRUStep, X, H, C, W)


def convlstm(X: torch.Tensor, H: OptTensor, C: OptTensor, W: Kernels) -> State:
    """`equations.convlstm`"""
    return equations.convlstm(X, H, C, W) if torch.jit.is_scripting() else _step(ConvLSTMStep, X, H, C, W)
