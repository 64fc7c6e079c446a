"""PPO for an agent with a memory: rollouts step by step, learned from in one parallel pass.

A rollout is collected with `ActorCritic.step` and learned from with `ActorCritic.forward`, from the
state in which each environment began it, across the ends of episodes, where the memory's state is
reset (Lu et al., arXiv 2303.03982, section 4). Before the first update both say the same of every
action; after it the stored state belongs to older parameters, as in the released code.

    advantage[t] = surprise[t] + discount trace advantage[t+1]      (0 behind an end)
    surprise[t]  = reward[t] + discount value[t+1] - value[t]

which is one more scan with resets, from the end (`advantages`). The loss is PPO's clipped surrogate
(`corelib.training.policy_gradient`), the values' clipped error, and an entropy bonus. Any memory
will do that takes resets: `S5Layer`, `S5Block`, or a recurrent network.
Oracles: advantages by a loop; acting step by step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from corelib.primitives.diagonal_scan import diagonal_scan

from ..models.optim import FusedAdamW
from ..training.policy_gradient import clipped_surrogate
from ..training.rollout import token_stats
from .memory_tasks import Environment

# --- an agent that remembers ----------------------------------------------------------------------


class ActorCritic(nn.Module):
    """Observation → encoder → memory → what to do, and how much reward is to come.

    Args:
        environment: whose observations and actions; it is not kept.
        memory: layers on ``(B, L, width)`` one after the other, each a sequence mixer whose
            ``forward(x, state, resets)`` and ``step(x_t, state, reset)`` take resets and whose
            state is one tensor with the batch first.
        width: of everything.
    """

    def __init__(self, environment: Environment, memory: Sequence[nn.Module], width: int):
        super().__init__()
        self.choices = environment.choices
        self.encode = nn.Sequential(nn.Linear(environment.observation, width), nn.GELU())
        self.memory = nn.ModuleList(memory)
        self.act = _head(width, environment.choices or 2 * environment.pushes, scale=0.01)
        self.judge = _head(width, 1, scale=1.0)

    def forward(
        self, observation: Float[Tensor, "B L O"], state: list[Tensor], resets: Bool[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B L K"], Float[Tensor, "B L"], list[Tensor]]:
        """A whole rollout: what `law_of_actions` reads, values, and the state behind it."""
        y, after = self.encode(observation), []
        for layer, before in zip(self.memory, state, strict=True):
            y, s = layer(y, before, resets)
            after.append(s)
        return self.act(y), self.judge(y)[..., 0], after

    def step(
        self, observation: Float[Tensor, "B O"], state: list[Tensor], reset: Bool[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B K"], Float[Tensor, " B"], list[Tensor]]:
        """One moment of it."""
        y, after = self.encode(observation), []
        for layer, before in zip(self.memory, state, strict=True):
            y, s = layer.step(y, before, reset)
            after.append(s)
        return self.act(y), self.judge(y)[..., 0], after

    def init_state(self, batch: int) -> list[Tensor]:
        """Of every layer of the memory."""
        return [layer.init_state(batch) for layer in self.memory]

    def sample(self, law: Float[Tensor, "B K"], generator: torch.Generator) -> Tensor:
        """An action for each row."""
        if self.choices:
            drawn = torch.multinomial(law.softmax(-1).cpu(), 1, generator=generator)
            return drawn[..., 0].to(law.device)
        mean, log_deviation = law.chunk(2, -1)
        noise = torch.randn(mean.shape, generator=generator, dtype=law.dtype).to(law.device)
        return mean + log_deviation.exp() * noise

    def log_prob(self, law: Float[Tensor, "*R K"], action: Tensor) -> tuple[Tensor, Tensor]:
        """Of actions that were taken, and the entropy of their law (nats), ``(*R)`` each."""
        if self.choices:
            return token_stats(law, action)
        mean, log_deviation = law.chunk(2, -1)
        law = torch.distributions.Normal(mean, log_deviation.exp(), validate_args=False)
        return law.log_prob(action).sum(-1), law.entropy().sum(-1)


def _head(width: int, out: int, scale: float) -> nn.Sequential:
    head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, out))
    nn.init.orthogonal_(head[-1].weight, scale)
    nn.init.zeros_(head[-1].bias)
    return head


# --- proximal policy optimisation -----------------------------------------------------------------


class Rollout(NamedTuple):
    """``L`` steps of ``B`` environments: every tensor ``(B, L, ...)``, and where it began.

    ``resets``: this observation is the first of an episode; ``done``: this action was the last.
    """

    observation: Tensor
    resets: Tensor
    action: Tensor
    log_prob: Tensor
    value: Tensor
    reward: Tensor
    done: Tensor
    state: list[Tensor]  # (B, ...) of each layer, before the first step
    next_value: Tensor  # (B,) of the observation behind the last step


def advantages(
    reward: Float[Tensor, "B L"],
    value: Float[Tensor, "B L"],
    done: Bool[Tensor, "B L"],
    next_value: Float[Tensor, " B"],
    *,
    discount: float = 0.99,
    trace: float = 0.95,
) -> Float[Tensor, "B L"]:
    """Generalised advantages (Schulman et al., arXiv 1506.02438): a reversed scan with resets."""
    ahead = torch.cat([value, next_value[:, None]], 1)[:, 1:].masked_fill(done, 0)
    surprise = reward + discount * ahead - value
    decay = surprise.new_full((1,), discount * trace)
    return diagonal_scan(decay, surprise[..., None], reset=done, reverse=True)[..., 0]


class RecurrentPPO:
    """PPO (Schulman et al., arXiv 1707.06347) for an agent with a memory.

    Args:
        policy: changed in place.
        environment: moves on with every rollout.
        steps: of a rollout; episodes may be shorter or longer.
        epochs, parts: how often a rollout is learned from, and in how many groups of environments.
        lr: Adam's.
        clip: of the ratio, and of how far a value may move.
    """

    def __init__(
        self, policy: ActorCritic, environment: Environment, *, steps: int, epochs: int = 4,
        parts: int = 1, lr: float = 3e-3, discount: float = 0.99, trace: float = 0.95,
        clip: float = 0.2, entropy_weight: float = 0.01, value_weight: float = 0.5,
        clip_norm: float = 0.5, seed: int = 0,
    ):  # fmt: skip
        if not 1 <= parts <= environment.batch:
            raise ValueError(f"parts: expected 1 to {environment.batch}, got {parts}")
        if steps < 1 or epochs < 1:
            raise ValueError(f"steps, epochs: expected at least 1, got {steps} and {epochs}")
        self.policy, self.environment = policy, environment
        self.steps, self.epochs, self.parts = steps, epochs, parts
        self.discount, self.trace, self.clip = discount, trace, clip
        self.entropy_weight, self.value_weight = entropy_weight, value_weight
        self.generator = torch.Generator().manual_seed(seed)
        self._optimiser = FusedAdamW(
            policy.parameters(), lr, betas=(0.9, 0.999), eps=1e-5, clip=clip_norm
        )
        everyone = torch.ones(environment.batch, dtype=torch.bool)
        self._now = environment.start(), policy.init_state(environment.batch), everyone

    @torch.no_grad()
    def collect(self) -> Rollout:
        """The next steps of all environments, from where they stand."""
        (seen, state, reset), kept = self._now, []
        begin = state
        for _ in range(self.steps):
            law, value, state = self.policy.step(seen, state, reset)
            action = self.policy.sample(law, self.generator)
            log_prob = self.policy.log_prob(law, action)[0]
            after = self.environment.step(action)
            kept.append((seen, reset, action, log_prob, value, after.reward, after.done))
            seen, reset = after.observation, after.done
        self._now = seen, state, reset
        next_value = self.policy.step(seen, state, reset)[1]
        return Rollout(*(torch.stack(x, 1) for x in zip(*kept)), begin, next_value)

    def loss(self, rollout: Rollout, gain: Tensor, rows: Tensor) -> Tensor:
        """The clipped surrogate, the values' error and the entropy, of some environments."""
        part = Rollout(*(x[rows] for x in rollout[:7]), [s[rows] for s in rollout.state], None)
        law, value, _ = self.policy(part.observation, part.state, part.resets)
        log_prob, entropy = self.policy.log_prob(law, part.action)
        wanted = gain[rows] + part.value
        near = part.value + (value - part.value).clamp(-self.clip, self.clip)
        miss = torch.maximum((value - wanted).square(), (near - wanted).square()).mean() / 2
        gain = (gain[rows] - gain[rows].mean()) / (gain[rows].std() + 1e-8)
        bounds = dict(clip_low=self.clip, clip_high=self.clip)
        act = clipped_surrogate(log_prob, part.log_prob, gain, **bounds).mean()
        return act + self.value_weight * miss - self.entropy_weight * entropy.mean()

    def learn(self, rollout: Rollout, share: float = 1.0) -> None:
        """``epochs`` times ``parts`` steps of Adam, at ``share`` of the learning rate."""
        told = (rollout.reward, rollout.value, rollout.done, rollout.next_value)
        gain = advantages(*told, discount=self.discount, trace=self.trace)
        for _ in range(self.epochs):
            order = torch.randperm(self.environment.batch, generator=self.generator)
            for rows in order.chunk(self.parts):
                self._optimiser.step(self.loss(rollout, gain, rows), share)

    def train(self, rollouts: int, share: float = 1.0) -> list[float]:
        """So many rollouts, learned from; the reward of each over the episodes ended in it."""
        curve = []
        for _ in range(rollouts):
            rollout = self.collect()
            self.learn(rollout, share)
            ended = int(rollout.done.sum())
            curve.append(rollout.reward.sum().item() / ended if ended else float("nan"))
        return curve
