"""Layers around a kernel as long as the sequence: SGConv and LongConv, with what follows them.

``by hand`` is each layer as one would write it down with ``torch.fft``, on the same parameters;
``compiled`` is `torch.compile` of that, at one length (it compiles for half a minute). S4D with the
same map behind it computes something else; it is raced unchecked, as what these layers replace.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...linear_time.long_conv import LongConv
from ...linear_time.sgconv import SGConv
from ...state_space.s4d import S4D
from ..race import Missing
from ..scaling import sweep
from . import Row, register, rows

B, C = 4, 64
SHAPE = f"B{B} C{C} float32"
OPTIONS = dict(repeats=3, min_time=0.05)
COMPILED_AT = 4096
Run = Callable[[nn.Module, Tensor], Tensor]

#: In PyTorch 2.13 Inductor's C++ for the gradient of SGConv's interpolations counts the inner index
#: of a tile twice in the addresses of atomic adds, writes past the end, and the process aborts
#: (pytorch issue 191837). One thread needs no atomics and is right.
CORRUPTS = Missing("PyTorch 2.13's compiled backward corrupts memory on more than one thread")


def _convolved(layer: nn.Module, x: Tensor, kernel: Tensor) -> Tensor:
    """Three transforms of twice the length, and the skip connection."""
    u, L = x.transpose(1, 2), x.shape[1]
    spectrum = torch.fft.rfft(u, n=2 * L) * torch.fft.rfft(kernel, n=2 * L)
    y = torch.fft.irfft(spectrum, n=2 * L)[..., :L] + layer.skip[:, None] * u
    return y.transpose(1, 2)


def sgconv_by_hand(layer: SGConv, x: Tensor) -> Tensor:
    """Pieces interpolated, scaled, joined; convolution; GELU; the map of channels."""
    last, joined = len(layer.pieces) - 1, []
    for i, piece in enumerate(layer.pieces):
        factor = 2 ** max(0, i - 1)
        stretched = F.interpolate(piece[None], scale_factor=factor, mode="linear")[0]
        joined.append(stretched * layer.decay[:, None] ** (last - i))
    kernel = torch.cat(joined, 1)[:, : x.shape[1]] / layer.norm
    return layer.out(F.gelu(_convolved(layer, x, kernel)))


def long_conv_by_hand(layer: LongConv, x: Tensor) -> Tensor:
    """The kernel squashed; convolution; GELU; the gated map of channels."""
    kernel = layer.weight.sign() * F.relu(layer.weight.abs() - layer.lam)
    return F.glu(layer.out(F.gelu(_convolved(layer, x, kernel))), -1)


def _forward(run: Run, layer: nn.Module, x: Tensor) -> Callable:
    def call() -> Tensor:
        with torch.no_grad():
            return run(layer, x)

    return call


def _both(run: Run, layer: nn.Module, x: Tensor) -> Callable:
    """Forward and backward, to the input and to every parameter."""
    leaves = [x.clone().requires_grad_(), *layer.parameters()]
    seed = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def call() -> tuple:
        y = run(layer, leaves[0])
        return y.detach(), torch.autograd.grad(y, leaves, seed)

    return call


def _compiled(bind: Callable, run: Run, layer: nn.Module, x: Tensor) -> Callable | Missing:
    """``bind`` of ``run`` compiled: only what is raced, so the forward race needs no backward."""
    fast = bind(torch.compile(run, dynamic=False), layer, x)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # complex numbers are left to the uncompiled operators
            fast()
    except Exception as problem:  # no C++ compiler, an older PyTorch, another processor
        return Missing(f"does not compile here ({type(problem).__name__})")
    return fast


def _output(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


def _inputs(L: int) -> Tensor:
    return torch.randn(B, L, C, generator=torch.Generator().manual_seed(1))


def _lengths(quick: bool) -> tuple[int, ...]:
    return (64, 128) if quick else (256, 512, 1024, 2048, 4096, 8192, 16384)


def _against_hand(
    make: Callable[[int], nn.Module], by_hand: Run, quick: bool, *, unsafe: Missing | None = None
) -> Iterator[Row]:
    """``unsafe``: why the compiled backward must not even be tried; None where it may be."""
    for what, bind in (("forward", _forward), ("forward + backward", _both)):

        def contestants(L: int, bind: Callable = bind) -> dict[str, Callable | Missing]:
            torch.manual_seed(0)
            layer, x = make(L), _inputs(L)
            runs = {"corelib": _output, "torch.fft by hand": by_hand}
            bound = {name: bind(run, layer, x) for name, run in runs.items()}
            if L == COMPILED_AT:
                safe = unsafe is None or bind is _forward
                bound["compiled"] = _compiled(bind, by_hand, layer, x) if safe else unsafe
            return bound

        result = sweep(_lengths(quick), contestants, tolerance=1e-3, **OPTIONS)
        yield from rows(result, what=what, shape=SHAPE)


@register("sgconv-layer", "an SGConv layer against the same written with torch.fft")
def sgconv_layer(quick: bool) -> Iterator[Row]:
    unsafe = CORRUPTS if torch.get_num_threads() > 1 else None
    yield from _against_hand(lambda L: SGConv(C, L), sgconv_by_hand, quick, unsafe=unsafe)


@register("long-conv-layer", "a LongConv layer against the same written with torch.fft")
def long_conv_layer(quick: bool) -> Iterator[Row]:
    yield from _against_hand(lambda L: LongConv(C, L), long_conv_by_hand, quick)


class _S4DLayer(nn.Module):
    """S4D with what follows it in SGConv's layer."""

    def __init__(self):
        super().__init__()
        self.mixer, self.out = S4D(C), nn.Linear(C, C)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.out(F.gelu(self.mixer(x)[0])), None


@register("long-kernels", "SGConv, LongConv and S4D layers of one width (not the same function)")
def long_kernels(quick: bool) -> Iterator[Row]:
    for what, bind in (("forward", _forward), ("forward + backward", _both)):

        def contestants(L: int, bind: Callable = bind) -> dict[str, Callable]:
            torch.manual_seed(0)
            layers = {"corelib": SGConv(C, L), "corelib, LongConv": LongConv(C, L)}
            layers["corelib, S4D N64"] = _S4DLayer()
            return {n: bind(_output, layer, _inputs(L)) for n, layer in layers.items()}

        result = sweep(_lengths(quick), contestants, check=None, **OPTIONS)
        yield from rows(result, what=what, shape=SHAPE)
