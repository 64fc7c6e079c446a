"""Linear recurrences of sequences that are packed one after another, without padding.

Sequences of about one length run together as a padded batch: a step with a key of zeros and no
decay leaves the state as it is, so padding changes nothing. Groups are cut so that padding stays
below a quarter of the steps; a few memories of a mixture, or documents in a batch, make one or two.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .linear_recurrence import linear_recurrence
from .take_rows import take_rows
from .varlen import _lengths

MOST_PADDING = 1.25  # steps of a group over real steps
FEW = 64  # steps: shorter sequences are not worth a group of their own


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

    ``state`` and the returned states are ``(n, H, K, V)``, one for each sequence. One without
    tokens leaves its state as it is.
    """
    lengths = _lengths(cu_seqlens, "cu_seqlens", total=q.shape[0]).tolist()
    starts = cu_seqlens.tolist()
    inputs = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    (_, H, K), V = q.shape, v.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    if state is None:
        state = torch.zeros(len(lengths), H, K, V, dtype=wide, device=q.device)
    groups = groups_by_length(lengths)
    outs, finals, sources = [], [], []
    for members in groups:
        index = _padded_steps([starts[s] for s in members], [lengths[s] for s in members], q)
        batch = {name: _padded(x, index) for name, x in inputs.items()}
        options = dict(state=state.to(wide)[members], scale=scale, form=form, return_state=True)
        out, after = linear_recurrence(**batch, **options)
        outs.append(out.flatten(0, 2))
        finals.append(after)
        sources.append(index.flatten())
    out = _joined(outs, sources, v)
    return (out, _replaced(state.to(wide), groups, finals)) if return_state else out


def groups_by_length(lengths: list[int]) -> list[list[int]]:
    """Sequences that run together, the longest first; those without steps are in none."""
    groups: list[list[int]] = []
    room = real = longest = 0
    for s in sorted((s for s, n in enumerate(lengths) if n), key=lambda s: -lengths[s]):
        room, real = room + longest, real + lengths[s]
        if not groups or (longest > FEW and room > MOST_PADDING * real):
            groups.append([])
            longest = room = real = lengths[s]
        groups[-1].append(s)
    return groups


def _padded_steps(starts: list[int], lengths: list[int], like: Tensor) -> Tensor:
    """``(n, H, longest)``: where a head's step stands among ``total * H``, -1 for padding."""
    first, count = (torch.tensor(x, device=like.device)[:, None, None] for x in (starts, lengths))
    step = torch.arange(max(lengths), device=like.device)
    head = torch.arange(like.shape[1], device=like.device)[:, None]
    return torch.where(step < count, (first + step) * like.shape[1] + head, -1)


def _padded(x: Tensor, index: Tensor) -> Tensor:
    """``x (total, H, ...)`` as ``(n, H, longest, ...)``, zeros behind the ends."""
    x = x.flatten(0, 1)
    inverse = _inverse(index.flatten(), len(x))[:, None]
    return take_rows(x, index.flatten(), inverse).unflatten(0, index.shape)


def _inverse(index: Tensor, count: int) -> Tensor:
    """The place in ``index`` of each of ``count`` rows, -1 where it is not."""
    inverse = torch.full((count + 1,), -1, device=index.device)
    inverse[index] = torch.arange(len(index), device=index.device)
    return inverse[:count]  # behind it: where padding's -1 was written


def _joined(outs: list[Tensor], sources: list[Tensor], v: Tensor) -> Tensor:
    """The padded outputs of all groups as packed steps again."""
    if not outs:
        return torch.zeros_like(v)
    source = torch.cat(sources)
    heads = v.shape[0] * v.shape[1]
    out = take_rows(torch.cat(outs), _inverse(source, heads), source[:, None])
    return out.unflatten(0, v.shape[:2])


def _replaced(state: Tensor, groups: list[list[int]], finals: list[Tensor]) -> Tensor:
    """``state`` with the final states of the members of each group."""
    if not groups:
        return state.clone()
    members = torch.tensor([s for group in groups for s in group], device=state.device)
    return state.index_copy(0, members, torch.cat(finals))
