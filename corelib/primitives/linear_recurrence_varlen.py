"""Linear recurrences of sequences that are packed one after another, without padding."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .linear_recurrence import linear_recurrence
from .varlen import _lengths


def linear_recurrence_varlen(
    q: Float[Tensor, "total H K"],
    k: Float[Tensor, "total H K"],
    v: Float[Tensor, "total H V"],
    cu_seqlens: Int[Tensor, " ends"],
    *,
    log_decay: Float[Tensor, "total H"] | Float[Tensor, "total H K"] | None = None,
    beta: Float[Tensor, "total H"] | None = None,
    state: Float[Tensor, "n H K V"] | None = None,
    scale: float | None = None,
    form: str = "auto",
    return_state: bool = False,
) -> Float[Tensor, "total H V"] | tuple[Float[Tensor, "total H V"], Float[Tensor, "n H K V"]]:
    """`linear_recurrence` of each packed sequence by itself (layout as in `varlen_attention`).

    ``state`` and the returned states are ``(n, H, K, V)``, one for each sequence. Sequences of one
    length run together; one without tokens leaves its state as it is.
    """
    lengths = _lengths(cu_seqlens, "cu_seqlens", total=q.shape[0]).tolist()
    inputs = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    pieces = {n: x.split(lengths) for n, x in inputs.items() if x is not None}
    outs: list[Tensor] = [v[:0]] * len(lengths)
    (_, H, K), V = q.shape, v.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    if state is None:
        state = torch.zeros(len(lengths), H, K, V, dtype=wide, device=q.device)
    finals = list(state.to(wide).unbind(0))
    for length in sorted(set(lengths)):
        members = [s for s, n in enumerate(lengths) if n == length]
        batch = {n: torch.stack([x[s] for s in members]).transpose(1, 2) for n, x in pieces.items()}
        options = dict(state=state[members], scale=scale, form=form, return_state=True)
        out, after = linear_recurrence(**batch, **options)
        for s, one, final in zip(members, out, after, strict=True):
            outs[s], finals[s] = one.transpose(0, 1), final
    out = torch.cat(outs) if outs else torch.zeros_like(v)
    if not return_state:
        return out
    return out, torch.stack(finals) if finals else state.to(wide)
