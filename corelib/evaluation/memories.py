"""Associative memories without training: what a kind of mixer can recall at its best.

Every identifier gets a random code of length 1, pairs are written in the order of the text, and
what is read is the identifier whose code comes closest. There is nothing to learn and no noise but
that of the codes themselves, so what is lost is lost by the kind of memory:

* `softmax_memory`: attention over all pairs; it holds them all.
* `window_memory`: attention over the last ``window`` pairs.
* `state_memory`: linear attention, a matrix ``sum_t k_t v_t^T`` of one size for any text.
* `decaying_memory`: the same with a decay per pair (gated linear attention, Mamba-2).
* `delta_memory`: the delta rule, which corrects what the matrix says of a key before it writes.
* `hybrid_memory`: a decaying matrix and a window, added; the window keeps out where no key fits.

Codes are ``(B, 1, pairs, width)``. `recall` makes any of them answer questions.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..primitives import attention, linear_recurrence
from .shared import Answerer, Question

Codes = Float[Tensor, "B H S D"]
Read = Float[Tensor, "B H L D"]
Memory = Callable[[Tensor, Tensor, Tensor], Tensor]

SHARPNESS = 40.0  # e^40 for the right pair against e^(40 * overlap) for each other one


def softmax_memory(q: Read, k: Codes, v: Codes) -> Read:
    """Attention of ``q`` over all pairs."""
    return attention(q, k, v, causal=False, scale=SHARPNESS)


def window_memory(window: int) -> Memory:
    """Attention over the last ``window`` pairs."""
    if window < 1:
        raise ValueError(f"window: expected at least 1, got {window}")
    return lambda q, k, v: softmax_memory(q, k[:, :, -window:], v[:, :, -window:])


def _state_read(q: Read, k: Codes, v: Codes, **options) -> Read:
    _, state = linear_recurrence(k, k, v, scale=1.0, return_state=True, **options)
    return q @ state.to(q.dtype)


def state_memory(q: Read, k: Codes, v: Codes) -> Read:
    """Linear attention: one matrix, to which every pair is added."""
    return _state_read(q, k, v)


def decaying_memory(half_life: float) -> Memory:
    """Linear attention whose state halves every ``half_life`` pairs."""
    if half_life <= 0:
        raise ValueError(f"half_life: expected more than 0 pairs, got {half_life}")
    rate = -math.log(2) / half_life
    return lambda q, k, v: _state_read(q, k, v, log_decay=torch.full_like(k[..., 0], rate))


def delta_memory(q: Read, k: Codes, v: Codes) -> Read:
    """The delta rule at full strength."""
    return _state_read(q, k, v, beta=torch.ones_like(k[..., 0]))


def hybrid_memory(window: int, half_life: float) -> Memory:
    """A window and a decaying state, added: each answers where it can.

    Attention always returns something. Here it may also look at a sink, which is empty and as near
    as a key at half the length, so that a window without the key adds next to nothing.
    """
    far = decaying_memory(half_life)
    window_memory(window)  # the same check

    def read(q: Read, k: Codes, v: Codes) -> Read:
        k_near, v_near = k[:, :, -window:], v[:, :, -window:]
        out, lse = attention(q, k_near, v_near, causal=False, scale=SHARPNESS, return_lse=True)
        return out * torch.sigmoid(lse - SHARPNESS / 2)[..., None] + far(q, k, v)

    return read


def recall(memory: Memory, *, width: int = 64, seed: int = 0) -> Answerer:
    """Look up one key a question with ``memory``; codes are ``width`` wide, new for every text."""
    if width < 1:
        raise ValueError(f"width: expected at least 1, got {width}")

    def answer(questions: Sequence[Question]) -> list[str]:
        return [_one(memory, q, width, seed) for q in questions]

    return answer


def _one(memory: Memory, question: Question, width: int, seed: int) -> str:
    stack = json.loads(question.text)
    key = json.loads(question.query.split("\n")[2].rstrip(": "))
    names = list(dict.fromkeys([*stack, *stack.values(), key]))
    number = {name: i for i, name in enumerate(names)}
    drawn = torch.Generator().manual_seed(seed + zlib.crc32(question.text.encode()))
    codes = torch.randn(len(names), width, generator=drawn)
    codes = (codes / codes.norm(dim=-1, keepdim=True))[None, None]
    keys, values = ([number[n] for n in part] for part in (stack, stack.values()))
    found = memory(codes[:, :, [number[key]]], codes[:, :, keys], codes[:, :, values])
    closest = (found @ codes.mT)[0, 0, 0, values].argmax()
    return json.dumps(names[values[int(closest)]])
