"""The spiking LMUFormer (arXiv 2402.04882, section 4): spikes in place of activations.

Every activation becomes a batch norm and leaky integrate-and-fire neurons (`LIF`) that walk along
the sequence: a step of their membrane is a step of the input. What linear maps and convolutions
read is then zeros and ones, so that they only have to add the rows of weights whose neuron fired.
The memory is written by spikes and read as spikes, and is twice as large as the model is wide:

    u = LIF(norm(w . x))        m_t = A_bar m_{t-1} + B_bar u_t
    y = LIF(norm(W [LIF(norm(m)); x]))

What runs between blocks is not spikes but the sum of all branches (the released model's "membrane
shortcut"): each branch begins with norm and LIF. So do the embedding's later convolutions and the
head. ``tau = 2``, threshold 1 (0.5 before the LMU, as released), hard reset, not differentiated.
Ours: ``gain``, the weight that batch norms in front of neurons start from. At the usual 1 a neuron
fires at a step in twenty; 2 makes it one in five, and the first hundred steps of training teach
more.

The released recurrent path runs over growing prefixes and leaves out norm and LIF of the memory;
ours is the parallel model, step by step. Everything looks at the past only.
Oracles: `corelib.primitives.spiking_scan.spiking_scan_reference`; the model step by step.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from corelib.primitives.spiking_scan import spiking_scan

from .lmuformer import LegendreMemory
from .lmuformer_layers import CausalConv, Chain, ChannelNorm, Residual, StreamingClassifier

Rows = Float[Tensor, "B L C"]
Row = Float[Tensor, "B C"]


class LIF(nn.Module):
    """Leaky integrate-and-fire neurons, one a channel: ``(B, L, C)`` to spikes, 0 or 1.

    Args:
        channels: how many neurons.
        tau: time constant of the leak, in steps.
        threshold: at which they fire.
        slope: of the surrogate gradient, see `corelib.primitives.spiking_scan`.
    """

    def __init__(
        self, channels: int, *, tau: float = 2.0, threshold: float = 1.0, slope: float = 4.0
    ):
        super().__init__()
        self.channels = channels
        self.tau, self.threshold, self.slope = tau, threshold, slope
        self.register_buffer("rest", torch.zeros(channels), persistent=False)

    def forward(self, x: Rows, state: Row | None = None) -> tuple[Rows, Row]:
        """Spikes, and the membrane after the last step."""
        options = dict(tau=self.tau, threshold=self.threshold, slope=self.slope)
        return spiking_scan(x, state=state, **options)

    def step(self, x_t: Row, state: Row) -> tuple[Row, Row]:
        """One step of every neuron."""
        spikes, state = self.forward(x_t[:, None], state)
        return spikes[:, 0], state

    def init_state(self, batch: int) -> Row:
        """At rest."""
        return self.rest.new_zeros(batch, self.channels)


class SpikingLMU(nn.Module):
    """The LMU between spikes: written by spikes, read as spikes, giving spikes.

    Args:
        channels: width of input and output.
        size: numbers in the memory; None takes twice as many as there are channels.
        theta: window, in steps.
    """

    def __init__(self, channels: int, size: int | None = None, *, theta: float = 128.0):
        super().__init__()
        size = 2 * channels if size is None else size
        self.memory = LegendreMemory(size, theta)
        self.write = Chain(nn.Linear(channels, 1), *_fire(1))
        self.tell = Chain(*_fire(size))
        self.read = Chain(nn.Linear(size + channels, channels), *_fire(channels))

    def forward(self, x: Rows, state: tuple | None = None) -> tuple[Rows, tuple]:
        """All positions; the state is that of writing, of the memory, of telling and of reading."""
        return self._run(x, (None,) * 4 if state is None else state, False)

    def step(self, x_t: Row, state: tuple) -> tuple[Row, tuple]:
        """One position by the recurrence."""
        return self._run(x_t, state, True)

    def init_state(self, batch: int) -> tuple:
        """An empty memory, neurons at rest."""
        return tuple(x.init_state(batch) for x in (self.write, self.memory, self.tell, self.read))

    def _run(self, x: Tensor, state: tuple, steps: bool) -> tuple[Tensor, tuple]:
        def run(layer, value, before):
            return (layer.step if steps else layer)(value, before)

        u, writing = run(self.write, x, state[0])
        m, memory = run(self.memory, u[..., 0], state[1])
        told, telling = run(self.tell, m, state[2])
        y, reading = run(self.read, torch.cat([told, x], -1), state[3])
        return y, (writing, memory, telling, reading)


def spiking_block(channels: int, *, theta: float = 128.0, expand: int = 4) -> Chain:
    """`corelib.state_space.lmuformer.lmu_block` with spikes."""
    wide = expand * channels
    lmu = (
        *_fire(channels, 0.5), SpikingLMU(channels, theta=theta),
        nn.Linear(channels, channels), ChannelNorm(channels),
    )  # fmt: skip
    mixer = (
        *_fire(channels), nn.Linear(channels, wide), *_fire(wide), nn.Linear(wide, channels)
    )  # fmt: skip
    return Chain(Residual(*lmu), Residual(*mixer))


class SpikingLMUFormer(StreamingClassifier):
    """The spiking model; arguments as for `corelib.state_space.lmuformer.LMUFormer`, and ``gain``,
    the weight that the batch norms in front of neurons start from."""

    def __init__(
        self, features: int, classes: int, channels: int = 256, *, depth: int = 1,
        theta: float = 128.0, expand: int = 4, gain: float = 1.0,
    ):  # fmt: skip
        embed = [CausalConv(features, channels)]
        for _ in range(3):
            embed += [*_fire(channels), CausalConv(channels, channels)]
        position = Residual(*_fire(channels), CausalConv(channels, channels))
        blocks = [spiking_block(channels, theta=theta, expand=expand) for _ in range(depth)]
        super().__init__(Chain(*embed, position, *blocks, *_fire(channels)), channels, classes)
        for chain in self.modules():
            for norm, after in pairwise(chain.layers if isinstance(chain, Chain) else ()):
                if isinstance(after, LIF):
                    nn.init.constant_(norm.weight, gain)


def firing_rates(model: nn.Module, x: Rows) -> dict[str, float]:
    """Spikes per neuron and step, by the name of each `LIF` layer in the model."""
    rates: dict[str, float] = {}
    named = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LIF)]

    def listen(name):
        return lambda layer, given, result: rates.__setitem__(name, result[0].mean().item())

    handles = [layer.register_forward_hook(listen(name)) for name, layer in named]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return rates


def example() -> dict:
    """A spiking block of four channels and six tokens for it.

    >>> given = example()
    >>> y, _ = given["mixer"](given["x"])
    >>> y.shape
    torch.Size([2, 6, 4])
    """
    torch.manual_seed(0)
    mixer = spiking_block(4, theta=6.0).double().eval()
    return dict(mixer=mixer, x=3 * torch.randn(2, 6, 4, dtype=torch.float64))


def _fire(channels: int, threshold: float = 1.0) -> tuple[nn.Module, nn.Module]:
    return ChannelNorm(channels), LIF(channels, threshold=threshold)
