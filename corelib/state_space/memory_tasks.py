"""Tasks for agents that must remember: many copies at once, each begun anew as soon as it ends.

* `MemoryChain` (Osband et al., "Behaviour Suite", arXiv 1908.03568): a cue is shown once; a number
  of steps later the agent is asked for it, and only that answer counts.
* `Reach`: push a point to the origin. Simple, and everything is seen.
* `RandomProjection` (Lu et al., arXiv 2303.03982, section 5): another task's observations and
  actions seen through random matrices, which are drawn anew for every *trial* of a few episodes.
  Whoever remembers the trial so far can find out what the matrices are, and do better in its later
  episodes: learning in context.

`Environment` is what all of them keep, and what `corelib.state_space.s5_rl` trains on.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Step(NamedTuple):
    """What ``batch`` copies answer to their actions.

    Where ``done (B,)``, the episode is over with ``reward (B,)`` and ``observation (B, O)`` is the
    first of the next one: there the agent's memory starts afresh.
    """

    observation: Float[Tensor, "B O"]
    reward: Float[Tensor, " B"]
    done: Bool[Tensor, " B"]


@runtime_checkable
class Environment(Protocol):
    """``batch`` copies of a task. Either ``choices`` or ``pushes`` is not 0.

    Attributes:
        observation: numbers in an observation.
        choices: number of actions to choose one of (actions are whole numbers ``(B,)``), or 0.
        pushes: numbers in an action ``(B, pushes)``, or 0.
    """

    batch: int
    observation: int
    choices: int
    pushes: int

    def start(self) -> Tensor: ...

    def step(self, action: Tensor) -> Step: ...


class MemoryChain:
    """Remember a bit: shown at the first of ``delay + 1`` steps, asked for at the last.

    Observations are (time left from 1 to 0, 1 when asked, the bit as -1 or 1 when shown). The last
    action earns 1 if it is the bit (0 or 1), else -1; all others earn nothing. Guessing earns 0.
    """

    observation, choices, pushes = 3, 2, 0

    def __init__(self, delay: int, batch: int, *, seed: int = 0):
        if delay < 1 or batch < 1:
            raise ValueError(f"delay, batch: expected at least 1, got {delay} and {batch}")
        self.delay, self.batch = delay, batch
        self.generator = torch.Generator().manual_seed(seed)

    def start(self) -> Float[Tensor, "B 3"]:
        """All copies from the beginning."""
        self.time = torch.zeros(self.batch, dtype=torch.long)
        self.bit = self._bits()
        return self._seen()

    def step(self, action: Tensor) -> Step:
        """Time passes; after the answer the next episode begins."""
        done = self.time == self.delay
        reward = torch.where(done, 2.0 * (action == self.bit) - 1.0, 0.0)
        self.bit = torch.where(done, self._bits(), self.bit)
        self.time = torch.where(done, 0, self.time + 1)
        return Step(self._seen(), reward, done)

    def _bits(self) -> Tensor:
        return torch.randint(2, (self.batch,), generator=self.generator)

    def _seen(self) -> Tensor:
        cue = torch.where(self.time == 0, 2.0 * self.bit - 1.0, 0.0)
        return torch.stack([1 - self.time / self.delay, 1.0 * (self.time == self.delay), cue], -1)


class Reach:
    """Push a point to the origin in episodes of ``steps``: ``point += speed * action``.

    The point is what is seen; each number of an action counts within -1 .. 1. The reward of a step
    is minus the square of the distance after it; points start at distance 1.
    """

    choices = 0

    def __init__(self, dims: int, batch: int, *, steps: int = 6, speed: float = 0.5, seed: int = 0):
        if dims < 1 or batch < 1 or steps < 1:
            got = f"{dims}, {batch} and {steps}"
            raise ValueError(f"dims, batch, steps: expected at least 1, got {got}")
        self.observation = self.pushes = dims
        self.batch, self.steps, self.speed = batch, steps, speed
        self.generator = torch.Generator().manual_seed(seed)

    def start(self) -> Float[Tensor, "B O"]:
        """All copies from the beginning."""
        self.time = torch.zeros(self.batch, dtype=torch.long)
        self.point = self._begin()
        return self.point

    def step(self, action: Float[Tensor, "B O"]) -> Step:
        """Move; after the last step of an episode the next one begins somewhere else."""
        self.point = self.point + self.speed * action.clamp(-1, 1)
        reward = -self.point.square().sum(-1)
        self.time = self.time + 1
        done = self.time == self.steps
        self.point = torch.where(done[:, None], self._begin(), self.point)
        self.time = torch.where(done, 0, self.time)
        return Step(self.point, reward, done)

    def _begin(self) -> Tensor:
        place = torch.randn(self.batch, self.observation, generator=self.generator)
        return place / place.norm(dim=-1, keepdim=True)


class RandomProjection:
    """A task seen and steered through random orthogonal matrices, fixed for ``episodes`` at a time.

    Observations are (the other task's times a matrix, the last action, 1 where an episode begins,
    1 where a trial begins); actions reach the task times another matrix. ``done`` is the end of a
    trial: within it, memory goes on from episode to episode.
    """

    choices = 0

    def __init__(self, environment: Environment, *, episodes: int = 3, seed: int = 0):
        if not environment.pushes:
            raise ValueError("environment: expected actions that are numbers, got choices")
        if episodes < 1:
            raise ValueError(f"episodes: expected at least 1, got {episodes}")
        self.inner, self.episodes = environment, episodes
        self.batch, self.pushes = environment.batch, environment.pushes
        self.observation = environment.observation + environment.pushes + 2
        self.generator = torch.Generator().manual_seed(seed)

    def start(self) -> Float[Tensor, "B O"]:
        """All copies from the beginning of a trial."""
        self.looking = self._matrices(self.inner.observation)
        self.steering = self._matrices(self.pushes)
        self.episode = torch.zeros(self.batch, dtype=torch.long)
        began = torch.ones(self.batch, dtype=torch.bool)
        nothing = torch.zeros(self.batch, self.pushes)
        return self._seen(self.inner.start(), nothing, began, began)

    def step(self, action: Float[Tensor, "B K"]) -> Step:
        """One step of the task; after the last episode of a trial, new matrices."""
        steered = (self.steering @ action[..., None])[..., 0]
        inside = self.inner.step(steered)
        self.episode = self.episode + inside.done
        done = self.episode == self.episodes
        self.episode = torch.where(done, 0, self.episode)
        fresh = done[:, None, None]
        self.looking = torch.where(fresh, self._matrices(self.inner.observation), self.looking)
        self.steering = torch.where(fresh, self._matrices(self.pushes), self.steering)
        last = torch.where(done[:, None], 0.0, action)
        return Step(self._seen(inside.observation, last, inside.done, done), inside.reward, done)

    def _seen(self, observation: Tensor, action: Tensor, episode: Tensor, trial: Tensor) -> Tensor:
        looked = (self.looking @ observation[..., None])[..., 0]
        flags = torch.stack([episode, trial], -1).to(looked.dtype)
        return torch.cat([looked, action, flags], -1)

    def _matrices(self, size: int) -> Tensor:
        """Uniform over all orthogonal matrices: the signs of R's diagonal are moved into Q."""
        Q, R = torch.linalg.qr(torch.randn(self.batch, size, size, generator=self.generator))
        return Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
