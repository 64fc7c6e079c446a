"""Low rank in the weights, along the sequence, and in the scores: when does it pay on this machine?

``low-rank-layers``: one transformer layer in full, with thin weights (LRT) and with Linformer; they
compute different functions of one shape, so that only times are compared, and the last row says
where the last two cross beside what their multiplications say. ``low-rank-scores``: 128 queries
against ever more keys whose rank is 16 indeed, so that all ways give the same scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ...linear_time import dr_rl
from ...linear_time.greenformers import (
    LinformerAttention,
    SelfAttention,
    TransformerLayer,
    auto_fact,
    crossover,
    measured_crossover,
    random_factor,
)
from ...linear_time.low_rank_scores import factors_from_bases
from ...primitives.svd import gram_svd
from ..scaling import sweep
from . import Row, register, rows

C, HEADS, RANK, KEYS = 256, 4, 64, 64
SEGMENT, WIDTH, LOW = 128, 64, 16


def _layers(n: int) -> dict[str, Callable[[], Tensor]]:
    """The three layers and PyTorch's own, on the same input."""
    torch.manual_seed(0)
    x = torch.randn(1, n, C)
    full = TransformerLayer(SelfAttention(C, HEADS), C).eval()
    thin = auto_fact(full, RANK, random_factor)
    short = TransformerLayer(LinformerAttention(C, HEADS, length=n, rank=KEYS), C).eval()
    theirs = torch.nn.TransformerEncoderLayer(C, HEADS, 4 * C, batch_first=True, norm_first=True)
    contestants = {"LRT": thin, "Linformer": short, "full": full, "torch, full": theirs.eval()}

    def run(layer: torch.nn.Module) -> Callable[[], Tensor]:
        @torch.no_grad()
        def once() -> Tensor:
            return layer(x)

        return once

    return {name: run(layer) for name, layer in contestants.items()}


@register("low-rank-layers", "a transformer layer with thin weights, and with Linformer")
def low_rank_layers(quick: bool) -> Iterator[Row]:
    lengths = (64, 128) if quick else (64, 128, 256, 512, 1024, 2048, 4096)
    result = sweep(lengths, _layers, check=None, repeats=3, min_time=0.05)
    shape = f"C{C} r{RANK} k{KEYS} float32"
    yield from rows(result, what="forward", shape=shape, corelib="LRT")
    thin, short = (result.seconds(name).values() for name in ("LRT", "Linformer"))
    found = measured_crossover(lengths, list(thin), list(short))
    by_time = "not reached" if found is None else f"{found:.0f} tokens"
    said = f"{by_time} by time, {crossover(C, RANK, KEYS)} by multiplications"
    yield Row("Linformer overtakes LRT", shape, "LRT", note=said)


def _scores(S: int) -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def thin(L: int) -> Tensor:
        left, right = (
            torch.randn(1, HEADS, *size, generator=generator) for size in ((L, LOW), (LOW, WIDTH))
        )
        return left @ right / WIDTH**0.5

    q, k = thin(SEGMENT), thin(S)
    given = dr_rl.truncate_qk(q, k, LOW)
    return {
        "corelib, with the SVD": lambda: dr_rl.factored_scores(
            factors_from_bases(q, k, gram_svd(q), gram_svd(k), LOW)
        ),
        "factors given": lambda: dr_rl.factored_scores(given),
        "LAPACK's SVD": lambda: dr_rl.factored_scores(dr_rl.truncate_qk(q, k, LOW)),
        "rebuilt": lambda: dr_rl.truncated_scores_reference(q, k, LOW),
        "dense": lambda: q @ k.mT,
    }


@register("low-rank-scores", "scores of 128 queries from factors of rank 16, of 64")
def low_rank_scores(quick: bool) -> Iterator[Row]:
    lengths = (128, 256) if quick else (512, 1024, 2048, 4096, 8192)
    result = sweep(lengths, _scores, tolerance=1e-3, repeats=3, min_time=0.05)
    shape = f"H{HEADS} D{WIDTH} r{LOW} float32"
    yield from rows(result, what="scores", shape=shape, corelib="corelib, with the SVD")
