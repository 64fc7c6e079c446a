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
