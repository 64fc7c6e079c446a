"""Speculative decoding is lossless by enumeration, and a wrong residual is caught."""

from __future__ import annotations

import functools

import pytest
import torch

from corelib.decoding import shared
from corelib.decoding.shared import (
    AttentiveModel,
    DecodeReport,
    Draft,
    TabularModel,
    decide,
    exact_law,
    greedy_law,
    lossless,
    model_drafter,
    no_draft,
    prompt_lookup,
    residual,
    speculative_accept,
    speculative_decode,
    token_law,
    total_variation,
)
from corelib.models.cache import DenseCache
from corelib.models.decoder import generate, greedy, sampler

pytestmark = pytest.mark.method("aggressive_decoding")
PROMPT = torch.tensor([[1, 0]])


# --- laws -----------------------------------------------------------------------------------------


def test_token_law_is_softmax_and_its_cuts():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0], [0.0, 0.0, 5.0, 0.0]], dtype=torch.float64)
    soft = (logits / 0.7).softmax(-1)
    torch.testing.assert_close(token_law(logits, temperature=0.7), soft)
    two = token_law(logits[0], temperature=0.7, top_k=2)
    expected = torch.tensor([0.0, soft[0, 1], 0.0, soft[0, 2]], dtype=torch.float64)
    expected[2], expected[3] = soft[0, 2], 0.0
    torch.testing.assert_close(two, expected / expected.sum())
    first = float(soft[0, 1])
    assert token_law(logits, temperature=0.7, top_p=first - 1e-9)[0].tolist() == [0, 1, 0, 0]
    assert token_law(logits, temperature=0.7, top_p=first + 1e-9)[0].count_nonzero() == 2
    torch.testing.assert_close(token_law(logits, temperature=0.0), greedy_law(logits))


def test_greedy_law_takes_the_first_of_equals():
    assert greedy_law(torch.tensor([1.0, 2.0, 2.0])).tolist() == [0, 1, 0]


def test_residual_of_equal_laws_is_the_law():
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.2, 0.5, 0.3])
    torch.testing.assert_close(residual(p, q), torch.tensor([1.0, 0.0, 0.0]))
    torch.testing.assert_close(residual(p, p), p)


def test_decide_asks_only_where_there_is_a_choice():
    assert decide(torch.tensor([0.0, 1.0]), None) == 1
    assert decide(torch.tensor([0.4, 0.6]), greedy) == 1


@pytest.mark.parametrize("seed", range(3))
def test_one_token_has_the_targets_law(seed):
    """The theorem, by enumeration: draw from q, accept or resample; the law is p."""
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.rand(2, 5, dtype=torch.float64, generator=generator)
    p[seed], q[4] = 0.0, 0.0  # either may exclude tokens
    p, q = p / p.sum(), q / q.sum()

    def one(chooser):
        return [speculative_accept(p, q, decide(q, chooser), chooser)[1]]

    law = exact_law(one)
    assert total_variation(law, {(i,): float(x) for i, x in enumerate(p)}) < 1e-14


# --- enumeration ----------------------------------------------------------------------------------


def test_exact_law_of_plain_sampling_is_the_chain_rule():
    model = TabularModel(3, seed=1)
    expected = model.law(PROMPT[0].tolist(), 3, lambda z: z.softmax(-1))
    brute = {}
    for tokens in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist():
        logits = model(torch.cat([PROMPT, torch.tensor([tokens])], 1))[0, 1:-1]
        brute[tuple(tokens)] = float(logits.softmax(-1)[range(3), tokens].prod())
    assert total_variation(expected, brute) < 1e-14
    got = exact_law(lambda c: generate(model, PROMPT, 3, chooser=c)[0, 2:])
    assert total_variation(got, expected) < 1e-6  # generate works in float32


def test_exact_law_enumerates_rows_of_a_batch():
    law = exact_law(lambda c: c(torch.tensor([[0.25, 0.75], [1.0, 0.0]])))
    assert law == {(0, 0): 0.25, (1, 0): 0.75}


def test_total_variation():
    assert total_variation({(0,): 1.0}, {(1,): 1.0}) == 1.0
    assert total_variation({(0,): 0.5, (1,): 0.5}, {(0,): 0.25, (1,): 0.75}) == 0.25


@pytest.mark.no_shape_checks
def test_exact_law_says_what_is_wrong():
    coin = torch.tensor([0.5, 0.5])
    with pytest.raises(ValueError, match="most: .* more than 7 ways"):
        exact_law(lambda c: [int(c(coin)) for _ in range(3)], most=7)
    with pytest.raises(ValueError, match="positive probability"):
        exact_law(lambda c: c(torch.zeros(2)))
    calls = []

    def forgetful(chooser):
        calls.append(1)
        return [int(chooser(torch.tensor([0.5, 0.5]) if len(calls) < 2 else torch.rand(2)))]

    with pytest.raises(ValueError, match="hidden state"):
        exact_law(forgetful)


def test_tabular_model_continues_a_cache():
    model, ids, cache = TabularModel(4), torch.tensor([[0, 3, 1, 2, 2]]), DenseCache()
    whole = model(ids)
    parts = torch.cat([model(ids[:, :2], cache), model(ids[:, 2:], cache)], 1)
    torch.testing.assert_close(parts, whole)
    cache.crop(3)
    torch.testing.assert_close(model(ids[:, 3:], cache), whole[:, 3:])


def test_tabular_model_follows_its_ids():
    """To a device that holds no numbers: there is one everywhere."""
    ids = torch.zeros(1, 3, dtype=torch.long, device="meta")
    assert TabularModel(4)(ids).device.type == "meta"


def test_attentive_model_continues_a_cache_and_reads_all_of_it():
    model, ids, cache = AttentiveModel(4, seed=1), torch.tensor([[0, 3, 1, 2, 2]]), DenseCache()
    parts = torch.cat([model(ids[:, :2], cache), model(ids[:, 2:], cache)], 1)
    torch.testing.assert_close(parts, model(ids))
    other = model(torch.tensor([[1, 3, 1, 2, 2]]))
    assert (other[:, -1] - parts[:, -1]).abs().max() > 1e-3


# --- the loop: laws -------------------------------------------------------------------------------

LAWS = {
    "plain": token_law,
    "sharp": functools.partial(token_law, temperature=0.6, top_p=0.9),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("kind", ["small model", "own model", "given"])
def test_the_law_of_speculative_sampling_is_the_targets(kind, name):
    law, new = LAWS[name], 3
    target, small = TabularModel(2, seed=1), TabularModel(2, seed=2)

    def decode(chooser):
        cache = DenseCache()
        if kind == "given":
            drafter = lambda tokens, start, most: Draft([1, 0][: max(most, 0)])  # noqa: E731
        else:
            model = small if kind == "small model" else target
            drafter = model_drafter(model, 2, law=law, chooser=chooser, cache=DenseCache())
        check = lossless(law, chooser)
        return speculative_decode(target, PROMPT, new, drafter, verifier=check, cache=cache).tokens

    expected = target.law(PROMPT[0].tolist(), new, law)
    assert total_variation(exact_law(decode), expected) < 1e-12


def test_resampling_from_the_target_is_not_lossless(monkeypatch):
    """The classic mistake: after a rejection draw from p instead of the residual."""
    monkeypatch.setattr(shared, "residual", lambda p, q: p)
    target, small = TabularModel(2, seed=1), TabularModel(2, seed=2)

    def decode(chooser):
        drafter = model_drafter(small, 2, law=token_law, chooser=chooser)
        return speculative_decode(
            target, PROMPT, 2, drafter, verifier=lossless(token_law, chooser)
        ).tokens

    expected = target.law(PROMPT[0].tolist(), 2, token_law)
    assert total_variation(exact_law(decode), expected) > 0.02


# --- the loop: greedy -----------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("new", [0, 1, 2, 17])
def test_greedy_tokens_are_those_of_plain_decoding(new, cached, tiny):
    model, ids = tiny(), torch.tensor([[3, 7, 3, 9, 3, 7]])
    expected = generate(model, ids, new)[0, 6:].tolist()
    for drafter in (no_draft, prompt_lookup(), model_drafter(tiny(1), 3, cache=DenseCache())):
        cache = DenseCache() if cached else None
        report = speculative_decode(model, ids, new, drafter, cache=cache)
        assert report.tokens == expected
        assert sum(report.accepted) + report.target_calls == new


def test_a_model_that_drafts_for_itself_is_always_right(tiny):
    model, ids = tiny(), torch.tensor([[3, 7]])
    cache = DenseCache()
    drafter = model_drafter(model, 4, cache=DenseCache())
    report = speculative_decode(model, ids, 15, drafter, cache=cache)
    assert report.accepted == report.drafted == [4, 4, 4] and report.tokens_per_call == 5
    assert report.fed == [6, 5, 5] and len(cache) == 2 + 15 - 1
    assert report.acceptance == 1 and report.kept_at_depth() == [1, 1, 1, 1]
    assert report.modelled_speedup(0.25) == 15 / 3.75


def test_stops_behind_the_end_even_inside_a_draft(tiny):
    model, ids = tiny(), torch.tensor([[3, 7]])
    plain = generate(model, ids, 12)[0, 2:].tolist()
    eos = plain[5]
    expected = plain[: plain.index(eos) + 1]
    for gamma in (0, 3, 9):
        report = speculative_decode(model, ids, 12, model_drafter(model, gamma), eos=eos)
        assert report.tokens == expected


def test_sampling_is_one_run_of_the_law():
    """A sampler goes where the enumeration goes: same seed, same tokens, all possible."""
    target = TabularModel(3, seed=1)
    law = target.law(PROMPT[0].tolist(), 3, token_law)
    runs = [
        speculative_decode(
            target, PROMPT, 3, no_draft, verifier=lossless(token_law, sampler(seed))
        ).tokens
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] and all(tuple(run) in law for run in runs)


def test_prompt_lookup_takes_the_last_place():
    draft = prompt_lookup(longest=2, ngram=2)
    assert draft([1, 2, 5, 1, 2, 6, 7, 8, 1, 2], 0, 9).tokens == [6, 7]
    assert draft([1, 2, 5, 1, 2, 6, 7, 8, 1, 2], 0, 1).tokens == [6]
    assert draft([9, 2, 5, 1, 2], 0, 9).tokens == [5, 1]  # one id has to do
    assert draft([1, 2, 3], 0, 9).tokens == [] and draft([1], 0, 9).tokens == []


def test_report_counts_by_depth():
    report = DecodeReport([1] * 6, drafted=[3, 3, 0, 1], accepted=[2, 0, 0, 0], fed=[5, 4, 1, 2])
    assert report.kept_at_depth() == [1 / 3, 0.5, 0.0]
    assert report.acceptance == 2 / 7 and report.tokens_per_call == 1.5
    assert report.modelled_speedup(1.0) == 6 / 7


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    "options, words",
    [
        (dict(temperature=-1.0), "temperature: expected at least 0, got -1"),
        (dict(top_k=0), "top_k: expected at least 1 or None, got 0"),
        (dict(top_p=0.0), "top_p: expected a share above 0"),
    ],
)
def test_bad_laws(options, words):
    with pytest.raises(ValueError, match=words):
        token_law(torch.zeros(3), **options)


@pytest.mark.no_shape_checks
def test_bad_arguments():
    model = TabularModel(3)
    with pytest.raises(ValueError, match="ids: expected .1, L. with at least one token"):
        speculative_decode(model, PROMPT[:, :0], 1, no_draft)
    with pytest.raises(ValueError, match="new: expected at least 0, got -1"):
        speculative_decode(model, PROMPT, -1, no_draft)
    full = DenseCache()
    model(PROMPT, full)
    with pytest.raises(ValueError, match="cache: expected an empty one, got 2 tokens"):
        speculative_decode(model, PROMPT, 1, no_draft, cache=full)
    with pytest.raises(ValueError, match="chooser: expected one"):
        speculative_decode(model, PROMPT, 1, no_draft, verifier=lossless(token_law))
    with pytest.raises(ValueError, match="token: expected one that its law q can draw, got 1"):
        speculative_accept(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), 1, greedy)
    with pytest.raises(ValueError, match="vocab: expected at least 2"):
        TabularModel(1)
