"""RAT, windows and their hybrid against dense attention on this machine; and what they remember.

* ``rat``: the function, equality checked against two other ways to write it; then its growth.
* ``rat-layers``: whole layers, RAT, local attention, both in turn, and dense attention.
* ``rat-decoding``: one token behind many.
* ``window-blocks``: the block form of sliding-window attention against the others.

    python -m corelib.measure.races.rat       # trains what is missing in rat.json

Who takes part: `rat_contestants`. `recorded` reads the runs that are shipped: pairs of keys and
values recalled, along the dial.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...linear_time.local_attention import LocalAttention
from ...linear_time.rat import RAT, RATState, rat_step
from ...models.optim import FusedAdamW
from ...primitives import attention, masks
from ...primitives.sliding_window import sliding_window_attention
from ..gradients import forward_backward
from ..race import Missing, race
from ..scaling import sweep
from . import Row, register, rows
from .rat_contestants import (
    CHUNK,
    D,
    H,
    compiled_flex,
    dense,
    flex_over_ends,
    inputs,
    layers,
    ours,
    written_out,
)

RUNS = pathlib.Path(__file__).with_suffix(".json")
WINDOW = 256
OPTIONS = dict(repeats=3, min_time=0.02)
FULL, QUICK = (256, 512, 1024, 2048, 4096), (64, 128)


# --- time -----------------------------------------------------------------------------------------


@register("rat", "recurrence inside chunks, attention across chunks, against dense attention")
def rat(quick: bool) -> Iterator[Row]:
    L = 256 if quick else 2048
    shape = f"B1 H{H} D{D} float32"
    tensors = inputs(L)
    flex = Missing("left out of the quick race") if quick else flex_over_ends(L)
    same = {"corelib": ours, "masked softmax": written_out, "compiled flex": flex}
    with torch.no_grad():
        result = race(_on(same, *tensors), tolerance=1e-4, **OPTIONS)
    yield from rows(result, what=f"chunk {CHUNK}, forward", shape=f"{shape} L{L}")
    del same["compiled flex"]
    runs = {name: forward_backward(f, *tensors) for name, f in same.items()}
    runs["compiled flex"] = Missing("flex attention has no backward pass on a CPU")
    result = race(runs, tolerance=1e-4, **OPTIONS)
    yield from rows(result, what=f"chunk {CHUNK}, forward + backward", shape=f"{shape} L{L}")

    others = {"corelib": ours, "chunk 64": partial(ours, chunk=64), "dense attention": dense}
    lengths = QUICK if quick else (*FULL, 16384)
    alone = partial(_calls, runs=others)
    with torch.no_grad():
        result = sweep(lengths, alone, check=None, **OPTIONS)
    yield from rows(result, what="forward, not the same function", shape=shape)
    both = partial(_calls, runs=others, wrap=forward_backward)
    result = sweep(QUICK if quick else FULL, both, check=None, **OPTIONS)
    yield from rows(result, what="forward + backward, not the same function", shape=shape)


def _on(runs: dict, *tensors: Tensor) -> dict:
    return {n: f if isinstance(f, Missing) else partial(f, *tensors) for n, f in runs.items()}


def _calls(L: int, runs: dict[str, Callable], wrap: Callable = partial) -> dict[str, Callable]:
    tensors = inputs(L)
    return {name: wrap(run, *tensors) for name, run in runs.items()}


@register("rat-layers", "two layers: RAT, RAT and local attention, local attention, dense")
def rat_layers(quick: bool) -> Iterator[Row]:
    C, heads = (64, 2) if quick else (256, 4)
    stacks = layers(C, heads, CHUNK, WINDOW)

    def through(stack: nn.ModuleList, x: Tensor) -> Tensor:
        for layer in stack:
            x = layer(x)[0]
        return x

    def contestants(L: int) -> dict[str, Callable]:
        x = torch.randn(1, L, C, generator=torch.Generator().manual_seed(0))
        return {n: forward_backward(partial(through, stack), x) for n, stack in stacks.items()}

    result = sweep(QUICK if quick else FULL, contestants, check=None, **OPTIONS)
    shape = f"B1 C{C} H{heads} chunk {CHUNK} window {WINDOW} float32"
    yield from rows(result, what="forward + backward", shape=shape)


@register("rat-decoding", "one token behind many: RAT's ends against every key")
def rat_decoding(quick: bool) -> Iterator[Row]:
    def contestants(S: int) -> dict[str, Callable]:
        q, k, v, g = inputs(S)
        row, keys, values = (x[:, :, -1] for x in (q, k, v, g)), k.contiguous(), v.contiguous()
        row = list(row)
        ends = (x[:, :, ::CHUNK].contiguous() for x in (k, v))
        state = RATState(*ends, k[:, :, 0], v[:, :, 0], S)
        query = q[:, :, -1:]
        return {
            "corelib": lambda: rat_step(*row, state, CHUNK)[0],
            "dense attention": lambda: attention(query, keys, values, causal=True),
        }

    lengths = QUICK if quick else (1024, 2048, 4096, 8192, 16384)
    with torch.no_grad():
        result = sweep(lengths, contestants, check=None, **OPTIONS)
    yield from rows(result, what="a step", shape=f"B1 H{H} D{D} chunk {CHUNK} float32")


@register("window-blocks", "sliding-window attention: blocks, narrow tiles, compiled flex, dense")
def window_blocks(quick: bool) -> Iterator[Row]:
    for window in (32,) if quick else (64, 512):
        blocks = partial(sliding_window_attention, window=window)
        tiles = partial(attention, causal=True, window=window)
        L = 128 if quick else 2048
        q, k, v, _ = inputs(L)
        mask = masks.attention_mask(causal=True, window=window)
        flex = Missing("left out of the quick race") if quick else compiled_flex(mask, 64, q, k, v)
        shape = f"B1 H{H} D{D} window {window} float32"
        named = {"corelib": blocks, "attention(window)": tiles, "compiled flex": flex}
        with torch.no_grad():
            result = race(_on(named, q, k, v), tolerance=1e-4, **OPTIONS)
        yield from rows(result, what="forward", shape=f"{shape} L{L}")

        def contestants(L: int, blocks=blocks, tiles=tiles) -> dict[str, Callable]:
            q, k, v, _ = inputs(L)
            named = {"corelib": blocks, "attention(window)": tiles, "dense attention": dense}
            return {n: forward_backward(f, q, k, v) for n, f in named.items()}

        result = sweep(QUICK if quick else FULL, contestants, check=None, **OPTIONS)
        yield from rows(result, what="forward + backward, against no window", shape=shape)


# --- what the dial forgets ------------------------------------------------------------------------

PAIRS, ASKED, KEYS, VALUES, WIDTH = 32, 16, 64, 16, 32
CHUNKS = (1, 2, 4, 16, 64)
SEEDS = range(2)


def pairs(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values ``(batch, 48)``, one token a pair: 32 distinct keys with a value each, then
    16 of them again with the blank value `VALUES`; and the ``(batch, 16)`` values asked for."""
    order = torch.rand(batch, KEYS, generator=generator).argsort(1)
    keys = order[:, :PAIRS]
    values = torch.randint(VALUES, (batch, PAIRS), generator=generator)
    asked = torch.randint(PAIRS, (batch, ASKED), generator=generator)
    blank = torch.full((batch, ASKED), VALUES)
    ids = torch.cat([keys, keys.gather(1, asked)], 1), torch.cat([values, blank], 1)
    return *ids, values.gather(1, asked)


class Recall(nn.Module):
    """One mixer over tokens that are a key and a value; logits of the values asked for."""

    def __init__(self, mixer: nn.Module):
        super().__init__()
        self.keys, self.values = nn.Embedding(KEYS, WIDTH), nn.Embedding(VALUES + 1, WIDTH)
        self.mixer, self.read = mixer, nn.Linear(WIDTH, VALUES)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        x = self.keys(keys) + self.values(values)
        x = x + self.mixer(F.rms_norm(x, x.shape[-1:]))[0]
        return self.read(F.rms_norm(x, x.shape[-1:]))[:, PAIRS:]


def recall_mixer(kind: str) -> nn.Module:
    """``"chunk 4"`` or ``"window 16"``: two heads."""
    name, size = kind.split()
    if name == "window":
        return LocalAttention(WIDTH, 2, window=int(size))
    return RAT(WIDTH, 2, chunk=int(size))


def learn_recall(kind: str, seed: int, steps: int = 300) -> dict:
    """Train on fresh pairs; the share of 512 new rows' questions that is answered."""
    torch.manual_seed(seed)
    model, generator = Recall(recall_mixer(kind)), torch.Generator().manual_seed(seed)
    optimiser = FusedAdamW(model.parameters(), lr=1e-2, clip=1.0)
    for step in range(steps):
        *ids, wanted = pairs(32, generator)
        loss = F.cross_entropy(model(*ids).flatten(0, 1), wanted.flatten())
        optimiser.step(loss, share=min(1.0, (step + 1) / 20, 2 * (steps - step) / steps))
    with torch.no_grad():
        *ids, wanted = pairs(512, torch.Generator().manual_seed(99))
        right = (model(*ids).argmax(-1) == wanted).float().mean().item()
    return {"task": "pairs", "kind": kind, "seed": seed, "recall": round(right, 4)}


def recorded() -> list[dict]:
    """The runs in rat.json."""
    return json.loads(RUNS.read_text(encoding="utf-8"))["runs"]


def recall() -> dict[str, list[float]]:
    """Kind -> share of pairs recalled, every recorded seed."""
    found: dict[str, list[float]] = {}
    for run in recorded():
        found.setdefault(run["kind"], []).append(run["recall"])
    return found


def main() -> None:
    """Train what is not recorded yet, and save after each run."""
    runs = recorded() if RUNS.exists() else []
    done = {(run["kind"], run["seed"]) for run in runs}
    for seed in SEEDS:
        for kind in [*(f"chunk {n}" for n in CHUNKS), "window 16"]:
            if (kind, seed) in done:
                continue
            runs.append(learn_recall(kind, seed))
            print(runs[-1])
            lines = ",\n".join(json.dumps(run) for run in runs)
            command = "python -m corelib.measure.races.rat"
            RUNS.write_text(f'{{"command": "{command}", "runs": [\n{lines}\n]}}\n', "utf-8")


if __name__ == "__main__":
    main()
