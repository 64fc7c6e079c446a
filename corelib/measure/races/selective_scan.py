"""The scans of Mamba and Mamba-2 on this machine, at the sizes of a small model.

Contestants for the selective scan: the released reference (``mamba_ssm``'s ``selective_scan_ref``,
transformers' slow path: the whole sequence's decays at once, then step by step), mambapy's parallel
scan, and what a compiler makes of the equations, eight steps at a time. For Mamba-2 the
published chunked algorithm as it is usually written in PyTorch, transformers' way: every product
with a broadcast and a sum; and, for a whole block, transformers' own path for a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ...primitives import selective_scan, ssd_chunked
from ...state_space.mamba2 import Mamba2Block
from ..gradients import forward_backward
from ..race import Missing
from ..scaling import sweep
from . import Row, peer, register, rows

D, N = 512, 16
SHAPE = f"B1 D{D} N{N} float32"
COMPILED_STEPS = 8
FORWARD, BOTH, QUICK = (256, 512, 1024, 2048, 4096, 8192), (256, 512, 1024, 2048, 4096), (64, 128)
H, V, K = 16, 32, 64
SSD_SHAPE = f"B1 H{H} V{V} K{K} one group, float32"
OPTIONS = dict(tolerance=1e-3, repeats=3, min_time=0.05)


def scan_inputs(L: int, channels: int = D, states: int = N) -> list[Tensor]:
    """``u, dt, A, B, C`` of `selective_scan`, with steps and rates as at Mamba's start."""
    generator = torch.Generator().manual_seed(0)
    u, B, C = (torch.randn(1, n, L, generator=generator) for n in (channels, states, states))
    dt = 0.1 * torch.rand(1, channels, L, generator=generator)
    return [u, dt, -torch.arange(1.0, states + 1).repeat(channels, 1), B, C]


def released(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The formula as released; ``unbind`` spares its backward what indexing would cost."""
    decay = torch.exp(torch.einsum("bdl,dn->bdln", dt, A))
    added = torch.einsum("bdl,bnl,bdl->bdln", dt, B, u)
    h, ys = torch.zeros_like(decay[:, :, 0]), []
    for a, x, c in zip(decay.unbind(2), added.unbind(2), C.unbind(2), strict=True):
        h = a * h + x
        ys.append(torch.einsum("bdn,bn->bd", h, c))
    return torch.stack(ys, 2)


def mambapy() -> Callable | Missing:
    """mambapy's parallel scan, all decays and states of the sequence at once."""
    module = peer("mambapy.pscan")
    if isinstance(module, Missing):
        return module

    def run(u, dt, A, B, C):
        decay = torch.exp(dt.mT[..., None] * A)
        states = module.pscan(decay, (dt * u).mT[..., None] * B.mT[:, :, None])
        return (states @ C.mT[..., None])[..., 0].mT

    return run


def _steps(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor):
    """A few steps, ``u (T, D)``, ``A`` and ``h (N, D)``, for the compiler to fuse."""
    ys = []
    for t in range(u.shape[0]):
        h = torch.exp(dt[t] * A) * h + (dt[t] * u[t]) * B[t][:, None]
        ys.append((h * C[t][:, None]).sum(0))
    return torch.stack(ys), h


def _compiled(*inputs: Tensor) -> Callable | Missing:
    steps = torch.compile(_steps, dynamic=False)

    def run(u, dt, A, B, C):
        u, dt, B, C = (x[0].mT.contiguous().split(COMPILED_STEPS) for x in (u, dt, B, C))
        A, ys = A.mT.contiguous(), []
        h = torch.zeros_like(A)
        for piece in zip(u, dt, B, C, strict=True):
            y, h = steps(*piece[:2], A, *piece[2:], h)
            ys.append(y)
        return torch.cat(ys).mT[None]

    try:
        run(*inputs)
    except Exception as problem:  # no C++ compiler, an older PyTorch, another processor
        return Missing(f"does not compile here ({type(problem).__name__})")
    return run


@register("selective-scan", "Mamba's selective scan")
def selective_scan_race(quick: bool) -> Iterator[Row]:
    compiled = Missing("not in a quick run") if quick else _compiled(*scan_inputs(64))
    rivals = {"corelib": selective_scan, "as released": released}
    rivals |= {"mambapy, parallel": mambapy(), "compiled steps": compiled}

    def contestants(L: int, wrap: Callable) -> dict:
        inputs = scan_inputs(L)
        return {n: f if isinstance(f, Missing) else wrap(f, *inputs) for n, f in rivals.items()}

    def forward(L: int) -> dict:
        return contestants(L, lambda f, *x: lambda: f(*x))

    with torch.no_grad():
        result = sweep(QUICK if quick else FORWARD, forward, **OPTIONS)
        yield from rows(result, what="forward", shape=SHAPE)
    result = sweep(QUICK if quick else BOTH, lambda L: contestants(L, forward_backward), **OPTIONS)
    yield from rows(result, what="forward + backward", shape=SHAPE)


def ssd_inputs(L: int, heads: int = H, width: int = V, states: int = K) -> list[Tensor]:
    """``x, dt, A, B, C`` of `ssd_chunked`, one group."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, heads, L, width, generator=generator)
    B, C = torch.randn(2, 1, 1, L, states, generator=generator)
    dt = 0.1 * torch.rand(1, heads, L, generator=generator)
    return [x, dt, -torch.linspace(1, 8, heads), B, C]


def broadcast_and_sum(x, dt, A, B, C, chunk: int = 64) -> Tensor:
    """The published algorithm in transformers' style; lengths are multiples of the chunk."""
    x, B, C = (y.transpose(1, 2).unflatten(1, (-1, chunk)) for y in (x * dt[..., None], B, C))
    B, C = (y.expand(-1, -1, -1, x.shape[3], -1) for y in (B, C))  # (B, n, T, H, K)
    sums = (dt * A[:, None]).unflatten(2, (-1, chunk)).cumsum(3)  # (B, H, n, T)
    apart = (sums[..., :, None] - sums[..., None, :]).tril()
    mask = torch.ones(chunk, chunk, dtype=torch.bool).tril()
    decay = apart.exp().masked_fill(~mask, 0)
    scores = (C[:, :, :, None] * B[:, :, None]).sum(-1)  # (B, n, T, T, H)
    weights = scores * decay.permute(0, 2, 3, 4, 1)
    inside = (weights[..., None] * x[:, :, None]).sum(3)
    left = (sums[..., -1:] - sums).exp().permute(0, 2, 3, 1)
    states = (B * left[..., None]).permute(0, 1, 3, 4, 2) @ x.permute(0, 1, 3, 2, 4)
    ends = F.pad(sums[..., -1], (1, 0)).cumsum(-1)
    between = (ends[..., :, None] - ends[..., None, :]).tril().exp().tril()[:, :, :-1, 1:]
    before = torch.einsum("bhij,bjhkv->bihkv", between.tril(-1), states)
    carried = torch.einsum("bithk,bihkv->bithv", C, before)
    carried = carried * sums.exp().permute(0, 2, 3, 1)[..., None]
    return (inside + carried).flatten(1, 2).transpose(1, 2)


@register("ssd", "Mamba-2's scan in chunks")
def ssd_race(quick: bool) -> Iterator[Row]:
    rivals = {"corelib": ssd_chunked, "broadcast and sum": broadcast_and_sum}

    def contestants(L: int, wrap: Callable) -> dict:
        inputs = ssd_inputs(L)
        return {name: wrap(f, *inputs) for name, f in rivals.items()}

    lengths = QUICK if quick else (256, 512, 1024, 2048, 4096)
    with torch.no_grad():
        result = sweep(lengths, lambda L: contestants(L, lambda f, *x: lambda: f(*x)), **OPTIONS)
        yield from rows(result, what="forward", shape=SSD_SHAPE)
    result = sweep(lengths, lambda L: contestants(L, forward_backward), **OPTIONS)
    yield from rows(result, what="forward + backward", shape=SSD_SHAPE)
    yield from _whole_blocks(quick)


def _whole_blocks(quick: bool) -> Iterator[Row]:
    """Projections, convolution, scan and norm, against transformers' block with our weights."""
    torch.manual_seed(0)
    block = Mamba2Block(H * V // 2, state=K, head_width=V)
    theirs = _transformers_block(block)

    def contestants(L: int) -> dict:
        x = torch.randn(1, L, H * V // 2, generator=torch.Generator().manual_seed(0))
        run = theirs if isinstance(theirs, Missing) else lambda: theirs(x)
        return {"corelib": lambda: block(x)[0], "transformers, torch path": run}

    with torch.no_grad():
        result = sweep(QUICK if quick else (256, 1024), contestants, **OPTIONS)
        yield from rows(result, what="Mamba-2 block, forward", shape=SSD_SHAPE)


def _transformers_block(block: Mamba2Block) -> Callable | Missing:
    module = peer("transformers.models.mamba2.modeling_mamba2")
    if isinstance(module, Missing):
        return module
    config = module.Mamba2Config(
        hidden_size=block.in_proj.in_features, num_heads=H, head_dim=V, state_size=K, n_groups=1,
        chunk_size=64, num_hidden_layers=1,
    )  # fmt: skip
    mixer = module.Mamba2Mixer(config, 0)
    mixer.load_state_dict(block.state_dict())
    return mixer.torch_forward
