"""Packing without padding: equal to each sequence by itself."""

import math

import pytest
import torch

from corelib.primitives import (
    attention_reference,
    cumulative_lengths,
    masked_attention_reference,
    masks,
    pack,
    restarting_positions,
    sequence_ids,
    unpack,
    varlen_attention,
    varlen_visible_keys,
)

F64 = torch.float64


def packed_inputs(lengths_q, lengths_k, H=4, G=2, D=4, V=6):
    torch.manual_seed(0)
    total_q, total_k = sum(lengths_q), sum(lengths_k)
    shapes = ((total_q, H, D), (total_k, G, D), (total_k, G, V))
    tensors = [torch.randn(*shape, dtype=F64).requires_grad_() for shape in shapes]
    return (
        tensors,
        cumulative_lengths(torch.tensor(lengths_q, dtype=torch.long)),
        (cumulative_lengths(torch.tensor(lengths_k, dtype=torch.long))),
    )


def per_sequence(q, k, v, cu_q, cu_k, **options):
    """A loop over the sequences, with the dense reference."""
    outs, lses = [], []
    for s in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        one = (q[rows], k[keys], v[keys])
        out, lse = attention_reference(
            *(x.transpose(0, 1)[None] for x in one), return_lse=True, **options
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    return torch.cat(outs), torch.cat(lses)


def with_gradients(f, tensors, *args, **options):
    out, lse = f(*tensors, *args, **options)
    torch.manual_seed(1)
    weights = torch.randn(out.shape, dtype=F64)
    lse_weights = torch.randn(lse.shape, dtype=F64)
    value = (out * weights).sum() + (lse.masked_fill(lse == -math.inf, 0) * lse_weights).sum()
    return out, lse, *torch.autograd.grad(value, tensors)


LENGTHS = [
    ([5], [5]),
    ([3, 1, 7, 3], [3, 1, 7, 3]),
    ([3, 1, 3, 0, 4], [9, 1, 9, 2, 0]),
    ([6, 2, 6], [2, 6, 3]),
]


@pytest.mark.parametrize("lengths_q, lengths_k", LENGTHS)
@pytest.mark.parametrize(
    "options",
    [dict(causal=True), dict(causal=False, scale=0.2), dict(causal=True, window=2, sinks=1)],
)
def test_equals_each_sequence_by_itself(lengths_q, lengths_k, options):
    tensors, cu_q, cu_k = packed_inputs(lengths_q, lengths_k)
    ours = with_gradients(varlen_attention, tensors, cu_q, cu_k, return_lse=True, **options)
    theirs = with_gradients(per_sequence, tensors, cu_q, cu_k, **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("lengths_q, lengths_k", LENGTHS)
def test_dense_mask_says_the_same(lengths_q, lengths_k):
    tensors, cu_q, cu_k = packed_inputs(lengths_q, lengths_k)
    visible = varlen_visible_keys(cu_q, cu_k, causal=True, window=3)
    dense = masked_attention_reference(*(x.transpose(0, 1)[None] for x in tensors), visible)
    ours = varlen_attention(*tensors, cu_q, cu_k, causal=True, window=3)
    torch.testing.assert_close(ours, dense[0].transpose(0, 1))


def test_document_mask_says_the_same():
    cu = cumulative_lengths(torch.tensor([3, 1, 4]))
    mask = masks.causal() & masks.document(sequence_ids(cu))
    assert torch.equal(mask.dense(8), varlen_visible_keys(cu, cu, causal=True))


def test_no_sequences():
    tensors, cu_q, cu_k = packed_inputs([], [])
    out, lse = varlen_attention(*tensors, cu_q, cu_k, causal=True, return_lse=True)
    assert out.shape == (0, 4, 6) and lse.shape == (0, 4)


def test_pack_and_unpack():
    padded = torch.arange(24.0).reshape(3, 4, 2)
    packed, cu_seqlens = pack(padded, torch.tensor([2, 0, 4]))
    assert cu_seqlens.tolist() == [0, 2, 2, 6] and cu_seqlens.dtype == torch.int32
    assert packed[:, 0].tolist() == [0, 2, 16, 18, 20, 22]
    again = unpack(packed, cu_seqlens)
    assert again.shape == (3, 4, 2) and torch.equal(again[2], padded[2])
    assert torch.equal(again[0, :2], padded[0, :2])
    assert (again[0, 2:] == 0).all() and (again[1] == 0).all()
    assert unpack(packed, cu_seqlens, length=7).shape == (3, 7, 2)
    assert unpack(packed[:0], torch.tensor([0])).shape == (0, 0, 2)


def test_pack_and_unpack_integers_without_further_axes():
    ids, cu_seqlens = pack(torch.tensor([[5, 6, 0], [7, 8, 9]]), torch.tensor([2, 3]))
    assert ids.tolist() == [5, 6, 7, 8, 9]
    assert unpack(ids, cu_seqlens).tolist() == [[5, 6, 0], [7, 8, 9]]


def test_gradients_of_packing():
    lengths = torch.tensor([2, 0, 3])
    padded = torch.randn(3, 3, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pack(x, lengths)[0], padded)
    packed = torch.randn(5, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpack(x, cumulative_lengths(lengths)), packed)


def test_positions_and_ids_restart():
    cu_seqlens = cumulative_lengths(torch.tensor([2, 0, 3]))
    assert restarting_positions(cu_seqlens).tolist() == [0, 1, 0, 1, 2]
    assert sequence_ids(cu_seqlens).tolist() == [0, 0, 2, 2, 2]


@pytest.mark.no_shape_checks
def test_errors():
    (q, k, v), cu_q, cu_k = packed_inputs([3, 2], [4, 4])
    cases = [
        (ValueError, "q: expected 3 axes", (q[None], k, v, cu_q, cu_k)),
        (ValueError, "k: expected a number of heads", (q[:, :3], k, v, cu_q, cu_k)),
        (ValueError, "v: expected the length of k", (q, k, v[:7], cu_q, cu_k)),
        (TypeError, "k: expected the dtype", (q, k.float(), v, cu_q, cu_k)),
        (
            ValueError,
            "cu_seqlens_q: expected to end at 5, got 4",
            (q, k, v, torch.tensor([0, 3, 4]), cu_k),
        ),
        (ValueError, "cu_seqlens_q: expected to start at 0", (q, k, v, cu_q + 1, cu_k)),
        (ValueError, "cu_seqlens_k: expected integers", (q, k, v, cu_q, cu_k.float())),
        (ValueError, "cu_seqlens_k: expected as many", (q, k, v, cu_q, torch.tensor([0, 8]))),
    ]
    for error, message, args in cases:
        with pytest.raises(error, match=message):
            varlen_attention(*args, causal=True)
    for call, message in (
        (lambda: cumulative_lengths(torch.tensor([1, -1])), "lengths: expected integers"),
        (lambda: pack(torch.zeros(2, 3), torch.tensor([1, 4])), "lengths: expected at most"),
        (lambda: pack(torch.zeros(2, 3), torch.tensor([1])), "lengths: expected shape"),
        (lambda: unpack(torch.zeros(5, 3), cu_q, length=2), "length: expected at least"),
        (lambda: unpack(torch.zeros(6, 3), cu_q), "cu_seqlens: expected to end at 6"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
