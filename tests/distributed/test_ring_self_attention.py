"""Ring self-attention on two, three and four ranks: outputs, gradients, bytes, memory."""

from __future__ import annotations

import doctest

import pytest
import torch

from corelib.distributed import ring_self_attention as module
from corelib.distributed.ring_self_attention import (
    bytes_sent,
    example,
    linformer_sp,
    memory_model,
    paper_bytes_sent,
    ring_self_attention,
    ring_self_attention_reference,
)
from corelib.measure import fit_exponent
from corelib.primitives import attention_reference

EXACT = dict(atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("P", [1, 2, 3, 4])
def test_outputs_and_all_gradients_equal_one_process(groups, kit, P, causal):
    tensors = kit.inputs(3 * P)
    results = groups.train(P, ring_self_attention, tensors, causal=causal)
    kit.assert_equal_one_process(results, tensors, causal)


def test_one_position_a_rank_own_scale_and_fewer_heads_than_ranks(groups, kit):
    tensors = kit.inputs(4, H=1, G=1, D=5, V=2)
    results = groups.train(4, ring_self_attention, tensors, causal=False, scale=0.3)
    kit.assert_equal_one_process(results, tensors, False, scale=0.3)


@pytest.mark.parametrize("P", [1, 2, 3, 4])
def test_bytes_are_the_cards(groups, kit, P):
    B, n, D = 2, 5, 4
    tensors = kit.inputs(n * P, H=2, G=2, V=D)
    forward, backward = bytes_sent(n, P, B=B, G=2, D=D, itemsize=8)
    assert forward == 2 * (P - 1) * B * 2 * n * D * 8
    for _, there, back in groups.train(P, ring_self_attention, tensors, causal=False):
        assert (there, back) == (forward, backward)
    # The paper's total, with all-reduce for two tensors of (B, G, L, D): 8 (N - 1) B Z (L / N) A.
    all_reduces = 2 * 2 * (P - 1) * B * 2 * n * D * 8
    paper = paper_bytes_sent(n, P, B=B, G=2, D=D, itemsize=8)
    assert paper == 8 * (P - 1) * B * 2 * n * D * 8 == 2 * forward + all_reduces


def test_what_is_kept_for_the_backward_pass_is_the_strip(groups, kit):
    """Per rank ``H n L`` weights: with twice the ranks on the same length, half."""

    def kept(rank, group, stretches):
        sizes = []
        q, k, v = (x.clone().requires_grad_() for x in stretches[rank])
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            ring_self_attention(q, k, v, causal=False, group=group)
        return max(sizes)

    B, H, L = 2, 4, 24
    q, k, v, *_ = kit.inputs(L)
    for P in (1, 2, 4):
        stretches = list(zip(*(x.chunk(P, 2) for x in (q, k, v))))
        assert groups.run(P, kept, stretches) == [B * H * L * (L // P)] * P


def test_half_precision_keeps_its_dtype(groups, kit):
    tensors = [x.bfloat16() for x in kit.inputs(8)[:3]]

    def on_rank(rank, group, stretches):
        return ring_self_attention(*stretches[rank], causal=True, group=group)

    outs = groups.run(2, on_rank, list(zip(*(x.chunk(2, 2) for x in tensors))))
    wanted = attention_reference(*(x.double() for x in tensors), causal=True)
    assert outs[0].dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(outs, 2).double(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("P", [2, 3])
def test_the_layer_and_its_weights(groups, kit, P):
    kit.assert_layer_equals_one_process(groups, P, ring_self_attention, False, 4 * P)


@pytest.mark.parametrize("P", [2, 3])
def test_linformer_equals_one_process_and_its_traffic_does_not_grow(groups, kit, P):
    def on_rank(rank, group, pieces):
        from corelib.runtime import count_traffic

        leaves = [x.clone().requires_grad_() for x in pieces[rank]]
        with count_traffic() as traffic:
            out = linformer_sp(*leaves, group=group)
        out.square().sum().backward()
        return [out, *[x.grad for x in leaves]], traffic.total

    sent = set()
    for n in (3, 6):
        *qkv, _, _ = kit.inputs(n * P)
        projections = torch.randn(2, 6, n * P, dtype=torch.float64)
        leaves = [x.clone().requires_grad_() for x in (*qkv, *projections)]
        out = attention_reference(
            leaves[0], leaves[3] @ leaves[1], leaves[4] @ leaves[2], causal=False
        )
        out.square().sum().backward()
        axes = [2, 2, 2, 1, 1]
        parts = [x.detach().chunk(P, a) for x, a in zip(leaves, axes)]
        results = groups.run(P, on_rank, list(zip(*parts)))
        for i, (want, axis) in enumerate(
            zip([out.detach(), *[x.grad for x in leaves]], [2, *axes])
        ):
            torch.testing.assert_close(torch.cat([r[0][i] for r in results], axis), want, **EXACT)
        sent |= {total for _, total in results}
    assert len(sent) == 1  # all-reduces of (B, G, 6, D) and (B, G, 6, V)


# --- in one process -------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_reference_is_dense_attention(causal):
    qkv = example()
    wanted = attention_reference(**qkv, causal=causal)
    for ranks in (1, 2, 3, 4, 6, 12):
        got = ring_self_attention_reference(**qkv, ranks=ranks, causal=causal)
        torch.testing.assert_close(got, wanted, **EXACT)
    assert doctest.testmod(module).failed == 0


def test_memory_model_has_the_papers_growth():
    lengths = [2**i for i in range(12, 20)]
    shape = dict(B=1, ranks=8, C=1024, heads=16, D=64)
    models = [memory_model(L=L, **shape) for L in lengths]

    def scores(method):
        return fit_exponent(lengths, [m[method]["scores"] for m in models]).value

    assert scores("ring, complete rows") == pytest.approx(2)
    assert scores("ring, online softmax") == pytest.approx(1)
    assert scores("ring, Linformer") == pytest.approx(1)
    # The paper: cutting the sequence holds less than cutting heads once B L > 16 A Z.
    border = 16 * 16 * 64
    for L, better in ((border - 8, False), (border + 8, True)):
        held = {name: sum(parts.values()) for name, parts in memory_model(L=L, **shape).items()}
        assert (held["ring, complete rows"] < held["tensor parallel"]) == better


@pytest.mark.no_shape_checks
def test_errors():
    x = torch.zeros(1, 2, 4, 3)
    with pytest.raises(RuntimeError, match="run_ranks"):
        ring_self_attention(x, x, x, causal=True)
    with pytest.raises(ValueError, match="k: expected the positions of q, 4, got 2"):
        ring_self_attention(x, x[:, :, :2], x[:, :, :2], causal=True)
    with pytest.raises(ValueError, match="ranks: expected a divisor of the length 4, got 3"):
        ring_self_attention_reference(x, x, x, ranks=3, causal=True)
    with pytest.raises(ValueError, match="ranks: expected at least 1, got 0"):
        bytes_sent(3, 0, B=1, G=1, D=1, itemsize=8)
    with pytest.raises(ValueError, match=r"project_v: expected shape \(R, 4\), got \(2, 3\)"):
        linformer_sp(x, x, x, torch.zeros(2, 4), torch.zeros(2, 3))
