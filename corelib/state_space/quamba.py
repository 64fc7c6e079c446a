"""Quamba: A Post-Training Quantization Recipe for Selective State Space Models (arXiv 2410.13229).

Idea: round everything in a trained Mamba block to int8 with one fixed scale a tensor. Two tensors
do not stand that, and get a treatment of their own: what enters the scan is clipped at a
percentile, and what leaves it is rotated by a Hadamard matrix before it is rounded.

    q = clip(round(v / s), -128, 127)      s = max |v| / 127 over calibration samples, for each v
    u:  s = percentile(|u|, 99.999) / 127              a few huge values would cost all others
    y:  out_proj(y) = W y = (W H^T / sqrt(n)) (H y / sqrt(n))
        quantise H y / sqrt(n), and W H^T / sqrt(n) once and for all

The scan's output has outliers in a few channels, which one scale a tensor cannot serve; ``H``
spreads them over all channels, and undoing it is already in the weights. The scan's input is
spared: an error there runs through the recurrence to all later steps.

| here        | paper          | what                                       | shape             |
|:------------|:---------------|:-------------------------------------------|:------------------|
| input       | block input    | into ``in_proj``                           | (B, L, C)         |
| x, z        | x, z           | out of ``in_proj``                         | (B, L, E)         |
| u           | x-bar          | ``silu(conv(x))``: into x_proj and scan    | (B, L, E)         |
| rank        | dt, low rank   | into ``dt_proj``                           | (B, L, R)         |
| dt          | Delta          | out of ``dt_proj``, before the softplus    | (B, L, E)         |
| B, C        | B, C           | write and read                             | (B, L, N)         |
| y           | y              | ``scan * silu(z)``, rotated where asked    | (B, L, E)         |

Int8: all four weight matrices, ``conv1d``, ``A_log`` and ``D``, and the eight activations above.
Products of matrices are exact in integers. In float32: the scan itself, its state, softplus, SiLU,
and the residual stream outside the block. Left out: a norm that writes int8 itself (the same
numbers, one pass less), quantised embeddings. Exact: the rotation, before rounding. The percentile
is the paper's default as we remember it.
Cost: four times smaller weights and activations; a rotation more a token. On a GPU the kernels
`corelib.kernels.int8_matmul` and `selective_scan_int8` run.
Oracle: the float block; integers simulated in floating point.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ..primitives import causal_short_conv, selective_scan
from ..primitives.hadamard import rotate
from ..primitives.quantise import (
    Int8Linear,
    QuantObserver,
    dequantise,
    hadamard_quantise,
    quantise,
)
from .mamba import MambaBlock, MambaState

POINTS = ("input", "x", "z", "u", "rank", "dt", "B", "C", "y")


def activations(
    block: MambaBlock, x: Float[Tensor, "B L C"], state: MambaState | None = None
) -> tuple[dict[str, Tensor], MambaState]:
    """All that is quantised in a float block, by the names in `POINTS`, and the state behind it.

    ``out_proj`` of the entry ``y`` is what the block itself returns.
    """
    state = block.init_state(len(x)) if state is None else state
    inner, z = block.in_proj(x).chunk(2, 2)
    weight, bias = block.conv1d.weight[:, 0], block.conv1d.bias
    mixed, inputs = causal_short_conv(inner.mT, weight, bias, state=state.inputs, return_state=True)
    u = F.silu(mixed).mT
    rank, B, C = block.x_proj(u).split([block.rank, *2 * [block.A_log.shape[1]]], 2)
    found = dict(input=x, x=inner, z=z, u=u, rank=rank, dt=rank @ block.dt_proj.weight.T, B=B, C=C)
    found["y"], scan = _scan(found, block.A_log, block.D, block.dt_proj.bias, state.scan)
    return found, MambaState(inputs, scan)


def _scan(found: dict[str, Tensor], A_log: Tensor, D: Tensor, dt_bias: Tensor, state: Tensor):
    """The gated output ``(B, L, E)`` and the last state."""
    u, dt, B, C, z = (found[name].mT for name in ("u", "dt", "B", "C", "z"))
    options = dict(dt_bias=dt_bias, dt_softplus=True, state=state, return_state=True)
    y, state = selective_scan(u, dt, -A_log.exp(), B, C, D, z, **options)
    return y.mT, state


def calibrate(
    block: MambaBlock,
    samples: Iterable[Float[Tensor, "B L C"]],
    *,
    percentile: float | None = 99.999,
    rotated: bool = True,
) -> dict[str, float]:
    """The scale of every activation, from inputs of the block.

    Args:
        percentile: for ``u``; None takes its largest value, as for all others.
        rotated: look at ``y`` in Hadamard's basis.

    Raises ValueError without samples.
    """
    observers = {name: QuantObserver(percentile if name == "u" else None) for name in POINTS}
    with torch.no_grad():
        for x in samples:
            found, _ = activations(block, x)
            found["y"] = rotate(found["y"]) if rotated else found["y"]
            for name, observer in observers.items():
                observer.observe(found[name])
    if not observers["input"].samples:
        raise ValueError("samples: expected at least one, got none")
    return {name: observer.scale for name, observer in observers.items()}


class QuantMamba(nn.Module):
    """A `MambaBlock` in int8: a sequence mixer with the same state, for inference (rounding has no
    gradient worth having).

    Args:
        block: a trained block. It is not changed.
        scales: of its activations, from `calibrate` with the same ``rotated``.
        rotated: quantise the scan's output in Hadamard's basis.
    """

    def __init__(self, block: MambaBlock, scales: dict[str, float], *, rotated: bool = True):
        super().__init__()
        if missing := set(POINTS) - set(scales):
            raise ValueError(f"scales: expected all of {POINTS}, without {sorted(missing)}")
        self.scales, self.rotated, self.rank = dict(scales), rotated, block.rank
        of_out = block.out_proj.weight.detach()
        self.in_proj = Int8Linear.of(block.in_proj.weight, scales["input"])
        self.x_proj = Int8Linear.of(block.x_proj.weight, scales["u"])
        self.dt_proj = Int8Linear.of(block.dt_proj.weight, scales["rank"])
        self.out_proj = Int8Linear.of(rotate(of_out) if rotated else of_out, scales["y"])
        self.small_scales: dict[str, float] = {}
        for name in ("conv1d.weight", "A_log", "D"):
            self._keep(name.replace(".", "_"), block.get_parameter(name))
        self.register_buffer("conv1d_bias", block.conv1d.bias.detach().clone())
        self.register_buffer("dt_bias", block.dt_proj.bias.detach().clone())

    def _keep(self, name: str, value: Tensor) -> None:
        observer = QuantObserver()
        observer.observe(value)
        self.small_scales[name] = observer.scale
        self.register_buffer(name, quantise(value.detach(), observer.scale))

    def _float(self, name: str) -> Tensor:
        return dequantise(getattr(self, name), self.small_scales[name])

    def _round(self, name: str, value: Tensor) -> Tensor:
        """To int8 and back: the value that an int8 tensor between two passes would have."""
        return dequantise(quantise(value, self.scales[name]), self.scales[name])

    def forward(
        self, x: Float[Tensor, "B L C"], state: MambaState | None = None
    ) -> tuple[Float[Tensor, "B L C"], MambaState]:
        """The outputs, and the state behind the last input."""
        state = self.init_state(len(x)) if state is None else state
        scales, N = self.scales, self.A_log.shape[1]
        x, z = self.in_proj(quantise(x, scales["input"])).chunk(2, 2)
        mixed, inputs = causal_short_conv(
            self._round("x", x).mT, self._float("conv1d_weight")[:, 0], self.conv1d_bias,
            state=state.inputs, return_state=True,
        )  # fmt: skip
        u = quantise(F.silu(mixed).mT, scales["u"])
        rank, B, C = self.x_proj(u).split([self.rank, N, N], 2)
        dt = self.dt_proj(quantise(rank, scales["rank"]))
        parts = dict(z=z, dt=dt, B=B, C=C).items()
        y, scan = self._scan({"u": u} | {n: quantise(v, scales[n]) for n, v in parts}, state.scan)
        to_int8 = hadamard_quantise if self.rotated else quantise
        return self.out_proj(to_int8(y, self.scales["y"])), MambaState(inputs, scan)

    def _scan(self, ints: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
        """The gated output ``(B, L, E)`` and the last state, of int8 inputs."""
        A_log, D, N = self._float("A_log"), self._float("D"), self.A_log.shape[1]
        if state.is_cuda and N & (N - 1) == 0:
            from corelib.kernels.selective_scan_int8 import int8_selective_scan

            u, dt, B, C, z = (ints[name].mT for name in ("u", "dt", "B", "C", "z"))
            given = u, dt, -A_log.exp(), B, C, D, z, self.dt_bias, state
            y, state = int8_selective_scan(*given, self.scales)
            return y.mT, state
        found = {name: dequantise(q, self.scales[name]) for name, q in ints.items()}
        return _scan(found, A_log, D, self.dt_bias, state)

    def step(
        self, x_t: Float[Tensor, "B C"], state: MambaState
    ) -> tuple[Float[Tensor, "B C"], MambaState]:
        """One input more."""
        y, state = self(x_t[:, None], state)
        return y[:, 0], state

    def init_state(self, batch: int) -> MambaState:
        """Nothing seen yet."""
        inner, conv = self.conv1d_weight.shape[0], self.conv1d_weight.shape[2]
        return MambaState(
            self.dt_bias.new_zeros(batch, inner, conv - 1),
            self.dt_bias.new_zeros(batch, *self.A_log.shape),
        )


def quantise_mixers(
    model: nn.Module,
    batches: Iterable,
    *,
    percentile: float | None = 99.999,
    rotated: bool = True,
) -> None:
    """Put a `QuantMamba` in the place of every `MambaBlock` of ``model``.

    Args:
        batches: calibration inputs; ``model(batch)`` is run for each, and every block sees what
            reaches it in the float model.
        percentile, rotated: as in `calibrate`.

    Raises ValueError for a model without a `MambaBlock`.
    """
    blocks = {n: m for n, m in model.named_modules() if isinstance(m, MambaBlock)}
    if not blocks:
        raise ValueError("model: expected at least one MambaBlock in it, got none")
    seen: dict[str, list[Tensor]] = {name: [] for name in blocks}
    hooks = [
        block.register_forward_pre_hook(lambda _, given, kept=seen[name]: kept.append(given[0]))
        for name, block in blocks.items()
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for name, block in blocks.items():
        scales = calibrate(block, seen[name], percentile=percentile, rotated=rotated)
        model.set_submodule(name, QuantMamba(block, scales, rotated=rotated))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers; one that is used twice counts once."""
    tensors = {id(t): t for t in [*module.parameters(), *module.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def example() -> dict:
    """A block of width 8 with 4 states, quantised from its example's six tokens, and these.

    >>> given = example()
    >>> given["mixer"](given["x"])[0].shape
    torch.Size([2, 6, 8])
    """
    torch.manual_seed(0)
    block, x = MambaBlock(8, state=4), torch.randn(2, 6, 8)
    return dict(mixer=QuantMamba(block, calibrate(block, [x])), x=x)
