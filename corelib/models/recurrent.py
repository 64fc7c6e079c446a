"""The recurrent language models that the labs use: Mamba and Mamba-2, named as transformers does.

Each layer is ``x + mixer(norm(x))``, without an MLP. What stands in place of a KV cache is one
state a layer, as large after a million tokens as after one.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..state_space.mamba import MambaBlock
from ..state_space.mamba2 import Mamba2Block
from .layers import RMSNorm


@dataclasses.dataclass(frozen=True)
class RecurrentConfig:
    """Sizes. The output matrix is the embedding matrix (tied).

    ``embedding_scale``: what embeddings are multiplied by before the first layer. Published models
    have 1; the ones trained here have ``width ** 0.5``, as `corelib.models.decoder` explains.
    """

    mixer: str  # "mamba" or "mamba2"
    vocab: int = 2048
    width: int = 256  # C
    layers: int = 8
    state: int = 16  # N
    expand: int = 2
    conv: int = 4
    head_width: int = 64  # V, of Mamba-2
    groups: int = 1  # G, of Mamba-2
    context: int = 2048  # the longest sequence trained on
    embedding_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.mixer not in ("mamba", "mamba2"):
            raise ValueError(f"mixer: expected 'mamba' or 'mamba2', got {self.mixer!r}")

    def make_mixer(self) -> nn.Module:
        """One layer's sequence mixer."""
        sizes = dict(state=self.state, expand=self.expand, conv=self.conv)
        if self.mixer == "mamba":
            return MambaBlock(self.width, **sizes)
        return Mamba2Block(self.width, **sizes, head_width=self.head_width, groups=self.groups)


class StateCache:
    """The state of every layer, in place of keys and values. ``len``: tokens seen.

    A state cannot be taken apart again: there is no `crop` and no `realign`.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, ...]] = {}
        self.seen = 0

    def gather_rows(self, rows: Int[Tensor, " R"]) -> None:
        """Keep these batch rows, in this order (rows may repeat)."""
        for n, state in self.layers.items():
            self.layers[n] = type(state)(*(part[rows] for part in state))

    def crop(self, length: int) -> None:
        """Only to the present length; raises ValueError for any other."""
        if length != self.seen:
            raise ValueError(
                f"length: a recurrent state cannot go back; expected {self.seen}, got {length}"
            )

    def bytes(self, tier: str = "device") -> int:
        """Bytes of all states; nothing is ever on the host."""
        if tier not in ("device", "host"):
            raise ValueError(f"tier: expected 'device' or 'host', got {tier!r}")
        held = sum(t.numel() * t.element_size() for state in self.layers.values() for t in state)
        return held if tier == "device" else 0

    def __len__(self) -> int:
        return self.seen


class Layer(nn.Module):
    """``x + mixer(norm(x))``."""

    def __init__(self, config: RecurrentConfig):
        super().__init__()
        self.norm, self.mixer = RMSNorm(config.width), config.make_mixer()

    def forward(self, x: Float[Tensor, "B L C"], state) -> tuple[Float[Tensor, "B L C"], tuple]:
        y, state = self.mixer(self.norm(x), state)
        return x + y, state


class RecurrentLM(nn.Module):
    """``ids (B, L) -> logits (B, L, vocab)``; with a `StateCache`, ``ids`` continue what it saw.

    Checked against transformers' ``MambaForCausalLM`` and ``Mamba2ForCausalLM``.
    """

    def __init__(self, config: RecurrentConfig, seed: int | None = 0):
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0 if seed is None else seed)
            self.embed_tokens = nn.Embedding(config.vocab, config.width)
            nn.init.normal_(self.embed_tokens.weight, std=0.5 * config.width**-0.5)
            self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width)

    @property
    def dtype(self) -> torch.dtype:
        return self.embed_tokens.weight.dtype

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def hidden(
        self, ids: Int[Tensor, "B L"], cache: StateCache | None = None
    ) -> Float[Tensor, "B L C"]:
        """What the last layer says, after the final norm: the input of the output matrix."""
        x = self.embed_tokens(ids) * self.config.embedding_scale
        for n, layer in enumerate(self.layers):
            x, state = layer(x, None if cache is None else cache.layers.get(n))
            if cache is not None:
                cache.layers[n] = state
        if cache is not None:
            cache.seen += ids.shape[1]
        return self.norm(x)

    def forward(
        self, ids: Int[Tensor, "B L"], cache: StateCache | None = None
    ) -> Float[Tensor, "B L vocab"]:
        if ids.dim() != 2:
            raise ValueError(f"ids: expected (B, L), got {tuple(ids.shape)}")
        return self.hidden(ids, cache) @ self.embed_tokens.weight.T


def from_transformers_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A ``state_dict`` of transformers' (tied) Mamba or Mamba-2, with our names."""
    renamed = {}
    for name, value in weights.items():
        if name == "lm_head.weight":  # the embedding, once more
            continue
        name = name.removeprefix("backbone.")
        name = name.replace("embeddings.", "embed_tokens.").replace("norm_f.", "norm.")
        renamed[name] = value
    return renamed
