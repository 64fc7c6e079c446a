"""Denoising: parts of a sequence are hidden, or not yet read, and a model says what stands there.

The pretraining objectives of self-pretraining (arXiv 2310.02980, section 2; the recipe is in
`corelib.state_space.self_pretraining`). Losses count hidden positions only: cross-entropy of the
token, or for pixels the absolute difference of grey values (``loss="l1"``).

The encoder is any module with ``tokens`` (an embedding), ``positions (L, C)``, ``blocks``, ``norm``
and a ``read_out``; called on a `LabelledBatch` it returns logits.
`corelib.foundations.lra.Classifier` is one, for any sequence mixer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..data import IGNORE, LabelledBatch

Ids = Int[Tensor, "B L"]
OBJECTIVES, LOSSES = ("masked", "next"), ("cross_entropy", "l1")


class Masked(NamedTuple):
    """``ids`` with the mask's id at hidden positions; ``targets`` are `IGNORE` everywhere else."""

    ids: Ids
    targets: Ids
    hidden: Bool[Tensor, "B L"]


def mask_tokens(
    ids: Ids,
    p: float,
    generator: torch.Generator,
    *,
    mask: int,
    span: int = 1,
    lengths: Int[Tensor, " B"] | None = None,
) -> Masked:
    """Hide about a share ``p`` of the positions, in runs of ``span``, at least one a row.

    Args:
        mask: the id put in place of hidden ones, which must not occur in ``ids``.
        lengths: positions from there on are filling and never hidden.

    Raises ValueError for a ``p`` outside 0 to 1, or a ``mask`` that is an ordinary id.
    """
    check_share("p", p)
    if span < 1:
        raise ValueError(f"span: expected at least 1, got {span}")
    if (ids == mask).any():
        raise ValueError(f"mask: expected an id that ids do not hold, got {mask}")
    B, L = ids.shape
    lengths = torch.full((B,), L, device=ids.device) if lengths is None else lengths
    real = torch.arange(L, device=ids.device) < lengths[:, None]
    draws = torch.rand(B, L, generator=generator).to(ids.device)
    starts = draws < 1 - (1 - p) ** (1 / span)  # a position escapes `span` starts with 1 - p
    starts |= draws == draws.masked_fill(~real, 2.0).amin(1, keepdim=True)
    hidden = starts.clone()
    for later in range(1, span):
        hidden[:, later:] |= starts[:, : L - later]
    hidden &= real
    return Masked(ids.masked_fill(hidden, mask), ids.masked_fill(~hidden, IGNORE), hidden)


class SelfPretrainer(nn.Module):
    """An encoder with a head that says the token, or the grey value, of every position.

    Args:
        encoder: see the module; it is trained in place.
        objective: ``"masked"``, or ``"next"`` for mixers that do not look ahead.
        p, span: of `mask_tokens`.
        loss: ``"cross_entropy"``; or ``"l1"``: ids are grey values from 0 to ``vocab - 1``.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        objective: str = "masked",
        p: float = 0.5,
        span: int = 1,
        loss: str = "cross_entropy",
    ):
        super().__init__()
        for name, value, known in (
            ("objective", objective, OBJECTIVES),
            ("loss", loss, LOSSES),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected one of {known}, got {value!r}")
        check_share("p", p)
        self.encoder, self.objective, self.p, self.span, self.kind = (
            encoder,
            objective,
            p,
            span,
            loss,
        )
        self.vocab, width = encoder.tokens.weight.shape
        self.mask = nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, 1 if loss == "l1" else self.vocab)

    def forward(self, ids: Ids) -> Float[Tensor, "B L out"]:
        """What the head says at every position; the id ``vocab`` is the mask."""
        encoder = self.encoder
        table = torch.cat([encoder.tokens.weight, self.mask[None]])
        x = F.embedding(ids, table) + encoder.positions[: ids.shape[1]]
        for block in encoder.blocks:
            x = block(x)
        return self.head(encoder.norm(x))

    def task(self, batch: LabelledBatch, generator: torch.Generator) -> tuple[Ids, Ids]:
        """What to read and what to say, `IGNORE` where nothing is asked. Labels are not read."""
        ids, lengths = batch.ids, batch.lengths
        if self.objective == "masked":
            options = dict(mask=self.vocab, span=self.span, lengths=lengths)
            return mask_tokens(ids, self.p, generator, **options)[:2]
        following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], 1)
        filling = torch.arange(1, ids.shape[1] + 1, device=ids.device) >= lengths[:, None]
        return ids, following.masked_fill(filling, IGNORE)

    def score(self, said: Float[Tensor, "B L out"], targets: Ids) -> Float[Tensor, ""]:
        """The mean loss over the positions with a target."""
        if self.kind == "cross_entropy":
            return F.cross_entropy(said.mT, targets, ignore_index=IGNORE)
        asked = targets != IGNORE
        return (said[..., 0][asked] - targets[asked] / (self.vocab - 1)).abs().mean()


def check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name}: expected more than 0 and less than 1, got {value}")
