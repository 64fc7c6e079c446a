"""The masked-diffusion language model: the decoder's weights, taught to fill in what is hidden.

The net is `Decoder` without the causal mask. As in DiffuLLaMA (Gong et al., arXiv 2410.17891) and
Dream (arXiv 2508.15487) it begins with the weights of a trained autoregressive model and keeps its
shift: what stands at position ``i`` is read from the output at ``i - 1``, where that model has
always said it. Trained that way from `text_lm` it is ahead of the same net without the shift by
about one nat a token after 160,000 tokens. There is no input for the time: how many tokens are
hidden says it.

Half of the rows of text have all of their tokens in play, in half only an end of random length, as
it is when a prompt is continued; some rows are a stretch of text said again and again. The first
token of a row is always given.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..diffusion.shared import MaskedDiffusion, hide
from ..primitives import attention, merge_partials
from .cache import DenseCache
from .decoder import Decoder
from .mixture import text_rows, token_stream
from .recipes import Recipe
from .text_kinds import NATS_TO_BITS, TextKind, step_generator
from .tokenizer import load_tokenizer

SHORTEST = 16  # tokens in play in a row that continues a prompt


class TwoWayCache(DenseCache):
    """Keys and values that every query sees, the later ones too."""

    def attend(
        self, layer: int, q: Float[Tensor, "B H n D"], *, scale: float | None = None
    ) -> Float[Tensor, "B H n D"]:
        k, v = self.layers[layer]
        return attention(q, k, v, causal=False, scale=scale)


class DraftTree(DenseCache):
    """A cached prefix, and behind it ``copies`` of the same stretch that do not see each other.

    What `append` is given are the copies, one behind the other, in one row; each query sees the
    prefix and its own copy, an interval each: two dense attentions, merged. The prefix is read
    once for all copies. ``prefix`` is a cache, which stays as it is.
    """

    def __init__(self, prefix: DenseCache | None, copies: int):
        super().__init__()
        self.layers = dict(prefix.layers) if prefix is not None else {}
        self.start, self.copies = len(self), copies

    def attend(
        self, layer: int, q: Float[Tensor, "B H n D"], *, scale: float | None = None
    ) -> Float[Tensor, "B H n D"]:
        k, v = self.layers[layer]
        own = (self._apart(t) for t in (q, k[:, :, self.start :], v[:, :, self.start :]))
        out, lse = attention(*own, causal=False, scale=scale, return_lse=True)
        out, lse = self._in_a_row(out), self._in_a_row(lse)
        if not self.start:
            return out
        shared = (t[:, :, : self.start] for t in (k, v))
        before = attention(q, *shared, causal=False, scale=scale, return_lse=True)
        return merge_partials(*before, out, lse)[0]

    def _apart(self, t: Float[Tensor, "one H n D"]) -> Float[Tensor, "copies H length D"]:
        """A copy a row."""
        return t[0].unflatten(1, (self.copies, -1)).transpose(0, 1)

    def _in_a_row(self, t: Float[Tensor, "copies H *length"]) -> Float[Tensor, "one H *n"]:
        """The copies one behind the other again."""
        return t.transpose(0, 1).flatten(1, 2)[None]


def tree_mask(prefix: int, copies: int, length: int) -> Bool[Tensor, "1 1 L S"]:
    """What `DraftTree` lets see: ``[0, prefix)`` and the own copy of ``length`` positions."""
    copy = torch.arange(copies).repeat_interleave(length)
    own = copy[:, None] == copy
    return torch.cat([torch.ones(len(copy), prefix, dtype=torch.bool), own], 1)[None, None]


class MaskedDiffusionLM(Decoder):
    """``ids (B, L) -> logits (B, L, vocab)``: position ``i`` says which token stands at ``i``.

    Hidden tokens are given as ``<|mask|>``. Position 0 is never asked about: its logits are 0.
    With a cache (`new_cache`) ``ids`` continue what it holds, and again the first one is not said.
    """

    causal = False
    lookback = 1

    @staticmethod
    def new_cache() -> TwoWayCache:
        """An empty cache to decode with."""
        return TwoWayCache()

    def hidden(self, ids: Int[Tensor, "B L"], cache=None) -> Float[Tensor, "B L C"]:
        """What the last layer says of each position, read one position before it."""
        x = super().hidden(ids, cache)
        return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)

    def tree(
        self, ids: Int[Tensor, "D n"], prefix: DenseCache | None = None
    ) -> Float[Tensor, "D n vocab"]:
        """Logits of ``D`` drafts behind one prefix, in a single row instead of a batch."""
        D, n = ids.shape
        cache = DraftTree(prefix, D)
        positions = (cache.start + torch.arange(n, device=ids.device)).repeat(D)
        x = self.embed_tokens(ids.reshape(1, -1)) * self.config.width**0.5
        for number, block in enumerate(self.layers):
            x = block(x, positions, self.frequencies.to(ids.device), cache, number)
        x = self.norm(x).view(D, n, -1)
        x = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return x @ self.embed_tokens.weight.T


# --- training -------------------------------------------------------------------------------------


def diffusion_rows(
    stream: Int[Tensor, " N"],
    rows: int,
    length: int,
    generator: torch.Generator,
    *,
    repeats: float = 0.0,
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """Text and which of its tokens may be hidden; ``repeats``: the share said again and again."""
    ids = text_rows(stream, rows, length, generator).ids
    draw = torch.rand(rows, generator=generator)
    size = SHORTEST * (length / SHORTEST) ** torch.rand(rows, generator=generator)
    first = torch.where(draw < (1 + repeats) / 2, length - size.long().clamp(1, length - 1), 1)
    period = (length // 2 * torch.rand(rows, generator=generator)).long().clamp(min=4)
    place = torch.arange(length)
    again = draw < repeats
    source = torch.where(again[:, None], place % period[:, None], place)
    first = torch.where(again, torch.maximum(first, period), first)
    return ids.gather(1, source), place >= first[:, None]


class MaskedDiffusionKind(TextKind):
    """Filling in hidden tokens, from a few to all of them."""

    model = MaskedDiffusionLM
    unit = "bits per byte, a bound"
    data = TextKind.data + "; a fifth of the\n  rows say a stretch again (`masked_diffusion.py`)"
    limits = TextKind.limits + (
        " Bits per byte are an upper\n  bound, on stretches of 512 tokens whose first is given"
    )

    def batch(self, recipe: Recipe, step: int) -> tuple[Tensor, ...]:
        stage, generator = recipe.stage_at(step), step_generator(recipe, step)
        ids, free = diffusion_rows(
            token_stream("train"), stage.rows, stage.length, generator, repeats=0.2
        )
        noised = hide(ids, load_tokenizer().mask, generator, free=free)
        return noised.ids, ids, noised.weights

    def held_out(self, model) -> float:
        return bound_bits(model, token_stream("valid"), rows=32, length=256)

    def figures(self, model) -> dict[str, float]:
        """The bound beside what `text_lm` and an n-gram need for the same stretches; filling in."""
        from .diffusion_figures import diffusion_figures

        return diffusion_figures(model)


def text_windows(stream: Int[Tensor, " N"], rows: int, length: int) -> Int[Tensor, "B L"]:
    """Evenly spread stretches of ``stream``."""
    start = torch.linspace(0, len(stream) - length, rows).long()
    return stream[start[:, None] + torch.arange(length)]


@torch.no_grad()
def bound_bits(
    model, stream: Int[Tensor, " N"], *, rows: int = 64, length: int = 512, draws: int = 1
) -> float:
    """The bound in bits per byte on ``rows`` stretches of ``stream``, each hidden ``draws`` times.

    The first token of a stretch is given and its bytes do not count.
    """
    tokenizer, generator = load_tokenizer(), torch.Generator().manual_seed(0)
    ids = text_windows(stream, rows, length)
    diffusion = MaskedDiffusion(model, tokenizer.mask)
    nats = 0.0
    for part in ids.split(16):
        free = (torch.arange(length) > 0).expand(part.shape)
        for _ in range(draws):
            nats += len(part) / rows / draws * float(diffusion.loss(part, generator, free=free))
    tokens = rows * (length - 1)
    return nats * NATS_TO_BITS * tokens / tokenizer.bytes_of(ids[:, 1:])
