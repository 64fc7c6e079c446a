"""Training a small policy: imitate demonstrations first, then sample, reward and improve.

A policy is any model that keeps `corelib.contracts.LanguageModel`; a task is an `Environment`; an
objective of `policy_gradient` (or of a paper's module) says what is learnt from a batch of answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..contracts import Chooser
from .policy_gradient import Experience, Objective, token_mean
from .rollout import Rollout, Temperature, answer_stats, rollout


@runtime_checkable
class Environment(Protocol):
    """A verifiable task: prompts of one length, and rewards that are computed, not judged."""

    eos: int
    longest: int

    def prompts(self, count: int, generator: torch.Generator) -> Tensor: ...

    def rewards(self, prompts: Tensor, answers: Tensor) -> Tensor: ...


def collect(
    model: nn.Module,
    environment: Environment,
    *,
    prompts: int,
    group: int,
    chooser: Chooser,
    generator: torch.Generator,
    new_cache: Callable[[], Any],
    temperature: Temperature = 1.0,
) -> Experience:
    """``group`` answers to each of so many fresh prompts, and their rewards."""
    asked = environment.prompts(prompts, generator).repeat_interleave(group, 0)
    sampled = rollout(
        model,
        asked,
        environment.longest,
        chooser=chooser,
        eos=environment.eos,
        new_cache=new_cache,
        temperature=temperature,
    )
    rewards = environment.rewards(asked, sampled.answers)
    return Experience(sampled, rewards.view(prompts, group))


def improve(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    objective: Objective,
    *,
    updates: int = 2,
    generator: torch.Generator,
    clip_norm: float = 1.0,
) -> None:
    """One pass over the experience in ``updates`` equal parts, drawn at random."""
    loss, answers = objective(experience), experience.rollout
    for rows in torch.randperm(len(answers.ids), generator=generator).chunk(updates):
        part = Rollout(*(x[rows] for x in answers))
        optimizer.zero_grad(set_to_none=True)
        loss(answer_stats(model, part).log_prob, rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()


def train(
    model: nn.Module,
    environment: Environment,
    objective: Objective,
    *,
    steps: int,
    lr: float,
    chooser: Chooser,
    new_cache: Callable[[], Any],
    prompts: int = 16,
    group: int = 8,
    updates: int = 2,
    seed: int = 0,
    next_temperature: Callable[[Experience], Temperature] | None = None,
    describe: Callable[[Experience], dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """``steps`` times `collect` and `improve`, with Adam; a description of every step's answers.

    Args:
        model: the policy, changed in place.
        environment: what it is to learn.
        objective: how.
        next_temperature: ``experience -> temperature`` of the step that follows (1 in the first).
        describe: ``experience -> names and values``; by default `summary`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator, temperature, curve = torch.Generator().manual_seed(seed), 1.0, []
    for _ in range(steps):
        experience = collect(
            model,
            environment,
            prompts=prompts,
            group=group,
            chooser=chooser,
            generator=generator,
            new_cache=new_cache,
            temperature=temperature,
        )
        improve(model, optimizer, experience, objective, updates=updates, generator=generator)
        curve.append((describe or summary)(experience))
        if next_temperature is not None:
            temperature = next_temperature(experience)
    return curve


def imitate(
    model: nn.Module,
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    *,
    steps: int,
    lr: float,
    rows: int = 64,
    seed: int = 0,
) -> list[float]:
    """The supervised phase: next tokens of demonstrations; the loss of every step, in nats.

    ``draw(rows, generator) -> (ids (R, L), said (R, L))``: which ids are to be learnt. The learning
    rate rises over the first twentieth of the steps and falls linearly over the last half.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    generator, losses = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        rate = min(1.0, 20 * (step + 1) / steps, 2 * (1 - step / steps))
        optimizer.param_groups[0]["lr"] = lr * rate
        ids, said = draw(rows, generator)
        logits, wanted = model(ids[:, :-1]), said[:, 1:]
        loss = nn.functional.cross_entropy(logits[wanted], ids[:, 1:][wanted])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def summary(experience: Experience) -> dict[str, float]:
    """Means over a batch: ``reward``, ``entropy`` (nats a token), ``length`` (tokens an answer)."""
    answers, rewards = experience
    return {
        "reward": rewards.mean().item(),
        "entropy": token_mean(answers.entropy, answers.mask).item(),
        "length": answers.lengths.double().mean().item(),
    }
