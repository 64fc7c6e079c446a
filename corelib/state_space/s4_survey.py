"""A Survey on Structured State Space Sequence (S4) Models (arXiv 2503.18970), made executable.

Idea: the line from recurrent networks to hybrids is a line of single changes: RNN, HiPPO, LSSL, S4,
S4D, S5, H3, Mamba, Mamba-2, Jamba, each with one column of a table replaced. `LINEAGE` is this
table (``s4_survey.toml``), `lineage_graph` its edges with what changed on each, and nothing in it
has to be believed: `LAYERS` makes a small layer of each kind, `examine` measures it from outside
(`corelib.state_space.layer_report`), and `disagreements` holds the table against that.

| here       | means                                       | seen in                               |
|:-----------|:--------------------------------------------|:--------------------------------------|
| matrix     | structure of the state's recurrence         | ``coupled``: all, N, 2 (a pair) or 1  |
| decides    | what the input decides                      | ``variation``                         |
| order      | work over a sequence                        | ``exponent``                          |
| state      | numbers a channel keeps                     | ``state``                             |

Our reconstruction: of the survey we know the abstract; rows and columns are our reading of the
papers cited in the table. "Time-varying layers fail shift equivariance" is often said and not
quite so: a layer that selects has the same rule at all times and may well pass; what it fails is
`corelib.measure.probes.variation`, a shift of one input among others that stay where they are.
Layers are as drawn at the start of training: half-lives and rings are those of the initialisation.
Cost of `examine`: some hundred small passes. Oracles: the layers' own kernels, transformers for
Mamba and Mamba-2 (in their tests), scipy for the LTI ones.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from corelib.catalog import Method, methods

from .layer_report import Report, examine  # noqa: F401  (the harness)
from .mamba import MambaBlock
from .mamba2 import Mamba2Block
from .s4 import S4
from .s4d import S4D
from .s5 import S5Layer
from .survey_layers import H3, LSSL, CausalAttention, GatedRecurrence, Hybrid

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

#: Structure -> the least and the most states that act on each other; "N" is the state size.
MATRICES = {
    "nonlinear": ("N", None),
    "triangular": (1, 1),  # HiPPO's: as dear as a dense one, but nothing acts back
    "diagonal plus rank one": ("N", "N"),
    "diagonal": (1, 2),
    "scalar": (1, 1),
    "none": None,
}
DECIDES = ("nothing", "gates", "dynamics", "all")
#: Order -> the least and the largest exponent that counts as it at a few hundred positions.
ORDERS = {"L": (0.85, 1.05), "L log L": (0.85, 1.25), "L^2": (1.5, 2.05)}


@dataclass(frozen=True)
class Model:
    """A row of the lineage; what each column means stands at the top of the data file."""

    name: str
    year: int
    paper: str
    parents: tuple[str, ...]
    matrix: str
    mimo: bool
    decides: str
    discretisation: str
    training: str
    order: str
    step: str
    state: str
    init: str
    domain: str
    attention: str
    changed: str
    layer: str
    rows: tuple[str, ...]

    def papers(self) -> list[Method]:
        """The catalog's rows about it, with ``works`` and ``lab``."""
        by_slug = {row.slug: row for row in methods()}
        return [by_slug[slug] for slug in self.rows]


def _read() -> dict[str, Model]:
    text = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    plain = {"parents", "rows"}
    return {
        row["name"]: Model(**{k: tuple(v) if k in plain else v for k, v in row.items()})
        for row in tomllib.loads(text)["model"]
    }


#: Name -> row, oldest first; ``TAXONOMY`` is what a survey's table is called everywhere.
TAXONOMY: dict[str, Model] = _read()
LINEAGE = TAXONOMY
#: Columns that an edge compares.
COLUMNS = ("matrix", "mimo", "decides", "discretisation", "training", "order", "step", "state")


class Edge(NamedTuple):
    """``child`` was made from ``parent``; ``changes`` is column -> (before, after)."""

    parent: str
    child: str
    changes: dict[str, tuple[Any, Any]]


def lineage_graph() -> list[Edge]:
    """Every step of the lineage, with the columns that it changed."""
    edges = []
    for child in LINEAGE.values():
        for parent in (LINEAGE[name] for name in child.parents):
            pairs = {c: (getattr(parent, c), getattr(child, c)) for c in COLUMNS}
            changes = {c: pair for c, pair in pairs.items() if pair[0] != pair[1]}
            edges.append(Edge(parent.name, child.name, changes))
    return edges


# --- the layers -----------------------------------------------------------------------------------

#: Name -> maker ``(width, state_size)``: ``width * state_size`` numbers of state for each sequence,
#: a convolution's last inputs apart. Attention has that many after ``state_size`` tokens.
LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "RNN": lambda width, state: GatedRecurrence(width, width * state),
    "Transformer": lambda width, state: CausalAttention(width, 2, 1),
    "LSSL": lambda width, state: LSSL(width, state),
    "S4": lambda width, state: S4(width, state, 64),
    "S4D": lambda width, state: S4D(width, state),
    "S5": lambda width, state: S5Layer(width, width * state),
    "H3": lambda width, state: H3(width, state),
    "Mamba": lambda width, state: MambaBlock(width, state=state, expand=1),
    "Mamba-2": lambda width, state: Mamba2Block(
        width, state=state, expand=1, head_width=width // 2, chunk=16
    ),
    "Jamba": lambda width, state: Hybrid(width, state),
}


def make_layer(name: str, width: int = 4, state_size: int = 8, *, seed: int = 0) -> nn.Module:
    """The layer of that name, in float64, as drawn with ``seed``. ``state_size`` is even."""
    if name not in LAYERS:
        raise ValueError(f"name: expected one of {', '.join(LAYERS)}, got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LAYERS[name](width, state_size).double()


# --- the table against the layers ----------------------------------------------------------------


def disagreements(row: Model, report: Report, state_size: int) -> list[str]:
    """What the row of the table says and the measurement does not bear out; a line for each."""
    found = [f"{row.name}: {report.conforms}"] if report.conforms else []
    if report.lti != (row.decides == "nothing"):
        found.append(f"{row.name}: decides {row.decides}, but varies by {report.variation:.1e}")
    if report.state_grows != (row.state == "L"):
        found.append(f"{row.name}: a state of {row.state} a channel, but {report.state} bytes")
    low, high = ORDERS[row.order]
    if not low <= report.exponent <= high:
        found.append(f"{row.name}: {row.order}, but the work grows as L^{report.exponent:.2f}")
    if report.coupled is not None and not _fits(MATRICES[row.matrix], report.coupled, state_size):
        found.append(f"{row.name}: {row.matrix}, but {report.coupled} states act on each other")
    return found


def _fits(bounds: tuple | None, coupled: int, state_size: int) -> bool:
    if bounds is None:  # a fixed state where the table has none
        return False
    low, high = (state_size if bound == "N" else bound for bound in bounds)
    return low <= coupled and (high is None or coupled <= high)


def example() -> dict:
    """One small layer and six tokens for it.

    >>> from corelib.measure.probes import impulse_response
    >>> given = example()
    >>> impulse_response(lambda x: given["mixer"](x)[0], given["x"][:1]).shape
    torch.Size([6, 4, 4])
    """
    torch.manual_seed(0)
    return dict(mixer=make_layer("S4D"), x=torch.randn(2, 6, 4, dtype=torch.float64))
