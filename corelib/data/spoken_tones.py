"""Spoken tones: words made of gliding tones, as sound and as the band energies that models read.

A stand-in for recorded keywords, small, made from a seed, and with a known answer at every moment.
A word is three different syllables, and the order is all that tells words of the same ones apart.
Out of three syllables that makes six words: the first syllable leaves two of them, the second one.
Out of four it makes 24, and two are left until the third begins.

The recipe, at 4,000 samples a second:

* a syllable is two tones at once (its formants), each gliding in a straight line from one frequency
  to another (`SYLLABLES`, in hertz), under a Hann window;
* a speaker has a voice (all frequencies times 0.9 to 1.1) and a pace (a syllable takes 80 to 110
  ms, two follow each other after 10 ms);
* the word begins 20 to 120 ms into a clip of 0.64 s; what follows it is silence;
* white noise of standard deviation ``noise`` lies over everything (a tone's amplitude is 1).

Band energies: frames of 64 samples, one every 64, under a Hann window; the power in 16 bands of
equal width on a logarithmic axis from 200 to 2,000 Hz, each a triangle; the logarithm of one plus
50 times the power. 40 frames of 16 ms.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

RATE = 4000  # samples a second
SAMPLES, HOP = 2560, 64
FRAMES, BANDS = SAMPLES // HOP, 16
LOWEST, HIGHEST = 200.0, 2000.0

#: name -> the first and the last frequency of both formants, in hertz
SYLLABLES = {
    "ba": ((300.0, 600.0), (1000.0, 1200.0)),
    "di": ((500.0, 300.0), (1300.0, 1700.0)),
    "gu": ((450.0, 300.0), (1100.0, 700.0)),
    "lo": ((350.0, 450.0), (750.0, 900.0)),
}
NAMES = tuple(SYLLABLES)


class SpokenTones(NamedTuple):
    """``n`` clips and the truth about them."""

    features: Float[Tensor, "n frames bands"]
    labels: Int[Tensor, " n"]
    waves: Float[Tensor, "n samples"]
    starts: Float[Tensor, "n 4"]  # frames: when each syllable begins, and when the last one ends


def words(syllables: int = 3) -> tuple[tuple[int, int, int], ...]:
    """Every word out of so many syllables (3 or 4), as their numbers; a label is a place here."""
    if syllables not in (3, 4):
        raise ValueError(f"syllables: expected 3 or 4, got {syllables!r}")
    return tuple(itertools.permutations(range(syllables), 3))


def word_name(word: tuple[int, int, int]) -> str:
    """``word_name((0, 1, 2))`` is ``ba-di-gu``."""
    return "-".join(NAMES[syllable] for syllable in word)


def spoken_tones(
    count: int, *, syllables: int = 3, noise: float = 0.3, generator: torch.Generator
) -> SpokenTones:
    """``count`` clips of random words by random speakers.

    Args:
        syllables: how many there are to make words of, 3 (6 words) or 4 (24 words).
        noise: standard deviation of the noise, at least 0.
        generator: draws words, speakers and noise.
    """
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    if not noise >= 0:
        raise ValueError(f"noise: expected at least 0, got {noise}")

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=generator)

    spelled = torch.tensor(words(syllables))
    labels = torch.randint(len(spelled), (count,), generator=generator)
    voice, length, start = between(0.9, 1.1), between(0.080, 0.110), between(0.020, 0.120)
    time = torch.arange(SAMPLES) / RATE
    waves, starts = torch.zeros(count, SAMPLES), []
    formants = torch.tensor(tuple(SYLLABLES.values()))  # (syllables, 2, 2)
    for place in range(3):
        said = formants[spelled[labels, place]]
        begin = start + place * (length + 0.010)
        starts.append(begin)
        waves += _syllable(said * voice[..., None], time - begin, length)
    starts.append(begin + length)
    waves += noise * torch.randn(count, SAMPLES, generator=generator)
    edges = torch.cat(starts, 1) * RATE / HOP
    return SpokenTones(band_energies(waves), labels, waves, edges)


def _syllable(ends: Tensor, at: Tensor, length: Tensor) -> Tensor:
    """Both glides: ``ends (n, 2, 2)`` in hertz, ``at (n, samples)`` seconds since they began."""
    share = (at / length).clamp(0, 1)
    loud = 0.5 - 0.5 * torch.cos(2 * math.pi * share)
    first, last = ends.unbind(-1)
    # the phase is the integral of a frequency that moves in a straight line
    turns = first[..., None] * at[:, None]
    turns = turns + (last - first)[..., None] * (at * share / 2)[:, None]
    return loud * torch.sin(2 * math.pi * turns).sum(1)


def band_energies(waves: Float[Tensor, "n samples"]) -> Float[Tensor, "n frames bands"]:
    """Logarithms of ``1 + 50 power`` in 16 bands, a frame every 64 samples."""
    if waves.dim() != 2 or waves.shape[1] % HOP:
        raise ValueError(f"waves: expected (n, a multiple of {HOP}), got {tuple(waves.shape)}")
    frames = waves.unfold(1, HOP, HOP) * torch.hann_window(HOP)
    power = torch.fft.rfft(frames).abs().square() / HOP
    return torch.log1p(50 * power @ _bands().T)


def band_centres() -> Float[Tensor, " bands"]:
    """The middle of each band, in hertz."""
    places = torch.linspace(math.log(LOWEST), math.log(HIGHEST), BANDS + 2)
    return places[1:-1].exp()


def _bands() -> Tensor:
    """``(bands, bins)``: triangles on the logarithmic axis, at least as wide as a bin."""
    bins = torch.arange(HOP // 2 + 1) * RATE / HOP
    step = math.log(HIGHEST / LOWEST) / (BANDS + 1)
    centres = band_centres()[:, None]
    wide = torch.maximum(centres * step, torch.tensor(RATE / HOP))
    return (1 - (bins - centres).abs() / wide).clamp(min=0)
