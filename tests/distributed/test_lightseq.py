"""LightSeq on one to four ranks: outputs, gradients, bytes, recomputation; its schedule."""

from __future__ import annotations

import doctest

import pytest
import torch

from corelib.distributed import lightseq as module
from corelib.distributed.block_attention import block_attention
from corelib.distributed.lightseq import (
    balanced_schedule,
    bytes_sent,
    dist_flash_attention,
    dist_flash_attention_reference,
    example,
    idle_slots,
    layer_checkpoint,
    remat_aware_checkpoint,
)
from corelib.distributed.shared import Pair, borrowed_from, ring_schedule
from corelib.primitives import attention_reference

EXACT = dict(atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("P", [1, 2, 3, 4])
def test_outputs_and_all_gradients_equal_one_process(groups, kit, P):
    tensors = kit.inputs(3 * P)
    results = groups.train(P, dist_flash_attention, tensors, causal=True)
    kit.assert_equal_one_process(results, tensors, True)


def test_not_causal_one_position_a_rank_fewer_heads_than_ranks(groups, kit):
    tensors = kit.inputs(4, H=1, G=1, D=5, V=2)
    for causal in (True, False):
        results = groups.train(4, dist_flash_attention, tensors, causal=causal, scale=0.3)
        kit.assert_equal_one_process(results, tensors, causal, scale=0.3)


@pytest.mark.parametrize("P", [2, 3, 4])
def test_bytes_are_those_of_the_schedule(groups, kit, P):
    n = 5
    tensors = kit.inputs(n * P, D=4, V=4)
    wanted = bytes_sent(balanced_schedule(P), n, B=2, H=4, G=2, D=4, itemsize=8)
    results = groups.train(P, dist_flash_attention, tensors, causal=True)
    assert [(there, back) for _, there, back in results] == wanted


def test_bytes_by_hand():
    """Three ranks: keys go 0 -> 1 -> 2 once each, queries 2 -> 0, and results back."""
    unit = dict(B=1, H=2, G=1, D=8, itemsize=1)
    keys, queries, answer = 16, 16, 18
    forward = [sent for sent, _ in bytes_sent(balanced_schedule(3), 1, **unit)]
    assert forward == [keys + answer, keys, queries]


@pytest.mark.parametrize("P", [2, 3])
def test_the_layer_and_its_weights(groups, kit, P):
    kit.assert_layer_equals_one_process(groups, P, dist_flash_attention, True, 4 * P)


def test_a_checkpoint_behind_attention_attends_once(groups):
    """Same gradients as without checkpoints; forward traffic once, not twice."""
    P = 2

    def on_rank(rank, group, pieces, weight, how):
        import sys

        from corelib.distributed.block_attention import Kept
        from corelib.runtime import count_traffic

        x, weight = pieces[rank].clone().requires_grad_(), weight.clone().requires_grad_()
        kept = Kept()

        def block(x, kept):
            for _ in range(2):  # two layers in a block
                q, k, v = (x @ w for w in weight)
                y = dist_flash_attention(q, k, v, causal=True, group=group, kept=kept)
                x = x + torch.tanh(y)
            return x

        with count_traffic() as traffic:
            if how == "plain":
                y = block(x, kept)
            elif how == "usual":
                y = layer_checkpoint(block, x, kept)
            else:
                y = remat_aware_checkpoint(block, x, kept)
            y.square().sum().backward()
        # torch's compiler takes seconds to import, on every rank
        assert "torch._dynamo" not in sys.modules
        return (y, x.grad, weight.grad), kept.attended, traffic.total

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 3 * P, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, 4, 4, dtype=torch.float64, generator=generator)
    plain, usual, aware = (
        groups.run(P, on_rank, x.chunk(P, 2), weight, how) for how in ("plain", "usual", "aware")
    )
    for a, b, c in zip(plain, usual, aware):
        torch.testing.assert_close(b[0], a[0], **EXACT)
        torch.testing.assert_close(c[0], a[0], **EXACT)
        assert (a[1], b[1], c[1]) == (2, 4, 2)
        assert c[2] == a[2] <= b[2]
    assert sum(a[2] for a in plain) < sum(b[2] for b in usual)


def test_a_schedule_for_other_ranks_is_an_error(groups):
    def on_rank(rank, group):
        x = torch.zeros(1, 1, 2, 4)
        try:
            block_attention(x, x, x, balanced_schedule(3), causal=True, group=group)
        except ValueError as error:
            return str(error)

    assert groups.run(2, on_rank) == ["schedule: expected one for 2 ranks, got 3"] * 2


# --- the schedule, and in one process -------------------------------------------------------------


@pytest.mark.parametrize("P", range(1, 18))
def test_every_causal_pair_once_and_hardly_an_idle_slot(P):
    schedule = balanced_schedule(P)
    pairs = [pair for step in schedule for pair in step if pair]
    assert sorted(pairs) == [Pair(r, s) for r in range(P) for s in range(r + 1)]
    assert len(schedule) == P // 2 + 1
    assert idle_slots(schedule) == (P // 2 if P % 2 == 0 else 0)
    assert idle_slots(ring_schedule(P, causal=True)) == P * (P - 1) // 2
    for t, step in enumerate(schedule):
        for worker, pair in enumerate(step):
            assert pair is None or worker in pair
            assert borrowed_from(worker, pair) in (None, (worker - t) % P)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 12])
def test_reference_is_dense_attention(ranks):
    qkv = example()
    wanted = attention_reference(**qkv, causal=True)
    got = dist_flash_attention_reference(**qkv, ranks=ranks)
    torch.testing.assert_close(got, wanted, **EXACT)


def test_example():
    assert doctest.testmod(module).failed == 0


@pytest.mark.no_shape_checks
def test_errors():
    x = torch.zeros(1, 2, 4, 3)
    with pytest.raises(RuntimeError, match="run_ranks"):
        dist_flash_attention(x, x, x, causal=True)
    with pytest.raises(ValueError, match="ranks: expected at least 1, got 0"):
        balanced_schedule(0)
    with pytest.raises(TypeError, match="ranks: expected an int, got float"):
        balanced_schedule(2.0)
    with pytest.raises(ValueError, match="ranks: expected a divisor of the length 4, got 3"):
        dist_flash_attention_reference(x, x, x, ranks=3)
