"""Sequences of different lengths packed one after another, without padding.

A batch of ``n`` sequences is one tensor ``(total, ...)`` and ``cu_seqlens (n + 1,)``, the running
sum of their lengths from 0: sequence ``s`` is ``packed[cu_seqlens[s] : cu_seqlens[s + 1]]``. The
name and the layout are those of FlashAttention's variable-length interface.

>>> cu_seqlens = cumulative_lengths(torch.tensor([2, 3]))
>>> restarting_positions(cu_seqlens)
tensor([0, 1, 0, 1, 2])
>>> sequence_ids(cu_seqlens)
tensor([0, 0, 1, 1, 1])
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int32, Shaped
from torch import Tensor

from ._checks import check_heads_and_widths, check_options, check_same_kind
from .attention import attention, visible_keys

CuSeqlens = Int[Tensor, " ends"]


def cumulative_lengths(lengths: Int[Tensor, " n"]) -> Int32[Tensor, " ends"]:
    """``cu_seqlens``: 0 and the running sum of ``lengths (n,)``, int32 as kernels want it."""
    if lengths.dim() != 1 or lengths.is_floating_point() or (lengths < 0).any():
        raise ValueError(f"lengths: expected integers (n,) of at least 0, got {lengths}")
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def restarting_positions(cu_seqlens: CuSeqlens) -> Int[Tensor, " total"]:
    """The position of each packed element within its own sequence, ``(total,)``."""
    lengths = _lengths(cu_seqlens, "cu_seqlens")
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths)
    return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device) - starts


def sequence_ids(cu_seqlens: CuSeqlens) -> Int[Tensor, " total"]:
    """The sequence of each packed element, ``(total,)``: what ``masks.document`` takes."""
    lengths = _lengths(cu_seqlens, "cu_seqlens")
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def pack(
    padded: Shaped[Tensor, "B L ..."], lengths: Int[Tensor, " B"]
) -> tuple[Shaped[Tensor, "total ..."], Int32[Tensor, " ends"]]:
    """``(packed, cu_seqlens)`` of the first ``lengths[b]`` positions of each row."""
    B, L = padded.shape[:2]
    if lengths.shape != (B,):
        raise ValueError(f"lengths: expected shape ({B},), got {tuple(lengths.shape)}")
    if (lengths > L).any():
        raise ValueError(f"lengths: expected at most the padded length {L}, got {lengths.tolist()}")
    inside = torch.arange(L, device=padded.device) < lengths.to(padded.device)[:, None]
    return padded[inside], cumulative_lengths(lengths).to(padded.device)


def unpack(
    packed: Shaped[Tensor, "total ..."], cu_seqlens: CuSeqlens, length: int | None = None
) -> Shaped[Tensor, "B L ..."]:
    """The padded batch ``(B, length, ...)``, zeros behind each sequence.

    ``length=None`` is the longest sequence.
    """
    lengths = _lengths(cu_seqlens, "cu_seqlens", total=packed.shape[0])
    longest = int(lengths.max()) if len(lengths) else 0
    length = longest if length is None else length
    if length < longest:
        raise ValueError(f"length: expected at least the longest sequence {longest}, got {length}")
    inside = torch.arange(length, device=packed.device) < lengths.to(packed.device)[:, None]
    padded = packed.new_zeros(len(lengths), length, *packed.shape[1:])
    return padded.masked_scatter(inside.reshape(*inside.shape, *[1] * (packed.dim() - 1)), packed)


def varlen_attention(
    q: Float[Tensor, "total_q H D"],
    k: Float[Tensor, "total_k G D"],
    v: Float[Tensor, "total_k G V"],
    cu_seqlens_q: CuSeqlens,
    cu_seqlens_k: CuSeqlens,
    *,
    causal: bool,
    window: int | None = None,
    sinks: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "total_q H V"] | tuple[Float[Tensor, "total_q H V"], Float[Tensor, "total_q H"]]:
    """`attention` of each packed sequence by itself; ``out (total_q, H, V)``, ``lse (total_q, H)``.

    Query and key lengths of a sequence may differ: its queries align with its last keys. A
    sequence without keys gives zeros and ``-inf``. On a CPU, sequences of equal lengths are
    computed together.
    """
    lengths_q, lengths_k = check_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k)
    check_options(window, sinks, scale)
    options = dict(causal=causal, window=window, sinks=sinks, scale=scale)
    if q.is_cuda:
        from corelib.kernels.flash_attention import flash_attention_varlen

        return flash_attention_varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, **options, return_lse=return_lse
        )
    out, lse = _by_length(q, k, v, lengths_q, lengths_k, options)
    return (out, lse) if return_lse else out


def varlen_visible_keys(
    cu_seqlens_q: CuSeqlens,
    cu_seqlens_k: CuSeqlens,
    *,
    causal: bool,
    window: int | None = None,
    sinks: int = 0,
) -> Bool[Tensor, "total_q total_k"]:
    """The dense mask of `varlen_attention`: a block per sequence, for references and pictures."""
    lengths_q = _lengths(cu_seqlens_q, "cu_seqlens_q").tolist()
    lengths_k = _lengths(cu_seqlens_k, "cu_seqlens_k").tolist()
    blocks = [
        visible_keys(L, S, causal=causal, window=window, sinks=sinks)
        for L, S in zip(lengths_q, lengths_k, strict=True)
    ]
    visible = torch.block_diag(*blocks).bool() if blocks else torch.zeros(0, 0, dtype=torch.bool)
    return visible.to(cu_seqlens_q.device)


def check_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> tuple[list[int], list[int]]:
    """The sequences' query and key lengths, or an error that says what does not fit."""
    check_same_kind(q=q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 3:
            raise ValueError(
                f"{name}: expected 3 axes (total, heads, width), got shape {tuple(x.shape)}"
            )
    check_heads_and_widths(q, k, v, heads_axis=1)
    if k.shape[0] != v.shape[0]:
        raise ValueError(f"v: expected the length of k, {k.shape[0]}, got {v.shape[0]}")
    lengths_q = _lengths(cu_seqlens_q, "cu_seqlens_q", total=q.shape[0])
    lengths_k = _lengths(cu_seqlens_k, "cu_seqlens_k", total=k.shape[0])
    if len(lengths_q) != len(lengths_k):
        raise ValueError(
            "cu_seqlens_k: expected as many sequences as cu_seqlens_q, "
            f"{len(lengths_q)}, got {len(lengths_k)}"
        )
    return lengths_q.tolist(), lengths_k.tolist()


def _lengths(cu_seqlens: Tensor, name: str, total: int | None = None) -> Tensor:
    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or len(cu_seqlens) == 0:
        raise ValueError(
            f"{name}: expected integers (n + 1,), "
            f"got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    lengths = cu_seqlens.long().diff()
    if cu_seqlens[0] != 0 or (lengths < 0).any():
        raise ValueError(f"{name}: expected to start at 0 and never to fall, got {cu_seqlens}")
    if total is not None and cu_seqlens[-1] != total:
        raise ValueError(f"{name}: expected to end at {total}, got {int(cu_seqlens[-1])}")
    return lengths


def _by_length(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int], options: dict
) -> tuple[Tensor, Tensor]:
    """One call of `attention` for all sequences that share their two lengths."""
    queries, keys, values = q.split(lengths_q), k.split(lengths_k), v.split(lengths_k)
    alike: dict[tuple[int, int], list[int]] = {}
    for s, lengths in enumerate(zip(lengths_q, lengths_k, strict=True)):
        alike.setdefault(lengths, []).append(s)
    outs, lses = list(queries), list(queries)
    for members in alike.values():
        batch = [
            torch.stack([x[s] for s in members]).transpose(1, 2) for x in (queries, keys, values)
        ]
        out, lse = attention(*batch, **options, return_lse=True)
        for s, one_out, one_lse in zip(members, out, lse, strict=True):
            outs[s], lses[s] = one_out.transpose(0, 1), one_lse.transpose(0, 1)
    if not outs:
        return q.new_zeros(0, q.shape[1], v.shape[2]), q.new_zeros(0, q.shape[1])
    return torch.cat(outs), torch.cat(lses)
