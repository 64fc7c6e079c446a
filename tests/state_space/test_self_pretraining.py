"""Self-pretraining: what is hidden, what the loss sees, what is transferred, and that it helps."""

import doctest
import functools

import pytest
import torch
from torch import nn

from corelib.data import IGNORE, LabelledBatch
from corelib.foundations.lra import Classifier, Task
from corelib.foundations.lra_mixers import EncoderAttention
from corelib.primitives import attention
from corelib.state_space import self_pretraining
from corelib.state_space.s4d import S4D
from corelib.state_space.self_pretraining import (
    SelfPretrainer,
    equal_budget,
    finetune,
    mask_tokens,
    pretrain,
    random_start,
    repeats,
    self_pretrained,
    transfer,
)

EXACT = dict(atol=1e-12, rtol=1e-10)


def draw(n, split, generator):
    return repeats(n, 6, vocab=4, changed=2, generator=generator)


TASK = Task("repeats", 2, 4, 12, draw)


class CausalAttention(EncoderAttention):
    """The arena's attention, looking back only."""

    def forward(self, x, state=None):
        y = attention(*self._project(x), causal=True)
        return self.out(y.transpose(1, 2).reshape(x.shape)), None


def classifier(mixer=EncoderAttention, seed=0, width=8):
    torch.manual_seed(seed)
    return Classifier(mixer, TASK, width=width)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def weights(module):
    return {name: x.clone() for name, x in module.state_dict().items()}


def test_doctest():
    failures, tests = doctest.testmod(self_pretraining)
    assert tests and not failures


# ---- what is hidden


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("span", [1, 3])
def test_the_share_that_is_hidden(p, span):
    ids = torch.randint(5, (40, 200), generator=seeded())
    inputs, targets, hidden = mask_tokens(ids, p, seeded(), mask=5, span=span)
    assert abs(hidden.double().mean() - p) < 0.03
    assert torch.equal(inputs == 5, hidden) and torch.equal(targets != IGNORE, hidden)
    assert torch.equal(targets[hidden], ids[hidden]) and torch.equal(inputs[~hidden], ids[~hidden])
    again = mask_tokens(ids, p, seeded(), mask=5, span=span)
    assert torch.equal(again.hidden, hidden)


def test_spans_are_runs():
    ids = torch.zeros(20, 300, dtype=torch.int64)
    hidden = mask_tokens(ids, 0.1, seeded(), mask=1, span=4).hidden
    edges = torch.diff(hidden.int(), dim=1, prepend=torch.zeros(20, 1), append=torch.zeros(20, 1))
    runs = (edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]
    cut = (edges[:, -1] == -1).sum()  # runs that the end of a row cuts off
    assert (runs < 4).sum() <= cut and (runs == 4).sum() > 50


def test_filling_is_never_hidden_and_no_row_is_empty():
    lengths = torch.tensor([1, 3, 9, 12])
    ids = torch.zeros(4, 12, dtype=torch.int64)
    for seed in range(20):
        hidden = mask_tokens(ids, 0.01, seeded(seed), mask=1, lengths=lengths, span=2).hidden
        assert hidden.any(1).all()
        assert not (hidden & (torch.arange(12) >= lengths[:, None])).any()


# ---- what the loss sees


@pytest.mark.parametrize("loss", ["cross_entropy", "l1"])
def test_no_gradient_where_nothing_is_hidden(loss):
    pretrainer = SelfPretrainer(classifier(), p=0.3, loss=loss)
    inputs, targets = pretrainer.task(TASK.examples(7, "train"), seeded())
    said = pretrainer(inputs)
    (gradient,) = torch.autograd.grad(pretrainer.score(said, targets), said)
    felt = gradient.abs().amax(-1) > 0
    assert torch.equal(felt, targets != IGNORE)


def test_losses_against_their_definition():
    batch = TASK.examples(5, "train")
    for loss in ("cross_entropy", "l1"):
        pretrainer = SelfPretrainer(classifier(), loss=loss)
        inputs, targets = pretrainer.task(batch, seeded())
        said, total, count = pretrainer(inputs), 0.0, 0
        for b, t in (targets != IGNORE).nonzero().tolist():
            wanted = targets[b, t]
            if loss == "l1":
                total += (said[b, t, 0] - wanted / 3).abs()
            else:
                total -= said[b, t].log_softmax(-1)[wanted]
            count += 1
        torch.testing.assert_close(pretrainer.score(said, targets), total / count)


def test_a_causal_model_does_not_look_ahead_bit_for_bit():
    pretrainer = SelfPretrainer(classifier(CausalAttention), objective="next")
    ids = TASK.examples(3, "train").ids
    other = ids.clone()
    other[:, 7:] = (other[:, 7:] + 1) % 4
    assert torch.equal(pretrainer(ids)[:, :7], pretrainer(other)[:, :7])
    assert (pretrainer(ids)[:, 7:] != pretrainer(other)[:, 7:]).any()
    diagonal = SelfPretrainer(classifier(functools.partial(S4D, state_size=4))).double()
    torch.testing.assert_close(diagonal(ids)[:, :7], diagonal(other)[:, :7], **EXACT)


def test_next_token_targets():
    ids = torch.tensor([[3, 1, 2, 0, 0], [1, 1, 2, 3, 0]])
    batch = LabelledBatch(ids, torch.tensor([3, 5]), torch.tensor([0, 1]))
    torch.manual_seed(0)
    encoder = Classifier(CausalAttention, Task("t", 2, 4, 5, draw), width=4)
    inputs, targets = SelfPretrainer(encoder, objective="next").task(batch, seeded())
    none = IGNORE
    assert torch.equal(inputs, ids)
    assert targets.tolist() == [[1, 2, none, none, none], [1, 2, 3, 0, none]]


# ---- the recipe


@pytest.mark.parametrize("objective", ["masked", "next"])
def test_labels_do_not_matter_to_pretraining(objective):
    batch, checkpoints = TASK.examples(40, "train"), []
    for labels in (batch.labels, batch.labels.flip(0), torch.zeros_like(batch.labels)):
        pretrainer = SelfPretrainer(classifier(), objective=objective)
        pretrain(pretrainer, batch._replace(labels=labels), steps=3, batch=4)
        checkpoints.append(weights(pretrainer))
    for other in checkpoints[1:]:
        assert all(torch.equal(x, other[name]) for name, x in checkpoints[0].items())


def test_transfer_keeps_the_encoder_and_nothing_of_the_read_out():
    pretrainer = SelfPretrainer(classifier(seed=1))
    pretrain(pretrainer, TASK.examples(40, "train"), steps=2, batch=4)
    fresh = classifier(seed=2)
    head, learnt = weights(fresh.read_out), weights(pretrainer.encoder)
    assert transfer(pretrainer, fresh) is fresh
    for name, x in fresh.state_dict().items():
        if name.startswith("read_out."):
            assert torch.equal(x, head[name.removeprefix("read_out.")])
        else:
            assert torch.equal(x, learnt[name])
    finetune(fresh, TASK.examples(40, "train"), steps=1, batch=4)
    assert torch.equal(pretrainer.encoder.tokens.weight, learnt["tokens.weight"])
    assert not torch.equal(fresh.tokens.weight, learnt["tokens.weight"])


def test_pretraining_leaves_the_read_out_alone():
    pretrainer = SelfPretrainer(classifier())
    before = weights(pretrainer.encoder.read_out)
    losses = pretrain(pretrainer, TASK.examples(40, "train"), steps=3, batch=4)
    assert len(losses) == 3
    after = weights(pretrainer.encoder.read_out)
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_equal_budgets():
    assert equal_budget(300, 0.6) == (180, 120)
    assert equal_budget(2, 0.01) == equal_budget(2, 0.99) == (1, 1)
    for steps in (7, 100):
        for share in (0.1, 0.35, 0.9):
            assert sum(equal_budget(steps, share)) == steps


def test_the_recipe_is_its_stages():
    batch = TASK.examples(40, "train")

    def make():
        return Classifier(EncoderAttention, TASK, width=8)

    got, _ = self_pretrained(make, batch, steps=5, batch=4, p=0.3)
    torch.manual_seed(0)
    pretrainer, wanted = SelfPretrainer(make(), p=0.3), make()
    pretrain(pretrainer, batch, steps=3, batch=4)
    finetune(transfer(pretrainer, wanted), batch, steps=2, batch=4)
    for name, x in wanted.state_dict().items():
        assert torch.equal(x, got.state_dict()[name])


def test_training_goes_down():
    batch = TASK.examples(100, "train")
    losses = finetune(classifier(), batch, steps=25, batch=50)
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])
    losses = pretrain(SelfPretrainer(classifier()), batch, steps=25, batch=50)
    assert sum(losses[-5:]) < 0.98 * sum(losses[:5])


# ---- data and the random start


def test_repeats():
    batch = repeats(101, 6, vocab=4, changed=2, generator=seeded())
    same = (batch.ids[:, :6] == batch.ids[:, 6:]).sum(1)
    assert torch.equal(same, torch.where(batch.labels == 1, 6, 4))
    assert batch.labels.bincount().tolist() == [51, 50]
    assert batch.ids.min() == 0 and batch.ids.max() == 3 and (batch.lengths == 12).all()


def test_a_random_start_remembers_a_few_steps():
    drawn = S4D(4, start=random_start(8), step_min=1.0, step_max=1.0)
    near, far = slice(0, 8), slice(56, 64)
    for layer, forgets in ((drawn, True), (S4D(4, 8), False)):
        kernel = layer.kernel(64).detach().abs().amax(0)
        assert (kernel[far].max() < 0.05 * kernel[near].max()) == forgets
    assert not torch.equal(random_start(8).poles, random_start(8, seed=1).poles)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ids: mask_tokens(ids, 1.0, seeded(), mask=9), "p: expected more than 0"),
        (lambda ids: mask_tokens(ids, 0.5, seeded(), mask=1), "mask: expected an id that"),
        (lambda ids: mask_tokens(ids, 0.5, seeded(), mask=9, span=0), "span: expected at least 1"),
        (lambda ids: SelfPretrainer(classifier(), objective="clm"), "objective: expected one of"),
        (lambda ids: SelfPretrainer(classifier(), loss="l2"), "loss: expected one of"),
        (lambda ids: SelfPretrainer(classifier(), p=0.0), "p: expected more than 0"),
        (lambda ids: equal_budget(1, 0.5), "steps: expected at least 2"),
        (lambda ids: equal_budget(9, 1.0), "share: expected more than 0"),
        (lambda ids: random_start(3), "N: expected an even size"),
        (
            lambda ids: repeats(4, 3, vocab=4, changed=4, generator=seeded()),
            "changed, vocab: expected",
        ),
        (
            lambda ids: transfer(SelfPretrainer(classifier()), nn.Linear(2, 2)),
            "classifier: expected the encoder's parts",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 4, dtype=torch.int64))
