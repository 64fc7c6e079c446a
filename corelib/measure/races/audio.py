"""SaShiMi, S4 at the full rate and a dilated WaveNet of one size: loss, speed, training.

The three compute different functions; they are raced unchecked, as what could be picked to model
raw sound. `networks` makes them with nearly equal numbers of parameters, `fit` trains each in the
same way, `bits_by_context` says what each makes of more past. WaveNet (van den Oord et al., arXiv
1609.03499) is our own, small, and generates from queues: nothing is computed twice.

    python -m corelib.measure.races.audio         # trains the three, writes audio.json

`recorded` reads the runs that are shipped.
"""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...data.audio import mu_law_encode, synth_music
from ...models.optim import FusedAdamW, warm_cosine
from ...state_space.sashimi import SaShiMi
from ...state_space.shared import parameter_groups
from ..gradients import forward_backward
from ..race import race
from ..scaling import sweep
from . import Row, register, rows

RUNS = pathlib.Path(__file__).with_suffix(".json")
LEVELS, LENGTH, BEAT = 64, 1024, 1 / 16
STEPS, CONTEXTS = 300, (16, 32, 64, 128, 256, 512)
BETAS = (0.9, 0.98)


class WaveNet(nn.Module):
    """Gated causal convolutions of two taps each, the second one ``dilation`` samples back."""

    def __init__(self, levels: int, width: int, dilations: Sequence[int]):
        super().__init__()
        self.dilations = tuple(dilations)
        self.embed = nn.Embedding(levels, width)
        self.taps = nn.ModuleList(nn.Linear(2 * width, 2 * width) for _ in dilations)
        self.out = nn.ModuleList(nn.Linear(width, 2 * width) for _ in dilations)
        self.head = nn.Sequential(
            nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, levels)
        )

    def forward(self, ids: Int[Tensor, "B L"]) -> tuple[Float[Tensor, "B L levels"], list[deque]]:
        """Logits, and for each layer the inputs that later steps look back to."""
        x, total, queues = self.embed(ids), 0.0, []
        for layer, dilation in enumerate(self.dilations):
            past = nn.functional.pad(x, (0, 0, dilation, 0))
            queues.append(deque(past[:, -dilation:].unbind(1)))
            x, skip = self._layer(layer, past[:, : x.shape[1]], x)
            total = total + skip
        return self.head(total), queues

    def step(
        self, ids_t: Int[Tensor, " B"], queues: list[deque]
    ) -> tuple[Float[Tensor, "B levels"], list[deque]]:
        """One sample; the queues are changed in place."""
        x, total = self.embed(ids_t), 0.0
        for layer, queue in enumerate(queues):
            queue.append(x)
            x, skip = self._layer(layer, queue.popleft(), x)
            total = total + skip
        return self.head(total), queues

    def _layer(self, layer: int, past: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        tanh, gate = self.taps[layer](torch.cat([past, x], -1)).chunk(2, -1)
        more, skip = self.out[layer](torch.tanh(tanh) * torch.sigmoid(gate)).chunk(2, -1)
        return x + more, skip

    generate = SaShiMi.generate


def networks(length: int = LENGTH, levels: int = LEVELS, seed: int = 0) -> dict[str, nn.Module]:
    """The three, of about 28,000 parameters each."""
    options = dict(state_size=16, length=length, step_min=2e-3, step_max=0.2)
    made = {}
    for name, make in {
        "SaShiMi": lambda: SaShiMi(levels, 24, (4, 4), blocks=1, expand=1, **options),
        "S4, one rate": lambda: SaShiMi(levels, 24, (), blocks=5, **options),
        "WaveNet": lambda: WaveNet(levels, 22, [2**k for k in range(8)]),
    }.items():
        torch.manual_seed(seed)
        made[name] = make()
    return made


def music(count: int, length: int = LENGTH, *, seed: int, levels: int = LEVELS) -> Tensor:
    """``count`` stretches of `synth_music`, ``length + 1`` codes each: ``(count, length + 1)``."""
    generator = torch.Generator().manual_seed(seed)
    sound = synth_music(count * (length + 1), generator=generator, beat=BEAT)
    return mu_law_encode(sound, levels).view(count, length + 1)


def loss(model: Callable, codes: Int[Tensor, "B L"], skip: int = 0) -> Tensor:
    """Nats for each code after the first ``skip + 1``."""
    logits = model(codes[:, :-1])[0][:, skip:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), codes[:, skip + 1 :].flatten())


def fit(
    model: nn.Module,
    codes: Int[Tensor, "N L"],
    *,
    steps: int,
    batch: int = 4,
    lr: float = 1e-2,
    system_share: float = 0.2,
    after: Callable[[], None] | None = None,
) -> list[float]:
    """Adam with a cosine to zero: bits a code, step by step.

    S4's own parameters learn at ``system_share`` of ``lr``; ``after`` is called behind each
    step.
    """
    groups, curve = parameter_groups(model, lr, system_lr=system_share * lr), []
    optimiser = FusedAdamW(groups, lr, betas=BETAS, clip=1.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = torch.randint(len(codes), (batch,), generator=generator)
        value = loss(model, codes[chosen])
        curve.append(optimiser.step(value, warm_cosine(step, steps, 1)) / math.log(2))
        if after is not None:
            after()
    return curve


@torch.no_grad()
def bits_by_context(
    model: nn.Module, codes: Int[Tensor, "N L"], contexts: Sequence[int]
) -> dict[int, float]:
    """Bits for a code when the model sees ``context`` codes before it and no more."""
    result, ends = {}, range(max(contexts), codes.shape[1], 23)
    for context in contexts:
        windows = torch.cat([codes[:, end - context : end + 1] for end in ends])
        result[context] = loss(model, windows, skip=context - 1).item() / math.log(2)
    return result


def learn(steps: int, length: int, contexts: Sequence[int]) -> Iterator[dict]:
    """Train each of the `networks`: its bits on the way, and at the end on other music."""
    train, test = music(4 * steps, length, seed=1), music(8, 2 * length, seed=2)
    for name, model in networks(length).items():
        began = time.process_time()
        curve = fit(model, train, steps=steps)
        yield {
            "network": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "seconds": round(time.process_time() - began, 1),
            "bits": [round(bits, 3) for bits in curve],
            "by_context": {
                str(k): round(v, 3) for k, v in bits_by_context(model, test, contexts).items()
            },
        }


def recorded() -> list[dict]:
    """The shipped runs: network, parameters, processor seconds, bits by step and by context."""
    return json.loads(RUNS.read_text(encoding="utf-8"))["runs"]


def next_sample(model: nn.Module, past: Int[Tensor, "B L"]) -> Callable[[], Tensor]:
    """A function that takes one more step behind ``past`` each time it is called."""
    with torch.no_grad():
        state = model(past)[1]
    kept = [state]

    @torch.no_grad()
    def step() -> Tensor:
        logits, kept[0] = model.step(past[:, -1], kept[0])
        return logits

    return step


@register("sashimi-generate", "one more sample from SaShiMi, S4 at one rate and WaveNet")
def sashimi_generate(quick: bool) -> Iterator[Row]:
    length = 64 if quick else LENGTH
    past = music(1, length, seed=1)[:, :-1]
    steps = {name: next_sample(model, past) for name, model in networks(length).items()}
    # 16 samples together: all tiers of SaShiMi run in their proportions
    many = {name: lambda step=step: [step() for _ in range(16)][-1] for name, step in steps.items()}
    result = race(many, check=None, min_time=0.02)
    yield from rows(result, what="16 samples", shape=f"B1 after L{length}", corelib="SaShiMi")


@register("sashimi-train", "forward and backward of SaShiMi, S4 at one rate and WaveNet")
def sashimi_train(quick: bool) -> Iterator[Row]:
    lengths = (32, 64) if quick else (256, 512, 1024, 2048, 4096)

    def contestants(L: int) -> dict[str, Callable]:
        codes = music(1, L, seed=1)
        return {name: training_step(model, codes) for name, model in networks(L).items()}

    result = sweep(lengths, contestants, check=None, repeats=3, min_time=0.02)
    yield from rows(result, what="forward + backward", shape="B1 float32", corelib="SaShiMi")


def training_step(model: nn.Module, codes: Tensor) -> Callable[[], Tensor]:
    def call(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, given, (codes[:, :-1],))[0]

    names = [name for name, _ in model.named_parameters()]
    return forward_backward(call, *model.parameters())


@register("sashimi-loss", "bits a sample against context, three networks trained alike")
def sashimi_loss(quick: bool) -> Iterator[Row]:
    """Seconds are per step; what was reached stands in ``what``."""
    steps, length, contexts = (2, 64, (8, 64)) if quick else (STEPS, 512, CONTEXTS)
    for run in learn(steps, length, contexts):
        told = ", ".join(f"{bits:.2f} after {k}" for k, bits in run["by_context"].items())
        yield Row(f"bits {told}", f"{steps} steps", run["network"], run["seconds"] / steps)


def main() -> None:
    """Train the three and write `RUNS`."""
    runs = []
    for run in learn(STEPS, 512, CONTEXTS):
        runs.append(run)
        print(run["network"], run["seconds"], run["by_context"], flush=True)
    stored = {"command": "python -m corelib.measure.races.audio", "runs": runs}
    text = json.dumps(stored).replace('{"network"', '\n{"network"')
    RUNS.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
