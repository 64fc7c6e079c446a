"""Hydra against other ways to look both ways: what they cost, and what small encoders learn.

The encoders learn to fill in masked letters of Shakespeare, with about the same parameters each and
the same windows, masks and learning rate; the score is bits per masked letter of other plays.

    python -m corelib.measure.races.bidirectional       # runs what is missing in bidirectional.json

`recorded` reads the runs that are shipped.
"""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import documents
from ...primitives import attention, ssd_chunked
from ...state_space.bidirectional import (
    Add,
    Bidirectional,
    Concatenate,
    Multiply,
    shift,
    unshift,
)
from ...state_space.hydra import Hydra, Scan, added, quasiseparable, quasiseparable_matrix
from ...state_space.mamba2 import Mamba2Block
from ..gradients import forward_backward
from ..scaling import sweep
from . import Row, register, rows

RUNS = pathlib.Path(__file__).with_suffix(".json")
FULL, QUICK = (256, 512, 1024, 2048, 4096), (64, 128)
OPTIONS = dict(tolerance=1e-3, repeats=3, min_time=0.05)


# --- time -----------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Softmax attention that sees both sides, ``(B, L, C) -> (B, L, C)``, of inner width ``E``."""

    def __init__(self, width: int, inner: int, head_width: int):
        super().__init__()
        self.head_width = head_width
        self.qkv = nn.Linear(width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = (
            part.unflatten(2, (-1, self.head_width)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, 2)
        )
        return self.out(attention(*heads, causal=False).transpose(1, 2).flatten(2))


class BehindConvolution(nn.Module):
    """A mixer behind the convolution of width 7 that Hydra has inside."""

    def __init__(self, width: int, mixer: nn.Module):
        super().__init__()
        self.conv, self.mixer = nn.Conv1d(width, width, 7, groups=width, padding=3), mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(F.silu(self.conv(x.mT)).mT)


def mixing_inputs(L: int, H: int = 8, V: int = 32, N: int = 32) -> tuple:
    """Values, two scans and a diagonal, float32."""
    g = torch.Generator().manual_seed(0)

    def scan() -> Scan:
        B, C = torch.randn(2, 1, 1, L, N, generator=g)
        return Scan(0.1 * torch.rand(1, H, L, generator=g), -torch.linspace(1, 4, H), B, C)

    x, diagonal = torch.randn(1, H, L, V, generator=g), torch.randn(1, H, L, generator=g)
    return x, scan(), scan(), diagonal


def two_calls(x: Tensor, past: Scan, future: Scan, diagonal: Tensor) -> Tensor:
    """What one writes at first: each scan for itself, then both shifted."""
    below = shift(ssd_chunked(x, *past))
    above = unshift(ssd_chunked(x.flip(2), *future.mirrored()).flip(2))
    return below + above + diagonal[..., None] * x


def as_a_matrix(x: Tensor, past: Scan, future: Scan, diagonal: Tensor) -> Tensor:
    return quasiseparable_matrix(past, future, diagonal) @ x


@register("quasiseparable", "Hydra's product: two scans in one call, two calls, the matrix")
def quasiseparable_race(quick: bool) -> Iterator[Row]:
    runs = {"corelib": quasiseparable, "two calls": two_calls, "the matrix": as_a_matrix}

    def contestants(L: int) -> dict[str, Callable]:
        inputs = mixing_inputs(L)
        return {name: lambda run=run: run(*inputs) for name, run in runs.items()}

    with torch.no_grad():
        result = sweep(QUICK if quick else FULL[:4], contestants, **OPTIONS)
    yield from rows(result, what="forward", shape="B1 H8 V32 N32 float32")


def layers(
    width: int, head_width: int, state: int, chunk: int = 64
) -> dict[str, Callable[[], nn.Module]]:
    """Layers of about the same number of parameters: a two-sided one is as large as two halves."""

    def half() -> nn.Module:
        return Mamba2Block(width, state=state, expand=1, head_width=head_width, chunk=chunk)

    def hydra(mixing: Callable = quasiseparable) -> nn.Module:
        return Hydra(width, state=state, head_width=head_width, chunk=chunk, mixing=mixing)

    def usual() -> nn.Module:
        """The same layer, its scans added: a skip for each head, none of the input."""
        layer = hydra(added)
        nn.init.zeros_(layer.fc_D.weight).requires_grad_(False)
        return layer

    return {
        "Hydra": hydra,
        "Hydra, added": usual,
        "two Mamba-2, added": lambda: Bidirectional(half(), half(), Add()),
        "two Mamba-2, multiplied": lambda: Bidirectional(half(), half(), Multiply()),
        "two Mamba-2, side by side": lambda: Bidirectional(half(), half(), Concatenate(width)),
        "attention": lambda: Attention(width, 2 * width, head_width),
        "attention, convolution first": lambda: BehindConvolution(
            width, Attention(width, 2 * width, head_width)
        ),
    }


@register("hydra", "layers that look both ways, of one size (not the same function)")
def hydra_race(quick: bool) -> Iterator[Row]:
    kinds = layers(128, 32, 32)
    named = {"corelib": "Hydra", "two Mamba-2, added": None, "attention": None}

    def contestants(L: int) -> dict[str, Callable]:
        torch.manual_seed(0)
        x = torch.randn(1, L, 128)
        return {n: forward_backward(kinds[kind or n](), x) for n, kind in named.items()}

    result = sweep(QUICK if quick else FULL, contestants, check=None, repeats=3, min_time=0.05)
    yield from rows(result, what="forward + backward", shape="B1 C128 N32 float32")


# --- filling in masked letters --------------------------------------------------------------------

WIDTH, LENGTH, BATCH, STEPS, SEEDS = 32, 48, 8, 300, range(3)
HIDDEN_SHARE, MASK = 0.2, 95  # of the letters; the id of a hidden one, behind the printable ones


def letters(split: str) -> Tensor:
    """The plays of a split as one line of printable characters, ids 0 to 94."""
    text = " ".join(" ".join(documents("shakespeare", split).values()).split())
    codes = torch.frombuffer(bytearray(text.encode("ascii", "ignore")), dtype=torch.uint8)
    return (codes.long() - 32).clamp(0, 94)


class Encoder(nn.Module):
    """Blocks of mixer and feed-forward over letters and their places; logits of every letter."""

    def __init__(self, mixer: Callable[[], nn.Module], blocks: int = 1):
        super().__init__()
        self.letters = nn.Embedding(96, WIDTH)
        self.places = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.mixers = nn.ModuleList(mixer() for _ in range(blocks))
        self.feeds = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(blocks)
        )
        self.read = nn.Linear(WIDTH, 95)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.letters(ids) + self.places
        for mixer, feed in zip(self.mixers, self.feeds, strict=True):
            x = x + mixer(F.rms_norm(x, (WIDTH,)))
            x = x + feed(F.rms_norm(x, (WIDTH,)))
        return self.read(F.rms_norm(x, (WIDTH,)))


def windows(text: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Stretches of text ``(count, LENGTH)``, and which letters are hidden."""
    starts = torch.randint(len(text) - LENGTH, (count, 1), generator=generator)
    hidden = torch.rand(count, LENGTH, generator=generator) < HIDDEN_SHARE
    return text[starts + torch.arange(LENGTH)], hidden


def bits(model: nn.Module, ids: Tensor, hidden: Tensor) -> Tensor:
    """Bits per hidden letter."""
    logits = model(ids.masked_fill(hidden, MASK))[hidden]
    return F.cross_entropy(logits, ids[hidden]) / math.log(2)


def learn(kind: str, seed: int, steps: int = STEPS) -> dict:
    """One run: parameters, bits on other plays, and the curve of every tenth step."""
    torch.manual_seed(seed)
    model, train = Encoder(layers(WIDTH, 16, 8, chunk=16)[kind]), letters("train")
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, steps)
    g, curve, began = torch.Generator().manual_seed(seed), [], time.process_time()
    for _ in range(steps):
        loss = bits(model, *windows(train, BATCH, g))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        curve.append(loss.item())
    with torch.no_grad():
        held = bits(model, *windows(letters("test"), 512, torch.Generator().manual_seed(99)))
    tens = torch.tensor(curve).unflatten(0, (-1, 10)).mean(1)
    return {
        "kind": kind,
        "seed": seed,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "bits": round(held.item(), 4),
        "seconds": round(time.process_time() - began, 1),
        "curve": [round(value, 3) for value in tens.tolist()],
    }


def recorded() -> list[dict]:
    """The runs in bidirectional.json."""
    return json.loads(RUNS.read_text(encoding="utf-8"))["runs"]


def scores() -> dict[str, list[float]]:
    """Kind -> bits per hidden letter of every recorded seed."""
    runs = recorded()
    return {kind: [r["bits"] for r in runs if r["kind"] == kind] for kind in layers(WIDTH, 16, 8)}


def main() -> None:
    """Run what is not recorded yet, and save after each run."""
    runs = recorded() if RUNS.exists() else []
    for seed in SEEDS:
        for kind in layers(WIDTH, 16, 8, chunk=16):
            if any((r["kind"], r["seed"]) == (kind, seed) for r in runs):
                continue
            runs.append(learn(kind, seed))
            print({name: value for name, value in runs[-1].items() if name != "curve"})
            lines = ",\n".join(json.dumps(run) for run in runs)
            command = "python -m corelib.measure.races.bidirectional"
            RUNS.write_text(f'{{"command": "{command}", "runs": [\n{lines}\n]}}\n', "utf-8")


if __name__ == "__main__":
    main()
