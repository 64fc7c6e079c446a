"""The decoder language model that the labs use: a small LLaMA, named as Hugging Face names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..primitives import rope_frequencies
from .cache import DenseCache
from .layers import Block, RMSNorm


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes. The output matrix is the embedding matrix (tied), ``width ** -0.5`` as large.

    Without the factor the embeddings stayed small beside what the first block adds to them (0.09
    against 3.0, root mean square after 3 million tokens), and later layers could hardly read them.
    """

    vocab: int = 2048
    width: int = 256  # C
    layers: int = 4
    heads: int = 4  # H
    kv_heads: int = 2  # G
    head_width: int = 64  # D
    hidden: int = 704  # of the SwiGLU
    context: int = 2048  # the longest sequence trained on
    rope_theta: float = 10_000.0
    qkv_bias: bool = False  # as in Qwen2

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: expected a divisor of heads ({self.heads}), got {self.kv_heads}"
            )
        if self.head_width % 2:
            raise ValueError(f"head_width: expected an even number, got {self.head_width}")


class Decoder(nn.Module):
    """``ids (B, L) -> logits (B, L, vocab)``; with a cache, ``ids`` continue what it holds.

    Keeps `corelib.contracts.LanguageModel`. Checked against transformers' ``LlamaForCausalLM``
    with the same weights. ``frequencies (D/2,)``: radians per position of the rotary embedding.
    """

    causal = True

    def __init__(self, config: DecoderConfig, seed: int | None = 0):
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(
            Block(c.width, c.heads, c.kv_heads, c.head_width, c.hidden, self.causal, c.qkv_bias)
            for _ in range(c.layers)
        )
        self.norm = RMSNorm(c.width)
        # Replace them (`corelib.primitives.yarn_frequencies`, …) to stretch the context.
        self.frequencies = rope_frequencies(c.head_width, base=c.rope_theta)
        if seed is not None:  # None: weights will be loaded
            self._initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Normal, half of what keeps a unit input at unit size; biases that look a step back."""
        for parameter in self.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.5 * self.config.width**-0.5, generator=generator)
        for number, block in enumerate(self.layers if self.config.qkv_bias else ()):
            block.self_attn.look_back(self.frequencies, strength=3.0 * (number == 0))

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def hidden(self, ids: Int[Tensor, "B L"], cache=None) -> Float[Tensor, "B L C"]:
        """What the last layer says, after the final norm: the input of the output matrix."""
        start = 0 if cache is None else len(cache)
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        pads = getattr(cache, "pads", None)
        if pads is not None:
            positions = positions - pads[:, None]  # (B, L): row by row
        frequencies = self.frequencies.to(ids.device)
        x = self.embed_tokens(ids) * self.config.width**0.5
        for n, block in enumerate(self.layers):
            x = block(x, positions, frequencies, cache, n)
        return self.norm(x)

    def forward(self, ids: Int[Tensor, "B L"], cache=None) -> Float[Tensor, "B L vocab"]:
        if ids.dim() != 2:
            raise ValueError(f"ids: expected (B, L), got {tuple(ids.shape)}")
        return self.hidden(ids, cache) @ self.embed_tokens.weight.T


def greedy(probs: Float[Tensor, "*B vocab"]) -> Int[Tensor, "*B"]:
    """A chooser: the most likely id."""
    return probs.argmax(-1)


def sampler(seed: int) -> Callable[[Tensor], Tensor]:
    """A chooser that samples, the same way each time for one seed."""
    generator = torch.Generator().manual_seed(seed)

    def choose(probs: Tensor) -> Tensor:
        flat = torch.multinomial(probs.reshape(-1, probs.shape[-1]), 1, generator=generator)
        return flat.reshape(probs.shape[:-1])

    return choose


@torch.no_grad()
def generate(
    model: Callable[..., Tensor],
    ids: Int[Tensor, "B L"],
    new: int,
    *,
    chooser: Callable[[Tensor], Tensor] = greedy,
    temperature: float = 1.0,
    cache=None,
) -> Int[Tensor, "B LN"]:
    """``ids`` and ``new`` more, one at a time through the cache, each picked by ``chooser``."""
    if temperature <= 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if ids.shape[1] < 1:
        raise ValueError("ids: expected at least one token to continue")
    cache = DenseCache() if cache is None else cache
    feed = ids
    for _ in range(new):
        logits = model(feed, cache)[:, -1].float()
        feed = chooser((logits / temperature).softmax(-1))[:, None]
        ids = torch.cat([ids, feed], 1)
    return ids
