"""The surveys' layers on three small tasks at equal state, and what they cost at growing lengths.

Small models that differ in their mixer only: one block of mixer and MLP, 16 channels, 320 numbers
of state (1,280 bytes; recent inputs of short convolutions apart) and about equally many parameters:
the MLP takes what the mixer leaves. Attention keeps 16 numbers a token, so that it has its 320 at
the tasks' length of 20. Every model sees the id before the present one as well; without that, one
layer of attention could not look for what came after.

An RNN is not among them: a GRU of 320 units has 90 times as many parameters, which is the price of
such a state there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...data import synthetic
from ...data.synthetic import IGNORE, TaskBatch
from ...models.optim import FusedAdamW
from ...state_space.mamba import MambaBlock, initial_dt_bias
from ...state_space.mamba2 import Mamba2Block
from ...state_space.mamba360 import LAYERS, make_layer
from ..scaling import sweep
from . import Row, register, rows

WIDTH, STATE, LENGTH, VOCAB = 16, 20, 20, 12
BATCH, LR, BUDGET = 32, 2e-2, 3600
TIMED = ("S4D", "S5", "Mamba", "Transformer")
NAMES = ("S4D", "Mamba", "Transformer")  # fixed, selective, and everything kept


# --- tasks ----------------------------------------------------------------------------------------


def recall(batch: int, generator: torch.Generator) -> TaskBatch:
    """The first of 20 symbols, asked for at the end: kept over 18 others. Chance 1 in 6."""
    return synthetic.delayed_recall(batch, LENGTH, vocab=12, ask=11, generator=generator)


def copy(batch: int, generator: torch.Generator) -> TaskBatch:
    """Three symbols among 14 blanks, to be said in order at the end. Chance 1 in 6."""
    options = dict(vocab=8, items=3, noise=6, ask=7)
    return synthetic.selective_copy(batch, LENGTH, **options, generator=generator)


def induction(batch: int, generator: torch.Generator) -> TaskBatch:
    """A text that repeats, rows with a period of 4 to 11: what came after this? Chance 1 in 12."""
    options = dict(vocab=12, generator=generator)
    rounds = [synthetic.induction(batch // 8, LENGTH, period=n, **options) for n in range(4, 12)]
    return TaskBatch(*(torch.cat(part) for part in zip(*rounds)))


class Task(NamedTuple):
    """``draw(batch, generator)`` and how many steps of training it gets."""

    draw: Callable[[int, torch.Generator], TaskBatch]
    steps: int


TASKS = {
    "delayed recall": Task(recall, 70),
    "selective copy": Task(copy, 100),
    "induction": Task(induction, 120),
}


# --- a small model --------------------------------------------------------------------------------


class SmallModel(nn.Module):
    """Ids to logits, with one kind of mixer."""

    def __init__(self, name: str, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mixer = _for_short_texts(LAYERS[name](WIDTH, STATE))
            used = sum(p.numel() for p in self.mixer.parameters())
            hidden = max(WIDTH, (BUDGET - used) // (2 * WIDTH))
            self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
            self.here, self.before = nn.Embedding(VOCAB, WIDTH), nn.Embedding(VOCAB + 1, WIDTH)
            self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.here(ids) + self.before(F.pad(ids[:, :-1], (1, 0), value=VOCAB))
        x = x + self.mixer(F.rms_norm(x, (WIDTH,)))[0]
        x = x + self.down(F.gelu(self.up(F.rms_norm(x, (WIDTH,)))))
        return self.head(F.rms_norm(x, (WIDTH,)))


def _for_short_texts(mixer: nn.Module) -> nn.Module:
    """Mamba's first steps, 0.001 to 0.1, are meant for thousands of tokens: here 0.05 to 0.5."""
    with torch.no_grad():
        if isinstance(mixer, MambaBlock):
            mixer.dt_proj.bias.copy_(initial_dt_bias(len(mixer.D), 0.05, 0.5))
        elif isinstance(mixer, Mamba2Block):
            mixer.dt_bias.copy_(initial_dt_bias(len(mixer.D), 0.05, 0.5))
            mixer.A_log.copy_(torch.linspace(1, 2, len(mixer.D)).log())
    return mixer


def train(model: nn.Module, task: Task, *, steps: int | None = None, seed: int = 0) -> list[float]:
    """Fresh sequences at every step; the losses. AdamW, warmed up and cooled down linearly."""
    generator = torch.Generator().manual_seed(1000 + seed)
    steps, losses = task.steps if steps is None else steps, []
    optimiser = FusedAdamW(model.parameters(), LR, betas=(0.9, 0.98), weight_decay=0.01, clip=1.0)
    for n in range(steps):
        ids, targets = task.draw(BATCH, generator)
        scored = targets != IGNORE
        loss = F.cross_entropy(model(ids)[scored], targets[scored])
        losses.append(optimiser.step(loss, min(1.0, (n + 1) / 20, (steps - n) / steps * 2)))
    return losses


@torch.no_grad()
def accuracy(model: nn.Module, task: Task, batch: int = 256) -> float:
    """Share of right answers on sequences that training never draws."""
    ids, targets = task.draw(batch, torch.Generator().manual_seed(7))
    scored = targets != IGNORE
    return (model(ids).argmax(-1)[scored] == targets[scored]).double().mean().item()


# --- time -----------------------------------------------------------------------------------------


def contestants(L: int) -> dict[str, Callable]:
    """A layer of each kind, forward over ``L`` positions, at equal state but for attention."""
    x = torch.randn(1, L, WIDTH, generator=torch.Generator().manual_seed(0))
    made = {name: make_layer(name, WIDTH, 16).float() for name in TIMED}
    return {name: lambda layer=layer: _forward(layer, x) for name, layer in made.items()}


@torch.no_grad()
def _forward(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)[0]


@register("survey-layers", "one layer of each kind over the length (not the same function)")
def survey_layers(quick: bool) -> Iterator[Row]:
    lengths = (32, 64) if quick else (256, 512, 1024, 2048, 4096)
    result = sweep(lengths, contestants, check=None, repeats=3, min_time=0.02)
    yield from rows(result, what="forward", shape=f"B1 C{WIDTH} N16 float32", corelib="S4D")
