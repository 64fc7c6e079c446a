"""Shapes of models: parameters counted from them are the published ones, to the last."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from corelib.foundations.model_shapes import MODELS, PUBLISHED, Device, ModelSpec, Server
from corelib.measure import A100, H100, this_machine
from corelib.models.decoder import Decoder, DecoderConfig

pytestmark = pytest.mark.method("longctx_peak")


@pytest.mark.parametrize("key", MODELS)
def test_parameters_are_the_published_count(key):
    assert MODELS[key].parameters == PUBLISHED[key]


def test_a_token_passes_through_two_of_eight_experts():
    mixtral, mistral = MODELS["mixtral-8x7b"], MODELS["mistral-7b"]
    expert = 32 * 3 * 4096 * 14336
    router = 32 * 4096 * 8
    assert mixtral.active_parameters == mistral.parameters + expert + router
    assert mixtral.parameters == mistral.parameters + 7 * expert + router
    assert mistral.active_parameters == mistral.parameters


def test_the_lab_decoder_has_the_shape_that_is_read_off_its_config():
    config = DecoderConfig(vocab=64, width=24, layers=3, heads=4, kv_heads=2, head_width=6)
    spec = ModelSpec.of(config, "tiny", tied=True, itemsize=4)
    assert spec.parameters == Decoder(config).n_parameters
    assert dataclasses.replace(spec, tied=False).parameters == spec.parameters + 64 * 24


class Products(TorchDispatchMode):
    """Counts the operations of matrix products as they happen."""

    flops = 0

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # saves the import of torch's compiler

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.flops += 2 * out.numel() * args[0].shape[1]
        return out


def test_a_token_costs_two_operations_per_weight():
    """Norms multiply no matrix, everything else is in one once."""
    config = DecoderConfig(vocab=64, width=24, layers=3, heads=4, kv_heads=2, head_width=6)
    model = Decoder(config)
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    with torch.no_grad(), Products() as counted:
        model(torch.zeros(1, 10, dtype=torch.long))
    spec = ModelSpec.of(config, "tiny", tied=True)
    assert counted.flops == 2 * 10 * (spec.parameters - norms)


def test_several_devices_are_one_larger_server():
    one, four = Server.of(A100), Server.of(A100, 4)
    for field in ("memory", "bandwidth", "flops", "host_link"):
        assert getattr(four, field) == 4 * getattr(one, field)
    assert one.flops == 312e12 and one.name == A100.name and four.name.startswith("4 x ")
    assert Server.of(H100, dtype="float8").flops == H100.peak("float8")


def test_this_machine_is_a_device():
    assert all(isinstance(device, Device) for device in (A100, this_machine()))


@pytest.mark.no_shape_checks
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(kv_heads=3), ValueError, "kv_heads: expected a divisor of 56 heads, got 3"),
        (dict(heads=0), ValueError, "heads: expected at least 1, got 0"),
        (dict(heads=2.0), TypeError, "heads: expected an int, got float"),
        (dict(experts_used=2), ValueError, "experts_used: expected 1 to 1 experts, got 2"),
        (dict(itemsize=0), ValueError, "itemsize: expected a positive number, got 0"),
        (dict(kv_itemsize="2"), TypeError, "kv_itemsize: expected a number, got str"),
    ],
)
def test_bad_shapes_are_named(change, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(MODELS["yi-34b-200k"], **change)


@pytest.mark.no_shape_checks
def test_bad_servers_are_named():
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        Server.of(A100, 0)
    with pytest.raises(ValueError, match="host_link: expected a positive number"):
        Server.of(A100, host_link=-1)
    with pytest.raises(ValueError, match="no peak for dtype 'int3'"):
        Server.of(A100, dtype="int3")
