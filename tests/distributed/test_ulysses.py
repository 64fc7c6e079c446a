"""Ulysses on one to four ranks: outputs, gradients, bytes, copies of heads, any core."""

from __future__ import annotations

import doctest
import functools

import pytest
import torch

from corelib.distributed import ulysses as module
from corelib.distributed.ulysses import (
    bytes_sent,
    comm_volume,
    example,
    heads_to_seq,
    kv_copies,
    seq_to_heads,
    ulysses_attention,
    ulysses_attention_reference,
)
from corelib.primitives import attention, attention_reference

EXACT = dict(atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("P, H, G", [(1, 4, 2), (2, 4, 2), (3, 6, 2), (4, 4, 2), (4, 8, 8)])
def test_outputs_and_all_gradients_equal_one_process(groups, kit, P, H, G, causal):
    """Also with key/value heads that the ranks do not divide: 2 among 3, and 2 among 4."""
    tensors = kit.inputs(3 * P, H=H, G=G)
    results = groups.train(P, ulysses_attention, tensors, causal=causal)
    kit.assert_equal_one_process(results, tensors, causal)


def test_one_position_a_rank_own_scale_one_key_head(groups, kit):
    tensors = kit.inputs(4, H=4, G=1, D=5, V=2)
    results = groups.train(4, ulysses_attention, tensors, causal=True, scale=0.3)
    kit.assert_equal_one_process(results, tensors, True, scale=0.3)


def test_the_swap_is_a_permutation_with_an_inverse(groups):
    """Rank ``r`` gets heads ``r H / P`` and on, of all positions; and everything finds back."""

    def on_rank(rank, group, pieces):
        there = seq_to_heads(pieces[rank], group)
        return there, heads_to_seq(there, group)

    x = torch.arange(2 * 6 * 9 * 4.0).view(2, 6, 9, 4)
    pieces = x.chunk(3, 2)
    for rank, (there, back) in enumerate(groups.run(3, on_rank, pieces)):
        assert torch.equal(there, x[:, 2 * rank : 2 * rank + 2])
        assert torch.equal(back, pieces[rank])


@pytest.mark.parametrize("P, H, G", [(1, 4, 4), (2, 4, 4), (4, 4, 4), (3, 6, 2), (4, 8, 2)])
def test_bytes_are_the_cards(groups, kit, P, H, G):
    B, n, D = 2, 5, 4
    sizes = dict(B=B, H=H, G=G, D=D, itemsize=8)
    tensors = kit.inputs(n * P, H=H, G=G, V=D)[:3]

    def on_rank(rank, group, stretches):
        from corelib.runtime import count_traffic

        leaves = [x.clone().requires_grad_() for x in stretches[rank]]
        with count_traffic() as there:
            out = ulysses_attention(*leaves, causal=True, group=group)
        with count_traffic() as back:
            out.sum().backward()
        return there.total, back.total, there.calls["all_to_all"]

    wanted = bytes_sent(n, P, **sizes)
    stretches = list(zip(*(x.chunk(P, 2) for x in tensors)))
    assert groups.run(P, on_rank, stretches) == [(wanted, wanted, 4)] * P
    L, C = n * P, H * D
    if H == G:  # 4 L C (P - 1) / P^2 numbers
        assert wanted == B * 8 * comm_volume("ulysses", L, C, P)
        assert wanted * P * P == B * 8 * 4 * L * C * (P - 1)
    assert (P > 1) == (wanted > 0)


def test_volumes_by_hand():
    """Constant when length and ranks grow together; the others in proportion to the length."""
    grown = [(8192 * P, P) for P in (8, 64)]
    ulysses, ring, tensor = (
        [comm_volume(method, L, 4096, P) for L, P in grown] for method in module.METHODS
    )
    assert ulysses == pytest.approx([4 * 8192 * 4096 * (1 - 1 / P) for P in (8, 64)])
    assert tensor == pytest.approx([P * sent for P, sent in zip((8, 64), ulysses)])
    assert ring == pytest.approx([P / 2 * sent for P, sent in zip((8, 64), ulysses)])


def test_copies_of_key_heads():
    """As few as possible: every rank's queries find the head that they read, in one piece."""
    assert [kv_copies(8, 2, P) for P in (1, 2, 4, 8)] == [1, 1, 2, 4]
    for H, G, P in ((12, 4, 6), (12, 2, 3), (12, 3, 4), (8, 8, 4)):
        copies = kv_copies(H, G, P)
        held = [g for g in range(G) for _ in range(copies)]
        each = len(held) // P
        assert len(held) % P == 0 and H % len(held) == 0
        for h in range(H):
            rank, place = divmod(h, H // P)
            mine = held[rank * each : (rank + 1) * each]
            assert mine[place // (H // P // each)] == h // (H // G)


def test_any_attention_inside(groups, kit):
    """A window; and one that gives no log-sum-exp."""
    q, k, v, *_ = kit.inputs(12, H=4, G=2)
    windowed = functools.partial(attention, window=5)

    def on_rank(rank, group, stretches, core):
        return ulysses_attention(*stretches[rank], causal=True, core=core, group=group)

    stretches = list(zip(*(x.chunk(2, 2) for x in (q, k, v))))
    out = torch.cat(groups.run(2, on_rank, stretches, windowed), 2)
    wanted = attention_reference(q, k, v, causal=True, window=5)
    torch.testing.assert_close(out, wanted, **EXACT)


def test_positions_are_global(groups, kit):
    """Rotated with the stretch's own positions, queries and keys meet as in one process."""
    from corelib.primitives.rope import rope_frequencies, rope_half_split

    turns = rope_frequencies(4)
    q, k, v, *_ = kit.inputs(12, H=4, G=2)
    turned = [rope_half_split(x, torch.arange(12), turns) for x in (q, k)]
    wanted = attention_reference(*turned, v, causal=True)

    def on_rank(rank, group, stretches, offset):
        q, k, v = stretches[rank]
        positions = torch.arange(q.shape[2]) + offset * rank
        q, k = (rope_half_split(x, positions, turns) for x in (q, k))
        return ulysses_attention(q, k, v, causal=True, group=group)

    stretches = list(zip(*(x.chunk(2, 2) for x in (q, k, v))))
    right, wrong = (torch.cat(groups.run(2, on_rank, stretches, o), 2) for o in (6, 0))
    torch.testing.assert_close(right, wanted, **EXACT)
    assert (wrong - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("P", [2, 3])
def test_the_layer_and_its_weights(groups, kit, P):
    kit.assert_layer_equals_one_process(groups, P, ulysses_attention, True, 4 * P)


def test_half_precision_keeps_its_dtype(groups, kit):
    tensors = [x.bfloat16() for x in kit.inputs(8)[:3]]

    def on_rank(rank, group, stretches):
        return ulysses_attention(*stretches[rank], causal=True, group=group)

    outs = groups.run(2, on_rank, list(zip(*(x.chunk(2, 2) for x in tensors))))
    wanted = attention_reference(*(x.double() for x in tensors), causal=True)
    assert outs[0].dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(outs, 2).double(), wanted, atol=2e-2, rtol=2e-2)


def test_too_many_ranks_is_a_clear_error(groups):
    def on_rank(rank, group):
        x = torch.zeros(1, 2, 2, 4)
        try:
            ulysses_attention(x, x, x, causal=True, group=group)
        except ValueError as error:
            return str(error)

    message = "ranks: expected a divisor of the 2 query heads, got 4"
    assert groups.run(4, on_rank) == [message] * 4


# --- in one process -------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_reference_is_dense_attention(causal):
    qkv = example()
    wanted = attention_reference(**qkv, causal=causal)
    for ranks in (1, 2, 3, 4, 6, 12):
        got = ulysses_attention_reference(**qkv, ranks=ranks, causal=causal)
        torch.testing.assert_close(got, wanted, **EXACT)
    assert doctest.testmod(module).failed == 0


@pytest.mark.no_shape_checks
def test_errors():
    x = torch.zeros(1, 2, 4, 3)
    with pytest.raises(RuntimeError, match="run_ranks"):
        ulysses_attention(x, x, x, causal=True)
    with pytest.raises(ValueError, match="k: expected the positions of q, 4, got 2"):
        ulysses_attention(x, x[:, :, :2], x[:, :, :2], causal=True)
    with pytest.raises(ValueError, match="ranks: expected a divisor of the 2 query heads, got 4"):
        ulysses_attention_reference(x, x, x, ranks=4, causal=True)
    with pytest.raises(ValueError, match="ranks: expected at least 1, got 0"):
        bytes_sent(3, 0, B=1, H=1, G=1, D=1, itemsize=8)
    with pytest.raises(ValueError, match="method: expected one of ulysses, ring"):
        comm_volume("gossip", 8, 8, 2)
