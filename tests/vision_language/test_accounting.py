"""Costs: as counted from the modules themselves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from corelib.models.cache import DenseCache
from corelib.models.vlm import TinyVLM, VLMConfig
from corelib.vision_language.accounting import kv_bytes, layer_flops, prefill_flops, score_flops

SIZES = SimpleNamespace(width=96, heads=4, kv_heads=2, head_width=32, hidden=256)


def test_a_layers_flops_are_those_that_torch_counts():
    block = TinyVLM(VLMConfig()).layers[0]
    n = 37
    x = torch.randn(1, n, 96)
    with FlopCounterMode(display=False) as counter:
        for part in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            part(x)
        block.self_attn.o_proj(torch.randn(1, n, 128))
        block.mlp(x)
        q = torch.randn(4, n, 32)
        (q @ q.mT) @ q
    assert layer_flops(n, SIZES) == counter.get_total_flops()
    assert score_flops(n, SIZES) == 2 * 4 * n * n * 32
    assert score_flops(n, SIZES, rows=1) == score_flops(n, SIZES) // n


def test_the_papers_formula():
    square = SimpleNamespace(width=64, heads=4, kv_heads=4, head_width=16, hidden=200)
    n, d, m = 50, 64, 200
    assert layer_flops(n, square) == 2 * (4 * n * d * d + 2 * n * n * d + 3 * n * d * m)


def test_layers_add_up_and_bytes_are_what_a_cache_holds():
    counts = [10, 10, 4, 0]
    total = sum(layer_flops(n + 6, SIZES) for n in counts)
    assert prefill_flops(counts, 6, SIZES) == total
    cache = DenseCache()
    for layer, n in enumerate(counts):
        k = torch.zeros(1, 2, n + 6, 32, dtype=torch.float16)
        cache.append(layer, k, k)
    assert kv_bytes(counts, 6, SIZES) == cache.bytes()
    assert kv_bytes(counts, 6, SIZES, itemsize=4) == 2 * cache.bytes()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="counts: expected a number of at least 0 per layer"):
        prefill_flops([], 6, SIZES)
    with pytest.raises(ValueError, match="text: expected at least 0 tokens, got -1"):
        kv_bytes([1], -1, SIZES)
