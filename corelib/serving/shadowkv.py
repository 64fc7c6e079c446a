"""ShadowKV: low-rank keys on the device, values on the host (arXiv 2410.21465).

Idea: before RoPE the keys of a prompt have low rank, after it they do not. So keep the factors of
the unrotated keys on the device, move the values to the host, and for each new token rebuild the
keys, and fetch the values, of the few chunks that its query selects.

    left @ right[g]  ~=  unrotated keys         from an SVD of all heads side by side
    landmark_p        =  mean of the rotated keys of chunk p
    score_p           =  max over the group's heads of softmax_p(q . landmark_p * D ** -0.5)
    key_j             =  RoPE(left[j] @ right[g], j)         for the tokens j of selected chunks

Attention then runs over the selected chunks, the outlier chunks, the end of the prompt and what was
generated. Outliers are the chunks whose least cosine between a key and the landmark is lowest: a
mean says little about them.

| here            | paper                 | what                                                   |
|:----------------|:----------------------|:-------------------------------------------------------|
| left            | A = U                 | ``(B, S, R)``, shared by the heads                     |
| right           | B = Sigma V^T         | ``(B, G, R, D)``                                       |
| landmarks       | L                     | ``(B, G, P, D)``, without those of the outliers        |
| rank            | r, 160 of 1,024       | ``R``                                                  |
| chunk, budget   | chunk size, K         | 8 tokens; 2,048 selected tokens                        |
| outliers, local | 48 outliers, 4 chunks | kept exact on the device; local also has the remainder |

Exact: with ``rank`` the rank of the unrotated keys and ``budget`` all chunks it is full attention.
Approximate: everything else; what is not selected is not seen at all. As in the released code, what
the last step selected stays on the device and only what is new is rebuilt and fetched. Different:
only the tokens that may have to be rebuilt are factored, not the exact end of the prompt; fetching
and rebuilding do not overlap. The contract hands a cache *rotated* keys: they are rotated back to
be factored, which is exact, as RoPE is orthogonal. Left out: prompts of several turns (what follows
the first prompt stays exact on the device), fused selection kernels.
Cost: a long prompt holds ``R + G D / chunk`` numbers a token on the device, not ``2 G D``. A step
reads the landmarks, rebuilds and fetches at most ``budget`` tokens, so that ``budget G D`` numbers
at most cross between the tiers whatever the length; once, the SVD is ``S (G D)^2`` work.
Oracle: full attention; compare ``ShadowKVCache`` in ``models/kv_cache.py`` of bytedance/ShadowKV.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from corelib.primitives import rope_half_split

from .low_rank import KeyFactors, factor_keys, rebuild_keys  # noqa: F401  (for users)
from .prompt_cache import PromptCache
from .shadow_prompt import (  # noqa: F401
    Frequencies,
    Ids,
    ShadowPrompt,
    landmarks_and_outliers,
)
from .shared import TierMeter

# --- the reference --------------------------------------------------------------------------------


def shadowkv_reference(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    frequencies: Frequencies,
    *,
    prompt: int,
    rank: int = 160,
    budget: int = 2048,
    chunk: int = 8,
    outliers: int = 48,
    local: int = 4,
    scale: float | None = None,
) -> Float[Tensor, "B H L V"]:
    """One decode step, head by head, from all rotated keys: the first ``prompt`` are the prompt."""
    (B, H, L, D), (G, S) = q.shape, k.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    far = max(prompt // chunk - local, 0) * chunk
    places = torch.arange(S, device=k.device)
    unrotated = rope_half_split(k[:, :, :far], -places[:far], frequencies)
    out = q.new_zeros(B, H, L, v.shape[3])
    for b in range(B):
        u, s, vt = torch.linalg.svd(unrotated[b].transpose(0, 1).flatten(1), full_matrices=False)
        low = ((u[:, :rank] * s[:rank]) @ vt[:rank]).unflatten(1, (G, D)).transpose(0, 1)
        rebuilt = rope_half_split(low[None], places[:far], frequencies)[0]
        for g in range(G):
            heads = slice(g * (H // G), (g + 1) * (H // G))
            exact, chosen = _choose(q[b, heads], k[b, g, :far], budget, chunk, outliers, scale)
            keys = k[b, g].clone()
            keys[:far][chosen] = rebuilt[g][chosen]
            seen = torch.cat([exact | chosen, exact.new_ones(S - far)])
            visible = seen & (places <= S - L + places[:L, None])
            scores = (q[b, heads] @ keys.T * scale).masked_fill(~visible, -torch.inf)
            out[b, heads] = scores.softmax(-1) @ v[b, g]
    return out


def _choose(q: Tensor, k: Tensor, budget: int, chunk: int, outliers: int, scale: float):
    """For one key head: which tokens are kept exact, and which are selected."""
    chunks = k.unflatten(0, (-1, chunk))
    means = chunks.mean(1)
    cosine = F.cosine_similarity(chunks, means[:, None], dim=-1).amin(1)
    kept = torch.zeros(len(means), dtype=torch.bool, device=k.device)
    kept[cosine.argsort()[:outliers]] = True
    shares = (q @ means[~kept].T * scale).softmax(-1).sum(1).amax(0)
    best = shares.argsort(descending=True)[: budget // chunk]
    chosen = torch.zeros_like(kept)
    chosen[(~kept).nonzero()[best, 0]] = True
    return kept.repeat_interleave(chunk), chosen.repeat_interleave(chunk)


# --- the cache ------------------------------------------------------------------------------------


class ShadowKVCache(PromptCache):
    """A cache for any model with rotary positions (`corelib.contracts.KVCache`).

    Args:
        frequencies: ``(D / 2,)`` radians per position, those of the model (`rope_half_split`).
        rank: of the key factors; all heads' keys of a token side by side have ``G * D`` channels.
        budget: tokens to select for each key/value head, a multiple of ``chunk``.
        chunk: tokens in a chunk.
        outliers: chunks for each key/value head that are kept exact.
        local: chunks at the end of the prompt that are kept exact, with the remainder.
        meter: counts what crosses between the tiers; a new one by default.

    Prompts that end before there is a chunk to pack stay as they are.
    """

    def __init__(
        self,
        frequencies: Frequencies,
        *,
        rank: int = 160,
        budget: int = 2048,
        chunk: int = 8,
        outliers: int = 48,
        local: int = 4,
        meter: TierMeter | None = None,
    ):
        super().__init__()
        least = dict(rank=1, budget=0, chunk=1, outliers=0, local=0)
        given = dict(rank=rank, budget=budget, chunk=chunk, outliers=outliers, local=local)
        for name, value in given.items():
            if value < least[name]:
                raise ValueError(f"{name}: expected at least {least[name]}, got {value}")
        if budget % chunk:
            raise ValueError(f"budget: expected a multiple of chunk, {chunk}, got {budget}")
        self.frequencies, self.rank, self.budget, self.chunk = frequencies, rank, budget, chunk
        self.outliers, self.local = outliers, local
        self.meter = TierMeter() if meter is None else meter

    def pack(self, k: Tensor, v: Tensor, q: Tensor) -> ShadowPrompt | None:
        if k.shape[2] // self.chunk <= self.local:
            return None
        if 2 * self.frequencies.shape[0] != k.shape[3]:
            raise ValueError(
                f"frequencies: expected {k.shape[3] // 2} for keys {k.shape[3]} wide, "
                f"got {self.frequencies.shape[0]}"
            )
        names = ("rank", "budget", "chunk", "outliers", "local", "meter")
        settings = {name: getattr(self, name) for name in names}
        return ShadowPrompt(k, v, self.frequencies, **settings)

    def selected(self, layer: int) -> Ids:
        """The chunks of the prompt that the last step of ``layer`` selected, in no order."""
        prompt = self.layers[layer].prompt if layer in self.layers else None
        if prompt is None:
            raise ValueError(f"layer: expected one with a packed prompt, got {layer}")
        return prompt.held


# --- bytes, in closed form ------------------------------------------------------------------------


def held_bytes(
    length: int,
    *,
    G: int,
    D: int,
    rank: int = 160,
    budget: int = 2048,
    chunk: int = 8,
    outliers: int = 48,
    local: int = 4,
    itemsize: int = 2,
) -> tuple[int, int]:
    """``(device, host)``: what the packed prompt of one layer and request holds in each tier."""
    chunks = length // chunk - local
    slots = min(budget // chunk, chunks - outliers)
    exact = slots * chunk + outliers * chunk + length - chunks * chunk
    factors = (chunks * chunk + G * D) * rank
    numbers = G * D * (chunks - outliers) + factors + 2 * G * D * exact
    return numbers * itemsize + G * (chunks + slots) * 8, G * D * chunks * chunk * itemsize


def step_bytes(
    length: int, *, G: int, D: int, hit_rate: float = 0.0, itemsize: int = 2, **settings: int
) -> tuple[float, float]:
    """``(device, link)``: bytes that one step of one layer reads on the device, and fetches.

    On the device: the landmarks, the factors of what has to be rebuilt (and those keys, written and
    read), and all slots. ``hit_rate``: share of the selected chunks that were there already.
    """
    kept = dict(rank=160, budget=2048, chunk=8, outliers=48, local=4) | settings
    chunks = length // kept["chunk"] - kept["local"]
    slots = min(kept["budget"] // kept["chunk"], chunks - kept["outliers"])
    new = (1 - hit_rate) * slots * kept["chunk"]
    exact = (slots + kept["outliers"]) * kept["chunk"] + length - chunks * kept["chunk"]
    landmarks = G * D * (chunks - kept["outliers"])
    rebuilt = G * new * (kept["rank"] + D) + G * D * kept["rank"]
    return (landmarks + rebuilt + 2 * G * D * exact) * itemsize, G * D * new * itemsize


def example() -> dict:
    """A prompt of 70 tokens with two key heads, a query, and settings that leave out much.

    >>> q, k, v = (example()[name] for name in "qkv")
    >>> cache = ShadowKVCache(**example()["settings"])
    >>> cache.append(0, k[:, :, :-1], v[:, :, :-1])
    >>> _ = cache.attend(0, q.expand(-1, -1, 70, -1))
    >>> cache.append(0, k[:, :, -1:], v[:, :, -1:])
    >>> cache.attend(0, q).shape
    torch.Size([1, 4, 1, 16])
    >>> cache.selected(0).shape
    torch.Size([1, 2, 3])
    """
    from corelib.primitives import rope_frequencies

    generator = torch.Generator().manual_seed(0)
    shapes = (1, 4, 1, 16), (1, 2, 71, 16), (1, 2, 71, 16)
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    settings = dict(rank=8, budget=12, chunk=4, outliers=2, local=2)
    return dict(q=q, k=k, v=v, settings=dict(frequencies=rope_frequencies(16), **settings))
