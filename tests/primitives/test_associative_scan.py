"""The tree of prefixes: same results as the chain, fewer joins in a row."""

from __future__ import annotations

import doctest

import pytest

from corelib.primitives import associative_scan


@pytest.mark.parametrize("L", [0, 1, 2, 3, 7, 8, 33])
def test_prefixes_in_order(L):
    words = [chr(97 + i % 26) for i in range(L)]
    wanted = ["".join(words[: t + 1]) for t in range(L)]
    assert associative_scan(lambda first, then: first + then, words) == wanted


@pytest.mark.parametrize("L", [8, 33, 64])
def test_few_joins_wait_for_each_other(L):
    joins = []

    def operator(first, then):
        joins.append(1)
        return max(first, then) + 1

    depths = associative_scan(operator, [0] * L)
    assert max(depths) <= 2 * L.bit_length() and len(joins) <= 2 * L


def test_doctest():
    import sys

    module = sys.modules[associative_scan.__module__]
    failures, tests = doctest.testmod(module)
    assert tests and not failures
