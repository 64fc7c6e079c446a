"""Long Range Arena: solvers at their known scores, scoring, the harness and its contestants."""

import math

import pytest
import torch
from torch import nn

from corelib.data import LabelledBatch
from corelib.data.listops import TOKENS
from corelib.foundations import lra, lra_solvers
from corelib.foundations.lra_mixers import MIXERS, DiagonalRecurrence, EncoderAttention, NoMixing
from corelib.testing import assert_same, causality_probe, conformance

ARENA = lra.lab_arena()


def example(name, n=200, split="test"):
    return ARENA[name].examples(n, split)


# ---- the tasks


@pytest.mark.parametrize("name", ARENA)
def test_examples_fit_their_task(name):
    task = ARENA[name]
    batch = example(name, 30)
    assert batch.ids.shape == ((30, 2, task.length) if task.pairs else (30, task.length))
    assert batch.ids.min() >= 0 and batch.ids.max() < task.vocab
    assert batch.labels.min() >= 0 and batch.labels.max() < task.classes
    assert batch.lengths.shape == batch.ids.shape[:-1] and batch.lengths.min() > 0
    again, other = task.examples(30, "test"), task.examples(30, "train")
    assert torch.equal(batch.ids, again.ids) and not torch.equal(batch.ids, other.ids)


@pytest.mark.parametrize("name", ["text", "retrieval", "pathfinder"])
def test_drawn_labels_are_balanced(name):
    counts = example(name, 200).labels.bincount(minlength=ARENA[name].classes)
    assert (counts.double() / 200 - 1 / ARENA[name].classes).abs().max() < 0.01


def test_the_full_arena_has_the_papers_lengths():
    lengths = {name: task.length for name, task in lra.full_arena().items()}
    assert lengths == {
        "listops": 2000,
        "text": 4096,
        "retrieval": 4096,
        "image": 1024,
        "pathfinder": 1024,
        "pathx": 16384,
    }
    batch = lra.full_arena()["listops"].examples(3, "test")
    assert batch.lengths.min() >= 500
    assert lra.full_arena()["image"].examples(2, "test").ids.max() > 17


def test_the_papers_averages():
    """The last column of its table 1, which leaves Path-X out."""
    average = {name: sum(row) / 5 for name, row in lra.LRA_2020.items()}
    printed = {"Transformer": 54.39, "BigBird": 55.01, "Longformer": 53.46, "Performer": 51.41}
    printed |= {"Linformer": 51.36, "Reformer": 50.67, "Local Attention": 46.06}
    for name, value in printed.items():
        assert average[name] == pytest.approx(value, abs=0.0051)
    assert len(lra.LRA_2020) == 11 and len(lra.PAPER_TASKS) == 5


# ---- reference solvers and rules of thumb


def test_solvers_reach_their_known_scores():
    assert lra.evaluate(ARENA["listops"], lra_solvers.solve_listops, n=100).accuracy == 1
    assert lra.evaluate(ARENA["pathfinder"], lra_solvers.solve_pathfinder, n=100).accuracy == 1
    image = ARENA["image"]
    near = lra_solvers.nearest_neighbour(image.examples(1200, "train"))
    assert lra.evaluate(image, near, n=397).accuracy > 0.97


def test_solvers_answer_no_when_the_drawing_says_no():
    batch = example("pathfinder", 40)
    cut = batch.ids.clone()
    cut.view(-1, 16, 16)[(batch.labels == 1)[:, None, None] & (cut.view(-1, 16, 16) == 1)] = 0
    said = lra_solvers.solve_pathfinder(batch._replace(ids=cut))
    assert (said <= batch.labels).all() and said.sum() < batch.labels.sum()


def test_reading_the_root_is_worth_a_third():
    train = example("listops", 400, "train")
    rule = lra_solvers.read_root(train)
    found = lra.evaluate(ARENA["listops"], rule, n=400)
    assert 0.24 < found.accuracy < 0.42 and found.chance < 0.24
    ids = train.ids[:4].clone()
    ids[:, 1:] = 1  # nothing but the first token matters
    assert torch.equal(rule(train._replace(ids=ids)), rule(train)[:4])


def test_top_level_digits_by_hand():
    words = "[MAX 2 [MIN 9 8 ] 3 ]".split()
    ids = torch.tensor([[TOKENS.index(word) for word in words]])
    batch = LabelledBatch(ids, torch.tensor([len(words)]), torch.tensor([8]))
    assert lra_solvers.top_level_only(batch).tolist() == [3]
    assert lra_solvers.evaluate_listops(words) == 8


def test_naive_bayes_finds_the_likelier_law():
    ids = torch.tensor([[0, 0, 0, 1], [2, 2, 1, 2]])
    train = LabelledBatch(ids, torch.tensor([4, 4]), torch.tensor([0, 1]))
    rule = lra_solvers.naive_bayes(train, vocab=3)
    assert rule(train._replace(ids=torch.tensor([[1, 0, 0, 2], [2, 0, 2, 2]]))).tolist() == [0, 1]


def test_straight_line_and_spread():
    batch = example("pathfinder", 300)
    spread = lra_solvers.disc_spread(batch)
    centre = (2 / 3 * 2) ** 0.5  # a disc of nine pixels by itself
    assert (spread > centre).all() and spread.max() < 16
    found = lra.score(lra_solvers.straight_line(batch)(batch), batch.labels)
    assert 0.5 < found.accuracy < 0.7


# ---- scoring


def test_wilson_against_scipy():
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for right, n in ((0, 10), (3, 10), (10, 10), (137, 500)):
        known = binomtest(right, n).proportion_ci(0.95, method="wilson")
        assert lra.wilson(right, n, z=1.959964) == pytest.approx(tuple(known), abs=1e-6)


def test_a_score_knows_its_chance():
    labels = torch.tensor([0] * 60 + [1] * 40)
    always = lra.score(torch.zeros(100, dtype=torch.int64), labels)
    assert (always.accuracy, always.chance, always.above_chance) == (0.6, 0.6, False)
    assert lra.score(labels, labels).above_chance
    assert str(always) == "60.0% [50.2%, 69.1%], chance 60.0%"


# ---- contestants


@pytest.mark.parametrize("name", MIXERS)
def test_mixers_keep_shape_and_have_equally_many_parameters(name):
    torch.manual_seed(0)
    mixer = MIXERS[name](32).double()
    for length in (1, 7):
        x = torch.randn(2, length, 32, dtype=torch.float64)
        assert mixer(x)[0].shape == x.shape
    count = sum(p.numel() for p in mixer.parameters())
    assert abs(count / (4 * 32 * 32) - 1) < 0.05


def test_what_each_contestant_sees():
    torch.manual_seed(0)
    x = torch.randn(1, 20, 8, dtype=torch.float64)
    at = torch.arange(20)
    far = (at[:, None] - at).abs()
    reach = {
        "none": (NoMixing(8), far == 0),
        "window": (EncoderAttention(8, window=3), far < 3),
        "full": (EncoderAttention(8), far >= 0),
        "past": (DiagonalRecurrence(8), at[:, None] >= at),
    }
    for name, (mixer, expected) in reach.items():
        seen = causality_probe(lambda value, m=mixer: m.double()(value)[0], x) > 1e-12
        assert torch.equal(seen, expected), name


def test_the_recurrence_keeps_the_contract():
    torch.manual_seed(0)
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    conformance(DiagonalRecurrence(8).double(), x, leak=1e-12)


def test_the_recurrence_is_its_loop():
    torch.manual_seed(1)
    mixer = DiagonalRecurrence(4, memory=16).double()
    a = torch.exp(mixer.log_decay).detach()
    assert a.min() < 0.4 and a.max().item() == pytest.approx(math.exp(-1 / 16))
    x, h, out = torch.randn(1, 9, 4, dtype=torch.float64), 0, []
    for t in range(9):
        value, inward, outward = mixer.inward(x[:, t]).chunk(3, -1)
        h = a * h + (1 - a) * torch.sigmoid(inward) * value
        out.append(mixer.out(nn.functional.silu(outward) * h))
    assert_same(mixer(x)[0], torch.stack(out, 1))


@pytest.mark.parametrize("window", [None, 3])
def test_weights_are_what_attention_used(window):
    torch.manual_seed(2)
    mixer = EncoderAttention(8, window=window).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    weights = mixer.weights(x)
    v = mixer._project(x)[2]
    assert_same(mixer.out((weights @ v).transpose(1, 2).reshape(x.shape)), mixer(x)[0])


def test_span_of_known_weights():
    stay, first = torch.eye(5), torch.zeros(5, 5)
    first[:, 0] = 1
    spans = lra.attention_span(torch.stack([stay, first])[None])
    assert spans.tolist() == [0, 2]
    torch.manual_seed(0)
    narrow = EncoderAttention(8, window=3).weights(torch.randn(1, 30, 8))
    assert (lra.attention_span(narrow) < 2).all()


# ---- the harness


def test_filling_is_not_pooled_and_order_of_the_batch_does_not_matter():
    torch.manual_seed(0)
    model = lra.Classifier(NoMixing, ARENA["listops"])
    batch = example("listops", 12)
    other = batch.ids.clone()
    past = torch.arange(64) >= batch.lengths[:, None]
    other[past] = 7
    assert torch.equal(model(batch), model(batch._replace(ids=other)))
    turned = LabelledBatch(*(part.flip(0) for part in batch))
    assert_same(model(turned), model(batch).flip(0))


def test_pairs_are_read_by_one_encoder():
    torch.manual_seed(0)
    model = lra.Classifier(NoMixing, ARENA["retrieval"])
    ids = torch.randint(256, (3, 128))
    batch = LabelledBatch(
        torch.stack([ids, ids], 1), torch.full((3, 2), 128), torch.zeros(3).long()
    )
    one = model.encode(ids, torch.full((3,), 128))
    pair = torch.cat([one, one, one * one, 0 * one], -1)
    assert_same(model(batch), model.read_out(pair))


def test_training_learns_and_a_seed_names_the_run():
    def draw(n, split, generator):  # is the first symbol a 2?
        ids = torch.randint(3, (n, 6), generator=generator)
        return LabelledBatch(ids, torch.full((n,), 6), (ids[:, 0] == 2).long())

    task = lra.Task("first symbol", 2, 3, 6, draw)
    options = dict(steps=80, examples=300, n=200, width=16, layers=1, lr=1e-2)
    found = lra.train_and_score(NoMixing, task, **options)
    assert found.score.accuracy > 0.95 and found.score.above_chance
    assert found.losses[-1] < 0.5 * found.losses[0] and len(found.losses) == 80
    state = torch.random.get_rng_state()
    short = options | dict(steps=4, n=8)
    first, again = (lra.train_and_score(NoMixing, task, **short) for _ in range(2))
    assert first.losses == again.losses
    assert torch.equal(state, torch.random.get_rng_state())  # the caller's randomness is untouched


@pytest.mark.no_shape_checks
def test_errors_name_the_argument():
    task = ARENA["listops"]
    with pytest.raises(ValueError, match="split: expected one of .*got 'valid'"):
        task.examples(3, "valid")
    with pytest.raises(ValueError, match="right, n: .*got 3 and 2"):
        lra.wilson(3, 2)
    with pytest.raises(ValueError, match=r"said: expected shape \(2,\), got \(3,\)"):
        lra.score(torch.zeros(3).long(), torch.zeros(2).long())
    with pytest.raises(ValueError, match="examples >= batch >= 1, got 0, 32 and 2000"):
        lra.train_and_score(NoMixing, task, steps=0)
    with pytest.raises(ValueError, match=r"heads: expected a divisor of width \(9\), got 2"):
        EncoderAttention(9)
