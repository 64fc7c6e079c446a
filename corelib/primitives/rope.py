"""Rotary position embedding (RoPE) at arbitrary positions, and its scaling modes.

Su et al., RoFormer, arXiv 2104.09864, section 3.2: channel pair ``n`` of a query or key at position
``p`` is turned by the angle ``p * f_n``, with ``f_n = base ** (-2n / D)``. Scores then depend on
the difference of positions only:

    (R_p q) . (R_r k) = q . (R_{r-p} k)

Two pairings are in use, equal up to an order of the channels, and silently wrong when mixed up:

* `rope_half_split` pairs channel ``n`` with ``n + D/2``: GPT-NeoX, Llama, Mistral, Qwen;
* `rope_interleaved` pairs channel ``2n`` with ``2n + 1``: RoFormer, GPT-J, PaLM.

Longer contexts than a model was trained on are reached by changing the frequencies. Each mode is a
function of its own that returns frequencies ``(D/2,)`` in radians per position:

* `linear_frequencies`: position interpolation, arXiv 2306.15595;
* `ntk_frequencies`, `dynamic_ntk_frequencies`: a larger base, which spares high frequencies;
* `yarn_frequencies` with `yarn_attention_factor`: arXiv 2309.00071;
* `llama3_frequencies`: Llama 3.1.

Rotating back is rotating to ``-positions``, and moving a cached key from ``p`` to ``r`` is rotating
it by ``r - p`` (with an attention factor, divide by it again). Frequencies and angles are float64:
an angle of a million radians in float32 is off by up to 0.03.

Oracle: ``transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS`` and the rotary functions of
transformers' Llama and GPT-J.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Frequencies = Float[Tensor, " pairs"]
# (L,), (B, L) or (B, H, L): one axis for each leading axis of x that positions differ along.
Positions = Float[Tensor, "*positions"] | Int[Tensor, "*positions"]


def rope_half_split(
    x: Float[Tensor, "B H L D"],
    positions: Positions,
    frequencies: Frequencies,
    *,
    attention_factor: float = 1.0,
) -> Float[Tensor, "B H L D"]:
    """Turn the pairs ``(n, n + D/2)``: the pairing of Llama and GPT-NeoX.

    positions: integers or floats, ``(L,)``, ``(B, L)`` or ``(B, H, L)``; differentiable if float.
    frequencies: ``(pairs,)`` radians per position. With fewer than ``D/2`` pairs, the first
        ``2 * pairs`` channels turn and the rest stay (partial rotary).
    attention_factor: multiplies what was turned (YaRN); scores grow by its square.
    """
    cos, sin = _cos_sin(x, positions, frequencies, attention_factor)
    pairs = frequencies.shape[0]
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat([*(half.to(x.dtype) for half in turned), rest], dim=-1)


def rope_interleaved(
    x: Float[Tensor, "B H L D"],
    positions: Positions,
    frequencies: Frequencies,
    *,
    attention_factor: float = 1.0,
) -> Float[Tensor, "B H L D"]:
    """Turn the pairs ``(2n, 2n + 1)``: the pairing of RoFormer and GPT-J.

    Arguments as for `rope_half_split`.
    """
    cos, sin = _cos_sin(x, positions, frequencies, attention_factor)
    pairs = frequencies.shape[0]
    first, second = x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([turned.flatten(-2).to(x.dtype), x[..., 2 * pairs :]], dim=-1)


def interleaved_to_half_split(x: Shaped[Tensor, "*axes D"]) -> Shaped[Tensor, "*axes D"]:
    """Reorder channels so that interleaved pairs become half-split ones.

    Applied to the output channels of the query and key projections, it turns a model of the one
    pairing into a model of the other.
    """
    _even(x.shape[-1])
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def half_split_to_interleaved(x: Shaped[Tensor, "*axes D"]) -> Shaped[Tensor, "*axes D"]:
    """The inverse of `interleaved_to_half_split`."""
    _even(x.shape[-1])
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def rope_frequencies(D: int, *, base: float = 10_000.0) -> Frequencies:
    """``base ** (-2n / D)`` for ``n = 0 .. D/2 - 1``: radians per position."""
    _even(D)
    _positive(base=base)
    return base ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)


def linear_frequencies(D: int, *, factor: float, base: float = 10_000.0) -> Frequencies:
    """Position interpolation (arXiv 2306.15595, eq. 4): all positions shrink by ``factor``."""
    _positive(factor=factor)
    return rope_frequencies(D, base=base) / factor


def ntk_frequencies(D: int, *, factor: float, base: float = 10_000.0) -> Frequencies:
    """NTK-aware: a base that leaves the highest frequency and divides the lowest by ``factor``.

    ``base * factor ** (D / (D - 2))``, from YaRN (arXiv 2309.00071, section 3.1).
    """
    _positive(factor=factor)
    if D == 2:
        raise ValueError("D: expected at least 4 (a single pair has no lowest frequency), got 2")
    return rope_frequencies(D, base=base * factor ** (D / (D - 2)))


def dynamic_ntk_frequencies(
    D: int, *, length: int, original_length: int, factor: float = 1.0, base: float = 10_000.0
) -> Frequencies:
    """NTK-aware with a factor that grows with the ``length`` at hand (transformers' ``dynamic``).

    Up to ``original_length`` nothing changes; beyond, the factor is
    ``factor * length / original_length - (factor - 1)``.
    """
    _positive(length=length, original_length=original_length, factor=factor)
    ratio = max(length, original_length) / original_length
    return ntk_frequencies(D, factor=factor * ratio - (factor - 1), base=base)


def yarn_frequencies(
    D: int,
    *,
    factor: float,
    original_length: int,
    base: float = 10_000.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Frequencies:
    """YaRN's "NTK by parts": pairs that turn often stay, pairs that turn seldom are interpolated.

    A pair that turns more than ``beta_fast`` times within ``original_length`` keeps its frequency,
    one that turns less than ``beta_slow`` times is divided by ``factor``. In between, the ramp is
    linear in the index of the pair with its ends rounded outwards, as in the released code; the
    paper (arXiv 2309.00071, eq. 18) writes it linear in the number of turns.
    """
    _positive(
        factor=factor, original_length=original_length, beta_fast=beta_fast, beta_slow=beta_slow
    )
    plain = rope_frequencies(D, base=base)

    def pair_turning(times: float) -> float:
        return D * math.log(original_length / (times * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_turning(beta_fast)), 0)
    high = min(math.ceil(pair_turning(beta_slow)), D - 1)
    ramp = (torch.arange(D // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)
    interpolated = ramp.clamp(0, 1)
    return plain * (1 - interpolated) + plain / factor * interpolated


def yarn_attention_factor(factor: float) -> float:
    """``0.1 * ln(factor) + 1`` (arXiv 2309.00071, eq. 22), for queries and keys alike."""
    _positive(factor=factor)
    return 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0


def llama3_frequencies(
    D: int,
    *,
    factor: float = 8.0,
    original_length: int = 8192,
    low_frequency_factor: float = 1.0,
    high_frequency_factor: float = 4.0,
    base: float = 500_000.0,
) -> Frequencies:
    """Llama 3.1: as YaRN, with a ramp in the number of turns within ``original_length``."""
    _positive(factor=factor, original_length=original_length)
    if not low_frequency_factor < high_frequency_factor:
        raise ValueError(
            "high_frequency_factor: expected more than low_frequency_factor, "
            f"{low_frequency_factor}, got {high_frequency_factor}"
        )
    plain = rope_frequencies(D, base=base)
    turns = original_length * plain / (2 * math.pi)
    ramp = (turns - low_frequency_factor) / (high_frequency_factor - low_frequency_factor)
    kept = ramp.clamp(0, 1)
    return plain * kept + plain / factor * (1 - kept)


def _cos_sin(
    x: Tensor, positions: Tensor, frequencies: Tensor, attention_factor: float
) -> tuple[Tensor, Tensor]:
    """``(..., L, pairs)`` in float32, or float64 for float64 inputs."""
    B, H, L, D = _four_axes(x)
    fitting = {1: (L,), 2: (B, L), 3: (B, H, L)}.get(positions.dim())
    if fitting is None or tuple(positions.shape) != fitting:
        raise ValueError(
            f"positions: expected shape {(L,)}, {(B, L)} or {(B, H, L)}, "
            f"got {tuple(positions.shape)}"
        )
    if frequencies.dim() != 1 or 2 * frequencies.shape[0] > D:
        raise ValueError(
            f"frequencies: expected at most {D // 2} numbers for width {D}, "
            f"got shape {tuple(frequencies.shape)}"
        )
    if positions.dim() == 2:
        positions = positions[:, None]
    positions, frequencies = (y.to(x.device, torch.float64) for y in (positions, frequencies))
    angles = positions[..., None] * frequencies
    wide = torch.promote_types(x.dtype, torch.float32)
    return tuple((f(angles) * attention_factor).to(wide) for f in (torch.cos, torch.sin))


def _four_axes(x: Tensor) -> tuple[int, int, int, int]:
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(
            f"x: expected floating point (batch, heads, length, width), got {x.dtype} "
            f"{tuple(x.shape)}"
        )
    return tuple(x.shape)


def _even(D: int) -> None:
    if D < 2 or D % 2:
        raise ValueError(f"D: expected an even width of at least 2, got {D}")


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}: expected more than 0, got {value}")
