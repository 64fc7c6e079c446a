"""Never Train from Scratch: Fair Comparison of Long-Sequence Models Requires Data-Driven Priors
(arXiv 2310.02980).

Idea: before labels are used, let the model fill in gaps in the very inputs it will be trained on.
What differs between architectures that start at random then nearly vanishes.

    pretrain:   hide a share p of the positions, say what stands there       (``"masked"``)
                or say what comes next, for a causal model                   (``"next"``)
    transfer:   keep tokens, positions, blocks and norm; the read-out is new
    finetune:   on the same examples, with their labels
    fair:       as many steps together as training from scratch has          (`equal_budget`)

Stage one is `corelib.state_space.denoising`, which also says what an encoder is:
`corelib.foundations.lra.Classifier` is one, for any sequence mixer.

| here                 | paper                                    | shape           |
|:---------------------|:-----------------------------------------|:----------------|
| p                    | 0.5 images, 0.15 text, 0.1 ListOps       |                 |
| span                 | (ours) neighbours hidden together        |                 |
| hidden               | masked positions                         | (B, L) bool     |
| share                | of the steps that go into pretraining    |                 |

`random_start` is the ablation: a diagonal recurrence whose random poles remember a few steps, in
place of HiPPO's. Exact: the first stage never reads a label. Ours: AdamW
with a short warm-up and a cosine (the paper's rate is constant after the warm-up); early stopping
is left out. Cost: as training, with a read-out at every position in the first stage.
Oracle: the released configurations (IdoAmos/not-from-scratch) for p, losses and sizes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import LabelledBatch
from ..models.optim import FusedAdamW, warm_cosine
from .denoising import SelfPretrainer, check_share, mask_tokens  # noqa: F401  (their home)
from .s4d import Diagonal

# --- the recipe -----------------------------------------------------------------------------------


def pretrain(
    pretrainer: SelfPretrainer,
    examples: LabelledBatch,
    *,
    steps: int,
    batch: int = 32,
    lr: float = 1e-2,
    seed: int = 0,
) -> list[float]:
    """Denoising on the inputs of ``examples``; the loss of every step."""
    generator = torch.Generator().manual_seed(seed)
    unused = {id(parameter) for parameter in pretrainer.encoder.read_out.parameters()}
    learnt = [x for x in pretrainer.parameters() if id(x) not in unused]
    if pretrainer.objective == "next":
        learnt = [x for x in learnt if x is not pretrainer.mask]

    def loss() -> Tensor:
        inputs, targets = pretrainer.task(_draw(examples, batch, generator), generator)
        return pretrainer.score(pretrainer(inputs), targets)

    return _descend(learnt, loss, steps, lr)


def transfer(pretrainer: SelfPretrainer, classifier: nn.Module) -> nn.Module:
    """``classifier`` with the pretrained tokens, positions, blocks and norm; its own read-out."""
    learnt = copy.deepcopy(pretrainer.encoder.state_dict())
    kept = {name: x for name, x in learnt.items() if not name.startswith("read_out.")}
    missing = classifier.load_state_dict(kept, strict=False)
    if missing.unexpected_keys or any(not k.startswith("read_out.") for k in missing.missing_keys):
        raise ValueError(f"classifier: expected the encoder's parts, got {missing}")
    return classifier


def finetune(
    classifier: nn.Module,
    examples: LabelledBatch,
    *,
    steps: int,
    batch: int = 32,
    lr: float = 1e-2,
    seed: int = 0,
) -> list[float]:
    """Ordinary supervised training of all weights; the loss of every step."""
    generator = torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        chosen = _draw(examples, batch, generator)
        return F.cross_entropy(classifier(chosen), chosen.labels)

    return _descend(list(classifier.parameters()), loss, steps, lr)


def equal_budget(steps: int, share: float) -> tuple[int, int]:
    """Steps of pretraining and of fine-tuning that together are ``steps``; both at least 1."""
    check_share("share", share)
    if steps < 2:
        raise ValueError(f"steps: expected at least 2, got {steps}")
    first = min(max(round(share * steps), 1), steps - 1)
    return first, steps - first


def self_pretrained(
    make: Callable[[], nn.Module],
    examples: LabelledBatch,
    *,
    steps: int,
    share: float = 0.6,
    lr: float = 1e-2,
    batch: int = 32,
    seed: int = 0,
    **options,
) -> tuple[nn.Module, SelfPretrainer]:
    """The whole recipe: a classifier after both stages, and what came out of the first.

    ``make()`` builds a classifier; ``options`` are those of `SelfPretrainer`.
    """
    first, second = equal_budget(steps, share)
    settings = dict(batch=batch, lr=lr, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pretrainer, classifier = SelfPretrainer(make(), **options), make()
    pretrain(pretrainer, examples, steps=first, **settings)
    finetune(transfer(pretrainer, classifier), examples, steps=second, **settings)
    return classifier, pretrainer


def random_start(N: int, seed: int = 0) -> Diagonal:
    """Random poles for `S4D` with ``step_min = step_max = 1``: they remember about four steps."""
    if N < 2 or N % 2:
        raise ValueError(f"N: expected an even size, at least 2, got {N}")
    generator = torch.Generator().manual_seed(seed)
    rate, frequency = torch.randn(2, N // 2, generator=generator, dtype=torch.float64)
    poles = torch.complex(-0.25 * (0.5 * rate).exp(), frequency)
    return Diagonal(poles, torch.ones_like(poles))


def example() -> dict:
    """Six tokens of which two are to be hidden.

    >>> mask_tokens(**example(), p=0.3, mask=4).hidden.sum()
    tensor(2)
    """
    return dict(ids=torch.tensor([[3, 1, 2, 3, 1, 2]]), generator=torch.Generator().manual_seed(0))


def repeats(
    n: int, half: int, *, vocab: int, changed: int, generator: torch.Generator
) -> LabelledBatch:
    """Random ids and then the same again (label 1), or the same but for ``changed`` of them (0).

    As in Path-X, a label says nothing until one knows which far positions belong together; unlike
    there, the inputs alone tell.
    """
    if not 1 <= changed <= half or vocab < 2:
        raise ValueError(
            f"changed, vocab: expected 1 <= changed <= half ({half}) and vocab >= 2, "
            f"got {changed} and {vocab}"
        )
    labels = torch.randperm(n, generator=generator) % 2
    first = torch.randint(vocab, (n, half), generator=generator)
    where = torch.rand(n, half, generator=generator).argsort(1)[:, :changed]
    other = torch.randint(1, vocab, (n, changed), generator=generator)
    altered = first.scatter(1, where, (first.gather(1, where) + other) % vocab)
    second = torch.where(labels[:, None] == 1, first, altered)
    return LabelledBatch(torch.cat([first, second], 1), torch.full((n,), 2 * half), labels)


def _draw(examples: LabelledBatch, batch: int, generator: torch.Generator) -> LabelledBatch:
    rows = torch.randint(len(examples.ids), (batch,), generator=generator)
    return LabelledBatch(*(part[rows] for part in examples))


def _descend(
    parameters: Sequence[Tensor], loss: Callable[[], Tensor], steps: int, lr: float
) -> list[float]:
    optimiser = FusedAdamW(parameters, lr, weight_decay=0.01)
    return [optimiser.step(loss(), warm_cosine(t, steps, steps / 10)) for t in range(steps)]
