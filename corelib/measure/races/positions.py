"""Positions by Toeplitz matrices: attention with a relative bias by FFT, and what positions teach.

`positions` times kernelised attention with a relative bias (`nprf_rpe`) against the same function
as a square, against softmax attention with that bias, and against linear attention without any.
PyTorch's attention gets its bias in the cheapest way there is: with the queries turned round, the
Toeplitz matrix is a view of its table and takes no memory. Only without gradients, though.

    python -m corelib.measure.races.positions     # trains what is missing in positions.json

Small encoders learn the two tasks of `corelib.data.position_tasks`, knowing positions in four ways
(`corelib.linear_time.urpe`); `recorded` reads the runs that are shipped.
"""

from __future__ import annotations

import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data.position_tasks import even_token_prediction, position_identification
from ...linear_time.nprf_rpe import kernel_attention_rpe, kernel_attention_rpe_dense, nprf
from ...linear_time.urpe import POSITIONS, URPEEncoder
from ...models.optim import FusedAdamW
from ...primitives.random_features import orthogonal_directions
from ...primitives.toeplitz import toeplitz
from ..gradients import forward_backward
from ..scaling import sweep
from . import Row, register, rows

H = 2
LONGEST_SQUARE = 2048
RUNS = pathlib.Path(__file__).with_suffix(".json")
TASKS = {"positions": position_identification, "even tokens": even_token_prediction}
STEPS = {"positions": 120, "even tokens": 800}
LENGTHS, VOCAB = (8, 16), 32


def inputs(L: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of queries and keys, values, and a bias: as many features as channels."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, H, L, width, generator=generator)
    directions = orthogonal_directions(width, width, generator=generator)
    bias = torch.randn(H, 2 * L - 1, generator=generator)
    return nprf(q, directions), nprf(k, directions), v, bias


def softmax_with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """PyTorch's attention with a relative bias that is never written out; not for gradients."""
    turned = bias.unfold(-1, k.shape[2], 1)[None]  # row i of the turned queries starts at entry i
    return F.scaled_dot_product_attention(q.flip(2), k, v, attn_mask=turned).flip(2)


def softmax_with_learnt_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same with the square written out, which is what gradients of the bias need."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=toeplitz(bias)[None])


def linear_attention(phi_q: Tensor, phi_k: Tensor, v: Tensor) -> Tensor:
    """The Performer, looking both ways: no positions, two small products."""
    return (phi_q @ (phi_k.mT @ v)) / (phi_q @ phi_k.sum(2)[..., None])


def _forward(width: int, quick: bool) -> Iterator[Row]:
    lengths = (64, 128) if quick else (256, 512, 1024, 2048, 4096, 8192, 16384)
    shape, options = f"B1 H{H} D{width} m{width} float32", dict(repeats=3, min_time=0.05)

    def same(L: int) -> dict[str, Callable]:
        given = inputs(L, width)
        return {
            "corelib": lambda: kernel_attention_rpe(*given, causal=False),
            "the square": lambda: kernel_attention_rpe_dense(*given, causal=False),
        }

    def other(L: int) -> dict[str, Callable]:
        phi_q, phi_k, v, bias = inputs(L, width)
        return {
            "corelib": lambda: kernel_attention_rpe(phi_q, phi_k, v, bias, causal=False),
            "softmax with the bias": lambda: softmax_with_bias(phi_q, phi_k, v, bias),
            "linear attention, no bias": lambda: linear_attention(phi_q, phi_k, v),
        }

    with torch.no_grad():
        short = [n for n in lengths if n <= LONGEST_SQUARE]
        yield from rows(sweep(short, same, tolerance=1e-4, **options), what="forward", shape=shape)
        against = sweep(lengths, other, check=None, **options)
        yield from rows(against, what="forward, against other functions", shape=shape)


def _both(width: int, quick: bool) -> Iterator[Row]:
    lengths = (64, 128) if quick else (256, 512, 1024, 2048, 4096, 8192)
    shape = f"B1 H{H} D{width} m{width} float32"

    def run(L: int) -> dict[str, Callable]:
        phi_q, phi_k, v, bias = given = inputs(L, width)
        runs = {
            "corelib": forward_backward(lambda *x: kernel_attention_rpe(*x, causal=False), *given),
            "linear attention, no bias": forward_backward(linear_attention, phi_q, phi_k, v),
        }
        if L <= LONGEST_SQUARE:
            softmax = forward_backward(softmax_with_learnt_bias, *given)
            runs["softmax, learning the bias"] = softmax
        return runs

    result = sweep(lengths, run, check=None, repeats=3, min_time=0.05)
    yield from rows(result, what="forward + backward, against other functions", shape=shape)


@register("positions", "kernelised attention with a relative bias by FFT")
def positions(quick: bool) -> Iterator[Row]:
    for width in (16, 32):
        yield from _forward(width, quick)
    yield from _both(16, quick)


# --- what positions teach -------------------------------------------------------------------------


def learn(
    task: str,
    position: str,
    length: int,
    *,
    steps: int,
    C: int = 32,
    heads: int = 4,
    layers: int = 2,
    batch: int = 16,
    lr: float = 1e-2,
    seed: int = 0,
) -> tuple[URPEEncoder, dict]:
    """Train a small encoder; the model, its losses and its accuracy on 200 fresh sequences.

    The tables learn three times as fast as the rest. Of even tokens only the first half, where
    there is something to know, is scored. The rate falls to zero over the second half.
    """
    draw, generator = TASKS[task], torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    sizes = dict(C=C, heads=heads, layers=layers, max_len=length)
    model = URPEEncoder(VOCAB, max(length, VOCAB + 1), **sizes, position=position)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    tables = [p for n, p in named if n.startswith("tables")]
    groups = [{"params": [p for n, p in named if not n.startswith("tables")]}]
    groups += [{"params": tables, "lr": 3 * lr}] if tables else []
    optimizer, losses = FusedAdamW(groups, lr), []
    for step in range(steps):
        ids, targets = draw(batch, length, vocab=VOCAB, generator=generator)
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        losses.append(optimizer.step(loss, min(1.0, 2 - 2 * step / steps)))
    scored = length if task == "positions" else length // 2
    with torch.no_grad():
        ids, targets = draw(200, length, vocab=VOCAB, generator=generator)
        right = (model(ids).argmax(-1) == targets).float().mean(0)[:scored]
    return model, {"losses": losses, "accuracy": right.mean().item(), "by position": right.tolist()}


class OneHead(nn.Module):
    """One kernelised attention, ``ids -> logits``, with relative positions or absolute ones."""

    def __init__(self, features: Callable, relative: bool, length: int, C: int, vocab: int):
        super().__init__()
        self.features, self.C = features, C
        self.tokens, self.places = nn.Embedding(vocab, C), nn.Parameter(torch.randn(length, C))
        self.q, self.k, self.v = (nn.Linear(C, C, bias=False) for _ in range(3))
        self.head = nn.Linear(C, vocab)
        self.bias = nn.Parameter(torch.zeros(1, 2 * length - 1))
        with torch.no_grad():
            self.places *= not relative
        (self.places if relative else self.bias).requires_grad_(False)

    def forward(self, ids: Tensor, generator: torch.Generator) -> Tensor:
        """With fresh directions each time, as the Performer has them."""
        x = (self.tokens(ids) + self.places)[:, None]
        directions = orthogonal_directions(self.C, self.C, generator=generator)
        phi_q, phi_k = (self.features(part(x), directions) for part in (self.q, self.k))
        mixed = kernel_attention_rpe_dense(phi_q, phi_k, self.v(x), self.bias, causal=False)
        return self.head(mixed[:, 0])


def learn_to_look_back(
    features: Callable, relative: bool, *, steps: int = 150, lr: float = 0.05, seed: int = 0
) -> list[float]:
    """Losses of `OneHead` learning to repeat the token two places back; NaN once it has failed.

    ``features``: `prf` or `nprf`. 24 random tokens of 16 kinds; the learning rate is a high one.
    """
    torch.manual_seed(seed)
    model = OneHead(features, relative, length=24, C=16, vocab=16)
    generator = torch.Generator().manual_seed(seed)
    optimizer = FusedAdamW([p for p in model.parameters() if p.requires_grad], lr)
    losses: list[float] = []
    for _ in range(steps):
        ids = torch.randint(16, (16, 24), generator=generator)
        said = model(ids, generator)[:, 2:].flatten(0, 1)
        losses.append(optimizer.step(F.cross_entropy(said, ids[:, :-2].flatten())))
    return losses


def chance(task: str, length: int) -> float:
    """The accuracy of a guess."""
    return 1 / (length if task == "positions" else VOCAB)


def recorded() -> list[dict]:
    """The shipped runs: task, position, length, accuracy, and every twentieth loss."""
    return json.loads(RUNS.read_text(encoding="utf-8")) if RUNS.exists() else []


def main() -> int:
    runs = recorded()
    done = {(run["task"], run["position"], run["length"]) for run in runs}
    for task in TASKS:
        for length in LENGTHS:
            for position in POSITIONS:
                if (task, position, length) in done:
                    continue
                began = time.process_time()
                _, result = learn(task, position, length, steps=STEPS[task])
                run = {"task": task, "position": position, "length": length}
                run["accuracy"] = round(result["accuracy"], 4)
                run["losses"] = [round(x, 3) for x in result["losses"][::20]]
                runs.append(run)
                RUNS.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
                print(*run.values(), f"{time.process_time() - began:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
