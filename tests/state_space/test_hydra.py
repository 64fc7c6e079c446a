"""Hydra: two scans in one call are a quasiseparable matrix, whatever the length and the chunk."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F

from corelib.measure.structure import materialize, structure_report
from corelib.primitives import ssd_reference
from corelib.state_space import hydra
from corelib.state_space.bidirectional import shift, unshift
from corelib.state_space.hydra import (
    Hydra,
    Scan,
    added,
    multiplied,
    quasiseparable,
    quasiseparable_matrix,
    quasiseparable_reference,
)
from corelib.testing import assert_same, causality_probe

H, V, N = 4, 3, 2


def given(L, groups=2, batch=2, seed=0):
    """Values, two scans with decays of their own, and a diagonal."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def scan():
        B, C = draw(2, batch, groups, L, N)
        return Scan(F.softplus(draw(batch, H, L)), -draw(H).exp(), B, C)

    return dict(x=draw(batch, H, L, V), past=scan(), future=scan(), diagonal=draw(batch, H, L))


def entry(i, j, past, future, diagonal, b, h):
    """``M_ij`` as the docstring has it."""
    if i == j:
        return diagonal[b, h, i]
    scan, read, between = (
        (past, i - 1, range(j + 1, i)) if i > j else (future, i + 1, range(i + 1, j))
    )
    group = h // (H // scan.B.shape[1])
    decay = torch.exp(scan.A[h] * sum((scan.dt[b, h, m] for m in between), torch.zeros(())))
    return decay * scan.dt[b, h, j] * (scan.C[b, group, read] @ scan.B[b, group, j])


def test_doctest():
    failures, tests = doctest.testmod(hydra)
    assert tests and not failures


def test_the_matrix_is_the_formula():
    parts = given(6)
    parts.pop("x")
    M = quasiseparable_matrix(**parts)
    for b, h in ((0, 0), (1, 2), (1, 3)):
        wanted = torch.tensor(
            [[entry(i, j, **parts, b=b, h=h) for j in range(6)] for i in range(6)]
        )
        assert_same(M[b, h], wanted)


@pytest.mark.parametrize("L, chunk", [(1, 64), (2, 1), (3, 2), (17, 4), (17, 64), (70, 64)])
def test_product_loop_and_matrix_agree(L, chunk):
    parts = given(L)
    y = quasiseparable(**parts, chunk=chunk)
    assert_same(y, quasiseparable_reference(**parts))
    x = parts.pop("x")
    assert_same(y, quasiseparable_matrix(**parts) @ x)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradients_are_the_matrix_products(groups):
    parts = given(7, groups)
    leaves = [parts["x"], *parts["past"], *parts["future"], parts["diagonal"]]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    weight = torch.linspace(-1, 1, parts["x"].numel(), dtype=torch.float64)

    def gradients(y):
        return torch.autograd.grad(y.flatten() @ weight, leaves)

    x = parts["x"]
    rest = {name: part for name, part in parts.items() if name != "x"}
    wanted = gradients(quasiseparable_matrix(**rest) @ x)
    assert_same(gradients(quasiseparable(**parts, chunk=3)), wanted)
    assert_same(gradients(quasiseparable_reference(**parts)), wanted)


def test_ranks_below_and_above_are_the_states():
    g = torch.Generator().manual_seed(1)
    for n in (1, 3):
        scans = []
        for _ in range(2):
            B, C = torch.randn(2, 1, 1, 14, n, generator=g, dtype=torch.float64)
            dt = torch.rand(1, 1, 14, generator=g, dtype=torch.float64)
            scans.append(Scan(dt, torch.tensor([-0.3], dtype=torch.float64), B, C))
        diagonal = torch.randn(1, 1, 14, generator=g, dtype=torch.float64)
        M = quasiseparable_matrix(*scans, diagonal)[0, 0]
        seen = structure_report(M)
        assert (seen.state_forward, seen.state_backward, seen.rank) == (n, n, 14)
        assert torch.equal(M.diagonal(), diagonal[0, 0])


def test_without_future_and_diagonal_it_is_mambas_scan_a_step_late():
    parts = given(9)
    dt, A, B, C = parts["future"]
    off = Scan(dt, A, B, torch.zeros_like(C))
    y = quasiseparable(parts["x"], parts["past"], off, torch.zeros_like(parts["diagonal"]))
    assert_same(y, shift(ssd_reference(parts["x"], *parts["past"])))
    assert not y[:, :, 0].any()


def test_reversing_and_swapping_sides_reverses():
    x, past, future, diagonal = given(8).values()
    y = quasiseparable(x, past, future, diagonal)
    mirrored = quasiseparable(x.flip(2), future.mirrored(), past.mirrored(), diagonal.flip(2))
    assert_same(mirrored.flip(2), y)
    assert past.mirrored().B.shape == past.B.shape


def test_adding_is_the_special_case_with_a_tied_diagonal():
    """``a_i C_i`` in the place of ``C_(i-1)``, and the diagonal that both scans bring."""
    x, past, future, diagonal = given(9, groups=H).values()
    y = added(x, past, future, diagonal)
    below = ssd_reference(x, *past)
    above = ssd_reference(x.flip(2), *future.mirrored()).flip(2)
    assert_same(y, below + above + diagonal[..., None] * x)

    def decayed(scan):
        return torch.exp(scan.dt * scan.A[:, None])[..., None] * scan.C

    tied = sum(scan.dt * (scan.C * scan.B).sum(-1) for scan in (past, future))
    quasi = quasiseparable(
        x,
        past._replace(C=unshift(decayed(past))),
        future._replace(C=shift(decayed(future))),
        diagonal + tied,
    )
    assert_same(quasi, y)


def test_multiplying():
    x, past, future, diagonal = given(5).values()
    below = ssd_reference(x, *past)
    above = ssd_reference(x.flip(2), *future.mirrored()).flip(2)
    assert_same(multiplied(x, past, future, diagonal), below * above + diagonal[..., None] * x)


# --- the layer


def layer(**options):
    torch.manual_seed(0)
    return Hydra(8, state=3, head_width=4, **options).double()


def tokens(L, batch=2):
    g = torch.Generator().manual_seed(L)
    return torch.randn(batch, L, 8, generator=g, dtype=torch.float64)


def by_hand(mixer, x):
    """The layer from its parameters' names: two directions, rolled by one, as it was released."""
    heads, inner, wide = 4, 16, 6  # wide: B and C of one side
    z, mixed, dt = (x @ mixer.in_proj.weight.T).split([inner, inner + 2 * wide, 2 * heads], -1)
    padded = F.pad(mixed, (0, 0, 3, 3))
    weight = mixer.conv1d.weight[:, 0]
    mixed = sum(weight[:, w] * padded[:, w : w + x.shape[1]] for w in range(7))
    mixed = mixed + mixer.conv1d.bias
    mixed = mixed * torch.sigmoid(mixed)
    values, BC = mixed[..., :inner], mixed[..., inner:]
    y = 0
    for side in range(2):
        turn = (lambda t: t) if side == 0 else (lambda t: t.flip(1))
        B, C = turn(BC[..., side * wide : (side + 1) * wide])[:, None].chunk(2, -1)
        step = F.softplus(turn(dt[..., side * heads : (side + 1) * heads]) + mixer.dt_bias)
        v = turn(values).unflatten(-1, (heads, 4)).transpose(1, 2)
        out = ssd_reference(v, step.mT, -mixer.A_log.exp(), B, C)
        out = out.transpose(1, 2).flatten(2).roll(1, 1)
        out[:, 0] = 0
        y = y + turn(out)
    own = values @ mixer.fc_D.weight.T + mixer.D
    y = y + values * own.repeat_interleave(4, -1)
    y = y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * mixer.norm.weight
    return (y * z * torch.sigmoid(z)) @ mixer.out_proj.weight.T


@pytest.mark.parametrize("L", [1, 2, 11])
def test_the_layer_by_hand(L):
    mixer, x = layer(chunk=4), tokens(L)
    with torch.no_grad():
        mixer.norm.weight.uniform_(0.5, 1.5)
        assert_same(mixer(x), by_hand(mixer, x))


@pytest.mark.parametrize("groups", [1, 2])
def test_the_layers_matrix_is_what_it_multiplies_by(groups):
    mixer, x = layer(groups=groups), tokens(9)
    with torch.no_grad():
        _, _, *rest = mixer._operands(mixer.in_proj(x))
        P = materialize(lambda v: quasiseparable(v, *rest), 9, batch=(2, 4))
    assert_same(mixer.matrix(x), P)


def test_every_output_sees_every_input():
    assert (causality_probe(layer(), tokens(12)) > 0).all()


@pytest.mark.parametrize("mixing", [quasiseparable, added, multiplied])
def test_every_parameter_learns(mixing):
    mixer = layer(mixing=mixing)
    mixer(tokens(6)).square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.abs().sum() > 0), name


def test_names_and_sizes_are_the_released_ones():
    shapes = {name: tuple(p.shape) for name, p in Hydra(128).named_parameters()}
    assert shapes == {
        "in_proj.weight": (2 * 256 + 4 * 64 + 2 * 4, 128),
        "conv1d.weight": (256 + 4 * 64, 1, 7),
        "conv1d.bias": (256 + 4 * 64,),
        "dt_bias": (4,),
        "A_log": (4,),
        "D": (4,),
        "fc_D.weight": (4, 256),
        "norm.weight": (256,),
        "out_proj.weight": (128, 256),
    }


def test_half_precision_projections_keep_float32_scans():
    torch.manual_seed(0)
    mixer, x = Hydra(8, state=3, head_width=4), tokens(6).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x)
    assert y.dtype == torch.bfloat16
    assert_same(y, mixer(x), tolerance=0.1)


BAD = {
    "x: expected 4 axes": lambda p: p | dict(x=p["x"][0]),
    "diagonal: expected": lambda p: p | dict(diagonal=p["diagonal"][..., :-1]),
    "future.dt: expected": lambda p: p | dict(future=p["future"]._replace(dt=p["past"].dt[:1])),
    "future.B: expected": lambda p: p | dict(future=p["future"]._replace(B=p["past"].B[:, :1])),
    "past.A: expected": lambda p: p | dict(past=p["past"]._replace(A=p["past"].A[:1])),
}


@pytest.mark.no_shape_checks
@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        quasiseparable(**BAD[message](given(5)))


@pytest.mark.no_shape_checks
def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="head_width, groups: expected a width that divides 16"):
        Hydra(8, head_width=5)
    with pytest.raises(ValueError, match="conv: expected an odd width"):
        Hydra(8, head_width=8, conv=4)
