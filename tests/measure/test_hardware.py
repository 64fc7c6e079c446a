"""Published machines, this machine, and the roofline's arithmetic."""

import math

import pytest
import torch

from corelib.measure import A100, H100, HardwareSpec, ModelledTime, roofline, this_machine

TOY = HardwareSpec("toy", {"float32": 100.0}, bandwidth=10.0)


def test_published_figures():
    assert (A100.peak("bfloat16"), A100.bandwidth, A100.sms) == (312e12, 2.039e12, 108)
    assert (H100.peak(torch.bfloat16), H100.bandwidth, H100.sms) == (989.4e12, 3.35e12, 132)
    assert A100.ridge("bfloat16") == pytest.approx(153.0, abs=0.1)
    assert not A100.measured and hash(A100) != hash(H100)


def test_roofline_takes_the_slower_of_moving_and_computing():
    assert roofline(TOY, bytes=50, flops=100, dtype="float32") == ModelledTime(
        5, "memory", 2, "toy"
    )
    assert roofline(TOY, bytes=10, flops=400, dtype="float32") == ModelledTime(
        4, "compute", 40, "toy"
    )
    assert roofline(TOY, bytes=0, flops=0, dtype="float32").seconds == 0
    assert math.isinf(roofline(TOY, bytes=0, flops=1, dtype="float32").intensity)
    assert TOY.ridge("float32") == 10


def test_a_modelled_time_says_so():
    text = repr(roofline(H100, bytes=3.35e9, flops=1e9))
    assert text == "modelled 1 ms on H100 SXM 80 GB (memory-bound, 0.299 FLOP per byte)"
    assert "modelled 0 s" in repr(roofline(H100, bytes=0, flops=0))


@pytest.mark.no_shape_checks
def test_bad_input():
    with pytest.raises(ValueError, match="must not be negative"):
        roofline(TOY, bytes=-1, flops=1, dtype="float32")
    with pytest.raises(ValueError, match="toy has no peak for dtype 'int4': known are float32"):
        roofline(TOY, bytes=1, flops=1, dtype="int4")
    with pytest.raises(ValueError, match="device must be"):
        this_machine("tpu")


def test_this_machine_is_measured_once():
    spec = this_machine()
    assert spec is this_machine() and spec.measured
    assert spec.bandwidth > 1e8 and spec.peak("float32") > 1e8 and spec.sms >= 1
    assert "torch" in spec.name
