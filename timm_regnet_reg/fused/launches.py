"""Time steps and their gradients by the Triton kernels: what the operators do on CUDA."""

from typing import Any, List, Optional, Tuple

import torch
import triton

from . import GATES, kernels
from .operators import IDLE, dense_format

__all__ = ['step', 'step_backward']

TILE = 2048  # elements: with fewer the kernels of four gates spill registers, with 4 warps
SUMS_TILE = 32  # elements, an element a thread of one warp: with four gates it has 76 sums, and half of the registers
SUMS_PROGRAMS = 2048  # 16 warps on each multiprocessor of an H100
SUMS_PARTS = 512  # that a program adds up at once

Tensors = List[torch.Tensor]


class Images:
    """How X lies in memory, and the programs that share it out."""

    def __init__(self, X: torch.Tensor) -> None:
        B, N, height, width = X.shape
        self.format = dense_format(X)
        self.N, self.P = N, B * height * width
        strides = (N, 1) if self.format is torch.channels_last else (1, height * width)
        self.sizes = (self.P, height, width, N, *strides)
        BN = min(64 if self.format is torch.channels_last else 16, triton.next_power_of_2(N))
        self.tile = {'BP': TILE // BN, 'BN': BN}
        self.grid = (triton.cdiv(self.P, self.tile['BP']), triton.cdiv(N, BN))

    def launch(self, kernel: Any, *args: Any, **options: Any) -> None:
        """Run a kernel that takes, after what it computes with, the sizes and a program's tile."""
        kernel[self.grid](*args, *self.sizes, **options, **self.tile)

    def dense(self, *tensors: Optional[torch.Tensor]) -> List[Any]:
        """The tensors, or copies of them, laid out as X."""
        return [None if t is None else t.contiguous(memory_format=self.format) for t in tensors]

    def new(self, X: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(X, memory_format=self.format)


def by_taps(K: torch.Tensor) -> torch.Tensor:
    """Kernels (G, N, 1, 3, 3) tap by tap, so that neighbours in memory are neighbouring channels: (9, G·N), float32."""
    K = K.reshape(-1, 9).t()
    return torch.empty(K.shape, dtype=torch.float32, device=K.device).copy_(K)


def step(
    cell: str,
    X: torch.Tensor,
    H: Optional[torch.Tensor],
    C: Optional[torch.Tensor],
    K_x: torch.Tensor,
    K_h: torch.Tensor,
    b: torch.Tensor,
) -> Tensors:
    """The new H and, for a ConvLSTM, C: what `timm_regnet_reg::step` gives."""
    with torch.cuda.device_of(X):
        images = Images(X)
        X, H, C = images.dense(X, H, C)
        W = by_taps(K_x), None if H is None else by_taps(K_h), b.contiguous()
        out = images.new(X)
        if cell == 'convgru':
            z = rH = None
            if H is not None:
                z, rH = images.new(X), images.new(X)
                images.launch(kernels.gru_gates, X, H, *W, z, rH, None, KEEP_R=False)
            images.launch(kernels.gru_forward, X, H, rH, z, *W, out, HAS_H=H is not None)
            return [out]
        C_new = images.new(X)
        images.launch(kernels.lstm_forward, X, H, C, *W, out, C_new, HAS_H=H is not None)
        return [out, C_new]


def step_backward(
    cell: str,
    X: torch.Tensor,
    H: Optional[torch.Tensor],
    C: Optional[torch.Tensor],
    K_x: torch.Tensor,
    K_h: torch.Tensor,
    b: torch.Tensor,
    dH_new: torch.Tensor,
    dC_new: Optional[torch.Tensor],
) -> Tensors:
    """The gradients of X, K_x and b, and those of H, K_h and C that there are: `timm_regnet_reg::step_backward`."""
    with torch.cuda.device_of(X):
        images = Images(X)
        X, H, C, dH_new, dC_new = images.dense(X, H, C, dH_new, dC_new)
        W = by_taps(K_x), None if H is None else by_taps(K_h), b.contiguous()
        G, has_h, is_gru = GATES[cell], H is not None, cell == 'convgru'
        gates = tuple(k for k in range(G) if has_h or k != IDLE)
        dS = X.new_empty(G * X.numel())  # the gates' planes, each laid out as X
        dX = images.new(X)
        dH = images.new(X) if has_h else None
        dC = rH = None
        if is_gru:
            z = r = None
            if has_h:
                z, r, rH = images.new(X), images.new(X), images.new(X)
                images.launch(kernels.gru_gates, X, H, *W, z, rH, r, KEEP_R=True)
            images.launch(kernels.gru_backward, X, H, rH, z, *W, dH_new, dS, dH, HAS_H=has_h)
            if has_h:
                images.launch(kernels.gru_reset_backward, H, r, W[1], dS, dH)
        else:
            if C is not None:
                dC = images.new(X)
            has_dc = dC_new is not None
            images.launch(kernels.lstm_backward, X, H, C, *W, dH_new, dC_new, dS, dC, HAS_H=has_h, HAS_DC=has_dc)
        # a ConvGRU's third gate sees r ⊙ H in H's place, whose part in H's gradient is there already
        H_gates = 0 if not has_h else 2 if is_gru else G
        images.launch(kernels.inputs_backward, dS, *W[:2], dX, dH, GATES=gates, H_GATES=H_gates, G=G, ADD_H=is_gru)
        sources = [(gates, H)] if rH is None else [((0, 1), H), ((2,), rH)]
        dK_x, dK_h, db = kernels_backward(images, X, sources, dS, K_x, b)
        return [t for t in (dX, dK_x, db, dH, dK_h, dC) if t is not None]


def kernels_backward(
    images: Images,
    X: torch.Tensor,
    sources: List[Tuple[Tuple[int, ...], Optional[torch.Tensor]]],
    dS: torch.Tensor,
    K_x: torch.Tensor,
    b: torch.Tensor,
) -> Tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor]:
    """The gradients of K_x, K_h and b; the sources are gates and what they see beside X."""
    rows = b.numel()
    # neighbouring threads read neighbours in memory
    BN = min(SUMS_TILE, triton.next_power_of_2(images.N)) if images.format is torch.channels_last else 1
    BP = SUMS_TILE // BN
    blocks = triton.cdiv(images.N, BN)
    steps = triton.cdiv(triton.cdiv(images.P, BP), max(1, SUMS_PROGRAMS // blocks))
    parts = triton.cdiv(images.P, BP * steps)
    has_h = sources[0][1] is not None
    # zeros for the gate that a zero state leaves out
    new = torch.empty if has_h else torch.zeros
    part = new(parts, 19 if has_h else 10, rows, dtype=torch.float32, device=X.device)
    for gates, H in sources:
        kernels.kernels_backward[(parts, blocks)](
            X, H, dS, part, *images.sizes, steps,
            GATES=gates, G=rows // images.N, HAS_H=has_h, BP=BP, BN=BN, num_warps=1,
        )  # fmt: skip
    dK_x, db = torch.empty_like(K_x, memory_format=torch.contiguous_format), torch.empty_like(b)
    dK_h = torch.empty_like(dK_x) if has_h else None
    grid = (triton.cdiv(rows, 16), part.shape[1])
    kernels.kernels_total[grid](part, dK_x, dK_h, db, parts, rows, HAS_H=has_h, BQ=SUMS_PARTS, BN=16, num_warps=8)
    return dK_x, dK_h, db
