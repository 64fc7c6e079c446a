"""Model shapes and servers as numbers: what the cost formulas of serving start from.

A `ModelSpec` is a decoder's shape: its parameters are counted from it, and `MODELS` holds the
shapes of some open models. A `Server` is one device or several that work as one. Nothing here is
measured: shapes come from released configuration files, devices from their data sheets
(`corelib.measure.A100`, `H100`) or from a self-test (`corelib.measure.this_machine`).
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from .shared import check_counts, check_positive

_DATA = json.loads(pathlib.Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
PCIE_4 = 20e9  # bytes a second that a PCIe 4 x16 link reaches one way (32e9 on paper)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A decoder's shape, and what follows from it. Bytes per number: bfloat16 unless said.

    ``hidden``: of the gated MLP; ``experts_used`` of ``experts`` work on a token.
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    vocab: int
    tied: bool = False
    qkv_bias: bool = False
    experts: int = 1
    experts_used: int = 1
    itemsize: Real = 2
    kv_itemsize: Real = 2

    def __post_init__(self) -> None:
        check_counts(heads=self.heads, kv_heads=self.kv_heads, experts=self.experts)
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads: expected a divisor of {self.heads} heads, got {self.kv_heads}"
            )
        if not 1 <= self.experts_used <= self.experts:
            raise ValueError(
                f"experts_used: expected 1 to {self.experts} experts, got {self.experts_used}"
            )
        check_positive(itemsize=self.itemsize, kv_itemsize=self.kv_itemsize)

    @classmethod
    def of(cls, config: Any, name: str, **options: Any) -> ModelSpec:
        """The shape of a model whose ``config`` has fields of these names."""
        fields = ("layers", "width", "heads", "kv_heads", "head_width", "hidden", "vocab")
        sizes = {field: getattr(config, field) for field in fields}
        return cls(name, **sizes, qkv_bias=getattr(config, "qkv_bias", False), **options)

    @property
    def parameters(self) -> int:
        """All weights, norms and biases included."""
        return self._count(self.experts)

    @property
    def active_parameters(self) -> int:
        """Those that one token passes through."""
        return self._count(self.experts_used)

    def _count(self, experts: int) -> int:
        q, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        attention = 2 * self.width * (q + kv) + (q + 2 * kv if self.qkv_bias else 0)
        router = self.width * self.experts if self.experts > 1 else 0
        mlp = experts * 3 * self.width * self.hidden + router
        ends = (1 if self.tied else 2) * self.vocab * self.width + self.width
        return ends + self.layers * (attention + mlp + 2 * self.width)


def _published(entry: Mapping[str, Any]) -> ModelSpec:
    return ModelSpec(**{key: value for key, value in entry.items() if key != "published"})


#: Shapes of open models, from the configuration files that they were released with.
MODELS: dict[str, ModelSpec] = {key: _published(m) for key, m in _DATA.items()}
#: Their parameter counts as published, to hold `ModelSpec.parameters` against.
PUBLISHED: dict[str, int] = {key: m["published"] for key, m in _DATA.items()}


@runtime_checkable
class Device(Protocol):
    """What `Server.of` asks of a device, such as `corelib.measure.A100`."""

    name: str
    memory: int
    bandwidth: Real

    def peak(self, dtype: str) -> float: ...


@dataclasses.dataclass(frozen=True)
class Server:
    """One or more devices as one: bytes, bytes a second, operations a second."""

    name: str
    memory: Real
    bandwidth: Real
    flops: Real
    host_link: Real = PCIE_4

    @classmethod
    def of(
        cls, device: Device, count: int = 1, *, dtype: str = "bfloat16", host_link: Real = PCIE_4
    ) -> Server:
        """``count`` devices that split weights and cache evenly, each with its own link."""
        check_counts(count=count)
        check_positive(host_link=host_link)
        each = device.memory, device.bandwidth, device.peak(dtype), host_link
        name = device.name if count == 1 else f"{count} x {device.name}"
        return cls(name, *(count * number for number in each))
