"""DR-RL: a policy picks the rank of queries and keys, layer by layer and segment by segment
(arXiv 2512.15973).

Idea: how many directions queries and keys use depends on the layer and on what is being read. A
small network looks at a segment of 128 tokens and picks one of seven ranks, kept from jumping by a
perturbation bound and rewarded for fidelity less cost.

    scores  = U_q (S_q V_q^T V_k S_k) U_k^T                     rank r, Q_r and K_r never rebuilt
    allowed : |A_r' - A_r|_F = sqrt(sum_{r < i <= r'} sigma_i^2) <= tolerance |A|_F
    reward  = 1.0 cos(exact, low rank) - 0.05 work - 0.1 |A_r' - A_r|_F / |A|_F

| here              | paper             | what                                                  |
|:------------------|:------------------|:------------------------------------------------------|
| RankPolicy        | policy network    | conv, pool, weight statistics, last rank -> 7 logits  |
| encode (64)       | h_t               | sequence dynamics: conv of width 3, ReLU, mean        |
| stats (9)         | w_t               | mean, variance, norm of W_q, W_k, W_v                 |
| explore           | epsilon           | share of uniform choices, 0.1, times 0.995 a step     |
| tolerance         | epsilon_t         | of the mask; ours is constant                         |
| RankEnv           | environment       | cached layers, each rank's outcome (`rank_env`)       |

Exact: the scores are those of truncated Q and K (`low_rank_scores`), a masked rank has probability
0, the best allowed sequence is computed (`oracle`). The square root is exact for best
approximations of *one* matrix; the product of truncated Q and truncated K is none, so that here it
guides and does not guarantee. Ours: change and work are relative, one policy is trained on cached
layers of a frozen model (the paper trains it together with the model's loss, and its released
trainer rewards random numbers), log-probabilities are those of the mixture that was sampled
from, and every decision owes its SVD. The attention of the policy's encoder sees a single token, as
in the released code: it is a linear map.
Cost: a decision is 0.5 million multiplications and the spectra, of order ``(L + D) D^2``; scores
then take ``r / D`` of theirs. Values and softmax are not cheaper, so that at best half is saved.
Oracles: ``torch.linalg.svd``; rewards by loops; the best sequence by trying all.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..models.optim import FusedAdamW
from ..training.policy_gradient import group_advantage
from .low_rank_scores import (
    QKFactors,
    factored_scores,
    factors_from_bases,
    low_rank_attention,
    rank_change_norm,
    rebuild_qk,
    score_error_bound,
    score_spectrum,
    truncate_qk,
    truncate_scores,
    truncated_scores_reference,
)
from .rank_env import (
    RANKS,
    Outcome,
    RankEnv,
    energy_ranks,
    fixed_ranks,
    oracle,
    random_ranks,
    score_work,
    svd_work,
    weight_stats,
)

__all__ = [
    "RANKS",
    "Outcome",
    "QKFactors",
    "RankEnv",
    "RankPolicy",
    "choose",
    "energy_ranks",
    "example",
    "factored_scores",
    "factors_from_bases",
    "fixed_ranks",
    "low_rank_attention",
    "oracle",
    "random_ranks",
    "rank_change_norm",
    "rank_law",
    "rebuild_qk",
    "reinforce",
    "score_error_bound",
    "score_spectrum",
    "score_work",
    "svd_work",
    "truncate_qk",
    "truncate_scores",
    "truncated_scores_reference",
    "weight_stats",
]


class RankPolicy(nn.Module):
    """Looks at a segment, its layer and the last rank; logits of the ranks.

    Args:
        C: width of what the layer reads.
        ranks: how many there are to choose from.
    """

    def __init__(self, C: int, ranks: int = len(RANKS)):
        super().__init__()
        self.conv = nn.Conv1d(C, 64, 3, padding=1)
        self.of_weights = nn.Linear(9, 32)
        self.of_rank = nn.Embedding(ranks, 32)
        block = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, ranks))

    def encode(self, x: Float[Tensor, "N L C"]) -> Float[Tensor, "N 64"]:
        """What a segment is like; the same for every last rank."""
        return self.conv(x.mT).relu().mean(-1)

    def forward(
        self, seen: Float[Tensor, "N 64"], stats: Float[Tensor, "N 9"], last: Int[Tensor, " N"]
    ) -> Float[Tensor, "N A"]:
        """Logits from `encode`'s output, the layer's statistics and the last action."""
        token = torch.cat([seen, self.of_weights(stats), self.of_rank(last)], -1)
        return self.head(self.encoder(token[:, None])[:, 0])


def rank_law(
    logits: Float[Tensor, "N A"], allowed: Bool[Tensor, "N A"], explore: float = 0.0
) -> Float[Tensor, "N A"]:
    """Probabilities: softmax over what is allowed, mixed with ``explore`` of any of these.

    What is not allowed has probability 0, not a small one. Raises ValueError where nothing is.
    """
    if not 0 <= explore <= 1:
        raise ValueError(f"explore: expected a number from 0 to 1, got {explore}")
    if not allowed.any(-1).all():
        raise ValueError("allowed: expected a rank that is allowed in every row, got rows of none")
    greedy = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
    even = allowed.to(logits.dtype) / allowed.sum(-1, keepdim=True)
    return (1 - explore) * greedy + explore * even


@torch.no_grad()
def choose(policy: RankPolicy, env: RankEnv) -> Int[Tensor, "E T"]:
    """The policy's likeliest ranks in every episode of ``env``, under its mask."""
    E, T, _ = env.fidelity.shape
    allowed, out, device = env.allowed, [], env.fidelity.device
    rows = torch.arange(E, device=device)
    seen = policy.encode(env.inputs.flatten(0, 1)).unflatten(0, (E, T))
    last = torch.full((E,), env.start, device=device)
    for t in range(T):
        last = rank_law(policy(seen[:, t], env.stats, last), allowed[rows, t, last]).argmax(-1)
        out.append(last)
    return torch.stack(out, 1)


def reinforce(
    policy: RankPolicy,
    env: RankEnv,
    *,
    steps: int,
    episodes: int = 8,
    rollouts: int = 8,
    lr: float = 1e-3,
    explore: float = 0.1,
    decay: float = 0.995,
    seed: int = 0,
) -> list[float]:
    """Train ``policy`` in place; the mean reward of a decision at each step.

    A step takes some ``episodes``, plays each ``rollouts`` times, and raises the log-probability of
    actions by what came after them, less the group's mean and over its deviation. Learning rate and
    group are ours; the paper's run is not described in what could be read.
    """
    if min(steps, episodes) < 1 or rollouts < 2:
        raise ValueError(
            "steps, episodes, rollouts: expected at least 1, 1 and 2, got "
            f"{steps}, {episodes} and {rollouts}"
        )
    generator = torch.Generator().manual_seed(seed)
    optimiser, curve = FusedAdamW(policy.parameters(), lr, betas=(0.9, 0.999)), []
    rewards, allowed = env.rewards, env.allowed
    for step in range(steps):
        picked = torch.randperm(len(env.stats), generator=generator)[:episodes]
        picked = picked.to(rewards.device)
        rate = explore * decay**step
        log_prob, reward = _play(policy, env, rewards, allowed, picked, rollouts, rate, generator)
        ahead = reward.flip(1).cumsum(1).flip(1)  # (episodes * rollouts, T)
        groups = ahead.mT.unflatten(1, (-1, rollouts))  # (T, episodes, rollouts)
        gain = group_advantage(groups.flatten(0, 1)).view_as(groups).flatten(1).mT
        optimiser.step(-(gain * log_prob).mean())
        curve.append(reward.mean().item())
    return curve


def _play(policy, env, rewards, allowed, picked, rollouts, explore, generator):
    """``log_prob`` and ``reward (episodes * rollouts, T)`` of sampled actions."""
    T = rewards.shape[1]
    seen = policy.encode(env.inputs[picked].flatten(0, 1)).unflatten(0, (-1, T))
    rows, seen = (x.repeat_interleave(rollouts, 0) for x in (picked, seen))
    last, log_probs, got = torch.full((len(rows),), env.start, device=rows.device), [], []
    for t in range(T):
        logits = policy(seen[:, t], env.stats[rows], last)
        law = rank_law(logits, allowed[rows, t, last], explore)
        action = torch.multinomial(law.detach().cpu(), 1, generator=generator).to(law.device)
        log_probs.append(law.gather(1, action)[:, 0].log())
        got.append(rewards[rows, t, last, action[:, 0]])
        last = action[:, 0]
    return torch.stack(log_probs, 1), torch.stack(got, 1)


def example() -> dict:
    """Queries that use two directions and keys that use three, of four.

    >>> factors = truncate_qk(**example(), rank=2)
    >>> [tuple(part.shape) for part in factors]
    [(1, 2, 6, 2), (1, 2, 2, 2), (1, 1, 6, 2)]
    """
    generator = torch.Generator().manual_seed(0)
    thin = (((2, 6, 2), (2, 4)), ((1, 6, 3), (3, 4)))
    q, k = (torch.matmul(*(torch.randn(s, generator=generator) for s in pair)) for pair in thin)
    return dict(q=q[None], k=k[None])
