"""LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units (arXiv
2402.04882), the dense model.

Idea: a Transformer's block with a fixed linear memory in the place of attention. One number a step
enters it, and its state holds the last ``theta`` of them as coefficients of Legendre polynomials.

    u_t = relu(w . x_t + b)                      what is written, one number
    m_t = A_bar m_{t-1} + B_bar u_t              the memory: not trained
    y_t = relu(W [m_t; x_t])                     what is read

``A_bar``, ``B_bar`` are the zero-order hold of `legendre_matrices` at a step of 1, so that
``sum_i P_i(2 r - 1) m_t[i]`` is about ``u[t - r theta]`` for ``0 <= r <= 1``. The memory is linear
in ``u``, hence a convolution with ``[B_bar, A_bar B_bar, ...]``: by FFT to train, as a recurrence
to stream.

| here         | paper        | what                 | shape             |
|:-------------|:-------------|:---------------------|:------------------|
| u, m         | u, m         | written, memory      | (B, L), (B, L, N) |
| A_bar, B_bar | A_bar, B_bar | the discrete system  | (N, N), (N,)      |
| theta        | theta        | window, in steps     |                   |
| y            | h            | what the layer gives | (B, L, C)         |

The block: ``x += norm(linear(LMU(x)))``, then ``x +=`` a channel mixer four times as wide, batch
norms throughout. In front of the blocks stand four convolutions of three taps and a fifth as a
residual branch; the head averages its logits over all positions, in a stream over those so far
(`corelib.state_space.lmuformer_layers.early_exit`). Layout and activations follow the authors'
released code.

Exact: FFT and recurrence give the same memory. Different: our convolutions look at the past only,
where the paper's look one step ahead each (four in a row: the same output, four steps later), so
that a stream gives what the whole sequence gives. Ours: the confidence rule of `early_exit`; the
paper cuts at fixed lengths. The spiking model is in `corelib.state_space.lmuformer_spiking`.

Cost: ``O(N L log L)`` by FFT, ``O(N^2)`` for a step of the recurrence.
Oracles: ``scipy.signal.cont2discrete`` and the loop `memory_reference`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corelib.primitives.discretise import zero_order_hold
from corelib.primitives.fft_conv import fast_length

from .lmuformer_layers import CausalConv, Chain, ChannelNorm, Residual, StreamingClassifier
from .shared import legendre_matrices

Inputs = Float[Tensor, "B L"]
Memory = Float[Tensor, "B L N"]
Matrix = Float[Tensor, "N N"]
Column = Float[Tensor, " N"]
State = Float[Tensor, "B N"]


def discrete_memory(N: int, theta: float) -> tuple[Matrix, Column]:
    """``(A_bar, B_bar)`` of a memory of ``N`` numbers over ``theta`` steps, in float64."""
    A, B = legendre_matrices(N, theta)
    A_bar, B_bar = zero_order_hold(A, B[:, None], 1.0)
    return A_bar, B_bar[:, 0]


# --- the memory, two ways -------------------------------------------------------------------------


def memory_reference(u: Inputs, A_bar: Matrix, B_bar: Column, state: State | None = None) -> Memory:
    """Every state of ``m_t = A_bar m_{t-1} + B_bar u_t``, one after the other."""
    m = _start(u, A_bar, B_bar, state)
    states = [m[:, None][:, :0]]
    for u_t in u.unbind(1):
        m = m @ A_bar.mT + u_t[:, None] * B_bar
        states.append(m[:, None])
    return torch.cat(states, 1)


def memory_fft(u: Inputs, A_bar: Matrix, B_bar: Column, state: State | None = None) -> Memory:
    """The same as a convolution: one transform of ``u``, ``N`` back (the paper's training form)."""
    _start(u, A_bar, B_bar, state)
    m = _convolved(u, _spectrum(impulse_response(A_bar, B_bar, u.shape[1])))
    return m if state is None else m + _trajectory(A_bar, state @ A_bar.mT, u.shape[1])


def impulse_response(A_bar: Matrix, B_bar: Column, L: int) -> Float[Tensor, "L N"]:
    """``A_bar^t B_bar`` for ``t < L``: what a single 1 leaves in the memory."""
    return _trajectory(A_bar, B_bar, L)


def _trajectory(A: Tensor, start: Tensor, L: int) -> Tensor:
    """``A^t start`` for ``t < L``: ``(..., L, N)`` of ``start (..., N)``, by doubling."""
    rows, power = start[..., None, :], A.mT
    while rows.shape[-2] < L:
        rows = torch.cat([rows, rows @ power], -2)
        power = power @ power
    return rows[..., :L, :]


def _spectrum(response: Tensor) -> Tensor:
    """``(N, frequencies)``, on a circle that is long enough for as many inputs."""
    return torch.fft.rfft(response.mT, n=fast_length(max(1, 2 * len(response) - 1)))


def _convolved(u: Tensor, spectrum: Tensor) -> Tensor:
    L, circle = u.shape[1], fast_length(max(1, 2 * u.shape[1] - 1))
    if not L:
        return u.new_zeros(*u.shape, len(spectrum))
    return torch.fft.irfft(torch.fft.rfft(u, n=circle)[:, None] * spectrum, n=circle)[..., :L].mT


def _start(u: Tensor, A_bar: Tensor, B_bar: Tensor, state: Tensor | None) -> Tensor:
    """Check, and the memory to start from."""
    N = B_bar.shape[-1]
    for name, x, shape in (
        ("u", u, (u.shape[0], u.shape[-1])),
        ("B_bar", B_bar, (N,)),
        ("A_bar", A_bar, (N, N)),
        ("state", u.new_zeros(u.shape[0], N) if state is None else state, (u.shape[0], N)),
    ):
        if tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
        if x.dtype != u.dtype or not x.is_floating_point():
            raise TypeError(f"{name}: expected u's dtype, a floating one, {u.dtype}, got {x.dtype}")
    return u.new_zeros(u.shape[0], N) if state is None else state


# --- the model ------------------------------------------------------------------------------------


class LegendreMemory(nn.Module):
    """``u (B, L) -> m (B, L, N)``: the memory with its fixed matrices; by FFT, or step by step."""

    def __init__(self, size: int, theta: float):
        super().__init__()
        self.size, self.theta = size, theta
        for name, x in zip(("A_bar", "B_bar"), discrete_memory(size, theta)):
            self.register_buffer(name, x.to(torch.get_default_dtype()), persistent=False)
        self._known: tuple | None = None  # the spectrum of the last length

    def forward(self, u: Inputs, state: State | None = None) -> tuple[Memory, State]:
        if state is not None:
            m = memory_fft(u, self.A_bar, self.B_bar, state)
        else:
            m = _convolved(u, self._spectrum_for(u))
        before = self.init_state(len(u)) if state is None else state
        return m, (m[:, -1] if u.shape[1] else before)

    def step(self, u_t: Float[Tensor, " B"], state: State) -> tuple[State, State]:
        m = state @ self.A_bar.mT + u_t[:, None] * self.B_bar
        return m, m

    def init_state(self, batch: int) -> State:
        return self.A_bar.new_zeros(batch, self.size)

    def _spectrum_for(self, u: Tensor) -> Tensor:
        """Kept from call to call: the matrices never change, only length, dtype and device do."""
        wanted = (u.shape[1], u.dtype, u.device)
        if self._known is None or self._known[0] != wanted:
            with torch.inference_mode(False):  # what is made here is used in training too
                response = impulse_response(self.A_bar, self.B_bar, u.shape[1])
                self._known = wanted, _spectrum(response)
        return self._known[1]


class LMUFFT(nn.Module):
    """The paper's LMU as a sequence mixer: one number in, a memory of them, all channels out.

    Args:
        channels: width of input and output.
        size: numbers in the memory; None takes as many as there are channels.
        theta: window, in steps.
    """

    def __init__(self, channels: int, size: int | None = None, *, theta: float = 128.0):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels: expected at least 1, got {channels}")
        size = channels if size is None else size
        self.memory = LegendreMemory(size, theta)
        self.write = nn.Linear(channels, 1)
        self.read = nn.Linear(size + channels, channels)

    def forward(
        self, x: Float[Tensor, "B L C"], state: State | None = None
    ) -> tuple[Float[Tensor, "B L C"], State]:
        """All positions at once; ``state`` is the memory after what came before."""
        return self._with(x, *self.memory(self.written(x), state))

    def step(self, x_t: Float[Tensor, "B C"], state: State) -> tuple[Float[Tensor, "B C"], State]:
        """One position by the recurrence."""
        return self._with(x_t, *self.memory.step(self.written(x_t), state))

    def init_state(self, batch: int) -> State:
        """An empty memory."""
        return self.memory.init_state(batch)

    def written(self, x: Tensor) -> Tensor:
        """The number that enters the memory at each position."""
        return torch.relu(self.write(x))[..., 0]

    def _with(self, x: Tensor, m: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(self.read(torch.cat([m, x], -1))), state


def lmu_block(channels: int, *, theta: float = 128.0, expand: int = 4) -> Chain:
    """An LMU and a channel mixer, each as a residual branch."""
    wide = expand * channels
    mixer = (
        nn.Linear(channels, wide), ChannelNorm(wide), nn.GELU(),
        nn.Linear(wide, channels), ChannelNorm(channels), nn.ReLU(),
    )  # fmt: skip
    lmu = LMUFFT(channels, theta=theta), nn.Linear(channels, channels), ChannelNorm(channels)
    return Chain(Residual(*lmu), Residual(*mixer))


class LMUFormer(StreamingClassifier):
    """The dense model: ``x (B, L, F)`` to logits ``(B, classes)``, whole or as a stream.

    Args:
        features: width ``F`` of the input.
        classes: how many to tell apart.
        channels: width of the model, and size of its memory.
        depth: blocks.
        theta: window of the memory, in steps.
    """

    def __init__(
        self, features: int, classes: int, channels: int = 256, *, depth: int = 1,
        theta: float = 128.0, expand: int = 4,
    ):  # fmt: skip
        widths = [features] + 4 * [channels]
        embed = [
            layer
            for inputs, outputs in zip(widths, widths[1:])
            for layer in (CausalConv(inputs, outputs), nn.ReLU(), ChannelNorm(outputs))
        ]
        blocks = [lmu_block(channels, theta=theta, expand=expand) for _ in range(depth)]
        body = Chain(*embed, Residual(CausalConv(channels, channels)), *blocks)
        super().__init__(body, channels, classes)


def example() -> dict:
    """Six tokens, and a memory of three numbers over a window of six steps.

    >>> memory_reference(**example()).shape
    torch.Size([1, 6, 3])
    """
    A_bar, B_bar = discrete_memory(3, 6.0)
    u = torch.tensor([[1.0, 0, 0, 2, 0, 0]], dtype=torch.float64)
    return dict(u=u, A_bar=A_bar, B_bar=B_bar)
