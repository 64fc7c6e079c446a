"""Aggressive decoding: greedy's tokens for any source and drafter, in the promised calls."""

from __future__ import annotations

import doctest

import pytest
import torch

from corelib.decoding import aggressive_decoding
from corelib.decoding.aggressive_decoding import (
    BlockNAT,
    ScriptedModel,
    example,
    gad_decode,
    input_guided,
    input_guided_decode,
    input_guided_reference,
    realign,
    tolerant,
)
from corelib.decoding.shared import (
    Draft,
    TabularModel,
    exact_law,
    lossless,
    speculative_decode,
    token_law,
    total_variation,
)
from corelib.models.cache import DenseCache
from corelib.models.decoder import generate
from corelib.models.encoder import Encoder


def plain(model, ids, new, eos=None):
    tokens = generate(model, ids, new)[0, ids.shape[1] :].tolist()
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def some_ids(n, seed=0):
    return torch.randint(0, 20, (1, n), generator=torch.Generator().manual_seed(seed))


def editor(source, changes, vocab=60):
    """Copies ``source`` but for ``changes``: place -> the ids that stand there instead."""
    pieces = [changes.get(place, [token]) for place, token in enumerate(source)]
    return ScriptedModel(source, [token for piece in pieces for token in piece] + [0], vocab)


def test_docstring():
    assert doctest.testmod(aggressive_decoding).failed == 0


# --- realignment ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, output, place",
    [
        ([1, 2, 3], [], 0),
        ([1, 2, 3], [9, 2], 2),
        ([1, 2, 3], [3], 3),  # nothing is left
        ([1, 2, 3], [9], None),
        ([1, 2, 5, 2, 3], [1, 2], 2),  # 2 stands twice, 1 2 once
        ([1, 2, 5, 2, 3], [5, 2], 4),
        ([1, 2, 5, 2, 3], [9, 2], None),  # 2 stands twice, 9 2 never
        ([1, 2, 1, 2], [1, 2], None),  # the whole end stands twice
        ([], [1], None),
    ],
)
def test_realign_finds_the_shortest_end_that_stands_once(source, output, place):
    assert realign(source, output) == place


# --- input-guided ---------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("longest", [None, 1, 3])
def test_greedy_tokens_for_any_source(longest, cached, tiny):
    model, ids, new = tiny(), some_ids(6), 8
    expected = plain(model, ids, new)
    sources = {
        "the output": expected,
        "unrelated": some_ids(30, seed=5)[0].tolist(),
        "empty": [],
        "edited": [*expected[:2], 1, 2, *expected[4:6], *expected[7:]],
    }
    for source in sources.values():
        for n in (0, 1, new):
            cache = DenseCache() if cached else None
            report = input_guided_decode(model, ids, source, n, longest=longest, cache=cache)
            assert report.tokens == expected[:n]
            if longest is None:
                tokens, calls = input_guided_reference(model, ids, source, n)
                assert (tokens, calls) == (report.tokens, report.target_calls)


def test_ends_with_the_end_token_as_greedy_does(tiny):
    model, ids = tiny(), some_ids(6)
    tokens = plain(model, ids, 12)
    eos = tokens[6]
    expected = plain(model, ids, 12, eos)
    for source in (tokens, tokens[3:], []):
        assert input_guided_decode(model, ids, source, 12, eos=eos).tokens == expected
        assert input_guided_reference(model, ids, source, 12, eos=eos)[0] == expected


def test_a_copy_takes_one_call():
    source = list(range(1, 30))
    model = editor(source, {})
    report = input_guided_decode(model, torch.tensor([source]), source, 60, eos=0)
    assert report.tokens == [*source, 0] and report.target_calls == 1
    assert input_guided_reference(model, torch.tensor([source]), source, 60, eos=0)[1] == 1


@pytest.mark.parametrize(
    "changes, calls",
    [({4: []}, 2), ({4: [35]}, 3), ({4: [5, 35]}, 3), ({4: [35], 12: [36], 20: []}, 6)],
)
def test_calls_by_kind_of_edit(changes, calls):
    """One call; one more for an id left out, two for one replaced or put in."""
    source = list(range(1, 30))
    model = editor(source, changes)
    report = input_guided_decode(model, torch.tensor([source]), source, 60, eos=0)
    assert report.tokens == model.output and report.target_calls == calls


def test_a_wrong_source_costs_a_call_for_each_token():
    source = list(range(1, 30))
    model = editor(source, {})
    report = input_guided_decode(model, torch.tensor([source]), [50, 51, 52], 60, eos=0)
    assert report.target_calls == len(report.tokens) == 30


def test_the_law_of_sampling_with_a_source_is_the_targets():
    target, prompt = TabularModel(2, seed=1), torch.tensor([[1, 0]])

    def decode(chooser):
        verifier = lossless(token_law, chooser)
        drafter = input_guided([1, 0, 1])
        return speculative_decode(target, prompt, 4, drafter, verifier=verifier).tokens

    expected = target.law([1, 0], 4, token_law)
    assert total_variation(exact_law(decode), expected) < 1e-12


# --- generalised ----------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 2, 7])
def test_gad_is_greedy_for_any_drafter(block, tiny):
    model, ids = tiny(), some_ids(6)
    nat = BlockNAT(tiny(3, Encoder), block, mask=19)
    expected = plain(model, ids, 13)
    assert gad_decode(model, nat, ids, 13, cache=DenseCache()).tokens == expected
    eos = expected[8]
    report = gad_decode(model, nat, ids, 13, eos=eos)
    assert report.tokens == plain(model, ids, 13, eos)


class Oracle(torch.nn.Module):
    """Fills the masks with what ``output`` holds there, plus ``off``."""

    def __init__(self, output, prompt, mask, off=0):
        super().__init__()
        self.output, self.prompt, self.mask, self.off = output, prompt, mask, off

    def forward(self, ids):
        first = int((ids[0] == self.mask).nonzero()[0]) - self.prompt
        wanted = [(t + self.off) % 60 for t in self.output[first:]] + [0] * ids.shape[1]
        tail = torch.tensor(wanted[: ids.shape[1] - self.prompt - first])
        logits = torch.zeros(1, ids.shape[1], 60)
        logits[0, ids.shape[1] - len(tail) :] = torch.nn.functional.one_hot(tail, 60).float()
        return logits


@pytest.mark.parametrize("off, calls", [(0, 5), (1, 30)])
def test_a_right_drafter_saves_calls_and_a_wrong_one_costs_nothing(off, calls):
    source = list(range(1, 30))
    model = editor(source, {})
    nat = BlockNAT(Oracle(model.output, 29, 59, off), 5, mask=59)
    report = gad_decode(model, nat, torch.tensor([source]), 60, eos=0)
    assert report.tokens == [*source, 0] and report.target_calls == calls


def test_tolerance_needs_both_rank_and_gap():
    logits = torch.tensor([[3.0, 2.5, 0.0, 2.0], [0.0, 1.0, 0.0, 0.0]])
    draft = Draft([1])
    assert tolerant()(draft, logits) == (0, 0)
    assert tolerant(beta=2, tau=0.4)(draft, logits) == (0, 0)  # too far below
    assert tolerant(beta=2, tau=0.5)(draft, logits) == (1, 1)
    assert tolerant(beta=2, tau=9.0)(Draft([3]), logits) == (0, 0)  # third
    assert tolerant(beta=3, tau=9.0)(Draft([3]), logits) == (1, 1)
    assert tolerant(beta=1, tau=9.0)(draft, logits) == (0, 0)
    tie = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert tolerant(beta=1)(Draft([1]), tie) == (0, 0)  # greedy takes the first of equals


def test_full_tolerance_keeps_every_draft(tiny):
    model, ids = tiny(), some_ids(6)
    nat = BlockNAT(tiny(3, Encoder), 4, mask=19)
    report = gad_decode(model, nat, ids, 20, beta=20, tau=1e9)
    assert report.accepted == report.drafted and report.target_calls == 4
    assert report.tokens != plain(model, ids, 20)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.no_shape_checks
def test_bad_arguments(tiny):
    with pytest.raises(ValueError, match="longest: expected at least 1 or None, got 0"):
        input_guided([1], longest=0)
    with pytest.raises(ValueError, match="block: expected at least 1, got 0"):
        BlockNAT(tiny(0, Encoder), 0, mask=19)
    with pytest.raises(ValueError, match="beta: expected at least 1, got 0"):
        tolerant(beta=0)
    with pytest.raises(ValueError, match="tau: expected at least 0, got -1"):
        tolerant(tau=-1)


def test_example_is_what_the_reference_says():
    report = input_guided_decode(**example())
    assert input_guided_reference(**example()) == (report.tokens, report.target_calls)
