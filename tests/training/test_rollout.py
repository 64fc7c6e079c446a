"""Sampled answers: their law, their log-probabilities, rows that end at different times."""

from __future__ import annotations

import itertools

import pytest
import torch

from corelib.decoding.enumeration import exact_law
from corelib.models.cache import DenseCache
from corelib.models.decoder import Decoder, DecoderConfig, greedy, sampler
from corelib.training.rollout import answer_stats, entropy_of, rollout, token_stats

pytestmark = pytest.mark.method("hapo")
VOCAB, EOS = 4, 3
PROMPTS = torch.tensor([[0, 1], [2, 2], [1, 0], [0, 1], [2, 1]])


@pytest.fixture(scope="module")
def model():
    sizes = dict(vocab=VOCAB, width=8, layers=2, heads=2, kv_heads=1, head_width=4, hidden=12)
    tiny = Decoder(DecoderConfig(**sizes, qkv_bias=True), seed=0).double().requires_grad_(False)
    for name, weight in tiny.named_parameters():
        if weight.dim() == 2 and "embed" not in name:
            weight *= 6
    return tiny.eval()


def sample(model, prompts=PROMPTS, longest=5, chooser=None, **options):
    chooser = sampler(0) if chooser is None else chooser
    return rollout(
        model, prompts, longest, chooser=chooser, eos=EOS, new_cache=DenseCache, **options
    )


def test_answers_have_exactly_the_models_law(model):
    """Every answer of up to three tokens, enumerated, against products of the model's laws."""
    law = exact_law(lambda choose: sample(model, PROMPTS[:1], 3, choose).answers)
    expected = {}
    for answer in itertools.product(range(VOCAB), repeat=3):
        ids = torch.cat([PROMPTS[:1], torch.tensor([answer])], 1)
        laws, p, ended = model(ids)[0, 1:-1].softmax(-1), 1.0, False
        for token, q in zip(answer, laws):
            p *= float(token == EOS) if ended else q[token].item()
            ended |= token == EOS
        if p:
            expected[answer] = p
    assert law.keys() == expected.keys()
    assert max(abs(law[a] - p) for a, p in expected.items()) < 1e-12


def test_statistics_are_those_of_one_parallel_call(model):
    got = sample(model, PROMPTS.repeat(6, 1), 7)
    again = answer_stats(model, got)
    for name in ("log_prob", "entropy"):
        want = torch.where(got.mask, getattr(again, name), 0.0)
        torch.testing.assert_close(getattr(got, name), want, rtol=0, atol=1e-12)
    assert got.log_prob.dtype == torch.float64


def test_the_mask_goes_to_the_first_end_and_no_further(model):
    got = sample(model, PROMPTS.repeat(8, 1), 6)
    for answer, n in zip(got.answers.tolist(), got.lengths.tolist()):
        assert n == (answer.index(EOS) + 1 if EOS in answer else 6)
        assert answer[n:] == [EOS] * (6 - n)
    assert len(set(got.lengths.tolist())) > 2
    assert torch.equal(got.mask, torch.arange(6) < got.lengths[:, None])
    assert torch.equal(got.prompts, PROMPTS.repeat(8, 1))


def test_rows_that_have_ended_leave_the_batch(model):
    fed = []

    def counting(ids, cache):
        fed.append(ids.shape)
        return model(ids, cache)

    got = sample(counting, PROMPTS.repeat(8, 1), 6)
    assert [rows for rows, _ in fed] == [int((got.lengths > t).sum()) for t in range(len(fed))]
    assert [width for _, width in fed] == [2] + [1] * (len(fed) - 1)


def test_a_row_does_not_depend_on_the_others(model):
    """The chooser sees all rows in place, so one that goes by row and turn gives the same row."""
    rolls = torch.rand(5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def choose_by(rows):
        turns = itertools.count()

        def choose(probs):
            assert probs.shape == (len(rows), VOCAB)
            edge = rolls[rows, next(turns)][:, None]
            return (probs.cumsum(-1) < edge).sum(-1).clamp(max=VOCAB - 1)

        return choose

    together = sample(model, PROMPTS, 6, choose_by([0, 1, 2, 3, 4]))
    for row in range(5):
        alone = sample(model, PROMPTS[row : row + 1], 6, choose_by([row]))
        assert torch.equal(alone.ids[0], together.ids[row])
        torch.testing.assert_close(alone.log_prob[0], together.log_prob[row], rtol=0, atol=1e-12)


def test_temperature_moves_the_sampling_and_not_the_statistics(model):
    cold = sample(model, longest=4, temperature=1e-4)
    assert torch.equal(cold.ids, sample(model, longest=4, chooser=greedy).ids)
    torch.testing.assert_close(
        cold.log_prob, torch.where(cold.mask, answer_stats(model, cold).log_prob, 0.0)
    )
    seen = []

    def heat(logits):
        seen.append(logits.shape)
        return torch.full(logits.shape[:1], 2.0, dtype=logits.dtype)

    laws = []
    sample(model, longest=1, chooser=lambda p: (laws.append(p), p.argmax(-1))[1], temperature=heat)
    assert seen == [(5, VOCAB)]
    torch.testing.assert_close(laws[0], (model(PROMPTS)[:, -1] / 2).softmax(-1))


def test_one_row_one_token(model):
    got = sample(model, PROMPTS[:1], 1)
    assert got.ids.shape == (1, 3) and got.mask.all() and got.log_prob.shape == (1, 1)


def test_entropy_of_known_laws():
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    got = entropy_of(logits)
    assert got[0].item() == pytest.approx(torch.log(torch.tensor(4.0)).item()) and got[1] < 1e-19
    forbidden = torch.tensor([0.0, 0.0, -torch.inf])
    assert entropy_of(forbidden).item() == pytest.approx(0.6931472)
    stats = token_stats(forbidden[None], torch.tensor([1]))
    assert stats.log_prob.item() == pytest.approx(-0.6931472)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (dict(prompts=PROMPTS[:0]), "prompts"),
        (dict(prompts=PROMPTS[0]), "prompts"),
        (dict(longest=0), "longest"),
        (dict(temperature=0.0), "temperature"),
    ],
)
def test_errors_name_the_argument(model, wrong, name):
    with pytest.raises(ValueError, match=name):
        sample(model, **wrong)
