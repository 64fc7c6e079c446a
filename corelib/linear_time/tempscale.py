"""TempScale: why long texts look alike to an encoder, and a temperature against it (2410.24200).

Idea: a row of softmax attention is an average, and averages smooth. Split the tokens' vectors into
their mean over the text (the constant part, "DC") and the rest ("AC"), ``X = mean(X) + H X`` with
``H = I - 1 1^T / n``. Attention ``A`` keeps the constant part and shrinks the rest:

    H A 1 = 0,  so   |H A X| <= sigma |H X|,      sigma = largest singular value of H A  (theorem 1)

The more tokens, the flatter the rows and the smaller ``sigma``: after a few layers little is left
of a long text but one mean vector, which is much the same for all texts. TempScale makes the rows
sharper at inference, in every layer, without training:

    A = softmax(q k^T / (temperature sqrt(D)) + mask / temperature),   0 < temperature < 1

| here                  | paper                  | what                                          |
|:----------------------|:-----------------------|:----------------------------------------------|
| dc, ac                | DC[X], HC[X]           | (..., L, C) each, with sum X                  |
| filter_rate           | sigma_a                | of each map, 0 (only the mean) to about 1     |
| temperature           | tau                    | 1 changes nothing                             |

Exact: the split, the bound, and the temperature for any model whose scores are bilinear in its
queries: dividing a query by ``temperature`` divides its scores, and masked scores stay at minus
infinity. A learned bias on the scores (T5's) is divided too. Norms of queries (Qwen3) come first.
Left out: the paper's closed bound on ``sigma`` for given norms of the weights, and its 44 tasks.
Reconstruction: which temperature a model gets is not in the abstract; labs sweep it.
Cost: nothing beyond the model's own. Kernel: none; ``scaled_dot_product_attention`` stays.
Oracle: a transformers BERT with its query weights and biases divided by hand; singular values from
``torch.linalg``; T5's scores written out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

#: How models call the map from hidden states to queries, and what may come after it.
QUERIES = ("q_proj", "query", "q_lin", "q", "to_q", "Wq")
QUERY_NORMS = ("q_norm", "query_norm", "q_layernorm")
SCORE_BIASES = ("relative_attention_bias",)

Map = Float[Tensor, "*b L L"]
States = Float[Tensor, "*b L C"]


# --- what attention does to a text ----------------------------------------------------------------


def dc_ac_split(x: States) -> tuple[States, States]:
    """``x`` as its mean over the tokens, repeated, and the rest: ``(dc, ac)``, ``dc + ac = x``."""
    if x.shape[-2] < 1:
        raise ValueError(f"x: expected at least one token, got shape {tuple(x.shape)}")
    dc = x.mean(-2, keepdim=True).expand_as(x)
    return dc, x - dc


def filter_rate(attention: Map) -> Float[Tensor, "*b"]:
    """At most this share of the AC part survives each attention map: ``sigma(H A)``."""
    if attention.shape[-1] != attention.shape[-2]:
        raise ValueError(f"attention: expected (..., L, L), got {tuple(attention.shape)}")
    return torch.linalg.matrix_norm(dc_ac_split(attention)[1], ord=2)


def ac_share(x: States) -> Float[Tensor, "*b"]:
    """Share of the energy of ``x`` that is not its mean: 0 when all tokens are alike."""
    _, ac = dc_ac_split(x)
    return ac.square().sum((-1, -2)) / x.square().sum((-1, -2)).clamp_min(1e-30)


def random_attention(
    length: int, temperature: float, generator: torch.Generator, count: int = 1
) -> Float[Tensor, "count L L"]:
    """Maps of independent normal scores: what length and temperature do of themselves."""
    _check_temperature(temperature)
    scores = torch.randn(count, length, length, generator=generator, dtype=torch.float64)
    return (scores / temperature).softmax(-1)


# --- the method -----------------------------------------------------------------------------------


@contextlib.contextmanager
def apply_temperature(model: nn.Module, temperature: float) -> Iterator[nn.Module]:
    """Within the context every attention layer of ``model`` has this softmax temperature.

    Works for the lab's models and for transformers' whose queries have a module of their own
    (BERT, RoBERTa, MPNet, T5, LLaMA, Qwen and their kin), with any attention implementation.

    Raises:
        ValueError: the temperature is not positive, or no such queries are found (queries, keys
            and values from one fused map).
    """
    _check_temperature(temperature)
    places = list(_score_places(model))
    if not places:
        raise ValueError(
            f"model: expected attention with queries of their own (a module named one of {QUERIES}"
            f"), found none in {type(model).__name__}"
        )
    hooks = [m.register_forward_hook(lambda _, __, out: out / temperature) for m in places]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def _score_places(model: nn.Module) -> Iterator[nn.Module]:
    """The modules whose output enters the scores once, as a factor or as a term."""
    for module in model.modules():
        children = dict(module.named_children())
        norm = [children[name] for name in QUERY_NORMS if name in children]
        query = [children[name] for name in QUERIES if name in children]
        if query:
            yield (norm or query)[0]
        yield from (children[name] for name in SCORE_BIASES if name in children)


# --- what it does to embeddings -------------------------------------------------------------------


class TinyEmbedder(nn.Module):
    """``ids (B, L) -> (B, C)``: the mean of an encoder's last hidden states, at unit length.

    Args:
        encoder: has ``hidden(ids) -> (B, L, C)`` and ``config.width``.
        centre: subtracted from the mean before it is scaled, ``(C,)``; None subtracts nothing.
            All texts share a large part; without it even unrelated texts are nearly parallel.
    """

    def __init__(self, encoder: nn.Module, centre: Float[Tensor, " C"] | None = None):
        super().__init__()
        self.encoder, self.centre = encoder, centre

    def forward(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B C"]:
        pooled = self.encoder.hidden(ids).mean(1)
        if self.centre is not None:
            pooled = pooled - self.centre
        return nn.functional.normalize(pooled, dim=-1)


def mean_cosine(embeddings: Float[Tensor, "N C"]) -> float:
    """Mean cosine between different rows: 1 when all texts look alike.

    The rows' sum holds it: ``|sum of units|^2 = N + sum over pairs``; no ``(N, N)`` is written.
    """
    N = len(embeddings)
    if N < 2:
        raise ValueError(f"embeddings: expected at least two rows, got {N}")
    units = nn.functional.normalize(embeddings, dim=-1)
    return ((units.sum(0).square().sum() - units.square().sum()) / (N * (N - 1))).item()


@torch.no_grad()
def length_collapse_curve(
    embed: Callable[[Int[Tensor, "B L"]], Float[Tensor, "B C"]],
    ids: Int[Tensor, "N L"],
    lengths: Sequence[int],
    *,
    batch: int = 16,
) -> dict[int, float]:
    """`mean_cosine` of the same texts, cut after so many tokens: length -> mean cosine.

    Raises:
        ValueError: a length is not between 1 and ``L``.
    """
    for length in lengths:
        if not 1 <= length <= ids.shape[1]:
            raise ValueError(f"lengths: expected 1 to {ids.shape[1]}, got {length}")
    return {n: mean_cosine(embed_all(embed, ids[:, :n], batch)) for n in lengths}


def embed_all(
    embed: Callable[[Tensor], Tensor], ids: Int[Tensor, "N L"], batch: int = 16
) -> Float[Tensor, "N C"]:
    """``embed`` on rows of ``ids``, ``batch`` at a time."""
    return torch.cat([embed(rows) for rows in ids.split(batch)])


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
