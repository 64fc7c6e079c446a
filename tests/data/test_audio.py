"""Codes that invert each other, and a melody that is its recipe."""

import doctest
import io
import math
import wave

import pytest
import torch

from corelib.data import audio
from corelib.data.audio import frequencies, mu_law_decode, mu_law_encode, synth_music, wav_bytes


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_doctest():
    failures, tests = doctest.testmod(audio)
    assert tests and not failures


@pytest.mark.parametrize("levels", [2, 7, 64, 256])
def test_every_code_comes_back(levels):
    codes = torch.arange(levels)
    sound = mu_law_decode(codes, levels)
    assert sound[-1] == pytest.approx(1) and (sound.diff() > 0).all()
    assert torch.equal(mu_law_encode(sound, levels), codes)
    torch.testing.assert_close(sound, -sound.flip(0))


def test_known_codes():
    """By the formula in plain Python."""
    for x in (-1.0, -0.3, -0.001, 0.0, 0.02, 0.5, 1.0):
        f = math.copysign(math.log(1 + 255 * abs(x)) / math.log(256), x)
        assert mu_law_encode(torch.tensor(x)) == math.floor((f + 1) / 2 * 255 + 0.5)
    assert mu_law_encode(torch.tensor([0.0, 0.02, 0.5])).tolist() == [128, 169, 239]


def test_quiet_sound_is_coded_finely():
    step = mu_law_decode(torch.arange(256)).diff()
    assert step[127] < 0.001 < 0.03 < step[-1]


def test_music_is_its_recipe():
    n, sr, beat = 1300, 4000, 0.05
    x = synth_music(n, sr, generator=generator(), beat=beat)
    notes = frequencies(7, generator())
    again = generator()
    frequencies(7, again)
    noise = torch.randn(n, generator=again, dtype=torch.float64)
    for t in (0, 7, 199, 200, 777, 1299):
        note, time = notes[t // 200].item(), t % 200 / sr
        tone = sum(2.0**-k * math.sin(2 * math.pi * (k + 1) * note * time) for k in range(3))
        wanted = 0.5 * tone * min(time / 0.004, 1) * math.exp(-time / 0.1) + 0.004 * noise[t]
        assert x[t].item() == pytest.approx(wanted.item(), abs=1e-6)


def test_melody_walks_the_scale_and_repeats_each_bar():
    notes = frequencies(400, generator(3))
    scale = [220 * 2 ** ((12 * o + s) / 12) for o in range(2) for s in (0, 3, 5, 7, 10)]
    scale = torch.tensor(scale)
    near = (notes[:, None] - scale).abs()
    assert near.min(1).values.max() < 1e-3
    degree = near.argmin(1).view(-1, 2, 4)
    assert torch.equal(degree[:, 0], degree[:, 1])
    walk = degree[:, 0].flatten()
    assert walk.unique().tolist() == list(range(10))
    assert walk.diff().abs().max() == 2
    assert (walk.diff() == 0).double().mean() < 0.15  # only where the walk is reflected


def test_harmonics_stay_below_half_the_rate():
    x = synth_music(880 * 4, 880, generator=generator(), beat=4.0)
    assert x.isfinite().all() and x.abs().max() <= 1


def test_seeds():
    x = [synth_music(500, generator=generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(x[0], x[1]) and not torch.equal(x[0], x[2])
    long = synth_music(1, generator=generator())
    assert long.shape == (1,)


def test_wav():
    x = torch.tensor([-1.0, 0.0, 1.0, 2.0, float("nan")])
    with wave.open(io.BytesIO(wav_bytes(x, 4000))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 1, 4000)
        assert list(file.readframes(9)) == [1, 128, 255, 255, 128]


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mu_law_encode(torch.tensor([1.5])), "x: expected values in -1 .. 1, got up to 1"),
        (lambda: mu_law_encode(torch.zeros(2), 1), "levels: expected at least 2, got 1"),
        (lambda: mu_law_decode(torch.tensor([3, 256])), "codes: expected 0 .. 255, got 3 .. 256"),
        (lambda: synth_music(0, generator=generator()), "n, sr: expected n >= 1"),
        (lambda: synth_music(9, 800, generator=generator()), "sr >= 880, got 9 and 800"),
        (lambda: synth_music(9, generator=generator(), beat=1e-5), "beat: expected at least one"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
