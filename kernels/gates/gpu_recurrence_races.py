"""Races of the recurrences' kernels; see `gpu_ground`.

fla's chunked Triton kernels are the contestants that count where fla has the operation; elsewhere
it is the same in chunks, or step by step, in PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from corelib.kernels.gates.gpu_ground import HALF, Contest, Ground, both_titles, contestants_of


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _tokens_first(function: Callable) -> Callable:
    """A function of fla, ``(B, L, H, K)``, on heads first: views, no copies."""
    return lambda *given: _first(function(*(x.transpose(1, 2) for x in given))).transpose(1, 2)


def recurrence(on: Ground, decay: str, backward: bool) -> Contest:
    from corelib.kernels.linear_recurrence import linear_recurrence, scan_bytes
    from corelib.primitives import linear_recurrence as plain_recurrence

    B, H, L, K = on.size(4, 1), on.size(16, 2), on.size(4096, 40), on.size(128, 16)
    # Tokens before heads, as layers have them: fla takes that as it is, the kernel copies first.
    leaves = [on.randn(B, L, H, K, dtype=on.half).transpose(1, 2) for _ in range(3)]
    leaves[1] = leaves[1] / K**0.5
    if decay != "none":
        shape = (B, L, H) if decay == "scalar" else (B, L, H, K)
        leaves.append((-0.1 * on.rand(*shape)).transpose(1, 2))

    def fla() -> Callable:
        from fla.ops.gla import chunk_gla
        from fla.ops.linear_attn import chunk_linear_attn
        from fla.ops.simple_gla import chunk_simple_gla

        plain = lambda q, k, v: chunk_linear_attn(q, k, v, normalize=False)  # noqa: E731
        return _tokens_first({"none": plain, "scalar": chunk_simple_gla, "key": chunk_gla}[decay])

    def kernel(q, k, v, log_decay=None):
        return linear_recurrence(q, k, v, log_decay=log_decay)[0]

    def chunked(q, k, v, log_decay=None):
        return plain_recurrence(q, k, v, log_decay=log_decay, form="chunked")

    functions = {"kernel": kernel, "fla": on.only_real(fla), "chunks in PyTorch": chunked}
    least = scan_bytes(B * H, L, K, K, decay, leaves[0].itemsize)
    return Contest(contestants_of(functions, leaves, backward), bytes=least, tolerance=HALF)


def delta(on: Ground, gated: bool, backward: bool) -> Contest:
    from corelib.kernels.delta_rule import delta_rule
    from corelib.primitives import linear_recurrence as plain_recurrence

    B, H, L, K = on.size(4, 1), on.size(16, 2), on.size(4096, 40), on.size(128, 16)
    q, k, v = (on.randn(B, L, H, K, dtype=on.half).transpose(1, 2) for _ in range(3))
    leaves = [q, F.normalize(k, dim=-1), v, on.rand(B, L, H, dtype=on.half).transpose(1, 2)]
    if gated:
        leaves.append((-0.1 * on.rand(B, L, H)).transpose(1, 2))

    def fla() -> Callable:
        from fla.ops.delta_rule import chunk_delta_rule
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        if gated:
            return _tokens_first(lambda q, k, v, b, g: chunk_gated_delta_rule(q, k, v, g, b))
        return _tokens_first(chunk_delta_rule)

    def kernel(q, k, v, beta, log_decay=None):
        return delta_rule(q, k, v, beta.float(), log_decay=log_decay)[0]

    def chunked(q, k, v, beta, log_decay=None):
        options = dict(log_decay=log_decay, beta=beta.float(), form="chunked")
        return plain_recurrence(q, k, v, **options)

    functions = {"kernel": kernel, "fla": on.only_real(fla), "chunks in PyTorch": chunked}
    return Contest(contestants_of(functions, leaves, backward), tolerance=HALF)


def state_space_duality(on: Ground, backward: bool) -> Contest:
    from corelib.kernels.ssd import forward_bytes, ssd
    from corelib.primitives import linear_recurrence as plain_recurrence

    B, H, L = on.size(4, 1), on.size(32, 2), on.size(4096, 40)
    K, V = on.size(128, 16), on.size(64, 16)
    leaves = [on.randn(B, L, H, V, dtype=on.half).transpose(1, 2), -0.1 * on.rand(B, H, L)]
    leaves += [on.randn(B, L, 1, K, dtype=on.half).transpose(1, 2) / K**0.25 for _ in range(2)]
    state = torch.zeros(B, H, K, V, device=on.device)

    def fla() -> Callable:
        from fla.ops.simple_gla import chunk_simple_gla

        def call(values, log_decay, B, C):
            q, k = (x.transpose(1, 2).expand(-1, -1, H, -1) for x in (C, B))
            out = chunk_simple_gla(
                q, k, values.transpose(1, 2), log_decay.transpose(1, 2), scale=1.0
            )
            return _first(out).transpose(1, 2)

        return call

    def chunked(values, log_decay, B, C):
        q, k = (x.expand(-1, H, -1, -1) for x in (C, B))
        options = dict(log_decay=log_decay, scale=1.0, form="chunked")
        return plain_recurrence(q, k, values, **options)

    functions = {
        "kernel": lambda values, log_decay, B, C: ssd(values, log_decay, B, C, state)[0],
        "fla": on.only_real(fla),
        "chunks in PyTorch": chunked,
    }
    least = forward_bytes(B, H, 1, L, K, V, itemsize=leaves[0].itemsize)
    return Contest(contestants_of(functions, leaves, backward), bytes=least, tolerance=HALF)


def selective(on: Ground, backward: bool) -> Contest:
    from corelib.kernels.selective_scan import backward_bytes, forward_bytes, selective_scan
    from corelib.primitives.selective_scan import selective_scan_reference

    B, D, L, N = on.size(4, 1), on.size(2048, 3), on.size(2048, 6), on.size(16, 4)
    leaves = [on.randn(B, D, L), 0.1 * on.rand(B, D, L), -1.0 - 8 * on.rand(D, N)]
    leaves += [on.randn(B, N, L), on.randn(B, N, L)]
    state = torch.zeros(B, D, N, device=on.device)

    functions = {
        "kernel": lambda *given: selective_scan(*given, state)[0],
        "step by step": selective_scan_reference,
    }
    least = forward_bytes(B, D, L, N) + (backward_bytes(B, D, L, N) if backward else 0)
    return Contest(contestants_of(functions, leaves, backward), bytes=least, tolerance=1e-3)


def quantised_scan(on: Ground) -> Contest:
    from corelib.kernels.selective_scan import selective_scan
    from corelib.kernels.selective_scan_int8 import forward_bytes, int8_selective_scan

    B, D, L, N = on.size(4, 1), on.size(2048, 3), on.size(2048, 6), on.size(16, 4)
    scales = dict.fromkeys(("u", "dt", "B", "C", "z"), 0.02)
    codes = {name: on.integers(255, B, D, L).sub(127).to(torch.int8) for name in ("u", "dt", "z")}
    codes |= {name: on.integers(255, B, N, L).sub(127).to(torch.int8) for name in ("B", "C")}
    A, skip, bias = -1.0 - on.rand(D, N), on.randn(D), on.randn(D) - 3
    state = torch.zeros(B, D, N, device=on.device)
    order = [codes["u"], codes["dt"], A, codes["B"], codes["C"], skip, codes["z"], bias, state]

    def in_float():
        u, dt, b, c, z = (codes[name].float() * 0.02 for name in ("u", "dt", "B", "C", "z"))
        y = selective_scan(u, F.softplus(dt + bias[:, None]), A, b, c, state)[0]
        return (y + skip[:, None] * u) * F.silu(z)

    contestants = {
        "kernel": lambda: int8_selective_scan(*order, scales)[0],
        "float kernel and its prologue": in_float,
    }
    return Contest(contestants, bytes=forward_bytes(B, D, L, N), tolerance=1e-3)


def diagonal(on: Ground, backward: bool) -> Contest:
    from corelib.kernels.diagonal_scan import backward_bytes, diagonal_scan, forward_bytes

    B, L, C = on.size(8, 2), on.size(4096, 40), on.size(2048, 24)
    leaves = [0.05 + 0.9 * on.rand(B, L, C), on.randn(B, L, C)]

    def fla() -> Callable:
        from fla.ops.hgrn import fused_recurrent_hgrn

        return lambda decay, x: fused_recurrent_hgrn(x, decay.log())[0]

    functions = {"kernel": diagonal_scan, "fla, HGRN": on.only_real(fla)}
    least = forward_bytes(B, L, C) + (backward_bytes(B, L, C) if backward else 0)
    return Contest(contestants_of(functions, leaves, backward), bytes=least, tolerance=1e-3)


def pairs(on: Ground) -> Contest:
    from corelib.kernels.block_scan import block_scan, forward_bytes

    B, L, C = on.size(8, 2), on.size(2048, 20), on.size(1024, 8)
    leaves = [on.rand(B, L, C, 2, 2) * 0.4, on.randn(B, L, C, 2)]

    def steps(blocks, x):
        h, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = (blocks[:, t] * h[..., None, :]).sum(-1) + x[:, t]
            out.append(h)
        return torch.stack(out, 1)

    functions = {"kernel": block_scan, "step by step": steps}
    return Contest(
        contestants_of(functions, leaves, False), bytes=forward_bytes(B, L, C), tolerance=1e-3
    )


def newton(on: Ground) -> Contest:
    from corelib.kernels.newton_rnn import forward_bytes, newton_rnn

    B, L, C = on.size(8, 2), on.size(2048, 12), on.size(1024, 8)
    x, weights = on.randn(B, L, 3, C), 0.3 * on.randn(3, C)

    def steps(x, weights):
        from corelib.state_space.pararnn import GRU, sequential_rnn

        return sequential_rnn(GRU, x, weights)

    functions = {"kernel": lambda *given: newton_rnn("gru", *given), "step by step": steps}
    least = forward_bytes("gru", B, L, C)
    return Contest(contestants_of(functions, [x, weights], False), bytes=least, tolerance=1e-3)


def spiking(on: Ground) -> Contest:
    from corelib.kernels.spiking_scan import forward_bytes, spiking_scan
    from corelib.primitives.spiking_scan import spiking_scan_reference

    B, L, C = on.size(8, 2), on.size(2048, 20), on.size(1024, 8)
    x = 2 * on.randn(B, L, C)

    contestants = {
        "kernel": lambda: spiking_scan(x)[0],
        "step by step": lambda: spiking_scan_reference(x)[0],
    }
    return Contest(contestants, bytes=forward_bytes(B, L, C, keep=False), tolerance=1e-4)


#: Kernel module -> what is raced -> the race.
RECURRENCE_RACES: dict[str, dict[str, Callable[[Ground], Contest]]] = {
    "linear_recurrence": {
        **both_titles(recurrence, "no decay, B4 H16 L4096 K128", "none"),
        **both_titles(recurrence, "a decay a head", "scalar"),
        **both_titles(recurrence, "a decay a channel", "key"),
    },
    "delta_rule": {
        **both_titles(delta, "B4 H16 L4096 K128", False),
        **both_titles(delta, "gated", True),
    },
    "ssd": both_titles(state_space_duality, "B4 H32 L4096 K128 V64"),
    "selective_scan": both_titles(selective, "B4 D2048 L2048 N16 float32"),
    "selective_scan_int8": {"B4 D2048 L2048 N16": quantised_scan},
    "diagonal_scan": both_titles(diagonal, "B8 L4096 C2048 float32"),
    "block_scan": {"B8 L2048 C1024 float32": pairs},
    "newton_rnn": {"GRU, B8 L2048 C1024 float32": newton},
    "spiking_scan": {"B8 L2048 C1024 float32": spiking},
}
