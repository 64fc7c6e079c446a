"""All prefixes of a chain of operations that may be bracketed at will.

    found[t] = elements[0] ∘ elements[1] ∘ ... ∘ elements[t]

Where ``(a ∘ b) ∘ c = a ∘ (b ∘ c)``, the chain is a tree: neighbours are joined first, their joins
are scanned, and what lies between is filled in. That takes ``2 L`` joins, as against ``L`` in a
row, but only ``2 log2 L`` of them have to wait for each other (Blelloch, "Prefix sums and their
applications", 1990).

This is the reference that says what a scan computes. Elements may be anything, tuples of tensors of
different sizes too, and gradients pass through. Fast forms for one kind of element are elsewhere:
`diagonal_scan`, `block_scan`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Element = TypeVar("Element")


def associative_scan(
    operator: Callable[[Element, Element], Element], elements: Sequence[Element]
) -> list[Element]:
    """The prefixes of ``elements``, as many as there are; ``operator(first, then)``.

    >>> associative_scan(lambda first, then: first + then, ["a", "b", "c", "d", "e"])
    ['a', 'ab', 'abc', 'abcd', 'abcde']
    """
    if len(elements) < 2:
        return list(elements)
    pairs = [operator(*pair) for pair in zip(elements[::2], elements[1::2])]
    upto_odd = associative_scan(operator, pairs)
    upto_even = [operator(before, x) for before, x in zip(upto_odd, elements[2::2])]
    found = list(elements)
    found[1::2], found[2::2] = upto_odd, upto_even
    return found
