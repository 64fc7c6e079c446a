"""HAPO against GRPO and DAPO: what an update costs, and what a small policy learns in equal steps.

Policies of `corelib.training.clock.ClockWalk`: a decoder of one layer imitates somebody who moves
at random, then every objective goes on from that same start, with fresh prompts of the same seeds.
The accuracy at the end is that of sampled answers (temperature 1) to all prompts, 20 of each.

    python -m corelib.measure.races.hapo          # runs what is missing in hapo.json, saves each

`recorded` reads the runs that are shipped.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch

from ...models.cache import DenseCache
from ...models.decoder import Decoder, DecoderConfig, sampler
from ...training import hapo as method
from ...training.clock import ClockWalk
from ...training.policy_gradient import Experience, Objective, dapo, grpo
from ...training.policy_training import collect, imitate, summary, train
from ...training.rollout import answer_stats, rollout
from . import Row, register, rows

RUNS = pathlib.Path(__file__).with_suffix(".json")
TASK = ClockWalk()
STEPS, SEEDS, LR = 80, range(9), 2e-3
FRESH = range(5, 9)  # seeds that ran after `while_learning` had been chosen on the others
#: Name -> objective, and how the temperature follows the entropies (None: it stays 1).
METHODS: dict[str, tuple[Objective, Callable | None]] = {
    "GRPO": (grpo, None),
    "DAPO": (dapo, None),
    "HAPO": (method.hapo, method.next_temperature),
    "HAPO, released signal": (
        method.hapo_released,
        functools.partial(method.next_temperature, signal_of=method.released_entropy_signal),
    ),
}


def start_policy(seed: int = 0, steps: int = 120) -> Decoder:
    """A policy that calculates, nearly always, and moves at random."""
    sizes = dict(width=32, layers=1, heads=2, kv_heads=2, head_width=16, hidden=96, context=64)
    model = Decoder(DecoderConfig(vocab=TASK.vocab, **sizes, qkv_bias=True), seed=seed)
    imitate(model, TASK.demonstrations, steps=steps, lr=1e-2, seed=seed)
    return model


def describe(experience: Experience) -> dict[str, float]:
    """`summary`, and the entropy of forks and of the tokens that follow."""
    answers = experience.rollout
    fork = TASK.forks(answers.answers)
    return summary(experience) | {
        "fork": answers.entropy[answers.mask & fork].mean().item(),
        "follow": answers.entropy[answers.mask & ~fork].mean().item(),
    }


def accuracy(model: Decoder, answers: int = 20, seed: int = 0) -> float:
    """Share of right answers, so many sampled for every prompt."""
    asked = TASK.every_prompt().repeat_interleave(answers, 0)
    options = dict(chooser=sampler(seed), eos=TASK.eos, new_cache=DenseCache)
    return TASK.rewards(asked, rollout(model, asked, TASK.longest, **options).answers).mean().item()


def learn(start: Decoder, name: str, seed: int, steps: int = STEPS, *, answers: int = 20) -> dict:
    """One run: its curves, step by step, and the `accuracy` before and after."""
    objective, heat = METHODS[name]
    model, began = copy.deepcopy(start), time.perf_counter()
    options = dict(lr=LR, chooser=sampler(seed), new_cache=DenseCache, describe=describe)
    curve = train(model, TASK, objective, steps=steps, seed=seed, next_temperature=heat, **options)
    seconds = time.perf_counter() - began
    run = {key: [round(point[key], 3) for point in curve] for key in curve[0]}
    before, after = (round(accuracy(one, answers), 4) for one in (start, model))
    told = {"method": name, "seed": seed, "before": before, "after": after}
    return told | {"seconds": round(seconds, 1)} | run


def recorded() -> list[dict]:
    """The shipped runs: method, seed, accuracies, and curves of `STEPS` numbers."""
    return json.loads(RUNS.read_text(encoding="utf-8"))["runs"]


def while_learning(run: dict) -> float:
    """The mean reward of all steps: who learns earlier has more."""
    return statistics.mean(run["reward"])


def after(run: dict) -> float:
    """The accuracy at the end."""
    return run["after"]


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % interval (Student's t), of 2 to 10 values."""
    t = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)[len(values) - 2]
    mean, half = statistics.mean(values), t * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


@register("hapo-update", "the loss and gradient of one update, by the tokens of an answer")
def hapo_update(quick: bool) -> Iterator[Row]:
    from ..scaling import sweep

    model = start_policy(steps=2)

    def contestants(length: int) -> dict[str, Callable]:
        task = ClockWalk(most_moves=length // 2)
        options = dict(chooser=sampler(0), new_cache=DenseCache)
        batch = collect(
            model, task, prompts=4, group=4, generator=torch.Generator().manual_seed(0), **options
        )
        batch.rewards[:, 0] = 1 - batch.rewards[:, 1]  # no group without a signal
        everyone = torch.arange(len(batch.rollout.ids))

        def gradient(objective: Objective) -> None:
            model.zero_grad()
            objective(batch)(answer_stats(model, batch.rollout).log_prob, everyone).backward()

        objectives = {"corelib": method.hapo, "DAPO": dapo, "GRPO": grpo}
        return {name: functools.partial(gradient, one) for name, one in objectives.items()}

    lengths = (16, 32) if quick else (16, 32, 64, 128, 256)
    result = sweep(lengths, contestants, check=None, repeats=3, min_time=0.05)
    yield from rows(result, what="one update", shape="R16 C32 vocab33 float32")


@register(
    "hapo-learning", "a small policy in the same number of steps: reward on the way, accuracy"
)
def hapo_learning(quick: bool) -> Iterator[Row]:
    """Seconds are per step; what was reached stands in ``what``."""
    seeds, steps = ((0, 1), 2) if quick else (SEEDS, STEPS)
    starts = {seed: start_policy(seed, steps=20 if quick else 120) for seed in seeds}
    for name in METHODS:
        done = [learn(starts[seed], name, seed, steps) for seed in seeds]
        on_the_way, end = (interval([score(r) for r in done]) for score in (while_learning, after))
        what = "reward on the way {:.1%} [{:.1%}, {:.1%}]".format(*on_the_way)
        what += ", accuracy at the end {:.1%} [{:.1%}, {:.1%}]".format(*end)
        seconds = statistics.median(run["seconds"] for run in done) / steps
        yield Row(what, f"{len(done)} seeds, {steps} steps", name, seconds)


def main(seeds: int = len(SEEDS)) -> None:
    """Run what is missing of the first ``seeds`` seeds; every run is saved when it ends."""
    done = recorded() if RUNS.exists() else []
    for seed in range(seeds):
        missing = [
            n for n in METHODS if not any((r["method"], r["seed"]) == (n, seed) for r in done)
        ]
        start = start_policy(seed) if missing else None
        for name in missing:
            done.append(learn(start, name, seed))
            print(seed, name, {k: done[-1][k] for k in ("before", "after", "seconds")}, flush=True)
            stored = {"command": "python -m corelib.measure.races.hapo", "runs": done}
            lines = json.dumps(stored).replace('{"method"', '\n{"method"')
            RUNS.write_text(lines + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
