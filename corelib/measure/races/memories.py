"""A mixture of memories on this machine: 8 gated delta memories, each token in 2 of them.

``masked`` is the obvious code: every memory runs over all tokens, and those that it was not sent
write nothing and fade nothing. One state computes another function, and so does softmax attention:
they are raced unchecked, as what a user would take instead. Of equal total size means keys 8 times
as wide, of equal active size twice as wide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...linear_time.routed_recurrence import routed_recurrence, routed_recurrence_reference
from ...primitives import linear_recurrence
from ..gradients import forward_backward
from ..scaling import sweep
from . import Row, register, rows

H, K, V, M, N = 2, 32, 32, 8, 2
SHAPE = f"B1 H{H} K{K} V{V} memories {M} choices {N} float32"
SLOW = 256  # tokens: longer sequences are not run token by token


def inputs(L: int) -> tuple[Tensor, ...]:
    """``q, k, v, log_decay, beta`` of each choice, and ``experts, weights``."""
    g = torch.Generator().manual_seed(0)
    q = F.normalize(torch.randn(1, L, H, K, generator=g), dim=-1)
    k = F.normalize(torch.randn(1, L, N, H, K, generator=g), dim=-1)
    v = torch.randn(1, L, N, H, V, generator=g)
    log_decay, beta = (
        -0.1 * torch.rand(1, L, N, H, generator=g),
        torch.rand(1, L, N, H, generator=g),
    )
    weights, experts = torch.rand(1, L, M, generator=g).topk(N, -1)
    return q, k, v, log_decay, beta, experts, weights / weights.sum(-1, keepdim=True)


def routed(form: Callable) -> Callable[..., Tensor]:
    """``form`` from empty memories, the output only."""

    def run(q, k, v, log_decay, beta, experts, weights):
        state = q.new_zeros(M, 1, H, K, V)
        return form(q, k, v, experts, weights, state, log_decay=log_decay, beta=beta)[0]

    return run


def masked(q, k, v, log_decay, beta, experts, weights) -> Tensor:
    """Every memory over all tokens."""
    out = 0
    for m in range(M):
        chosen = (experts == m).to(q.dtype)  # (1, L, N), at most a single one
        own = {n: torch.einsum("blnh,bln->bhl", x, chosen) for n, x in
               (("log_decay", log_decay), ("beta", beta))}  # fmt: skip
        keys, values = (torch.einsum("blnhd,bln->bhld", x, chosen) for x in (k, v))
        answer = linear_recurrence(q.transpose(1, 2), keys, values, **own).transpose(1, 2)
        out = out + (weights * chosen).sum(-1)[..., None, None] * answer
    return out


def one_state(times: int) -> Callable[..., Tensor]:
    """One recurrence over keys ``times`` as wide."""

    def run(q, k, v, log_decay, beta, experts, weights):
        q, k = (x.transpose(1, 2).repeat(1, 1, 1, times) / times**0.5 for x in (q, k[:, :, 0]))
        gates = dict(log_decay=log_decay[:, :, 0].mT, beta=beta[:, :, 0].mT)
        return linear_recurrence(q, k, v[:, :, 0].transpose(1, 2), **gates)

    return run


def softmax(q, k, v, *_) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k[:, :, 0], v[:, :, 0]))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


SAME = {
    "corelib": routed(routed_recurrence),
    "every memory over all tokens, masked": masked,
    "token by token": routed(routed_recurrence_reference),
}
OTHER = {
    "corelib": routed(routed_recurrence),
    "one state of equal total size": one_state(M),
    "one state of equal active size": one_state(N),
    "softmax attention": softmax,
}


def contestants(L: int, forms: dict, gradients: bool = False) -> dict[str, Callable]:
    """The forms at one length with their inputs; the loop over tokens only where it is short."""
    given, ready = inputs(L), {}
    for name, form in forms.items():
        if name == "token by token" and L > SLOW:
            continue
        if gradients:
            run = forward_backward(lambda *x, form=form: form(*x, *given[5:]), *given[:5])
        else:
            run = lambda form=form: form(*given)  # noqa: E731
        ready[name] = run
    return ready


def _sweeps(lengths: tuple[int, ...], gradients: bool, what: str) -> Iterator[Row]:
    options = dict(repeats=3, min_time=0.02)
    same = sweep(lengths, lambda L: contestants(L, SAME, gradients), tolerance=1e-3, **options)
    yield from rows(same, what=what, shape=SHAPE)
    other = sweep(lengths, lambda L: contestants(L, OTHER, gradients), check=None, **options)
    yield from rows(other, what=f"{what}, against other functions", shape=SHAPE)


@register("mom", "a mixture of memories against one state, a loop and attention, over the length")
def mom(quick: bool) -> Iterator[Row]:
    lengths = (128, 256) if quick else (256, 512, 1024, 2048, 4096, 8192)
    with torch.no_grad():
        yield from _sweeps(lengths, False, "forward")
    yield from _sweeps(lengths, True, "forward + backward")
