"""JRT-RNN's training objective: next tokens after the prefix, masked tokens inside it.

A prefix that is read in both directions has seen its next token, so nothing is learnt from asking
for it. JRT (arXiv 2407.05483) hides 15 % of the prefix instead and asks for those, as encoders are
trained, and for the next token only from place M on:

    loss = mean of -log p(next | prefix, what came since)  +  0.25 * mean of -log p(hidden)

The released code hides with T5's spans in some runs; here each place is drawn on its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

IGNORE = -100  # of targets that are not scored, as in `corelib.data`


def mask_prefix(
    ids: Int[Tensor, "B L"],
    M: int,
    mask_id: int,
    *,
    generator: torch.Generator,
    share: float = 0.15,
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B M"]]:
    """``(ids, hidden)``: some of the first ``M`` ids replaced by ``mask_id``, and what they were.

    ``hidden`` is `IGNORE` where nothing was replaced. Each place is drawn on its own.
    """
    if not 0 <= M <= ids.shape[1]:
        raise ValueError(f"M: expected 0 to {ids.shape[1]}, got {M}")
    if not 0 <= share <= 1:
        raise ValueError(f"share: expected 0 to 1, got {share}")
    drawn = torch.rand(ids.shape[0], M, generator=generator).to(ids.device) < share
    masked = ids.clone()
    masked[:, :M] = torch.where(drawn, mask_id, ids[:, :M])
    return masked, torch.where(drawn, ids[:, :M], IGNORE)


def jrt_loss(
    logits: Float[Tensor, "B L vocab"],
    targets: Int[Tensor, "B L"],
    hidden: Int[Tensor, "B M"],
    *,
    weight: float = 0.25,
) -> Float[Tensor, ""]:
    """Next-token loss of what is said from position M on, plus ``weight`` times the masked loss.

    Args:
        logits: of the model that read the ids of `mask_prefix`.
        targets: the next id at each position, `IGNORE` where none is scored.
        hidden: of `mask_prefix`. Inside the prefix the next token is no riddle (it has been seen),
            so what is learnt there is to name the masked ones.

    A part without anything to score counts 0.
    """
    M = hidden.shape[1]
    if logits.dim() != 3 or targets.shape != logits.shape[:2] or not 0 <= M <= logits.shape[1]:
        shapes = [tuple(x.shape) for x in (logits, targets, hidden)]
        raise ValueError(
            f"logits, targets, hidden: expected (B, L, vocab), (B, L), (B, M), got {shapes}"
        )
    return _mean_loss(logits[:, M:], targets[:, M:]) + weight * _mean_loss(logits[:, :M], hidden)


def _mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    scored = targets != IGNORE
    if not scored.any():
        return logits.sum() * 0
    return F.cross_entropy(logits[scored], targets[scored])
