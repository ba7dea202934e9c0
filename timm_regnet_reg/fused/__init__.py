"""Time steps in fused GPU kernels: `convgru` and `convlstm` with the equations' signature.

They compute what the equations compute, in a kernel or two, and keep X, H and C alone for the gradients. The equations
stay the truth, and compute wherever `fuses` says no; `set_fused` turns the kernels on.
"""

import importlib.util
import warnings
from typing import Optional, Tuple

import torch
from torch.autograd import forward_ad

from .. import equations
from ..equations import Kernels, State

__all__ = ['GATES', 'available', 'convgru', 'convlstm', 'set_fused']

GATES = {'convgru': 3, 'convlstm': 4}  # of the cells that have fused steps
DEVICE = 'cuda'
TYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST = 2**29  # elements of X: the kernels count those of four gates with 32 bits

_enabled = False


def available() -> bool:
    """Whether the current CUDA device runs the kernels: there is Triton, and it has compute capability 8.0 or later."""
    return importlib.util.find_spec('triton') is not None and torch.cuda.get_device_capability() >= (8, 0)


def set_fused(enabled: bool = True) -> None:
    """Let the time steps of ConvGRU and ConvLSTM run in fused kernels, where these can compute them; off when imported.

    They need a CUDA device of compute capability 8.0 or later, Triton, and inputs in float32, bfloat16 or float16.
    Everything else, such as export and forward-mode differentiation, goes on with the equations, and so does a ConvRNN,
    which kernels make hardly faster. Both memory formats are read as they are; inputs that have none, or not the same
    one, are copied.

    Args:
        enabled: Whether the kernels may be used.
    """
    global _enabled
    if enabled and importlib.util.find_spec('triton') is None:
        warnings.warn('Triton is not installed, so the time steps go on without fused kernels', stacklevel=2)
        enabled = False
    if enabled:
        from . import operators  # noqa: F401  (defines them)
    _enabled = enabled


def step_type(X: torch.Tensor) -> torch.dtype:
    """The type that a time step of X is computed in: X's, or the one that autocast gives to convolutions."""
    return torch.get_autocast_dtype(DEVICE) if torch.is_autocast_enabled(DEVICE) else X.dtype


def fuses(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> bool:
    """Whether the fused kernels compute a time step, and not the equations: the one place that decides."""
    return (
        _enabled
        and not torch.jit.is_tracing()
        and not torch.compiler._is_exporting_flag  # is_exporting() is true in torch 2.11 whenever it compiles
        and forward_ad._current_level < 0  # the operators have no forward mode
        and type(X) is torch.Tensor  # not a node of fx, nor a subclass, which operators would have to know
        and X.device.type == DEVICE
        and 0 < X.numel() < LARGEST
        and all(t is None or t.dtype in TYPES for t in (X, H, C))
        and all(t.dtype == step_type(X) for t in W[:3])
    )


def fused_step(
    cell: str, X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels
) -> Tuple[torch.Tensor, ...]:
    """The new H and, for a ConvLSTM, C."""
    from .operators import FusedStep

    dtype = step_type(X)
    return FusedStep.apply(cell, *(None if t is None else t.to(dtype) for t in (X, H, C)), *W[:3])


def convgru(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
    if not torch.jit.is_scripting():
        if fuses(X, H, C, W):
            return fused_step('convgru', X, H, None, W)[0], C
    return equations.convgru(X, H, C, W)


def convlstm(X: torch.Tensor, H: Optional[torch.Tensor], C: Optional[torch.Tensor], W: Kernels) -> State:
    if not torch.jit.is_scripting():
        if (H is None) == (C is None) and fuses(X, H, C, W):  # the kernels take both or neither
            H, C = fused_step('convlstm', X, H, C, W)
            return H, C
    return equations.convlstm(X, H, C, W)
