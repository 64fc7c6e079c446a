"""The two tiers with their meter, and the choice of pages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from corelib.serving.shared import (
    PagedStore,
    TierMeter,
    bound_scores,
    landmark_scores,
    page_bounds,
    page_positions,
    plan_fetch,
    top_pages,
)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# --- two tiers ------------------------------------------------------------------------------------


def test_store_hands_out_pages_and_counts_their_bytes():
    pages, meter = randn(2, 3, 5, 4, 6), TierMeter()
    store = PagedStore(pages, meter)
    assert store.nbytes == meter.to_host == pages.nbytes and meter.to_device == 0
    ids = torch.tensor([[[4, 0], [-1, 2], [1, 1]], [[0, 0], [3, -1], [-1, -1]]])
    found = store.fetch(ids)
    for b in range(2):
        for g in range(3):
            for j, page in enumerate(ids[b, g].tolist()):
                wanted = torch.zeros(4, 6, dtype=pages.dtype) if page < 0 else pages[b, g, page]
                assert torch.equal(found[b, g, j], wanted)
    assert meter.to_device == int((ids >= 0).sum()) * 4 * 6 * 8
    assert store.fetch(ids[..., :0]).shape == (2, 3, 0, 4, 6)
    swapped = store.rows(torch.tensor([1, 0, 1]))
    assert torch.equal(swapped.pages, pages[[1, 0, 1]]) and meter.to_host == pages.nbytes
    meter.reset()
    assert meter == TierMeter() and meter.hit_rate == 0


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_plan_fetch_loads_what_is_missing_and_nothing_else(data):
    pages = data.draw(st.integers(1, 8))
    slots_of = data.draw(st.integers(0, pages))
    choice = st.permutations(range(pages)).map(lambda order: order[:slots_of])
    lists = [(data.draw(choice), data.draw(choice)) for _ in range(3)]
    held = torch.tensor([h for h, _ in lists]).view(1, 3, slots_of).long()
    if slots_of:
        held[0, 0, 0] = -1  # an empty slot
    wanted = torch.tensor([w for _, w in lists]).view(1, 3, slots_of).long()
    slots, ids = plan_fetch(held, wanted, pages)
    for g in range(3):
        after, before = held[0, g].tolist(), set(held[0, g].tolist())
        loads = [(s, i) for s, i in zip(slots[0, g].tolist(), ids[0, g].tolist()) if i >= 0]
        for slot, page in loads:
            after[slot] = page
        assert sorted(after) == sorted(wanted[0, g].tolist())
        assert {page for _, page in loads} == set(wanted[0, g].tolist()) - before


# --- choosing pages -------------------------------------------------------------------------------


def test_landmark_scores_are_shares_of_a_softmax():
    q, landmarks = randn(2, 6, 3, 8), randn(2, 2, 5, 8, seed=1)
    scores = landmark_scores(q, landmarks, scale=0.7)
    for b in range(2):
        for g in range(2):
            shares = [(0.7 * q[b, 3 * g + i] @ landmarks[b, g].T).softmax(-1) for i in range(3)]
            wanted = torch.stack([share.sum(0) for share in shares]).amax(0)
            torch.testing.assert_close(scores[b, g], wanted)
    one_head = landmark_scores(q[:, :2, :1], landmarks)
    torch.testing.assert_close(one_head.sum(-1), torch.ones(2, 2, dtype=torch.float64))


def test_bound_scores_bound_every_key_and_are_reached_by_a_page_of_one():
    q, k = randn(2, 4, 2, 8), randn(2, 2, 23, 8, seed=1)
    every = (q.unflatten(1, (2, 2)) @ k[:, :, None].mT).amax((2, 3)) * 8**-0.5
    bound = bound_scores(q, *page_bounds(k, 5))
    assert bound.shape == (2, 2, 5)
    for p in range(5):
        assert (bound[..., p] >= every[..., 5 * p : 5 * p + 5].amax(-1) - 1e-12).all()
    torch.testing.assert_close(bound_scores(q, *page_bounds(k, 1)), every)


def test_top_pages_takes_the_best_with_first_and_last():
    scores = torch.tensor([[[0.0, 5.0, 1.0, 4.0, 2.0, 3.0]]])
    assert sorted(top_pages(scores, 3)[0, 0].tolist()) == [1, 3, 5]
    assert sorted(top_pages(scores, 3, first=1, last=1)[0, 0].tolist()) == [0, 1, 5]
    assert sorted(top_pages(scores, 2, last=2)[0, 0].tolist()) == [4, 5]
    assert sorted(top_pages(scores, 99)[0, 0].tolist()) == list(range(6))
    assert top_pages(scores, 0).shape == (1, 1, 0)


def test_page_positions():
    ids = torch.tensor([[[2, -1, 0]]])
    assert page_positions(ids, 3)[0, 0].tolist() == [6, 7, 8, -1, -1, -1, 0, 1, 2]
    assert page_positions(ids, 3, 8)[0, 0].tolist() == [6, 7, -1, -1, -1, -1, 0, 1, 2]


@pytest.mark.no_shape_checks
def test_bad_input_is_named():
    with pytest.raises(ValueError, match="count: expected at least first \\+ last, 1 \\+ 2, got 2"):
        top_pages(torch.zeros(1, 1, 4), 2, first=1, last=2)
    with pytest.raises(ValueError, match="k, page: expected a token and a page of 1, got 0"):
        page_bounds(torch.zeros(1, 1, 0, 4), 2)
