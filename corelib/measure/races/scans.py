"""What scans buy on this machine: memories that reset, and recurrences of pictures.

* ``scan-reset``: the states alone, three ways that agree.
* ``memory``: a layer of an agent's memory over a rollout with resets: S5, a GRU, attention.
* ``convs5``: a layer over frames: ConvS5, a ConvLSTM of the same widths, attention over patches.

The last two compute different things, so that only their times compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...primitives.diagonal_scan import diagonal_scan
from ...state_space.convs5 import ConvS5Layer
from ...state_space.s5 import S5Layer
from ..gradients import forward_backward
from ..scaling import sweep
from . import Row, register, rows

ENVIRONMENTS, CHANNELS, STATE, EPISODE = 8, 32, 64, 100
CLIPS, WIDTH, PICTURE_STATE, SIDE, PATCH = 2, 8, 16, 16, 4
OPTIONS = dict(repeats=3, min_time=0.05)


def rollout(L: int) -> tuple[Tensor, Tensor]:
    """``(x (B, L, C), resets (B, L))``: an episode ends at each step with the same chance."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ENVIRONMENTS, L, CHANNELS, generator=generator)
    return x, torch.rand(ENVIRONMENTS, L, generator=generator) < 1 / EPISODE


# --- other ways -----------------------------------------------------------------------------------


def plain_loop(decay: Tensor, x: Tensor, *, reset: Tensor, state: Tensor) -> Tensor:
    """One step after the other; cut up beforehand, which keeps its backward pass linear."""
    decay, states = decay.masked_fill(reset[..., None], 0), []
    for a, fed in zip(decay.unbind(1), x.unbind(1)):
        state = a * state + fed
        states.append(state)
    return torch.stack(states, 1)


def flagged_doubling(decay: Tensor, x: Tensor, *, reset: Tensor, state: Tensor) -> Tensor:
    """The paper's operator over whole tensors: every step joins with the one 1, 2, 4, … before."""
    a, b, d = decay, x, reset[..., None].expand(x.shape)
    hop = 1
    while hop < x.shape[1]:
        cut = d[:, hop:]
        joined = torch.where(cut, b[:, hop:], a[:, hop:] * b[:, :-hop] + b[:, hop:])
        b = torch.cat([b[:, :hop], joined], 1)
        a = torch.cat([a[:, :hop], torch.where(cut, a[:, hop:], a[:, hop:] * a[:, :-hop])], 1)
        d = torch.cat([d[:, :hop], cut | d[:, :-hop]], 1)
        hop *= 2
    return b + torch.where(d, 0, a * state[:, None])


class GRUMemory(nn.Module):
    """``torch.nn.GRU`` with resets, in as few calls as they allow: one from cut to cut."""

    def __init__(self, channels: int):
        super().__init__()
        self.gru = nn.GRU(channels, channels, batch_first=True)

    def forward(
        self, x: Tensor, state: Tensor | None = None, resets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x (B, L, C)``; a cut is a step where any row resets."""
        state = self.init_state(len(x)) if state is None else state
        if resets is None:
            resets = torch.zeros(x.shape[:2], dtype=torch.bool)
        cuts = sorted({0, x.shape[1], *resets.any(0).nonzero()[:, 0].tolist()})
        outputs = []
        for first, last in pairwise(cuts):
            state = state.masked_fill(resets[:, first, None], 0)
            y, after = self.gru(x[:, first:last], state[None])
            state = after[0]
            outputs.append(y)
        return torch.cat(outputs, 1), state

    def step(self, x_t: Tensor, state: Tensor, reset: Tensor | None = None) -> tuple:
        y, state = self(x_t[:, None], state, None if reset is None else reset[:, None])
        return y[:, 0], state

    def init_state(self, batch: int) -> Tensor:
        return self.gru.weight_hh_l0.new_zeros(batch, self.gru.hidden_size)


class AttentionMemory(nn.Module):
    """Causal attention within episodes, four heads; no state between rollouts."""

    def __init__(self, channels: int):
        super().__init__()
        self.enter, self.out = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor, resets: Tensor) -> Tensor:
        episode = resets.cumsum(1)
        mask = (episode[:, :, None] == episode[:, None]).tril()[:, None]
        q, k, v = self.enter(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2))


class ConvLSTM(nn.Module):
    """Shi et al., arXiv 1506.04214, without peepholes; inputs of all frames in one convolution."""

    def __init__(self, channels: int, hidden: int, kernel: int = 3):
        super().__init__()
        half = kernel // 2
        self.enter = nn.Conv2d(channels, 4 * hidden, kernel, padding=half)
        self.own = nn.Conv2d(hidden, 4 * hidden, kernel, padding=half, bias=False)
        self.leave = nn.Conv2d(hidden, channels, kernel, padding=half)
        self.hidden = hidden

    def forward(self, x: Tensor, state: tuple | None = None) -> tuple[Tensor, tuple]:
        """``x (B, L, C, H, W)``; the state is a pair of pictures."""
        fed = self.enter(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        h, c = state or self.init_state(len(x), *x.shape[-2:])
        outputs = []
        for frame in fed.unbind(1):
            enter, forget, out, new = (frame + self.own(h)).chunk(4, 1)
            c = forget.sigmoid() * c + enter.sigmoid() * new.tanh()
            h = out.sigmoid() * c.tanh()
            outputs.append(h)
        hidden = torch.stack(outputs, 1).flatten(0, 1)
        return self.leave(hidden).view_as(x), (h, c)

    def step(self, x_t: Tensor, state: tuple) -> tuple[Tensor, tuple]:
        y, state = self(x_t[:, None], state)
        return y[:, 0], state

    def init_state(self, batch: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        nothing = self.own.weight.new_zeros(batch, self.hidden, height, width)
        return nothing, nothing


class PatchAttention(nn.Module):
    """Attention of patches to all patches of their own and of earlier frames, two heads."""

    def __init__(self, channels: int, patch: int = PATCH, width: int = 32):
        super().__init__()
        self.patch = patch
        self.enter = nn.Linear(channels * patch**2, 3 * width)
        self.out = nn.Linear(width, channels * patch**2)

    def forward(self, x: Tensor) -> Tensor:
        B, L, C, height, width = x.shape
        frames = F.pixel_unshuffle(x.flatten(0, 1), self.patch)
        tokens = frames.flatten(2).mT.reshape(B, -1, C * self.patch**2)
        q, k, v = self.enter(tokens).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        frame = torch.arange(L).repeat_interleave(tokens.shape[1] // L)
        mask = frame[:, None] >= frame
        y = self.out(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        )
        y = y.reshape(B * L, -1, C * self.patch**2).mT
        y = y.unflatten(-1, (height // self.patch, width // self.patch))
        return F.pixel_shuffle(y, self.patch).view_as(x)


# --- races ----------------------------------------------------------------------------------------


def reset_scans(L: int, *, backward: bool) -> dict[str, Callable]:
    """Three ways to the same states, complex, from a given one."""
    x, reset = rollout(L)
    generator = torch.Generator().manual_seed(1)
    turn = torch.randn(2, *x.shape, generator=generator).unbind()
    decay = torch.polar(turn[0].sigmoid(), turn[1])
    x, state = torch.complex(x, turn[1]), torch.complex(*turn)[:, 0].contiguous()

    def run(scan: Callable) -> Callable:
        def states(decay: Tensor, x: Tensor, state: Tensor) -> Tensor:
            return scan(decay, x, reset=reset, state=state)

        if backward:
            return forward_backward(states, decay, x, state)
        return lambda: states(decay, x, state)

    return {
        "corelib": run(diagonal_scan),
        "loop": run(plain_loop),
        "flagged operator": run(flagged_doubling),
    }


def memories(L: int, *, attention: bool = True) -> dict[str, Callable]:
    """Forward and backward through one layer, over a rollout with resets."""
    x, resets = rollout(L)
    torch.manual_seed(0)
    s5, gru, mixer = S5Layer(CHANNELS, STATE), GRUMemory(CHANNELS), AttentionMemory(CHANNELS)
    runs = {
        "corelib": lambda x: s5(x, None, resets)[0],
        "torch.nn.GRU": lambda x: gru(x, None, resets)[0],
    }
    if attention:
        runs["attention"] = lambda x: mixer(x, resets)
    return {name: forward_backward(run, x) for name, run in runs.items()}


def films(L: int, *, attention: bool = True) -> dict[str, Callable]:
    """Forward and backward through one layer over frames."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(CLIPS, L, WIDTH, SIDE, SIDE, generator=generator)
    torch.manual_seed(0)
    convs5, convlstm = ConvS5Layer(WIDTH, PICTURE_STATE), ConvLSTM(WIDTH, PICTURE_STATE)
    mixer = PatchAttention(WIDTH)
    runs = {"corelib": lambda x: convs5(x)[0], "ConvLSTM": lambda x: convlstm(x)[0]}
    if attention:
        runs["patch attention"] = mixer
    return {name: forward_backward(run, x) for name, run in runs.items()}


@register("scan-reset", "a complex scan that forgets at flags, against the loop")
def scan_reset(quick: bool) -> Iterator[Row]:
    lengths = (32, 64) if quick else (128, 256, 512, 1024, 2048)
    shape = f"B{ENVIRONMENTS} C{CHANNELS} complex64"
    for what, backward in (("forward", False), ("forward + backward", True)):
        options = OPTIONS | dict(tolerance=1e-4)
        result = sweep(lengths, lambda L, b=backward: reset_scans(L, backward=b), **options)
        yield from rows(result, what=what, shape=shape)


@register("memory", "an agent's memory over a rollout with resets: S5, GRU, attention")
def memory(quick: bool) -> Iterator[Row]:
    lengths = (32, 64) if quick else (128, 256, 512, 1024, 2048)
    result = sweep(lengths, memories, check=None, **OPTIONS)
    shape = f"B{ENVIRONMENTS} C{CHANNELS} float32"
    yield from rows(result, what="forward + backward", shape=shape)


@register("convs5", "a layer over frames: ConvS5, ConvLSTM, attention over patches")
def convs5(quick: bool) -> Iterator[Row]:
    lengths = (4, 8) if quick else (8, 16, 32, 64, 128)
    result = sweep(lengths, films, check=None, **OPTIONS)
    shape = f"B{CLIPS} C{WIDTH} {SIDE}x{SIDE} float32"
    yield from rows(result, what="forward + backward", shape=shape)
