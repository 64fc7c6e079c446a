"""Synthetic tasks: a solver that reads the rules off the input finds every target."""

import pytest
import torch

from corelib.data import (
    IGNORE,
    chain_of_keys,
    delayed_recall,
    induction,
    mqar,
    passkey,
    selective_copy,
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def encode(text):
    return list(text.encode())


HAYSTACK = torch.full((4000,), ord("."))


def scored(batch):
    return batch.targets != IGNORE


@pytest.mark.parametrize("keys, depth", [(1, None), (1, 0.0), (1, 1.0), (3, None), (12, 0.5)])
def test_passkey_answers_can_be_found_in_the_text(keys, depth):
    batch = passkey(
        4, 1500, haystack=HAYSTACK, encode=encode, generator=gen(), keys=keys, depth=depth
    )
    assert batch.ids.shape == batch.targets.shape == (4, 1500)
    for ids, targets in zip(*batch, strict=True):
        text = bytes(ids.tolist()).decode()
        places = (targets != IGNORE).nonzero().flatten().tolist()
        assert len(places) == 5 * keys
        for first in places[::5]:
            question = text[: first + 1].rsplit("The pass key of ", 1)[1]
            name = question.removesuffix(" is ")
            answer = text.split(f"The pass key of {name} is ", 1)[1][:5]
            assert bytes(targets[first : first + 5].tolist()).decode() == answer
        position = text.index("The pass key")
        if depth == 0.0:
            assert position == 1
        if depth == 1.0:
            assert text[position:].count(".") == 2  # no haystack behind the needle


@pytest.mark.parametrize("symbols", [1, 2, 4])
def test_passkey_numbers_can_be_of_few_different_digits(symbols):
    batch = passkey(
        40, 300, haystack=HAYSTACK, encode=encode, generator=gen(), symbols=symbols
    )  # fmt: skip
    numbers = [bytes(t[t != IGNORE].tolist()).decode() for t in batch.targets]
    kinds = [len(set(number)) for number in numbers]
    assert max(kinds) == symbols and all(number.isdigit() for number in numbers)
    assert set("".join(numbers)) == set("0123456789")  # any digits, few of them at a time


def test_passkey_haystack_is_a_stretch_of_the_text():
    haystack = torch.arange(1000, 3000)
    batch = passkey(2, 300, haystack=haystack, encode=encode, generator=gen())
    for ids in batch.ids:
        hay = ids[ids >= 1000]
        assert torch.equal(hay, torch.arange(int(hay[0]), int(hay[0]) + len(hay)))


@pytest.mark.parametrize("length, ask", [(64, None), (65, None), (64, 99), (65, 99)])
def test_mqar_targets_are_the_values_of_their_keys(length, ask):
    batch = mqar(8, length, vocab=90, pairs=8, generator=gen(), ask=ask)
    head = 16 + (ask is not None)
    assert batch.ids.shape == (8, length)
    assert int(scored(batch).sum()) == 8 * ((length - head + 1) // 2)
    for ids, targets in zip(*batch, strict=True):
        value = {int(k): int(v) for k, v in ids[:16].view(8, 2)}
        assert len(value) == 8 and not set(value) & set(value.values())
        for t in (targets != IGNORE).nonzero().flatten().tolist():
            assert int(targets[t]) == value[int(ids[t])]
            if t + 1 < length:
                assert int(ids[t + 1]) == int(targets[t])
    if ask is not None:
        assert bool((batch.ids[:, 16] == ask).all())


@pytest.mark.parametrize("length, period", [(20, 7), (16, 8), (9, 8), (5, 1)])
def test_induction_repeats(length, period):
    batch = induction(4, length, vocab=50, period=period, generator=gen())
    for ids, targets in zip(*batch, strict=True):
        for t in range(length):
            known = t >= period
            assert int(targets[t]) == (int(ids[t + 1 - period]) if known else IGNORE)
            if t + 1 < length and known:
                assert int(ids[t + 1]) == int(targets[t])


def test_selective_copy_says_the_items_in_order():
    batch = selective_copy(8, 40, vocab=20, items=6, noise=0, ask=19, generator=gen())
    for ids, targets in zip(*batch, strict=True):
        end = ids.tolist().index(19)
        items = [i for i in ids[:end].tolist() if i != 0]
        assert len(items) == 6
        assert targets[end:].tolist() == items and ids[end + 1 :].tolist() == items[:-1]
        assert bool((targets[:end] == IGNORE).all())


def test_delayed_recall_asks_for_the_first_symbol():
    batch = delayed_recall(16, 50, vocab=20, ask=19, generator=gen())
    assert int(scored(batch).sum()) == 16
    assert torch.equal(batch.targets[:, -1], batch.ids[:, 0])
    assert bool((batch.ids[:, 0] < 10).all()) and bool((batch.ids[:, 1:-1] >= 10).all())
    assert bool((batch.ids[:, -1] == 19).all())


@pytest.mark.parametrize("length, hops", [(34, 1), (34, 4), (35, 3), (20, 9), (21, 9), (4, 1)])
def test_chain_of_keys_ends_where_following_it_ends(length, hops):
    batch = chain_of_keys(16, length, vocab=60, hops=hops, ask=59, generator=gen())
    assert batch.ids.shape == (16, length) and int(scored(batch).sum()) == 16
    for ids, targets in zip(*batch, strict=True):
        *pairs, ask, at = ids.tolist()[length % 2 :]
        value = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert ask == 59 and 59 not in pairs and len(value) == (length - 2) // 2
        for _ in range(hops):
            at = value[at]
        assert int(targets[-1]) == at and at not in value


def test_chain_of_keys_hides_its_order():
    """The pairs of the chain that is asked for stand anywhere, not one behind the other."""
    batch = chain_of_keys(200, 18, vocab=40, hops=2, ask=0, generator=gen(7))
    first = [ids[:-2:2].tolist().index(int(ids[-1])) for ids in batch.ids]
    assert set(first) == set(range(8))


def test_a_seed_names_the_data():
    first, again, other = (mqar(2, 32, vocab=50, pairs=4, generator=gen(s)) for s in (1, 1, 2))
    assert torch.equal(first.ids, again.ids) and not torch.equal(first.ids, other.ids)


@pytest.mark.no_shape_checks
def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="length: .* need more than"):
        passkey(1, 50, haystack=HAYSTACK, encode=encode, generator=gen())
    with pytest.raises(ValueError, match="keys: expected at most 12, got 13"):
        passkey(1, 2000, haystack=HAYSTACK, encode=encode, generator=gen(), keys=13)
    with pytest.raises(ValueError, match="depth: expected 0 to 1"):
        passkey(1, 500, haystack=HAYSTACK, encode=encode, generator=gen(), depth=2.0)
    with pytest.raises(ValueError, match="symbols: expected 1 to 10 different digits, got 11"):
        passkey(1, 500, haystack=HAYSTACK, encode=encode, generator=gen(), symbols=11)
    with pytest.raises(ValueError, match="length: expected at least 17"):
        mqar(1, 16, vocab=50, pairs=8, generator=gen())
    with pytest.raises(ValueError, match="period: expected at least 1"):
        induction(1, 16, vocab=50, period=0, generator=gen())
    with pytest.raises(ValueError, match="length: expected at least 8"):
        chain_of_keys(1, 7, vocab=50, hops=3, ask=0, generator=gen())
    with pytest.raises(ValueError, match="vocab: expected at least 17"):
        chain_of_keys(1, 18, vocab=16, hops=1, ask=0, generator=gen())
    with pytest.raises(ValueError, match="symbols"):
        delayed_recall(1, 16, vocab=4, ask=3, generator=gen(), symbols=[0, 1, 2])
