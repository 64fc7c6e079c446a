"""Reading twice: what prefix linear attention costs, and what small readers learn.

The readers find the one id that two sets share (`corelib.data.set_disjointness`) with two layers
of `PrefixLinearAttention`: once (no prefix), twice (the prompt repeated), or with all of the prompt
as the prefix. All have the same weights at the start, the same batches and the same state.

    python -m corelib.measure.races.read_twice       # runs what is missing in read_twice.json

`recorded` reads the runs that are shipped.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import set_disjointness
from ...linear_time.jrt import (
    PrefixLinearAttention,
    based_attention,
    jrt_prompt,
    prefix_linear_attention,
    prefix_linear_naive,
)
from ...models.optim import FusedAdamW
from ...primitives import attention
from ..gradients import forward_backward
from ..race import Missing
from ..scaling import sweep
from . import Row, peer, register, rows

RUNS = pathlib.Path(__file__).with_suffix(".json")
H, K, V = 4, 16, 64
SHAPE = f"B1 H{H} K{K} V{V} float32"
OPTIONS = dict(repeats=3, min_time=0.05)


# --- time -----------------------------------------------------------------------------------------


def prefill_inputs(L: int) -> list[Tensor]:
    """``q, k, v, k_enc, v_enc``: the whole prompt is the prefix."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, H, L, n, generator=generator) for n in (K, K, V, K, V)]


def prefills(L: int) -> dict[str, tuple[Callable, list[Tensor]]]:
    """Name -> a function and its inputs, for a prompt of ``L`` tokens.

    Softmax attention has queries and keys as wide as its values, as models do; JRT-Prompt is
    Based attention over twice the tokens.
    """
    q, k, v, k_enc, v_enc = prefill_inputs(L)
    wide = torch.randn(3, 1, H, L, V, generator=torch.Generator().manual_seed(1))
    twice = [torch.cat([x, x], 2) for x in (q, k, v)]
    return {
        "corelib": (lambda *x: prefix_linear_attention(*x)[0], [q, k, v, k_enc, v_enc]),
        "Based, read once": (lambda *x: based_attention(*x)[0], [q, k, v]),
        "JRT-Prompt: Based, read twice": (lambda *x: based_attention(*x)[0], twice),
        "softmax attention": (lambda *x: attention(*x, causal=True), list(wide)),
        "softmax attention (PyTorch)": (
            lambda *x: F.scaled_dot_product_attention(*x, is_causal=True),
            list(wide),
        ),
    }


def _fla() -> Callable | Missing:
    module = peer("fla.ops.based.naive")
    if isinstance(module, Missing):
        return module
    return lambda q, k, v: module.naive_parallel_based(q.clone(), k, v)


@register("read-twice", "prefix linear attention and reading twice against softmax attention")
def read_twice(quick: bool) -> Iterator[Row]:
    same_lengths = (64, 128) if quick else (256, 512, 1024, 2048)
    lengths = (64, 128) if quick else (256, 512, 1024, 2048, 4096, 8192)

    def prefix(L: int) -> dict[str, Callable]:
        inputs = prefill_inputs(L)
        return {
            "corelib": lambda: prefix_linear_attention(*inputs)[0],
            "masked square": lambda: prefix_linear_naive(*inputs)[0],
        }

    def causal(L: int) -> dict[str, Callable | Missing]:
        q, k, v, _, _ = prefill_inputs(L)
        fla = _fla()
        return {
            "corelib": lambda: based_attention(q, k, v)[0],
            "fla naive": fla if isinstance(fla, Missing) else lambda: fla(q, k, v),
        }

    def forward(L: int) -> dict[str, Callable]:
        return {n: lambda f=f, x=x: f(*x) for n, (f, x) in prefills(L).items()}

    def both(L: int) -> dict[str, Callable]:
        return {n: forward_backward(f, *x) for n, (f, x) in prefills(L).items()}

    with torch.no_grad():
        same = sweep(same_lengths, prefix, **OPTIONS)
        yield from rows(same, what="prefix linear attention", shape=SHAPE)
        same = sweep(same_lengths, causal, **OPTIONS)
        yield from rows(same, what="Based attention", shape=SHAPE)
        other = sweep(lengths, forward, check=None, **OPTIONS)
    yield from rows(other, what="prefill, different functions", shape=SHAPE)
    other = sweep(lengths, both, check=None, **OPTIONS)
    yield from rows(other, what="prefill, forward + backward", shape=SHAPE)


# --- what is learnt -------------------------------------------------------------------------------

KINDS = ("once", "twice", "prefix")
VOCAB, WIDTH, HEADS, LAYERS = 64, 64, 2, 2
FEATURES, STEPS, BATCH, RATE = 8, 750, 64, 3e-3
TRAINED = ((4, 24), (24, 4), (12, 12), (4, 4), (4, 12), (12, 4))
TESTED = tuple((a, b) for a in (2, 4, 8, 16, 24) for b in (2, 4, 8, 16, 24))


class Reader(nn.Module):
    """Two mixers with their norms; ids and the part of the prompt they are in, as embeddings.

    The part (how many marks have been read) is what a counter of one number would know; it spares
    the model a layer.
    """

    def __init__(self, features: int):
        super().__init__()
        self.ids, self.parts = nn.Embedding(VOCAB, WIDTH), nn.Embedding(6, WIDTH)
        self.norms = nn.ModuleList(nn.RMSNorm(WIDTH) for _ in range(LAYERS + 1))
        self.mixers = nn.ModuleList(
            PrefixLinearAttention(WIDTH, HEADS, features=features) for _ in range(LAYERS)
        )
        self.out = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor, kind: str) -> Tensor:
        """Logits ``(B, vocab)`` after the last id."""
        if kind == "twice":
            ids = jrt_prompt(ids[:, :-1], ids[:, -1:])
        prefix = ids.shape[1] if kind == "prefix" else 0
        x = self.ids(ids) + self.parts((ids < 4).cumsum(1) - 1)
        for norm, mixer in zip(self.norms, self.mixers):
            x = x + mixer(norm(x), prefix=prefix)[0]
        return self.out(self.norms[-1](x[:, -1]))

    def state_numbers(self) -> int:
        """Numbers that decoding keeps, of all layers."""
        return sum(mixer.init_state(1).numel() for mixer in self.mixers)


def learn(kind: str, features: int, seed: int = 0, steps: int = STEPS) -> dict:
    """Train one reader, ``steps`` a multiple of 30; its accuracy on fresh sets of all `TESTED`."""
    began = time.process_time()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Reader(features)
    optimizer = FusedAdamW(model.parameters(), RATE, weight_decay=0.01, clip=1.0)
    curve = []
    for step in range(steps):
        a, b = TRAINED[step % len(TRAINED)]
        ids, targets = set_disjointness(BATCH, first=a, second=b, vocab=VOCAB, generator=generator)
        loss = F.cross_entropy(model(ids, kind), targets[:, -1])
        share = min((step + 1) / 50, max(0.05, 1 - step / steps))
        curve.append(optimizer.step(loss, share))
    return {
        "kind": kind,
        "features": features,
        "seed": seed,
        "state": model.state_numbers(),
        "accuracy": {f"{a} {b}": accuracy(model, kind, a, b) for a, b in TESTED},
        "seconds": round(time.process_time() - began, 1),
        "curve": [round(v, 3) for v in torch.tensor(curve).unflatten(0, (-1, 30)).mean(1).tolist()],
    }


@torch.no_grad()
def accuracy(model: Reader, kind: str, first: int, second: int, rows: int = 500) -> float:
    """The share of ``rows`` fresh prompts whose shared id the model names."""
    generator = torch.Generator().manual_seed(1000 * first + second)
    sets = set_disjointness(rows, first=first, second=second, vocab=VOCAB, generator=generator)
    said = model(sets.ids, kind).argmax(-1)
    return round((said == sets.targets[:, -1]).float().mean().item(), 3)


def recorded() -> list[dict]:
    """The runs in read_twice.json."""
    return json.loads(RUNS.read_text(encoding="utf-8"))["runs"]


def main() -> None:
    """Run what is not recorded yet, and save after each run."""
    runs = recorded() if RUNS.exists() else []
    for kind in KINDS:
        if any(r["kind"] == kind for r in runs):
            continue
        runs.append(learn(kind, FEATURES))
        print({name: value for name, value in runs[-1].items() if name != "curve"})
        lines = ",\n".join(json.dumps(run) for run in runs)
        command = "python -m corelib.measure.races.read_twice"
        RUNS.write_text(f'{{"command": "{command}", "runs": [\n{lines}\n]}}\n', "utf-8")


if __name__ == "__main__":
    main()
