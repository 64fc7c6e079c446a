"""RoPE: the rotation by complex numbers, the relative property, and transformers as oracle."""

import math

import pytest
import torch

from corelib.primitives import (
    dynamic_ntk_frequencies,
    half_split_to_interleaved,
    interleaved_to_half_split,
    linear_frequencies,
    llama3_frequencies,
    ntk_frequencies,
    rope_frequencies,
    rope_half_split,
    rope_interleaved,
    yarn_attention_factor,
    yarn_frequencies,
)

F64 = torch.float64
PAIRINGS = [rope_half_split, rope_interleaved]


def x_of(*shape, dtype=F64, seed=0):
    torch.manual_seed(seed)
    return torch.randn(*shape, dtype=dtype)


# ---------------------------------------------------------------- the rotation


def test_interleaved_is_multiplication_of_complex_numbers():
    x, positions = x_of(2, 3, 5, 8), torch.tensor([0.0, 1.0, 2.5, 100.0, -7.0], dtype=F64)
    turn = torch.exp(1j * positions[:, None] * rope_frequencies(8))
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (4, 2))) * turn).flatten(-2)
    torch.testing.assert_close(rope_interleaved(x, positions, rope_frequencies(8)), expected)


def test_half_split_on_one_pair_by_hand():
    x = torch.tensor([[[[1.0, 0.0]]]], dtype=F64)
    turned = rope_half_split(x, torch.tensor([2]), torch.tensor([0.25], dtype=F64))
    expected = torch.tensor([[[[math.cos(0.5), math.sin(0.5)]]]], dtype=F64)
    torch.testing.assert_close(turned, expected)


def test_pairings_differ_by_the_order_of_channels():
    x, positions, frequencies = x_of(1, 2, 4, 8), torch.arange(4), rope_frequencies(8)
    through = half_split_to_interleaved(
        rope_half_split(interleaved_to_half_split(x), positions, frequencies)
    )
    torch.testing.assert_close(through, rope_interleaved(x, positions, frequencies))
    assert interleaved_to_half_split(torch.arange(6)).tolist() == [0, 2, 4, 1, 3, 5]
    assert half_split_to_interleaved(interleaved_to_half_split(torch.arange(6))).tolist() == [
        0, 1, 2, 3, 4, 5,
    ]  # fmt: skip


@pytest.mark.parametrize("rope", PAIRINGS)
def test_scores_depend_on_differences_of_positions(rope):
    q, k, frequencies = x_of(1, 1, 6, 8), x_of(1, 1, 6, 8, seed=1), rope_frequencies(8)
    p = torch.tensor([0.0, 3.0, 4.5, 10.0, 11.0, 700.0], dtype=F64)

    def scores(shift):
        q_turned, k_turned = (rope(x, p + shift, frequencies) for x in (q, k))
        return q_turned @ k_turned.transpose(-1, -2)

    torch.testing.assert_close(scores(0.0), scores(1234.5), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(scores(0.0), q @ k.transpose(-1, -2))


@pytest.mark.parametrize("rope", PAIRINGS)
def test_rotating_back_and_moving(rope):
    x, frequencies = x_of(2, 2, 5, 8), rope_frequencies(8)
    p, r = torch.arange(5), torch.tensor([9, 8, 0, 1, 2])
    there = rope(x, p, frequencies)
    torch.testing.assert_close(rope(there, -p, frequencies), x)
    torch.testing.assert_close(rope(there, r - p, frequencies), rope(x, r, frequencies))
    torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("rope", PAIRINGS)
def test_positions_per_row_and_per_head(rope):
    x, frequencies = x_of(2, 3, 4, 8), rope_frequencies(8)
    positions = torch.rand(2, 3, 4, dtype=F64) * 50
    per_head = rope(x, positions, frequencies)
    per_row = rope(x, positions[:, 1], frequencies)
    for b in range(2):
        for h in range(3):
            alone = rope(x[b : b + 1, h : h + 1], positions[b, h], frequencies)
            torch.testing.assert_close(per_head[b : b + 1, h : h + 1], alone)
        same = rope(x[b : b + 1], positions[b, 1], frequencies)
        torch.testing.assert_close(per_row[b : b + 1], same)


@pytest.mark.parametrize("rope", PAIRINGS)
def test_partial_rotary_and_attention_factor(rope):
    x, positions, frequencies = x_of(1, 1, 3, 10), torch.arange(3), rope_frequencies(6)
    turned = rope(x, positions, frequencies, attention_factor=1.5)
    assert torch.equal(turned[..., 6:], x[..., 6:])
    torch.testing.assert_close(
        turned[..., :6], 1.5 * rope(x[..., :6].contiguous(), positions, frequencies)
    )


@pytest.mark.parametrize("rope", PAIRINGS)
def test_gradcheck_in_input_and_positions(rope):
    x, positions = x_of(1, 2, 3, 4).requires_grad_(), x_of(1, 2, 3, seed=1).requires_grad_()
    frequencies = rope_frequencies(4)
    assert torch.autograd.gradcheck(lambda x, p: rope(x, p, frequencies), (x, positions))


@pytest.mark.parametrize("rope", PAIRINGS)
def test_precision_far_away(rope):
    """At position 10**6 float32 angles would be off by 1e-2; half inputs round once."""
    x, positions, frequencies = (
        x_of(1, 1, 2, 8),
        torch.tensor([10**6, 10**6 + 1]),
        rope_frequencies(8),
    )
    exact = rope(x, positions, frequencies)
    single = rope(x.float(), positions, frequencies)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=1e-6)
    half = rope(x.half(), positions, frequencies)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), exact, rtol=2e-3, atol=2e-3)


def test_no_positions():
    assert rope_half_split(x_of(1, 2, 0, 4), torch.arange(0), rope_frequencies(4)).shape[2] == 0


# ---------------------------------------------------------------- frequencies


def test_limits_of_the_scaling_modes():
    plain = rope_frequencies(16)
    assert plain[0] == 1.0 and plain[-1].item() == pytest.approx(10_000 ** (-14 / 16))
    ntk = ntk_frequencies(16, factor=8.0)
    assert ntk[0] == plain[0] and (ntk[-1] * 8 / plain[-1]).item() == pytest.approx(1.0)
    within = dynamic_ntk_frequencies(16, length=100, original_length=2048, factor=4.0)
    torch.testing.assert_close(within, plain)
    yarn = yarn_frequencies(128, factor=4.0, original_length=2048)
    wide = rope_frequencies(128)
    assert torch.equal(yarn[:10], wide[:10])
    torch.testing.assert_close(yarn[-10:], wide[-10:] / 4)
    assert ((yarn <= wide) & (yarn >= wide / 4 * (1 - 1e-12))).all()
    for mode in (linear_frequencies(16, factor=1.0), ntk_frequencies(16, factor=1.0),
                 yarn_frequencies(16, factor=1.0, original_length=64)):  # fmt: skip
        torch.testing.assert_close(mode, plain)
    assert yarn_attention_factor(1.0) == 1.0


ORACLE_CASES = [
    (64, 10_000.0, 2048, 4.0),
    (128, 500_000.0, 8192, 8.0),
    (16, 100.0, 64, 40.0),
    (96, 10_000.0, 4096, 1.0),
]


@pytest.mark.parametrize("D, base, original, factor", ORACLE_CASES)
@pytest.mark.parametrize("mode", ["linear", "dynamic", "yarn", "llama3"])
def test_equals_transformers(mode, D, base, original, factor):
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = dict(rope_type=mode, rope_theta=base, factor=factor)
    parameters |= dict(original_max_position_embeddings=original)
    if mode == "llama3":
        parameters |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
    config = LlamaConfig(
        hidden_size=2 * D, num_attention_heads=2, head_dim=D, max_position_embeddings=original,
        rope_parameters=parameters,
    )  # fmt: skip
    length = 3 * original
    theirs, attention_factor = ROPE_INIT_FUNCTIONS[mode](config, None, seq_len=length)
    common = dict(factor=factor, base=base)
    ours = {
        "linear": lambda: linear_frequencies(D, **common),
        "dynamic": lambda: dynamic_ntk_frequencies(
            D, length=length, original_length=original, **common
        ),
        "yarn": lambda: yarn_frequencies(D, original_length=original, **common),
        "llama3": lambda: llama3_frequencies(D, original_length=original, **common),
    }[mode]()
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-5, atol=1e-9)
    expected = yarn_attention_factor(factor) if mode == "yarn" else 1.0
    assert attention_factor == pytest.approx(expected)


@pytest.mark.slow  # importing two models takes seconds
def test_rotation_equals_transformers():
    pytest.importorskip("transformers")
    from transformers.models.gptj.modeling_gptj import (
        apply_rotary_pos_emb as gptj,
    )
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

    x, positions, frequencies = x_of(2, 3, 5, 8), torch.arange(5) * 7.0, rope_frequencies(8)
    angles = positions[:, None].double() * frequencies
    cos, sin = angles.cos(), angles.sin()
    theirs, _ = llama(x, x, torch.cat([cos, cos], -1)[None], torch.cat([sin, sin], -1)[None])
    torch.testing.assert_close(rope_half_split(x, positions, frequencies), theirs)
    theirs = gptj(x.transpose(1, 2), sin[None], cos[None]).transpose(1, 2)
    torch.testing.assert_close(rope_interleaved(x, positions, frequencies), theirs)


@pytest.mark.no_shape_checks
def test_errors():
    x, frequencies = x_of(2, 3, 4, 8), rope_frequencies(8)
    cases = [
        (lambda: rope_frequencies(7), "D: expected an even width"),
        (lambda: rope_frequencies(8, base=0.0), "base: expected more than 0"),
        (lambda: ntk_frequencies(2, factor=2.0), "D: expected at least 4"),
        (lambda: linear_frequencies(8, factor=-1.0), "factor: expected more than 0"),
        (lambda: yarn_frequencies(8, factor=2.0, original_length=0), "original_length: expected"),
        (
            lambda: llama3_frequencies(8, low_frequency_factor=4.0),
            "high_frequency_factor: expected",
        ),
        (lambda: rope_half_split(x, torch.arange(5), frequencies), "positions: expected shape"),
        (lambda: rope_half_split(x, torch.zeros(3, 4), frequencies), "positions: expected shape"),
        (lambda: rope_half_split(x, torch.tensor(1.0), frequencies), "positions: expected shape"),
        (lambda: rope_interleaved(x, torch.arange(4), torch.ones(5)), "frequencies: expected at"),
        (lambda: rope_half_split(x[0], torch.arange(4), frequencies), "x: expected floating"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
