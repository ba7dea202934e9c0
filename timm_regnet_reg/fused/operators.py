"""Time steps as operators of torch, with their gradients.

`timm_regnet_reg::step` and `timm_regnet_reg::step_backward` have an implementation on CUDA; what else torch asks of an
operator (shapes, operations, gradients, vmap) is here. Triton is imported when the first of them runs.
"""

from typing import List, Optional, Tuple

import torch
from torch.utils.flop_counter import register_flop_formula

from .. import equations
from . import GATES

__all__ = ['IDLE', 'FusedStep', 'dense_format', 'equation']

Tensors = List[torch.Tensor]
MaybeTensor = Optional[torch.Tensor]

IDLE = 1  # the gate that a zero state leaves without effect, r or f

_STEP = 'str cell, Tensor X, Tensor? H, Tensor? C, Tensor K_x, Tensor K_h, Tensor b'
torch.library.define('timm_regnet_reg::step', f'({_STEP}) -> Tensor[]')
torch.library.define('timm_regnet_reg::step_backward', f'({_STEP}, Tensor dH_new, Tensor? dC_new) -> Tensor[]')


def dense_format(X: torch.Tensor) -> torch.memory_format:
    """The memory format of what a step gives: X's, or the contiguous one for an X of neither."""
    is_channels_last = X.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_channels_last else torch.contiguous_format


@torch.library.impl('timm_regnet_reg::step', 'CUDA')
def step_cuda(cell, X, H, C, K_x, K_h, b) -> Tensors:
    from .launches import step

    return step(cell, X, H, C, K_x, K_h, b)


@torch.library.impl('timm_regnet_reg::step_backward', 'CUDA')
def step_backward_cuda(cell, X, H, C, K_x, K_h, b, dH_new, dC_new) -> Tensors:
    from .launches import step_backward

    return step_backward(cell, X, H, C, K_x, K_h, b, dH_new, dC_new)


@torch.library.register_fake('timm_regnet_reg::step')
def step_fake(cell, X, H, C, K_x, K_h, b) -> Tensors:
    outputs = 2 if cell == 'convlstm' else 1
    return [torch.empty_like(X, memory_format=dense_format(X)) for _ in range(outputs)]


@torch.library.register_fake('timm_regnet_reg::step_backward')
def step_backward_fake(cell, X, H, C, K_x, K_h, b, dH_new, dC_new) -> Tensors:
    def new(like, memory_format=torch.contiguous_format):
        return torch.empty_like(like, memory_format=memory_format)

    gradients = [new(X, dense_format(X)), new(K_x), new(b)]
    if H is not None:
        gradients += [new(X, dense_format(X)), new(K_h)]
    if C is not None:
        gradients.append(new(X, dense_format(X)))
    return gradients


@register_flop_formula(torch.ops.timm_regnet_reg.step)
def step_flops(cell, X_shape, H_shape, C_shape, K_x_shape, K_h_shape, b_shape, **kwargs) -> int:
    """Those of the convolutions, as everywhere else: 2 a multiply-add, the gradients not counted."""
    B, N, height, width = X_shape
    gates = GATES[cell] - (H_shape is None)  # one of them idle
    return 2 * 9 * gates * B * N * height * width * (1 if H_shape is None else 2)


@register_flop_formula(torch.ops.timm_regnet_reg.step_backward)
def step_backward_flops(*args, **kwargs) -> int:
    """Twice the step's: for X and H, and for the kernels. That the gates are computed anew isn't counted."""
    return 2 * step_flops(*args[:7])


def equation(cell: str, X, H: MaybeTensor, C: MaybeTensor, K_x, K_h, b) -> Tuple[torch.Tensor, ...]:
    """The outputs of the operator `step`, by the cell's equations."""
    W = equations.kernels(K_x.flatten(0, 1), K_h.flatten(0, 1), b.flatten(), GATES[cell])
    H_new, C_new = getattr(equations, cell)(X, H, C, W)
    return (H_new,) if C_new is None else (H_new, C_new)


def step_vjp(cell, X, H, C, K_x, K_h, b, dH_new, dC_new) -> Tuple[torch.Tensor, ...]:
    """What the operator `step_backward` gives, by the cell's equations, so that it has gradients of its own."""

    def outputs(X, K_x, b, H=None, K_h=K_h, C=None):
        return equation(cell, X, H, C, K_x, K_h, b)

    state: Tuple[torch.Tensor, ...] = () if H is None else (H, K_h) if C is None else (H, K_h, C)
    new, pullback = torch.func.vjp(outputs, X, K_x, b, *state)  # type: ignore[misc]  # two without has_aux
    return pullback((dH_new,) if len(new) == 1 else (dH_new, torch.zeros_like(X) if dC_new is None else dC_new))


class FusedStep(torch.autograd.Function):
    """The operator `step` with its gradients, which autograd.Function lets fall back to the equations under vmap.

    An operator's own gradients (`register_autograd`) would be used in forward mode too, and give wrong results there.
    """

    @staticmethod
    def forward(cell, X, H, C, K_x, K_h, b) -> Tuple[torch.Tensor, ...]:
        return tuple(torch.ops.timm_regnet_reg.step(cell, X, H, C, K_x, K_h, b))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.cell = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dH_new: MaybeTensor, dC_new: MaybeTensor = None):
        X, H, C, K_x, K_h, b = ctx.saved_tensors
        if dH_new is None:
            dH_new = torch.zeros_like(X)
        differentiate = step_vjp if torch.is_grad_enabled() else torch.ops.timm_regnet_reg.step_backward
        dX, dK_x, db, *state = differentiate(ctx.cell, X, H, C, K_x, K_h, b, dH_new, dC_new)
        dH, dK_h, dC = (*state, None, None, None)[:3]
        return None, dX, dH, dC, dK_x, dK_h, db

    @staticmethod
    def vmap(info, in_dims, cell, *tensors):
        outputs = torch.vmap(equation, in_dims, randomness=info.randomness)(cell, *tensors)
        return outputs, (0,) * len(outputs)
