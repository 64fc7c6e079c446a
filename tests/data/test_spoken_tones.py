"""Words of gliding tones: the recipe, and what can be known about a clip when."""

from __future__ import annotations

import math

import pytest
import torch

from corelib.data.spoken_tones import (
    BANDS,
    FRAMES,
    HOP,
    RATE,
    SAMPLES,
    SYLLABLES,
    band_centres,
    band_energies,
    spoken_tones,
    word_name,
    words,
)

pytestmark = pytest.mark.method("lmuformer")


def clips(count=20, seed=0, **options):
    return spoken_tones(count, generator=torch.Generator().manual_seed(seed), **options)


def test_shapes_and_words():
    made = clips(syllables=4)
    assert made.features.shape == (20, FRAMES, BANDS) and made.waves.shape == (20, SAMPLES)
    assert len(words(4)) == 24 and len(words()) == 6 and len(set(words(4))) == 24
    assert all(len(set(word)) == 3 for word in words(4))
    assert word_name(words()[0]) == "ba-di-gu"
    assert set(clips(200).labels.tolist()) == set(range(6))


def test_same_seed_same_clips():
    assert torch.equal(clips(3).waves, clips(3).waves)
    assert not torch.equal(clips(3).waves, clips(3, seed=1).waves)


def test_syllables_lie_where_the_truth_says():
    """Without noise: silence before, between and after, sound in the middle of each."""
    made = clips(noise=0.0)
    at = torch.arange(SAMPLES) / HOP
    for wave, starts in zip(made.waves, made.starts):
        assert not wave[at < starts[0]].any() and not wave[at > starts[3] + 0.1].any()
        for n in range(3):
            middle = (starts[n] + starts[n + 1]) / 2
            assert wave[(at - middle).abs() < 1].abs().max() > 0.5
        gap = (starts[1:3, None] - 0.4 < at) & (at < starts[1:3, None])
        assert not wave[gap.any(0)].any()


def test_frequencies_are_the_recipes():
    """A clip's loudest bins in the middle of a syllable: the middle of both glides, in a voice."""
    made = clips(6, noise=0.0)
    for wave, starts, label in zip(made.waves, made.starts, made.labels):
        voices = []
        for n, syllable in enumerate(words()[label]):
            middle = int((starts[n] + starts[n + 1] - 0.6) / 2 * HOP)
            piece = wave[middle - 40 : middle + 40] * torch.hann_window(80)
            spectrum = torch.fft.rfft(piece, n=4000).abs()  # a bin a hertz
            first, second = tuple(SYLLABLES.values())[syllable]
            split = (sum(first) / 2 + sum(second) / 2) / 2
            low = spectrum[: int(split)].argmax() * RATE / 4000
            voices.append(float(low) / (sum(first) / 2))
        assert max(voices) - min(voices) < 0.08 and 0.85 < min(voices) and max(voices) < 1.15


def test_bands_hear_a_pure_tone():
    t = torch.arange(SAMPLES) / RATE
    for band in (0, 7, 15):
        tone = torch.sin(2 * math.pi * band_centres()[band] * t)
        heard = band_energies(tone[None])[0].mean(0)
        assert abs(int(heard.argmax()) - band) <= 1 and heard.max() > heard.mean() + 1


def test_noise_is_what_was_asked_for():
    quiet = clips(noise=0.5).waves[:, :60]  # before any word begins
    assert 0.45 < quiet.std() < 0.55


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: clips(0), "count: expected at least 1"),
        (lambda: clips(1, noise=-1.0), "noise: expected at least 0"),
        (lambda: clips(1, syllables=5), "syllables: expected 3 or 4, got 5"),
        (lambda: band_energies(torch.zeros(1, 65)), "waves: expected"),
    ],
)
def test_bad_input_is_named(run, message):
    with pytest.raises(ValueError, match=message):
        run()
