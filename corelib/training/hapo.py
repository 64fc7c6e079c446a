"""From Uniform to Heterogeneous: Tailoring Policy Optimization to Every Token's Nature
(HAPO, arXiv 2509.16591).

Idea: in a chain of reasoning a few tokens are forks and most just follow, and the entropy of the
law that a token was drawn from tells them apart. So let it set, token by token, the temperature of
the sampling, the weight of the advantage and the room that clipping leaves:

    signal      = (log entropy - pivot) / (above the pivot: most, below it: least)     in [-1, 1]
    temperature = base * (1 + tau * signal)                         pivot of the step before
    advantage   = (reward - mean) / std, both over the *tokens* of the group
    clip_low    = clip * (1 - alpha * signal)  where signal <= 0,  else clip
    clip_high   = clip * (1 + alpha * signal)  where signal > 0,   else clip
    advantage  *= 1 + beta * signal    where signal > 0 and the ratio has left the neutral zone,
                                       or signal <= 0 and the ratio is still inside
    loss        = mean over all tokens of the clipped surrogate, with a dual clip of 10

| here           | paper             | what                                                        |
|:---------------|:------------------|:------------------------------------------------------------|
| signal         | h-hat             | (R, T), from -1 (surest token of the batch) to 1 (openest)  |
| pivot          | 0.8-quantile      | of the log entropies of a batch                             |
| alpha, beta    | 1, 1              | how far clipping widens, how far advantages move            |
| tau            | 0.05              | how far the temperature moves                               |
| clip           | epsilon           | 0.2 on both sides                                           |
| neutral zone   | -                 | 1 - clip_low / 2 < ratio < 1 + clip_high / 2                |

The authors divide the signal by its root mean square before they divide by its largest value; the
first division cancels, and is not here. Their released `compute_entropy_h` divides the negative
side by its (negative) minimum, which makes the signal positive everywhere: then no token is ever
held back, and the lower clip never widens. `entropy_signal` has the sign that the paper describes;
`released_entropy_signal` and `hapo_released` are the code as it was published.

Exact: all of the above. As released: the ratio compares with the policy at temperature 1, although
the tokens were sampled a little warmer or colder. Left out: the KL term (unused) and the penalty
for answers that grow overlong, which the authors advise against as well.
Cost: elementwise work on (R, T), one quantile a batch; no extra call of the model.
Oracle: `hapo_loss_reference`, a loop over single tokens; the released code for its own signal.
No `nn.Module`: any policy keeps its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .policy_gradient import (
    EPS,
    Experience,
    Loss,
    clipped_surrogate,
    group_advantage,
    telling,
    token_mean,
)
from .rollout import Rollout, Temperature, entropy_of

FLOOR = 1e-8  # nats: no entropy counts as smaller
FAR = 5.0  # an advantage as large as this sends its group back to `group_advantage`


class EntropyScale(NamedTuple):
    """What makes log entropies a signal: the pivot, and the largest distances on its two sides."""

    pivot: float
    above: float
    below: float


def entropy_scale(
    entropy: Float[Tensor, "R T"], mask: Bool[Tensor, "R T"], *, quantile: float = 0.8
) -> EntropyScale:
    """Of a batch's tokens; without any token a scale whose signal is 0."""
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile: expected 0 to 1, got {quantile}")
    logs = entropy[mask].clamp(min=FLOOR).log().sort().values
    if not len(logs):
        return EntropyScale(0.0, math.inf, math.inf)
    pivot = logs[round(quantile * (len(logs) - 1))].item()
    return EntropyScale(pivot, logs[-1].item() - pivot, pivot - logs[0].item())


def entropy_signal(entropy: Float[Tensor, "*R"], scale: EntropyScale) -> Float[Tensor, "*R"]:
    """From -1 at the batch's surest token over 0 at the pivot to 1 at its openest."""
    distance = entropy.clamp(min=FLOOR).log() - scale.pivot
    above, below = (max(side, FLOOR) for side in scale[1:])  # all tokens alike: no side
    return torch.where(distance > 0, distance / above, distance / below).clamp(-1.0, 1.0)


def released_entropy_signal(
    entropy: Float[Tensor, "*R"], scale: EntropyScale
) -> Float[Tensor, "*R"]:
    """The signal of the published code: its sure tokens count as open ones."""
    return entropy_signal(entropy, scale).abs()


def adaptive_temperature(
    logits: Float[Tensor, "*R vocab"],
    scale: EntropyScale,
    *,
    base: float = 1.0,
    tau: float = 0.05,
    signal_of: Callable[[Tensor, EntropyScale], Tensor] = entropy_signal,
) -> Float[Tensor, "*R"]:
    """Warmer where the next token is open, colder where it is sure: ``base * (1 ± tau)``."""
    if not (base > 0 and 0 <= tau < 1):
        raise ValueError(f"base, tau: expected base > 0 and 0 <= tau < 1, got {base} and {tau}")
    return base * (1 + tau * signal_of(entropy_of(logits), scale))


def token_group_advantage(
    rewards: Float[Tensor, "Q n"], mask: Bool[Tensor, "Q n T"]
) -> Float[Tensor, "Q n T"]:
    """Rewards less the mean over all *tokens* of the group, over their standard deviation.

    So a group's advantages sum to 0 over its tokens. Where one of them reaches `FAR`, the whole
    group takes `group_advantage` instead.
    """
    tokens = mask.sum(2).to(rewards.dtype)
    share = tokens / tokens.sum(1, keepdim=True).clamp(min=1)
    centred = rewards - (share * rewards).sum(1, keepdim=True)
    std = (share * centred.square()).sum(1, keepdim=True).sqrt()
    advantage = centred / (std + EPS)
    far = ((advantage.abs() >= FAR) & (tokens > 0)).any(1, keepdim=True)
    advantage = torch.where(far, group_advantage(rewards), advantage)
    return advantage[:, :, None] * mask


def asymmetric_clip(
    signal: Float[Tensor, "*R"], *, clip: float = 0.2, alpha: float = 1.0
) -> tuple[Float[Tensor, "*R"], Float[Tensor, "*R"]]:
    """``(clip_low, clip_high)``: a sure token may fall further, an open one may rise further."""
    return clip * (1 + alpha * (-signal).clamp(min=0)), clip * (1 + alpha * signal.clamp(min=0))


def redistribute(
    advantage: Float[Tensor, "*R"],
    signal: Float[Tensor, "*R"],
    ratio: Float[Tensor, "*R"],
    clip_low: Float[Tensor, "*R"],
    clip_high: Float[Tensor, "*R"],
    *,
    beta: float = 1.0,
) -> Float[Tensor, "*R"]:
    """More for open tokens that already move, less for sure tokens that stay where they are."""
    neutral = (ratio > 1 - clip_low / 2) & (ratio < 1 + clip_high / 2)
    return torch.where((signal > 0) ^ neutral, advantage * (1 + beta * signal), advantage)


def hapo_loss_reference(
    log_prob,
    old_log_prob,
    advantage,
    signal,
    mask,
    *,
    clip=0.2,
    alpha=1.0,
    beta=1.0,
    dual_clip=10.0,
) -> Tensor:
    """`hapo_loss`, one token after the other, as the paper tells it."""
    losses = []
    for i, t in mask.nonzero().tolist():
        h, gain = signal[i, t].item(), advantage[i, t].item()
        ratio = (log_prob[i, t] - old_log_prob[i, t]).exp()
        low = clip * (1 - alpha * h) if h <= 0 else clip
        high = clip * (1 + alpha * h) if h > 0 else clip
        neutral = 1 - low / 2 < ratio.item() < 1 + high / 2
        if (h > 0 and not neutral) or (h <= 0 and neutral):
            gain = gain * (1 + beta * h)
        loss = max(-gain * ratio, -gain * ratio.clamp(1 - low, 1 + high))
        if gain < 0:
            loss = min(loss, torch.as_tensor(-gain * dual_clip, dtype=ratio.dtype))
        losses.append(loss)
    return sum(losses) / max(len(losses), 1)


def hapo_loss(
    log_prob: Float[Tensor, "R T"],
    old_log_prob: Float[Tensor, "R T"],
    advantage: Float[Tensor, "R T"],
    signal: Float[Tensor, "R T"],
    mask: Bool[Tensor, "R T"],
    *,
    clip: float = 0.2,
    alpha: float = 1.0,
    beta: float = 1.0,
    dual_clip: float = 10.0,
) -> Float[Tensor, ""]:
    """The loss of one update; with ``alpha = beta = 0`` the token mean of PPO's."""
    low, high = asymmetric_clip(signal, clip=clip, alpha=alpha)
    ratio = (log_prob - old_log_prob).detach().exp()
    gain = redistribute(advantage, signal, ratio, low, high, beta=beta)
    bounds = dict(clip_low=low, clip_high=high, dual_clip=dual_clip)
    return token_mean(clipped_surrogate(log_prob, old_log_prob, gain, **bounds), mask)


def hapo(experience: Experience, *, quantile: float = 0.8, **options: float) -> Loss:
    """The objective: signal and advantage from the whole batch; ``options`` go to `hapo_loss`."""
    return _objective(experience, entropy_signal, quantile, options)


def hapo_released(experience: Experience, *, quantile: float = 0.8, **options: float) -> Loss:
    """`hapo` with `released_entropy_signal`."""
    return _objective(experience, released_entropy_signal, quantile, options)


def _objective(
    experience: Experience, signal_of: Callable, quantile: float, options: dict[str, float]
) -> Loss:
    answers, rewards = experience
    mask = telling(experience)
    grouped = answers.mask.view(*rewards.shape, -1)
    advantage = token_group_advantage(rewards, grouped).view(mask.shape).to(answers.log_prob)
    signal = signal_of(answers.entropy, entropy_scale(answers.entropy, mask, quantile=quantile))

    def loss(log_prob: Tensor, rows: Tensor) -> Tensor:
        parts = (x[rows] for x in (answers.log_prob, advantage, signal, mask))
        return hapo_loss(log_prob, *parts, **options)

    return loss


def next_temperature(
    experience: Experience, *, quantile: float = 0.8, **options: Any
) -> Temperature:
    """For the next sampling, by this batch's entropies; ``options``: of `adaptive_temperature`."""
    answers = experience.rollout
    scale = entropy_scale(answers.entropy, answers.mask, quantile=quantile)
    return lambda logits: adaptive_temperature(logits, scale, **options)


def example() -> Experience:
    """Two prompts with three answers each, of 1 to 6 tokens: every second one is a fork."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([2, 6, 3, 1, 4, 6])
    mask = torch.arange(6) < lengths[:, None]
    fork = torch.arange(6) % 2 == 0
    noise = torch.rand(6, 6, generator=generator, dtype=torch.float64)
    entropy = torch.where(fork, 0.5 + 0.2 * noise, 0.02 * noise) * mask
    log_prob = -torch.where(fork, 0.3 + 0.8 * noise.flip(0), 0.01 * noise.flip(0)) * mask
    ids = torch.cat([torch.zeros(6, 1, dtype=torch.long), torch.arange(36).view(6, 6)], 1)
    rewards = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    return Experience(Rollout(ids, mask, log_prob, entropy), rewards)
