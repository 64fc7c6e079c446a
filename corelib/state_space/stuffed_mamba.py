"""Stuffed Mamba: State Collapse and State Capacity of RNN-Based Long-Context Modeling (arXiv
2410.07145; later versions: Oversized States Lead to the Inability to Forget).

Idea: a state that is large for the training length never needs to forget, so it never learns to;
past that length what it holds on to drowns what was just written. Three patches of Mamba-2's
recurrence make a trained model forget:

    base       h_t = a_t h_{t-1} + dt_t B_t x_t^T         a_t = exp(dt_t A)       y_t = h_t^T C_t
    forget     a_t <- retention a_t,  B_t <- insertion B_t                        (`forget_scale`)
    clip       h_t <- h_t min(1, largest / |h_t|)                              (`state_norm_clip`)
    window     h_t^(r) = h_t - (a_{t-r+1} ... a_t) h_{t-r}                        (`window_state`)

Each takes and returns what `ssd_chunked` does and can stand in its place inside a `Mamba2Block`
(`patched`). The window is exact: the weighted sum over the last ``r`` steps alone, from two scans
instead of ``r`` steps for each position.

| here                  | paper        | what                                       | shape        |
|:----------------------|:-------------|:-------------------------------------------|:-------------|
| x, dt, A, B, C        | x, Delta, …  | as in `corelib.primitives.ssd`             |              |
| state                 | h            | of a head                                  | (B, H, K, V) |
| retention, insertion  |              | 0.9999 and 0.75 in section 3.2.2           |              |
| largest, window       | p, r         | Frobenius norm; steps remembered           |              |

Exact: all of it is the equations above; at retention = insertion = 1, an infinite ``largest``, or
a window of the whole length each patch is the base, bit for bit. `state_norm_clip` is not linear
and runs step by step. The difference of a window loses about as many digits as ``|h_t|`` is larger
than ``|h_t^(r)|``. How collapse is measured: `corelib.state_space.state_collapse`. Left out: runs
of 1M tokens. Cost: `forget_scale` that of `ssd_chunked`, `window_state` twice that for any window;
`WindowedState` two states, and the last ``r`` inputs.
Oracles: recomputation from the last ``r`` steps, `ssd_reference`.
"""

from __future__ import annotations

import collections
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..primitives import ssd_chunked, ssd_reference
from ..primitives.selective_scan import step_size
from .state_collapse import capacity_curve, collapse_probe, patched  # noqa: F401  (their home)

Heads = Float[Tensor, "B H L V"]
Steps = Float[Tensor, "B H L"]
Rates = Float[Tensor, " H"]
Mixing = Float[Tensor, "B G L K"]
State = Float[Tensor, "B H K V"]

# --- three patches --------------------------------------------------------------------------------


def forget_scale(
    x: Heads,
    dt: Steps,
    A: Rates,
    B: Mixing,
    C: Mixing,
    D: Rates | None = None,
    *,
    retention: float = 0.9999,
    insertion: float = 0.75,
    dt_bias: Rates | None = None,
    dt_softplus: bool = False,
    chunk: int = 64,
    state: State | None = None,
    return_state: bool = False,
) -> Heads | tuple[Heads, State]:
    """`ssd_chunked` that keeps ``retention`` of what it would, and writes ``insertion`` of it.

    Raises ValueError unless ``0 < retention <= 1`` and ``0 <= insertion``.
    """
    if not 0 < retention <= 1:
        raise ValueError(f"retention: expected more than 0 and at most 1, got {retention}")
    if not insertion >= 0:
        raise ValueError(f"insertion: expected at least 0, got {insertion}")
    dt = step_size(dt, dt_bias, dt_softplus)
    longer = dt + math.log(retention) / A[:, None]  # exp(longer A) is retention exp(dt A)
    written = torch.where(longer > 0, dt / longer.clamp_min(1e-30), 0.0)
    y, state = ssd_chunked(
        x * written[..., None],
        longer,
        A,
        insertion * B,
        C,
        chunk=chunk,
        state=state,
        return_state=True,
    )
    y = y if D is None else torch.addcmul(y, x, D[:, None, None].to(x.dtype))
    return (y, state) if return_state else y


def state_norm_clip(
    x: Heads,
    dt: Steps,
    A: Rates,
    B: Mixing,
    C: Mixing,
    D: Rates | None = None,
    *,
    largest: float,
    dt_bias: Rates | None = None,
    dt_softplus: bool = False,
    chunk: int = 64,
    state: State | None = None,
    return_state: bool = False,
) -> Heads | tuple[Heads, State]:
    """`ssd_reference` with every head's state shrunk to a norm of ``largest`` after each step.

    ``chunk`` means nothing here: what a step writes depends on the norm before it.
    """
    if not largest > 0:
        raise ValueError(f"largest: expected more than 0, got {largest}")
    dt = step_size(dt, dt_bias, dt_softplus)
    if state is None:
        state = x.new_zeros(*x.shape[:2], B.shape[3], x.shape[3])
    ys = []
    for t in range(x.shape[2]):
        now = slice(t, t + 1)
        _, state = ssd_reference(
            x[:, :, now], dt[:, :, now], A, B[:, :, now], C[:, :, now],
            state=state, return_state=True,
        )  # fmt: skip
        norm = torch.linalg.vector_norm(state, dim=(2, 3), keepdim=True)
        state = state * (norm.clamp_max(largest) / norm.clamp_min(1e-30))
        query = C[:, :, t].repeat_interleave(x.shape[1] // C.shape[1], 1)
        ys.append((query[..., None] * state).sum(2))
    y = torch.stack(ys, 2) if ys else torch.zeros_like(x)
    y = y if D is None else y + D[:, None, None] * x
    return (y, state) if return_state else y


def window_reference(
    x: Heads, dt: Steps, A: Rates, B: Mixing, C: Mixing, D: Rates | None = None, *, window: int
) -> Heads:
    """`window_state`, every position computed anew from its last ``window`` steps."""
    _check_window(window)
    ys = [x[:, :, :0]]
    for t in range(x.shape[2]):
        seen = slice(max(0, t + 1 - window), t + 1)
        x_seen, dt_seen, B_seen, C_seen = (part[:, :, seen] for part in (x, dt, B, C))
        ys.append(ssd_reference(x_seen, dt_seen, A, B_seen, C_seen, D)[:, :, -1:])
    return torch.cat(ys, 2)


def window_state(
    x: Heads,
    dt: Steps,
    A: Rates,
    B: Mixing,
    C: Mixing,
    D: Rates | None = None,
    *,
    window: int,
    dt_bias: Rates | None = None,
    dt_softplus: bool = False,
    chunk: int = 64,
    state: State | None = None,
    return_state: bool = False,
) -> Heads | tuple[Heads, State]:
    """`ssd_chunked` whose states hold the last ``window`` steps only, by a difference of states.

    The state returned is that of the window. To go on from there `WindowedState` is needed, which
    knows the steps that will leave; ValueError for a ``state`` that is not zero.
    """
    _check_window(window)
    if state is not None and state.any():
        raise ValueError("state: expected None or zeros, whose steps are known; see WindowedState")
    dt = step_size(dt, dt_bias, dt_softplus)
    y, last = ssd_chunked(x, dt, A, B, C, D, chunk=chunk, return_state=True)
    if window < x.shape[2]:
        old = slice(None, -window)
        gone, before = ssd_chunked(
            *(x[:, :, old], dt[:, :, old], A, B[:, :, old], C[:, :, window:]),
            chunk=chunk,
            return_state=True,
        )
        sums = (dt * A[:, None]).double().cumsum(-1)
        kept = (sums[..., window:] - sums[..., old]).exp().to(last.dtype)[..., None]
        y = y - F.pad((kept * gone).to(y.dtype), [0, 0, window, 0])
        last = last - kept[:, :, -1:] * before
    return (y, last) if return_state else y


class WindowedState:
    """The same window for one step after the other: two states that walk ``window`` steps apart.

    >>> windowed = WindowedState(-torch.ones(2), window=8)
    >>> y = windowed.step(torch.ones(1, 2, 4), torch.ones(1, 2), *torch.ones(2, 1, 2, 3))
    """

    def __init__(self, A: Rates, window: int):
        _check_window(window)
        self.A, self.window = A, window
        self.recent: collections.deque = collections.deque()
        self.now = self.old = self.inside = None

    def step(
        self,
        x_t: Float[Tensor, "B H V"],
        dt_t: Float[Tensor, "B H"],
        B_t: Float[Tensor, "B G K"],
        C_t: Float[Tensor, "B G K"],
    ) -> Float[Tensor, "B H V"]:
        """One step more: its output, without the skip connection."""
        B_t, C_t = (part.repeat_interleave(x_t.shape[1] // part.shape[1], 1) for part in (B_t, C_t))
        if self.now is None:
            self.now = self.old = x_t.new_zeros(*B_t.shape, x_t.shape[-1])
            self.inside = torch.zeros_like(dt_t, dtype=torch.float64)
        self.now = self._advanced(self.now, x_t, dt_t, B_t)
        self.recent.append((x_t, dt_t, B_t))
        self.inside = self.inside + dt_t
        if len(self.recent) > self.window:
            leaving = self.recent.popleft()
            self.old = self._advanced(self.old, *leaving)
            self.inside = self.inside - leaving[1]
        return (C_t[..., None] * self.state).sum(2)

    @property
    def state(self) -> State:
        """What the last ``window`` steps wrote."""
        return self.now - (self.inside * self.A).exp().to(self.now)[..., None, None] * self.old

    def _advanced(self, state: Tensor, x: Tensor, dt: Tensor, B: Tensor) -> Tensor:
        decay = torch.exp(dt * self.A)[..., None, None]
        return decay * state + B[..., None] * (dt[..., None] * x)[:, :, None]


def example() -> dict:
    """Six steps of one head with a state of two numbers, which forgets a tenth a step.

    >>> window_state(**example(), window=3).shape
    torch.Size([1, 1, 6, 1])
    """
    double = dict(dtype=torch.float64)
    keys = torch.tensor([[1, 0], [0, 1], [0.6, 0.8], [1, 0], [0, 1], [0.8, -0.6]], **double)
    x = torch.tensor([1.0, 2, -1, 3, 0.5, 1], **double).view(1, 1, 6, 1)
    A = torch.tensor([math.log(0.9)], **double)
    return dict(x=x, dt=torch.ones(1, 1, 6, **double), A=A, B=keys[None, None], C=keys[None, None])


def _check_window(window: int) -> None:
    if isinstance(window, bool) or not isinstance(window, int):
        raise TypeError(f"window: expected an int, got {type(window).__name__}")
    if window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
