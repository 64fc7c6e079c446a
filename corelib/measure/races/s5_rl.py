"""Learning in context, recorded: an agent with S5 memory on trials through random projections.

`RecurrentPPO` trains an agent of two S5 blocks on `RandomProjection` of `Reach` in one dimension:
two signs are unknown, what is seen and what a push does, and stay for a trial of two episodes of
four steps. What tells that it learns *in context* is the reward of each step of fresh trials, after
training: the second episode's first step comes before anything of that episode was tried.

    python -m corelib.measure.races.s5_rl          # trains and writes s5_rl.json

`recorded` reads the runs that are shipped.
"""

from __future__ import annotations

import functools
import json
import pathlib
import time

import torch

from ...state_space.s5_rl import ActorCritic, RandomProjection, Reach, RecurrentPPO, S5Block

RUNS = pathlib.Path(__file__).with_suffix(".json")
SEEDS, ROLLOUTS, LR = range(3), 160, 5e-3
STEPS, EPISODES, ENVIRONMENTS, WIDTH = 4, 2, 256, 16


def agent(seed: int) -> RecurrentPPO:
    """Untrained, with its own environments."""
    torch.manual_seed(seed)
    reach = Reach(1, ENVIRONMENTS, steps=STEPS, seed=seed)
    task = RandomProjection(reach, episodes=EPISODES, seed=seed)
    memory = [S5Block(WIDTH, WIDTH, step_min=0.05, step_max=0.5) for _ in range(2)]
    options = dict(steps=STEPS * EPISODES, entropy_weight=0.0, discount=0.9, lr=LR, seed=seed)
    return RecurrentPPO(ActorCritic(task, memory, WIDTH), task, **options)


def run(seed: int, rollouts: int = ROLLOUTS) -> dict:
    """Train with a learning rate that falls to 0; mean reward of each step before and after."""
    ppo, began = agent(seed), time.process_time()
    before = ppo.collect().reward.mean(0)
    curve = []
    for i in range(rollouts):
        curve += ppo.train(1, share=1 - i / rollouts)
    after = torch.stack([ppo.collect().reward.mean(0) for _ in range(4)]).mean(0)
    rounded = {"before": before, "after": after, "curve": torch.tensor(curve)}
    rounded = {name: [round(v, 3) for v in x.tolist()] for name, x in rounded.items()}
    return {"seed": seed, "seconds": round(time.process_time() - began, 1), **rounded}


@functools.cache
def recorded() -> list[dict]:
    """One run a seed: ``before`` and ``after`` by step of a trial, ``curve`` by rollout."""
    return json.loads(RUNS.read_text(encoding="utf-8"))["runs"]


def main() -> None:
    runs = [run(seed) for seed in SEEDS]
    stored = {"command": "python -m corelib.measure.races.s5_rl", "runs": runs}
    lines = json.dumps(stored).replace('{"seed"', '\n{"seed"')
    RUNS.write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
