"""What the race of raw sound is run with: networks of one size, trained and measured alike."""

import pytest
import torch

from corelib.measure.races import audio
from corelib.measure.races.audio import WaveNet
from corelib.testing import causality_probe

pytestmark = pytest.mark.method("sashimi")


def small_wavenet():
    torch.manual_seed(0)
    return WaveNet(7, 4, (1, 2, 4)).double()


def test_wavenet_steps_equal_parallel():
    model = small_wavenet()
    ids = torch.randint(7, (2, 19), generator=torch.Generator().manual_seed(0))
    whole, _ = model(ids)
    logits, queues = model(ids[:, :6])
    pieces = list(logits.unbind(1))
    for ids_t in ids[:, 6:].unbind(1):
        y, queues = model.step(ids_t, queues)
        pieces.append(y)
    torch.testing.assert_close(torch.stack(pieces, 1), whole, atol=1e-10, rtol=1e-10)


@pytest.mark.no_shape_checks
def test_wavenet_sees_the_sum_of_its_dilations_and_no_future():
    model = small_wavenet()
    x = torch.randn(1, 12, 4, dtype=torch.float64)
    model.embed = torch.nn.Identity()
    influence = causality_probe(lambda x: model(x)[0], x)
    back = torch.arange(12)[:, None] - torch.arange(12)
    assert torch.equal(influence > 0, (back >= 0) & (back <= 7))


def test_networks_are_of_one_size():
    sizes = [sum(p.numel() for p in m.parameters()) for m in audio.networks(16).values()]
    assert max(sizes) < 1.1 * min(sizes)


def test_fit_learns_and_leaves_the_system_a_slower_rate():
    torch.manual_seed(0)
    model = audio.networks(32)["SaShiMi"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    codes, called = audio.music(8, 32, seed=0), []
    curve = audio.fit(model, codes, steps=5, after=lambda: called.append(1))
    assert len(curve) == len(called) == 5 and curve[-1] < curve[0]
    moved = {n: (p.detach() - before[n]).abs().max() for n, p in model.named_parameters()}
    slow = max(v for n, v in moved.items() if n.endswith("log_rate"))
    assert 0 < slow < 5 * 2.1e-3 < moved["head.weight"]


@pytest.mark.no_shape_checks
def test_bits_by_context_is_about_the_same_codes():
    """A model that knows how many codes it saw, and is right if that is enough."""

    def model(ids):
        logits = torch.zeros(*ids.shape, 2)
        if ids.shape[1] >= 8:
            logits[..., 1] = 50.0
        return logits, None

    codes = torch.ones(3, 40, dtype=torch.long)
    assert audio.bits_by_context(model, codes, (4, 8)) == pytest.approx({4: 1.0, 8: 0.0})


def test_the_shipped_runs_are_whole():
    runs = audio.recorded()
    assert [run["network"] for run in runs] == list(audio.networks(16))
    for run in runs:
        assert len(run["bits"]) == audio.STEPS
        assert [int(k) for k in run["by_context"]] == list(audio.CONTEXTS)
        assert 0 < min(run["by_context"].values()) < 6
