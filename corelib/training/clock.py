"""Walks home on a clock: a toy task with an exact verifier, real choices, answers of all lengths.

The prompt is the hour at which a hand stands. The answer writes moves, and after each move the hour
that it leads to; at 0 the hand is home, and the answer ends:

    14 : +7 21 +7 28 +1 29 +1 0 end                      (a clock of 30 hours)

There are two kinds of tokens, as in long reasoning. At a *fork* a move is chosen, which decides how
long the answer gets. Behind a move the next hour *follows*, and is right or wrong. Somebody who
moves at random may pass 0 and has to go around again, so that most answers are short and some are
very long. An answer is right when every hour in it is, and it ends at 0; one that is cut off at the
longest allowed length is wrong.
"""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class ClockWalk:
    """The task. Ids: the hours ``0 .. hours - 1``, then the moves, then `eos`.

    Attributes:
        hours: on the dial.
        moves: how far each move goes.
        most_moves: an answer of more moves is cut off.
    """

    hours: int = 30
    moves: tuple[int, ...] = (1, 7)
    most_moves: int = 12

    def __post_init__(self) -> None:
        if self.hours < 2:
            raise ValueError(f"hours: expected at least 2, got {self.hours}")
        if not self.moves or any(not 0 < m < self.hours for m in self.moves):
            raise ValueError(f"moves: expected 1 to {self.hours - 1} each, got {self.moves}")
        if self.most_moves < 1:
            raise ValueError(f"most_moves: expected at least 1, got {self.most_moves}")

    @property
    def eos(self) -> int:
        return self.hours + len(self.moves)

    @property
    def vocab(self) -> int:
        return self.eos + 1

    @property
    def longest(self) -> int:
        """Tokens of the longest answer: a move and an hour each time, and the end."""
        return 2 * self.most_moves + 1

    def every_prompt(self) -> Int[Tensor, "Q 1"]:
        """All hours but 0."""
        return torch.arange(1, self.hours)[:, None]

    def prompts(self, count: int, generator: torch.Generator) -> Int[Tensor, "Q 1"]:
        """``count`` of them, each hour as likely."""
        return torch.randint(1, self.hours, (count, 1), generator=generator)

    def rewards(
        self, prompts: Int[Tensor, "R 1"], answers: Int[Tensor, "R T"]
    ) -> Float[Tensor, " R"]:
        """1 for a right answer, else 0. What stands behind an answer's first `eos` is not read."""
        right = [self._right(p, a) for (p,), a in zip(prompts.tolist(), answers.tolist())]
        return torch.tensor(right, dtype=torch.float32)

    def _right(self, hour: int, answer: list[int]) -> bool:
        if self.eos not in answer:
            return False
        walk = answer[: answer.index(self.eos)]
        if len(walk) % 2:
            return False
        for move, told in zip(walk[::2], walk[1::2]):
            if not self.hours <= move < self.eos:
                return False
            hour = (hour + self.moves[move - self.hours]) % self.hours
            if told != hour:
                return False
        return hour == 0

    def forks(self, answers: Int[Tensor, "R T"]) -> Bool[Tensor, "R T"]:
        """Where a move or the end is chosen: every second token."""
        return (torch.arange(answers.shape[1]) % 2 == 0).expand(answers.shape)

    def demonstrations(
        self, count: int, generator: torch.Generator
    ) -> tuple[Int[Tensor, "R L"], Bool[Tensor, "R L"]]:
        """Walks of somebody who calculates well and moves at random, cut off where they get long.

        Returns ids (prompt, answer, filled up with `eos`) and which of them belong to an answer.
        """
        start = torch.randint(1, self.hours, (count, 1), generator=generator)
        shape = (count, self.most_moves)
        move = torch.randint(len(self.moves), shape, generator=generator)
        hour = (start + torch.tensor(self.moves)[move].cumsum(1)) % self.hours
        walk = torch.stack([move + self.hours, hour], 2).flatten(1)
        away = ((hour == 0).cumsum(1) == 0).sum(1, keepdim=True)  # moves that do not lead home
        place = torch.arange(self.longest)
        ids = torch.full((count, self.longest), self.eos)
        ids[:, :-1] = torch.where(place[:-1] < 2 * away + 2, walk, self.eos)
        said = place <= 2 * away + 2
        said[:, -1] &= away[:, 0] < self.most_moves  # cut off: no end was written
        filled = torch.cat([start, ids], 1)
        return filled, torch.cat([torch.zeros_like(start, dtype=torch.bool), said], 1)

    def words(self, ids: Int[Tensor, " L"]) -> list[str]:
        """One word for each id."""
        names = [*map(str, range(self.hours)), *(f"+{m}" for m in self.moves), "end"]
        return [names[i] for i in ids.tolist()]

    def random_success(self) -> float:
        """How often somebody is right who moves at random and calculates without a slip.

        From the transition matrix with 0 absorbing; all other hours are as likely at the start.
        """
        away = torch.full((self.hours,), 1 / (self.hours - 1), dtype=torch.float64)
        away[0] = 0.0
        home = 0.0
        for _ in range(self.most_moves):
            away = sum(away.roll(m) for m in self.moves) / len(self.moves)
            home, away[0] = home + away[0].item(), 0.0
        return home
