"""ListOps: nested lists of digits to work out, such as ``[MAX 2 [MIN 4 7 ] 0 ]`` = 4.

The grammar of Nangia and Bowman (arXiv 1804.06028) with the settings of Long Range Arena (Tay et
al., arXiv 2011.04006, section 2.2.1, and its released generator): above the deepest level a node is
an operator with probability 1/4 and else a digit; the four operators are equally likely; the number
of arguments is uniform from 2 to ``args``. ``MED`` is the median, halves rounded down; ``SM`` the
sum modulo 10. Expressions are kept whose number of tokens lies within bounds, which also decides
the law of the answers: 9 and 0 are far more common than 5.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence

import torch

from .labelled import PAD, LabelledBatch, pad_rows, python_random

Operator = Callable[[Sequence[int]], int]
OPERATORS: dict[str, Operator] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(statistics.median(values)),
    "[SM": lambda values: sum(values) % 10,
}
FUNCTIONS = tuple(OPERATORS.values())
TOKENS = ("<pad>", *map(str, range(10)), *OPERATORS, "]")
FIRST_DIGIT, FIRST_OPERATOR, CLOSE = TOKENS.index("0"), TOKENS.index("[MIN"), TOKENS.index("]")
OPERATOR_SHARE = 0.25


def listops(
    batch: int,
    *,
    min_length: int,
    max_length: int,
    generator: torch.Generator,
    depth: int = 10,
    args: int = 10,
) -> LabelledBatch:
    """Expressions of ``min_length`` to ``max_length`` tokens, padded to the latter.

    Ids index `TOKENS`. ``depth``: how deep lists nest, the innermost digits counted; the paper
    draws lengths of 500 to 2,000 tokens. Labels are the values, 0 to 9.

    Raises ``ValueError`` where no expression can have such a length.
    """
    if not 4 <= min_length <= max_length:
        raise ValueError(
            f"min_length, max_length: expected 4 <= min_length <= max_length, "
            f"got {min_length} and {max_length}"
        )
    if depth < 2 or args < 2:
        raise ValueError(f"depth, args: expected at least 2, got {depth} and {args}")
    if min_length > longest(depth, args):
        raise ValueError(
            f"min_length: lists {depth} deep with {args} arguments have at most "
            f"{longest(depth, args)} tokens, got {min_length}"
        )
    random = python_random(generator)
    rows, labels = [], []
    while len(rows) < batch:
        row, value = _expression(depth, args, max_length, random)
        if min_length <= len(row) <= max_length:
            rows.append(row)
            labels.append(value)
    return LabelledBatch(*pad_rows(rows, max_length), torch.tensor(labels))


def _expression(depth: int, args: int, room: int, random: random.Random) -> tuple[list[int], int]:
    """One expression and its value; an empty one where the draw grows beyond ``room`` tokens."""
    uniform, bits = random.random, random.getrandbits
    row: list[int] = []
    lists: list[tuple[Operator, int, list[int]]] = []  # those not closed yet: what, size, values
    while len(row) <= room:
        if len(lists) + 1 < depth and uniform() <= OPERATOR_SHARE:
            which = _below(len(FUNCTIONS), bits)
            lists.append((FUNCTIONS[which], 2 + _below(args - 1, bits), []))
            row.append(FIRST_OPERATOR + which)
            continue
        value = _below(10, bits)
        row.append(FIRST_DIGIT + value)
        while lists:
            function, size, values = lists[-1]
            values.append(value)
            if len(values) < size:
                break
            lists.pop()
            row.append(CLOSE)
            value = function(values)
        else:
            return row, value
    return [], 0


def _below(n: int, bits: Callable[[int], int]) -> int:
    """Uniform from 0 to ``n - 1``: `random.randrange` without its checks, which cost most of it."""
    width = n.bit_length()
    while (drawn := bits(width)) >= n:
        pass
    return drawn


def longest(depth: int, args: int) -> int:
    """Tokens of the largest expression: every node above the deepest level is a full list."""
    tokens = 1
    for _ in range(depth - 1):
        tokens = 2 + args * tokens
    return tokens


def to_text(ids: Sequence[int]) -> str:
    """Ids as the expression that they spell, without filling."""
    return " ".join(TOKENS[i] for i in ids if i != PAD)
