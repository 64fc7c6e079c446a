"""The exact output law of a decoder, by running it once for every way its choices can fall.

A decoder takes each random choice through ``chooser(probs) -> index``. `exact_law` hands it a
chooser that follows a script: it replays the decoder depth first over all outcomes with positive
probability and multiplies what it saw on the way. Nothing is sampled, so two laws can be compared
to the last digits of float64; 60,000 samples of 81 outcomes could not see a difference below 0.01.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..contracts import Chooser
from ..primitives import attention

Law = dict[tuple[int, ...], float]


class _Script:
    """A chooser that repeats ``path`` and then takes each first possible outcome."""

    def __init__(self, path: list[tuple[list[int], list[float]]]):
        self.path = path  # for each choice: outcomes still to try (first: this one), probabilities
        self.at = 0

    def __call__(self, probs: Tensor) -> Tensor:
        rows = probs.reshape(-1, probs.shape[-1])
        chosen = [self._one(row) for row in rows]
        return torch.tensor(chosen, device=probs.device).reshape(probs.shape[:-1])

    def _one(self, row: Tensor) -> int:
        weights = row.tolist()
        if self.at == len(self.path):
            possible = [i for i, weight in enumerate(weights) if weight > 0]
            if not possible:
                raise ValueError("probs: expected an outcome with positive probability, got none")
            self.path.append((possible, weights))
        outcomes, seen = self.path[self.at]
        if seen != weights:
            raise ValueError("decoder: the same choices led to other probabilities (hidden state?)")
        self.at += 1
        return outcomes[0]


def exact_law(decoder: Callable[[Chooser], Any], *, most: int = 100_000) -> Law:
    """``{output: probability}`` of ``decoder(chooser)``, which returns ids (a list or a tensor).

    Args:
        decoder: runs from the beginning at each call, and takes chance from its chooser alone.
        most: how many runs are allowed.

    Raises:
        ValueError: more than ``most`` runs, a choice without a possible outcome, or a decoder
            whose probabilities differ although its choices were the same.
    """
    law: Law = {}
    path: list[tuple[list[int], list[float]]] = []
    for _ in range(most):
        output = torch.as_tensor(decoder(_Script(path))).flatten().tolist()
        probability = 1.0
        for outcomes, weights in path:
            probability *= weights[outcomes[0]]
        law[tuple(output)] = law.get(tuple(output), 0.0) + probability
        while path and len(path[-1][0]) == 1:  # the last choice has been tried in all ways
            path.pop()
        if not path:
            return law
        path[-1] = (path[-1][0][1:], path[-1][1])
    raise ValueError(f"most: the decoder has more than {most} ways to run; shorten its output")


def total_variation(a: Mapping, b: Mapping) -> float:
    """Half the summed difference of two laws: 0 when equal, 1 when nothing is shared."""
    return 0.5 * sum(abs(a.get(x, 0.0) - b.get(x, 0.0)) for x in {*a, *b})


class TabularModel:
    """A tiny language model in float64: logits read from a table by the last two ids.

    Keeps `corelib.contracts.LanguageModel` with a dense cache, which holds the ids as its keys.
    ``sharpness`` scales the logits (normal, seeded): 0 is uniform, large is nearly certain.
    """

    def __init__(self, vocab: int, seed: int = 0, sharpness: float = 1.0):
        if vocab < 2:
            raise ValueError(f"vocab: expected at least 2, got {vocab}")
        generator = torch.Generator().manual_seed(seed)
        shape = (vocab + 1, vocab + 1, vocab)  # id `vocab`: before the first token
        self.table = sharpness * torch.randn(shape, generator=generator, dtype=torch.float64)
        self.vocab = vocab

    def __call__(self, ids: Int[Tensor, "B L"], cache=None) -> Float[Tensor, "B L vocab"]:
        seen = ids
        if cache is not None:
            held = ids[:, None, :, None].double()
            cache.append(0, held, held)
            seen = cache.layers[0][0][:, 0, :, 0].long()
        before = torch.nn.functional.pad(seen, (1, 0), value=self.vocab)[:, :-1]
        return self.table.to(ids.device)[before, seen][:, -ids.shape[1] :]

    def law(self, prompt: Sequence[int], new: int, change: Callable[[Tensor], Tensor]) -> Law:
        """The law of ``new`` tokens, by the chain rule; ``change`` turns logits into probs."""
        laws: Law = {(): 1.0}
        for _ in range(new):
            longer: Law = {}
            for tokens, probability in laws.items():
                probs = change(self(torch.tensor([[*prompt, *tokens]]))[0, -1])
                for token, p in enumerate(probs.tolist()):
                    if p > 0:
                        longer[(*tokens, token)] = probability * p
            laws = longer
        return laws


class AttentiveModel(TabularModel):
    """A tiny language model in float64 that reads all that came before, by one attention head.

    Its logits are those of a table at the last id, plus what attention over all ids says. With a
    cache it sees what the cache lets it see, so one that holds less gives another law. Positions
    mean nothing to it.
    """

    def __init__(self, vocab: int, seed: int = 0, sharpness: float = 1.0, width: int = 4):
        super().__init__(vocab, seed, sharpness)
        generator = torch.Generator().manual_seed(seed)
        shape = (4, vocab, width)  # queries, keys, values and the way out
        self.q, self.k, self.v, self.out = 2 * torch.randn(
            shape, generator=generator, dtype=torch.float64
        )

    def __call__(self, ids: Int[Tensor, "B L"], cache=None) -> Float[Tensor, "B L vocab"]:
        weights = (self.q, self.k, self.v, self.out, self.table)
        q, k, v, out, table = (weight.to(ids.device) for weight in weights)
        q, k, v = (weight[ids][:, None] for weight in (q, k, v))
        if cache is None:
            read = attention(q, k, v, causal=True)
        else:
            cache.append(0, k, v)
            read = cache.attend(0, q)
        return table[self.vocab, ids] + read[:, 0] @ out.T
