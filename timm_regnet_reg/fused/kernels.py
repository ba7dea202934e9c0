# mypy: ignore-errors
"""The cells' time steps and their gradients as Triton kernels.

A program works on a tile of BP pixels and BN channels, and reads what its 3x3 kernels see beside the tile through the
caches. The arguments that kernels share:

    x_ptr, h_ptr, c_ptr: X, H and C (B, N, height, width), dense, in one memory format.
    wx_ptr, wh_ptr: The kernels of X and of H tap by tap, (9, G·N); within a tap gate by gate.
    b_ptr: The biases (G·N,).
    ds_ptr: The gradients of the gates' sums before σ and tanh: G planes, each laid out as X.
    P: Pixels of the batch, B·height·width.
    sp, sn: Elements from a pixel, and from a channel, to the next: N, 1 in channels_last and 1, height·width otherwise.
    HAS_H: Whether there is a state; without one nothing is read from h_ptr, c_ptr and wh_ptr.

Everything is summed in float32, in an order that doesn't change from run to run. A loop whose number of rounds is an
argument is a `while`: Triton 3.6's interpreter can't make a range of an argument with numpy 2.4.
"""

import triton
import triton.language as tl

__all__ = [
    'gru_backward',
    'gru_forward',
    'gru_gates',
    'gru_reset_backward',
    'inputs_backward',
    'kernels_backward',
    'kernels_total',
    'lstm_backward',
    'lstm_forward',
]


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 2 / (1 + tl.exp(-2 * x)) - 1


@triton.jit
def load(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def channels(block, N, BN: tl.constexpr):
    """The channels (BN,) of a block, and which of them exist."""
    n = block * BN + tl.arange(0, BN)
    return n, n < N


@triton.jit
def pixels(block, P, height, width, N, sp, BP: tl.constexpr):
    """The pixels (BP,) of a block: where they begin in memory, their rows and columns, and which of them exist."""
    p = block * BP + tl.arange(0, BP)
    row = p // width
    image = row // height
    return image * (height * width * N) + (p - image * (height * width)) * sp, row % height, p % width, p < P


@triton.jit
def neighbours(y, x, exist, height, width, dy, dx):
    """Which pixels have one `dy` rows and `dx` columns away."""
    return exist & (y + dy >= 0) & (y + dy < height) & (x + dx >= 0) & (x + dx < width)


@triton.jit
def plus_products(sums, factor, factors):
    """sums + factor · factors, one by one."""
    out = ()
    for k in tl.static_range(len(sums)):
        out = out + (sums[k] + factor * factors[k],)
    return out


@triton.jit
def rows(ptr, n, exist, N, gates):
    """A row (1, BN) for each of the gates of what is stored gate by gate: weights of a tap, or biases."""
    out = ()
    for k in tl.static_range(len(gates)):
        out = out + (load(ptr + gates[k] * N + n, exist)[None, :],)
    return out


@triton.jit
def planes(ptr, at, exist, size, gates):
    """A tile (BP, BN) for each of the gates of what is stored as planes of `size` elements."""
    out = ()
    for k in tl.static_range(len(gates)):
        out = out + (load(ptr + gates[k] * size + at, exist),)
    return out


@triton.jit
def gate_sums(
    x_ptr, h_ptr, wx_ptr, wh_ptr, b_ptr, P, height, width, N, sp, sn,
    gates, G: tl.constexpr, HAS_H: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """`W * [X, H]` of the gates at the program's tile; with it where the tile lies, and what of it exists."""
    n, n_exist = channels(tl.program_id(1), N, BN)
    start, y, x, p_exist = pixels(tl.program_id(0), P, height, width, N, sp, BP)
    at = start[:, None] + (n * sn)[None, :]
    sums = ()
    biases = rows(b_ptr, n, n_exist, N, gates)
    for k in tl.static_range(len(gates)):
        sums = sums + (tl.zeros((BP, BN), tl.float32) + biases[k],)
    for tap in range(9):
        dy, dx = tap // 3 - 1, tap % 3 - 1
        exist = neighbours(y, x, p_exist, height, width, dy, dx)[:, None] & n_exist[None, :]
        there = at + (dy * width + dx) * sp
        sums = plus_products(sums, load(x_ptr + there, exist), rows(wx_ptr + tap * G * N, n, n_exist, N, gates))
        if HAS_H:
            sums = plus_products(sums, load(h_ptr + there, exist), rows(wh_ptr + tap * G * N, n, n_exist, N, gates))
    return sums, at, p_exist[:, None] & n_exist[None, :]


# ConvGRU, whose candidate sees r ⊙ H: the gates z and r are a kernel of their own


@triton.jit
def gru_gates(
    x_ptr, h_ptr, wx_ptr, wh_ptr, b_ptr, z_ptr, rh_ptr, r_ptr, P, height, width, N, sp, sn,
    KEEP_R: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """z, r ⊙ H and, for the gradients, r."""
    sums, at, exist = gate_sums(
        x_ptr, h_ptr, wx_ptr, wh_ptr, b_ptr, P, height, width, N, sp, sn, (0, 1), 3, True, BP, BN
    )
    r = sigmoid(sums[1])
    tl.store(z_ptr + at, sigmoid(sums[0]), mask=exist)
    tl.store(rh_ptr + at, r * load(h_ptr + at, exist), mask=exist)
    if KEEP_R:
        tl.store(r_ptr + at, r, mask=exist)


@triton.jit
def gru_candidate(
    x_ptr, h_ptr, rh_ptr, z_ptr, wx_ptr, wh_ptr, b_ptr, P, height, width, N, sp, sn,
    HAS_H: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """z, H and H~ at the program's tile, where it lies, and what of it exists."""
    if HAS_H:
        sums, at, exist = gate_sums(
            x_ptr, rh_ptr, wx_ptr, wh_ptr, b_ptr, P, height, width, N, sp, sn, (2,), 3, True, BP, BN
        )
        z, H, h = load(z_ptr + at, exist), load(h_ptr + at, exist), tanh(sums[0])
    else:
        sums, at, exist = gate_sums(
            x_ptr, x_ptr, wx_ptr, wh_ptr, b_ptr, P, height, width, N, sp, sn, (0, 2), 3, False, BP, BN
        )
        z, H, h = sigmoid(sums[0]), tl.zeros((BP, BN), tl.float32), tanh(sums[1])
    return z, H, h, at, exist


@triton.jit
def gru_forward(
    x_ptr, h_ptr, rh_ptr, z_ptr, wx_ptr, wh_ptr, b_ptr, out_ptr, P, height, width, N, sp, sn,
    HAS_H: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    z, H, h, at, exist = gru_candidate(
        x_ptr, h_ptr, rh_ptr, z_ptr, wx_ptr, wh_ptr, b_ptr, P, height, width, N, sp, sn, HAS_H, BP, BN
    )
    tl.store(out_ptr + at, H + z * (h - H), mask=exist)


@triton.jit
def gru_backward(
    x_ptr, h_ptr, rh_ptr, z_ptr, wx_ptr, wh_ptr, b_ptr, dh_ptr, ds_ptr, dh_old_ptr, P, height, width, N, sp, sn,
    HAS_H: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """From the gradient of the new H at dh_ptr to the planes z and h of ds_ptr, and what reaches the old H directly."""
    z, H, h, at, exist = gru_candidate(
        x_ptr, h_ptr, rh_ptr, z_ptr, wx_ptr, wh_ptr, b_ptr, P, height, width, N, sp, sn, HAS_H, BP, BN
    )
    dH = load(dh_ptr + at, exist)
    tl.store(ds_ptr + at, dH * (h - H) * z * (1 - z), mask=exist)
    tl.store(ds_ptr + 2 * P * N + at, dH * z * (1 - h * h), mask=exist)
    if HAS_H:
        tl.store(dh_old_ptr + at, dH * (1 - z), mask=exist)


@triton.jit
def gru_reset_backward(
    h_ptr, r_ptr, wh_ptr, ds_ptr, dh_old_ptr, P, height, width, N, sp, sn, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """From the plane h of ds_ptr to the plane r, and what reaches the old H through r ⊙ H is added at dh_old_ptr."""
    n, n_exist = channels(tl.program_id(1), N, BN)
    start, y, x, p_exist = pixels(tl.program_id(0), P, height, width, N, sp, BP)
    at = start[:, None] + (n * sn)[None, :]
    drH = tl.zeros((BP, BN), tl.float32)
    for tap in range(9):
        dy, dx = 1 - tap // 3, 1 - tap % 3
        exist = neighbours(y, x, p_exist, height, width, dy, dx)[:, None] & n_exist[None, :]
        there = at + (dy * width + dx) * sp
        w = load(wh_ptr + tap * 3 * N + 2 * N + n, n_exist)[None, :]
        drH += load(ds_ptr + 2 * P * N + there, exist) * w
    exist = p_exist[:, None] & n_exist[None, :]
    r = load(r_ptr + at, exist)
    tl.store(ds_ptr + P * N + at, drH * load(h_ptr + at, exist) * r * (1 - r), mask=exist)
    tl.store(dh_old_ptr + at, load(dh_old_ptr + at, exist) + drH * r, mask=exist)


# ConvLSTM


@triton.jit
def lstm_gates(
    x_ptr, h_ptr, c_ptr, wx_ptr, wh_ptr, b_ptr, P, height, width, N, sp, sn,
    HAS_H: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """i, f, o, g, the old C and the new at the program's tile, where it lies, and what of it exists."""
    if HAS_H:
        sums, at, exist = gate_sums(
            x_ptr, h_ptr, wx_ptr, wh_ptr, b_ptr, P, height, width, N, sp, sn, (0, 1, 2, 3), 4, True, BP, BN
        )
        i, f, o, g = sigmoid(sums[0]), sigmoid(sums[1]), sigmoid(sums[2]), tanh(sums[3])
        C = load(c_ptr + at, exist)
    else:
        sums, at, exist = gate_sums(
            x_ptr, x_ptr, wx_ptr, wh_ptr, b_ptr, P, height, width, N, sp, sn, (0, 2, 3), 4, False, BP, BN
        )
        i, o, g = sigmoid(sums[0]), sigmoid(sums[1]), tanh(sums[2])
        f = tl.zeros((BP, BN), tl.float32)
        C = f
    return i, f, o, g, C, f * C + i * g, at, exist


@triton.jit
def lstm_forward(
    x_ptr, h_ptr, c_ptr, wx_ptr, wh_ptr, b_ptr, out_ptr, c_out_ptr, P, height, width, N, sp, sn,
    HAS_H: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i, f, o, g, C, C_new, at, exist = lstm_gates(
        x_ptr, h_ptr, c_ptr, wx_ptr, wh_ptr, b_ptr, P, height, width, N, sp, sn, HAS_H, BP, BN
    )
    tl.store(c_out_ptr + at, C_new, mask=exist)
    tl.store(out_ptr + at, o * tanh(C_new), mask=exist)


@triton.jit
def lstm_backward(
    x_ptr, h_ptr, c_ptr, wx_ptr, wh_ptr, b_ptr, dh_ptr, dc_ptr, ds_ptr, dc_old_ptr, P, height, width, N, sp, sn,
    HAS_H: tl.constexpr, HAS_DC: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """From the gradients of the new H and C at dh_ptr and dc_ptr to ds_ptr and the gradient of the old C."""
    i, f, o, g, C, C_new, at, exist = lstm_gates(
        x_ptr, h_ptr, c_ptr, wx_ptr, wh_ptr, b_ptr, P, height, width, N, sp, sn, HAS_H, BP, BN
    )
    tanh_C = tanh(C_new)
    dH = load(dh_ptr + at, exist)
    dC = dH * o * (1 - tanh_C * tanh_C)
    if HAS_DC:
        dC += load(dc_ptr + at, exist)
    tl.store(ds_ptr + at, dC * g * i * (1 - i), mask=exist)
    tl.store(ds_ptr + 2 * P * N + at, dH * tanh_C * o * (1 - o), mask=exist)
    tl.store(ds_ptr + 3 * P * N + at, dC * i * (1 - g * g), mask=exist)
    if HAS_H:
        tl.store(ds_ptr + P * N + at, dC * C * f * (1 - f), mask=exist)
        tl.store(dc_old_ptr + at, dC * f, mask=exist)


# what the cells have in common: from the gradients of the gates' sums to those of X and H, and of the kernels


@triton.jit
def inputs_backward(
    ds_ptr, wx_ptr, wh_ptr, dx_ptr, dh_ptr, P, height, width, N, sp, sn,
    GATES: tl.constexpr, H_GATES: tl.constexpr, G: tl.constexpr, ADD_H: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of X through the gates GATES and of H through the first H_GATES of them, added to what is there."""
    n, n_exist = channels(tl.program_id(1), N, BN)
    start, y, x, p_exist = pixels(tl.program_id(0), P, height, width, N, sp, BP)
    at = start[:, None] + (n * sn)[None, :]
    dX = tl.zeros((BP, BN), tl.float32)
    dH = tl.zeros((BP, BN), tl.float32)
    for tap in range(9):
        dy, dx = 1 - tap // 3, 1 - tap % 3  # where the pixels are that saw this one through the tap
        exist = neighbours(y, x, p_exist, height, width, dy, dx)[:, None] & n_exist[None, :]
        there = at + (dy * width + dx) * sp
        dS = planes(ds_ptr, there, exist, P * N, GATES)
        W_x = rows(wx_ptr + tap * G * N, n, n_exist, N, GATES)
        for k in tl.static_range(len(GATES)):
            dX += dS[k] * W_x[k]
        if H_GATES > 0:
            W_h = rows(wh_ptr + tap * G * N, n, n_exist, N, GATES)
            for k in tl.static_range(H_GATES):
                dH += dS[k] * W_h[k]
    exist = p_exist[:, None] & n_exist[None, :]
    tl.store(dx_ptr + at, dX, mask=exist)
    if H_GATES > 0:
        if ADD_H:
            dH += load(dh_ptr + at, exist)
        tl.store(dh_ptr + at, dH, mask=exist)


@triton.jit
def kernels_backward(
    x_ptr, h_ptr, ds_ptr, part_ptr, P, height, width, N, sp, sn, steps,
    GATES: tl.constexpr, G: tl.constexpr, HAS_H: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The part that `steps` blocks of pixels have in the gradients of the kernels and biases of the gates GATES.

    part_ptr: (programs, 10 or 19, G·N): the nine taps of X, those of H where there is one, and the bias.
    """
    n, n_exist = channels(tl.program_id(1), N, BN)
    zero = tl.zeros((BP, BN), tl.float32)
    biases = (zero,) * len(GATES)
    taps = (biases,) * (18 if HAS_H else 9)
    step = 0
    while step < steps:
        start, y, x, p_exist = pixels(tl.program_id(0) * steps + step, P, height, width, N, sp, BP)
        at = start[:, None] + (n * sn)[None, :]
        dS = planes(ds_ptr, at, p_exist[:, None] & n_exist[None, :], P * N, GATES)
        biases = plus_products(biases, 1.0, dS)
        new = ()
        for k in tl.static_range(len(taps)):
            dy, dx = k % 9 // 3 - 1, k % 3 - 1
            exist = neighbours(y, x, p_exist, height, width, dy, dx)[:, None] & n_exist[None, :]
            there = at + (dy * width + dx) * sp
            new = new + (plus_products(taps[k], load((x_ptr if k < 9 else h_ptr) + there, exist), dS),)
        taps = new
        step += 1
    taps = taps + (biases,)
    for k in tl.static_range(len(taps)):
        for j in tl.static_range(len(GATES)):
            to = part_ptr + ((tl.program_id(0) * len(taps) + k) * G + GATES[j]) * N + n
            tl.store(to, tl.sum(taps[k][j], 0), mask=n_exist)


@triton.jit
def kernels_total(
    part_ptr, dwx_ptr, dwh_ptr, db_ptr, parts, GN, HAS_H: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The sums of what kernels_backward gave, as gradients of K_x, K_h (G, N, 1, 3, 3) and b (G, N)."""
    TAPS: tl.constexpr = 18 if HAS_H else 9
    n, n_exist = channels(tl.program_id(0), GN, BN)
    tap = tl.program_id(1)
    total = tl.zeros((BQ, BN), tl.float32)
    first = 0
    while first < parts:
        q = first + tl.arange(0, BQ)
        at = ((q * (TAPS + 1) + tap) * GN)[:, None] + n[None, :]
        total += load(part_ptr + at, (q < parts)[:, None] & n_exist[None, :])
        first += BQ
    total = tl.sum(total, 0)
    if tap < 9:
        tl.store(dwx_ptr + n * 9 + tap, total, mask=n_exist)
    elif tap == TAPS:
        tl.store(db_ptr + n, total, mask=n_exist)
    elif HAS_H:
        tl.store(dwh_ptr + n * 9 + tap - 9, total, mask=n_exist)
