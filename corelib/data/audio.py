"""Raw sound for small models: mu-law codes, and melodies whose recipe is known to the last sample.

>>> x = synth_music(8000, generator=torch.Generator().manual_seed(0))
>>> codes = mu_law_encode(x)
>>> bool((mu_law_decode(codes) - x).abs().max() < 0.02)
True
"""

from __future__ import annotations

import io
import math
import wave

import torch
from jaxtyping import Float, Int
from torch import Tensor

LOWEST = 220.0  # Hz
SCALE = (0, 3, 5, 7, 10)  # semitones above it: a pentatonic scale, two octaves of it
DEGREES = 2 * len(SCALE)
BAR = 4  # notes; every bar is played twice
HARMONICS = (1.0, 0.5, 0.25)
DECAY, ATTACK = 0.1, 0.004  # seconds
NOISE = 0.004


def mu_law_encode(x: Float[Tensor, "*batch"], levels: int = 256) -> Int[Tensor, "*batch"]:
    """Sound in -1 .. 1 as ``levels`` codes, finer where it is quiet (ITU-T G.711, continuous).

    ``f(x) = sign(x) log(1 + mu |x|) / log(1 + mu)`` with ``mu = levels - 1``, rounded to the
    nearest of ``levels`` evenly spaced values.
    """
    mu = _mu(levels)
    if not bool((x.abs() <= 1).all()):
        raise ValueError(f"x: expected values in -1 .. 1, got up to {x.abs().max().item():.4g}")
    f = x.sign() * torch.log1p(mu * x.abs()) / math.log1p(mu)
    return ((f + 1) / 2 * mu + 0.5).floor().long()


def mu_law_decode(codes: Int[Tensor, "*batch"], levels: int = 256) -> Float[Tensor, "*batch"]:
    """The sound in -1 .. 1 that each code stands for."""
    mu = _mu(levels)
    if codes.numel() and not 0 <= codes.min() <= codes.max() <= mu:
        got = f"{codes.min().item()} .. {codes.max().item()}"
        raise ValueError(f"codes: expected 0 .. {mu}, got {got}")
    f = 2 * codes.to(torch.get_default_dtype()) / mu - 1
    return (f.sign() * torch.expm1(f.abs() * math.log1p(mu)) / mu).clamp(-1, 1)


def synth_music(
    n: int, sr: int = 4000, *, generator: torch.Generator, beat: float = 0.125
) -> Float[Tensor, " n"]:
    """``n`` samples, at ``sr`` a second, of one voice playing short notes.

    The recipe: the melody walks over ten pentatonic degrees from `LOWEST`, each step one or two up
    or down (reflected at both ends), from a random start; each `BAR` of four notes is played twice.
    A note lasts ``beat`` seconds and is a sum of `HARMONICS` (those below half of ``sr``), all
    beginning at phase 0, times a straight attack and an exponential decay. Half of the sum, and
    `NOISE` times white noise.
    """
    if n < 1 or sr < 4 * LOWEST:
        raise ValueError(f"n, sr: expected n >= 1 and sr >= {4 * LOWEST:g}, got {n} and {sr}")
    samples = round(beat * sr)
    if samples < 1:
        raise ValueError(f"beat: expected at least one sample, {1 / sr:g} s, got {beat}")
    t = torch.arange(n)
    notes = frequencies(-(-n // samples), generator)[t // samples].double()
    time = (t % samples).double() / sr
    tone = sum(
        size * torch.sin(2 * math.pi * k * notes * time) * (k * notes < sr / 2)
        for k, size in enumerate(HARMONICS, 1)
    )
    envelope = (time / ATTACK).clamp(max=1) * torch.exp(-time / DECAY)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    x = 0.5 * tone * envelope + NOISE * noise
    return x.clamp(-1, 1).to(torch.get_default_dtype())


def frequencies(count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
    """The melody of `synth_music`: the fundamental of each note in Hz."""
    bars = -(-count // (2 * BAR))
    steps = torch.tensor([-2, -1, 1, 2])[torch.randint(4, (bars * BAR,), generator=generator)]
    start = torch.randint(DEGREES, (), generator=generator)
    last = DEGREES - 1
    degree = last - ((start + steps.cumsum(0)) % (2 * last) - last).abs()  # reflected
    degree = degree.view(bars, BAR).repeat(1, 2).flatten()[:count]
    semitones = 12 * (degree // len(SCALE)) + torch.tensor(SCALE)[degree % len(SCALE)]
    return LOWEST * 2 ** (semitones / 12)


def wav_bytes(x: Float[Tensor, " n"], sr: int) -> bytes:
    """A WAV file, one channel of 8 bits; what lies outside of -1 .. 1 is cut off."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(1)
        out.setframerate(sr)
        out.writeframes((x.nan_to_num(0.0).clamp(-1, 1) * 127 + 128).byte().numpy().tobytes())
    return file.getvalue()


def _mu(levels: int) -> int:
    if levels < 2:
        raise ValueError(f"levels: expected at least 2, got {levels}")
    return levels - 1
