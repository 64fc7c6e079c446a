"""The diffusion kit against closed forms: Gaussian data, where the ideal denoiser is known."""

from __future__ import annotations

import math

import pytest
import torch

from corelib.generation import diffusion as d

pytestmark = pytest.mark.method("gridit")


def every(level, rows):
    return torch.full((rows,), level)


@pytest.mark.parametrize("make", [d.linear_schedule, d.cosine_schedule])
def test_schedules_go_from_data_to_noise(make):
    schedule = make(100)
    assert schedule.last == 100
    assert float(schedule.alpha[0]) == 1.0 and float(schedule.sigma[0]) == 0.0
    assert (schedule.alpha.diff() < 0).all()
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(101).double())


def test_linear_schedule_is_the_product_of_the_papers():
    beta, alpha_bar = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 1.0
    schedule = d.linear_schedule()
    for t in range(1000):
        alpha_bar *= 1 - float(beta[t])
        assert math.isclose(float(schedule.alpha[t + 1]) ** 2, alpha_bar, rel_tol=1e-10)


def test_shift_divides_the_ratio_of_signal_to_noise():
    plain, shifted = d.cosine_schedule(20), d.cosine_schedule(20, shift=3.0)
    ratio = lambda s: (s.alpha / s.sigma)[1:-1]  # noqa: E731
    torch.testing.assert_close(ratio(plain) / ratio(shifted), torch.full((19,), 3.0).double())


def test_conversions_undo_each_other():
    schedule, generator = d.cosine_schedule(10), torch.Generator().manual_seed(0)
    clean, noise = (
        torch.randn(4, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    t = torch.tensor([1, 4, 7, 9])
    x = d.add_noise(schedule, clean, noise, t)
    torch.testing.assert_close(d.clean_from_noise(schedule, x, noise, t), clean)
    v = d.velocity(schedule, clean, noise, t)
    torch.testing.assert_close(d.noise_from_velocity(schedule, x, v, t), noise)


def test_gaussian_denoiser_is_the_best_linear_one():
    """The expected noise given x, by least squares over very many draws."""
    e = d.example()
    generator = torch.Generator().manual_seed(1)
    root = torch.linalg.cholesky(e["covariance"])
    draws = torch.randn(2, 50_000, 2, generator=generator, dtype=torch.float64)
    clean, noise, t = e["mean"] + draws[0] @ root.T, draws[1], every(20, 50_000)
    x = d.add_noise(e["schedule"], clean, noise, t)
    with_one = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    fit = torch.linalg.lstsq(with_one, noise).solution
    at = torch.tensor([[0.3, -1.0], [2.0, 0.5]], dtype=torch.float64)
    want = torch.cat([at, torch.ones(2, 1).double()], 1) @ fit
    got = e["denoiser"](at, every(20, 2))
    torch.testing.assert_close(got, want, atol=4e-2, rtol=0)


def test_denoising_loss_of_the_ideal_is_the_posterior_variance():
    e = d.example()
    generator = torch.Generator().manual_seed(2)
    root = torch.linalg.cholesky(e["covariance"])
    draws = torch.randn(2, 50_000, 2, generator=generator, dtype=torch.float64)
    clean, t = e["mean"] + draws[0] @ root.T, every(25, 50_000)
    loss = d.denoising_loss(e["denoiser"], e["schedule"], clean, draws[1], t)
    alpha, sigma = (float(p[25]) for p in e["schedule"])
    values = torch.linalg.eigvalsh(e["covariance"])
    want = (1 - sigma**2 / (alpha**2 * values + sigma**2)).mean()
    assert abs(float(loss - want)) < 6e-3


def ddim_closed_form(e, steps):
    """Each direction of the covariance is scaled step by step, by hand."""
    schedule, mean = e["schedule"], e["mean"]
    values, vectors = torch.linalg.eigh(e["covariance"])
    path = d.levels(schedule, steps)
    y = (e["noise"] - float(schedule.alpha[path[0]]) * mean) @ vectors
    for t, s in zip(path, path[1:], strict=False):
        (a, b), (c, f) = ([float(p[i]) for p in schedule] for i in (t, s))
        y = y * (a * c * values + b * f) / (a**2 * values + b**2)
    return mean + y @ vectors.T


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_ddim_on_gaussian_data(steps):
    e = d.example()
    got = d.sample(e["denoiser"], e["noise"], e["schedule"], steps)
    torch.testing.assert_close(got, ddim_closed_form(e, steps), atol=1e-10, rtol=1e-10)


def test_ddim_tends_to_the_exact_flow():
    """With many steps every noise ends where the probability flow takes it."""
    e = d.example()
    schedule = d.cosine_schedule(200)
    denoiser = d.gaussian_denoiser(schedule, e["mean"], e["covariance"])
    values, vectors = torch.linalg.eigh(e["covariance"])
    a, b = (float(p[-1]) for p in schedule)
    y = (e["noise"] - a * e["mean"]) @ vectors * (values / (a**2 * values + b**2)).sqrt()
    got = d.sample(denoiser, e["noise"], schedule, 200)
    torch.testing.assert_close(got, e["mean"] + y @ vectors.T, atol=2e-2, rtol=0)


def test_one_ancestral_step_has_the_posterior_of_ddpm():
    """Equation 7 of DDPM: mean and variance, from neighbouring levels."""
    schedule = d.linear_schedule(100, 1e-3, 0.1)
    x, eps, noise = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    a_t, a_s = (float(schedule.alpha[i]) ** 2 for i in (40, 39))
    beta = 1 - a_t / a_s
    clean = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    mean = (math.sqrt(a_s) * beta * clean + math.sqrt(1 - beta) * (1 - a_s) * x) / (1 - a_t)
    want = mean + math.sqrt((1 - a_s) / (1 - a_t) * beta) * noise
    got = d.step_down(schedule, x, eps, 40, 39, eta=1.0, noise=noise)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)


def test_ancestral_sampling_has_the_variance_of_its_recursion():
    """One number with variance 4: the variance of each step follows from the last, exactly."""
    schedule = d.cosine_schedule(10)
    mean, covariance = torch.zeros(1).double(), torch.full((1, 1), 4.0).double()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(40_000, 1, generator=generator, dtype=torch.float64)
    denoiser = d.gaussian_denoiser(schedule, mean, covariance)
    out = d.sample(denoiser, noise, schedule, 10, eta=1.0, generator=generator)
    variance = 1.0
    for t in range(10, 0, -1):
        (a, b), (c, f) = ([float(p[i]) for p in schedule] for i in (t, t - 1))
        fresh = f / b * math.sqrt(1 - (a / c) ** 2)
        per_x = b / (4 * a**2 + b**2)  # eps = per_x x
        factor = c * (1 - b * per_x) / a + math.sqrt(f**2 - fresh**2) * per_x
        variance = factor**2 * variance + fresh**2
    assert abs(float(out.var()) / variance - 1) < 0.03


def test_clipping_keeps_the_clean_data_in_range():
    schedule = d.cosine_schedule(10)
    x = torch.tensor([[5.0, -0.3]], dtype=torch.float64)
    eps = torch.tensor([[0.1, 0.2]], dtype=torch.float64)
    got = d.step_down(schedule, x, eps, 4, 0, clip=1.0)
    assert float(got[0, 0]) == 1.0
    a, b = (float(p[4]) for p in schedule)
    assert math.isclose(float(got[0, 1]), (-0.3 - b * 0.2) / a)
    later = d.step_down(schedule, x, eps, 4, 2, clip=1.0)  # x is on the line from 1 to its noise
    c, f = (float(p[2]) for p in schedule)
    assert math.isclose(float(later[0, 0]), c + f * (5.0 - a) / b)


def test_guidance_is_an_extrapolation():
    one, two = (lambda x, t: x + 1), (lambda x, t: 3 * x)
    x, t = torch.tensor([[2.0]]), torch.tensor([1])
    for guidance, want in ((0.0, 6.0), (1.0, 3.0), (3.0, -3.0)):
        assert float(d.guided(one, two, guidance)(x, t)) == want


def test_paint_pastes_what_is_known():
    e = d.example()
    mask, known = torch.tensor([True, False]), torch.full_like(e["noise"], 0.25)
    options = dict(schedule=e["schedule"], steps=10)
    got = d.paint(
        e["denoiser"],
        e["noise"],
        known,
        mask,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    assert (got[:, 0] == 0.25).all()
    loose = d.paint(
        e["denoiser"], e["noise"], known, mask, paste_final=False,
        generator=torch.Generator().manual_seed(0), **options,
    )  # fmt: skip
    assert (loose[:, 0] != 0.25).all() and torch.equal(loose[:, 1], got[:, 1])


def test_paint_shows_the_denoiser_known_data_with_noise_of_its_level():
    schedule, seen = d.cosine_schedule(8), []

    def denoiser(x, t):
        seen.append((int(t[0]), x.clone()))
        return torch.zeros_like(x)

    known = torch.full((20_000, 1), 3.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(known.shape, generator=generator, dtype=torch.float64)
    d.paint(denoiser, noise, known, torch.tensor([True]), schedule, 4, generator=generator)
    assert [t for t, _ in seen] == [8, 6, 4, 2]
    for t, x in seen:
        assert abs(float(x.mean()) - 3 * float(schedule.alpha[t])) < 0.05
        assert abs(float(x.std()) - float(schedule.sigma[t])) < 0.02


def test_paint_of_nothing_is_sample():
    e = d.example()
    nothing = torch.tensor([False, False])
    got = d.paint(e["denoiser"], e["noise"], 0 * e["noise"], nothing, e["schedule"], 5)
    assert torch.equal(got, d.sample(e["denoiser"], e["noise"], e["schedule"], 5))


def test_gradient_reaches_the_noise():
    e = d.example()
    noise = e["noise"].requires_grad_()
    d.sample(e["denoiser"], noise, e["schedule"], 3).sum().backward()
    assert (noise.grad != 0).any()


BAD = {
    "steps: expected at least 1": lambda e: d.cosine_schedule(0),
    "steps: expected 1 to 50": lambda e: d.levels(e["schedule"], 51),
    "t: expected 8 whole": lambda e: d.add_noise(
        e["schedule"], e["noise"], e["noise"], torch.tensor([1])
    ),
    "t, s: expected": lambda e: d.step_down(e["schedule"], e["noise"], e["noise"], 3, 3),
    "noise: expected a tensor": lambda e: d.step_down(
        e["schedule"], e["noise"], e["noise"], 3, 1, eta=1.0
    ),
    "known: expected": lambda e: d.paint(
        e["denoiser"], e["noise"], e["noise"][:1], torch.tensor([True, False]), e["schedule"], 5
    ),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message](d.example())
