"""Attention cut among real ranks: outputs, every gradient, bytes and memory."""

from __future__ import annotations

import pytest
import torch

from corelib.foundations.sharded_attention import (
    ShardedMultiHeadAttention,
    bytes_per_worker,
    sharded_attention,
    sharded_attention_reference,
    worker_steps,
)
from corelib.measure import peak_memory
from corelib.primitives import attention_reference
from corelib.runtime import Ranks, count_traffic

pytestmark = pytest.mark.method("unified_mixing")
EXACT = dict(atol=1e-10, rtol=1e-10)
#: Stretches of the ranks: even, odd, one of them empty, one position each, a long one.
LENGTHS = {2: [[4, 4], [1, 6], [7, 0]], 3: [[5, 2, 4], [0, 3, 1], [1, 1, 1]]}


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request):
    with Ranks(request.param, timeout=60) as started:
        started.run(on_rank, cut(inputs(4), [2] * 2 + [0] * (request.param - 2)), True, 2)  # warm
        yield started


def inputs(L, B=2, H=4, G=2, D=4, V=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (B, H, L, D), (B, G, L, D), (B, G, L, V), (B, H, L, V), (B, H, L)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def on_rank(rank, stretches, causal, tile, scale=None):
    """This rank's output, log-sum-exp, and gradients of a loss that uses both."""
    q, k, v, d_out, d_lse = stretches[rank]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    with count_traffic() as there:
        out, lse = sharded_attention(
            *leaves, causal=causal, tile=tile, scale=scale, return_lse=True
        )
    with count_traffic() as back:
        ((out * d_out).sum() + (lse * d_lse).sum()).backward()
    return (out, lse, *[x.grad for x in leaves]), dict(there.sent), dict(back.sent)


def one_process(q, k, v, d_out, d_lse, causal, scale=None):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attention_reference(*leaves, causal=causal, scale=scale, return_lse=True)
    ((out * d_out).sum() + (lse * d_lse).sum()).backward()
    return (out.detach(), lse.detach(), *[x.grad for x in leaves])


def cut(tensors, lengths):
    return list(zip(*(x.split(lengths, 2) for x in tensors), strict=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tile", [1, 3, 64])
def test_outputs_and_all_gradients_equal_one_process(ranks, causal, tile):
    for lengths in LENGTHS[ranks.size]:
        tensors = inputs(sum(lengths))
        results = ranks.run(on_rank, cut(tensors, lengths), causal, tile)
        wanted = one_process(*tensors, causal)
        for got, want in zip(zip(*[r[0] for r in results], strict=True), wanted, strict=True):
            torch.testing.assert_close(torch.cat(got, 2), want, **EXACT)


def test_own_scale_and_values_narrower_than_keys(ranks):
    lengths = LENGTHS[ranks.size][0]
    tensors = inputs(sum(lengths), H=3, G=3, D=5, V=2)
    results = ranks.run(on_rank, cut(tensors, lengths), True, 2, 0.3)
    wanted = one_process(*tensors, True, 0.3)
    for got, want in zip(zip(*[r[0] for r in results], strict=True), wanted, strict=True):
        torch.testing.assert_close(torch.cat(got, 2), want, **EXACT)


def test_bytes_grow_with_the_length_and_not_with_its_square(ranks):
    P = ranks.size
    lengths = [9, 5, 7][:P]
    results = ranks.run(on_rank, cut(inputs(sum(lengths)), lengths), False, 4)
    kv = bytes_per_worker(9, P, batch=2, groups=2, widths=10, itemsize=8)
    assert kv == (P - 1) * 2 * 2 * 9 * 10 * 8
    for _, there, back in results:
        assert there == {"all_gather": kv + (P - 1) * 8}  # and the length of the stretch
        assert back == {"all_gather": kv, "reduce_scatter": kv}


def test_no_rank_holds_the_scores_or_all_keys(ranks):
    P, L, D, tile = ranks.size, 768, 4, 32

    def peak(rank, stretches):
        q, k, v = (x.clone().requires_grad_() for x in stretches[rank][:3])

        def both():
            sharded_attention(q, k, v, causal=False, tile=tile).sum().backward()

        return peak_memory(both), k.nbytes + v.nbytes

    even = [L // P] * P
    for most, own in ranks.run(peak, cut(inputs(L, B=1, H=1, G=1, D=D, V=D), even)):
        assert most < 12 * own  # q, out, their gradients, dk, dv, and some tiles
        assert most < (L // P) * L * 8 / 8  # an eighth of this rank's scores


def test_heads_need_no_traffic(ranks):
    """Every rank has heads of its own, and the whole sequence: a group of one."""

    def alone(rank, tensors):
        from torch import distributed as dist

        groups = [dist.new_group([r]) for r in range(dist.get_world_size())]
        q, k, v = (x[:, rank : rank + 1] for x in tensors[:3])
        with count_traffic() as traffic:
            out = sharded_attention(q, k, v, causal=True, group=groups[rank])
        return out, traffic.total

    P = ranks.size
    tensors = inputs(7, H=P, G=P)
    outs, totals = zip(*ranks.run(alone, tensors), strict=True)
    wanted = attention_reference(*tensors[:3], causal=True)
    torch.testing.assert_close(torch.cat(outs, 1), wanted, **EXACT)
    assert set(totals) == {0}


def test_half_precision_rounds_once(ranks):
    lengths = LENGTHS[ranks.size][0]
    q, k, v, d_out, d_lse = inputs(sum(lengths), dtype=torch.bfloat16)
    results = ranks.run(on_rank, cut((q, k, v, d_out, d_lse.float()), lengths), True, 2)
    got = torch.cat([r[0][0] for r in results], 2)
    assert got.dtype == torch.bfloat16
    wanted = attention_reference(q.double(), k.double(), v.double(), causal=True)
    torch.testing.assert_close(got.double(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("groups", [1, 4])
def test_the_layer_and_its_weights_gradients_equal_one_process(ranks, groups):
    torch.manual_seed(0)
    layer = ShardedMultiHeadAttention(12, 4, groups, causal=True, dtype=torch.float64)
    lengths = LENGTHS[ranks.size][0]
    x = torch.randn(2, sum(lengths), 12, dtype=torch.float64)

    def train(rank, layer, pieces):
        x = pieces[rank].clone().requires_grad_()
        y = layer.sharded(x, tile=2)
        y.square().sum().backward()
        layer.sum_gradients()
        return y, x.grad, [p.grad for p in layer.parameters()]

    results = ranks.run(train, layer, x.split(lengths, 1))
    whole = x.clone().requires_grad_()
    y = layer(whole)
    y.square().sum().backward()
    torch.testing.assert_close(torch.cat([r[0] for r in results], 1), y.detach(), **EXACT)
    torch.testing.assert_close(torch.cat([r[1] for r in results], 1), whole.grad, **EXACT)
    for _, _, grads in results:
        torch.testing.assert_close(grads, [p.grad for p in layer.parameters()], **EXACT)


# --- the reference, played in one process ---------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [[11], [5, 6], [1, 9, 1], [3, 0, 4, 4], [1] * 11])
def test_reference_is_dense_attention_for_any_workers_and_tile(lengths, causal):
    q, k, v, *_ = inputs(11)
    wanted = attention_reference(q, k, v, causal=causal)
    for tile in (1, 2, 5, 100):
        got = sharded_attention_reference(q, k, v, lengths, causal=causal, tile=tile)
        torch.testing.assert_close(got, wanted, **EXACT)


@pytest.mark.parametrize("causal", [True, False])
def test_steps_score_every_visible_pair_once(causal):
    lengths = [4, 0, 7, 2]
    L = sum(lengths)
    steps = worker_steps(lengths, causal=causal, tile=3)
    assert sum(step.pairs for step in steps) == (L * (L + 1) // 2 if causal else L * L)
    work = [sum(s.pairs for s in steps if s.worker == w) for w in range(4)]
    assert (work[2] > work[0]) and (work[3] < work[2])
    assert all(s.source < s.worker for s in steps if s.number) or not causal


@pytest.mark.no_shape_checks
def test_errors():
    q, k, v, *_ = inputs(4)
    with pytest.raises(ValueError, match="lengths: expected stretches of 4"):
        sharded_attention_reference(q, k, v, [3, 2], causal=True)
    with pytest.raises(ValueError, match="tile: expected at least 1, got 0"):
        sharded_attention(q, k, v, causal=True, tile=0)
    with pytest.raises(ValueError, match="k: expected the positions of q, 4, got 3"):
        sharded_attention(q, k[:, :, :3], v[:, :, :3], causal=True)
    with pytest.raises(RuntimeError, match="run_ranks"):
        sharded_attention(q, k, v, causal=True)
    with pytest.raises(ValueError, match="heads: expected a divisor of C = 10, got 4"):
        ShardedMultiHeadAttention(10, 4)
    with pytest.raises(ValueError, match="groups: expected a divisor of heads = 4, got 3"):
        ShardedMultiHeadAttention(12, 4, 3)
