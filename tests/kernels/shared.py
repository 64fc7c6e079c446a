"""What the kernels' tests share: comparisons by name, refusals, declared tiles, mutants.

A worker imports a test file by its path, so that the test file finds this one by its path too:

>>> shared = load_file(str(pathlib.Path(__file__).with_name("shared.py")))
"""

from __future__ import annotations

import pytest
import torch

from corelib.kernels.gates.interpreter import resolve


def assert_close(names, got, wanted, tolerance, relative=None):
    """Each result against its float64 oracle; ``relative`` is ``tolerance`` unless given."""
    relative = tolerance if relative is None else relative
    for name, x, y in zip(names, got, wanted, strict=True):
        torch.testing.assert_close(
            x.double(), y, atol=tolerance, rtol=relative, msg=lambda m, n=name: f"{n}: {m}"
        )


def attention_with_gradients(reference, qkv, grads, *lists, **options):
    """Output, log-sum-exp and gradients in float64; empty rows pass no gradient on."""
    qkv = [x.double().requires_grad_() for x in qkv]
    out, lse = reference(*qkv, *lists, **options, return_lse=True)
    seen = lse > -torch.inf
    total = (out * grads[0].double()).sum() + (lse[seen] * grads[1].double()[seen]).sum()
    return [x.detach() for x in (out, lse, *torch.autograd.grad(total, qkv))]


def with_nan_for_empty_rows(grads, lse):
    """What comes back through the log-sum-exp of a row that sees no key must not matter."""
    return grads[0], grads[1].masked_fill(lse == -torch.inf, float("nan"))


def guarded(x):
    """The same values as a view with NaN around each row and after the last one."""
    B, H, L, D = x.shape
    room = x.new_full((B, L + 1, H, D + 3), torch.nan).transpose(1, 2)
    room[:, :, :L, :D] = x
    return room[:, :, :L, :D]


def assert_tiles_are_declared(rows, forward, backward):
    """What the launchers take, ``(block_t, block_c, num_warps)``, is what is compiled."""
    for row in rows:
        tile = forward if row.direction == "forward" else backward
        assert (row.constexprs["BLOCK_T"], row.constexprs["BLOCK_C"]) == tile[:2]
        assert row.num_warps == tile.num_warps


def assert_refused(target, args, error, message, **options):
    """In this process, which interprets nothing: what is checked before a device is asked for."""
    pytest.importorskip("triton")
    with pytest.raises(error, match=message):
        resolve(target)(*args, **options)


def assert_wants_cuda(target, args, **options):
    """Tensors of a CPU, where nothing is interpreted, are refused."""
    assert_refused(target, args, ValueError, "expected CUDA tensors", **options)


def assert_refused_where_it_runs(interpreter, target, args, error, message, **options):
    """Where the device is right, so that nothing but the input itself can be refused."""
    refusal = interpreter.call(f"{__file__}:refusal", target, args, options)
    with pytest.raises(error, match=message):
        raise refusal


def refusal(target, args, options):
    """In the worker: the error that a kernel meets its input with."""
    try:
        resolve(target)(*args, **options)
    except (TypeError, ValueError) as error:
        return error
    raise AssertionError(f"{target} takes what it should refuse")


def survivors(module, check, **options):
    """The mutants of ``corelib.kernels.<module>`` that ``check`` does not notice."""
    pytest.importorskip("triton")
    from corelib.kernels.gates import mutants

    return mutants.survivors(f"corelib.kernels.{module}", check, **options)
