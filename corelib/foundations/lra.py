"""Long Range Arena: A Benchmark for Efficient Transformers (Tay et al., arXiv 2011.04006).

Six classification tasks on long sequences, and one small model per mixer that is the same but for
the mixer: whoever gets more right has the better mixer, not the better recipe. Here the generators
(`corelib.data`), two sizes of the arena, scoring, reference solvers and a harness for any mixer.

    accuracy = right / n                          what a model scores on n fresh examples
    centre ± half  (`wilson`)                     the 95 % interval around it
    chance = share of the commonest label         what a model scores that reads nothing
    span = mean_i sum_j weights[i, j] |i - j|     how far attention reaches (paper, section 2.3)

====================  =====================  ==================================================
code                  paper                  here
====================  =====================  ==================================================
``listops``           ListOps, 500-2,000     the paper's grammar, exactly
``text``              IMDb bytes, 4,096      which of four works a window of bytes is from
``retrieval``         AAN bytes, 2 x 4,096   whether two windows are from one work
``image``             grey CIFAR-10, 1,024   handwritten digits, pixel by pixel
``pathfinder``        32 x 32 = 1,024        our renderer, three grey levels
``pathx``             128 x 128 = 16,384     the same, larger
====================  =====================  ==================================================

Exact: the grammar of ListOps and every label. Stand-ins: texts and images (the paper's cannot
ship), so its accuracies and ours are not comparable, apart from ListOps. Left out: its model
sizes and training lengths (5 to 60 thousand steps on accelerators). Filling is an ordinary token to
the mixers; the sum over positions skips it. Cost: `train_and_score` takes seconds on one core at
`lab_arena`'s size. Oracles: independent solvers, scipy for the interval.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..data import LabelledBatch
from ..measure.score import Score, wilson
from ..models.optim import FusedAdamW, warm_cosine
from .lra_tasks import Task, full_arena, lab_arena

__all__ = [
    "LRA_2020",
    "PAPER_TASKS",
    "Classifier",
    "Result",
    "Score",
    "Task",
    "attention_span",
    "evaluate",
    "full_arena",
    "lab_arena",
    "score",
    "train_and_score",
    "wilson",
]

Predict = Callable[[LabelledBatch], Int[Tensor, " B"]]

#: Accuracy in percent on ListOps, Text, Retrieval, Image and Pathfinder: the paper's table 1. On
#: Path-X none did better than guessing.
LRA_2020 = {
    "Transformer": (36.37, 64.27, 57.46, 42.44, 71.40),
    "Local Attention": (15.82, 52.98, 53.39, 41.46, 66.63),
    "Sparse Transformer": (17.07, 63.58, 59.59, 44.24, 71.71),
    "Longformer": (35.63, 62.85, 56.89, 42.22, 69.71),
    "Linformer": (35.70, 53.94, 52.27, 38.56, 76.34),
    "Reformer": (37.27, 56.10, 53.40, 38.07, 68.50),
    "Sinkhorn Transformer": (33.67, 61.20, 53.83, 41.23, 67.45),
    "Synthesizer": (36.99, 61.68, 54.67, 41.61, 69.45),
    "BigBird": (36.05, 64.02, 59.29, 40.83, 74.87),
    "Linear Transformer": (16.13, 65.90, 53.09, 42.34, 75.30),
    "Performer": (18.01, 65.40, 53.82, 42.77, 77.05),
}
#: What `train_and_score` does not change: torch's defaults.
BETAS = (0.9, 0.999)
PAPER_TASKS = ("listops", "text", "retrieval", "image", "pathfinder")


# ---- scoring


def score(said: Int[Tensor, " B"], labels: Int[Tensor, " B"]) -> Score:
    """How many of ``labels`` were said; chance is the share of the commonest label."""
    if said.shape != labels.shape:
        raise ValueError(f"said: expected shape {tuple(labels.shape)}, got {tuple(said.shape)}")
    commonest = int(labels.bincount().max())
    return Score(int((said == labels).sum()), len(labels), commonest / len(labels))


def evaluate(task: Task, predict: Predict, *, n: int = 500, seed: int = 0) -> Score:
    """The score of anything that answers a batch: a solver, a rule of thumb, a trained model."""
    batch = task.examples(n, "test", seed)
    return score(predict(batch), batch.labels)


# ---- the harness


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, mixer: nn.Module, width: int):
        super().__init__()
        self.mixer, self.before, self.between = mixer, nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Float[Tensor, "B L C"]) -> Float[Tensor, "B L C"]:
        x = x + self.mixer(self.before(x))[0]
        return x + self.mlp(self.between(x))


class Classifier(nn.Module):
    """Tokens and learnt positions, blocks with the mixer in question, a sum, a linear read-out.

    What differs between examples is small beside what all positions share: divided by the root of
    the length instead of the length, the pooled sum keeps it large enough to learn from quickly.
    For a task on pairs both sequences go through the same blocks and the read-out sees
    ``[a, b, a * b, a - b]``, as in the paper.
    """

    def __init__(
        self,
        mixer_factory: Callable[[int], nn.Module],
        task: Task,
        *,
        width: int = 32,
        layers: int = 1,
    ):
        super().__init__()
        self.tokens = nn.Embedding(task.vocab, width)
        self.positions = nn.Parameter(0.5 * torch.randn(task.length, width))
        self.blocks = nn.ModuleList(Block(mixer_factory(width), width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.read_out = nn.Linear(4 * width if task.pairs else width, task.classes)

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def encode(self, ids: Int[Tensor, "B L"], lengths: Int[Tensor, " B"]) -> Float[Tensor, "B C"]:
        """The sum over the positions that are no filling, over the root of their number."""
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        return (self.norm(x) * real[..., None]).sum(1) / lengths[:, None].sqrt()

    def forward(self, batch: LabelledBatch) -> Float[Tensor, "B classes"]:
        if batch.ids.dim() == 2:
            return self.read_out(self.encode(batch.ids, batch.lengths))
        pairs = self.encode(batch.ids.flatten(0, 1), batch.lengths.flatten())
        a, b = pairs.view(len(batch.ids), 2, -1).unbind(1)
        return self.read_out(torch.cat([a, b, a * b, a - b], -1))

    @torch.no_grad()
    def predict(self, batch: LabelledBatch, rows: int = 100) -> Int[Tensor, " B"]:
        """The most likely label of each example."""
        parts = [self(LabelledBatch(*chunk)) for chunk in zip(*(t.split(rows) for t in batch))]
        return torch.cat(parts).argmax(-1)


@dataclasses.dataclass(frozen=True)
class Result:
    """A trained classifier, its score, and the training loss of every step."""

    score: Score
    model: Classifier
    losses: list[float]


def train_and_score(
    mixer_factory: Callable[[int], nn.Module],
    task: Task,
    *,
    steps: int = 150,
    batch: int = 32,
    lr: float = 1e-2,
    examples: int = 2000,
    n: int = 500,
    width: int = 32,
    layers: int = 1,
    seed: int = 0,
) -> Result:
    """Train a `Classifier` around the mixer on ``examples``, score it on ``n`` others.

    ``mixer_factory(width)`` makes a layer ``x (B, L, C) -> (y, state)``. AdamW with a short warm-up
    and a cosine to zero; everything follows from ``seed``.
    """
    if steps < 1 or batch < 1 or examples < batch:
        raise ValueError(
            "steps, batch, examples: expected steps >= 1 and examples >= batch >= 1, "
            f"got {steps}, {batch} and {examples}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier(mixer_factory, task, width=width, layers=layers)
    train = task.examples(examples, "train", seed)
    losses = _fit(model, train, steps, batch, lr, torch.Generator().manual_seed(seed))
    return Result(evaluate(task, model.predict, n=n, seed=seed), model, losses)


def _fit(model, train, steps, batch, lr, generator) -> list[float]:
    optimiser = FusedAdamW(model.parameters(), lr, betas=BETAS, weight_decay=0.01)
    losses = []
    for step in range(steps):
        rows = torch.randint(len(train.labels), (batch,), generator=generator)
        chosen = LabelledBatch(*(part[rows] for part in train))
        loss = F.cross_entropy(model(chosen), chosen.labels)
        losses.append(optimiser.step(loss, warm_cosine(step, steps, max(1, steps // 10))))
    return losses


def attention_span(weights: Float[Tensor, "B H L L"]) -> Float[Tensor, " H"]:
    """Mean distance ``|i - j|`` between a query and what it looks at, by head, in positions."""
    at = torch.arange(weights.shape[-1], dtype=weights.dtype, device=weights.device)
    return (weights * (at[:, None] - at).abs()).sum(-1).mean((0, 2))
