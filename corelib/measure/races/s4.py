"""S4 on this machine: against its formula written by hand, its own recurrence, LSTM and attention.

``by hand`` is the paper's algorithm as one would write it down: complex numbers, ``torch.fft`` and
autograd. LSTM and attention compute something else; they are raced unchecked, as what S4 replaces.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...state_space.s4 import S4
from ..gradients import forward_backward
from ..race import race
from ..scaling import sweep
from . import Row, register, rows

B, C, N = 4, 64, 64
SHAPE = f"B{B} C{C} N{N} float32"
OPTIONS = dict(tolerance=1e-3, repeats=3, min_time=0.05)


def _layer_and_input(L: int) -> tuple[S4, Tensor]:
    torch.manual_seed(0)
    return S4(C, N, L), torch.randn(B, L, C, generator=torch.Generator().manual_seed(1))


def kernel_by_hand(layer: S4) -> Tensor:
    """Algorithm 1 of the paper, with every pole and its conjugate."""
    L, step = layer.length, layer.log_step.exp()[:, None, None]
    both = [torch.cat([x, x.conj()], -1) for x in layer.system()]
    tilde = torch.view_as_complex(layer.C_tilde)
    poles, p, B_, C_ = (x[..., None] for x in (*both, torch.cat([tilde, tilde.conj()], -1)))
    z = torch.exp(-2j * math.pi * torch.arange(L // 2 + 1) / L)
    r = 2 / (2 / step * (1 - z) - poles * (1 + z))
    through, left = (C_ * B_ * r).sum(1), (C_ * p * r).sum(1)
    right, loop = (p.conj() * B_ * r).sum(1), (p.conj() * p * r).sum(1)
    half = (1 + z) / 2
    return torch.fft.irfft(through - half * left * right / (1 + half * loop), n=L)


def _layer_by_hand(layer: S4, x: Tensor) -> Tensor:
    u, L = x.transpose(1, 2), x.shape[1]
    spectrum = torch.fft.rfft(u, n=2 * L) * torch.fft.rfft(kernel_by_hand(layer), n=2 * L)
    return torch.fft.irfft(spectrum, n=2 * L)[..., :L].transpose(1, 2) + layer.skip * x


def _with_parameters(run: Callable[[S4, Tensor], Tensor], layer: S4, x: Tensor) -> Callable:
    """Forward and backward, to the input and to every parameter."""
    names = [name for name, _ in layer.named_parameters()]

    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return run(self.layer, x)

    bound = Bound()

    def call(x: Tensor, *values: Tensor) -> Tensor:
        given = {f"layer.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(bound, given, (x,))

    return forward_backward(call, x, *layer.parameters())


def _steps(layer: S4, x: Tensor) -> Tensor:
    state, outputs = layer.init_state(x.shape[0]), []
    for x_t in x.unbind(1):
        y, state = layer.step(x_t, state)
        outputs.append(y)
    return torch.stack(outputs, 1)


def _grad_free(call: Callable, *arguments) -> Callable:
    def run():
        with torch.no_grad():
            return call(*arguments)

    return run


@register("s4-layer", "an S4 layer against the paper's formula written by hand")
def s4_layer(quick: bool) -> Iterator[Row]:
    lengths = (64, 128) if quick else (256, 512, 1024, 2048, 4096)
    runs = {"corelib": lambda layer, x: layer(x)[0], "by hand": _layer_by_hand}

    def forward(L: int) -> dict[str, Callable]:
        given = _layer_and_input(L)
        return {name: _grad_free(run, *given) for name, run in runs.items()}

    def both(L: int) -> dict[str, Callable]:
        given = _layer_and_input(L)
        return {name: _with_parameters(run, *given) for name, run in runs.items()}

    yield from rows(sweep(lengths, forward, **OPTIONS), what="forward", shape=SHAPE)
    yield from rows(sweep(lengths, both, **OPTIONS), what="forward + backward", shape=SHAPE)


@register("s4-recurrence", "S4's convolution against its own recurrence, and one step of it")
def s4_recurrence(quick: bool) -> Iterator[Row]:
    lengths = (32, 64) if quick else (256, 512, 1024, 2048, 4096)

    def contestants(L: int) -> dict[str, Callable]:
        layer, x = _layer_and_input(L)
        return {
            "corelib": _grad_free(lambda: layer(x)[0]),
            "corelib, step by step": _grad_free(_steps, layer, x),
        }

    yield from rows(sweep(lengths, contestants, **OPTIONS), what="a whole sequence", shape=SHAPE)
    layer, x = _layer_and_input(lengths[-1])
    with torch.no_grad():
        _, state = layer.step(x[:, -1], layer(x[:, :-1])[1])
    once = {
        "corelib": _grad_free(lambda: layer.step(x[:, -1], state)[0]),
        "the whole convolution again": _grad_free(lambda: layer(x)[0]),
    }
    shape = f"{SHAPE} L{lengths[-1]}"
    yield from rows(race(once, check=None), what="one more output", shape=shape)


@register("s4-against-others", "S4, LSTM and attention of one width (not the same function)")
def s4_against_others(quick: bool) -> Iterator[Row]:
    lengths = (64, 128) if quick else (256, 512, 1024, 2048, 4096)

    def contestants(L: int) -> dict[str, Callable]:
        layer, x = _layer_and_input(L)
        lstm = nn.LSTM(C, C, batch_first=True)
        heads = nn.Linear(C, 3 * C)

        def attention(x: Tensor) -> Tensor:
            q, k, v = heads(x).unflatten(-1, (3, 4, C // 4)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        runs = {"corelib": lambda x: layer(x)[0], "LSTM": lambda x: lstm(x)[0]}
        runs["attention, 4 heads"] = attention
        return {name: forward_backward(run, x) for name, run in runs.items()}

    result = sweep(lengths, contestants, check=None, repeats=3, min_time=0.05)
    yield from rows(result, what="forward + backward", shape=SHAPE)
