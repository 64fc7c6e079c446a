"""How a vision-language model learns: many questions about one image in one pass, and its loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..data import digit_canvas as canvas
from .vlm import TinyVLM, VisionFeatures

GUIDED_LAYER = 2


class SideBySide:
    """A cache for training: questions that stand behind one image and do not see each other.

    ``visible (L, L)``: which keys a query may see. The scaled scores ``(B, H, L, L)`` of layer
    ``watch`` stay in ``scores``.
    """

    def __init__(self, visible: Tensor, watch: int | None = None):
        self.hidden = torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)
        self.watch = watch

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.held = (k, v)

    def attend(self, layer: int, q: Tensor, *, scale: float | None = None) -> Tensor:
        """The whole map: at a few hundred keys faster than tiles, forward and backward."""
        k, v = self.held
        B, H, L, D = q.shape
        G = k.shape[1]
        # The queries of all heads that share a key head are rows of one product.
        scale = D**-0.5 if scale is None else scale
        scores = (q * scale).reshape(B, G, H // G * L, D) @ k.transpose(-1, -2)
        scores = scores.view(B, H, L, -1) + self.hidden.to(scores.dtype)
        if layer == self.watch:
            self.scores = scores
        out = scores.softmax(-1).to(v.dtype).view(B, G, H // G * L, -1) @ v
        return out.view(B, H, L, D)


def side_by_side(first: int, groups: int, size: int) -> tuple[Tensor, Tensor]:
    """``(visible (L, L), positions (L,))`` for ``groups`` of ``size`` tokens behind the ``first``.

    Each group continues the first tokens as if it were alone.
    """
    L = first + groups * size
    group = torch.cat([torch.full((first,), -1), torch.arange(groups).repeat_interleave(size)])
    visible = torch.ones(L, L, dtype=torch.bool).tril()
    visible &= (group[None] == -1) | (group[None] == group[:, None])
    inside = torch.arange(size).repeat(groups) + first
    return visible, torch.cat([torch.arange(first), inside])


def text_room() -> int:
    """Tokens that a question and its answer take when they stand side by side with others."""
    return canvas.QUESTION_WORDS + canvas.ANSWER_WORDS - 1


class Read(NamedTuple):
    """``logits (B, Q, said, vocab)`` after each question and each word of its right answer.

    ``looks (B, Q, L)``: log-shares of attention, of one head, when the question ends.
    """

    logits: Float[Tensor, "B Q said vocab"]
    features: VisionFeatures
    looks: Float[Tensor, "B Q L"]


def read_answers(model: TinyVLM, images: Tensor, questions: canvas.Questions) -> Read:
    """All questions about each image at once, with their right answers to go on from."""
    B, Q, said = questions.answers.shape
    asked = questions.ids.shape[2]
    text = torch.cat([questions.ids, questions.answers[..., :-1]], 2)
    features = model.vision(images, SideBySide(torch.ones(1, 1, dtype=torch.bool)))
    start = model.embed(torch.full((B, 1), canvas.START))
    x = torch.cat([start, model.project(features), model.embed(text.flatten(1))], 1)
    first, size = 1 + model.config.vision_tokens, text.shape[2]
    visible, positions = side_by_side(first, Q, size)
    cache = SideBySide(visible, GUIDED_LAYER)
    x = model.read(x, positions, cache)[:, first:].unflatten(1, (Q, size))
    ends = first + size * torch.arange(Q) + asked - 1
    looks = cache.scores[:, 0, ends].float().log_softmax(-1)
    return Read(model.logits(x[:, :, -said:]), features, looks)


def answer_loss(
    model: TinyVLM,
    canvases: canvas.Canvases,
    questions: canvas.Questions,
    guidance: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean nats of the answers' words, and ``guidance`` times those of what would help.

    Guided are the encoder's two heads, and one head of layer `GUIDED_LAYER`, which at the end of a
    question is to look at the cells that the answer rests on.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = read_answers(model, canvases.images, questions)
        patches = model.vision.patch_head(found.features.patches).float()
        present = model.vision.summary_head(found.features.summary).float()
    nats = F.cross_entropy(
        found.logits.float().flatten(0, 2), questions.answers.flatten(), ignore_index=canvas.FILL
    )
    if not guidance:
        return nats
    labels = canvases.labels.flatten(1)
    classes = labels.masked_fill(labels < 0, 10)
    # Cells without a digit are many and easy: they count a tenth each.
    weight = torch.tensor([1.0] * 10 + [0.1])
    kinds = F.cross_entropy(patches.flatten(0, 1), classes.flatten(), weight)
    there = (labels[:, :, None] == torch.arange(10)).any(1).float()
    presence = F.binary_cross_entropy_with_logits(present, there)
    return nats + guidance * (kinds + presence + missed_evidence(found.looks, questions.evidence))


def missed_evidence(looks: Tensor, evidence: Tensor) -> Float[Tensor, ""]:
    """``-log`` of the attention that falls on the evidence, over the questions that have some."""
    cells = looks[..., 1 : 1 + evidence.shape[2]].masked_fill(~evidence, -torch.inf)
    return -cells[evidence.any(-1)].logsumexp(-1).mean()
