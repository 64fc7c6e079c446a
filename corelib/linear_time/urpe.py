"""Your Transformer May Not be as Powerful as You Expect: URPE attention (arXiv 2205.13401).

Idea: a relative bias inside the softmax cannot tell positions apart when all tokens are equal: the
rows of weights sum to one, so every output is the same average of the same values, layer after
layer. A second Toeplitz matrix *outside* the softmax breaks the sum, and with it the limit.

    out_i = sum_j softmax_j(scale q_i . k_j + bias_(j - i)) * gain_(j - i) v_j

No renormalisation after the gain. ``gain = 1`` is attention with a relative bias (RPE). With
``gain`` alone, all scores equal, it is a convolution: ``out_i = mean_j gain_(j - i) v_j``.

| here   | paper      | what                                                                |
|:-------|:-----------|:--------------------------------------------------------------------|
| bias   | b, B       | (H, 2 n - 1), distance 0 in the middle, n at least the keys         |
| gain   | c, C       | (H, 2 n - 1), starts at one, of any sign                            |
| shared | r_l        | one bias and one gain for all layers: 2 (2 n - 1) H parameters      |

The negative theorem: for equal tokens ``A (1 x^T) = (A 1) x^T = 1 x^T`` for any weights A whose
rows sum to one, so no depth and no width helps (`URPEEncoder` with ``position="rpe"``; measured in
the tests and the lab). The positive theorem, universal approximation: the lab trains instead.

Exact. Cost: that of softmax attention with the square of weights written out, O(L^2). A gain that
is positive folds into the bias of an attention that also returns its log-sum-exp (in the tests).
Our choices, where the released code has others: a number for every distance (there usually 64
buckets, as in T5), norms before the layers (there after), positions counted from zero.
Oracle: the loop; ``scaled_dot_product_attention`` for ``gain = 1``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from corelib.primitives._checks import check_attention, check_same_kind
from corelib.primitives.toeplitz import toeplitz

Queries = Float[Tensor, "B H L D"]
Keys = Float[Tensor, "B G S D"]
Values = Float[Tensor, "B G S V"]
Out = Float[Tensor, "B H L V"]
Lags = Float[Tensor, "H T"]
POSITIONS = ("none", "absolute", "rpe", "urpe")


def urpe_attention_reference(
    q: Queries,
    k: Keys,
    v: Values,
    bias: Lags,
    gain: Lags,
    *,
    causal: bool,
    scale: float | None = None,
) -> Out:
    """Query by query, as the sums stand."""
    (_, H, L, D), (_, G, S, _) = q.shape, k.shape
    scale, out = D**-0.5 if scale is None else scale, v.new_zeros(*q.shape[:3], v.shape[3])
    for h in range(H):
        for i in range(L):
            position = i + S - L
            seen = torch.arange(position + 1 if causal else S)
            at, g = seen - position + bias.shape[1] // 2, h // (H // G)
            scores = scale * (k[:, g, seen] @ q[:, h, i, :, None])[..., 0] + bias[h, at]
            weights = scores.softmax(-1) * gain[h, at]
            out[:, h, i] = (weights[:, None] @ v[:, g, seen])[:, 0]
    return out


def urpe_weights(
    q: Queries, k: Keys, bias: Lags, gain: Lags, *, causal: bool, scale: float | None = None
) -> Float[Tensor, "B H L S"]:
    """What values are multiplied by: softmax with the bias, times the gain. Rows need not sum to 1.

    Raises as `urpe_attention`.
    """
    _check(q, k, k, bias, gain, scale)
    L, S = q.shape[2], k.shape[2]
    if L == 0:
        return q.new_zeros(*q.shape[:3], S)
    k = _repeat(k, q.shape[1])
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.mT
    scores = scores + toeplitz(bias, L, S)
    if causal:
        ahead = torch.ones(L, S, dtype=torch.bool, device=q.device).triu(S - L + 1)
        scores = scores.masked_fill(ahead, -torch.inf)
    empty = scores.amax(-1, keepdim=True) == -torch.inf
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    return weights * toeplitz(gain, L, S)


def urpe_attention(
    q: Queries,
    k: Keys,
    v: Values,
    bias: Lags,
    gain: Lags,
    *,
    causal: bool,
    scale: float | None = None,
) -> Out:
    """URPE attention; queries align with the last keys, query head h reads key head h // (H // G).

    Args:
        bias: added to the scores by head and distance; ``-inf`` hides a distance.
        gain: multiplies the weights after the softmax; of any sign.

    A row that may see nothing gives zeros. Raises ValueError or TypeError for shapes, dtypes or
    options that do not fit.
    """
    check_attention(q, k, v, None, 0, scale)
    weights = urpe_weights(q, k, bias, gain, causal=causal, scale=scale)
    return weights @ _repeat(v, q.shape[1])


class RelativeTables(nn.Module):
    """A bias, from zeros, and a gain, from ones, for heads and distances below ``max_len``."""

    def __init__(self, heads: int, max_len: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(heads, 2 * max_len - 1))
        self.gain = nn.Parameter(torch.ones(heads, 2 * max_len - 1))


class URPELayer(nn.Module):
    """A Transformer layer, norms first, whose attention takes its position tables from outside."""

    def __init__(self, C: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(C), nn.LayerNorm(C)])
        self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward(self, x: Float[Tensor, "B L C"], bias: Lags, gain: Lags) -> Float[Tensor, "B L C"]:
        parts = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1))
        mixed = urpe_attention(*parts.permute(2, 0, 3, 1, 4), bias, gain, causal=False)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class URPEEncoder(nn.Module):
    """A small encoder, ``ids (B, L) -> (B, L, outputs)``, that knows positions in one way.

    Args:
        vocab, outputs: ids in and classes out. C, heads, layers: sizes. max_len: longest input.
        position: ``"none"``; ``"absolute"``: an embedding of each position, added to the tokens;
            ``"rpe"``: a bias inside the softmax; ``"urpe"``: and a gain outside.
        shared: one pair of tables for all layers, as in the paper, or one for each.
    """

    def __init__(
        self,
        vocab: int,
        outputs: int,
        *,
        C: int,
        heads: int,
        layers: int,
        max_len: int,
        position: str = "urpe",
        shared: bool = True,
    ):
        super().__init__()
        if position not in POSITIONS:
            raise ValueError(f"position: expected one of {POSITIONS}, got {position!r}")
        if heads < 1 or C % heads:
            raise ValueError(f"heads: expected a divisor of C = {C}, got {heads}")
        self.tokens = nn.Embedding(vocab, C)
        self.places = nn.Embedding(max_len, C) if position == "absolute" else None
        self.layers = nn.ModuleList(URPELayer(C, heads) for _ in range(layers))
        pairs = 1 if shared else layers
        self.tables = nn.ModuleList(RelativeTables(heads, max_len) for _ in range(pairs))
        for table in self.tables:  # what this kind does not learn stays zero, or one
            table.bias.requires_grad_(position in ("rpe", "urpe"))
            table.gain.requires_grad_(position == "urpe")
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, outputs)

    def forward(self, ids: Int[Tensor, "B L"]) -> Float[Tensor, "B L outputs"]:
        """Scores of the classes at every position."""
        return self.head(self.norm(self.hidden(ids)[-1]))

    def hidden(self, ids: Int[Tensor, "B L"]) -> list[Float[Tensor, "B L C"]]:
        """The embeddings and what each layer makes of them."""
        x = self.tokens(ids)
        if self.places is not None:
            x = x + self.places.weight[: ids.shape[1]]
        states = [x]
        for number, layer in enumerate(self.layers):
            table = self.tables[number % len(self.tables)]
            states.append(layer(states[-1], table.bias, table.gain))
        return states


def spread(x: Float[Tensor, "B L C"]) -> float:
    """The largest difference between two positions of one sequence, over the largest entry."""
    return ((x.amax(1) - x.amin(1)).amax() / x.abs().amax()).item()


def example() -> dict:
    """Two heads, seven tokens, a bias that fades and a gain that changes sign.

    >>> urpe_attention(**example(), causal=False).shape
    torch.Size([1, 2, 7, 3])
    """
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 7, 4, generator=generator)
    v = torch.randn(1, 2, 7, 3, generator=generator)
    distance = torch.arange(-6.0, 7.0)
    bias = -distance.abs() * torch.tensor([[0.2], [1.0]])
    return dict(q=q, k=k, v=v, bias=bias, gain=torch.cos(bias + distance))


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _check(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, gain: Tensor, scale) -> None:
    check_attention(q, k, v, None, 0, scale)
    check_same_kind(q=q, bias=bias, gain=gain)
    if q.shape[2] > k.shape[2]:
        raise ValueError(f"q: expected at most k's {k.shape[2]} positions, got {q.shape[2]}")
    for name, table in (("bias", bias), ("gain", gain)):
        if table.dim() != 2 or len(table) != q.shape[1]:
            raise ValueError(
                f"{name}: expected shape ({q.shape[1]}, 2 n - 1), got {tuple(table.shape)}"
            )
