"""A practical survey on faster and lighter Transformers (arXiv 2103.14636): which remedy, and when.

Idea: there are two shelves. General remedies keep attention and save elsewhere (recomputation,
sharing, pruning, fewer bits); the others replace attention by something of lower order. Which to
take depends on what is short (memory, time, parameters) and on what may not change (the trained
weights, the exact function, generation token by token).

`TAXONOMY` is both shelves as data (``faster_lighter.toml``): a `Remedy` each, with the papers of
this library that use it and what runs it here. `cost` counts operations and bytes of one layer's
attention, from which follow the two lengths that decide:

    dense_flops = 4 L^2 C           linear_flops = 4 L R C (+ features)      crossover: L = R
    dense part of a layer: 24 L C^2                attention overtakes it at L = 6 C

`advise` filters and ranks the table for a need. The general shelf is in `efficiency`, its exact
remedies tested by gradients; the other shelf's mixers are measured in `unified_mixing`.

| here          | survey            | what                                                       |
|:--------------|:------------------|:-----------------------------------------------------------|
| L, C, H       | n, d, h           | length, model width, heads; D = C / H                      |
| R, W          | k, w              | rank or features per head; window (keys that a query sees) |
| pairs         | attention matrix  | scores that are computed                                   |

Our reconstruction: we know the survey's abstract and which remedies it names; the properties in the
table are from the papers cited there, its orders are those of the papers' own algorithms. Not the
survey's tables, and no verdicts on quality. Cost counts multiplications and additions of the
products only, no softmax, and bytes as if the scores were stored. Oracle: the tensors themselves
and the products that PyTorch is seen to do.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from corelib.catalog import Method, methods

from .efficiency import (  # noqa: F401  (the general shelf)
    Block,
    Reversible,
    SharedLayers,
    checkpointed,
    distill_loss,
    magnitude_prune,
    micro_batches,
)
from .shared import check_counts

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHELVES = ("general", "attention")
SAVES = ("training memory", "inference memory", "parameters", "time", "training time")
TRAINED = ("as is", "after tuning", "no")
#: Growth with the length: the exponent of L, and half a step for a logarithm.
ORDERS = {"L": 1.0, "L log L": 1.1, "L sqrt(L)": 1.5, "L^2": 2.0, "same": 2.0}


@dataclass(frozen=True)
class Remedy:
    """A row of the taxonomy; what each column means stands at the top of the data file."""

    name: str
    shelf: str
    family: str
    paper: str
    saves: tuple[str, ...]
    time: str
    memory: str
    exact: bool
    causal: bool
    cross: bool
    trained: str
    built: str
    rows: tuple[str, ...]

    def load(self) -> Any:
        """What runs it here: a function, a module class, or a row of `unified_mixing.TAXONOMY`.

        Raises:
            LookupError: nothing does yet.
        """
        if not self.built:
            raise LookupError(f"{self.name}: in the taxonomy, but nothing here runs it yet")
        module, _, name = self.built.partition(":")
        home = importlib.import_module(f"corelib.{module}")
        return getattr(home, name) if hasattr(home, name) else home.TAXONOMY[name]

    def papers(self) -> list[Method]:
        """The catalog's rows about it, with ``works`` and ``lab``."""
        by_slug = {row.slug: row for row in methods()}
        return [by_slug[slug] for slug in self.rows]


def _read() -> dict[str, Remedy]:
    text = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)["remedy"]
    lists = ("saves", "rows")
    return {
        row["name"]: Remedy(**{k: tuple(v) if k in lists else v for k, v in row.items()})
        for row in rows
    }


#: Name -> remedy, both shelves.
TAXONOMY: dict[str, Remedy] = _read()


def browse(
    keep: Callable[[Remedy], bool] | None = None, *, shelf: str | None = None
) -> list[dict[str, str]]:
    """The taxonomy as rows of text for a table, those that ``keep`` wants, on one shelf or both."""
    if shelf not in (None, *SHELVES):
        raise ValueError(f"shelf: expected one of {SHELVES} or None, got {shelf!r}")
    chosen = [r for r in TAXONOMY.values() if shelf in (None, r.shelf) and (not keep or keep(r))]
    return [
        {
            "remedy": r.name,
            "family": r.family,
            "saves": ", ".join(r.saves),
            "attention": r.time,
            "exact": "yes" if r.exact else "no",
            "causal": "yes" if r.causal else "no",
            "trained weights": r.trained,
            "runs here": r.built.partition(":")[2] or "–",
            "papers": ", ".join(f"{m.number} {m.slug}" for m in r.papers()) or "–",
        }
        for r in chosen
    ]


def advise(
    need: str,
    *,
    trained: bool = False,
    tuning: bool = True,
    exact: bool = False,
    causal: bool = False,
    cross: bool = False,
) -> list[Remedy]:
    """The remedies that save what is needed, under these conditions, the best first.

    Args:
        need: one of `SAVES`.
        trained: there are trained weights to keep; with ``tuning`` they may be trained further.
        exact: the function may not change. causal: it must generate token by token.
        cross: queries and keys are different sequences.

    Ranking: those made for the need before those that help by the way; what leaves trained weights
    and the function alone before what does not; then the lower order in the length.
    """
    if need not in SAVES:
        raise ValueError(f"need: expected one of {SAVES}, got {need!r}")
    allowed = TRAINED[: 1 + tuning] if trained else TRAINED
    fits = [
        r for r in TAXONOMY.values()
        if need in r.saves and r.trained in allowed
        and r.exact >= exact and r.causal >= causal and r.cross >= cross
    ]  # fmt: skip

    def rank(r: Remedy) -> tuple:
        return r.saves.index(need), not r.exact, TRAINED.index(r.trained), ORDERS[r.time]

    return sorted(fits, key=rank)


# --- what attention costs -------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """One layer's attention, forward: operations, and elements that hold scores or states."""

    flops: int
    held: int

    def bytes(self, itemsize: int = 4) -> int:
        """Bytes of what is held, if it is stored."""
        return self.held * itemsize


def cost(
    method: str, L: int, C: int, H: int, *, window: int = 256, stride: int = 64, rank: int = 256
) -> Cost:
    """Operations and held elements of one layer's attention, without its projections.

    Args:
        method: ``dense``, ``sliding window``, ``strided``, ``low rank`` or ``kernel``; none of
            them causal but the window, which sees ``window`` keys, itself among them.
        L, C, H: length, model width, heads.
        window, stride: of the sparse ones. rank: of the low rank; the features per head of the
            kernel, once computed.
    """
    check_counts(L=L, C=C, H=H, window=window, stride=stride, rank=rank)
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if method == "dense":
        return Cost(4 * L * L * C, H * L * L)
    if method == "sliding window":
        w = min(window, L)
        pairs = L * w - w * (w - 1) // 2  # the first queries see fewer
        return Cost(4 * pairs * C, H * pairs)
    if method == "strided":
        sizes = [ceil((L - r) / stride) for r in range(min(stride, L))]
        pairs = sum(n * n for n in sizes)
        return Cost(4 * pairs * C, H * pairs)
    if method == "low rank":  # E k and E v, then scores and values
        return Cost(8 * L * rank * C, H * L * rank)
    return Cost(4 * L * rank * C, rank * C)  # phi(k)^T v and phi(q) of it; the state of H heads


METHODS = ("dense", "sliding window", "strided", "low rank", "kernel")


def crossover(method: str, C: int, H: int, *, longest: int = 1 << 24, **options: int) -> int | None:
    """The shortest length from which ``method`` takes fewer operations than dense attention.

    None where that is not so up to ``longest``. Found by bisection: the advantage only grows.
    """

    def ahead(L: int) -> bool:
        return cost(method, L, C, H, **options).flops < cost("dense", L, C, H).flops

    if not ahead(longest):
        return None
    low, high = 0, longest  # not ahead at low, ahead at high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if ahead(middle) else (middle, high)
    return high


def dense_part(L: int, C: int) -> int:
    """Operations of a layer's projections and its fourfold feed-forward: ``24 L C^2``."""
    check_counts(L=L, C=C)
    return 24 * L * C * C
