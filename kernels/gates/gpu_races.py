"""The races of ``make gpu-check``: each kernel against what a user would otherwise call on a GPU.

A race is a function of a `Ground` (a device, and whether sizes are small enough for an interpreter)
and returns a `Contest`. The contestants must agree before the clock starts, so that every race is
also a test of its kernel at a real size, in the type that it is meant for. ``bytes`` and ``flops``
are the least that has to be moved and multiplied: with the device's own measured copy bandwidth and
matrix rate they give the *floor*, a modelled time. What mostly reads, or finds its inputs in a
cache, can come out a little below it: a copy writes half of what it moves.

`gpu_scan_races` has the recurrences; this file has attention, products and what goes with them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from corelib.measure import Missing
from corelib.measure.agreement import agreement


class Contest(NamedTuple):
    """Who runs (the kernel first), what must move and be multiplied, and how far they may differ.

    ``tolerance`` is relative to the largest value, as in `corelib.measure.race`.
    """

    contestants: dict[str, Callable[[], Any] | Missing]
    bytes: int = 0
    flops: float = 0.0
    tolerance: float = 1e-4


HALF = 3e-2  # a tolerance for bfloat16 results, relative to the largest


class Ground:
    """Where a race is held: makes its inputs, and compiles where compiling makes sense."""

    def __init__(self, device: str, small: bool = False):
        self.device, self.small = device, small
        self._generator = torch.Generator(device).manual_seed(0)

    @property
    def half(self) -> torch.dtype:
        """bfloat16, which the interpreter does not know."""
        return torch.float32 if self.small else torch.bfloat16

    def size(self, real: int, small: int) -> int:
        return small if self.small else real

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device).to(dtype)

    def rand(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=self._generator, device=self.device).to(dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self._generator, device=self.device)

    def compiled(self, function: Callable) -> Callable:
        """``torch.compile`` of it, fixed shapes; on small ground the function itself."""
        return function if self.small else torch.compile(function, dynamic=False)

    def replayed(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call as a CUDA graph, as decoding loops run it: launching then costs next to nothing.

        On small ground the call itself.
        """
        if self.small:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compile and tune before the capture
            call(), call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def only_real(self, make: Callable[[], Callable[[], Any]]) -> Callable[[], Any] | Missing:
        """A contestant that runs on a GPU alone; `Missing` where its package is."""
        if self.small:
            return Missing("runs on a GPU alone")
        try:
            return make()
        except ImportError as problem:
            return Missing(str(problem))


def agreeing(contest: Contest) -> dict[str, Callable[[], Any]]:
    """Run everyone once and return those that can run, the kernel first.

    A peer that fails here is left out with a word; the kernel, or one that disagrees, may not.

    Raises:
        ValueError: a contestant computes something else than the kernel.
    """
    runners, reference = {}, None
    for name, call in contest.contestants.items():
        if isinstance(call, Missing):
            continue
        try:
            result = call()
            torch.cuda.synchronize() if torch.cuda.is_available() else None
        except Exception as problem:
            if reference is None or isinstance(problem, torch.OutOfMemoryError):
                raise
            print(f"  {name} is left out: {type(problem).__name__}: {str(problem)[:200]}")
            continue
        if reference is None:
            reference = result
        else:
            agreement(result, reference, contest.tolerance, name)
        runners[name] = call
    return runners


def both_ways(
    function: Callable[..., Any], leaves: Sequence[Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward: the gradients of all ``leaves`` for a fixed gradient of the output."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    wanted: list[Tensor] = []

    def call() -> tuple[Tensor, ...]:
        out = function(*leaves)
        if not wanted:
            generator = torch.Generator(out.device).manual_seed(1)
            grad = torch.randn(out.shape, generator=generator, device=out.device)
            wanted.append(grad.to(out.dtype))
        return torch.autograd.grad(out, leaves, wanted[0])

    return call


# --- attention ------------------------------------------------------------------------------------


def _qkv(on: Ground, B: int, H: int, G: int, L: int, S: int, D: int) -> list[Tensor]:
    return [on.randn(B, h, n, D, dtype=on.half) for h, n in ((H, L), (G, S), (G, S))]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def _flex(mask: Callable, B: int | None, H: int | None, L: int, device: str) -> Callable:
    """Compiled flex_attention with a mask of its own."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    blocks = create_block_mask(mask, B, H, L, L, device, _compile=True)
    flex = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: flex(q, k, v, block_mask=blocks, enable_gqa=True)


def causal_attention(on: Ground, D: int, backward: bool) -> Contest:
    from corelib.kernels.flash_attention import flash_attention

    B, H, G, L = on.size(4, 1), on.size(16, 2), on.size(4, 1), on.size(4096, 40)
    D = on.size(D, 16)
    leaves = _qkv(on, B, H, G, L, L, D)
    flex = on.only_real(lambda: _flex(lambda b, h, i, j: i >= j, None, None, L, on.device))
    functions = {
        "kernel": lambda q, k, v: flash_attention(q, k, v, causal=True),
        "sdpa": lambda q, k, v: _sdpa(q, k, v, is_causal=True),
        "flex_attention": flex,
    }
    flops = 2 * B * H * L * L * D * (3.5 if backward else 1)
    return Contest(contestants_of(functions, leaves, backward), flops=flops, tolerance=HALF)


def contestants_of(
    functions: dict[str, Any], leaves: Sequence[Tensor], backward: bool
) -> dict[str, Any]:
    """The functions on ``leaves``: forward, or forward and `both_ways`."""

    def contestant(function):
        if isinstance(function, Missing):
            return function
        return both_ways(function, leaves) if backward else lambda: function(*leaves)

    return {name: contestant(function) for name, function in functions.items()}


def decode(on: Ground) -> Contest:
    from corelib.kernels.split_kv_decode import decode_bytes, split_kv_decode, stream_k_decode

    B, H, G, S = on.size(8, 1), on.size(32, 2), on.size(8, 1), on.size(32768, 40)
    D = on.size(128, 16)
    q, k, v = _qkv(on, B, H, G, 1, S, D)
    least = decode_bytes([S] * B, H, G, 1, D, D, partials=B * G, itemsize=q.itemsize)
    return Contest(
        {
            "kernel, stream-K": on.replayed(lambda: stream_k_decode(q, k, v)),
            "kernel, 16 splits": on.replayed(lambda: split_kv_decode(q, k, v, splits=16)),
            "sdpa": on.replayed(lambda: _sdpa(q, k, v)),
            "kernel, stream-K, launched": lambda: stream_k_decode(q, k, v),
            "sdpa, launched": lambda: _sdpa(q, k, v),
        },
        bytes=least,
        tolerance=HALF,
    )


def block_sparse(on: Ground, backward: bool) -> Contest:
    from corelib.kernels.block_sparse_attention import block_sparse_attention
    from corelib.primitives.block_sparse import BlockLists

    B, H, G, L = 1, on.size(16, 2), on.size(4, 1), on.size(8192, 48)
    D, block = on.size(128, 16), on.size(128, 16)
    n = L // block
    chosen = on.rand(B, H, n, n) < 0.25
    chosen |= torch.eye(n, dtype=torch.bool, device=on.device)
    chosen &= torch.ones_like(chosen).tril()
    lists = BlockLists.from_mask(chosen, block)
    leaves = _qkv(on, B, H, G, L, L, D)

    def seen(b, h, i, j):
        return chosen[b, h, i // block, j // block] & (i >= j)

    functions = {
        "kernel": lambda q, k, v: block_sparse_attention(q, k, v, lists, causal=True),
        "flex_attention": on.only_real(lambda: _flex(seen, B, H, L, on.device)),
    }
    if on.small:
        everywhere = chosen.repeat_interleave(block, 2).repeat_interleave(block, 3).tril()
        functions["sdpa, masked"] = lambda q, k, v: _sdpa(q, k, v, attn_mask=everywhere)
    flops = 4 * D * block**2 * int(chosen.sum()) * (3.5 if backward else 1)
    return Contest(contestants_of(functions, leaves, backward), flops=flops, tolerance=HALF)


def vertical_slash(on: Ground) -> Contest:
    from corelib.kernels.vertical_slash_attention import vertical_slash_attention
    from corelib.primitives.vertical_slash import kept_keys

    H, G, L, D = on.size(16, 2), on.size(4, 1), on.size(8192, 64), on.size(128, 16)
    q, k, v = _qkv(on, 1, H, G, L, L, D)
    columns = on.rand(1, H, L) < 0.02
    distances = on.rand(1, H, L) < 0.005
    distances[..., : L // 32] = True

    # Whole blocks of 64 queries share what any slash of theirs covers.
    kept = torch.logical_or(*kept_keys(columns[0], distances[0], L, 64))
    mask = kept.repeat_interleave(64, 1)[:, :L].tril()

    def seen(b, h, i, j):
        return (i >= j) & kept[h, i // 64, j]

    flex = on.only_real(lambda: _flex(seen, 1, H, L, on.device))
    return Contest(
        {
            "kernel": lambda: vertical_slash_attention(q, k, v, columns, distances),
            "flex_attention": flex if isinstance(flex, Missing) else lambda: flex(q, k, v),
            "sdpa, masked": lambda: _sdpa(q, k, v, attn_mask=mask),
        },
        tolerance=HALF,
    )


def gather_decode(on: Ground) -> Contest:
    from corelib.kernels.gather_sparse_decode import gather_sparse_decode

    B, H, G, S = on.size(8, 1), on.size(32, 2), on.size(8, 1), on.size(32768, 60)
    n, D = on.size(2048, 9), on.size(128, 16)
    q, k, v = _qkv(on, B, H, G, 1, S, D)
    indices = on.rand(B, G, S).topk(n).indices

    def gathered(q, k, v, indices):
        rows = indices[..., None].expand(-1, -1, -1, D)
        return _sdpa(q, k.gather(2, rows), v.gather(2, rows))

    compiled = on.compiled(gathered)
    least = B * G * n * (2 * D * q.itemsize + 8) + 2 * q.nbytes
    return Contest(
        {
            "kernel": on.replayed(lambda: gather_sparse_decode(q, k, v, indices)),
            "gather, sdpa": on.replayed(lambda: gathered(q, k, v, indices)),
            "gather, sdpa, compiled": on.replayed(lambda: compiled(q, k, v, indices)),
            "kernel, launched": lambda: gather_sparse_decode(q, k, v, indices),
            "gather, sdpa, launched": lambda: gathered(q, k, v, indices),
        },
        bytes=least,
        tolerance=HALF,
    )


def low_rank(on: Ground) -> Contest:
    from corelib.kernels.low_rank_keys import low_rank_bytes, low_rank_keys
    from corelib.primitives.rope import rope_half_split

    B, G, S, R = on.size(8, 1), on.size(8, 2), on.size(32768, 60), on.size(160, 16)
    n, D = on.size(2048, 9), on.size(128, 16)
    left, right = on.randn(B, S, R, dtype=on.half), on.randn(B, G, R, D, dtype=on.half) / R**0.5
    positions = on.rand(B, G, S).topk(n).indices
    frequencies = 10000.0 ** -(torch.arange(D // 2, device=on.device) / (D // 2))

    def plain(left, right, positions, frequencies):
        rows = left[:, None].expand(-1, G, -1, -1)
        rows = rows.gather(2, positions[..., None].expand(-1, -1, -1, R))
        return rope_half_split(rows @ right, positions, frequencies).to(left.dtype)

    compiled = on.compiled(plain)
    given = left, right, positions, frequencies
    return Contest(
        {
            "kernel": on.replayed(lambda: low_rank_keys(*given)),
            "plain": on.replayed(lambda: plain(*given)),
            "plain, compiled": on.replayed(lambda: compiled(*given)),
        },
        bytes=low_rank_bytes(B * G * n, B, G, n, R, D, itemsize=left.itemsize),
        flops=2 * B * G * n * R * D,
        tolerance=HALF,
    )


def column_sums(on: Ground) -> Contest:
    from corelib.kernels.attention_column_sums import attention_column_sums

    H, G, L, D = on.size(16, 2), on.size(4, 1), on.size(8192, 48), on.size(128, 16)
    q, k, _ = _qkv(on, 1, H, G, L, L, D)
    hidden = torch.ones(L, L, dtype=torch.bool, device=on.device).triu(1)

    def scores(q, k):
        wide = k.repeat_interleave(H // G, 1)
        return (q @ wide.mT).float().mul(D**-0.5).masked_fill(hidden, -torch.inf)

    def plain(q, k, lse):
        return torch.exp(scores(q, k) - lse[..., None]).sum(2)

    lse, compiled = scores(q, k).logsumexp(-1), on.compiled(plain)
    return Contest(
        {
            "kernel": lambda: attention_column_sums(q, k, lse, causal=True),
            "whole map": lambda: plain(q, k, lse),
            "whole map, compiled": lambda: compiled(q, k, lse),
        },
        flops=H * L * L * D,
        tolerance=HALF,
    )


def block_scoring(on: Ground) -> Contest:
    from corelib.kernels.block_scores import block_score_bytes, pooled_block_scores

    H, G, L, D = on.size(32, 2), on.size(8, 1), on.size(65536, 64), on.size(128, 16)
    block = on.size(64, 16)
    q, k, _ = _qkv(on, 1, H, G, L, L, D)

    def plain(q, k):
        means = [x.unflatten(2, (-1, block)).float().mean(3).to(x.dtype) for x in (q, k)]
        scores = (means[0] @ means[1].repeat_interleave(H // G, 1).mT).float() * D**-0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(later, -torch.inf)

    compiled = on.compiled(plain)
    return Contest(
        {
            "kernel": lambda: pooled_block_scores(q, k, block, causal=True).float().exp(),
            "plain": lambda: plain(q, k).exp(),
            "plain, compiled": lambda: compiled(q, k).exp(),
        },
        bytes=block_score_bytes(1, H, G, L, L, D, block=block, itemsize=q.itemsize),
        tolerance=HALF,
    )


# --- products, norms and what goes with them ------------------------------------------------------


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
ATTENTION_RACES: dict[str, dict[str, Callable[[Ground], Contest]]] = {
    "flash_attention": {
        "causal, B4 H16 G4 L4096 D128": lambda on: causal_attention(on, 128, False),
        "causal, B4 H16 G4 L4096 D64": lambda on: causal_attention(on, 64, False),
        "with backward, D128": lambda on: causal_attention(on, 128, True),
        "with backward, D64": lambda on: causal_attention(on, 64, True),
    },
    "split_kv_decode": {"B8 H32 G8 S32768 D128, as CUDA graphs": decode},
    "block_sparse_attention": {
        "a quarter of the blocks of 128, H16 L8192 D128": lambda on: block_sparse(on, False),
        "with backward": lambda on: block_sparse(on, True),
    },
    "vertical_slash_attention": {"H16 L8192 D128": vertical_slash},
    "gather_sparse_decode": {"2048 of 32768 keys, B8 H32 G8 D128, as CUDA graphs": gather_decode},
    "low_rank_keys": {"2048 of 32768 keys, B8 G8 R160 D128, as CUDA graphs": low_rank},
    "attention_column_sums": {"H16 L8192 D128": column_sums},
    "block_scores": {"H32 G8 L65536 D128, blocks of 64": block_scoring},
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
