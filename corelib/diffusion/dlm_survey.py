"""A Survey on Diffusion Language Models (arXiv 2508.10875): the map, and a race over what is built.

Idea: diffusion language models differ along a few axes, most of which are choices about the same
loop: hide, predict, commit. With all tokens hidden at time 1 and none at time 0 (`shared`),

    loss = E over t ~ U(0, 1) of (1 / t) sum over hidden i of -log p(x0_i | x_t)      learn
    commit = policy(laws of the hidden slots)                                        generate

| axis      | says                                 | built here                               |
|:----------|:-------------------------------------|:-----------------------------------------|
| space     | what noise makes of a token          | absorbing                                |
| origin    | where the weights come from          | an AR model (`text_dlm`), or no training |
| span      | all slots at once, or block by block | both                                     |
| policy    | which slots become final first       | eight, `policies.POLICIES`               |
| remasking | whether a final slot may open again  | none                                     |
| cache     | what is kept between calls           | none, prefix                             |
| guidance  | what steers from outside             | none                                     |
| modality  | what is generated                    | text                                     |

`TAXONOMY` is the map as data (``dlm_survey.toml``), `browse` a table of it, `race_policies` the
comparison harness: it runs policies on one net and prompts, and counts what each buys.

Our reconstruction: the axes are ours, chosen from the survey's abstract and the papers it is about;
its own section tree and tables were not at hand. Exact: the loss and the samplers (see `shared`).
Left out: embedding and uniform noise, remasking, dual and delayed caches, guidance; the map names
the papers. Cost: a call of the net per step. Oracle: `tabular`, the exact denoiser; compare LLaDA's
``get_num_transfer_tokens`` and low-confidence sampler.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from corelib.catalog import Method, methods

from . import policies
from .reader import Net
from .shared import Decode, MaskedDiffusion, greedy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

AXES = ("space", "origin", "span", "policy", "remasking", "cache", "guidance", "modality")


@dataclass(frozen=True)
class Entry:
    """A row of the map; what each column means stands at the top of the data file."""

    name: str
    paper: str
    space: str
    origin: str
    span: str
    policy: str
    remasking: str
    cache: str
    guidance: str
    modality: str
    built: str
    rows: tuple[str, ...]

    @property
    def year(self) -> int | None:
        """Of the arXiv number; None for what is only here."""
        return 2000 + int(self.paper[:2]) if self.paper else None

    def load(self) -> Any:
        """What runs it or its main part here. Raises LookupError where nothing does yet."""
        if not self.built:
            raise LookupError(f"{self.name}: on the map, but nothing here runs it yet")
        module, _, name = self.built.partition(":")
        return getattr(import_module(f"corelib.{module}"), name)

    def papers(self) -> list[Method]:
        """The catalog's rows about it, with ``works`` and ``lab``."""
        by_slug = {row.slug: row for row in methods()}
        return [by_slug[slug] for slug in self.rows]


def _read() -> dict[str, Entry]:
    text = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)["model"]
    return {row["name"]: Entry(**{**row, "rows": tuple(row["rows"])}) for row in rows}


#: Name -> entry.
TAXONOMY: dict[str, Entry] = _read()


def values(axis: str) -> dict[str, int]:
    """What occurs along ``axis`` and how often, the most frequent first."""
    if axis not in AXES:
        raise ValueError(f"axis: expected one of {AXES}, got {axis!r}")
    found: dict[str, int] = {}
    for entry in TAXONOMY.values():
        for value in getattr(entry, axis).split(", "):
            found[value] = found.get(value, 0) + 1
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def browse(keep: Callable[[Entry], bool] | None = None, **chosen: str) -> list[dict[str, str]]:
    """The map as rows of text, those that ``keep`` wants and that have the ``chosen`` values.

    ``browse(space="absorbing", cache="prefix")``; of a list of values one must fit.
    """
    for axis, value in chosen.items():
        if value not in values(axis):
            raise ValueError(f"{axis}: expected one of {', '.join(values(axis))}; got {value!r}")
    fits = [
        e
        for e in TAXONOMY.values()
        if (not keep or keep(e))
        and all(value in getattr(e, axis).split(", ") for axis, value in chosen.items())
    ]
    return [
        {
            "name": e.name,
            "year": str(e.year or "–"),
            **{axis: getattr(e, axis) for axis in AXES},
            "runs here": e.built.partition(":")[2] or "–",
            "papers": ", ".join(f"{m.number} {m.slug}" for m in e.papers()) or "–",
        }
        for e in fits
    ]


# --- the comparison harness -----------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """A policy with its knob: ``per_step`` slots a step (ranked policies; 1 for adaptive ones)."""

    policy: policies.Policy
    per_step: int = 1


def contestants(
    chooser: Callable[[Tensor], Tensor],
    *,
    per_step: Sequence[int] = (1, 2, 4, 8),
    taus: Sequence[float] = (0.95, 0.8, 0.6, 0.4),
) -> dict[str, dict[str, Contestant]]:
    """The built policies, each at several speeds: ``{policy: {knob: contestant}}``.

    ``chooser`` picks the slots of the random policy.
    """
    made: dict[str, dict[str, Contestant]] = {}
    for name in ("max_prob", "margin", "neg_entropy", "left_to_right", "random"):
        options = {"chooser": chooser} if name == "random" else {}
        policy = policies.make_policy(name, **options)
        made[name] = {f"{n} a step": Contestant(policy, n) for n in per_step}
    made["threshold"] = {f"tau {t:g}": Contestant(policies.threshold(t)) for t in taus}
    made["factor"] = {f"f {f:g}": Contestant(policies.factor(f)) for f in (0.5, 1, 2, 4)}
    made["entropy_bound"] = {
        f"g {g:g}": Contestant(policies.entropy_bound(g)) for g in (0.1, 0.5, 1, 2)
    }
    return made


@dataclass(frozen=True)
class Run:
    """What a policy made: ``per_call`` tokens for each call, mean over the prompts; ``kept``: the
    share of tokens that one-slot-a-step decoding by confidence makes as well."""

    policy: str
    knob: str
    per_call: float
    kept: float
    scores: dict[str, float] = field(default_factory=dict)
    made: Decode | None = field(default=None, repr=False)

    def row(self) -> dict[str, Any]:
        """As a flat row for a table."""
        flat = {k: v for k, v in asdict(self).items() if k not in ("scores", "made")}
        return flat | self.scores


def calls_of(step_map: Int[Tensor, "B N"]) -> Int[Tensor, " B"]:
    """How many steps each row took: a row that is done costs nothing more."""
    return torch.tensor([len(row.unique()) for row in step_map])


def race_policies(
    net: Net,
    mask_id: int,
    prompts: Int[Tensor, "B P"],
    gen_len: int,
    runners: Mapping[str, Mapping[str, Contestant]],
    *,
    block_len: int | None = None,
    cache: str = "none",
    chooser: Callable[[Tensor], Tensor] = greedy,
    scores: Mapping[str, Callable[[Tensor], float]] | None = None,
) -> list[Run]:
    """Every contestant on the same prompts.

    Args:
        runners: see `contestants`.
        scores: name -> function of the finished ids ``(B, P + gen_len)``, such as the code length
            by another model, or the share of right answers.

    The tokens that `Run.kept` compares with are made by ``max_prob``, one slot a step.
    """
    if gen_len < 1:
        raise ValueError(f"gen_len: expected at least 1, got {gen_len}")
    engine, runs = MaskedDiffusion(net, mask_id), []
    block = gen_len if block_len is None else block_len

    def decode(contestant: Contestant) -> Decode:
        steps = sum(
            -(-min(block, gen_len - lo) // contestant.per_step) for lo in range(0, gen_len, block)
        )
        options = dict(steps=steps, block_len=block_len, cache=cache, chooser=chooser)
        return engine.decode(prompts, gen_len, policy=contestant.policy, **options)

    exact = decode(Contestant(policies.max_prob)).tokens
    for name, knobs in runners.items():
        for knob, contestant in knobs.items():
            made = decode(contestant)
            same = (made.tokens == exact)[:, prompts.shape[1] :]
            runs.append(
                Run(
                    name,
                    knob,
                    float((gen_len / calls_of(made.step_map)).mean()),
                    float(same.float().mean()),
                    {n: float(score(made.tokens)) for n, score in (scores or {}).items()},
                    made,
                )
            )
    return runs
