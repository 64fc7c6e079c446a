"""Mamba-360: Survey of State Space Models as Transformer Alternative (arXiv 2404.16112), to run.

Idea: state space models come in three paradigms. *Structural* ones take a matrix of a certain
structure in continuous time and make a long kernel of it; *gated* ones multiply by something that
depends on the input, or let it set the step; *recurrent* ones start in discrete time, from the
eigenvalues:

    structural   x' = A x + B u, A structured           kernel[t] = C A_bar^t B_bar
    gated        y = gelu(W u) * ssm(V u)               or the step depends on u
    recurrent    h[t] = decay h[t-1] + gamma B u[t]     decay = exp(-exp(nu) + i exp(theta))

`PARADIGMS` is the assignment as data (``mamba360.toml``), `LAYERS` a minimal cell for most of the
models (`corelib.state_space.mamba360_layers`), and `survey_table` puts what is claimed beside what
`corelib.state_space.layer_report.examine` measures: gating is seen as ``variation``, the change of
a layer's response with place and content, and memory as the ring of its eigenvalues.

| here          | paper                    | what                                             |
|:--------------|:-------------------------|:-------------------------------------------------|
| decay         | lambda                   | an eigenvalue of the discrete recurrence         |
| gamma         | gamma                    | sqrt(1 - |decay|^2): states stay of size one     |
| ring          | r_min, r_max             | least and largest |eigenvalue|                   |
| gating        | –                        | ``variation``, 0 for a linear time-invariant one |

Exact: a state of the `LRU` has variance 1 under white noise; a `GSS` whose gate is 1 is its system;
`LiquidS4` of order 1 is S4D; the kernel of `S4ND` is the outer product of its axes' kernels.

Our reconstruction: the abstract names the paradigms and most models, not who belongs where; the
assignment is ours, and rows that could be argued about say so (``certain``). Categories by idea are
not categories by behaviour: H3, filed as structural, varies with its input as gated layers do, and
so does Liquid-S4 with its products. The survey's collected scores are not repeated here.
Oracles: S4D, the loops, `torch.nn.functional.conv2d`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from corelib.catalog import Method, methods

from . import s4_survey
from .layer_report import Report, examine
from .mamba360_layers import GSS, HGRN, LRU, S4ND, LiquidS4

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAMES = ("structural", "gated", "recurrent")


@dataclass(frozen=True)
class Member:
    """A model and its paradigm; what each column means stands at the top of the data file."""

    name: str
    paradigm: str
    year: int
    paper: str
    certain: bool
    layer: str
    idea: str
    rows: tuple[str, ...]

    def papers(self) -> list[Method]:
        """The catalog's rows about it, with ``works`` and ``lab``."""
        by_slug = {row.slug: row for row in methods()}
        return [by_slug[slug] for slug in self.rows]


def _read() -> dict[str, tuple[Member, ...]]:
    text = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    members = [Member(**row | {"rows": tuple(row["rows"])}) for row in tomllib.loads(text)["model"]]
    return {name: tuple(m for m in members if m.paradigm == name) for name in NAMES}


#: Paradigm -> its models, oldest first.
PARADIGMS: dict[str, tuple[Member, ...]] = _read()
#: Name -> model: what a survey's table is called everywhere.
TAXONOMY: dict[str, Member] = {m.name: m for members in PARADIGMS.values() for m in members}

#: Name -> maker ``(width, state_size)`` of a sequence mixer: ``width * state_size`` numbers of
#: state, recent inputs apart. `S4ND` is no sequence mixer and stands alone.
LAYERS: dict[str, Callable[[int, int], nn.Module]] = s4_survey.LAYERS | {
    "LRU": lambda width, state: LRU(width, width * state),
    "HGRN": lambda width, state: HGRN(width, width * state),
    "GSS": GSS,
    "Liquid-S4": LiquidS4,
}


def make_layer(name: str, width: int = 4, state_size: int = 8, *, seed: int = 0) -> nn.Module:
    """The layer of that name, in float64, as drawn with ``seed``. ``state_size`` is even."""
    makers = LAYERS | {"S4ND": S4ND}
    if name not in makers:
        raise ValueError(f"name: expected one of {', '.join(makers)}, got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return makers[name](width, state_size).double()


def measured(width: int = 4, state_size: int = 8) -> dict[str, Report]:
    """Name -> report, of every model that has a sequence mixer here."""
    names = [m.layer for members in PARADIGMS.values() for m in members if m.layer in LAYERS]
    return {name: examine(make_layer(name, width, state_size), width) for name in names}


def survey_table(reports: dict[str, Report] | None = None) -> list[dict[str, str]]:
    """The survey as rows of text: what is claimed, and beside it what was measured.

    ``reports``: from `measured`; made if not given.
    """
    reports = measured() if reports is None else reports
    return [
        {
            "model": m.name,
            "paradigm": m.paradigm if m.certain else f"{m.paradigm} (arguable)",
            "year": str(m.year),
            "idea": m.idea,
            **_figures(reports.get(m.layer)),
            "built on here": ", ".join(f"{p.number} {p.slug}" for p in m.papers()) or "–",
        }
        for members in PARADIGMS.values()
        for m in members
    ]


def _figures(report: Report | None) -> dict[str, str]:
    if report is None:
        return dict.fromkeys(
            ("response varies by", "eigenvalues", "half-life", "work grows as"), "–"
        )
    low, high = report.ring or (0.0, 0.0)
    return {
        "response varies by": "0" if report.lti else f"{report.variation:.0%}",
        "eigenvalues": f"{low:.2f} … {high:.4f}",
        "half-life": f"{report.halflife:.1f}",
        "work grows as": f"L^{report.exponent:.2f}",
    }


def example() -> dict:
    """An `LRU` and six tokens for it.

    >>> given = example()
    >>> given["mixer"](given["x"])[0].shape
    torch.Size([2, 6, 4])
    """
    torch.manual_seed(0)
    return dict(mixer=make_layer("LRU"), x=torch.randn(2, 6, 4, dtype=torch.float64))
