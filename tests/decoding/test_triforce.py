"""TriForce: the target's law and its greedy tokens, whatever the two drafting levels see."""

from __future__ import annotations

import doctest
import functools

import pytest
import torch

from corelib.decoding import triforce
from corelib.decoding.partial_cache import SinkCache
from corelib.decoding.shared import (
    AttentiveModel,
    DecodeReport,
    TabularModel,
    exact_law,
    greedy_law,
    lossless,
    model_drafter,
    speculative_decode,
    token_law,
    total_variation,
)
from corelib.decoding.triforce import (
    PAPER_LAW,
    chain_drafter,
    example,
    from_middle,
    read_prompt,
    triforce_generate,
)
from corelib.models.cache import DenseCache
from corelib.models.decoder import generate, sampler

PROMPT = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 1]])
SMALL = dict(gamma=2, budget=4, chunk=2, sinks=1, recent=2)


def some_ids(n, seed=0, vocab=20):
    return torch.randint(0, vocab, (1, n), generator=torch.Generator().manual_seed(seed))


def test_docstring():
    assert doctest.testmod(triforce).failed == 0


# --- laws -----------------------------------------------------------------------------------------

LAWS = {"plain": token_law, "paper": PAPER_LAW, "sharp": functools.partial(token_law, top_k=1)}


def law_of(decode, new, law, **options):
    """How far the enumerated law of ``decode`` is from that of the target."""
    target, tiny = AttentiveModel(2, 1), AttentiveModel(2, 2)
    options = SMALL | options
    expected = target.law(PROMPT[0].tolist(), new, law)

    def run(chooser):
        return decode(target, tiny, PROMPT, new, law=law, chooser=chooser, **options).tokens

    return total_variation(exact_law(run), expected)


@pytest.mark.parametrize("name, new", [("plain", 1), ("plain", 2), ("paper", 3), ("sharp", 3)])
def test_the_law_is_the_targets(name, new):
    assert law_of(triforce_generate, new, LAWS[name]) < 1e-12


def test_the_law_holds_with_one_token_a_round():
    assert law_of(triforce_generate, 3, PAPER_LAW, gamma=1, budget=2) < 1e-12


def test_drawing_from_the_middle_after_a_rejection_is_not_lossless():
    """The rule of the released middle loop; that of the outer level stays right."""

    def released(*args, law, chooser, **options):
        rule = from_middle(law, chooser)
        return triforce_generate(*args, law=law, chooser=chooser, verifier=rule, **options)

    assert law_of(released, 3, PAPER_LAW, budget=2) > 0.1
    assert law_of(released, 1, greedy_law) == 0


def test_three_different_models_chain():
    """Any models may be stacked: each level's law holds over the one below."""
    target, middle, tiny = (TabularModel(2, seed) for seed in range(3))

    def decode(chooser):
        rule = lossless(token_law, chooser)
        inner = model_drafter(tiny, 1, law=token_law, chooser=chooser, cache=DenseCache())
        outer = chain_drafter(middle, inner, 2, law=token_law, verifier=rule)
        return speculative_decode(
            target, PROMPT, 2, outer, verifier=rule, cache=DenseCache()
        ).tokens

    expected = target.law(PROMPT[0].tolist(), 2, token_law)
    assert total_variation(exact_law(decode), expected) < 1e-12


# --- greedy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [0, 1, 2, 5])
@pytest.mark.parametrize("budget, gamma", [(4, 1), (8, 6)])
def test_greedy_tokens_are_those_of_plain_decoding(budget, gamma, new, tiny):
    target, small, ids = tiny(), tiny(1), some_ids(37)
    expected = generate(target, ids, new)[0, 37:].tolist()
    sizes = dict(budget=budget, chunk=4, sinks=2, recent=5)
    report = triforce_generate(target, small, ids, new, gamma=gamma, **sizes)
    assert report.tokens == expected
    assert sum(report.outer.accepted) + report.outer.target_calls == new
    assert sum(report.rounds) == report.middle.target_calls == report.tiny_calls
    assert all(drafted <= gamma + 1 for drafted in report.outer.drafted)
    assert set(report.middle.fed) <= {2}  # the newest token and the guess: nothing is read twice


def test_a_budget_for_everything_accepts_everything(tiny):
    """Then the middle level is the target: also when sampling, token by token."""
    target, small, ids = tiny(), tiny(1), some_ids(30)
    options = dict(gamma=4, budget=64, chunk=4, sinks=2, recent=4)
    for law in (greedy_law, token_law):
        report = triforce_generate(target, small, ids, 10, law=law, chooser=sampler(0), **options)
        assert report.outer.acceptance == 1
        assert 0 < report.middle.acceptance < 1


def test_a_smaller_budget_is_read_less_and_accepted_less(tiny):
    target, small, ids = tiny(), tiny(1), some_ids(40)
    whole, part = (
        triforce_generate(target, small, ids, 6, gamma=4, budget=budget, sinks=2, recent=4)
        for budget in (56, 8)
    )
    assert part.outer.acceptance < whole.outer.acceptance == 1
    per_call = [r.kv_bytes["middle"] / r.middle.target_calls for r in (part, whole)]
    assert per_call[0] < 0.5 * per_call[1]


def test_bytes_read_are_those_of_the_caches(tiny):
    """One layer's key and value of a position take 2 * 1 * 8 * 8 bytes here, and there are two."""
    target, small, ids = tiny(), tiny(1), some_ids(40)
    options = dict(gamma=3, budget=16, chunk=4, sinks=2, recent=4)
    report = triforce_generate(target, small, ids, 9, **options)
    position, held, outer = 2 * 2 * 8 * 8, 40, 0
    for fed, accepted in zip(report.outer.fed[1:], report.outer.accepted[1:], strict=True):
        outer += (held + fed) * position
        held += accepted + 1
    assert report.kv_bytes["outer"] == outer
    assert report.kv_bytes["middle"] <= report.middle.target_calls * (16 + 5) * position
    assert report.kv_bytes["tiny"] <= report.tiny_calls * (2 + 4 + 5) * position


def test_stops_behind_the_end(tiny):
    target, small, ids = tiny(), tiny(1), some_ids(21)
    written = generate(target, ids, 10)[0, 21:].tolist()
    eos = written[5]
    expected = written[: written.index(eos) + 1]
    assert triforce_generate(target, small, ids, 10, eos=eos, **SMALL).tokens == expected


def test_a_prompt_of_one_token(tiny):
    target, ids = tiny(), some_ids(1)
    expected = generate(target, ids, 6)[0, 1:].tolist()
    assert triforce_generate(target, tiny(1), ids, 6, **SMALL).tokens == expected


# --- parts ----------------------------------------------------------------------------------------


def test_the_middle_level_drafts_gamma_or_one_more():
    model = TabularModel(4, 1)
    report = DecodeReport()
    inner = model_drafter(model, 1)
    draft = chain_drafter(model, inner, 3, report=report)
    got = draft([0, 1], 2, 9)
    assert len(got.tokens) == 4 and report.accepted == [1, 1]  # two at a time, as all are right
    assert got.laws.equal(greedy_law(model(torch.tensor([[0, 1, *got.tokens]]))[0, 1:-1]))
    assert len(draft([0, 1], 2, 1).tokens) == 1 and draft([0, 1], 2, 0).tokens == []


def test_reading_a_prompt_in_pieces_numbers_positions_rightly(tiny):
    model, ids = tiny(), some_ids(29)
    cache = SinkCache(sinks=3, recent=5)
    read_prompt(model, ids[0].tolist(), cache)
    assert len(cache) == 29 and cache.held == 8
    whole = SinkCache(sinks=3, recent=64)
    read_prompt(model, ids[0].tolist(), whole)
    last = torch.tensor([[7]])
    torch.testing.assert_close(model(last, whole)[0, 0], model(torch.cat([ids, last], 1))[0, -1])


def test_models_get_their_ids_where_they_take_them(tiny):
    """Prompts and drafts are lists, which know no device."""
    seen, model = [], tiny()

    def away(ids, cache=None):
        seen.append(ids.device.type)
        return model(torch.zeros(ids.shape, dtype=torch.long), cache)

    read_prompt(away, [0, 1, 2, 3], SinkCache(sinks=1, recent=2), device="meta")
    inner = model_drafter(away, 1, device="meta")
    inner([0, 1], 2, 1)
    chain_drafter(away, inner, 2, device="meta")([0, 1], 2, 2)
    assert len(seen) >= 5 and set(seen) == {"meta"}


def test_example_is_greedy_decoding():
    report, given = triforce_generate(**example()), example()
    expected = given["target"].law(given["ids"][0].tolist(), given["new"], greedy_law)
    assert [tuple(report.tokens)] == list(expected)


@pytest.mark.no_shape_checks
def test_bad_arguments(tiny):
    with pytest.raises(ValueError, match="gamma: expected at least 1, got 0"):
        triforce_generate(tiny(), tiny(), some_ids(3), 2, gamma=0)
    with pytest.raises(ValueError, match="chooser: expected one"):
        triforce_generate(tiny(), tiny(), some_ids(3), 2, law=token_law)
    with pytest.raises(ValueError, match="budget: expected a positive multiple of chunk"):
        triforce_generate(tiny(), tiny(), some_ids(3), 2, budget=12)
