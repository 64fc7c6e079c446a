"""Gaussian diffusion: noise by degrees, and samplers that take it away again.

    x_t = alpha_t x_0 + sigma_t noise            alpha_t^2 + sigma_t^2 = 1
    x_s = alpha_s clean + sigma_s eps            clean = (x_t - sigma_t eps) / alpha_t

A `Schedule` holds ``alpha`` and ``sigma`` for the levels 0 (data) to ``T`` (next to noise). A
*denoiser* is any function ``(x, t) -> eps``: what is the noise in ``x (B, ...)`` at the levels
``t (B,)``? The second line is DDIM's step from level t to level s (arXiv 2010.02502, equation 12);
with fresh noise for a part of ``eps`` it is the ancestral step of DDPM (arXiv 2006.11239).

| here          | papers                                    | what |
|:--|:--|:--|
| alpha, sigma  | sqrt(bar alpha_t), sqrt(1 - bar alpha_t)  | ``(T + 1,)``, float64 |
| eta           | eta                                       | 0: DDIM, 1: DDPM's variance |
| velocity      | v (arXiv 2202.00512, appendix D)          | ``alpha eps - sigma x_0`` |
| guidance      | 1 + w (arXiv 2207.12598)                  | 1: conditional, 0: unconditional |

Exact: on Gaussian data the ideal denoiser is known (`gaussian_denoiser`), and every step, mean and
variance is checked against its closed form. `paint` keeps known pixels while it samples the rest,
by overwriting them with noised truth after every step: an approximation, for the net sees known
pixels only through their noise. Left out: learned variances, flow matching.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

#: ``(x (B, ...), t (B,)) -> eps (B, ...)``
Denoiser = Callable[[Tensor, Tensor], Tensor]
FLOOR = 1e-8  # alpha^2 of the last level of a cosine schedule: it is never quite 0


class Schedule(NamedTuple):
    """How much of the data and of the noise there is at levels ``0 .. T``."""

    alpha: Float[Tensor, " levels"]
    sigma: Float[Tensor, " levels"]

    @property
    def last(self) -> int:
        """``T``, the noisiest level."""
        return len(self.alpha) - 1

    def at(self, t: Int[Tensor, " B"], x: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha`` and ``sigma`` at the levels ``t``, ready to multiply ``x (B, ...)``."""
        if t.shape != x.shape[:1] or t.is_floating_point():
            raise ValueError(f"t: expected {x.shape[0]} whole numbers, got {tuple(t.shape)}")
        shape = (-1, *[1] * (x.dim() - 1))
        return tuple(part.to(x.device)[t].to(x.dtype).view(shape) for part in self)


def _schedule(alpha_squared: Tensor) -> Schedule:
    return Schedule(alpha_squared.sqrt(), (1 - alpha_squared).clamp(min=0.0).sqrt())


def linear_schedule(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> Schedule:
    """DDPM's: the variance added in each of ``steps`` steps grows from ``first`` to ``last``."""
    _check_steps(steps)
    beta = torch.linspace(first, last, steps, dtype=torch.float64)
    return _schedule(torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)]))


def cosine_schedule(steps: int = 1000, shift: float = 1.0) -> Schedule:
    """``alpha_t = cos(pi/2 t/T)``; ``shift > 1`` divides all signal-to-noise ratios by its square,
    for large pictures of few things, which otherwise shine through much noise."""
    _check_steps(steps)
    angle = torch.linspace(0, 1, steps + 1, dtype=torch.float64) * (math.pi / 2)
    ratio = torch.tan(angle) * shift
    return _schedule((1 / (1 + ratio**2)).clamp(min=FLOOR))


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")


def add_noise(schedule: Schedule, clean: Tensor, noise: Tensor, t: Int[Tensor, " B"]) -> Tensor:
    """``clean (B, ...)`` at the levels ``t``."""
    alpha, sigma = schedule.at(t, clean)
    return alpha * clean + sigma * noise


def clean_from_noise(schedule: Schedule, x: Tensor, eps: Tensor, t: Int[Tensor, " B"]) -> Tensor:
    """The data that ``x`` would come from if ``eps`` were its noise."""
    alpha, sigma = schedule.at(t, x)
    return (x - sigma * eps) / alpha


def velocity(schedule: Schedule, clean: Tensor, noise: Tensor, t: Int[Tensor, " B"]) -> Tensor:
    """``alpha noise - sigma clean``: what a net can predict well at every level."""
    alpha, sigma = schedule.at(t, clean)
    return alpha * noise - sigma * clean


def noise_from_velocity(schedule: Schedule, x: Tensor, v: Tensor, t: Int[Tensor, " B"]) -> Tensor:
    """The noise of ``x`` when its velocity is ``v``."""
    alpha, sigma = schedule.at(t, x)
    return sigma * x + alpha * v


def denoising_loss(
    denoiser: Denoiser, schedule: Schedule, clean: Tensor, noise: Tensor, t: Int[Tensor, " B"]
) -> Float[Tensor, ""]:
    """The mean squared error of the predicted noise (DDPM, equation 14)."""
    return ((denoiser(add_noise(schedule, clean, noise, t), t) - noise) ** 2).mean()


def guided(conditional: Denoiser, unconditional: Denoiser, guidance: float) -> Denoiser:
    """Classifier-free guidance: beyond the conditional noise, away from the unconditional one."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(unconditional(x, t), conditional(x, t), guidance)

    return denoiser


def levels(schedule: Schedule, steps: int) -> list[int]:
    """``steps + 1`` levels from ``T`` down to 0, evenly spaced."""
    if not 1 <= steps <= schedule.last:
        raise ValueError(f"steps: expected 1 to {schedule.last}, got {steps}")
    return [round(schedule.last * (1 - i / steps)) for i in range(steps + 1)]


def step_down(
    schedule: Schedule,
    x: Tensor,
    eps: Tensor,
    t: int,
    s: int,
    *,
    eta: float = 0.0,
    noise: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """From level ``t`` to level ``s < t``.

    Args:
        eps: the denoiser's answer at ``x``, ``t``.
        eta: 0 takes all of the new noise from ``eps`` (DDIM); 1 draws as much of it afresh as
            DDPM's posterior has.
        noise: the fresh noise, needed when ``eta > 0``.
        clip: the clean data are kept within ``-clip`` and ``clip``; ``eps`` follows.
    """
    if not 0 <= s < t <= schedule.last:
        raise ValueError(f"t, s: expected 0 <= s < t <= {schedule.last}, got t={t}, s={s}")
    (a_t, s_t), (a_s, s_s) = ([float(part[level]) for part in schedule] for level in (t, s))
    clean = (x - s_t * eps) / a_t
    if clip is not None:
        clean = clean.clamp(-clip, clip)
        eps = (x - a_t * clean) / s_t
    if eta == 0.0:
        return a_s * clean + s_s * eps
    if noise is None:
        raise ValueError("noise: expected a tensor, for eta > 0 draws fresh noise")
    fresh = eta * s_s / s_t * math.sqrt(max(0.0, 1 - (a_t / a_s) ** 2))
    return a_s * clean + math.sqrt(max(0.0, s_s**2 - fresh**2)) * eps + fresh * noise


def sample(
    denoiser: Denoiser,
    noise: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    clip: float | None = None,
    generator: torch.Generator | None = None,
    after: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """Data from ``noise (B, ...)``, in ``steps`` steps.

    ``after(x, s)`` may change the picture at level ``s``, once per step: `paint` is made of it.
    """
    x, path = noise, levels(schedule, steps)
    for t, s in zip(path, path[1:], strict=False):
        eps = denoiser(x, torch.full((x.shape[0],), t, device=x.device))
        fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype) if eta else None
        x = step_down(schedule, x, eps, t, s, eta=eta, noise=fresh, clip=clip)
        x = x if after is None else after(x, s)
    return x


def paint(
    denoiser: Denoiser,
    noise: Tensor,
    known: Tensor,
    mask: Bool[Tensor, "*shape"],
    schedule: Schedule,
    steps: int,
    *,
    eta: float = 0.0,
    paste_final: bool = True,
    clip: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`sample` where ``mask`` is False; where it is True the result is ``known``.

    After each step the known pixels are put back, with fresh noise of the level reached. With
    ``eta=1`` the rest gets fresh noise as well, and comes to agree with them better.
    ``paste_final=False`` leaves out the last time, at level 0, as some released samplers do: then
    the overlap is nearly ``known``.
    """
    if known.shape != noise.shape:
        raise ValueError(f"known: expected {tuple(noise.shape)}, got {tuple(known.shape)}")

    def overwrite(x: Tensor, s: int) -> Tensor:
        if s == 0:
            return torch.where(mask, known, x) if paste_final else x
        fresh = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        noised = add_noise(schedule, known, fresh, torch.full((x.shape[0],), s))
        return torch.where(mask, noised, x)

    start = overwrite(noise, schedule.last)
    options = dict(eta=eta, clip=clip, generator=generator)
    return sample(denoiser, start, schedule, steps, **options, after=overwrite)


def gaussian_denoiser(
    schedule: Schedule, mean: Float[Tensor, " n"], covariance: Float[Tensor, "n n"]
) -> Denoiser:
    """The ideal denoiser of data ``(B, n)`` that are Gaussian: the expected noise given ``x``."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.at(t, x)
        total = alpha[..., None] ** 2 * covariance + sigma[..., None] ** 2 * torch.eye(
            len(mean), dtype=x.dtype
        )
        return sigma * torch.linalg.solve(total, (x - alpha * mean)[..., None])[..., 0]

    return denoiser


def example() -> dict:
    """Two correlated numbers: schedule, ideal denoiser, and eight noises to start from."""
    mean = torch.tensor([1.0, -0.5], dtype=torch.float64)
    covariance = torch.tensor([[1.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    schedule = cosine_schedule(50)
    generator = torch.Generator().manual_seed(0)
    return dict(
        mean=mean,
        covariance=covariance,
        schedule=schedule,
        denoiser=gaussian_denoiser(schedule, mean, covariance),
        noise=torch.randn(8, 2, generator=generator, dtype=torch.float64),
    )
