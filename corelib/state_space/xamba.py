"""XAMBA: Enabling Efficient State Space Models on Resource-Constrained Neural Processing Units
(arXiv 2502.06924). Known to us from its abstract and second-hand: this is our reconstruction.

Idea: an NPU is fast at one thing, products of matrices; running sums, reductions and activations
fall to a slow sequential unit. So write them as products with constant matrices, and activations
as tables of straight lines that the product's own output stage can apply.

    CumBA    cumsum(x) = T @ x             T lower triangular, all ones
    ReduBA   sum(x)    = ones @ x          the ones are made once and used again
    ActiBA   f(x)      = a[i] x + b[i]     the i-th of K segments on -R .. R; outside 0 and x
    before all: fixed shapes, a graph for chunks of the prompt and one for a single token

Mamba-2 needs running sums inside its chunks (how much decays from step j to step i: ``segment
sums``), sums over the state, and SiLU and softplus on everything.

| here    | paper       | what                                           | shape           |
|:--------|:------------|:-----------------------------------------------|:----------------|
| T       | CumBA mask  | `triangle`                                     | (m, m)          |
| block   | (ours)      | cumsum in blocks, then a carry between blocks  |                 |
| table   | ActiBA, PLU | `PiecewiseLinear`: slopes and offsets          | (K + 2,) each   |

Exact: CumBA and ReduBA, up to the order of additions. Approximate: ActiBA, by at most
``h^2 max|f''| / 8`` inside, ``h = 2 R / K``: ``h^2 / 32`` for softplus, ``h^2 / 16`` for SiLU; at
the ends it jumps by what ``f`` still is there. Ours: even knots (theirs are unknown to us), blocks.
Cost: ``m^2`` multiplications in the place of ``m`` additions: worth it only where products are
nearly free. On a GPU `cumba` is the kernel `corelib.kernels.cumsum_matmul`.
Oracle: ``torch.cumsum``, `Mamba2Block`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..primitives import causal_short_conv
from .mamba2 import Mamba2Block, Mamba2State
from .piecewise_linear import PiecewiseLinear, table_error  # noqa: F401

Values = Float[Tensor, "*any"]


# --- sums as products -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def triangle(m: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "m m"]:
    """CumBA's constant: ones on the diagonal and below."""
    return torch.ones(m, m, dtype=dtype, device=device).tril()


@functools.lru_cache(maxsize=32)
def _ones(m: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(m, dtype=dtype, device=device)


def cumba(x: Values, dim: int = -1, *, block: int | None = None) -> Values:
    """``torch.cumsum(x, dim)`` as a product with `triangle`.

    Args:
        block: sum in blocks of this length and carry from one to the next, again by a product;
            None takes one triangle for all. A product with ``m^2`` ones becomes ``m block`` and
            ``(m / block)^2``.

    Raises ValueError for a block below 1.
    """
    if block is not None and block < 1:
        raise ValueError(f"block: expected None or at least 1, got {block}")
    x, m = x.movedim(dim, -1), x.shape[dim]
    if x.is_cuda and m and x.dtype.itemsize <= 4:
        from corelib.kernels.cumsum_matmul import cumsum_matmul

        return cumsum_matmul(x.reshape(1, -1, m).mT).mT.reshape(x.shape).movedim(-1, dim)
    if block is None or m <= block:
        return (x @ triangle(m, x.dtype, x.device).mT).movedim(-1, dim)
    inside = F.pad(x, (0, -m % block)).unflatten(-1, (-1, block))
    inside = inside @ triangle(block, x.dtype, x.device).mT
    ends = inside[..., -1]
    before = triangle(ends.shape[-1], x.dtype, x.device).tril(-1)
    sums = inside + (ends @ before.mT)[..., None]
    return sums.flatten(-2)[..., :m].movedim(-1, dim)


def reduba(x: Values, dim: int = -1) -> Float[Tensor, "*fewer"]:
    """``x.sum(dim)`` as a product with a row of ones."""
    x = x.movedim(dim, -1)
    return x @ _ones(x.shape[-1], x.dtype, x.device)


# --- Mamba-2 --------------------------------------------------------------------------------------


def segment_sums(steps: Float[Tensor, "*rows T"], cumsum: Callable) -> Float[Tensor, "*rows T T"]:
    """``[i, j]``: the sum of steps ``j + 1 .. i``; minus infinity above the diagonal.

    As Mamba-2's own listing has it: a running sum down the columns of the lower triangle.
    """
    T = steps.shape[-1]
    lower = torch.ones(T, T, dtype=torch.bool, device=steps.device).tril(-1)
    below = torch.where(lower, steps[..., None], 0.0)
    seen = lower | torch.eye(T, dtype=torch.bool, device=steps.device)
    return torch.where(seen, cumsum(below, -2), float("-inf"))


class NpuMamba2(nn.Module):
    """A `Mamba2Block` as a list of simple operations, which may be exchanged for products.

    With the defaults it computes what the block does, in the order of Mamba-2's listing; `npuify`
    puts CumBA, ReduBA and ActiBA in. The parameters are the block's own. Lengths are padded to
    whole chunks (steps of size 0 change nothing), so that there are two graphs, whatever comes.
    """

    def __init__(
        self,
        block: Mamba2Block,
        *,
        cumsum: Callable = torch.cumsum,
        total: Callable = torch.sum,
        silu: Callable = F.silu,
        softplus: Callable = F.softplus,
    ):
        super().__init__()
        self.block = block
        self.cumsum, self.total, self.silu, self.softplus = cumsum, total, silu, softplus

    def forward(
        self, x: Float[Tensor, "B L C"], state: Mamba2State | None = None
    ) -> tuple[Float[Tensor, "B L C"], Mamba2State]:
        """Outputs and the state behind the last input, a chunk after the other."""
        state = self.init_state(len(x)) if state is None else state
        z, x, dt, B, C, inputs = self._enter(x, state)
        L, T, ys, S = dt.shape[1], self.block.chunk, [], state.scan
        parts = [F.pad(part, (*(part.dim() - 2) * (0, 0), 0, -L % T)) for part in (x, dt, B, C)]
        for chunk in zip(*(part.split(T, 1) for part in parts), strict=True) if L else ():
            y, S = self._chunk(*chunk, S)
            ys.append(y)
        y = torch.cat(ys, 1)[:, :L] if ys else torch.zeros_like(x)
        return self._leave(y, x, z), Mamba2State(inputs, S)

    def step(
        self, x_t: Float[Tensor, "B C"], state: Mamba2State
    ) -> tuple[Float[Tensor, "B C"], Mamba2State]:
        """One input more: a graph without any running sum."""
        z, x, dt, B, C, inputs = self._enter(x_t[:, None], state)
        decay = torch.exp(dt[:, 0] * -self.block.A_log.exp())[..., None, None]
        S = decay * state.scan + B[:, 0, :, :, None] * (dt[..., None] * x)[:, 0, :, None]
        y = self.total(C[:, 0, :, :, None] * S, -2)[:, None]
        return self._leave(y, x, z)[:, 0], Mamba2State(inputs, S)

    def init_state(self, batch: int) -> Mamba2State:
        """Nothing seen yet."""
        return self.block.init_state(batch)

    def _enter(self, x: Tensor, state: Mamba2State) -> tuple[Tensor, ...]:
        """``z (B, L, E)``, ``x (B, L, H, V)``, ``dt (B, L, H)``, ``B`` and ``C (B, L, H, N)``, and
        the convolution's last inputs."""
        block = self.block
        inner, channels, heads = len(block.norm.weight), len(block.conv1d.weight), len(block.D)
        z, mixed, dt = block.in_proj(x).split([inner, channels, heads], 2)
        weight, bias = block.conv1d.weight[:, 0], block.conv1d.bias
        mixed, inputs = causal_short_conv(
            mixed.mT, weight, bias, state=state.inputs, return_state=True
        )
        sizes = [inner, *2 * [block.groups * block.state]]
        x, B, C = self.silu(mixed).mT.split(sizes, 2)
        B, C = (
            y.unflatten(2, (block.groups, -1)).repeat_interleave(heads // block.groups, 2)
            for y in (B, C)
        )
        dt = self.softplus(dt + block.dt_bias)
        return z, x.unflatten(2, (heads, -1)), dt, B, C, inputs

    def _chunk(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, S: Tensor):
        """Outputs ``(B, T, H, V)`` without the skip, and the state behind the chunk."""
        steps = (dt * -self.block.A_log.exp()).mT  # (B, H, T)
        decay = torch.exp(segment_sums(steps, self.cumsum))
        so_far = self.cumsum(steps, -1)
        x, B, C = ((y.transpose(1, 2)) for y in (dt[..., None] * x, B, C))
        y = (C @ B.mT * decay) @ x + torch.exp(so_far)[..., None] * (C @ S)
        whole = self.total(steps, -1)[..., None]
        S = torch.exp(whole)[..., None] * S + (B * torch.exp(whole - so_far)[..., None]).mT @ x
        return y.transpose(1, 2), S

    def _leave(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """Skip, gate, norm and ``out_proj``."""
        y = (y + self.block.D[:, None] * x).flatten(2) * self.silu(z)
        norm = self.block.norm
        mean = self.total(y * y, -1)[..., None] / y.shape[-1]
        return self.block.out_proj(y * torch.rsqrt(mean + norm.eps) * norm.weight)


def npuify(block: Mamba2Block, *, segments: int = 64, radius: float = 8.0) -> NpuMamba2:
    """``block`` with all three rewrites: no running sum, no reduction, no activation is left."""
    silu = PiecewiseLinear(F.silu, segments, radius)
    softplus = PiecewiseLinear(F.softplus, segments, radius)
    return NpuMamba2(block, cumsum=cumba, total=reduba, silu=silu, softplus=softplus)


def op_census(function: Callable, *arguments) -> Counter[str]:
    """How often each of PyTorch's operations runs in ``function(*arguments)``, views aside."""
    counts: Counter[str] = Counter()

    class Census(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if not operation.is_view:
                counts[operation.overloadpacket.__name__] += 1
            return operation(*args, **(kwargs or {}))

    with torch.no_grad(), Census():
        function(*arguments)
    return counts


def example() -> dict:
    """A rewritten block of width 6 with two heads, 4 states, and six tokens for it.

    >>> given = example()
    >>> given["mixer"](given["x"])[0].shape
    torch.Size([2, 6, 6])
    """
    torch.manual_seed(0)
    block = Mamba2Block(6, state=4, head_width=6, chunk=4).double()
    return dict(mixer=npuify(block), x=torch.randn(2, 6, 6, dtype=torch.float64))
