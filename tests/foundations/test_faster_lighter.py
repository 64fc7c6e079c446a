"""The survey's taxonomy is sound data, costs are those of real tensors, advice keeps its word."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from corelib.catalog import methods
from corelib.foundations import mixers
from corelib.foundations.faster_lighter import (
    METHODS,
    ORDERS,
    SAVES,
    SHELVES,
    TAXONOMY,
    TRAINED,
    Remedy,
    advise,
    browse,
    cost,
    crossover,
    dense_part,
)
from corelib.foundations.unified_mixing import TAXONOMY as MIXERS
from corelib.primitives import visible_keys

# --- the data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("remedy", TAXONOMY.values(), ids=list(TAXONOMY))
def test_a_row_holds_known_words(remedy: Remedy):
    assert remedy.shelf in SHELVES and remedy.trained in TRAINED
    assert remedy.saves and set(remedy.saves) <= set(SAVES)
    assert remedy.time in ORDERS and remedy.memory in ORDERS
    assert (remedy.time == "same") == (remedy.shelf == "general")
    year, _, number = remedy.paper.partition(".")
    assert 7 <= int(year[:2]) <= 26 and len(number) in (4, 5)
    assert set(remedy.rows) <= {row.slug for row in methods()}
    assert not (remedy.exact and remedy.trained == "no")  # what is exact can be swapped in
    if remedy.built:
        assert remedy.load() is not None


def test_both_shelves_are_there_and_most_remedies_run():
    count = {shelf: len(browse(shelf=shelf)) for shelf in SHELVES}
    assert min(count.values()) >= 10 and sum(count.values()) == len(TAXONOMY)
    built = [r for r in TAXONOMY.values() if r.built]
    assert len(built) >= len(TAXONOMY) / 2
    assert {r.shelf for r in built} == set(SHELVES)


def test_the_named_methods_of_the_abstract_are_in_it():
    papers = {r.paper for r in TAXONOMY.values()}
    assert {"2004.05150", "2001.04451", "2006.04768", "2009.14794"} <= papers  # Longformer to
    general = set(browse(shelf="general")[i]["remedy"] for i in range(11))  # Performer
    named = {"parameter sharing", "pruning", "mixed precision", "knowledge distillation"}
    assert named <= general


def test_what_is_not_built_says_so():
    with pytest.raises(LookupError, match="hashed buckets: .* nothing here runs it yet"):
        TAXONOMY["hashed buckets"].load()
    assert TAXONOMY["sliding window"].load() is MIXERS["sliding window"]
    assert [m.number for m in TAXONOMY["low rank"].papers()] == ["045", "052"]


def test_claims_of_order_agree_with_the_measured_table():
    """Where a remedy is a mixer of the template's table, both say the same."""
    for remedy in TAXONOMY.values():
        spec = remedy.load() if remedy.built.startswith("foundations.unified_mixing") else None
        if spec is not None and remedy.name != "strided attention":
            assert remedy.time == spec.time, remedy.name
    # one attention per remainder is L^2 / s; with s = sqrt(L) the paper's L sqrt(L)
    for L in (256, 1024, 4096):
        assert cost("strided", L, 64, 1, stride=round(L**0.5)).held == L**1.5


def test_browse_filters():
    rows = browse(lambda r: r.exact, shelf="general")
    assert [row["remedy"] for row in rows] == ["gradient checkpointing", "micro-batching"]
    assert len({tuple(row) for row in browse()}) == 1  # the same columns everywhere


# --- advice ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("need", SAVES)
def test_advice_keeps_every_condition(need):
    everything = advise(need)
    assert everything and all(need in r.saves for r in everything)
    frozen = advise(need, trained=True, tuning=False)
    assert all(r.trained == "as is" for r in frozen)
    tuned = advise(need, trained=True)
    assert {r.name for r in frozen} <= {r.name for r in tuned} <= {r.name for r in everything}
    assert all(r.trained != "no" for r in tuned)
    for flag in ("exact", "causal", "cross"):
        assert all(getattr(r, flag) for r in advise(need, **{flag: True}))
        kept = {r.name for r in advise(need, **{flag: True})}
        assert kept == {r.name for r in everything if getattr(r, flag)}


def test_advice_ranks_what_changes_least_first():
    first = [r for r in advise("training memory") if r.saves[0] == "training memory"]
    exact = [r.exact for r in first]
    assert exact == sorted(exact, reverse=True) and exact[0]
    assert advise("training memory")[: len(first)] == first
    places = [r.saves.index("time") for r in advise("time")]
    assert places == sorted(places)
    assert advise("parameters", exact=True) == []


# --- costs ----------------------------------------------------------------------------------------

L, C, H = 24, 12, 3


def heads(L=L):
    torch.manual_seed(0)
    return torch.randn(3, 1, H, L, C // H)


def test_bytes_are_those_of_the_tensors():
    q, k, v = heads()
    dense = q @ k.mT
    assert cost("dense", L, C, H).bytes() == dense.nbytes
    assert cost("dense", L, C, H).bytes(8) == dense.double().nbytes
    for w in (1, 5, 24, 99):
        seen = visible_keys(L, L, causal=True, window=w)
        assert cost("sliding window", L, C, H, window=w).held == H * int(seen.sum())
    for s in (1, 5, 24, 40):
        i = torch.arange(L)
        seen = (i[:, None] - i) % s == 0
        assert cost("strided", L, C, H, stride=s).held == H * int(seen.sum())
    E = torch.randn(7, L)
    assert cost("low rank", L, C, H, rank=7).bytes() == (q @ (E @ k).mT).nbytes
    phi_k = torch.randn(1, H, L, 9)
    assert cost("kernel", L, C, H, rank=9).bytes() == (phi_k.mT @ v).nbytes


class Products(TorchDispatchMode):
    """Counts a multiplication and an addition for every term of every matrix product."""

    flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # saves the import of torch's compiler

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.flops += 2 * out.numel() * args[0].shape[-1]
        return out


def counted(run) -> int:
    with Products() as counter:
        run()
    return counter.flops


def test_operations_are_those_of_the_products():
    q, k, v = heads()
    E, features = torch.randn(7, L), torch.randn(2, 1, H, L, 9)
    runs = {
        "dense": lambda: (q @ k.mT).softmax(-1) @ v,
        "low rank": lambda: (q @ (E @ k).mT).softmax(-1) @ (E @ v),
        "kernel": lambda: features[0] @ (features[1].mT @ v),
        "strided": lambda: [
            (q[:, :, r::5] @ k[:, :, r::5].mT).softmax(-1) @ v[:, :, r::5] for r in range(5)
        ],
    }
    for name, run in runs.items():
        rank = 9 if name == "kernel" else 7
        assert cost(name, L, C, H, rank=rank, stride=5).flops == counted(run), name


def test_the_dense_part_is_a_layers():
    x = torch.randn(L, C)
    matrices = [torch.randn(C, n) for n in (3 * C, C, 4 * C)] + [torch.randn(4 * C, C)]

    def layer():
        x @ matrices[0], x @ matrices[1], (x @ matrices[2]) @ matrices[3]

    assert dense_part(L, C) == counted(layer)
    assert cost("dense", 6 * C, C, H).flops == dense_part(6 * C, C)  # attention overtakes here


@pytest.mark.parametrize("method", [m for m in METHODS if m != "dense"])
def test_crossover_solves_the_cost_equation(method):
    options = dict(window=64, stride=8, rank=48)
    n = crossover(method, 32, 2, **options)

    def gap(L):
        return cost("dense", L, 32, 2).flops - cost(method, L, 32, 2, **options).flops

    assert gap(n) > 0 >= gap(n - 1) if n > 1 else gap(n) > 0
    assert all(gap(m) > 0 for m in range(n, n + 50))


def test_crossovers_in_closed_form():
    assert crossover("kernel", 64, 4, rank=256) == 257  # L > R
    assert crossover("low rank", 64, 4, rank=256) == 513  # L > 2 R: projecting counts too
    assert crossover("sliding window", 64, 4, window=256) == 2  # it never computes more
    assert crossover("kernel", 64, 4, rank=256, longest=100) is None


def test_the_mixers_cost_what_the_model_says():
    """The template's own kernel attention does no other products."""
    q, k, v = heads()
    phi = counted(lambda: mixers.kernel_attention(q, k, v))
    normaliser = 2 * H * L * (C // H)  # q times the sum of keys
    assert phi == cost("kernel", L, C, H, rank=C // H).flops + normaliser


@pytest.mark.no_shape_checks
def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match="need: expected one of"):
        advise("money")
    with pytest.raises(ValueError, match="shelf: expected one of"):
        browse(shelf="top")
    with pytest.raises(ValueError, match="method: expected one of"):
        cost("sparse", 8, 8, 1)
    with pytest.raises(ValueError, match="L: expected at least 1, got 0"):
        cost("dense", 0, 8, 1)
