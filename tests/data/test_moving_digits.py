"""Clips of moving digits, and finding the digit in a frame."""

from __future__ import annotations

import pytest
import torch

from corelib.data import moving_digits as md
from corelib.data.images import digits

pytestmark = pytest.mark.method("gridit")


def clips(count=5, frames=7, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return md.moving_digits(count, frames, generator=generator, **options)


@pytest.mark.parametrize("objects", [1, 2])
def test_every_frame_is_the_digits_at_their_places(objects):
    """Pixel by pixel, digits of their own size; where they overlap, the darker one."""
    made = clips(size=14, digit=8, objects=objects, contrast=1.0)
    images, labels = digits("train")
    for n in range(5):
        for t in range(7):
            frame, best = made.frames[n, t], torch.zeros(14, 14)
            for k in range(objects):
                y, x = made.corners[n, t, k].tolist()
                same = labels == made.labels[n, k]
                window = frame[y : y + 8, x : x + 8]
                if objects == 1:
                    near = (images[same] - window).abs().amax((1, 2)).min()
                    assert float(near) < 1e-6
                best[y : y + 8, x : x + 8] = 1.0
            assert not frame[best == 0].any()


def test_digits_fly_straight_and_bounce():
    made = clips(20, 40, fastest=3)
    room = 24 - 16
    assert made.corners.min() == 0 and made.corners.max() == room
    for n in range(20):
        place, speed = made.corners[n, 0, 0].clone(), made.velocity[n, 0].clone()
        for t in range(1, 40):
            for axis in range(2):
                ahead = int(place[axis] + speed[axis])
                if ahead < 0 or ahead > room:
                    ahead = -ahead if ahead < 0 else 2 * room - ahead
                    speed[axis] *= -1
                place[axis] = ahead
            assert torch.equal(made.corners[n, t, 0], place)
    assert set(made.velocity.abs().flatten().tolist()) == {1, 2, 3}


def test_no_room_is_no_movement():
    made = clips(2, 3, size=8, digit=8)
    assert not made.corners.any() and torch.equal(made.frames[:, 0], made.frames[:, 2])


def test_same_seed_same_clips_and_splits_differ():
    one, two, other = clips(), clips(), clips(split="test")
    assert torch.equal(one.frames, two.frames) and not torch.equal(one.frames, other.frames)


def test_shrink_is_the_mean_of_squares():
    frames = torch.randn(2, 3, 4, 6)
    small = md.shrink(frames)
    assert small.shape == (2, 3, 2, 3)
    torch.testing.assert_close(small[1, 2, 1, 0], frames[1, 2, 2:4, :2].mean())


def test_a_real_frame_matches_itself():
    made = clips(6, 5)
    match = md.digit_match(md.shrink(made.frames))
    assert match.error.max() < 1e-6
    assert torch.equal(match.label, made.labels.expand(6, 5))
    assert torch.equal(2 * match.corner, made.corners[:, :, 0].float())


def test_the_match_is_the_best_of_all_by_brute_force():
    frame = torch.rand(1, 12, 12, generator=torch.Generator().manual_seed(0))
    got = md.digit_match(frame)
    images, labels = digits("train")
    big = ((md.upsample(images, 16) - 0.5) * 3 + 0.5).clamp(0, 1)
    best = (float("inf"), None, None)
    for y in range(9):
        for x in range(9):
            canvas = torch.nn.functional.pad(big, (x, 8 - x, y, 8 - y))
            errors = ((md.shrink(canvas) - frame) ** 2).mean((1, 2))
            best = min(best, (float(errors.min()), int(labels[errors.argmin()]), (y / 2, x / 2)))
    assert abs(float(got.error) - best[0]) < 1e-6
    assert int(got.label) == best[1] and tuple(got.corner[0].tolist()) == best[2]


BAD = {
    "count: expected at least 1": dict(count=0),
    "frames: expected at least 1": dict(frames=0),
    "objects: expected at least 1": dict(objects=0),
    "digit: expected 1 to 8": dict(size=8),
    "fastest: expected at least 1": dict(fastest=0),
    "split: expected one of": dict(split="training"),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        clips(**BAD[message])
