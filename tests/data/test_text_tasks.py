"""Byte tasks: windows that are in the texts, on the right side of the cut, with the right label."""

import pytest
import torch

from corelib.data import byte_retrieval, byte_text, documents
from corelib.data.text_tasks import TRAIN_SHARE, WORKS


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def whole(work):
    plays, modules = documents("shakespeare", "train"), documents("python", "train")
    if f"{work}.txt" in plays:
        return plays[f"{work}.txt"].encode()
    return "\n".join(t for n, t in modules.items() if n.startswith(f"{work}/")).encode()


def where(ids, work):
    return whole(work).find(bytes(ids.tolist()))


@pytest.mark.parametrize("split", ["train", "test"])
def test_windows_come_from_the_named_work(split):
    batch = byte_text(16, 200, split=split, generator=gen())
    assert batch.ids.shape == (16, 200) and (batch.lengths == 200).all()
    assert batch.labels.bincount().tolist() == [4, 4, 4, 4]
    for ids, label in zip(batch.ids, batch.labels.tolist()):
        cut = round(TRAIN_SHARE * len(whole(WORKS[label])))
        at = where(ids, WORKS[label])
        assert 0 <= at <= cut - 200 if split == "train" else at >= cut


def test_pairs_are_of_one_work_or_of_two():
    batch = byte_retrieval(40, 300, split="test", generator=gen(1))
    assert batch.ids.shape == (40, 2, 300) and batch.lengths.shape == (40, 2)
    assert int(batch.labels.sum()) == 20
    sources = set()
    for pair, label in zip(batch.ids, batch.labels.tolist()):
        a, b = (next(w for w in WORKS if where(window, w) >= 0) for window in pair)
        assert (a == b) == bool(label)
        sources |= {a, b}
    assert sources == set(WORKS)


def test_a_seed_names_the_data():
    first, again, other = (byte_text(4, 50, split="train", generator=gen(s)) for s in (1, 1, 2))
    assert torch.equal(first.ids, again.ids) and not torch.equal(first.ids, other.ids)


@pytest.mark.no_shape_checks
def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="split: expected 'train' or 'test', got 'valid'"):
        byte_text(1, 9, split="valid", generator=gen())
    with pytest.raises(ValueError, match="works: expected some of .*hamlet.*; got 'iliad'"):
        byte_text(2, 9, split="train", generator=gen(), works=("hamlet", "iliad"))
    with pytest.raises(ValueError, match="works: expected two or more different ones"):
        byte_retrieval(2, 9, split="train", generator=gen(), works=("hamlet", "hamlet"))
    with pytest.raises(ValueError, match="length: .* bytes for test, got 9999999"):
        byte_text(1, 9999999, split="test", generator=gen())
