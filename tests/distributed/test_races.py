"""The race on ranks: what it checks before the clock starts, and the bytes it reports."""

from __future__ import annotations

import pytest

from corelib.distributed import ring_self_attention, ulysses
from corelib.measure.races.distributed import CORES, _table, inputs, run_on_ranks


def test_all_cores_agree_and_their_bytes_are_the_formulas(groups):
    H, G, D, L, P = 4, 4, 8, 16, groups.ranks.size
    race, sent = run_on_ranks(groups.ranks, inputs(L, H, G, D), repeats=1)
    assert list(race.times) == list(sent) == list(CORES)
    assert all(len(rounds) == 1 for rounds in race.times.values())
    assert race.agreement < 1e-4
    sizes = dict(B=1, G=G, D=D, itemsize=4)
    assert sent["Ulysses"] == 2 * ulysses.bytes_sent(L // P, P, H=H, **sizes)
    assert sent["ring, complete rows"] == sum(ring_self_attention.bytes_sent(L // P, P, **sizes))


def test_a_wrong_core_is_named(groups):
    def on_rank(rank, group):
        from corelib.measure.races.distributed import CORES

        CORES["wrong"] = lambda q, k, v, causal: q * k.sum() * v

    groups.run(4, on_rank)
    with pytest.raises(ValueError, match="contestant 'wrong'"):
        run_on_ranks(groups.ranks, inputs(16, 4, 4, 8), ["wrong"], repeats=1)


def test_rows_name_what_was_sent(groups):
    rows = list(_table(groups.ranks, 16, 4, 4, 8))
    assert [row.contestant for row in rows][:2] == ["Ulysses", "LightSeq"]
    assert rows[0].ratio == 1 and "sends 0.00 MB" in rows[-1].shape
    assert rows[-1].contestant.startswith("one process")
