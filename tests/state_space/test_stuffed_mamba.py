"""Forgetting put into Mamba-2: windows by difference, clipped norms, scaled decays; the probes."""

import doctest
import functools
import math

import pytest
import torch

from corelib.data.synthetic import IGNORE, TaskBatch
from corelib.primitives import ssd_chunked, ssd_reference
from corelib.primitives.selective_scan import step_size
from corelib.state_space import stuffed_mamba
from corelib.state_space.mamba2 import Mamba2Block
from corelib.state_space.state_collapse import (
    collapse_ratio,
    patched,
    recall_length,
    recall_stream,
)
from corelib.state_space.stuffed_mamba import (
    WindowedState,
    capacity_curve,
    collapse_probe,
    forget_scale,
    state_norm_clip,
    window_reference,
    window_state,
)

EXACT = dict(atol=1e-12, rtol=1e-10)
BASE = {
    "forget": functools.partial(forget_scale, retention=1.0, insertion=1.0),
    "clip": functools.partial(state_norm_clip, largest=math.inf),
    "window": functools.partial(window_state, window=100),
}


def inputs(L=23, H=4, G=2, K=3, V=5, batch=2, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    given = dict(x=normal(batch, H, L, V), dt=normal(batch, H, L).abs(), A=-normal(H).abs())
    return given | dict(B=normal(batch, G, L, K), C=normal(batch, G, L, K), D=normal(H))


def test_doctest():
    failures, tests = doctest.testmod(stuffed_mamba)
    assert tests and not failures


# ---- each patch, turned off


@pytest.mark.parametrize("name", BASE)
@pytest.mark.parametrize("L", [1, 23])
def test_a_patch_turned_off_is_the_base_bit_for_bit(name, L):
    given = inputs(L=L)
    given["dt_bias"] = torch.linspace(-1, 1, 4, dtype=torch.float64)
    options = dict(dt_softplus=True, return_state=True)
    base = ssd_reference if name == "clip" else functools.partial(ssd_chunked, chunk=8)
    for got, wanted in zip(BASE[name](**given, **options, chunk=8), base(**given, **options)):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", BASE)
def test_gradients_of_a_patch_turned_off(name):
    given = {k: v.requires_grad_() for k, v in inputs(L=9).items()}
    got = torch.autograd.grad(BASE[name](**given).square().sum(), list(given.values()))
    wanted = torch.autograd.grad(ssd_reference(**given).square().sum(), list(given.values()))
    for x, y in zip(got, wanted):
        torch.testing.assert_close(x, y, **EXACT)


# ---- windows


@pytest.mark.parametrize("window", [1, 2, 7, 22, 23])
@pytest.mark.parametrize("L", [1, 23])
def test_a_window_is_its_last_steps_recomputed(window, L):
    given = inputs(L=L)
    wanted = window_reference(**given, window=window)
    for chunk in (4, 64):
        got = window_state(**given, window=window, chunk=chunk)
        torch.testing.assert_close(got, wanted, atol=1e-13, rtol=1e-12)


def test_the_windows_own_state():
    given = inputs()
    _, got = window_state(**given, window=6, return_state=True)
    tail = {k: v[:, :, -6:] if k in ("x", "dt", "B", "C") else v for k, v in given.items()}
    _, wanted = ssd_reference(**tail, return_state=True)
    torch.testing.assert_close(got, wanted, atol=1e-13, rtol=1e-12)


def test_gradients_through_a_window():
    given = {k: v.requires_grad_() for k, v in inputs(L=9).items()}
    got = torch.autograd.grad(window_state(**given, window=4).square().sum(), given.values())
    wanted = window_reference(**given, window=4).square().sum()
    for x, y in zip(got, torch.autograd.grad(wanted, given.values())):
        torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("window", [1, 5, 50])
def test_step_by_step(window):
    given = inputs()
    D = given.pop("D")
    wanted = window_state(**given, window=window)
    windowed = WindowedState(given["A"], window)
    x, dt, B, C = (given[k] for k in ("x", "dt", "B", "C"))
    for t in range(x.shape[2]):
        y = windowed.step(x[:, :, t], dt[:, :, t], B[:, :, t], C[:, :, t])
        torch.testing.assert_close(y, wanted[:, :, t], **EXACT)
    assert len(windowed.recent) == min(window, 23) and D.shape == (4,)


def test_nothing_before_the_window_is_seen():
    given = inputs()
    poisoned = {k: v.clone() for k, v in given.items()}
    poisoned["x"][:, :, :10] += 100.0
    old, new = window_state(**given, window=8), window_state(**poisoned, window=8)
    torch.testing.assert_close(old[:, :, 17:], new[:, :, 17:], atol=1e-10, rtol=1e-10)
    assert (old[:, :, 16] - new[:, :, 16]).abs().max() > 1e-3


# ---- clipping and scaling


@pytest.mark.parametrize("largest", [0.1, 1.0])
def test_norms_stay_below(largest):
    given = inputs()
    for L in (1, 5, 23):
        part = {k: v[:, :, :L] if k in ("x", "dt", "B", "C") else v for k, v in given.items()}
        _, state = state_norm_clip(**part, largest=largest, return_state=True)
        assert state.flatten(2).norm(dim=2).max() <= largest * (1 + 1e-12)


def test_clipping_against_the_equation():
    given, S = inputs(batch=1, H=1, G=1), torch.zeros(3, 5, dtype=torch.float64)
    x, dt, B, C = (given[k][0, 0] for k in ("x", "dt", "B", "C"))
    got = state_norm_clip(**given, largest=0.7)[0, 0]
    for t in range(23):
        S = torch.exp(dt[t] * given["A"]) * S + dt[t] * torch.outer(B[t], x[t])
        S = S * min(1.0, 0.7 / S.norm().item())
        torch.testing.assert_close(got[t], C[t] @ S + given["D"] * x[t], **EXACT)


def test_scaling_against_the_equation():
    given, S = inputs(batch=1, H=1, G=1), torch.zeros(3, 5, dtype=torch.float64)
    given["dt"][..., 3] = 0.0
    x, dt, B, C = (given[k][0, 0] for k in ("x", "dt", "B", "C"))
    got = forget_scale(**given, retention=0.9, insertion=0.5)[0, 0]
    for t in range(23):
        S = 0.9 * torch.exp(dt[t] * given["A"]) * S + 0.5 * dt[t] * torch.outer(B[t], x[t])
        torch.testing.assert_close(got[t], C[t] @ S + given["D"] * x[t], **EXACT)


@pytest.mark.parametrize("scan", [forget_scale, functools.partial(state_norm_clip, largest=1.0)])
def test_pieces_equal_the_whole(scan):
    given = inputs()
    whole, last = scan(**given, return_state=True)
    state, ys = None, []
    for cut in (slice(0, 1), slice(1, 11), slice(11, 23)):
        part = {k: v[:, :, cut] if k in ("x", "dt", "B", "C") else v for k, v in given.items()}
        y, state = scan(**part, state=state, return_state=True)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 2), whole, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)


# ---- in a model


class TinyLM(torch.nn.Module):
    """One block between an embedding and a read-out."""

    def __init__(self, vocab=12):
        super().__init__()
        torch.manual_seed(0)
        self.enter = torch.nn.Embedding(vocab, 8)
        self.block = Mamba2Block(8, state=4, head_width=8, conv=1, chunk=8)
        self.out = torch.nn.Linear(8, vocab)
        self.double()

    def forward(self, ids):
        return self.out(self.block(self.enter(ids))[0])


def stream(L=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    return recall_stream(3, L, keys=8, values=4, within=3, generator=g)


def test_a_windowed_model_is_the_model_on_its_last_tokens():
    model, ids = TinyLM(), stream().ids
    with torch.no_grad():
        alone = model(ids[:, -9:])[:, -1]
        with patched(model, functools.partial(window_state, window=9)):
            windowed = model(ids)[:, -1]
        base = model(ids)[:, -1]
    torch.testing.assert_close(windowed, alone, **EXACT)
    assert (base - alone).abs().max() > 1e-6 and model.block.scan is ssd_chunked


def test_the_probe_reads_states_and_loss():
    model, task = TinyLM(), stream()
    probe = collapse_probe(model, task, every=16)
    assert probe.positions.tolist() == [16, 32, 40] and probe.norm.shape == (1, 3, 2)
    with torch.no_grad():
        _, state = model.block(model.enter(task.ids[:, :32]))
        logits = model(task.ids)
    numbers = state.scan.flatten(2)
    torch.testing.assert_close(probe.norm[0, 1], numbers.norm(dim=2).mean(0), **EXACT)
    torch.testing.assert_close(probe.mean[0, 1], numbers.mean(2).mean(0), **EXACT)
    variance = numbers.var(2, correction=0).mean(0)
    torch.testing.assert_close(probe.variance[0, 1], variance, **EXACT)
    parts = logits[:, 16:32].flatten(0, 1), task.targets[:, 16:32].flatten()
    loss = torch.nn.functional.cross_entropy(*parts, ignore_index=IGNORE)
    torch.testing.assert_close(probe.loss[1], loss, **EXACT)


def test_a_bin_without_questions_has_no_loss():
    task = stream(L=24)
    task.targets[:, 8:16] = IGNORE
    loss = collapse_probe(TinyLM(), task, every=8).loss
    assert loss.isnan().tolist() == [False, True, False]


def test_what_is_left_of_the_first_step():
    model, task = TinyLM(), stream()
    block, seen = model.block, {}

    def spy(x, dt, A, *rest, **options):
        seen["log"] = step_size(dt, options["dt_bias"], True) * A[:, None]
        return ssd_chunked(x, dt, A, *rest, **options)

    with patched(model, spy), torch.no_grad():
        model(task.ids)
    left = seen["log"][:, :, 1:32].sum(2).exp().mean(0)
    torch.testing.assert_close(collapse_probe(model, task).retained[0, 1], left, **EXACT)
    assert block.scan is ssd_chunked


def test_the_probe_and_windows_do_not_mix():
    model = TinyLM()
    with patched(model, functools.partial(window_state, window=4)):
        with pytest.raises(ValueError, match="state: expected None or zeros"):
            collapse_probe(model, stream())
    assert model.block.scan is ssd_chunked


def test_the_stream_asks_for_what_was_told():
    task = stream(L=101)
    assert task.ids.shape == task.targets.shape == (3, 101)
    asked = 0
    for ids, targets in zip(task.ids.tolist(), task.targets.tolist()):
        last, order = {}, []
        for p in range(50):
            key, value, target = ids[2 * p], ids[2 * p + 1], targets[2 * p]
            if target != IGNORE:
                asked += 1
                assert target == value == last[key] and key in order[-3:]
            assert 0 <= key < 8 <= value < 12 and targets[2 * p + 1] == IGNORE
            last[key] = value
            order.append(key)
    assert 50 < asked < 100
    assert torch.equal(stream().ids, stream().ids)
    assert not torch.equal(stream().ids, stream(seed=1).ids)


def test_capacity_and_collapse():
    def knows(share):
        def model(ids):
            say = torch.where(torch.arange(ids.shape[1]) < share * ids.shape[1], 1, 0)
            return torch.nn.functional.one_hot(say, 3)[None].expand(len(ids), -1, -1).double()

        return model

    def task(length):
        return TaskBatch(torch.zeros(2, length).long(), torch.ones(2, length).long())

    curve = capacity_curve({"all": knows(1.0), "half": knows(0.5)}, [4, 8], task)
    assert curve == {"all": [1.0, 1.0], "half": [0.5, 0.5]}
    assert recall_length([4, 8, 16], [1.0, 0.96, 0.9]) == 8
    assert recall_length([4, 8, 16], [0.9, 1.0, 1.0]) == 0
    positions, loss = torch.tensor([8, 16, 24, 32]), torch.tensor([0.1, 0.5, torch.nan, 1.5])
    assert collapse_ratio(positions, loss, 16) == 3.0


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: window_state(**g, window=0), ValueError, "window: expected at least 1"),
        (lambda g: window_reference(**g, window=2.0), TypeError, "window: expected an int"),
        (lambda g: state_norm_clip(**g, largest=0), ValueError, "largest: expected more than 0"),
        (lambda g: forget_scale(**g, retention=1.1), ValueError, "retention: expected more"),
        (lambda g: forget_scale(**g, insertion=-1), ValueError, "insertion: expected at least 0"),
        (lambda g: collapse_probe(TinyLM(), stream(), every=0), ValueError, "every: expected"),
        (lambda g: collapse_probe(torch.nn.Linear(2, 2), stream()), ValueError, "model: expected"),
        (lambda g: capacity_curve({}, [1], None), ValueError, "models, lengths: expected"),
        (lambda g: stream(L=0), ValueError, "length: expected at least 1"),
        (
            lambda g: collapse_ratio(torch.tensor([8]), torch.tensor([1.0]), 8),
            ValueError,
            "trained: expected losses on both sides",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(inputs(L=3))
