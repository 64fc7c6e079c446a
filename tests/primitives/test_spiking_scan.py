"""Spiking neurons over time: against the loop and its automatic derivative."""

from __future__ import annotations

import pytest
import torch

from corelib.primitives.spiking_scan import spiking_scan, spiking_scan_reference

pytestmark = pytest.mark.method("lmuformer")
EXACT = dict(atol=1e-12, rtol=1e-11)


def inputs(B=2, L=23, C=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(L)
    x = 2 * torch.randn(B, L, C, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.rand(B, C, generator=generator, dtype=torch.float64).to(dtype)


def results(scan, x, state, **options):
    """Spikes, the membrane, and the gradients of both through both outputs."""
    leaves = [y.clone().requires_grad_() for y in (x, state)]
    spikes, v = scan(leaves[0], state=leaves[1], **options)
    weight = torch.linspace(-1, 2, spikes.numel(), dtype=x.dtype).view(spikes.shape)
    grads = torch.autograd.grad((spikes * weight).sum() + (v**3).sum(), leaves, allow_unused=True)
    return [spikes, v, *(torch.zeros_like(y) if g is None else g for g, y in zip(grads, leaves))]


@pytest.mark.parametrize("L", [0, 1, 2, 23, 70])
@pytest.mark.parametrize("options", [{}, dict(tau=1.25, threshold=0.4, slope=2.5)])
def test_spikes_and_gradients_are_the_loops(L, options):
    x, state = inputs(L=L)
    got, wanted = (results(f, x, state, **options) for f in (spiking_scan, spiking_scan_reference))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, **EXACT)


def test_many_channels():
    """The other route of the scan behind the gradients: as many channels as a step is worth."""
    x, state = inputs(B=1, L=18, C=4200)
    got, wanted = (results(f, x, state) for f in (spiking_scan, spiking_scan_reference))
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, **EXACT)


def test_by_hand():
    """tau 2, threshold 1: half of 2 fires at once; 1.2 charges up and fires at the third step."""
    x = torch.tensor([[[2.0, 1.2], [0.0, 1.2], [1.9, 1.2], [1.9, 1.2]]])
    spikes, v = spiking_scan(x)
    assert spikes[0].T.tolist() == [[1, 0, 0, 1], [0, 0, 1, 0]]
    torch.testing.assert_close(v, torch.tensor([[0.0, 0.6]]))


def test_a_continued_stretch():
    x, state = inputs()
    whole, end = spiking_scan(x, state=state)
    first, middle = spiking_scan(x[:, :9], state=state)
    second, last = spiking_scan(x[:, 9:], state=middle)
    assert torch.equal(torch.cat([first, second], 1), whole) and torch.equal(last, end)


def test_starts_at_rest_and_reads_any_layout():
    x, state = inputs()
    assert torch.equal(spiking_scan(x)[0], spiking_scan(x, state=torch.zeros_like(state))[0])
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(spiking_scan(turned)[0], spiking_scan(x)[0])


def test_spikes_do_not_see_the_future():
    x, _ = inputs()
    later = x.clone()
    later[:, 12:] += 5
    before, after = spiking_scan(x)[0], spiking_scan(later)[0]
    assert torch.equal(before[:, :12], after[:, :12]) and not torch.equal(before, after)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes(dtype):
    x, state = inputs(L=6, dtype=dtype)
    got = results(spiking_scan, x, state)
    wanted = results(spiking_scan_reference, x.float(), state.float())
    assert all(y.dtype == dtype for y in got)
    assert torch.equal(got[0].float(), wanted[0])
    torch.testing.assert_close(got[2].float(), wanted[2], atol=3e-2, rtol=3e-2)


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.zeros(2, 3)), ValueError, "x: expected 3 axes"),
        (dict(x=torch.zeros(1, 2, 3, dtype=torch.int64)), TypeError, "x: expected"),
        (dict(tau=1.0), ValueError, "tau: expected a number above 1, got 1.0"),
        (dict(threshold=0), ValueError, "threshold: expected a number above 0"),
        (dict(slope=-1.0), ValueError, "slope: expected a number above 0"),
        (dict(state=torch.zeros(1, 2)), ValueError, r"state: expected shape \(1, 3\)"),
        (dict(state=torch.zeros(1, 3).double()), TypeError, "state: expected the dtype of x"),
    ],
)
def test_bad_input_is_named(change, error, message):
    with pytest.raises(error, match=message):
        spiking_scan(**dict(x=torch.zeros(1, 2, 3)) | change)
