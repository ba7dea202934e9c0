"""The cells' time step and the fusion for eager execution, with fewer passes over memory.

What they compute is what `equations` says; whatever exports, traces, transforms or differentiates twice takes those
equations themselves. Sums of convolutions are added up inside of the convolutions where oneDNN can do it, elementwise
work is done in place, and the backward passes are written out: a ConvLSTM's keeps three of its four gates and computes
the fourth again, where autograd would keep all of them, the activations beside them, and the temporaries between.
torch.compile compiles both passes as they are written here.
"""

from contextlib import nullcontext
from typing import Any, Callable, ContextManager, List, Optional, Tuple

import torch
import torch.fx
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils.flop_counter import conv_flop_count, flop_registry, register_flop_formula

from . import equations
from .equations import Kernels, State

__all__ = ['convgru', 'convlstm', 'convrnn', 'fusion']

OptTensor = Optional[torch.Tensor]
Gates = Tuple[torch.Tensor, ...]  # what the backward pass keeps of a step besides its inputs and results
# torch.compile's own, for sums of convolutions; not every build of torch has oneDNN
onednn_add_conv_ = torch.ops.mkldnn._convolution_pointwise_ if torch.backends.mkldnn.is_available() else None
sigmoid_backward = torch.ops.aten.sigmoid_backward
tanh_backward = torch.ops.aten.tanh_backward

if onednn_add_conv_ is not None and onednn_add_conv_ not in flop_registry:

    @register_flop_formula(onednn_add_conv_)
    def _add_conv_flop(total_shape, x_shape, w_shape, *args, out_shape=None, **kwargs) -> int:
        return conv_flop_count(x_shape, w_shape, out_shape)


def _onednn_adds(out: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether oneDNN can add a convolution of x to out: plain float32 tensors on the CPU, channels last."""
    if onednn_add_conv_ is None or torch.compiler.is_compiling() or not torch.backends.mkldnn.enabled:
        return False
    return all(
        type(t) is torch.Tensor
        and t.device.type == 'cpu'
        and t.dtype == torch.float32
        and t.numel() > 0
        and t.is_contiguous(memory_format=torch.channels_last)
        for t in (out, x)
    )


def add_conv_(out: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`out += w * x` in place, for an odd kernel, stride 1, and the padding that keeps the size."""
    padding, groups = w.shape[2] // 2, x.shape[1] // w.shape[1]
    if _onednn_adds(out, x):
        return onednn_add_conv_(out, x, w, None, (padding, padding), (1, 1), (1, 1), groups, 'add', 1.0, None, [], None)
    return out.add_(F.conv2d(x, w, padding=padding, groups=groups))


def conv(X: torch.Tensor, H: OptTensor, W: Kernels, gate: int) -> torch.Tensor:
    """`equations.conv`"""
    out = equations.conv(X, None, W, gate)
    return out if H is None else add_conv_(out, H, W[3 * gate + 1])


def tanh(x: torch.Tensor, out: OptTensor = None) -> torch.Tensor:
    """tanh, as 2σ(2x) - 1 in float32 on the CPU, where torch's tanh takes ten times as long as its sigmoid."""
    if x.device.type == 'cpu' and x.dtype == torch.float32:
        s = torch.mul(x, 2, out=out).sigmoid_()
        return torch.add(s.new_full((), -1), s, alpha=2, out=s)
    return torch.tanh(x, out=out)


def tanh_(x: torch.Tensor) -> torch.Tensor:
    """tanh in place"""
    return tanh(x, out=x)


def sigmoid_backward_(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """g, the gradient of y = σ(x), becomes that of x."""
    return sigmoid_backward.grad_input(g, y, grad_input=g)


def tanh_backward_(g: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """g, the gradient of y = tanh(x), becomes that of x."""
    return tanh_backward.grad_input(g, y, grad_input=g)


def conv_backward(
    gate: int,
    delta: torch.Tensor,
    X: torch.Tensor,
    H: OptTensor,
    W: Kernels,
    dX: OptTensor,
    dH: OptTensor,
    dW: List[OptTensor],
) -> Tuple[torch.Tensor, OptTensor]:
    """Given delta, the gradient of `conv`'s result, add those of X and H to dX and dH, and put those of W into dW."""

    def add_transpose(total: OptTensor, w: torch.Tensor) -> torch.Tensor:
        w = w.flip(2, 3)  # with stride 1, a convolution too, and faster than torch's backward one
        return F.conv2d(delta, w, padding=1, groups=w.shape[0]) if total is None else add_conv_(total, delta, w)

    def of_kernel(x: torch.Tensor, w: torch.Tensor) -> List[torch.Tensor]:
        return torch.ops.aten.convolution_backward(
            delta, x, w, w.shape[:1], (1, 1), (1, 1), (1, 1), False, (0, 0), w.shape[0], (False, True, x is X)
        )[1:]

    W_x, W_h = W[3 * gate], W[3 * gate + 1]
    dX = add_transpose(dX, W_x)
    dW[3 * gate], dW[3 * gate + 2] = of_kernel(X, W_x)
    if H is not None:
        dH = add_transpose(dH, W_h)
        dW[3 * gate + 1], _ = of_kernel(H, W_h)
    return dX, dH


class ConvRNNStep:
    equations = staticmethod(equations.convrnn)

    @staticmethod
    def forward(X: torch.Tensor, H: OptTensor, C: OptTensor, W: Kernels, keep: bool) -> Tuple[State, Gates]:
        return (tanh_(conv(X, H, W, 0)), None), ()

    @staticmethod
    def backward(X, H, C, H_new, C_new, gates, W, gH, gC, dW) -> Tuple[OptTensor, ...]:
        return *conv_backward(0, tanh_backward(gH, H_new), X, H, W, None, None, dW), None


class ConvGRUStep:
    equations = staticmethod(equations.convgru)

    @staticmethod
    def forward(X: torch.Tensor, H: OptTensor, C: OptTensor, W: Kernels, keep: bool) -> Tuple[State, Gates]:
        z = conv(X, H, W, 0).sigmoid_()
        if H is None:
            h = tanh_(conv(X, H, W, 2))
            return (torch.mul(z, h, out=None if keep else h), None), (z, h)
        r = conv(X, H, W, 1).sigmoid_()
        h = tanh_(conv(X, torch.mul(r, H, out=None if keep else r), W, 2))
        return (torch.lerp(H, h, z, out=None if keep else h), None), (z, h, r)

    @staticmethod
    def backward(X, H, C, H_new, C_new, gates, W, gH, gC, dW) -> Tuple[OptTensor, ...]:
        z, h, *rest = gates
        gh = gH * z
        if H is None:
            dX, _ = conv_backward(2, tanh_backward_(gh, h), X, None, W, None, None, dW)
            return *conv_backward(0, sigmoid_backward_(gH * h, z), X, None, W, dX, None, dW), None
        (r,) = rest
        dH = gH - gh
        dX, drH = conv_backward(2, tanh_backward_(gh, h), X, r * H, W, None, None, dW)
        dH.addcmul_(drH, r)
        dX, dH = conv_backward(1, sigmoid_backward_(drH.mul_(H), r), X, H, W, dX, dH, dW)
        return *conv_backward(0, sigmoid_backward_((h - H).mul_(gH), z), X, H, W, dX, dH, dW), None


class ConvLSTMStep:
    equations = staticmethod(equations.convlstm)

    @staticmethod
    def forward(X: torch.Tensor, H: OptTensor, C: OptTensor, W: Kernels, keep: bool) -> Tuple[State, Gates]:
        i = conv(X, H, W, 0).sigmoid_()
        g = tanh_(conv(X, H, W, 3))
        C_new = torch.mul(i, g, out=None if keep else i)
        gates = (i, g) if keep else ()
        del i, g  # if they aren't kept, the gates to come can have their memory
        if C is not None:
            f = conv(X, H, W, 1).sigmoid_()
            C_new.addcmul_(f, C)
            gates = (*gates, f) if keep else ()
            del f
        return (conv(X, H, W, 2).sigmoid_().mul_(tanh(C_new)), C_new), gates

    @staticmethod
    def backward(X, H, C, H_new, C_new, gates, W, gH, gC, dW) -> Tuple[OptTensor, ...]:
        i, g, *rest = gates
        o = conv(X, H, W, 2).sigmoid_()
        c = tanh(C_new)
        dC = tanh_backward_(gH * o, c)
        if gC is not None:
            dC.add_(gC)
        dX, dH = conv_backward(2, sigmoid_backward_(c.mul_(gH), o), X, H, W, None, None, dW)
        dX, dH = conv_backward(0, sigmoid_backward_(dC * g, i), X, H, W, dX, dH, dW)
        dX, dH = conv_backward(3, tanh_backward_(dC * i, g), X, H, W, dX, dH, dW)
        if C is None:
            return dX, dH, None
        (f,) = rest
        dX, dH = conv_backward(1, sigmoid_backward_(dC * C, f), X, H, W, dX, dH, dW)
        return dX, dH, dC.mul_(f)


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(cell: Any, X: torch.Tensor, H: OptTensor, C: OptTensor, *W: torch.Tensor) -> Tuple[OptTensor, ...]:
        state, gates = cell.forward(X, H, C, W, keep=True)
        return *state, *gates

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[Any, ...], output: Tuple[OptTensor, ...]) -> None:
        ctx.cell, X, H, C, *W = inputs
        ctx.kernels = len(W)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(X, H, C, *W, *output)

    @staticmethod
    def backward(ctx: Any, gH: OptTensor, gC: OptTensor, *_: None) -> Tuple[OptTensor, ...]:
        X, H, C, *rest = ctx.saved_tensors
        W, (H_new, C_new, *gates) = rest[: ctx.kernels], rest[ctx.kernels :]
        if torch.is_grad_enabled() or _batched(gH) or _batched(gC):  # to be differentiated in turn, or many at once
            return None, *_gradients_by_equations(ctx.cell.equations, X, H, C, W, gH, gC)
        if gH is None:
            gH = torch.zeros_like(X)
        dW: List[OptTensor] = [None] * len(W)
        with _without_autocast(X.device.type):
            return (None, *ctx.cell.backward(X, H, C, H_new, C_new, gates, W, gH, gC, dW), *dW)


def _batched(g: OptTensor) -> bool:
    return (
        g is not None
        and not torch.compiler.is_compiling()
        and (torch._C._functorch.is_batchedtensor(g) or torch._C._functorch.is_legacy_batchedtensor(g))
    )


def _without_autocast(device: str) -> ContextManager:
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _gradients_by_equations(
    update: Callable[..., State],
    X: torch.Tensor,
    H: OptTensor,
    C: OptTensor,
    W: Kernels,
    gH: OptTensor,
    gC: OptTensor,
) -> Tuple[OptTensor, ...]:
    """Gradients of X, H, C and W through an update of `equations`; differentiable in turn if gradients are enabled."""
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # views, as X depends on H, and the gradient of X itself would go on to H's
        inputs = [x if x is None else x.view_as(x) for x in (X, H, C, *W)]
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        results = [(y, g) for y, g in zip(update(*inputs[:3], inputs[3:]), (gH, gC)) if g is not None]
        gradients = iter(
            torch.autograd.grad(
                [y for y, _ in results], wanted, [g for _, g in results], create_graph=differentiable, allow_unused=True
            )
        )
    return tuple(next(gradients) if x is not None and x.requires_grad else None for x in inputs)


def _takes_equations(X: torch.Tensor) -> bool:
    """Whether something looks on that has to see plain operations: an exporter, a tracer, torch.func or forward AD."""
    if (
        torch.jit.is_tracing()
        or isinstance(X, torch.fx.Proxy)
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    ):
        return True
    return torch.compiler.is_exporting() if torch.compiler.is_compiling() else get_proxy_mode() is not None


def _with_autocast(function: Callable[..., Any], *args: OptTensor) -> Any:
    """As autocast runs a convolution: in its type, if it is on for the tensors' device, and not in float64."""
    device = args[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return function(*args)
    dtype = torch.get_autocast_dtype(device)
    with _without_autocast(device):
        return function(*(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in args))


def _step(cell: Any, X: torch.Tensor, H: OptTensor, C: OptTensor, W: Kernels) -> State:
    if _takes_equations(X):
        return cell.equations(X, H, C, W)

    def step(*args: OptTensor) -> State:
        if torch.is_grad_enabled():
            return _Step.apply(cell, *args)[:2]
        X, H, C, *W = args
        return cell.forward(X, H, C, W, keep=False)[0]

    return _with_autocast(step, X, H, C, *W)


class _Fusion(torch.autograd.Function):
    @staticmethod
    def forward(X: torch.Tensor, H: torch.Tensor, W_X: torch.Tensor, W_H: torch.Tensor, b: OptTensor) -> torch.Tensor:
        return add_conv_(F.conv2d(X, W_X, b), H, W_H)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple[OptTensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Tuple[OptTensor, ...]:
        X, H, W_X, W_H = ctx.saved_tensors
        of_X, of_H, of_W_X, of_W_H, of_b = ctx.needs_input_grad

        def of_conv(x: torch.Tensor, w: torch.Tensor, *wanted: bool) -> List[OptTensor]:
            return torch.ops.aten.convolution_backward(
                g, x, w, w.shape[:1], (1, 1), (0, 0), (1, 1), False, (0, 0), 1, wanted
            )

        dX, dW_X, db = of_conv(X, W_X, of_X, of_W_X, of_b)
        dH, dW_H, _ = of_conv(H, W_H, of_H, of_W_H, False)
        return dX, dH, dW_X, dW_H, db


def _fusion(X: torch.Tensor, H: torch.Tensor, W_X: torch.Tensor, W_H: torch.Tensor, b: OptTensor) -> torch.Tensor:
    return (
        equations.fusion(X, H, W_X, W_H, b) if _takes_equations(X) else _with_autocast(_Fusion.apply, X, H, W_X, W_H, b)
    )


def convrnn(X: torch.Tensor, H: OptTensor, C: OptTensor, W: Kernels) -> State:
    """`equations.convrnn`"""
    return equations.convrnn(X, H, C, W) if torch.jit.is_scripting() else _step(ConvRNNStep, X, H, C, W)


def convgru(X: torch.Tensor, H: OptTensor, C: OptTensor, W: Kernels) -> State:
    """`equations.convgru`"""
    return equations.convgru(X, H, C, W) if torch.jit.is_scripting() else _step(ConvGRUStep, X, H, C, W)


def convlstm(X: torch.Tensor, H: OptTensor, C: OptTensor, W: Kernels) -> State:
    """`equations.convlstm`"""
    return equations.convlstm(X, H, C, W) if torch.jit.is_scripting() else _step(ConvLSTMStep, X, H, C, W)


def fusion(X: torch.Tensor, H: torch.Tensor, W_X: torch.Tensor, W_H: torch.Tensor, b: OptTensor) -> torch.Tensor:
    """`equations.fusion`"""
    return equations.fusion(X, H, W_X, W_H, b) if torch.jit.is_scripting() else _fusion(X, H, W_X, W_H, b)
