"""Races of norms, features, expert and int8 products against PyTorch's own; see `gpu_ground`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from corelib.kernels.gates.gpu_ground import HALF, Contest, Ground, contestants_of


def modulated_norm(on: Ground, backward: bool) -> Contest:
    from corelib.kernels.adaln import backward_bytes, forward_bytes, gated_adaln

    B, L, C = on.size(8, 2), on.size(4096, 5), on.size(1536, 24)
    x, branch = (on.randn(B, L, C, dtype=on.half) for _ in range(2))
    rows = [on.randn(B, 1, C, dtype=on.half) for _ in range(3)]

    def plain(x, branch, gate, shift, scale):
        residual = x + gate * branch
        normed = F.layer_norm(residual.float(), (C,), eps=1e-6)
        return residual, (normed * (1 + scale.float()) + shift.float()).to(x.dtype)

    functions = {
        "kernel": lambda *given: gated_adaln(*given)[1],
        "plain": lambda *given: plain(*given)[1],
    }
    compiled = on.compiled(plain)
    functions["plain, compiled"] = lambda *given: compiled(*given)[1]
    options = dict(gated=True, tokenwise=False, itemsize=x.itemsize)
    least = forward_bytes(B, L, C, **options)
    least += backward_bytes(B, L, C, **options) if backward else 0
    leaves = (x, branch, *rows)
    return Contest(contestants_of(functions, leaves, backward), bytes=least, tolerance=HALF)


def taylor_map(on: Ground, backward: bool) -> Contest:
    from corelib.kernels.feature_maps import feature_bytes, taylor_features

    N, D = on.size(262144, 20), 16
    x = on.randn(N, D, dtype=on.half)

    def plain(x):
        y = x.float() * D**-0.25
        pairs = (y[..., :, None] * y[..., None, :]).flatten(-2) * 0.5**0.5
        return torch.cat([torch.ones_like(y[..., :1]), y, pairs], -1).to(x.dtype)

    functions = {"kernel": taylor_features, "plain": plain, "plain, compiled": on.compiled(plain)}
    forward, back = feature_bytes(N, D, symmetric=False, itemsize=x.itemsize)
    least = forward + back * backward
    return Contest(contestants_of(functions, [x], backward), bytes=least, tolerance=HALF)


def running_sum(on: Ground) -> Contest:
    from corelib.kernels.cumsum_matmul import cumsum_matmul, moved_bytes

    B, L, C = on.size(8, 2), on.size(4096, 70), on.size(1024, 20)
    x = on.randn(B, L, C)
    contestants = {"kernel": lambda: cumsum_matmul(x), "torch.cumsum": lambda: x.cumsum(1)}
    return Contest(contestants, bytes=moved_bytes(B, L, C), tolerance=1e-4)


def expert_rows(on: Ground) -> Contest:
    from corelib.kernels.expert_permute import permute, permute_bytes
    from corelib.primitives.expert_permute import sort_by_expert

    N, C, k = on.size(32768, 10), on.size(2048, 24), 2
    x, plan = on.randn(N, C, dtype=on.half), sort_by_expert(on.integers(8, N, k), 8)
    contestants = {
        "kernel": lambda: permute(x, plan.order, plan.place),
        "index_select": lambda: x.index_select(0, plan.order // k),
    }
    return Contest(contestants, bytes=permute_bytes(N * k, C, itemsize=x.itemsize))


def expert_products(on: Ground, backward: bool) -> Contest:
    from corelib.kernels.expert_permute import grouped_matmul

    rows, width, E = on.size(32768, 40), on.size(2048, 32), on.size(16, 3)
    ends = on.rand(E).softmax(0).cumsum(0).mul(rows).long()
    ends[-1] = rows
    starts = F.pad(ends, (1, 0))
    x = on.randn(rows, width, dtype=on.half)
    weights = on.randn(E, width, width, dtype=on.half) / width**0.5
    lengths = starts.diff().tolist()

    def loop(x, weights):
        return torch.cat([a @ b for a, b in zip(x.split(lengths), weights, strict=True)])

    def grouped_mm():
        offsets = ends.to(torch.int32)
        return lambda x, weights: torch._grouped_mm(x, weights, offsets)

    functions = {
        "kernel": lambda x, weights: grouped_matmul(x, weights, starts),
        "loop over experts": loop,
        "torch._grouped_mm": on.only_real(grouped_mm),
    }
    flops = 2 * rows * width**2 * (3 if backward else 1)
    return Contest(contestants_of(functions, [x, weights], backward), flops=flops, tolerance=HALF)


def int8_product(on: Ground) -> Contest:
    from corelib.kernels.int8_matmul import int8_matmul

    M, N, K = on.size(8192, 32), on.size(4096, 32), on.size(4096, 64)
    a, b = (on.integers(255, n, K).sub(127).to(torch.int8) for n in (M, N))
    halves = a.to(on.half), b.to(on.half)
    contestants = {
        "kernel": lambda: int8_matmul(a, b),
        "torch._int_mm": lambda: torch._int_mm(a, b.T),
        "bfloat16 product": lambda: halves[0] @ halves[1].T,
    }
    return Contest(contestants, flops=M * N * K, tolerance=1e-2)  # bfloat16 rounds its output


def rotation(on: Ground) -> Contest:
    from corelib.kernels.int8_matmul import hadamard_bytes, hadamard_quantise
    from corelib.primitives.hadamard import hadamard

    rows, n = on.size(16384, 12), on.size(4096, 64)
    x = on.randn(rows, n, dtype=on.half)
    matrix = hadamard(n).to(x.device, x.dtype)

    def plain(x):
        return (x @ matrix.T / (n**0.5 * 0.05)).round().clamp(-128, 127).to(torch.int8)

    contestants = {"kernel": lambda: hadamard_quantise(x, 0.05).float()}
    compiled = on.compiled(plain)
    contestants["product with the matrix, compiled"] = lambda: compiled(x).float()
    return Contest(contestants, bytes=hadamard_bytes(rows, n, itemsize=x.itemsize), tolerance=0.05)


#: Kernel module -> what is raced -> the race.
PRODUCT_RACES: dict[str, dict[str, Callable[[Ground], Contest]]] = {
    "adaln": {
        "gated, B8 L4096 C1536": lambda on: modulated_norm(on, False),
        "with backward": lambda on: modulated_norm(on, True),
    },
    "feature_maps": {
        "262144 rows of 16": lambda on: taylor_map(on, False),
        "with backward": lambda on: taylor_map(on, True),
    },
    "cumsum_matmul": {"B8 L4096 C1024 float32": running_sum},
    "expert_permute": {
        "rows, 32768 x 2 of 2048": expert_rows,
        "16 experts, 32768 rows of 2048": lambda on: expert_products(on, False),
        "16 experts, with backward": lambda on: expert_products(on, True),
    },
    "int8_matmul": {"8192 x 4096 x 4096": int8_product, "rotation of 16384 rows of 4096": rotation},
}
