"""Convolutional State Space Models for Long-Range Spatiotemporal Modeling (arXiv 2310.19694).

Idea: let the state of a linear recurrence be a picture, and its matrices convolutions. Then it can
be scanned like any other, and stays cheap if the state's own convolution is of one pixel.

    X[t] = A * X[t-1] + B * U[t]        Y[t] = C * X[t] + D * U[t]         (* a 2-D convolution)
    (A, b) ∘ (A', b') = (A' * A, A' * b + b')                              (the scan's operator)

Two kernels of side ``k`` joined make one of side ``2 k - 1``; for ``t`` steps it is
``1 + t (k - 1)``, soon as large as the picture (`conv_scan_dense`). With ``k = 1`` it does not
grow: every pixel has the same linear system, and its diagonal form is S5
(`corelib.state_space.s5`), so that HiPPO's poles can be where it starts. ``B`` and ``C`` keep
kernels of 3 by 3, and look at all frames at once.

| here     | paper      | what                                    | shape                         |
|:---------|:-----------|:----------------------------------------|:------------------------------|
| x, y     | U, Y       | frames                                  | (B, L, C, H, W)               |
| state    | X          | one complex picture a pole              | (B, P, H, W)                  |
| decay    | Lambda-bar | ``exp(step poles)``                     | (P,)                          |
| enter    | B-bar      | ``gain B``                              | (P, C, k, k)                  |
| B, C, D  | B, C, D    | kernels                                 | (P or C, C or P, k, k)        |

Exact: the scan is the loop; ``k = 1`` in the scan's operator is the diagonal form. Block: as in the
released Moving-MNIST setting, residual and normalised behind; its residual network is here two
convolutions with GELU between (their layout inside is not known to us). Released code draws real
``B`` and ``C`` and turns them by HiPPO's eigenvectors, which has the law that is drawn from here.
Cost: time ``O(L H W (C P k^2 + P))``; a step of generation the same without ``L``.
Oracles: the loop over frames, `S5Layer` on every pixel's neighbourhood, the dense scan on a torus.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Inexact
from torch import Tensor, nn

from corelib.primitives.associative_scan import associative_scan
from corelib.primitives.diagonal_scan import diagonal_scan

from .s5 import S5System, complex_normal

Frames = Float[Tensor, "B L C H W"]
Pictures = Complex[Tensor, "B P H W"]

# --- the paper's operator, for kernels of any size ------------------------------------------------


def torus_conv(
    kernel: Inexact[Tensor, "O P k k"], x: Inexact[Tensor, "P H W"]
) -> Inexact[Tensor, "O H W"]:
    """``out[o, y, x] = sum kernel[o, p, i, j] x[p, y + i - k//2, x + j - k//2]``, edges joined."""
    half = kernel.shape[-1] // 2
    out = x.new_zeros(kernel.shape[0], *x.shape[1:])
    for i in range(kernel.shape[-1]):
        for j in range(kernel.shape[-1]):
            moved = x.roll((half - i, half - j), (1, 2))
            out = out + torch.einsum("op,phw->ohw", kernel[:, :, i, j], moved)
    return out


def join_kernels(
    first: Inexact[Tensor, "P Q k k"], then: Inexact[Tensor, "O P m m"]
) -> Inexact[Tensor, "O Q n n"]:
    """The kernel that does both, of side ``k + m - 1``."""
    k, m = first.shape[-1], then.shape[-1]
    out = first.new_zeros(then.shape[0], first.shape[1], k + m - 1, k + m - 1)
    for i in range(m):
        for j in range(m):
            out[:, :, i : i + k, j : j + k] += torch.einsum(
                "op,pqkl->oqkl", then[:, :, i, j], first
            )
    return out


Step = tuple[Tensor, Tensor]  # (kernel, picture): X -> kernel * X + picture


def join_steps(first: Step, then: Step) -> Step:
    """The operator: first the one step, then the other. Associative, on a torus."""
    return join_kernels(first[0], then[0]), torus_conv(then[0], first[1]) + then[1]


def conv_scan_dense(
    kernels: Inexact[Tensor, "L P P k k"], x: Inexact[Tensor, "L P H W"]
) -> list[Step]:
    """``X[t] = kernels[t] * X[t-1] + x[t]`` from zero, on a torus, ``k`` odd: every prefix.

    The second of each pair is the state; the first, all steps up to it in one kernel, is what makes
    this a reference only: of ``t`` steps it has the side ``1 + t (k - 1)``.
    """
    if kernels.shape[-1] % 2 == 0:
        raise ValueError(f"kernels: expected an odd side, got {kernels.shape[-1]}")
    return associative_scan(join_steps, list(zip(kernels, x)))


# --- the layer ------------------------------------------------------------------------------------


class ConvS5Layer(nn.Module):
    """A recurrence over frames ``(B, L, C, H, W)`` whose state is a picture; in one scan.

    Args:
        channels: of the frames in and out.
        state_size: ``N``, real channels of the state; even.
        kernel: side of the convolutions into and out of the state; odd.
        torus: edges of a frame are joined, in place of zeros beyond them.
        step_min, step_max: steps are drawn log-uniformly between.
    """

    SYSTEM = ("B",)

    def __init__(
        self,
        channels: int,
        state_size: int = 64,
        kernel: int = 3,
        *,
        torus: bool = False,
        step_min: float = 1e-3,
        step_max: float = 1e-1,
    ):
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels: expected at least 1, got {channels}")
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"kernel: expected an odd side, got {kernel}")
        self.channels, self.kernel, self.torus = channels, kernel, torus
        self.system = S5System(state_size, step_min, step_max)
        P, square = state_size // 2, kernel**2
        self.B = complex_normal(P, channels, kernel, kernel, variance=2 / (channels * square))
        self.C = complex_normal(channels, P, kernel, kernel, variance=2 / (state_size * square))
        self.D = nn.Conv2d(channels, channels, kernel, bias=False)

    def discrete(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(decay (P,), enter (P, C, k, k), C (C, P, k, k))``, complex."""
        decay, gain = self.system.discrete()
        enter = gain[:, None, None, None] * torch.view_as_complex(self.B)
        return decay, enter, torch.view_as_complex(self.C)

    def forward(self, x: Frames, state: Pictures | None = None) -> tuple[Frames, Pictures]:
        """All frames at once; ``state`` is what an earlier stretch or step returned."""
        self._check_input(x, 5)
        B, L, _, height, width = x.shape
        decay, enter, C = self.discrete()
        frames = x.flatten(0, 1)
        fed = self._enter(frames, enter).view(B, L, -1)
        start = None if state is None else state.flatten(1)
        h = diagonal_scan(decay.repeat_interleave(height * width), fed, state=start)
        h = h.view(B, L, len(decay), height, width)
        y = self._leave(h.flatten(0, 1), C, frames).view_as(x)
        if not L:
            return y, self.init_state(B, height, width) if state is None else state
        return y, h[:, -1]

    def step(
        self, x_t: Float[Tensor, "B C H W"], state: Pictures
    ) -> tuple[Float[Tensor, "B C H W"], Pictures]:
        """One frame."""
        self._check_input(x_t, 4)
        decay, enter, C = self.discrete()
        h = decay[:, None, None] * state + self._enter(x_t, enter)
        return self._leave(h, C, x_t), h

    def init_state(self, batch: int, height: int, width: int) -> Pictures:
        """Zeros."""
        nothing = self.B.new_zeros(batch, len(self.system.log_step), height, width)
        return torch.complex(nothing, nothing)

    def _enter(self, x: Tensor, enter: Tensor) -> Tensor:
        """``enter * x`` by one real convolution, ``(n, C, H, W) -> (n, P, H, W)`` complex."""
        both = self._conv(x, torch.cat([enter.real, enter.imag]))
        return torch.complex(*both.chunk(2, 1))

    def _leave(self, h: Tensor, C: Tensor, x: Tensor) -> Tensor:
        """``2 Re(C * h) + D * x`` by one real convolution."""
        kernel = torch.cat([2 * C.real, -2 * C.imag, self.D.weight], 1)
        return self._conv(torch.cat([h.real, h.imag, x], 1), kernel)

    def _conv(self, x: Tensor, kernel: Tensor) -> Tensor:
        half = self.kernel // 2
        if self.torus and half:
            return F.conv2d(F.pad(x, (half,) * 4, mode="circular"), kernel)
        return F.conv2d(x, kernel, padding=half)

    def _check_input(self, x: Tensor, axes: int) -> None:
        if x.dim() != axes or x.shape[-3] != self.channels:
            lead = ("B", "L")[: axes - 3]
            raise ValueError(
                f"x: expected ({', '.join(lead)}, {self.channels}, H, W), "
                f"got shape {tuple(x.shape)}"
            )
        if x.dtype != self.B.dtype:
            raise TypeError(f"x: expected the layer's dtype, {self.B.dtype}, got {x.dtype}")


class ConvS5Block(nn.Module):
    """``norm(x + network(ConvS5(x)))``: two convolutions with GELU, LayerNorm at every pixel."""

    def __init__(self, channels: int, state_size: int = 64, kernel: int = 3, **options):
        super().__init__()
        self.mixer = ConvS5Layer(channels, state_size, kernel, **options)
        half = kernel // 2
        self.inner = nn.Conv2d(channels, channels, kernel, padding=half)
        self.outer = nn.Conv2d(channels, channels, kernel, padding=half)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Frames, state: Pictures | None = None) -> tuple[Frames, Pictures]:
        y, state = self.mixer(x, state)
        return self._rest(x.flatten(0, 1), y.flatten(0, 1)).view_as(x), state

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.mixer.step(x_t, state)
        return self._rest(x_t, y), state

    def init_state(self, batch: int, height: int, width: int) -> Pictures:
        """Zeros."""
        return self.mixer.init_state(batch, height, width)

    def _rest(self, x: Tensor, y: Tensor) -> Tensor:
        inner = self.inner(F.gelu(y))
        z = x + y + self.outer(F.gelu(inner))
        return self.norm(z.movedim(1, -1)).movedim(-1, 1).contiguous()


def example() -> dict:
    """Six frames of 5 by 5 pixels and one channel; each step blurs the state with 3 by 3.

    >>> kernel, state = conv_scan_dense(**example())[-1]
    >>> kernel.shape, state.shape
    (torch.Size([1, 1, 13, 13]), torch.Size([1, 5, 5]))
    """
    x = torch.zeros(6, 1, 5, 5, dtype=torch.float64)
    x[0, 0, 2, 2], x[3, 0, 0, 4] = 1.0, 2.0
    blur = torch.tensor([[0.0, 0.1, 0.0], [0.1, 0.4, 0.1], [0.0, 0.1, 0.0]], dtype=torch.float64)
    return dict(kernels=blur.expand(6, 1, 1, 3, 3), x=x)
