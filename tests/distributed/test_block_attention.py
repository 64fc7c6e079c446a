"""The rings that the papers are compared with."""

from __future__ import annotations

import pytest
import torch

from corelib.distributed.block_attention import (
    block_attention_reference,
    gathered_attention,
    ring_attention,
    zigzag_halves,
    zigzag_ring_attention,
)
from corelib.distributed.lightseq import bytes_sent
from corelib.distributed.shared import ring_schedule, zigzag_order
from corelib.primitives import attention_reference


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("P", [2, 3])
def test_ring_equals_one_process(groups, kit, P, causal):
    tensors = kit.inputs(3 * P, V=4)
    results = groups.train(P, ring_attention, tensors, causal=causal)
    kit.assert_equal_one_process(results, tensors, causal)
    schedule = ring_schedule(P, causal=causal)
    wanted = bytes_sent(schedule, 3, B=2, H=4, G=2, D=4, itemsize=8)
    assert [(there, back) for _, there, back in results] == wanted


@pytest.mark.parametrize("causal", [True, False])
def test_gathered_keys_equal_one_process(groups, kit, causal):
    P, n = 3, 3
    tensors = kit.inputs(n * P, V=4)
    results = groups.train(P, gathered_attention, tensors, causal=causal)
    kit.assert_equal_one_process(results, tensors, causal)
    wanted = 2 * (P - 1) * 2 * 2 * n * 4 * 8  # all keys and values; and their gradients home
    assert [(there, back) for _, there, back in results] == [(wanted, wanted)] * P


@pytest.mark.parametrize("causal", [True, False])
def test_zigzag_equals_one_process(groups, kit, causal):
    tensors, order = kit.inputs(12), zigzag_order(12, 3)
    results = groups.train(3, zigzag_ring_attention, tensors, order, causal=causal)
    kit.assert_equal_one_process(results, tensors, causal, order=order)


def test_zigzag_in_one_process_and_its_work(kit):
    q, k, v, *_ = kit.inputs(24)
    wanted = attention_reference(q, k, v, causal=True)
    for ranks in (1, 2, 3, 4):
        order = zigzag_order(24, ranks)
        schedule, n = ring_schedule(ranks, causal=False), 24 // ranks
        got = block_attention_reference(
            *(x[:, :, order] for x in (q, k, v)), schedule, causal=True, cut=zigzag_halves
        )
        torch.testing.assert_close(got, wanted[:, :, order], atol=1e-10, rtol=1e-10)
        for step in schedule[1:]:  # every rank scores half a block
            for pair in step:
                rows, keys = (range(n)[part] for part in zigzag_halves(pair, n))
                assert len(rows) * len(keys) == n * n // 2


def test_zigzag_order():
    assert zigzag_order(8, 2) == [0, 1, 6, 7, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="length: expected a multiple of 4, got 6"):
        zigzag_order(6, 2)
