"""Questions, ways to answer, and documents whose facts are known."""

import random

import pytest
import torch

from corelib.evaluation import shared
from corelib.evaluation.shared import Question

WORLD = shared.FactWorld(
    ("Ada", "Bo", "Cy"),
    {
        "town": "{subject} lives in {value}. ",
        "friend": "The friend of {subject} is {value}. ",
    },
    lambda rng: rng.choice(["Rome", "Oslo", "Lima", "Bonn"]) + str(rng.randrange(100)),
)
FILLER = "so it goes on and on with nothing to learn " * 40


class Letters:
    """Say the letter: a benchmark of one line."""

    def generate(self, n, seed):
        rng = random.Random(seed)
        letters = [rng.choice("abcd") for _ in range(n)]
        return [Question(f"it is {c}", "what is it? ", (c,), 0.25, tuple("abcd")) for c in letters]

    def parse(self, said):
        return tuple(said.strip('"')[:1])

    def right(self, parsed, question):
        return parsed == question.answer


def test_a_run_counts_and_carries_chance():
    found = shared.run(Letters(), lambda questions: [q.text[-1] for q in questions], n=40)
    assert (found.right, found.n, found.chance) == (40, 40, 0.25)
    silent = shared.run(Letters(), lambda questions: [""] * len(questions), n=40)
    assert silent.right == 0 and silent.interval[0] == 0
    always = shared.run(Letters(), lambda questions: ["a"] * len(questions), n=400, seed=1)
    low, high = always.interval
    assert low < 0.25 < high and not always.above_chance


def test_guessing_meets_chance():
    low, high = shared.run(Letters(), shared.guesser(), n=400).interval
    assert low < 0.25 < high


def test_copying_repeats_what_followed_the_longest_end():
    text = "red is 17, dark red is 23, blue is 4"
    ask = [Question(text, f"say: {end}", ("",), 0.0) for end in ("dark red is ", "blue is ", "xyz")]
    said = shared.copying(least=5, characters=2)(ask)
    assert said == ["23", "4", ""]
    assert shared.copying(least=60)(ask) == ["", "", ""]


class Counting:
    """A language model that says the number of tokens so far, and counts what it was fed."""

    def __init__(self):
        self.fed = []

    def __call__(self, ids, cache):
        cache.rows = len(ids)
        cache.length += ids.shape[1]
        cache.first = ids[:, 0] if cache.first is None else cache.first
        self.fed.append(tuple(ids.shape))
        logits = torch.zeros(*ids.shape, 50)
        logits[:, :, cache.length] = 1
        if cache.length > 4:
            logits[torch.arange(len(ids)), :, cache.first] = 2
        return logits


class Cache:
    def __init__(self):
        self.length, self.first = 0, None

    def gather_rows(self, rows):
        self.first = self.first[rows]


def test_a_model_reads_each_text_once_and_answers_go_home():
    texts = ["ab", "cd", "ab", "efg"]
    questions = [Question(t, "xy", ("",), 0.0) for t in texts]
    model = Counting()
    answer = shared.language_model(
        model,
        lambda q: ([ord(c) - 97 for c in q.text], [1, 2]),
        lambda ids: " ".join(map(str, ids)),
        new_cache=Cache,
        tokens=2,
        rows=2,
    )
    assert answer(questions) == ["4 0", "4 2", "4 0", "4 4"]
    # ab and cd together, then three queries and three more tokens; efg by itself
    assert model.fed[:3] == [(2, 2), (3, 2), (3, 1)]
    assert model.fed[3:] == [(1, 3), (1, 2), (1, 1)]


def test_facts_are_where_the_document_says():
    facts = WORLD.facts(seed=3)
    assert len(facts) == 6 and facts == WORLD.facts(3) != WORLD.facts(4)
    sentences = [WORLD.sentence(*key, value) for key, value in facts.items()]
    for depths in (None, [0, 0.2, 0.2, 0.5, 0.9, 1]):
        document = shared.pack(sentences, FILLER, 700, rng=random.Random(0), depths=depths)
        assert len(document.text) == 700
        assert [document.text[a:b] for a, b in document.spans] == sentences
        for (subject, relation), value in facts.items():
            assert WORLD.look_up(document.text, subject, relation) == value
            without = document.text.replace(WORLD.sentence(subject, relation, value), "")
            assert WORLD.look_up(without, subject, relation) == ""
    assert document.spans[0][0] == 0 and document.spans[-1][1] > 680
    outside = document.text
    for a, b in reversed(document.spans):
        outside = outside[:a] + outside[b:]
    assert outside in FILLER  # nothing of the filler is lost


@pytest.mark.no_shape_checks
def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="n: expected at least 1 question, got 0"):
        shared.run(Letters(), lambda q: [], n=0)
    with pytest.raises(ValueError, match="answer: expected 3 answers, got 1"):
        shared.run(Letters(), lambda q: [""], n=3)
    with pytest.raises(ValueError, match="tokens, rows: .*got 0 and 16"):
        shared.language_model(None, None, None, new_cache=None, tokens=0)
    with pytest.raises(ValueError, match="characters: .*allow 4 to 14, got 3"):
        shared.pack(["abcd"], "x" * 10, 3, rng=random.Random(0))
    with pytest.raises(ValueError, match="depths: expected 1 from 0 to 1"):
        shared.pack(["abcd"], "x" * 10, 9, rng=random.Random(0), depths=[2])
