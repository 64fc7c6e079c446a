"""Group-relative policy gradients: advantages, the clipped surrogate, GRPO and DAPO.

A prompt is answered ``n`` times, and each answer is judged by its reward alone. What the others of
its group got is the baseline, so no value network is needed (GRPO, Shao et al., arXiv 2402.03300):

    advantage = (reward - mean(rewards of the group)) / std(rewards of the group)
    ratio     = exp(log_prob - old_log_prob)
    loss      = max(-advantage * ratio, -advantage * clip(ratio, 1 - clip_low, 1 + clip_high))

An *objective* maps what was sampled to a loss of the log-probabilities, which is all that methods
differ in: ``objective(experience) -> loss(log_prob, rows)``. `grpo` is the mean over answers of the
mean over each answer's tokens; `dapo` (Yu et al., arXiv 2503.14476) the mean over all tokens, with
more room upwards, of groups that are neither all right nor all wrong. Both without a KL term.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from .rollout import Rollout

EPS = 1e-6  # added to every standard deviation, as in the released trainers


class Experience(NamedTuple):
    """Answers and their ``rewards (Q, n)``: row ``i * n + j`` is answer ``j`` to prompt ``i``."""

    rollout: Rollout
    rewards: Tensor


Loss = Callable[[Tensor, Tensor], Tensor]  # (log_prob (r, T), their rows (r,)) -> scalar
Objective = Callable[[Experience], Loss]


# --- parts ----------------------------------------------------------------------------------------


def group_advantage(rewards: Float[Tensor, "Q n"]) -> Float[Tensor, "Q n"]:
    """Rewards less their group's mean, over its standard deviation (of a sample: ``n - 1``)."""
    if rewards.dim() != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards: expected (Q, n) with n ≥ 2, got {tuple(rewards.shape)}")
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + EPS)


def informative(rewards: Float[Tensor, "Q n"]) -> Bool[Tensor, " Q"]:
    """Groups whose answers are not all equally good: only these say anything (DAPO)."""
    return rewards.amax(1) > rewards.amin(1)


def clipped_surrogate(
    log_prob: Float[Tensor, "*R"],
    old_log_prob: Float[Tensor, "*R"],
    advantage: Float[Tensor, "*R"],
    *,
    clip_low: float | Float[Tensor, "*R"] = 0.2,
    clip_high: float | Float[Tensor, "*R"] = 0.2,
    dual_clip: float | None = None,
) -> Float[Tensor, "*R"]:
    """PPO's loss of each token (Schulman et al., arXiv 1707.06347); the bounds may differ by token.

    ``dual_clip``: where the advantage is negative the loss is at most this times its size, however
    far the ratio has gone up (Ye et al., arXiv 1912.09729).
    """
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip: expected more than 1 or None, got {dual_clip}")
    ratio = (log_prob - old_log_prob).exp()
    clipped = torch.minimum(
        torch.maximum(ratio, 1 - _like(clip_low, ratio)), 1 + _like(clip_high, ratio)
    )
    loss = torch.maximum(-advantage * ratio, -advantage * clipped)
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * dual_clip), loss)
    return loss


def _like(bound: float | Tensor, ratio: Tensor) -> Tensor:
    return torch.as_tensor(bound, dtype=ratio.dtype, device=ratio.device)


def token_mean(values: Float[Tensor, "R T"], mask: Bool[Tensor, "R T"]) -> Float[Tensor, ""]:
    """The mean over all tokens of the mask; 0 when there is none."""
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


def sequence_mean(values: Float[Tensor, "R T"], mask: Bool[Tensor, "R T"]) -> Float[Tensor, ""]:
    """The mean over rows of the mean over each row's tokens; 0 for a row without any."""
    per_row = torch.where(mask, values, 0.0).sum(1) / mask.sum(1).clamp(min=1)
    return per_row.mean()


# --- objectives -----------------------------------------------------------------------------------


def grpo(experience: Experience, *, clip: float = 0.2) -> Loss:
    """Every answer counts alike, whatever its length: a token of a long one counts less."""
    answers, rewards = experience
    advantage = group_advantage(rewards).flatten()[:, None].expand(answers.mask.shape)

    def loss(log_prob: Tensor, rows: Tensor) -> Tensor:
        old, gain = answers.log_prob[rows], advantage[rows]
        each = clipped_surrogate(log_prob, old, gain, clip_low=clip, clip_high=clip)
        return sequence_mean(each, answers.mask[rows])

    return loss


def dapo(experience: Experience, *, clip_low: float = 0.2, clip_high: float = 0.28) -> Loss:
    """Every token counts alike; groups that say nothing are left out (and not sampled anew)."""
    answers, rewards = experience
    advantage = group_advantage(rewards).flatten()[:, None].expand(answers.mask.shape)
    mask = telling(experience)

    def loss(log_prob: Tensor, rows: Tensor) -> Tensor:
        old, gain = answers.log_prob[rows], advantage[rows]
        each = clipped_surrogate(log_prob, old, gain, clip_low=clip_low, clip_high=clip_high)
        return token_mean(each, mask[rows])

    return loss


def telling(experience: Experience) -> Bool[Tensor, "R T"]:
    """The tokens of `informative` groups."""
    answers, rewards = experience
    return answers.mask & informative(rewards).repeat_interleave(rewards.shape[1])[:, None]
