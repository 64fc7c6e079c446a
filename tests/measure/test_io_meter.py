"""The byte counter: exact on kernels whose traffic is counted by hand."""

import numpy as np
import pytest
import torch

from corelib.measure.io_meter import count_io, io_meter

pytest.importorskip("triton")

DEMO = "corelib.kernels.gates.demo"


def test_vector_add_moves_three_vectors():
    count = count_io(f"{DEMO}:vector_add", torch.ones(1000), torch.ones(1000))
    assert (count.bytes_loaded, count.bytes_stored) == (2 * 4000, 4000)
    assert (count.loads, count.stores, count.launches, count.dots) == (8, 4, 1, 0)
    assert count.bytes_moved == 12000 and count.unique_bytes is None


def test_masked_matmul_counts_active_lanes_only():
    M, N, K = 33, 35, 40  # two tiles of 32 each way, none of them full
    count = count_io(f"{DEMO}:masked_matmul", torch.ones(M, K), torch.ones(K, N), unique=True)
    assert count.bytes_loaded == 4 * (2 * M * K + 2 * K * N)  # each operand once per tile across
    assert count.bytes_stored == 4 * M * N
    assert count.dot_flops == 8 * 2 * 32**3  # the padding is multiplied, too
    assert count.unique_bytes_loaded == 4 * (M * K + K * N)
    assert count.unique_bytes == 4 * (M * K + K * N + M * N)


def test_half_precision_counts_two_bytes():
    x = torch.ones(100, dtype=torch.float16)
    count = count_io(f"{DEMO}:vector_add", x, x)
    assert (count.bytes_loaded, count.bytes_stored) == (400, 200)


def test_atomics_and_tensor_descriptors():
    counts = count_io(f"{DEMO}:histogram", torch.arange(70) % 3, 3)
    assert counts.bytes_atomic == 70 * 4 and counts.atomics == 2
    assert counts.bytes_moved == counts.bytes_loaded + 2 * 280
    tile = count_io(f"{DEMO}:copy_described", torch.ones(20, 16))
    assert (tile.bytes_loaded, tile.bytes_stored) == (20 * 16 * 4, 20 * 16 * 4)


def test_naive_attention_grows_as_length_squared():
    lengths = [32, 48, 64, 80, 96]
    moved = []
    for L in lengths:
        q = k = v = torch.ones(L, 16)
        moved.append(count_io(f"{DEMO}:naive_attention", q, k, v).bytes_moved)
    exponent, _ = np.polyfit(np.log(lengths), np.log(moved), 1)
    assert 1.85 < exponent < 2.05


@pytest.mark.parametrize("causal", [True, False])
def test_flash_attention_moves_what_it_has_to(causal):
    from corelib.kernels.flash_attention import forward_bytes

    B, H, G, L, S, D, V = 1, 2, 1, 150, 150, 32, 48
    shapes = (B, H, L, D), (B, G, S, D), (B, G, S, V)
    inputs = [torch.ones(shape) for shape in shapes]
    count = count_io("corelib.kernels.flash_attention:flash_attention", *inputs, causal=causal)
    bound = forward_bytes(B, H, L, S, D, V, causal=causal)
    assert 0.99 * bound <= count.bytes_moved <= 1.15 * bound


def test_counting_needs_interpretation():
    with pytest.raises(RuntimeError, match="process that interprets"):
        with io_meter():
            pass
