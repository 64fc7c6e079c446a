"""How each shipped model is trained: sizes, stages, learning rate, data."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..generation.gridit import GridConfig, SRConfig
from .decoder import DecoderConfig
from .kinds import find_kind
from .mixture import Mixture
from .recurrent import RecurrentConfig
from .vlm import VLMConfig


@dataclasses.dataclass(frozen=True)
class Stage:
    """``steps`` batches of ``rows`` sequences of ``length`` tokens, text made by ``mixture``.

    ``guidance``: how much the loss of the two guided heads counts (`guidance.guided_hidden`).
    """

    length: int
    rows: int
    steps: int
    mixture: Mixture = Mixture()
    guidance: float = 0.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A training run. ``kind``: one of `kinds.kind_names`, ``config``: the sizes of that kind.
    ``start``: the released model whose weights it begins with, instead of random ones.

    The learning rate rises over ``warmup`` steps, stays, and falls linearly to zero over the last
    ``decay`` of all steps; then again for ``restart`` more steps (a warm restart, Loshchilov &
    Hutter, arXiv 1608.03983). Batches are drawn from ``seed`` and the step number alone.
    """

    name: str
    kind: str
    config: Any
    stages: tuple[Stage, ...]
    lr: float = 3e-3
    warmup: int = 30
    decay: float = 0.25
    restart: int = 0
    seed: int = 1
    eval_every: int = 200
    start: str | None = None

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def tokens(self) -> int:
        return sum(stage.steps * stage.rows * stage.length for stage in self.stages)

    def stage_at(self, step: int) -> Stage:
        """The stage that step number ``step`` belongs to."""
        first = 0
        for stage in self.stages:
            first += stage.steps
            if step < first:
                return stage
        raise ValueError(f"step: expected 0 to {self.steps - 1}, got {step}")

    def lr_at(self, step: int) -> float:
        """The learning rate of step number ``step``."""
        first, last = 0, self.steps - self.restart
        if step >= last:
            first, last = last, self.steps
        falling = (last - step) / (self.decay * (last - first))
        return self.lr * min(1.0, (step - first + 1) / self.warmup, falling)

    def past(self, done: int) -> list[tuple]:
        """What decided the first ``done`` steps."""
        stages = [dataclasses.replace(self.stage_at(s), steps=0) for s in range(done)]
        return [(stage, self.lr_at(s)) for s, stage in enumerate(stages)]


def from_dict(stored: dict) -> Recipe:
    """The recipe that ``dataclasses.asdict`` took apart."""
    parts = dict(stored)
    parts["config"] = find_kind(parts["kind"]).config(**parts["config"])
    parts["stages"] = tuple(
        Stage(**{**stage, "mixture": Mixture(**stage["mixture"])}) for stage in parts["stages"]
    )
    return Recipe(**parts)


# Copying is what all retrieval is made of: a first stage of mostly repeats brings it early.
COPYING_FIRST = Mixture(passkey=0.0, mqar=0.20, repeats=0.40)
COPYING_STAYS = Mixture(passkey=0.10, mqar=0.10, repeats=0.10)
LOOKING_FAR = Mixture(passkey=0.30, mqar=0.06, repeats=0.04)
KEYS_AGAIN = Mixture(passkey=0.50, mqar=0.04, repeats=0.02)
MANY_KEYS = Mixture(passkey=0.45, mqar=0.06, repeats=0.03, most_keys=8)
# Numbers of few different digits: the digit before is no guide, only the place is.
FEW_DIGITS = dataclasses.replace(MANY_KEYS, fewest_digits=2)

RECURRENT_STAGES = (
    Stage(128, 32, 160, COPYING_FIRST),
    Stage(256, 16, 480, COPYING_STAYS),
    Stage(512, 8, 280),
    Stage(1024, 4, 120, LOOKING_FAR),
    Stage(2048, 2, 160, LOOKING_FAR),
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "text_lm",
            "decoder",
            DecoderConfig(qkv_bias=True),
            (
                Stage(128, 32, 160, COPYING_FIRST, guidance=0.5),
                Stage(256, 16, 600, COPYING_STAYS),
                Stage(512, 8, 500),
                Stage(1024, 4, 128),
                Stage(1024, 4, 272, LOOKING_FAR),
                Stage(2048, 4, 320, LOOKING_FAR),
                Stage(512, 16, 60, KEYS_AGAIN),
                Stage(2048, 4, 180, KEYS_AGAIN),
            ),
            restart=240,
        ),
        # More pass keys for text_lm (checkpoints/README.md has the way there).
        Recipe(
            "text_lm_recall",
            "decoder",
            DecoderConfig(qkv_bias=True),
            (
                Stage(512, 16, 220, MANY_KEYS),
                Stage(2048, 4, 200, MANY_KEYS),
                Stage(512, 16, 160, FEW_DIGITS),
                Stage(2048, 4, 360, FEW_DIGITS),
            ),
            lr=1e-3,
            decay=0.7,
            restart=520,
            seed=4,
            eval_every=60,
            start="text_lm",
        ),
        Recipe(
            "draft_lm",
            "decoder",
            DecoderConfig(
                width=128, layers=2, heads=2, kv_heads=1, head_width=64, hidden=352, qkv_bias=True
            ),
            (
                Stage(128, 32, 160, COPYING_FIRST, guidance=0.5),
                Stage(256, 16, 900, COPYING_STAYS),
                Stage(512, 8, 500),
                Stage(2048, 2, 300),
            ),
            seed=2,
        ),
        Recipe(
            "encoder",
            "encoder",
            DecoderConfig(width=192, layers=4, heads=3, kv_heads=3, hidden=512, context=1024),
            (Stage(256, 16, 1000), Stage(1024, 4, 250)),
            seed=3,
        ),
        Recipe(
            "mamba2_lm",
            "recurrent",
            RecurrentConfig("mamba2", width=192, layers=6, state=64, embedding_scale=192**0.5),
            RECURRENT_STAGES,
            decay=0.3,
            seed=7,
        ),
        Recipe(
            "mamba_lm",
            "recurrent",
            RecurrentConfig("mamba", width=192, layers=6, embedding_scale=192**0.5),
            RECURRENT_STAGES,
            decay=0.3,
            seed=8,
        ),
        Recipe("grid_dit", "grids", GridConfig(), (Stage(64, 32, 1600),), decay=0.5, seed=4),
        Recipe("frame_sr", "frames", SRConfig(), (Stage(16, 128, 500),), decay=0.5, seed=5),
        Recipe(
            "text_dlm",
            "masked_diffusion",
            DecoderConfig(qkv_bias=True, context=512),
            (Stage(256, 16, 640), Stage(512, 8, 200)),
            lr=2e-3,
            decay=0.3,
            seed=4,
            start="text_lm",
        ),
        Recipe(
            "tiny_vlm",
            "vlm",
            VLMConfig(),
            (Stage(229, 16, 560, guidance=0.5), Stage(229, 16, 240)),
            decay=0.35,
            seed=6,
            eval_every=80,
        ),
    )
}
