"""The selective scan of a Mamba whose tensors are int8: forward, with everything around it.

    dt = softplus(s_dt dt_q + bias)        h_t = exp(dt_t A) h_{t-1} + dt_t (s_u u_t) (s_B B_t)
    y_t = (s_C C_t . h_t + D s_u u_t) silu(s_z z_t)

The walk is that of `corelib.kernels.selective_scan`. What comes in is int8 with one scale a tensor
(Quamba, arXiv 2410.13229): a quarter of the bytes of float32. It is multiplied by its scale in
registers; softplus, skip and gate happen there too, so that nothing is read twice and only the
gated output is written, in float32, for the rotation that follows. State and sums are float32.

For inference: there is no backward pass, for rounding has no gradient worth having.
No ``tl.dot``: a diagonal recurrence has no product of matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from corelib.kernels._shared import check_device, is_interpreted, jit, tl
from corelib.kernels.gates.specialisation import Specialisation
from corelib.kernels.newton_rnn import compose
from corelib.kernels.selective_scan import Tile

__all__ = ["forward_bytes", "int8_selective_scan"]

TILE = Tile(4, 64, 4)
QUANTISED = ("u", "dt", "B", "C", "z")


@jit
def _int8_scan(
    u, dt, A, B, C, D, z, bias, state, y, last, scale_u, scale_dt, scale_B, scale_C, scale_z,
    channels_in_all, L, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    steps, states = tl.arange(0, BLOCK_T), tl.arange(0, N)
    real = channels < channels_in_all
    own = (row * channels_in_all + channels)[:, None] * N + states[None, :]
    h = tl.load(state + own, mask=real[:, None], other=0.0)
    skip = tl.load(D + channels, mask=real, other=0.0)[:, None]
    shift = tl.load(bias + channels, mask=real, other=0.0)[:, None]
    for first in range(0, L, BLOCK_T):
        now = first + steps
        inside = real[:, None] & (now < L)[None, :]
        place = (row * channels_in_all + channels)[:, None] * L + now[None, :]
        x = tl.load(dt + place, mask=inside, other=0).to(tl.float32) * scale_dt + shift
        delta = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
        delta = tl.where(inside, delta, 0.0)  # no step: decay 1, nothing added
        value = tl.load(u + place, mask=inside, other=0).to(tl.float32) * scale_u
        out = tl.zeros([BLOCK_D, BLOCK_T], tl.float32)
        for n in range(0, N):
            rate = tl.load(A + channels * N + n, mask=real, other=0.0)
            mixing = (row * N + n) * L + now
            write = tl.load(B + mixing, mask=now < L, other=0).to(tl.float32) * scale_B
            read = tl.load(C + mixing, mask=now < L, other=0).to(tl.float32) * scale_C
            decay = tl.exp(delta * rate[:, None])
            before = tl.sum(tl.where(states[None, :] == n, h, 0.0), 1)
            through, added = tl.associative_scan(
                (decay, delta * value * write[None, :]), 1, compose
            )
            here = through * before[:, None] + added
            out += here * read[None, :]
            end = tl.sum(tl.where(steps[None, :] == BLOCK_T - 1, here, 0.0), 1)
            h = tl.where(states[None, :] == n, end[:, None], h)
        gate = tl.load(z + place, mask=inside, other=0).to(tl.float32) * scale_z
        tl.store(y + place, (out + skip * value) * gate * tl.sigmoid(gate), mask=inside)
    tl.store(last + own, h, mask=real[:, None])


def int8_selective_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
    state: Tensor, scales: dict[str, float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The equations of this module over ``L`` steps.

    Args:
        u, dt, z: ``(B, D, L)`` int8. B, C: ``(B, N, L)`` int8, ``N`` a power of two.
        A: ``(D, N)``. D, dt_bias: ``(D,)``. state: ``(B, D, N)``, before the first step. Float32.
        scales: of ``u``, ``dt``, ``B``, ``C`` and ``z``, by name.

    Returns:
        ``y (B, D, L)`` and the state after the last step, float32.

    Raises ValueError or TypeError for shapes, dtypes or devices that do not fit, ImportError where
    Triton is missing.
    """
    given = dict(u=u, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, state=state)
    check_device("int8_selective_scan", _int8_scan, *given.values())
    if u.dim() != 3 or A.dim() != 2:
        shapes = f"{tuple(u.shape)} and {tuple(A.shape)}"
        raise ValueError(f"u, A: expected shapes (B, D, L) and (D, N), got {shapes}")
    (batch, width, L), N = u.shape, A.shape[1]
    if N < 1 or N & (N - 1):
        raise ValueError(f"A: expected a number of states that is a power of two, got {N}")
    inputs, mixing = (batch, width, L), (batch, N, L)
    wanted = dict(u=inputs, dt=inputs, z=inputs, B=mixing, C=mixing, A=(width, N), D=(width,))
    wanted |= dict(dt_bias=(width,), state=(batch, width, N))
    for name, x in given.items():
        dtype = torch.int8 if name in QUANTISED else torch.float32
        if tuple(x.shape) != wanted[name]:
            raise ValueError(f"{name}: expected shape {wanted[name]}, got {tuple(x.shape)}")
        if x.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
    if missing := set(QUANTISED) - set(scales):
        raise ValueError(f"scales: expected all of {QUANTISED}, without {sorted(missing)}")
    y, last = (torch.empty(x.shape, device=u.device) for x in (u, state))
    if state.numel():
        options = {} if is_interpreted(_int8_scan) else {"num_warps": TILE.num_warps}
        _int8_scan[(batch, -(-width // TILE.block_d))](
            *(x.contiguous() for x in given.values()), y, last,
            *(float(scales[name]) for name in QUANTISED), width, L, N=N, BLOCK_D=TILE.block_d,
            BLOCK_T=TILE.block_t, **options,
        )  # fmt: skip
    return y, last


def forward_bytes(batch: int, D: int, L: int, N: int) -> int:
    """Bytes that are moved: three int8 sequences in and one of float32 out; ``B`` and ``C`` for
    each block of channels; ``A`` for each block of steps; states in and out; skip and bias."""
    programs, blocks = -(-D // TILE.block_d), -(-L // TILE.block_t)
    return batch * (7 * D * L + programs * 2 * N * L + 4 * D * (blocks * N + 2 * N + 2))


SPECIALISATIONS = [
    Specialisation(
        kernel="_int8_scan",
        label=f"int8 N={N}",
        direction="forward",
        signature=dict.fromkeys(QUANTISED, "*i8")
        | dict.fromkeys(("A", "D", "bias", "state", "y", "last"), "*fp32")
        | {f"scale_{name}": "fp32" for name in QUANTISED}
        | dict.fromkeys(("channels_in_all", "L"), "i32"),
        constexprs={"N": N, "BLOCK_D": TILE.block_d, "BLOCK_T": TILE.block_t},
        num_warps=TILE.num_warps,
    )
    for N in (16, 64)
]
