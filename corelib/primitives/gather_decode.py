"""Decoding over a list of positions: attention that reads only the keys that were chosen.

    s_j = scale * q . k[indices_j]         for the entries of the list that are not -1
    out = sum_j exp(s_j - lse) * v[indices_j]         lse = log sum_j exp(s_j)

Whoever chooses - the best chunks, clusters, pages or tokens - leaves a list ``indices (B, U, n)``:

* ``U = 1``: one list for all heads; ``U = G``: one for each key/value head; ``U = H``: one for each
  query head. -1 is padding and costs nothing; an entry that is listed twice counts twice.
* All ``L`` queries (one, or the newest few) see all listed keys. What only some of them may see is
  attended to apart and merged by ``lse`` (`corelib.primitives.merge_partials`).

`gather_decode` copies the listed rows together and attends to them (a CPU), or reads them where
they are (a GPU: ``corelib.kernels.gather_sparse_decode``). `gather_decode_reference` is the loop.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ._checks import check_attention

OutMaybeLse = Float[Tensor, "B H L V"] | tuple[Float[Tensor, "B H L V"], Float[Tensor, "B H L"]]


def gather_decode_reference(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    indices: Int[Tensor, "B U n"],
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> OutMaybeLse:
    """`gather_decode` head by head: pick the listed keys, and attend to them."""
    check_attention(q, k, v, None, 0, scale)
    check_indices(indices, q, k)
    (B, H, L, D), G, U = q.shape, k.shape[1], indices.shape[1]
    scale = D**-0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(B, H, L, v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.full((B, H, L), -torch.inf, dtype=wide, device=q.device)
    for b in range(B):
        for h in range(H):
            g, listed = h * G // H, indices[b, h * U // H]
            listed = listed[listed >= 0]
            if len(listed) == 0:
                continue
            scores = q[b, h].to(wide) @ k[b, g, listed].to(wide).T * scale
            lse[b, h] = torch.logsumexp(scores, -1)
            out[b, h] = (scores.softmax(-1) @ v[b, g, listed].to(wide)).to(q.dtype)
    return (out, lse) if return_lse else out


def gather_decode(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    indices: Int[Tensor, "B U n"],
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> OutMaybeLse:
    """Attention of the newest queries over the keys listed in ``indices``.

    Args:
        q: one or a few queries, each of which sees every listed key.
        k, v: the cache, in any layout; what is not listed is never read and may be anything.
        indices: positions ``0 .. S - 1``, or -1 for padding; ``U`` is 1, ``G`` or ``H`` lists.
        scale: ``None`` means ``D ** -0.5``.

    Returns:
        ``out``, and with ``return_lse`` also ``lse``, natural logarithms. A head whose list is
        empty or all padding gives zeros with ``lse = -inf``.

    On a GPU this is the Triton kernel, without gradients; positions from ``S`` on count as padding
    there, because looking for them would make the CPU wait. On a CPU gradients flow.

    Raises ValueError or TypeError for shapes, dtypes or (on a CPU) positions that do not fit.
    """
    if q.is_cuda:
        from corelib.kernels.gather_sparse_decode import gather_sparse_decode

        return gather_sparse_decode(q, k, v, indices, scale=scale, return_lse=return_lse)
    check_attention(q, k, v, None, 0, scale)
    check_indices(indices, q, k)
    (B, H, L, D), (G, S), V = q.shape, k.shape[1:3], v.shape[3]
    U, scale = max(G, indices.shape[1]), D**-0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    if S == 0 or 0 in indices.shape:
        out, lse = q.new_zeros(B, H, L, V), q.new_full((B, H, L), -torch.inf, dtype=wide)
        return (out, lse) if return_lse else out
    listed, padding = indices.expand(B, U, -1), None
    if bool((listed < 0).any()):
        padding, listed = (listed < 0)[:, :, None], listed.clamp(min=0)
    keys, values = (take_rows(x, listed).to(wide) for x in (k, v))
    if padding is not None:  # whatever lies at position 0 must not reach a gradient
        keys, values = (x.masked_fill(padding.mT, 0.0) for x in (keys, values))
    rows = q.reshape(B, U, H // U * L, D).to(wide)
    if padding is None and not return_lse:
        out = F.scaled_dot_product_attention(rows, keys, values, scale=scale)
        return out.reshape(B, H, L, V).to(q.dtype)
    out, lse = _attend(rows, keys, values, padding, scale)
    out, lse = out.reshape(B, H, L, V).to(q.dtype), lse.reshape(B, H, L)
    return (out, lse) if return_lse else out


def _attend(rows: Tensor, keys: Tensor, values: Tensor, padding: Tensor | None, scale: float):
    """``rows (B, U, R, D)`` over the keys gathered for them."""
    scores = rows @ keys.mT * scale
    if padding is None:
        lse = torch.logsumexp(scores, -1)
        return torch.exp(scores - lse[..., None]) @ values, lse
    scores = scores.masked_fill(padding, -torch.inf)
    nothing = padding.all(-1).expand(scores.shape[:-1])
    lse = torch.logsumexp(scores.masked_fill(nothing[..., None], 0.0), -1)
    lse = lse.masked_fill(nothing, -torch.inf)
    weights = torch.exp(scores - lse.masked_fill(nothing, 0.0)[..., None])
    return weights @ values, lse


def take_rows(
    x: Float[Tensor, "B G S D"], indices: Int[Tensor, "B U n"]
) -> Float[Tensor, "B U n D"]:
    """Rows of ``x`` by position, ``U`` lists a request, ``U`` a multiple of ``G``.

    Where all rows lie in one storage at whole multiples of their width - heads before tokens,
    tokens before heads, room for more - this is one table look-up, and no other row is copied.
    """
    (B, G, _, D), U = x.shape, indices.shape[1]
    b = torch.arange(B, device=x.device)[:, None, None]
    g = (torch.arange(U, device=x.device) // (U // G))[None, :, None]
    strides = x.stride()
    if strides[3] != 1 or D == 0 or any(step % D for step in strides[:3]):
        return x[b, g, indices]
    rows = [step // D for step in strides[:3]]
    last = sum(step * (size - 1) for step, size in zip(rows, x.shape, strict=False))
    table = x.as_strided((last + 1, D), (D, 1))
    return F.embedding(b * rows[0] + g * rows[1] + indices * rows[2], table)


def check_indices(indices: Tensor, q: Tensor, k: Tensor) -> None:
    """Raise unless ``indices (B, U, n)`` lists positions of ``k`` for the heads of ``q``."""
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        found = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
        raise TypeError(f"indices: expected a tensor of int32 or int64, got {found}")
    B, H, G = q.shape[0], q.shape[1], k.shape[1]
    if indices.dim() != 3 or indices.shape[0] != B or indices.shape[1] not in (1, G, H):
        raise ValueError(
            f"indices: expected (batch {B}, lists 1, {G} or {H}, n), got {tuple(indices.shape)}"
        )
    if indices.device != q.device:
        raise ValueError(f"indices: expected the device of q, {q.device}, got {indices.device}")
    if indices.device.type == "cpu" and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < -1 or high >= k.shape[2]:
            raise ValueError(
                f"indices: expected -1 to {k.shape[2] - 1}, got values from {low} to {high}"
            )
