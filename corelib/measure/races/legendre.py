"""LMUFormer on this machine: its memory three ways, and whole models against GRU and Transformer.

The models compute different functions and are raced unchecked; `classifiers` makes them of one
width behind the same head, and lab 103 trains them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from ...primitives.fft_conv import fft_conv
from ...primitives.spiking_scan import spiking_scan, spiking_scan_reference
from ...state_space.lmuformer import (
    LMUFormer,
    discrete_memory,
    impulse_response,
    memory_fft,
    memory_reference,
)
from ...state_space.lmuformer_layers import Chain, StreamingClassifier
from ...state_space.lmuformer_spiking import SpikingLMUFormer
from ..gradients import forward_backward
from ..scaling import sweep
from . import Row, register, rows

B, N = 4, 64
OPTIONS = dict(tolerance=1e-3, repeats=3, min_time=0.05)


class GRULayer(nn.Module):
    """``torch.nn.GRU`` as a sequence mixer."""

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        self.gru = nn.GRU(inputs, channels, batch_first=True)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, state = self.gru(x, None if state is None else state[None])
        return y, state[0]

    def step(self, x_t: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.forward(x_t[:, None], state)
        return y[:, 0], state

    def init_state(self, batch: int) -> Tensor:
        return self.gru.weight_hh_l0.new_zeros(batch, self.gru.hidden_size)


class CausalEncoder(nn.Module):
    """Learned positions and ``torch.nn.TransformerEncoderLayer``, each position seeing the past."""

    def __init__(self, channels: int, length: int, *, layers: int = 2, heads: int = 4):
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(length, channels))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                channels, heads, 4 * channels, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x + self.positions[: x.shape[1]]
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return x


def classifiers(
    features: int, classes: int, *, channels: int, length: int, seed: int = 0
) -> dict[str, StreamingClassifier]:
    """The four models of one width, each behind the same head, from one seed each."""

    def gru():
        return StreamingClassifier(Chain(GRULayer(features, channels)), channels, classes)

    def transformer():
        body = Chain(nn.Linear(features, channels), CausalEncoder(channels, length))
        return StreamingClassifier(body, channels, classes)

    made = {}
    for name, make in (
        ("LMUFormer", lambda: LMUFormer(features, classes, channels, theta=length)),
        ("spiking", lambda: SpikingLMUFormer(features, classes, channels, theta=length, gain=2)),
        ("GRU", gru),
        ("Transformer", transformer),
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made[name] = make()
    return made


def by_expanded_fft(u: Tensor, A_bar: Tensor, B_bar: Tensor) -> Tensor:
    """`fft_conv` with the input once for every number of the memory."""
    response = impulse_response(A_bar, B_bar, u.shape[1]).mT.contiguous()
    return fft_conv(u[:, None].expand(-1, len(B_bar), -1), response).mT


@register("legendre-memory", "the Legendre memory: recurrence, FFT, and a convolution for each row")
def legendre_memory(quick: bool) -> Iterator[Row]:
    lengths = (32, 64) if quick else (128, 256, 512, 1024, 2048)
    system = [x.float() for x in discrete_memory(N, 128.0)]
    runs = {
        "corelib": memory_fft,
        "recurrence": memory_reference,
        "fft_conv of each row": by_expanded_fft,
    }

    def both(L: int) -> dict[str, Callable]:
        u = torch.rand(B, L, generator=torch.Generator().manual_seed(0))
        return {
            name: forward_backward(lambda u, run=run: run(u, *system), u)
            for name, run in runs.items()
        }

    result = sweep(lengths, both, **OPTIONS)
    yield from rows(result, what="forward + backward", shape=f"B{B} N{N} float32")


@register("spiking-scan", "spiking neurons over time: a scan behind the gradients against autograd")
def spiking(quick: bool) -> Iterator[Row]:
    lengths = (32, 64) if quick else (64, 128, 256, 512, 1024)
    runs = {"corelib": spiking_scan, "loop": spiking_scan_reference}

    def both(L: int) -> dict[str, Callable]:
        x = 2 * torch.randn(B, L, 128, generator=torch.Generator().manual_seed(0))
        return {
            name: forward_backward(lambda x, run=run: run(x)[0], x) for name, run in runs.items()
        }

    result = sweep(lengths, both, **OPTIONS)
    yield from rows(result, what="forward + backward", shape=f"B{B} C128 float32")


@register("lmuformer-models", "whole classifiers of width 64 (different functions)")
def models(quick: bool) -> Iterator[Row]:
    lengths = (32, 64) if quick else (64, 128, 256, 512, 1024)

    def both(L: int) -> dict[str, Callable]:
        x = torch.randn(B, L, 16, generator=torch.Generator().manual_seed(0))
        made = classifiers(16, 24, channels=64, length=L)
        made = {"corelib" if name == "LMUFormer" else name: m for name, m in made.items()}
        return {name: forward_backward(model, x) for name, model in made.items()}

    result = sweep(lengths, both, check=None, repeats=3, min_time=0.05)
    yield from rows(result, what="forward + backward", shape=f"B{B} C64 float32")
