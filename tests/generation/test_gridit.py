"""GriDiT: grids, positions, rollouts and the second stage."""

from __future__ import annotations

import pytest
import torch

from corelib.generation import diffusion, gridit
from corelib.generation.dit import DiT, dit_flops

SCHEDULE = diffusion.cosine_schedule(20)


def frames_of(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("T, columns", [(1, 1), (6, 3), (6, 1), (16, 4)])
def test_a_grid_and_back(T, columns):
    frames = frames_of(2, T, 3, 2, 5)
    grid = gridit.to_grid(frames, columns)
    assert grid.shape == (2, 3, T // columns * 2, columns * 5)
    assert torch.equal(gridit.from_grid(grid, T // columns, columns), frames)


def test_frames_lie_in_reading_order():
    frames = frames_of(1, 6, 1, 2, 2)
    grid = gridit.to_grid(frames, 3)
    assert torch.equal(grid[0, 0, 2:4, 2:4], frames[0, 4, 0])  # row 1, column 1


def test_positions_name_frame_row_and_column():
    """Every patch of a grid against where it is, pixel by pixel."""
    positions = gridit.pos3d((2, 3), (2, 2))
    place = 0
    for y in range(4):
        for x in range(6):
            want = [y // 2 * 3 + x // 2, y % 2, x % 2]
            assert positions[place].tolist() == want
            place += 1


def test_the_released_order_is_another_one_code_a_place():
    ours, theirs = (gridit.pos3d((2, 3), (2, 2), reorder=r) for r in (True, False))
    assert theirs[:5].tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0]]
    assert not torch.equal(ours, theirs)
    assert {tuple(p) for p in ours.tolist()} == {tuple(p) for p in theirs.tolist()}


def test_the_grid_model_is_full_attention_over_stacked_frames():
    """Outputs and gradients, to 1e-10: the order of patches is all that differs."""
    model, e = gridit.example()
    frames, given = e["frames"], (e["t"], e["label"])
    on_grid = gridit.from_grid(model(gridit.to_grid(frames, 3), *given), 2, 3)
    on_stack = model.stacked(frames, *given)
    torch.testing.assert_close(on_grid, on_stack, atol=1e-10, rtol=0)
    weight = frames_of(*frames.shape, seed=1)
    grads = [
        torch.autograd.grad((out * weight).sum(), list(model.parameters()))
        for out in (on_grid, on_stack)
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_the_stack_is_a_plain_dit_on_tokens_in_the_order_of_time():
    model, e = gridit.example()
    frames = e["frames"]
    tokens = frames.view(2, 6, 2, 2, 2, 2).transpose(3, 4).reshape(2, 24, 4)
    positions = torch.tensor([[f, r, c] for f in range(6) for r in range(2) for c in range(2)])
    plain = model.dit
    assert type(plain) is DiT
    want = plain(tokens, positions, e["t"], e["label"])
    want = want.view(2, 6, 2, 2, 2, 2).transpose(3, 4).reshape(frames.shape)
    torch.testing.assert_close(model.stacked(frames, e["t"], e["label"]), want, atol=1e-12, rtol=0)


def test_without_reordering_it_is_another_model():
    model, e = gridit.example()
    model.positions = gridit.pos3d(*model.layout, reorder=False)
    on_grid = gridit.from_grid(model(gridit.to_grid(e["frames"], 3), e["t"]), 2, 3)
    assert (on_grid - model.stacked(e["frames"], e["t"])).abs().max() > 1e-3


def smoother(x, t):
    """A denoiser in which every pixel depends on all others."""
    return 0.3 * x + 0.5 * x.mean((1, 2, 3), keepdim=True)


def roll(first, rows_known, passes=2, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return gridit.rollout(
        smoother, first, rows_known, passes, SCHEDULE, 4, columns=2, generator=generator, **options
    )


@pytest.mark.parametrize("rows_known", [0, 1, 2])
def test_rollout_keeps_what_it_was_given(rows_known):
    """With ``paste_final`` the overlap is bit-identical, so frames are only ever added."""
    first = frames_of(2, 6, 1, 3, 3).clamp(-1, 1)
    out = roll(first, rows_known)
    assert out.shape[1] == 6 + 2 * (6 - 2 * rows_known)
    assert torch.equal(out[:, :6], first)
    once = roll(first, rows_known, passes=1)
    assert torch.equal(out[:, : once.shape[1]], once)


def test_without_pasting_the_overlap_is_only_near():
    first = frames_of(1, 6, 1, 3, 3).clamp(-1, 1)
    loose, exact = roll(first, 2, 1, paste_final=False), roll(first, 2, 1)
    assert torch.equal(loose[:, :2], first[:, :2])  # not overlapped
    assert not torch.equal(loose[:, 2:6], first[:, 2:6])
    assert torch.equal(loose[:, 6:], exact[:, 6:])


def test_unknown_rows_make_independent_grids():
    one, two = (roll(frames_of(1, 6, 1, 3, 3, seed=s), 0)[:, 6:] for s in (0, 1))
    assert torch.equal(one, two)
    one, two = (roll(frames_of(1, 6, 1, 3, 3, seed=s), 1)[:, 6:] for s in (0, 1))
    assert not torch.equal(one, two)


def test_only_known_rows_are_looked_at():
    first = frames_of(1, 6, 1, 3, 3)
    other = first.clone()
    other[:, :4] += 1  # row 0 and 1; only row 2 is known
    assert torch.equal(roll(first, 1)[:, 6:], roll(other, 1)[:, 6:])


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_rollout_equals_the_loop(eta):
    """One pass, step by step, with its own paste."""
    first = frames_of(1, 6, 1, 3, 3).clamp(-1, 1)
    got = roll(first, 1, 1, eta=eta)
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(1, 1, 9, 6, generator=generator, dtype=torch.float64)  # noqa: E731
    known = gridit.to_grid(torch.cat([first[:, 4:], torch.zeros_like(first[:, :4])], 1), 2)
    x = draw()
    for t, s in ((20, 15), (15, 10), (10, 5), (5, 0)):
        a, b = (float(p[t]) for p in SCHEDULE)
        x[:, :, :3] = (a * known + b * draw())[:, :, :3]
        noise, eps = draw() if eta else None, smoother(x, None)
        x = diffusion.step_down(SCHEDULE, x, eps, t, s, clip=1.0, eta=eta, noise=noise)
    want = gridit.from_grid(x, 3, 2)[:, 2:]
    torch.testing.assert_close(got[:, 6:], want, atol=1e-12, rtol=0)


def test_the_denoiser_is_guided():
    model, e = gridit.example()
    grid, t = gridit.to_grid(e["frames"], 3), torch.tensor([5, 5])
    ask = lambda *a: model.denoiser(SCHEDULE, *a)(grid, t)  # noqa: E731
    with_class, without = ask(e["label"], 1.0), ask()
    assert not torch.equal(with_class[0], without[0])
    torch.testing.assert_close(with_class[1], without[1])  # label 2 of 2 is "no class"
    torch.testing.assert_close(ask(e["label"], 3.0), without + 3 * (with_class - without))
    v, x0 = model(grid, t), diffusion.clean_from_noise(SCHEDULE, grid, without, t)
    torch.testing.assert_close(v, diffusion.velocity(SCHEDULE, x0, without, t))


def sharpener():
    config = gridit.SRConfig(side=4, by=2, patch=4, width=12, layers=1, heads=2, condition=8)
    model, generator = gridit.FrameSR(config).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def test_sharpening_permutes_with_the_frames():
    model, frames, noise = sharpener(), frames_of(2, 5, 1, 4, 4), frames_of(2, 5, 1, 8, 8)
    out = gridit.super_resolve(model, frames, SCHEDULE, 3, noise=noise)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = gridit.super_resolve(model, frames[:, order], SCHEDULE, 3, noise=noise[:, order])
    torch.testing.assert_close(moved, out[:, order], atol=1e-12, rtol=0)
    one = gridit.super_resolve(model, frames[:1, 2:3], SCHEDULE, 3, noise=noise[:1, 2:3])
    torch.testing.assert_close(one, out[:1, 2:3], atol=1e-12, rtol=0)


def test_sharpening_sees_the_small_frame():
    model, frames, noise = sharpener(), frames_of(1, 2, 1, 4, 4), frames_of(1, 2, 1, 8, 8)
    out = gridit.super_resolve(model, frames, SCHEDULE, 3, noise=noise)
    other = gridit.super_resolve(model, -frames, SCHEDULE, 3, noise=noise)
    assert not torch.allclose(out, other)


def test_flops_count_both_stages():
    config, sr = gridit.GridConfig(), gridit.SRConfig(patch=4)
    count = gridit.flops_grid_vs_tensor(24, sr=sr, steps=10, sr_steps=5)
    assert count.grid == 3 * 10 * dit_flops(config.dit, 16 * 4)  # 16, then 4 and 4 more
    assert count.sharpen == 24 * 5 * dit_flops(sr.dit, 36)
    assert count.tensor == 10 * dit_flops(config.dit, 24 * 16)
    assert count.ratio == count.tensor / (count.grid + count.sharpen)


def test_the_model_has_the_sizes_it_says():
    config = gridit.GridConfig()
    assert config.frames == 16 and config.dit.patch == 36 and config.dit.labels == 10
    model = gridit.GridDiT(config, seed=None)
    assert model.n_parameters == sum(p.numel() for p in model.parameters())
    assert model(torch.zeros(1, 1, 48, 48), torch.tensor([1])).shape == (1, 1, 48, 48)


BAD = {
    "columns: expected a divisor of 6": lambda: gridit.to_grid(torch.zeros(1, 6, 1, 2, 2), 4),
    "rows, columns: expected divisors": lambda: gridit.from_grid(torch.zeros(1, 1, 4, 6), 3, 3),
    "rows_known: expected 0 to 2": lambda: roll(torch.zeros(1, 6, 1, 3, 3), 3),
    "noise: expected .1, 2, 1. pictures": lambda: gridit.super_resolve(
        sharpener(), torch.zeros(1, 2, 1, 4, 4), SCHEDULE, 2, noise=torch.zeros(1, 3, 1, 8, 8)
    ),
    "frames: expected at least 16": lambda: gridit.flops_grid_vs_tensor(8),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
