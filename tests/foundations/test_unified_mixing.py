"""The template: every row of the table is linear in its values, and is what it claims to be."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from corelib.catalog import methods
from corelib.foundations.unified_mixing import (
    TAXONOMY,
    disagreements,
    example,
    learned,
    measure,
)
from corelib.measure import peak_memory
from corelib.measure.structure import materialize


@pytest.fixture(scope="module")
def facts():
    return {name: measure(spec) for name, spec in TAXONOMY.items()}


@pytest.mark.parametrize("name", TAXONOMY)
def test_a_row_is_what_it_claims(name, facts):
    assert disagreements(TAXONOMY[name], facts[name]) == []


@pytest.mark.parametrize("name", TAXONOMY)
@pytest.mark.parametrize("L", [1, 5, 13])
def test_the_matrix_times_the_values_is_the_mixer(name, L):
    """Several heads and rows, whose matrices differ where content or parameters do."""
    mix = TAXONOMY[name].mix
    q, k, v = (learned(2, 3, L, n, seed=n) for n in (8, 9, 5))
    k = k[..., :8]
    P = materialize(lambda v: mix(q, k, v), L, batch=(2, 3))
    torch.testing.assert_close(mix(q, k, v), P @ v.to(P.dtype), atol=1e-10, rtol=1e-10)


CLAIMS = {
    "content": True,
    "positional": True,
    "normalised": True,
    "causal": True,
    "rank": 5,
    "state": 5,
    "band": 5,
    "structure": "vandermonde",
}


@pytest.mark.parametrize("claim", CLAIMS)
@pytest.mark.parametrize("name", ["attention", "long convolution", "learned matrix"])
def test_a_wrong_claim_is_noticed(claim, name, facts):
    spec, value = TAXONOMY[name], CLAIMS[claim]
    wrong = (not getattr(spec, claim)) if isinstance(value, bool) else value
    found = disagreements(dataclasses.replace(spec, **{claim: wrong}), facts[name])
    assert found and all(name in line for line in found)


def test_growing_is_not_claimed_of_what_stays(facts):
    spec = dataclasses.replace(TAXONOMY["state space"], state=None)
    assert disagreements(spec, facts["state space"]) == [
        "state space: state is claimed to be grows, measured 4"
    ]


@pytest.mark.parametrize("length", [40, 56])
def test_a_state_that_is_fixed_does_not_grow(length, facts):
    """The claim behind linear-time decoding, at other lengths than the table's."""
    for name in ("sliding window", "causal kernel", "gated recurrence", "state space"):
        seen = measure(TAXONOMY[name], length).structure
        assert seen.state_forward == TAXONOMY[name].state
    assert measure(TAXONOMY["causal attention"], length).structure.state_forward == length // 2


def test_your_own_mixer_can_be_measured():
    found = measure(lambda q, k, v: v.cumsum(2), 16)
    assert (found.structure.state_forward, found.structure.causal) == (1, True)
    assert not found.content and found.positional
    with pytest.raises(ValueError, match="linear in its values"):
        measure(lambda q, k, v: F.scaled_dot_product_attention(v, v, v), 16)


def test_attention_of_the_table_is_pytorchs():
    q, k = example(16)
    v = learned(1, 1, 16, 8, seed=7)
    for name, causal in (("attention", False), ("causal attention", True)):
        wanted = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        torch.testing.assert_close(TAXONOMY[name].mix(q, k, v), wanted)


def test_papers_of_the_table_are_in_the_catalog():
    slugs = {row.slug for row in methods()}
    linked = [slug for spec in TAXONOMY.values() for slug in spec.rows]
    assert set(linked) <= slugs
    assert all(spec.rows and spec.name == name for name, spec in TAXONOMY.items())
    assert {spec.time for spec in TAXONOMY.values()} == {"L", "L log L", "L^2"}


def test_linear_rows_take_linear_memory():
    """Bytes of the tensors made: who is called linear builds no ``L x L`` matrix."""

    def growth(name):
        q, k, v = learned(3, 1, 1, 1024, 8)
        mix = TAXONOMY[name].mix
        short = peak_memory(lambda: mix(*(x[:, :, :256] for x in (q, k, v))))
        return peak_memory(lambda: mix(q, k, v)) / short

    for name in ("causal kernel", "gated recurrence", "pooling", "state space", "low rank"):
        assert growth(name) < 5, name
    assert growth("learned matrix") > 14
