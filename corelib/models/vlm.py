"""A tiny vision-language model: patches, a small encoder, a projector and the lab's decoder.

Read like a LLaVA: the canvas is cut into patches, an encoder that looks in all directions turns
them into features, a projector turns features into *vision tokens*, and the decoder reads

    <start>  vision tokens, row by row  question  answer

with rotary positions 0, 1, 2, … along this line. A vision token also carries the embeddings of the
words of its row and column, so that "r3" in a question and the third row of the canvas have
something in common; without that, a thousand steps do not teach where a cell is.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..data import digit_canvas as canvas
from .decoder import Decoder, DecoderConfig
from .layers import Block, RMSNorm

GUIDED_LAYER = 2


@dataclasses.dataclass(frozen=True)
class VLMConfig(DecoderConfig):
    """Sizes of the decoder, and of the encoder: a patch is a cell of the canvas."""

    vocab: int = 64
    width: int = 96
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 32
    hidden: int = 256
    context: int = 160
    qkv_bias: bool = True
    rows: int = 12
    columns: int = 12
    patch: int = canvas.CELL  # pixels on a side
    vision_width: int = 64
    vision_layers: int = 2
    vision_heads: int = 4

    @property
    def vision_tokens(self) -> int:
        return self.rows * self.columns


class VisionFeatures(NamedTuple):
    """``patches (B, N, W)`` in the order of reading and ``summary (B, W)``, the class token's."""

    patches: Float[Tensor, "B N W"]
    summary: Float[Tensor, "B W"]


class VisionEncoder(nn.Module):
    """Patches and a class token, in blocks that look in all directions; no positions.

    ``patch_head`` and ``summary_head`` say what is in a patch and which digits there are: what an
    encoder that was trained beforehand would know. They are used in training only.
    """

    def __init__(self, config: VLMConfig):
        super().__init__()
        W, heads = config.vision_width, config.vision_heads
        self.patch = config.patch
        self.first = nn.Linear(config.patch**2, 3 * W)
        self.second = nn.Linear(3 * W, W)
        self.summary = nn.Parameter(torch.zeros(W))
        self.layers = nn.ModuleList(
            Block(W, heads, heads, W // heads, 2 * W, causal=False)
            for _ in range(config.vision_layers)
        )
        self.norm = RMSNorm(W)
        self.patch_head = nn.Linear(W, 11)
        self.summary_head = nn.Linear(W, 10)

    def forward(self, images: Float[Tensor, "B height width"], cache=None) -> VisionFeatures:
        """``cache``: sees the queries and keys of each block, as a decoder's would."""
        cells = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        x = self.second(F.gelu(self.first(cells.flatten(3).flatten(1, 2))))
        x = torch.cat([self.summary.to(x.dtype).expand(len(x), 1, -1), x], 1)
        positions = torch.arange(x.shape[1], device=x.device)
        none = torch.zeros(0, dtype=torch.float64)  # no pair of channels turns
        for n, block in enumerate(self.layers):
            x = block(x, positions, none, cache, n)
        x = self.norm(x)
        return VisionFeatures(x[:, 1:], x[:, 0])


class TinyVLM(Decoder):
    """``ids (B, L), images (B, height, width) -> logits (B, N + L, vocab)``; also a plain decoder.

    With ``images``, their N vision tokens stand behind the first id (``<start>``).
    """

    def __init__(self, config: VLMConfig, seed: int | None = 0):
        super().__init__(config, seed)
        c, W = config, config.vision_width
        self.vision = VisionEncoder(c)
        self.projector = nn.Sequential(
            nn.Linear(W, c.width), nn.GELU(), nn.Linear(c.width, c.width), RMSNorm(c.width)
        )
        if seed is not None:
            self._initialise_vision(torch.Generator().manual_seed(seed + 1))
        rows, columns = (
            torch.stack([canvas.to_ids(f"{axis}{n + 1}")[0] for n in range(count)])
            for axis, count in (("r", c.rows), ("c", c.columns))
        )
        self.row_words = rows.repeat_interleave(c.columns)
        self.column_words = columns.repeat(c.rows)

    @torch.no_grad()
    def _initialise_vision(self, generator: torch.Generator) -> None:
        for module in (self.vision, self.projector):
            for parameter in module.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)

    def embed(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L C"]:
        """The words as the first block reads them."""
        return self.embed_tokens(ids) * self.config.width**0.5

    def project(self, features: VisionFeatures) -> Float[Tensor, "B N C"]:
        """Vision tokens of the encoder's features."""
        place = self.embed(self.row_words[None]) + self.embed(self.column_words[None])
        return self.projector(features.patches) + place

    def see(self, images: Float[Tensor, "B height width"]) -> Float[Tensor, "B N C"]:
        """The vision tokens of ``images``."""
        c = self.config
        if tuple(images.shape[1:]) != (c.rows * c.patch, c.columns * c.patch):
            raise ValueError(
                f"images: expected (B, {c.rows * c.patch}, {c.columns * c.patch}), "
                f"got {tuple(images.shape)}"
            )
        return self.project(self.vision(images))

    def prompt(
        self, images: Float[Tensor, "B height width"], ids: Int[Tensor, "B L"]
    ) -> Float[Tensor, "B M C"]:
        """``ids`` with the vision tokens behind the first: the input of the first block."""
        x = self.embed(ids)
        return torch.cat([x[:, :1], self.see(images), x[:, 1:]], 1)

    def read(
        self, x: Float[Tensor, "B L C"], positions: Tensor, cache=None
    ) -> Float[Tensor, "B L C"]:
        """What the last block makes of ``x``, normalised. ``positions``: ``(L,)`` or ``(B, L)``."""
        for n, block in enumerate(self.layers):
            x = block(x, positions, self.frequencies, cache, n)
        return self.norm(x)

    def logits(self, x: Float[Tensor, "*rows C"]) -> Float[Tensor, "*rows vocab"]:
        """From what the last block said."""
        return x @ self.embed_tokens.weight.T

    def forward(
        self, ids: Int[Tensor, "B L"], cache=None, images: Float[Tensor, "B h w"] | None = None
    ) -> Float[Tensor, "B M vocab"]:
        if images is None:
            return super().forward(ids, cache)
        x = self.prompt(images, ids)
        start = 0 if cache is None else len(cache)
        return self.logits(self.read(x, torch.arange(start, start + x.shape[1]), cache))


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
