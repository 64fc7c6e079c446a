"""The surveys' ancestors and controls: contract, and each against something independent."""

from __future__ import annotations

import pytest
import torch

from corelib.measure.probes import state_bytes
from corelib.primitives import fft_conv
from corelib.state_space.s4d import S4D
from corelib.state_space.survey_layers import H3, LSSL, CausalAttention, GatedRecurrence, Hybrid
from corelib.testing import conformance

EXACT = dict(atol=1e-10, rtol=1e-10)


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def made(layer, *sizes, **options):
    torch.manual_seed(0)
    return layer(*sizes, **options).double()


LAYERS = {
    "lssl": (LSSL, 4, 6),
    "h3": (H3, 4, 6),
    "attention": (CausalAttention, 8, 4, 2),
    "recurrence": (GatedRecurrence, 4, 6),
    "hybrid": (Hybrid, 4, 6),
}


@pytest.mark.parametrize("name", LAYERS)
def test_conformance(name):
    layer, width, *sizes = LAYERS[name]
    conformance(made(layer, width, *sizes), rand(2, 9, width), leak=1e-12)


def test_lssl_is_the_loop_of_dense_matrices():
    layer, x = made(LSSL, 3, 8), rand(2, 20, 3)
    A_bar, B_bar = layer.discrete()
    h, wanted = layer.init_state(2), []
    for x_t in x.unbind(1):
        h = torch.einsum("cnm,bcm->bcn", A_bar, h) + B_bar * x_t[..., None]
        wanted.append((layer.C * h).sum(-1) + layer.skip * x_t)
    got, state = layer(x)
    torch.testing.assert_close(got, torch.stack(wanted, 1), **EXACT)
    torch.testing.assert_close(state, h, **EXACT)


def test_lssl_equals_scipy():
    signal = pytest.importorskip("scipy.signal")
    layer, x = made(LSSL, 1, 6), rand(1, 25, 1)
    step = layer.log_step.exp().item()
    given = (layer.A.numpy(), layer.B[:, None].numpy(), layer.C.detach().numpy(), [[0.0]])
    A_bar, B_bar, *_ = signal.cont2discrete(given, step, "bilinear")
    kernel = layer.kernel(25)[0].detach()
    at = torch.from_numpy(B_bar[:, 0])
    for tap in kernel:
        torch.testing.assert_close(tap, layer.C[0].detach() @ at, **EXACT)
        at = torch.from_numpy(A_bar) @ at
    wanted = fft_conv(x.mT.contiguous(), kernel[None])[0, 0] + layer.skip.detach() * x[0, :, 0]
    torch.testing.assert_close(layer(x)[0][0, :, 0].detach(), wanted, **EXACT)


def test_h3_written_out():
    layer, x = made(H3, 3, 4, taps=3), rand(2, 11, 3)
    q, k, v = layer.qkv(x).chunk(3, -1)
    shifted = sum(
        layer.taps[:, 2 - lag] * torch.cat([torch.zeros_like(k[:, :lag]), k[:, : 11 - lag]], 1)
        for lag in range(3)
    )
    wanted = layer.out(q * layer.memory(shifted * v)[0])
    torch.testing.assert_close(layer(x)[0], wanted, **EXACT)


def test_h3_with_open_gates_is_its_system():
    """Constant queries and keys, a shift that does nothing: the diagonal system on the values."""

    class OpenGates(torch.nn.Module):
        def forward(self, x):
            one = torch.ones_like(x)
            return torch.cat([one, one, x], -1)

    layer, x = made(H3, 3, 4, taps=1), rand(2, 7, 3)
    layer.qkv, layer.out = OpenGates(), torch.nn.Identity()
    layer.taps.data.fill_(1)
    assert isinstance(layer.memory, S4D)
    torch.testing.assert_close(layer(x)[0], layer.memory(x)[0], **EXACT)


def test_attention_equals_torchs():
    from corelib.primitives import rope_frequencies, rope_half_split

    layer, x = made(CausalAttention, 8, 4, 2), rand(2, 9, 8)
    parts = layer.qkv(x).unflatten(-1, (-1, 2)).transpose(1, 2)
    q, k, v = parts.split([4, 2, 2], 1)
    at = torch.arange(9)
    q, k = (rope_half_split(y, at, rope_frequencies(2).double()) for y in (q, k))
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    wanted = layer.out(wanted.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x)[0], wanted, **EXACT)


def test_recurrence_equals_torchs_cell():
    layer, x = made(GatedRecurrence, 3, 5), rand(2, 7, 3)
    cell = torch.nn.GRUCell(3, 5).double()
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    cell.load_state_dict({name: getattr(layer.gru, f"{name}_l0") for name in names})
    h = torch.zeros(2, 5, dtype=torch.float64)
    for t, y in enumerate(layer(x)[0].unbind(1)):
        h = cell(x[:, t], h)
        torch.testing.assert_close(y, layer.out(h), **EXACT)


def test_the_hybrid_is_both_in_a_row():
    layer, x = made(Hybrid, 4, 6), rand(2, 7, 4)
    y, recurrent = layer.recurrent(x)
    more, cache = layer.attention(y)
    got, state = layer(x)
    torch.testing.assert_close(got, y + more, **EXACT)
    assert state_bytes(state) == state_bytes(recurrent) + state_bytes(cache)


def test_a_state_of_s4d_counts_and_can_be_taken_apart():
    from torch.utils._pytree import tree_flatten, tree_unflatten

    layer, x = made(S4D, 3, 4), rand(2, 5, 3)
    _, state = layer(x)
    assert state_bytes(state) == 2 * 3 * 4 * 8
    again = tree_unflatten(*tree_flatten(state))
    torch.testing.assert_close(layer.step(x[:, 0], again)[0], layer.step(x[:, 0], state)[0])


@pytest.mark.no_shape_checks
def test_bad_heads_are_named():
    with pytest.raises(ValueError, match="heads, kv_heads: expected heads to divide width"):
        CausalAttention(6, 4)
