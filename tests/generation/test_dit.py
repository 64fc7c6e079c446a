"""The small diffusion transformer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from corelib.generation import dit

pytestmark = pytest.mark.method("gridit")


def test_an_untrained_net_says_zero_and_its_blocks_do_nothing():
    model = dit.DiT(dit.DiTConfig(patch=4, width=12, layers=2, heads=2, condition=8))
    patches, positions = torch.randn(2, 5, 4), torch.zeros(5, 3, dtype=torch.long)
    assert not model(patches, positions, torch.tensor([1, 9])).any()
    x = torch.randn(2, 5, 12)
    assert torch.equal(model.layers[0](x, model.modulations[0](torch.randn(2, 8))), x)


def plainly(model, patches, positions, t, label):
    """The forward pass written out, with torch's own attention."""
    C, heads = model.config.width, model.config.heads
    c = model.time(dit.sincos(t, model.config.condition)) + model.label(label)
    x = model.embed(patches) + dit.sincos_positions(positions, C)
    for block, modulation in zip(model.layers, model.modulations, strict=True):
        parts = modulation(F.silu(c)).unflatten(1, (6, 1, C)).unbind(1)
        y = F.layer_norm(x, (C,), eps=1e-6) * (1 + parts[1]) + parts[0]
        q, k, v = (
            part.unflatten(2, (heads, -1)).transpose(1, 2) for part in block.qkv(y).chunk(3, -1)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + parts[2] * block.project(out)
        y = F.layer_norm(x, (C,), eps=1e-6) * (1 + parts[4]) + parts[3]
        x = x + parts[5] * block.down(F.gelu(block.up(y), approximate="tanh"))
    shift, scale = model.last_modulation(F.silu(c)).unflatten(1, (2, 1, C)).unbind(1)
    return model.read(F.layer_norm(x, (C,), eps=1e-6) * (1 + scale) + shift)


@pytest.mark.parametrize("short", [0, 256])
def test_forward_and_gradients_are_the_definition(monkeypatch, short):
    monkeypatch.setattr(dit, "SHORT", short)  # 0: the attention of corelib.primitives
    model, inputs = dit.example()
    got, want = model(**inputs), plainly(model, **inputs)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)
    parameters = list(model.parameters())
    weight = torch.linspace(-1, 1, got.numel(), dtype=torch.float64).view_as(got)
    ours, theirs = (torch.autograd.grad((x * weight).sum(), parameters) for x in (got, want))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_without_a_label_is_the_last_label():
    model, inputs = dit.example()
    inputs["label"] = torch.tensor([3, 3])
    assert torch.equal(model(**inputs), model(**(inputs | {"label": None})))


def test_patches_are_a_set_with_positions():
    model, inputs = dit.example()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    moved = inputs | {
        "patches": inputs["patches"][:, order], "positions": inputs["positions"][order]
    }  # fmt: skip
    torch.testing.assert_close(model(**moved), model(**inputs)[:, order], atol=1e-12, rtol=0)


def test_pictures_to_patches_and_back():
    pictures = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = dit.patchify(pictures, 2)
    assert patches.shape == (2, 6, 12)
    assert torch.equal(patches[1, 4], pictures[1, :, 2:4, 2:4].flatten())  # row 1, column 1
    assert torch.equal(dit.unpatchify(patches, 2, 4, 6), pictures)


def test_positions_are_told_apart():
    codes = dit.sincos_positions(torch.cartesian_prod(*[torch.arange(5)] * 3), 12)
    assert codes.shape == (125, 12) and torch.cdist(codes, codes).add(
        10 * torch.eye(125)
    ).min() > 0.01  # fmt: skip
    frame, row, column = codes[:, :4], codes[:, 4:8], codes[:, 8:]
    assert torch.equal(frame[7], frame[0]) and not torch.equal(row[7], row[0])
    assert torch.equal(column[2], column[7])


def test_same_seed_same_net():
    config = dit.DiTConfig(patch=4, width=12, layers=1, heads=2)
    one, two, other = (dit.DiT(config, seed).embed.weight for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_flops_are_those_of_the_matrix_products():
    model, inputs = dit.example()
    counted, pairs = [], 2 * (2 * 2 * 9 * 9 * 12)  # two blocks: q k^T and weights v

    def count(layer, given, out):
        counted.append(2 * given[0].numel() * out.shape[-1])

    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(count)
    model(**{k: v[:1] if k != "positions" else v for k, v in inputs.items()})
    assert dit.dit_flops(model.config, 9) == sum(counted) + pairs


BAD = {
    "width: expected a multiple": lambda: dit.DiTConfig(patch=4, width=10, heads=2),
    "width: expected an even": lambda: dit.sincos(torch.zeros(2), 3),
    "width: expected a multiple of 6": lambda: dit.sincos_positions(
        torch.zeros(2, 3, dtype=torch.long), 8
    ),
    "patch: expected a divisor": lambda: dit.patchify(torch.zeros(1, 1, 4, 6), 4),
    "positions: expected one": lambda: dit.DiT(dit.DiTConfig(patch=4, width=12, heads=2))(
        torch.zeros(1, 2, 4), torch.zeros(3, 3, dtype=torch.long), torch.tensor([1])
    ),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        BAD[message]()
